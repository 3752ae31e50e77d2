"""The unpadded decoder gives the numbers of the stock one, padded and row by row, and generates what it generates."""

import copy
import inspect
import pickle
from contextlib import nullcontext

import pytest
import test_unpadding as encoders
import torch
import torch.nn.functional as F
import transformers
from conftest import tiny_config
from test_unpadding import assert_gradients_equal, gradients
from torch.testing import assert_close

from ftlib.methods import packing as packing_module
from ftlib.methods import speedups, unpadding
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import NAME, Packing, is_unpadded, pad_input, repad, unpad

HALF = {"num_key_value_heads": 1}  # two heads share keys and values
WINDOW = {**HALF, "sliding_window": 3}  # tokens, the present one included
SOME = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}  # layer 0 sees all, layer 1 a window
BOTH = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
QUIET = dict.fromkeys(
    "attention_dropout resid_pdrop embd_pdrop attn_pdrop dropout hidden_dropout residual_dropout".split(), 0.0
)
OPTIONS = {  # model type -> what its tiny config needs beyond the sizes all share
    "cohere": HALF,
    "cohere2": BOTH,
    "exaone4": BOTH,
    "gemma": {**HALF, "head_dim": 8},
    "gemma2": {**BOTH, "head_dim": 8, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.5},
    "gemma3_text": {**BOTH, "head_dim": 8},
    "glm": {**HALF, "head_dim": 8},
    "glm4": {**HALF, "head_dim": 8},
    "gpt2": {},
    "gpt_bigcode": {"multi_query": True},
    "gpt_neox": {},
    "granite": {**HALF, "attention_multiplier": 0.3},
    "llama": HALF,
    "ministral3": {**WINDOW, "head_dim": 8},
    "mistral": {**WINDOW, "head_dim": 8},
    "modernbert-decoder": {"local_attention": 3, "global_attn_every_n_layers": 2},
    "nanochat": HALF,
    "olmo": HALF,
    "olmo2": HALF,
    "olmo3": BOTH,
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": WINDOW,
    "qwen2": SOME,
    "qwen3": {**SOME, "head_dim": 8},
    "seed_oss": {**HALF, "head_dim": 8},
    "smollm3": {**HALF, "no_rope_layers": [1, 0]},
    "starcoder2": WINDOW,
}
assert set(OPTIONS) == set(unpadding._DECODER)
TYPES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in transformers.CONFIG_MAPPING, reason=f"this version of transformers has no {name}"
        ),
    )
    for name in OPTIONS
]
FEW = ["llama", "gpt2", "gemma2", "gemma3_text", "opt"]
MASKS = {
    "right": [[1, 1, 1, 0, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1]],
    "nothing to drop": [[1] * 6] * 3,
    "an empty row": [[1, 1, 1, 1, 0, 0], [0] * 6, [1, 1, 1, 0, 0, 0]],
}


def config_of(kind, **options):
    return tiny_config(kind, **{"bos_token_id": 1, "eos_token_id": 2, **QUIET, **OPTIONS.get(kind, {}), **options})


def make(kind, auto="CausalLM", seed=0, **options):
    """Random weights so large that a token which sees one too many shows."""
    config = config_of(kind, **options)
    auto = transformers.AutoModel if auto is None else getattr(transformers, f"AutoModelFor{auto}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def twins(kind, *args, **options):
    return make(kind, *args, **options), unpad(make(kind, *args, **options))


def inputs_for(mask):
    mask = torch.tensor(mask)
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def labels_of(inputs):
    before = F.pad(inputs["attention_mask"], (1, 0))[:, :-1]  # padding predicts nothing, in a stock model either
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] * before == 0, -100)


# ------------------------------------------------------------------------------------- equal to the stock model


@pytest.mark.parametrize("masks", ["right", "holes", "nothing to drop", "an empty row"])
@pytest.mark.parametrize("kind", TYPES)
def test_logits_loss_and_gradients_equal_the_stock_model(kind, masks):
    inputs = inputs_for(MASKS[masks])
    stock, ours = twins(kind)
    real = inputs["attention_mask"].bool()
    for mode in (False, True):  # train mode with dropout 0 must give the same
        for model in (stock, ours):
            model.train(mode).zero_grad()
        theirs, mine = (model(**inputs, labels=labels_of(inputs)) for model in (stock, ours))
        assert mine.logits.isfinite().all() and mine.logits.shape == theirs.logits.shape
        assert_close(mine.logits[real], theirs.logits[real], atol=1e-5, rtol=1e-5)
        assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=0)
        for output in (theirs, mine):
            output.loss.backward()
        assert_gradients_equal(ours, stock)


