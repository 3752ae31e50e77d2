"""The unpadded encoder gives the numbers of the padded one, in every setting a Transformers user meets."""

import copy
import importlib
import inspect
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import tiny_config
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.methods import packing as packing_module
from ftlib.methods import unpadding
from ftlib.methods.unpadding import NAME, Packing, is_unpadded, pad_input, repad, unpad, unpad_input

OPTIONS = {  # model type -> what its tiny config needs beyond the sizes all share
    "albert": {},
    "bert": {},
    "camembert": {"pad_token_id": 1},
    "data2vec-text": {"pad_token_id": 1},
    "distilbert": {},
    "electra": {},
    "ernie": {},
    "eurobert": {"num_key_value_heads": 1, "head_dim": 8, "classifier_pooling": "bos"},  # two heads share one key
    "gte": {},
    "jina_embeddings_v3": {},
    "mobilebert": {"embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8},
    "modernbert": {"local_attention": 2, "global_attn_every_n_layers": 2},  # layer 0 global, layer 1 to its neighbors
    "nomic_bert": {},
    "roberta": {"pad_token_id": 1},
    "roberta-prelayernorm": {"pad_token_id": 1},
    "roc_bert": {},
    "xlm-roberta": {"pad_token_id": 1},
    "xlm-roberta-xl": {"pad_token_id": 1},
}
TYPES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in transformers.CONFIG_MAPPING, reason=f"this version of transformers has no {name}"
        ),
    )
    for name in OPTIONS
]
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],  # the last row is one token
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 1], [1, 1, 0, 0, 1]],
    "nothing to drop": [[1, 1, 1, 1, 1]] * 3,
    "an empty row": [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
}


def inputs_for(mask, pad=0):
    mask = torch.tensor(mask)
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def inputs_of(model_type, masks):
    return inputs_for(MASKS[masks], pad=OPTIONS[model_type].get("pad_token_id", 0))


def twins(tiny_model, *args, model_type="bert", **options):
    options = {**OPTIONS[model_type], **options, "model_type": model_type}
    return tiny_model(*args, **options), unpad(tiny_model(*args, **options))


def assert_gradients_equal(ours, stock):
    assert gradients(ours).keys() == gradients(stock).keys()
    for name, gradient in gradients(stock).items():
        assert_close(gradients(ours)[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------- by hand, 2 × 4


def test_unpad_input_and_pad_input_by_hand():
    hidden = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])[..., None]  # (2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    packed, packing = unpad_input(hidden, mask)
    assert packed.tolist() == [[[1.0], [2.0], [5.0], [6.0], [7.0]]]
    assert packing.indices.tolist() == [0, 1, 4, 5, 6]
    assert pad_input(packed * 10, packing)[..., 0].tolist() == [[10, 20, 0, 0], [50, 60, 70, 0]]


def test_the_first_position_is_kept_even_when_it_is_padding():
    hidden = torch.arange(1.0, 9.0).view(2, 4, 1)
    packed, packing = unpad_input(hidden, torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]).bool())
    assert packed.flatten().tolist() == [1, 3, 4, 5]
    assert packing.indices.tolist() == [0, 2, 3, 4]
    assert packing.mask.tolist() == [[False, False, True, True], [False] * 4]  # nobody attends to it


def test_round_trip_keeps_what_is_real():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 7, 3, generator=generator)  # (batch, tokens, hidden)
    mask = torch.rand(5, 7, generator=generator) > 0.4
    mask[:, 0] = True
    assert_close(pad_input(*unpad_input(hidden, mask)), hidden * mask[..., None], rtol=0, atol=0)


