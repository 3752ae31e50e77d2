"""The unpadded encoder gives the numbers of the padded one, in every setting a Transformers user meets."""

import copy
import pickle

import pytest
import torch
import transformers
from torch.testing import assert_close

from ftlib.unpadding import NAME, Packing, is_unpadded, pad_input, repad, unpad, unpad_input

TYPES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "camembert")
PADS_WITH_ONE = ("roberta", "xlm-roberta", "camembert")
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],  # the last row is one token
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 1], [1, 1, 0, 0, 1]],
    "nothing to drop": [[1, 1, 1, 1, 1]] * 3,
    "an empty row": [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
}


def options_for(model_type):
    return {"pad_token_id": 1} if model_type in PADS_WITH_ONE else {}


def inputs_for(mask, pad=0):
    mask = torch.tensor(mask)
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def twins(tiny_model, *args, **options):
    return tiny_model(*args, **options), unpad(tiny_model(*args, **options))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------- by hand, 2 × 4


def test_unpad_input_and_pad_input_by_hand():
    hidden = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])[..., None]  # (2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    packed, packing = unpad_input(hidden, mask)
    assert packed.tolist() == [[[1.0], [2.0], [5.0], [6.0], [7.0]]]
    assert packing.indices.tolist() == [0, 1, 4, 5, 6]
    assert (packing.batch, packing.tokens) == (2, 4)
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
    inputs = inputs_for(MASKS[masks], pad=options_for(model_type).get("pad_token_id", 0))
    stock, ours = twins(tiny_model, "sequence-classification", 3, model_type=model_type, **options_for(model_type))
    if masks == "an empty row":  # a stock model gives such a row numbers that mean nothing; it must not touch others
        with torch.no_grad():
            assert_close(ours(**inputs).logits[[0, 2]], stock(**inputs).logits[[0, 2]], atol=1e-5, rtol=0)
            assert ours(**inputs).logits.isfinite().all()
        return
    for mode in (False, True):  # train mode with dropout 0 must give the same
        stock.train(mode).zero_grad()
        ours.train(mode).zero_grad()
        labels = torch.tensor([0, 2, 1])
        theirs, mine = stock(**inputs, labels=labels), ours(**inputs, labels=labels)
        assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=0)
        theirs.loss.backward()
        mine.loss.backward()
        assert gradients(ours).keys() == gradients(stock).keys()
        for name, gradient in gradients(stock).items():
            assert_close(gradients(ours)[name], gradient, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("masks", ["right", "left"])
@pytest.mark.parametrize("model_type", TYPES)
def test_token_logits_are_equal_at_real_tokens(tiny_model, model_type, masks):
    inputs = inputs_for(MASKS[masks], pad=options_for(model_type).get("pad_token_id", 0))
    stock, ours = twins(tiny_model, "token-classification", 3, model_type=model_type, **options_for(model_type))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_close(ours(**inputs).logits[real], stock(**inputs).logits[real], atol=1e-5, rtol=0)


def test_layers_see_real_tokens_only(tiny_model):
    model, seen = unpad(tiny_model()), []
    for layer in model.bert.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    model(**inputs_for(MASKS["right"]))
    assert seen == [(1, 9, 16), (1, 9, 16)]


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
    inputs = inputs_for(MASKS["right"], pad=options_for(model_type).get("pad_token_id", 0))
    stock, ours = twins(tiny_model, "encoder", model_type=model_type, **options_for(model_type))
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_model, reentrant):
    stock, ours = twins(tiny_model)
    inputs, labels = inputs_for(MASKS["right"]), torch.tensor([0, 1, 1])
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    for model in (stock, ours):
        model.train()(**inputs, labels=labels).loss.backward()
    for name, gradient in gradients(stock).items():
        assert_close(gradients(ours)[name], gradient, atol=1e-5, rtol=0, msg=name)


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
def test_repad_undoes_exactly(tiny_model, implementation):
    model = tiny_model(attn_implementation=implementation)
    hooks = lambda: [(n, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()]  # noqa: E731
    inputs, before = inputs_for(MASKS["right"]), hooks()
    expected = model(**inputs).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert unpad(unpad(model)) is model and is_unpadded(model)
    assert repad(repad(model)) is model and not is_unpadded(model)
    assert model.config._attn_implementation == implementation
    assert hooks() == before
    assert torch.equal(model(**inputs).logits, expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_repad_of_a_stock_model_changes_nothing(tiny_model):
    model = tiny_model(attn_implementation="eager")
    assert repad(model) is model and model.config._attn_implementation == "eager"


def test_attention_maps_after_repad_and_back(tiny_model):
    model = unpad(tiny_model())
    inputs = inputs_for(MASKS["right"])
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")  # switched by hand: the hooks must stand aside
    assert model(**inputs, output_attentions=True).attentions[0].shape == (3, 2, 5, 5)
    assert not is_unpadded(model)
    assert_close(unpad(model)(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert len(model.bert.encoder._forward_pre_hooks) == 1


def test_copies_and_pickles_work_and_are_unpadded(tiny_model):
    model = unpad(tiny_model())
    inputs = inputs_for(MASKS["right"])
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_unpadded(other)
        assert torch.equal(other(**inputs).logits, expected)
        repad(other)
        assert is_unpadded(model) and not other.bert.encoder._forward_hooks


def test_a_saved_model_opens_as_a_stock_model(tiny_model, tmp_path):
    model = unpad(tiny_model())
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert stock.config._attn_implementation == "sdpa" and not stock.bert.encoder._forward_hooks
    inputs = inputs_for(MASKS["right"])
    assert_close(stock(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
        ("mpnet", {}),
        ("modernbert", {"global_attn_every_n_layers": 1}),
    ],
)
def test_other_models_are_refused_by_name(tiny_model, model_type, options):
    model = tiny_model("encoder", model_type=model_type, **options)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"can't handle model type '{model_type}'; it handles albert, bert"):
        unpad(model)
    assert model.config._attn_implementation == before and not is_unpadded(model)


@pytest.mark.parametrize("options", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
def test_bert_as_a_decoder_is_refused(tiny_model, options):
    with pytest.raises(ValueError, match="unpad handles encoders; this bert is a decoder"):
        unpad(tiny_model("encoder", **options))


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="model type 'Linear'"):
        unpad(torch.nn.Linear(2, 2))


def test_packing_tells_where_tokens_are():
    assert Packing._fields == ("indices", "mask", "batch", "tokens")


# ------------------------------------------------------------------------------- inside other people's libraries


def test_in_the_stock_trainer(tiny_model, tmp_path):
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

    losses, models = [], twins(tiny_model)
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


def test_under_lora(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0, task_type="SEQ_CLS")
    models = []
    for around in (lambda m: m, lambda m: unpad(m)):
        torch.manual_seed(3)
        model = around(peft.get_peft_model(tiny_model(), config))
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


def test_inside_sentence_transformers(tiny_model, tiny_tokenizer, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as parts

    tiny_model("encoder").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    stack = parts.Transformer(str(tmp_path))
    encoder = st.SentenceTransformer(modules=[stack, parts.Pooling(16, "mean")], device="cpu")
    texts = ["the film is good and fun", "bad", "a great plot we book"]
    expected = encoder.encode(texts, convert_to_tensor=True)
    unpad(stack.auto_model)
    assert is_unpadded(stack.auto_model)
    assert_close(encoder.encode(texts, convert_to_tensor=True), expected, atol=1e-5, rtol=0)