@pytest.mark.parametrize("masks", ["left", "right"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_row_gives_what_it_gives_alone(kind, masks):
    inputs = inputs_for(MASKS[masks])
    stock, ours = (model.train() for model in twins(kind))
    mask = inputs["attention_mask"].bool()
    found = ours(**inputs, labels=labels_of(inputs), num_items_in_batch=7)
    found.loss.backward()
    for row, ids, real in zip(found.logits, inputs["input_ids"], mask, strict=True):
        alone = stock(ids[real][None], labels=ids[real][None], num_items_in_batch=7)
        assert_close(row[real], alone.logits[0], atol=1e-5, rtol=1e-5)
        if real.sum() > 1:  # else there is nothing to predict
            alone.loss.backward()
    assert_gradients_equal(ours, stock)


def test_a_hole_counts_as_a_place_and_padding_before_the_row_does_not():
    """GPT-2's positions are learned, so that they show: those of [-, a, -, b] are those of [a, -, b]."""
    stock, ours = twins("gpt2")
    ids, mask = torch.tensor([[0, 7, 0, 9, 8]]), torch.tensor([[0, 1, 0, 1, 1]])
    expected = stock(ids[:, 1:], attention_mask=mask[:, 1:]).logits[0, mask[0, 1:] > 0]
    assert_close(ours(ids, attention_mask=mask).logits[0, mask[0] > 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_no_mask_and_logits_to_keep(kind):
    stock, ours = twins(kind)
    ids = inputs_for(MASKS["nothing to drop"])["input_ids"]
    with torch.no_grad():
        assert_close(ours(ids).logits, stock(ids).logits, atol=1e-5, rtol=1e-5)
        inputs = inputs_for(MASKS["left"])
        assert_close(ours(**inputs, logits_to_keep=1).logits, ours(**inputs).logits[:, -1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("auto", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("kind", TYPES)
def test_classification_heads(kind, auto):
    if type(config_of(kind)) not in getattr(transformers, f"AutoModelFor{auto}")._model_mapping:
        pytest.skip(f"transformers has no head for {auto} on {kind}")
    stock, ours = twins(kind, auto, num_labels=3, classifier_dropout=0.0)
    for masks in ("right", "left"):
        inputs = inputs_for(MASKS[masks])
        mask = inputs["attention_mask"].bool()
        logits = ours(**inputs).logits
        rows = logits if auto[0] == "S" else [row[real] for row, real in zip(logits, mask, strict=True)]
        alone = [stock(ids[real][None]).logits[0] for ids, real in zip(inputs["input_ids"], mask, strict=True)]
        for row, expected in zip(rows, alone, strict=True):
            assert_close(row, expected, atol=1e-5, rtol=1e-5)
        for each in (torch.cat([x.flatten() for x in rows]), torch.cat([x.flatten() for x in alone])):
            each.logsumexp(0).backward()
        assert_gradients_equal(ours, stock)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("kind", FEW)
def test_hidden_states_are_put_back(kind, return_dict):
    inputs = inputs_for(MASKS["right"])
    real = inputs["attention_mask"].bool()
    stock, ours = twins(kind, None)
    with torch.no_grad():
        theirs, mine = (m(**inputs, output_hidden_states=True, return_dict=return_dict) for m in (stock, ours))
    states = [x.hidden_states if return_dict else x[-1] for x in (theirs, mine)]
    assert len(states[0]) == len(states[1]) == 3
    for theirs_layer, my_layer in zip(*states, strict=True):
        assert my_layer.shape == theirs_layer.shape
        assert_close(my_layer[real], theirs_layer[real], atol=1e-5, rtol=1e-5)
    assert not mine[0][~real].any()


def test_attention_maps_are_refused_until_repad():
    model = unpad(make("llama"))
    inputs = inputs_for(MASKS["right"])
    with pytest.raises(ValueError, match="output_attentions=True: an unpadded llama keeps no attention weights"):
        model(**inputs, output_attentions=True)
    repad(model).set_attn_implementation("eager")
    assert model(**inputs, output_attentions=True).attentions[0].shape == (3, 2, 6, 6)


# ----------------------------------------------------------------------------------------------- how it is done


@pytest.mark.parametrize("masks", ["right", "left"])
@pytest.mark.parametrize("kind", TYPES)
def test_layers_see_real_tokens_only_and_build_no_cache(kind, masks):
    model, seen = unpad(make(kind)), []
    assert model.config.use_cache
    for layer in unpadding.anatomy.layers(model):
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args[0].shape, kwargs)), with_kwargs=True)
    output = model(**inputs_for(MASKS[masks]))
    assert [shape for shape, _ in seen] == [(1, 10, 16)] * 2
    assert not any(kwargs.get("use_cache") for _, kwargs in seen) and output.past_key_values is None
    assert len({id(kwargs["packing"]) for _, kwargs in seen}) == 1


@pytest.mark.parametrize(("kind", "layers"), [("llama", 2), ("gpt2", 2), ("mistral", 0), ("gemma3_text", 1)])
@pytest.mark.parametrize("masks", ["right", "left", "an empty row"])
def test_attention_on_a_cpu_runs_on_packed_tokens(kind, layers, masks, monkeypatch):
    lengths, attend = [], speedups.attend
    monkeypatch.setattr(speedups, "attend", lambda *args: lengths.append((args[3], args[6])) or attend(*args))
    unpad(make(kind))(**inputs_for(MASKS[masks]))
    expected = [4, 1, 3] if masks == "an empty row" else [3, 6, 1]
    assert lengths == [(expected, True)] * layers  # the others have a window


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_long_and_short_rows_together(kind):
    options = {"max_position_embeddings": 400, "sliding_window": 500}  # a window that holds every row is none
    stock, ours = twins(kind, **options)
    mask = torch.arange(300) < torch.tensor([300, 17, 280, 130])[:, None]
    inputs = inputs_for(mask.long().tolist())
    theirs, mine = (m(**inputs, labels=labels_of(inputs)) for m in (stock, ours))
    assert_close(mine.logits[mask], theirs.logits[mask], atol=2e-5, rtol=1e-5)
    for output in (theirs, mine):
        output.loss.backward()
    assert_gradients_equal(ours, stock)


def test_packing_of_a_decoder_keeps_no_padding():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    packing = Packing.of(mask, causal=True)
    assert packing.indices.tolist() == [1, 2, 4, 8, 9] and packing.lengths == [2, 1, 2]
    assert packing.cu_seqlens.tolist() == [0, 2, 3, 5] and packing.gapless and packing.causal
    assert packing.mask.tolist() == [[False, True, True, False], [True] + [False] * 3, [True, True, False, False]]
    packed = torch.arange(1.0, 6.0).view(1, 5, 1)
    assert pad_input(packed, packing).flatten().tolist() == [0, 1, 2, 0, 3, 0, 0, 0, 4, 5, 0, 0]
    holes = Packing.of(torch.tensor([[1, 0, 1]]).bool(), causal=False)
    assert holes.lengths == [2] and not holes.gapless and not holes.causal
    assert Packing.of(torch.tensor([[0, 1, 0, 1]]).bool(), causal=True).gapless is False


@pytest.mark.parametrize("kind", [*FEW, "mistral"])
def test_when_computed_by_the_packed_kernel(kind, monkeypatch):
    """What a GPU in half precision does, on the CPU; with soft-capping it stays the other way."""
    import torch.nn.attention.varlen as module

    windows = []

    def counted(*args, window_size, enable_gqa=False, **options):
        windows.append((window_size, enable_gqa))
        query, key, value, *rest = args
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return encoders.varlen_by_loop(query, key, value, *rest, window_size=window_size, **options)

    counted.__kwdefaults__ = {**counted.__kwdefaults__, **module.varlen_attn.__kwdefaults__}
    monkeypatch.setattr(module, "varlen_attn", counted)
    monkeypatch.setattr(packing_module, "can_varlen", lambda q, packing, p: True)
    monkeypatch.setattr(speedups, "computed_in", lambda x: None)
    for masks in ("right", "holes"):
        stock, ours = twins(kind)
        inputs = inputs_for(MASKS[masks])
        real = inputs["attention_mask"].bool()
        theirs, mine = stock(**inputs).logits[real], ours(**inputs).logits[real]
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        for logits in (theirs, mine):
            logits.logsumexp((0, 1)).backward()
        assert_gradients_equal(ours, stock)
    shared = "enable_gqa" in module.varlen_attn.__kwdefaults__
    whole, local = ((-1, 0), shared), ((2, 0), shared)
    both = {"gemma2": [], "gemma3_text": [local, whole, whole], "mistral": [local] * 2}  # holes: no window by distance
    assert windows == both.get(kind, [whole] * 4)


@encoders.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*FEW, "mistral"])
def test_on_the_gpu_in_half_precision(kind, dtype, monkeypatch):
    stock, ours = (m.cuda() for m in twins(kind, max_position_embeddings=64, hidden_size=64))
    if kind == "gemma2":  # Transformers 5.17 takes SDPA, which does not cap
        stock.set_attn_implementation("eager")
    calls, attend = [], packing_module.attend_varlen
    monkeypatch.setattr(packing_module, "attend_varlen", lambda *args: calls.append(args[-1]) or attend(*args))
    mask = torch.arange(64) < torch.tensor([64, 17, 1, 40])[:, None]
    inputs = {name: value.cuda() for name, value in inputs_for(mask.long().tolist()).items()}
    theirs = stock(**inputs).logits[mask.cuda()]  # float32, padded
    with torch.autocast("cuda", dtype):
        mine = ours(**inputs).logits[mask.cuda()]
    both = {"gemma2": [], "gemma3_text": [2, None], "mistral": [2, 2]}
    assert calls == both.get(kind, [None, None])
    assert (mine.float() - theirs).norm() < 0.02 * theirs.norm()
    for logits in (theirs, mine.float()):
        logits.logsumexp((0, 1)).backward()
    for name, gradient in gradients(stock).items():
        assert (gradients(ours)[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-3, name


@encoders.needs_gpu
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_on_the_gpu_a_pass_waits_once(kind):
    model = unpad(make(kind, None)).cuda().bfloat16()
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


# ------------------------------------------------------------------------------------------- as the model came


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", TYPES)
def test_generate_gives_what_the_stock_model_gives(kind, beams):
    stock, ours = twins(kind)
    inputs = inputs_for(MASKS["left"])
    options = dict(max_new_tokens=9, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=2)
    theirs, mine = (model.generate(**inputs, **options) for model in (stock, ours))
    assert mine.shape[1] > 6 and torch.equal(mine, theirs)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}, {"do_sample": True}])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_generate_in_other_ways(kind, options):
    found = []
    for model in twins(kind):
        torch.manual_seed(0)
        found.append(model.generate(**inputs_for(MASKS["left"]), max_new_tokens=6, pad_token_id=0, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [*FEW, "mistral"])
def test_with_a_cache_the_model_runs_as_it_came(kind):
    stock, ours = twins(kind)
    inputs = inputs_for(MASKS["right"])
    for model in (stock, ours):
        model.train()  # also while it trains
    first = [model(**inputs, use_cache=True) for model in (stock, ours)]
    assert_close(first[1].logits, first[0].logits, atol=1e-5, rtol=1e-5)  # padding too
    mask = torch.cat((inputs["attention_mask"], torch.ones(3, 2, dtype=torch.long)), 1)
    again = [
        model(torch.tensor([[7, 8]] * 3), attention_mask=mask, past_key_values=output.past_key_values).logits
        for model, output in zip((stock, ours), first, strict=True)
    ]
    assert_close(again[1], again[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_examples_packed_by_ones_own_positions_stay_apart(kind):
    """Three in a row without a mask, as TRL and Transformers' flattening collator make them."""
    stock, ours = twins(kind)
    ids, positions = torch.randint(5, 60, (1, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    theirs, mine = stock(ids, position_ids=positions, use_cache=False).logits, ours(ids, position_ids=positions).logits
    assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    alone = torch.cat([stock(part).logits for part in ids.split((4, 2, 3), 1)], 1)
    assert_close(mine, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_masks_and_positions_of_ones_own(kind):
    stock, ours = twins(kind)
    inputs = inputs_for(MASKS["right"])
    real = inputs["attention_mask"].bool()
    seen = real[:, None, None] & torch.ones(6, 6).tril().bool()  # (batch, 1, tokens, tokens)
    own = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)  # what eager attention takes too
    theirs, mine = (m(inputs["input_ids"], attention_mask=own).logits[real] for m in (stock, ours))
    assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    positions = torch.tensor([[7, 5, 3, 2, 1, 0]])
    theirs, mine = (m(**inputs, position_ids=positions).logits[real] for m in (stock, ours))
    assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    embedded = stock.get_input_embeddings()(inputs["input_ids"]).detach()
    options = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    theirs, mine = (m(**options).logits[real] for m in (stock, ours))
    assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_gpt2_takes_token_types():
    stock, ours = twins("gpt2")
    inputs = inputs_for(MASKS["right"])
    types = torch.arange(18).view(3, 6) % 3
    theirs, mine = (m(**inputs, token_type_ids=types).logits for m in (stock, ours))
    real = inputs["attention_mask"].bool()
    assert_close(mine[real], theirs[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["config", "keyword", "EmbeddingGemma"])
def test_attention_both_ways(how):
    """Transformers can take causality away, and EmbeddingGemma comes without it, its windows to both sides."""
    kind = "gemma3_text" if how == "EmbeddingGemma" else "llama"
    options = {"use_bidirectional_attention": True, "sliding_window": 4} if kind == "gemma3_text" else {}
    stock, ours = twins(kind, None, **options)
    if how == "config":
        stock.config.is_causal = ours.config.is_causal = False
    extra = {"is_causal": False} if how == "keyword" else {}
    for masks in ("right", "holes"):
        inputs = inputs_for(MASKS[masks])
        real = inputs["attention_mask"].bool()
        theirs, mine = (m(**inputs, **extra).last_hidden_state[real] for m in (stock, ours))
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        ids = inputs["input_ids"]
        theirs, mine = (m(ids, **extra).last_hidden_state for m in (stock, ours))
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- precision, dropout


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("kind", [*FEW, "qwen3"])
def test_autocast_is_no_farther_from_float32_than_the_stock_model(kind, shortcuts):
    """The error of logits and gradient, in units of the stock model's; the median, as a ReLU may flip in one."""
    inputs = inputs_for(MASKS["right"])
    real, ratios = inputs["attention_mask"].bool(), []
    for seed in range(3):
        found = []
        for autocast, around in ((False, lambda m: m), (True, lambda m: m), (True, unpad)):
            model = around(make(kind, seed=seed))
            quick = speedups.shortcuts(model) if shortcuts and around is unpad else nullcontext()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), quick:
                output = model(**inputs, labels=labels_of(inputs))
            output.loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append((output.logits.detach().float()[real], gradient))
        ratios.append(
            [(mine - right).norm() / (stock - right).norm() for right, stock, mine in zip(*found, strict=True)]
        )
    median = torch.tensor(ratios).median(0).values
    assert median.min() > 0 and median.max() < 2


@pytest.mark.parametrize("kind", TYPES)
def test_half_precision_weights(kind):
    stock, ours = (model.bfloat16() for model in twins(kind))
    inputs = inputs_for(MASKS["right"])
    real = inputs["attention_mask"].bool()
    theirs, mine = (m(**inputs, labels=labels_of(inputs)) for m in (stock, ours))
    assert mine.logits.dtype == torch.bfloat16
    right = make(kind).float()(**inputs).logits[real]
    errors = [(output.logits[real].float() - right).norm() for output in (theirs, mine)]
    assert errors[1] < 2 * errors[0] + 0.02 * right.norm()
    mine.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(ours).values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral"])
def test_attention_dropout_has_the_stock_models_distribution(kind):
    """Of one layer, so that the mean over many passes is that without dropout, and the spread can be compared."""
    options = {"num_hidden_layers": 1, "layer_types": None if kind == "llama" else ["sliding_attention"]}
    options = {"attention_dropout": 0.3, "attn_pdrop": 0.3, **(options if kind == "gemma2" else {})}
    stock, ours = (model.train() for model in twins(kind, None, **options))
    inputs = inputs_for(MASKS["right"])
    real = inputs["attention_mask"].bool()
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(ours.eval()(**inputs)[0], ours(**inputs)[0])
        draws = [torch.stack([m.train()(**inputs)[0][real] for _ in range(400)]) for m in (stock, ours)]
    spread = draws[0].std(0)
    assert spread.mean() > 0.03
    assert ((draws[1].mean(0) - draws[0].mean(0)).abs() / (spread + 0.02)).max() < 0.4
    assert_close(draws[1].std(0).mean(), spread.mean(), atol=0, rtol=0.1)


# ----------------------------------------------------------------------------------- inside what is around it


@pytest.mark.parametrize("kind", [*FEW, "mistral"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    stock, ours = twins(kind)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    inputs = inputs_for(MASKS["right"])
    for model in (stock, ours):
        model.train()(**inputs, labels=labels_of(inputs)).loss.backward()
    assert_gradients_equal(ours, stock)


@pytest.mark.parametrize(("kind", "backend"), [("llama", "aot_eager"), ("gemma2", "eager"), ("mistral", "eager")])
def test_compiled_layers(kind, backend):
    stock, ours = twins(kind, num_hidden_layers=1, layer_types=["sliding_attention"] if kind == "gemma2" else None)
    torch._dynamo.reset()
    for layer in unpadding.anatomy.layers(ours):
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)
    for masks in ("right", "left", "holes"):  # the same graph must not keep the first one's packing
        inputs = inputs_for(MASKS[masks])
        real = inputs["attention_mask"].bool()
        for model in (stock, ours):
            model.zero_grad()
            logits = model(**inputs, labels=labels_of(inputs), position_ids=torch.arange(6)[None]).logits[real]
            logits.logsumexp((0, 1)).backward()
        assert_gradients_equal(ours, stock)
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [k for k in FEW if k != "gemma2"])
def test_repad_copies_pickles_and_files(kind, implementation, tmp_path):
    model = make(kind, attn_implementation=implementation)
    inputs = inputs_for(MASKS["right"])
    expected = model(**inputs).logits
    assert unpad(unpad(model)) is model and is_unpadded(model)
    mine = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_unpadded(other) and torch.equal(other(**inputs).logits, mine)
        repad(other)
        assert is_unpadded(model) and not any("forward" in vars(module) for module in other.modules())
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert repad(repad(model)) is model and not is_unpadded(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**inputs).logits, expected)
    signature = inspect.signature(model.base_model.forward)
    assert inspect.signature(unpad(model).base_model.forward) == signature


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])])
@pytest.mark.parametrize("around", ["before", "after"])
def test_under_lora_of_peft(kind, targets, around):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    models = []
    for unpadded in (False, True):
        torch.manual_seed(3)
        model = make(kind)
        model = unpad(model) if unpadded and around == "before" else model
        model = peft.get_peft_model(model, config)
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:  # it starts at zero, which would hide a mistake
                torch.nn.init.constant_(parameter, 0.01 * (i + 1))
        models.append((unpad(model) if unpadded and around == "after" else model).train())
    inputs = inputs_for(MASKS["right"])
    outputs = [model(**inputs, labels=labels_of(inputs)) for model in models]
    assert_close(outputs[1].loss, outputs[0].loss, atol=1e-5, rtol=0)
    for output in outputs:
        output.loss.backward()
    assert any("lora_A" in name for name in gradients(models[1]))
    assert_gradients_equal(models[1], models[0])
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    theirs, mine = (model.eval().generate(**inputs_for(MASKS["left"]), **options) for model in models)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_under_virtual_tokens_of_peft(kind):
    peft = pytest.importorskip("peft")
    models = []
    for around in (lambda m: m, unpad):
        torch.manual_seed(3)
        config = getattr(peft, kind)(num_virtual_tokens=2, task_type="CAUSAL_LM")
        models.append(around(peft.get_peft_model(make("llama"), config)).train())
    inputs = inputs_for(MASKS["right"])
    outputs = [model(**inputs, labels=labels_of(inputs)) for model in models]
    assert_close(outputs[1].loss, outputs[0].loss, atol=1e-5, rtol=0)
    for output in outputs:
        output.loss.backward()
    assert gradients(models[1])
    assert_gradients_equal(models[1], models[0])


@pytest.mark.parametrize("strategy", ["lora", "bitfit", "last-layers"])
def test_under_our_own_tuning(strategy):
    models = []
    for unpadded in (False, True):
        torch.manual_seed(3)
        model = make("qwen2")
        tune(unpad(model) if unpadded else model, strategy)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        models.append(model)
    inputs = inputs_for(MASKS["right"])
    for model in models:
        model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert gradients(models[1])
    assert_gradients_equal(models[1], models[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_trunk_of_several_tasks(kind):
    heads = {"a": Head(), "b": Head("token-classification" if kind != "opt" else "sequence-classification", 3)}
    stock, ours = (MultiTaskModel(make(kind, None, classifier_dropout=0.0), heads).eval() for _ in range(2))
    unpad(ours)
    assert is_unpadded(ours)
    inputs, rows = inputs_for(MASKS["right"]), {"a": torch.tensor([0, 2]), "b": torch.tensor([1])}
    theirs, mine = (model(**inputs, rows=rows) for model in (stock, ours))
    for name in heads:
        assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-5)
        for logits in (theirs[name], mine[name]):
            logits.logsumexp((0, 1)).backward(retain_graph=True) if logits.ndim == 2 else logits.sum().backward(
                retain_graph=True
            )
    assert_gradients_equal(ours, stock)


def test_in_ddp(tmp_path):
    def compare():  # a function: a wrapper that outlives its process group waits for a thread that waits for it
        stock, ours = twins("llama")
        wrapped = torch.nn.parallel.DistributedDataParallel(ours)
        inputs = inputs_for(MASKS["right"])
        for model in (stock, wrapped):
            model(**inputs, labels=labels_of(inputs)).loss.backward()
        assert_gradients_equal(ours, stock)

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compare()
    finally:
        torch.distributed.destroy_process_group()


def test_in_the_stock_trainer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (12,), generator=generator).tolist()
    rows = [{"input_ids": torch.randint(5, 60, (n,), generator=generator).tolist()} for n in lengths]

    def pad(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch]
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return {**inputs, "labels": labels_of(inputs)}

    losses = []
    for model in twins("llama"):
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=3, gradient_accumulation_steps=2,
            logging_steps=1, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True, seed=0,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=pad)
        trainer.train()
        history = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        losses.append(torch.tensor([*history, trainer.evaluate()["eval_loss"]]))
    assert len(losses[0]) == 5
    assert_close(losses[1], losses[0], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("bloom", "ALiBi biases the scores by position"), ("mpt", "ALiBi biases the scores by position"),
        ("gptj", None), ("falcon", "its attention takes no function from outside"),
        ("stablelm", "its layers keep from the attention where an example ends"),
    ],
)  # fmt: skip
def test_others_are_refused_by_name_and_with_the_reason(kind, why):
    sizes = {"gptj": {"rotary_dim": 4}}.get(kind, {})
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, **sizes))
    before = model.config._attn_implementation
    reason = rf" \({why}.*\)" if why else ""
    said = rf"can't handle model type '{kind}'{reason}; it handles .*: albert, bart, bert"
    with pytest.raises(ValueError, match=said):
        unpad(model)
    assert model.config._attn_implementation == before and not is_unpadded(model)