def test_pad_input_hands_gradients_to_the_right_place():
    packed, packing = unpad_input(torch.zeros(1, 3, 1), torch.tensor([[True, False, True]]))
    packed = packed.clone().requires_grad_()
    (pad_input(packed, packing)[0, :, 0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert packed.grad.flatten().tolist() == [1.0, 3.0]


# ------------------------------------------------------------------------------------- equal to the stock model


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_and_gradients_equal_the_stock_model(tiny_model, model_type, masks):
    inputs = inputs_of(model_type, masks)
    stock, ours = twins(tiny_model, "sequence-classification", 3, model_type=model_type)
    # A stock model gives an empty row numbers that mean nothing; they must not touch the other rows.
    rows = inputs["attention_mask"].any(1)
    labels = torch.tensor([0, 2, 1])
    for mode in (False, True):  # train mode with dropout 0 must give the same
        for model in (stock, ours):
            model.train(mode).zero_grad()
        theirs, mine = stock(**inputs).logits, ours(**inputs).logits
        assert mine.isfinite().all()
        assert_close(mine[rows], theirs[rows], atol=1e-5, rtol=0)
        for logits in (theirs, mine):
            F.cross_entropy(logits[rows], labels[rows]).backward()
        assert_gradients_equal(ours, stock)


@pytest.mark.parametrize("masks", ["right", "left", "holes", "an empty row"])
@pytest.mark.parametrize("model_type", TYPES)
def test_token_logits_are_equal_at_real_tokens(tiny_model, model_type, masks):
    inputs = inputs_of(model_type, masks)
    stock, ours = twins(tiny_model, "token-classification", 3, model_type=model_type)
    real = inputs["attention_mask"].bool()
    theirs, mine = stock(**inputs).logits[real], ours(**inputs).logits[real]
    assert_close(mine, theirs, atol=1e-5, rtol=0)
    for logits in (theirs, mine):
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    assert_gradients_equal(ours, stock)


@pytest.mark.parametrize("head", ["AutoModelForMaskedLM", "AutoModelForQuestionAnswering"])
@pytest.mark.parametrize("model_type", TYPES)
def test_masked_language_models_and_question_answering(model_type, head):
    config, auto = tiny_config(model_type, **OPTIONS[model_type]), getattr(transformers, head)
    if type(config) not in auto._model_mapping:
        pytest.skip(f"transformers has no {head} for {model_type}")
    stock = auto.from_config(config).eval()
    ours = unpad(copy.deepcopy(stock))
    inputs = inputs_of(model_type, "right")
    real = inputs["attention_mask"].bool()
    theirs, mine = stock(**inputs), ours(**inputs)
    names = [name for name in theirs if name.endswith("logits")]
    assert names
    for name in names:
        assert_close(mine[name][real], theirs[name][real], atol=1e-5, rtol=0)
    for output in (theirs, mine):  # not the stock loss of question answering: it ranks padding too
        losses = [torch.logsumexp(output[name][real].flatten(), 0) for name in names]
        torch.stack(losses).sum().backward()
    assert_gradients_equal(ours, stock)


@pytest.mark.parametrize("head", ["modernbert mean", "eurobert mean", "eurobert late"])
def test_heads_that_average_over_real_tokens(tiny_model, head):
    model_type, pooling = head.split()
    stock, ours = twins(tiny_model, model_type=model_type, classifier_pooling=pooling)
    for masks in ("right", "left"):
        inputs = inputs_of(model_type, masks)
        assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", ["local", "global"])
@pytest.mark.parametrize("masks", MASKS)
def test_modernbert_windows(tiny_model, masks, layers):
    """Each kind of attention layer alone; 40 tokens and a window of 6 tokens to each side."""
    options = {"layer_types": ["full_attention" if layers == "global" else "sliding_attention"] * 2}
    stock, ours = twins(tiny_model, "token-classification", model_type="modernbert", local_attention=12, **options)
    mask = torch.tensor(MASKS[masks]).repeat_interleave(8, dim=1)
    inputs = inputs_for(mask.tolist())
    assert_close(ours(**inputs).logits[mask > 0], stock(**inputs).logits[mask > 0], atol=1e-5, rtol=0)
    without_mask = {"input_ids": inputs["input_ids"]}
    assert_close(ours(**without_mask).logits, stock(**without_mask).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_takes_embeddings_and_half_precision(tiny_model, model_type):
    stock, ours = twins(tiny_model, "encoder", model_type=model_type)
    inputs = inputs_of(model_type, "right")
    mask = inputs["attention_mask"]
    embedded = {"inputs_embeds": stock.get_input_embeddings()(inputs["input_ids"]).detach(), "attention_mask": mask}
    with torch.no_grad():
        theirs, mine = (m(**embedded).last_hidden_state[mask > 0] for m in (stock, ours))
        assert_close(mine, theirs, atol=1e-5, rtol=0)
        theirs, mine = (m.bfloat16()(**inputs).last_hidden_state[mask > 0] for m in (stock, ours))
    assert mine.dtype == torch.bfloat16
    assert_close(mine.float(), theirs.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("model_type", ["nomic_bert", "jina_embeddings_v3"])
def test_packed_inputs_by_position_and_by_name(tiny_model, model_type):
    """Arguments given by position, positions and token types of one's own, and a pooler inside the base model."""
    stock, ours = twins(tiny_model, "encoder", model_type=model_type, type_vocab_size=2)
    inputs = inputs_for(MASKS["left"])
    types = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0] * 5])
    for positions in (None, torch.tensor([[7, 5, 3, 2, 1]]), (inputs["attention_mask"].cumsum(1) * 2)):
        outputs = [
            model(inputs["input_ids"], inputs["attention_mask"], token_type_ids=types, position_ids=positions)
            for model in (stock, ours)
        ]
        real = inputs["attention_mask"].bool()
        assert_close(outputs[1][0][real], outputs[0][0][real], atol=1e-5, rtol=0)
        assert (outputs[1].pooler_output is None) == (model_type == "nomic_bert")
        if outputs[1].pooler_output is not None:
            assert_close(outputs[1].pooler_output, outputs[0].pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", TYPES)
def test_layers_see_real_tokens_only(tiny_model, model_type, monkeypatch):
    model = unpad(tiny_model("encoder", model_type=model_type, **OPTIONS[model_type]))
    packings, attended, packing_of, attend = [], [], Packing.of, packing_module.attend_padded
    monkeypatch.setattr(packing_module.speedups, "computed_in", lambda x: None)
    monkeypatch.setattr(Packing, "of", lambda *a, **k: packings.append(packing_of(*a, **k)) or packings[-1])
    monkeypatch.setattr(
        packing_module, "attend_padded", lambda q, *args: attended.append((q.shape[2], args[2])) or attend(q, *args)
    )
    with torch.no_grad():
        model(**inputs_of(model_type, "right"))
    assert len(packings) == 1  # once a forward pass, not once a layer
    assert [(tokens, packing is packings[0]) for tokens, packing in attended] == [(9, True)] * 2


@pytest.mark.parametrize("masks", ["right", "left", "an empty row"])
@pytest.mark.parametrize("model_type", TYPES)
def test_attention_on_a_cpu_runs_on_packed_tokens_where_padding_is_on_the_right(
    tiny_model, model_type, masks, monkeypatch
):
    model = unpad(tiny_model("encoder", model_type=model_type, **OPTIONS[model_type]))
    lengths, attend = [], packing_module.speedups.attend
    monkeypatch.setattr(packing_module.speedups, "attend", lambda *args: lengths.append(args[3]) or attend(*args))
    with torch.no_grad():
        model(**inputs_of(model_type, masks))
    expected = [int(n) for n in torch.tensor(MASKS["right"]).sum(1)]
    assert all(found == expected for found in lengths)
    assert len(lengths) == (0 if masks != "right" else 1 if model_type == "modernbert" else 2)  # one layer has a window


def test_tokens_are_rounded_up_for_onednn_and_what_is_added_changes_nothing(tiny_model, monkeypatch):
    stock, ours = twins(tiny_model, max_position_embeddings=64)
    mask = (torch.arange(50) < torch.arange(31, 51)[:, None]).long()  # 20 rows of 31 to 50 tokens, 810 in all
    inputs = {"input_ids": torch.randint(5, 60, mask.shape), "attention_mask": mask}
    for onednn, tokens in ((True, 816), (False, 810)):
        monkeypatch.setattr(packing_module.speedups, "ONEDNN", onednn)
        seen, layer = [], ours.bert.encoder.layer[0]
        hook = layer.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].shape))
        theirs, mine = stock(**inputs).logits, ours(**inputs).logits
        hook.remove()
        assert seen == [(1, tokens, 16)]
        assert_close(mine, theirs, atol=1e-5, rtol=0)
        for model, logits in ((stock, theirs), (ours, mine)):
            model.zero_grad()
            logits.logsumexp((0, 1)).backward()
        assert_gradients_equal(ours, stock)


def test_no_mask_and_a_mask_of_ones(tiny_model):
    stock, ours = twins(tiny_model)
    ids = inputs_for(MASKS["right"])["input_ids"]
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        assert_close(ours(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
        assert_close(ours(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected, atol=1e-5, rtol=0)
        assert_close(ours(input_ids=ids, attention_mask=torch.ones(3, 5)).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_every_dtype(tiny_model, dtype):
    stock, ours = twins(tiny_model)
    inputs = inputs_for(MASKS["right"])
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    with torch.no_grad():
        assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0)


def test_token_types_positions_and_embeddings_go_through(tiny_model):
    stock, ours = twins(tiny_model)
    inputs = inputs_for(MASKS["left"])
    mask = inputs["attention_mask"]
    extra = {
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0] * 5]),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    embeddings = stock.bert.embeddings.word_embeddings(inputs["input_ids"]).detach()
    with torch.no_grad():
        expected = stock(**inputs, **extra).logits
        assert_close(ours(**inputs, **extra).logits, expected, atol=1e-5, rtol=0)
        assert_close(ours(inputs_embeds=embeddings, attention_mask=mask, **extra).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_are_put_back(tiny_model, model_type, return_dict):
    inputs = inputs_of(model_type, "right")
    stock, ours = twins(tiny_model, "encoder", model_type=model_type)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        theirs = stock(**inputs, output_hidden_states=True, return_dict=return_dict)
        mine = ours(**inputs, output_hidden_states=True, return_dict=return_dict)
    states = (theirs.hidden_states, mine.hidden_states) if return_dict else (theirs[-1], mine[-1])
    assert len(states[0]) == len(states[1]) == 3
    for theirs_layer, my_layer in zip(*states, strict=True):
        assert my_layer.shape == theirs_layer.shape == (3, 5, 16)
        assert_close(my_layer[real], theirs_layer[real], atol=1e-5, rtol=0)
    assert not mine[0][~real].any()  # zeros where there was padding


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_forward_called_past_the_hooks(tiny_model, model_type):
    """As sentence-transformers does; it and the Trainer also read the signature."""
    stock, ours = twins(tiny_model, "encoder", model_type=model_type)
    assert inspect.signature(ours.forward) == inspect.signature(stock.forward)
    inputs = inputs_for(MASKS["right"])
    real = inputs["attention_mask"].bool()
    theirs, mine = (m.forward(**inputs, output_hidden_states=True).hidden_states for m in (stock, ours))
    for their_layer, my_layer in zip(theirs, mine, strict=True):
        assert_close(my_layer[real], their_layer[real], atol=1e-5, rtol=0)


def test_hidden_states_of_a_task_model_and_a_pass_without_padding(tiny_model):
    ours = unpad(tiny_model())
    with torch.no_grad():
        assert [s.shape for s in ours(**inputs_for(MASKS["right"]), output_hidden_states=True).hidden_states] == [
            (3, 5, 16)
        ] * 3
        full = inputs_for(MASKS["nothing to drop"])
        assert [s.shape for s in ours(**full, output_hidden_states=True).hidden_states] == [(3, 5, 16)] * 3


def test_a_failed_pass_leaves_nothing_behind(tiny_model):
    """The pooler fails after the layers ran; the next pass must not see the first one's packing."""
    ours, stock = unpad(tiny_model("encoder")), tiny_model("encoder")
    pooler, ours.pooler = ours.pooler, torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        ours(**inputs_for(MASKS["right"]))
    ours.pooler = pooler
    full = inputs_for(MASKS["nothing to drop"])
    with torch.no_grad():
        mine, theirs = (m(**full, output_hidden_states=True).hidden_states for m in (ours, stock))
    assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_model, reentrant, model_type):
    stock, ours = twins(tiny_model, model_type=model_type)
    inputs, labels = inputs_for(MASKS["right"]), torch.tensor([0, 1, 1])
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    for model in (stock, ours):
        model.train()(**inputs, labels=labels).loss.backward()
    assert_gradients_equal(ours, stock)


@pytest.mark.parametrize(("backend", "model_type"), [("eager", "modernbert"), ("aot_eager", "bert")])
def test_under_compile(tiny_model, backend, model_type):
    stock, ours = twins(tiny_model, model_type=model_type, num_hidden_layers=1)
    torch._dynamo.reset()
    compiled, labels = torch.compile(ours, backend=backend, dynamic=True), torch.tensor([0, 1, 1])
    for masks in ("right", "left"):  # the same graph must not keep the first one's packing
        inputs = inputs_for(MASKS[masks])
        for model in (stock, compiled):
            model.zero_grad()
            model(**inputs, labels=labels).loss.backward()
        assert_gradients_equal(ours, stock)
    torch._dynamo.reset()


def test_bfloat16_autocast(tiny_model):
    stock, ours = twins(tiny_model)
    inputs = inputs_for(MASKS["right"])
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = stock(**inputs).logits, ours(**inputs).logits
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert_close(mine.float(), theirs.float(), atol=2e-2, rtol=0)
    mine.float().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(ours).values())