def test_gemma3_with_images_is_refused_and_its_text_model_is_not():
    text = {**config_of("gemma3_text").to_dict(), "model_type": "gemma3_text"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"'gemma3' \(images see each other both ways; load the text model alone"):
        unpad(model)
    assert is_unpadded(unpad(model.model.language_model))


def test_cross_attention_is_refused():
    with pytest.raises(ValueError, match="unpad handles no cross-attention, and no gpt2 as a decoder"):
        unpad(make("gpt2", add_cross_attention=True))


def test_what_a_layer_does_not_pass_on_is_no_silent_leak():
    """Should a layer keep `packing` from its attention, the mask in its place fits no scores."""
    model = unpad(make("llama"))
    attention = model.model.layers[0].self_attn
    stock = attention.forward
    attention.forward = lambda *args, packing=None, **kwargs: stock(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"\(10\) must match the size of tensor b \(0\)"):
        model(**inputs_for(MASKS["right"]))


def test_eager_attention_by_hand_stands_aside():
    stock, ours = twins("llama")
    ours.set_attn_implementation("eager")
    inputs = inputs_for(MASKS["right"])
    assert not is_unpadded(ours)
    assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=1e-5)
    mine = unpad(ours)(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert_close(mine[real], stock(**inputs).logits[real], atol=1e-5, rtol=1e-5)
    assert F.mse_loss(mine[~real], torch.zeros_like(mine[~real])) == 0  # a head without a bias, of zeros