def test_half_precision_weights(tiny_model):
    stock, ours = (model.to(torch.bfloat16) for model in twins(tiny_model))
    with torch.no_grad():
        mine, theirs = (m(**inputs_for(MASKS["right"])).logits for m in (ours, stock))
    assert_close(mine.float(), theirs.float(), atol=2e-2, rtol=0)


def test_dropout_is_on_in_training_and_off_in_evaluation(tiny_model):
    model = unpad(tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    inputs = inputs_for(MASKS["right"])
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)
        assert not torch.equal(model.train()(**inputs).logits, model(**inputs).logits)


# -------------------------------------------------------------------------------------------- on, off, copies


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "jina_embeddings_v3"])
def test_repad_undoes_exactly(tiny_model, implementation, model_type):
    model = tiny_model("encoder", model_type=model_type, attn_implementation=implementation)

    def hooks():
        return [
            (name, len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m))
            for name, m in model.named_modules()
        ]

    inputs, before = inputs_for(MASKS["right"]), hooks()
    expected = model(**inputs).last_hidden_state
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert unpad(unpad(model)) is model and is_unpadded(model)
    assert repad(repad(model)) is model and not is_unpadded(model)
    assert model.config._attn_implementation == implementation
    assert hooks() == before
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_repad_of_a_stock_model_changes_nothing(tiny_model):
    model = tiny_model(attn_implementation="eager")
    assert repad(model) is model and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_attention_maps_after_repad_and_back(tiny_model, model_type):
    model = unpad(tiny_model(model_type=model_type, **OPTIONS[model_type]))
    inputs = inputs_for(MASKS["right"])
    expected = model(**inputs).logits
    with pytest.raises(
        ValueError, match=f"output_attentions=True: an unpadded {model_type} keeps no attention weights"
    ):
        model(**inputs, output_attentions=True)
    model.set_attn_implementation("eager")  # switched by hand: the hooks must stand aside
    assert model(**inputs, output_attentions=True).attentions[0].shape == (3, 2, 5, 5)
    assert not is_unpadded(model)
    assert_close(unpad(model)(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert len(unpadding._encoder_of(model.base_model)._forward_pre_hooks) == (model_type == "bert")


def test_attention_maps_asked_for_in_the_config(tiny_model):
    model = tiny_model(attn_implementation="eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        unpad(model)(**inputs_for(MASKS["right"]))


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "jina_embeddings_v3"])
def test_copies_and_pickles_work_and_are_unpadded(tiny_model, model_type):
    model = unpad(tiny_model("encoder", model_type=model_type, **OPTIONS[model_type]))
    inputs = inputs_for(MASKS["right"])
    expected = model(**inputs).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_unpadded(other) and other.forward.args[0] is other
        assert torch.equal(other(**inputs).last_hidden_state, expected)
        repad(other)
        assert is_unpadded(model)
        assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in other.modules())


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_a_saved_model_opens_as_a_stock_model(tiny_model, tmp_path, model_type):
    model = unpad(tiny_model(model_type=model_type, **OPTIONS[model_type]))
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert stock.config._attn_implementation == "sdpa" and not any(module._forward_hooks for module in stock.modules())
    inputs = inputs_for(MASKS["right"])
    assert_close(stock(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mpnet", {}), ("deberta-v2", {}), ("fnet", {}),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(tiny_model, model_type, options):
    model = tiny_model("encoder", model_type=model_type, **options)
    before = model.config._attn_implementation
    with pytest.raises(
        ValueError, match=rf"can't handle model type '{model_type}'; it handles models .*: albert, bart, bert"
    ):
        unpad(model)
    assert model.config._attn_implementation == before and not is_unpadded(model)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(3, 1, 5, 5).bool(), r"\(3, 1, 5, 5\)"),
        (torch.ones(3, 7), r"\(3, 7\)"),  # what prefix tuning makes
        ({"full_attention": None}, "dict"),
    ],
)
def test_masks_of_ones_own_are_refused(tiny_model, model_type, mask, found):
    model = unpad(tiny_model(model_type=model_type, **OPTIONS[model_type]))
    ids = inputs_for(MASKS["right"])["input_ids"]
    with pytest.raises(ValueError, match=rf"unpadded {model_type} needs .* \(3, 5\), got {found}; .*repad\(model\)"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("options", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
def test_bert_as_a_decoder_is_refused(tiny_model, options):
    with pytest.raises(ValueError, match="unpad handles no cross-attention, and no bert as a decoder"):
        unpad(tiny_model("encoder", **options))


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_models_that_share_a_config(model_type):
    """`unpad` writes into it: the other model, as it came, must not take that for its own."""
    config = tiny_config(model_type, **OPTIONS[model_type])
    first, second = (transformers.AutoModel.from_config(config).__class__(config).eval() for _ in range(2))
    inputs = inputs_for(torch.ones(5, 5).tril().long().tolist())  # as many rows as tokens: masks could be mixed up
    real = inputs["attention_mask"].bool()
    expected = second(**inputs).last_hidden_state[real]
    unpad(first)
    assert is_unpadded(first) and not is_unpadded(second)
    assert_close(second(**inputs).last_hidden_state[real], expected, atol=1e-5, rtol=0)
    assert_close(unpad(second)(**inputs).last_hidden_state[real], expected, atol=1e-5, rtol=0)
    assert is_unpadded(second)
    repad(second)
    assert config._attn_implementation == "sdpa"
    assert_close(second(**inputs).last_hidden_state[real], expected, atol=1e-5, rtol=0)


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="model type 'Linear'"):
        unpad(torch.nn.Linear(2, 2))


def test_packing_tells_where_tokens_are():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    packing = Packing.of(mask)  # the empty row keeps one token
    assert packing.indices.tolist() == [0, 1, 2, 4, 8, 9] and packing.mask is mask
    assert packing.longest == 3
    assert packing.cu_seqlens is None and packing.lengths is None  # the token kept is not to be attended to
    packing = Packing.of(mask[::2])
    assert packing.cu_seqlens.tolist() == [0, 3, 5] and packing.cu_seqlens.dtype == torch.int32
    assert packing.lengths == [3, 2] and packing.spare == 0
    assert Packing.of(mask[::2].flip(1)).cu_seqlens is None  # padding on the left
    assert Packing.of(torch.tensor([[1, 0, 1]]).bool()).cu_seqlens is None
    assert Packing.of(torch.ones(2, 3).bool()).cu_seqlens.tolist() == [0, 3, 6]
    left = Packing.of(torch.tensor([[0, 1], [1, 1]]).bool())  # every position is kept, but one is padding
    assert len(left.indices) == 4 and left.cu_seqlens is None


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "llama"])
def test_a_mask_that_came_from_the_cpu_is_looked_at_there(tiny_model, model_type, monkeypatch):
    """`to_device` leaves the CPU's tensor at the one it moved; changed since, it counts for nothing."""
    model, hosts, packing_of = unpad(tiny_model("encoder", model_type=model_type)), [], Packing.of
    monkeypatch.setattr(Packing, "of", lambda mask, host, *a: hosts.append(host) or packing_of(mask, host, *a))
    inputs = inputs_for(MASKS["right"])
    plain = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = moved = mask.clone()
    moved.host = mask
    assert_close(model(**inputs).last_hidden_state, plain, atol=0, rtol=0)
    moved[0, -1] = moved[0, -1]  # in place
    model(**inputs)
    assert [host is mask for host in hosts] == [False, True, False] and hosts[0] is hosts[2] is None
    left = torch.tensor([[0, 1], [1, 1]]).bool()
    for a, b in zip(packing_of(left, left.clone()), packing_of(left), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ------------------------------------------------------------------------- attention on the packed tokens (GPU)


def varlen_by_loop(query, key, value, ends, ends_k, longest, longest_k, *, scale=None, window_size=(-1, -1)):
    """What torch.nn.attention.varlen.varlen_attn computes, one example after the other; all (N_tokens, heads, dim)."""
    assert ends is ends_k and ends.dtype == torch.int32 and longest == longest_k == int(ends.diff().max())
    out = []
    for q, k, v in zip(*(x.split(ends.diff().tolist()) for x in (query, key, value)), strict=True):
        distance = torch.arange(len(q)) - torch.arange(len(q))[:, None]
        left, right = (size if size >= 0 else len(q) for size in window_size)
        seen = (distance >= -left) & (distance <= right)
        out.append(F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), seen, scale=scale))
    return torch.cat(out, dim=1).transpose(0, 1)


@pytest.fixture
def varlen(monkeypatch):
    """Attention on packed tokens on the CPU, by `varlen_by_loop`; the list says with which windows it was called."""
    import torch.nn.attention.varlen as module

    windows = []

    def counted(*args, **options):
        windows.append(options.get("window_size"))
        return varlen_by_loop(*args, **options)

    counted.__kwdefaults__ = {}  # a torch whose kernel takes as many heads of keys as of queries
    monkeypatch.setattr(module, "varlen_attn", counted)
    monkeypatch.setattr(packing_module, "can_varlen", lambda q, packing, p: packing.cu_seqlens is not None and not p)
    monkeypatch.setattr(packing_module.speedups, "computed_in", lambda x: None)
    return windows


@pytest.mark.parametrize("masks", ["right", "an empty row", "left", "holes"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "modernbert", "eurobert"])
def test_attention_on_packed_tokens(tiny_model, varlen, model_type, masks):
    stock, ours = twins(tiny_model, "token-classification", 3, model_type=model_type)
    inputs = inputs_of(model_type, masks)
    real = inputs["attention_mask"].bool()
    theirs, mine = stock(**inputs).logits[real], ours(**inputs).logits[real]
    assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert varlen == ([(-1, -1), (1, 1) if model_type == "modernbert" else (-1, -1)] if masks == "right" else [])
    for logits in (theirs, mine):
        logits.logsumexp((0, 1)).backward()
    assert_gradients_equal(ours, stock)


def test_attention_dropout_keeps_off_the_packed_kernel(tiny_model, varlen):
    model = unpad(tiny_model(attention_probs_dropout_prob=0.5)).train()
    model(**inputs_for(MASKS["right"]))
    assert varlen == []
    model.eval()(**inputs_for(MASKS["right"]))
    assert varlen == [(-1, -1)] * 2


def test_when_the_packed_kernel_can_run():
    """Never on the CPU; what else it asks for is asked before the GPU is."""
    query, packing = torch.zeros(1, 2, 9, 8), Packing.of(torch.tensor(MASKS["right"]).bool())
    assert not packing_module.can_varlen(query.bfloat16(), packing, 0.0)


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA GPU with FlashAttention (compute capability 8.0)",
)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_on_the_gpu_in_half_precision(tiny_model, model_type, dtype, monkeypatch):
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "local_attention": 16, "max_position_embeddings": 64}
    stock, ours = (m.cuda() for m in twins(tiny_model, "token-classification", 3, model_type=model_type, **sizes))
    calls, attend = [], packing_module.attend_varlen
    monkeypatch.setattr(packing_module, "attend_varlen", lambda *args: calls.append(args[-1]) or attend(*args))
    mask = torch.arange(64) < torch.tensor([64, 17, 1, 40])[:, None]
    inputs = {name: value.cuda() for name, value in inputs_for(mask.long().tolist()).items()}
    theirs = stock(**inputs).logits[mask.cuda()]  # float32, padded
    with torch.autocast("cuda", dtype):
        mine = ours(**inputs).logits[mask.cuda()]
    assert calls == ([None, 8] * 2 if model_type == "modernbert" else [None] * 4)
    assert_close(mine.float(), theirs, atol=2e-2, rtol=2e-2)
    for logits in (theirs, mine.float()):
        logits.logsumexp((0, 1)).backward()
    for name, gradient in gradients(stock).items():
        assert (gradients(ours)[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-3, name


@needs_gpu
def test_on_the_gpu_a_pass_waits_once(tiny_model):
    model = unpad(tiny_model("encoder")).cuda().bfloat16()
    inputs = {name: value.cuda() for name, value in inputs_for(MASKS["right"]).items()}
    with torch.no_grad():
        model(**inputs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as seen:
                model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in seen) == 1


# ------------------------------------------------------------------------------- inside other people's libraries


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_in_the_stock_trainer(tiny_model, tmp_path, model_type):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(12):
        length = int(torch.randint(1, 9, (), generator=generator))
        rows.append({"input_ids": torch.randint(5, 60, (length,), generator=generator).tolist(), "labels": i % 2})

    def pad(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        out = {"input_ids": [], "attention_mask": [], "labels": [row["labels"] for row in batch]}
        for row in batch:
            missing = longest - len(row["input_ids"])
            out["input_ids"].append(row["input_ids"] + [0] * missing)
            out["attention_mask"].append([1] * len(row["input_ids"]) + [0] * missing)
        return {key: torch.tensor(value) for key, value in out.items()}

    losses, models = [], twins(tiny_model, model_type=model_type)
    for model in models:
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2,
            report_to="none", save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=pad)
        trainer.train()
        losses.append(torch.tensor([record["loss"] for record in trainer.state.log_history if "loss" in record]))
    assert len(losses[0]) == 6
    assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    for (name, stock), ours in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert_close(ours, stock, atol=1e-4, rtol=0, msg=name)


def test_the_stock_trainer_evaluates_goes_on_and_saves_a_plain_model(tiny_model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (12,), generator=generator).tolist()
    rows = [{"input_ids": torch.randint(5, 60, (n,), generator=generator).tolist(), "text": "dropped"} for n in lengths]
    rows = [row | {"labels": [token % 2 for token in row["input_ids"]]} for row in rows]
    found = []
    for name, model in zip(("stock", "ours"), twins(tiny_model, "token-classification"), strict=True):
        arguments = transformers.TrainingArguments(
            str(tmp_path / name), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=0,
            report_to="none", use_cpu=True, disable_tqdm=True, eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
        trainer.train()
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-3"))
        predicted = trainer.predict(rows)
        labeled = torch.tensor(predicted.label_ids) != -100
        losses = torch.tensor([record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record])
        found.append((losses, torch.tensor(predicted.predictions)[labeled]))
        trainer.save_model(str(tmp_path / name))
        assert is_unpadded(trainer.model) == (name == "ours")
    assert len(found[0][0]) == 2
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=0)
    plain = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "ours")
    batch = collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    real = batch["attention_mask"].bool()
    assert not is_unpadded(plain) and plain.config._attn_implementation == "sdpa"
    assert_close(plain(**batch).logits[real], trainer.model.eval()(**batch).logits[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "distilbert"])
def test_copies_on_several_gpus_compute_with_their_own_weights(tiny_model, monkeypatch, model_type):
    def copied(tensors, devices, detach=False):  # as PyTorch sends them, without a GPU
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    parallel = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(parallel, "_broadcast_coalesced_reshape", copied)
    monkeypatch.setattr(parallel, "_get_device_index", lambda device, _: device)
    stock, model = twins(tiny_model, model_type=model_type)
    inputs, labels = inputs_for(MASKS["right"]), torch.tensor([0, 1, 1])
    expected = stock(**inputs).logits
    with torch.no_grad():
        copies = parallel.replicate(model, [0, 1])
        for parameter in model.parameters():  # so that a copy that computes with them is seen
            parameter.zero_()
    for one in copies:
        assert_close(one(**inputs, labels=labels).logits, expected, atol=1e-5, rtol=0)
    assert not any("_replicate_for_data_parallel" in vars(module) for module in repad(model).modules())


@pytest.mark.parametrize(("model_type", "targets"), [("bert", ["query", "value"]), ("modernbert", ["Wqkv"])])
def test_under_lora(tiny_model, model_type, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, task_type="SEQ_CLS")
    models = []
    for around in (lambda m: m, lambda m: unpad(m)):
        torch.manual_seed(3)
        model = around(peft.get_peft_model(tiny_model(model_type=model_type, **OPTIONS[model_type]), config))
        with torch.no_grad():  # LoRA's B starts at zero, which would hide a mistake
            for i, (name, parameter) in enumerate(model.named_parameters()):
                if "lora_B" in name:
                    parameter.fill_(0.01 * (i + 1))
        models.append(model.train())
    assert is_unpadded(models[1])
    inputs, labels = inputs_for(MASKS["right"]), torch.tensor([0, 1, 1])
    outputs = [model(**inputs, labels=labels) for model in models]
    for output in outputs:
        output.loss.backward()
    assert_close(outputs[1].logits, outputs[0].logits, atol=1e-5, rtol=0)
    theirs, mine = map(gradients, models)
    assert theirs.keys() == mine.keys() and any("lora_A" in name for name in mine)
    for name in theirs:
        assert_close(mine[name], theirs[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "nomic_bert"])
def test_inside_sentence_transformers(tiny_model, tiny_tokenizer, tmp_path, model_type):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as parts

    tiny_model("encoder", model_type=model_type, **OPTIONS[model_type]).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    stack = parts.Transformer(str(tmp_path))
    encoder = st.SentenceTransformer(modules=[stack, parts.Pooling(16, "mean")], device="cpu")
    texts = ["the film is good and fun", "bad", "a great plot we book"]
    expected = encoder.encode(texts, convert_to_tensor=True)
    unpad(stack.auto_model)
    assert is_unpadded(stack.auto_model)
    assert_close(encoder.encode(texts, convert_to_tensor=True), expected, atol=1e-5, rtol=0)


def test_copies_under_other_names_keep_out_of_each_others_way(tiny_model, tmp_path, monkeypatch):
    """The files that the first lines name, in two packages beside this one: three attentions in one process."""
    here, folder = Path(unpadding.__file__).parents[1], tmp_path / "copies"
    files = ("methods/unpadding.py", "methods/packing.py", "methods/speedups.py", "core/anatomy.py")
    assert "To copy: this file, methods/packing.py, methods/speedups.py, core/anatomy.py, torch" in unpadding.__doc__
    modules = [unpadding]
    for package in ("ours", "theirs"):
        for file in files:
            (folder / package / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(here / file, folder / package / file)
        monkeypatch.syspath_prepend(str(folder))
        modules.append(importlib.import_module(f"{package}.methods.unpadding"))
    assert len({module.NAME for module in modules}) == 3
    inputs, expected = inputs_for(MASKS["right"]), tiny_model()(**inputs_for(MASKS["right"])).logits
    models = [module.unpad(tiny_model()) for module in modules]
    for module, model in zip(modules, models, strict=True):
        assert module.is_unpadded(model) and model.config._attn_implementation == module.NAME
        assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
        assert sum(other.is_unpadded(model) for other in modules) == 1
        other = modules[modules.index(module) - 1]
        with pytest.raises(ValueError, match=r"another copy of unpad is on \(.*\); call its repad\(model\) first"):
            other.unpad(model)
        assert_close(other.unpad(module.repad(model))(**inputs).logits, expected, atol=1e-5, rtol=0)
