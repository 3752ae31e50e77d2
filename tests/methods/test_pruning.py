"""Heads and neurons that are taken out against the same model with a mask; importance by hand; magnitudes by torch."""

import copy
import json

import pytest
import torch
import transformers
from test_fit import LABELS, make_rows, quick, same, weights
from torch.nn.utils import prune as theirs
from torch.testing import assert_close

import ftlib
from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.methods.adapters import linears
from ftlib.methods.pruning import WITH_HEADS, blocks, importance, prune, smallest, sparsify, weakest
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import unpad

FOUR = {"num_attention_heads": 4, "hidden_size": 16}
IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 4, 3]])


def tiny(model_type):
    """A tiny random model of this type, with or without a head, and what it is asked."""
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    names = {
        "distilbert": dict(vocab_size=32, dim=16, n_layers=2, n_heads=4, hidden_dim=24),
        "gpt2": dict(vocab_size=32, n_embd=16, n_layer=2, n_head=4),
        "opt": sizes | dict(ffn_dim=24, word_embed_proj_dim=16),
        "t5": dict(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4),
        "bart": dict(vocab_size=32, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24),
        "xlnet": dict(vocab_size=32, d_model=16, n_layer=2, n_head=4, d_inner=24),
        "albert": sizes | dict(embedding_size=8),
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **names.get(model_type, sizes), pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():  # not around zero, as first weights are, so that nothing cancels
                p += 0.2 * torch.randn(p.shape)
    return model, {"input_ids": IDS} | ({"decoder_input_ids": IDS} if config.is_encoder_decoder else {})


def masked(model, units, of, **inputs):
    """What the model gives with these units' outputs set to zero."""
    hooks = []
    for i, part in enumerate(blocks(model, of)):
        mask = torch.ones(part.units)
        mask[[*units.get(i, ())]] = 0

        wide = mask.repeat_interleave(part.size)
        hooks.append(part.reader.register_forward_pre_hook(lambda module, args, wide=wide: (args[0] * wide,)))
    with torch.no_grad():
        found = model(**inputs)[0]
    for hook in hooks:
        hook.remove()
    return found


# ------------------------------------------------------------------------------------------------------- taking out


@pytest.mark.parametrize("model_type", WITH_HEADS)
@pytest.mark.parametrize("packed", [False, True])
def test_without_heads_it_is_the_masked_model(model_type, packed):
    model, inputs = tiny(model_type)
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if packed:
        unpad(model)
    units, before = {0: [1, 3], 1: [0]}, sum(p.numel() for p in model.parameters())
    wanted, whole = masked(model, units, "heads", **inputs), model(**inputs)[0]
    assert prune(model, units, "heads") is model
    assert [part.units for part in blocks(model, "heads")] == [2, 3]
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_close(model(**inputs)[0][keep], wanted[keep], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[keep], wanted[keep], atol=1e-3)
    assert before - sum(p.numel() for p in model.parameters()) == 3 * (4 * 16 * 4 + 3 * 4)  # 4 weights, 3 biases


@pytest.mark.parametrize(
    "model_type",
    ["bert", "distilbert", "roberta", "albert", "deberta-v2", "modernbert", "gpt2", "opt", "llama", "phi3", "gemma2",
     "t5", "bart", "xlnet", "electra"],
)  # fmt: skip
@pytest.mark.parametrize("uniform", [True, False])
def test_without_neurons_it_is_the_masked_model(model_type, uniform, tmp_path):
    """Where all layers keep as many, the config says so and it opens again."""
    model, inputs = tiny(model_type)
    parts = blocks(model, "neurons")
    units = {i: [0, 5, 7] if uniform or i == 0 else [2] for i in range(len(parts))}
    wanted = masked(model, units, "neurons", **inputs)
    prune(model, units, "neurons")
    with torch.no_grad():
        assert_close(model(**inputs)[0], wanted, atol=1e-5, rtol=1e-5)
    alike = uniform or len(parts) == 1
    assert hasattr(model.config, "kept_units") != alike
    if alike:
        model.save_pretrained(tmp_path)
        opened = type(model).from_pretrained(tmp_path)
        assert {part.units for part in blocks(opened, "neurons")} == {parts[0].units - 0}
        with torch.no_grad():
            assert_close(opened(**inputs)[0], wanted, atol=1e-5, rtol=1e-5)


def test_twice_is_once_with_the_old_numbers(tiny_model, tmp_path):
    """Numbers are those of what is left; what is saved opens as it was, small by load, and full of zeros elsewhere."""
    model, batch = tiny_model(**FOUR), collate(make_rows(4))
    batch.pop("labels")
    once = prune(copy.deepcopy(model), {0: [0, 2], 1: [3]}, "heads")
    prune(prune(model, {0: [0]}, "heads"), {0: [1], 1: [3]}, "heads")
    assert same(weights(once), weights(model)) and once.config.kept_units == model.config.kept_units
    assert model.config.kept_units == {"heads": {"0": [4, [1, 3]], "1": [4, [0, 1, 2]]}}
    prune(model, {1: [*range(0, 32, 3)]}, "neurons")
    with torch.no_grad():
        wanted = model(**batch).logits
        ftlib.save(model, tmp_path / "m")
        small = ftlib.load(tmp_path / "m")
        assert same(weights(small), weights(model)) and small.config.kept_units == model.config.kept_units
        assert_close(small(**batch).logits, wanted, atol=1e-6, rtol=0)
        full = type(model).from_pretrained(tmp_path / "m")
        assert [part.units for part in blocks(full, "heads")] == [4, 4]
        assert_close(full(**batch).logits, wanted, atol=1e-5, rtol=0)
        ftlib.save(full, tmp_path / "again")
        assert_close(ftlib.load(tmp_path / "again")(**batch).logits, wanted, atol=1e-5, rtol=0)
        prune(full, {0: [0], 1: [3]}, "heads")  # all there, so its numbers are the old ones
        assert full.config.kept_units["heads"] == {"0": [4, [1, 2, 3]], "1": [4, [0, 1, 2]]}


def test_a_pruned_encoder_under_several_heads_comes_back(tiny_model, tmp_path):
    encoder = prune(tiny_model("encoder", **FOUR), {0: [1]}, "heads")
    model = ftlib.MultiTaskModel(encoder, {"a": ftlib.Head("sequence-classification", 2)})
    ftlib.save(model, tmp_path / "m")
    assert same(weights(ftlib.load(tmp_path / "m")), weights(model))


@pytest.mark.parametrize(
    "wrong",
    [5, {"heads": 3}, {"heads": {"7": [4, [0]]}}, {"heads": {"0": [4, []]}}, {"x": {"0": [4, [1]]}},
     {"heads": {"0": [9, [8]]}}],
)  # fmt: skip
def test_a_config_that_tells_nonsense_is_refused(tiny_model, tmp_path, wrong):
    ftlib.save(prune(tiny_model(**FOUR), {0: [1]}, "heads"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"kept_units": wrong}))
    with pytest.raises(ValueError, match="kept_units, is not what was taken out of this model"):
        ftlib.load(tmp_path / "m")


def test_a_pruned_model_trains(tiny_model, tmp_path):
    model = unpad(prune(prune(tiny_model(**FOUR), {0: [1, 2], 1: [0]}), {0: [0], 1: [4]}, "neurons"))
    run = fit(model, make_rows(16), config=quick(epochs=6))
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    tune(model, "lora", rank=2)
    fit(model, make_rows(8), config=quick())
    with pytest.raises(ValueError, match="pruned under its adapter"):
        ftlib.save(model, tmp_path / "m")


def test_what_can_not_be_pruned_is_said(tiny_model):
    model = tiny_model(**FOUR)
    before = weights(model)
    for units, of, said in (
        ({0: [4]}, "heads", r"layer 0: no heads \[4\]; it has 0 to 3"),
        ({0: [-1]}, "heads", r"no heads \[-1\]"),
        ({2: [0]}, "heads", "layer 2: the model has layers 0 to 1"),
        ({0: [0], 1: [0, 1, 2, 3]}, "heads", "layer 1 would keep none of its 4 heads; leave it one"),
        ({0: [0]}, "layers", "of='layers': choose one of heads, neurons"),
    ):
        with pytest.raises(ValueError, match=said):
            prune(model, units, of)
    assert same(weights(model), before)
    with pytest.raises(ValueError, match=r"heads of gpt2 can't be taken out.*take 'neurons'"):
        prune(tiny("gpt2")[0], {0: [0]})
    with pytest.raises(ValueError, match="the feed-forward half of a layer is not"):
        prune(tiny_model("encoder", model_type="mobilebert"), {0: [0]}, "neurons")
    tune(model, "lora", rank=2)
    with pytest.raises(ValueError, match=r"ftlib.merge\(model\)"):
        prune(model, {0: [0]})


# ------------------------------------------------------------------------------------------------------- importance


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "regression"])
@pytest.mark.parametrize("of", ["heads", "neurons"])
@pytest.mark.parametrize("packed", [False, True])
def test_importance_is_the_gradient_of_a_mask_row_by_row(tiny_model, task, of, packed):
    model, rows = tiny_model(task, LABELS[task], **FOUR), make_rows(5, task)
    model.train()
    wanted = [torch.zeros(part.units) for part in blocks(model, of)]
    plain = copy.deepcopy(model).eval()
    for row in rows:
        batch = collate([row])
        labels, masks, hooks = batch.pop("labels"), [], []
        for part in blocks(plain, of):
            masks.append(torch.ones(part.units, requires_grad=True))
            scale = lambda module, args, m=masks[-1], s=part.size: (args[0] * m.repeat_interleave(s),)  # noqa: E731
            hooks.append(part.reader.register_forward_pre_hook(scale))
        ftlib.task_loss(task)(plain(**batch).logits, labels).backward()
        for total, mask, hook in zip(wanted, masks, hooks, strict=True):
            total += mask.grad.abs() / len(rows)
            hook.remove()
    if packed:
        unpad(model)
    found = importance(model, rows, of, batch_size=3)
    assert model.training and next(model.parameters()).grad is None
    for own, other in zip(found, wanted, strict=True):
        assert_close(own, other, atol=1e-6, rtol=1e-4)


def test_a_head_that_gives_nothing_has_no_importance(tiny_model):
    model = tiny_model(**FOUR)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.weight[8:12] = 0
        model.bert.encoder.layer[1].attention.self.value.bias[8:12] = 0
    scores = importance(model, make_rows(6))
    assert [float(x) == 0 for x in scores[1]] == [False, False, True, False]
    assert 2 in weakest(scores, 0.2)[1]
    with pytest.raises(ValueError, match="one head and one side"):
        importance(ftlib.MultiTaskModel(tiny_model("encoder"), {"a": ftlib.Head()}), make_rows(2))


def test_the_weakest_by_hand():
    scores = [torch.tensor([5.0, 1.0, 3.0, 2.0]), torch.tensor([9.0, 8.0, 7.0, 0.5])]
    assert weakest(scores, 0.5) == {0: [1, 2, 3], 1: [3]}  # 5.0 is the best of its layer
    assert weakest(scores, 0.5, uniform=True) == {0: [1, 3], 1: [2, 3]}
    assert weakest(scores, 1.0) == {0: [1, 2, 3], 1: [1, 2, 3]} == weakest(scores, 1.0, uniform=True)
    assert weakest(scores, 0.0) == {0: [], 1: []}
    with pytest.raises(ValueError, match=r"share=1\.5"):
        weakest(scores, 1.5)


# ------------------------------------------------------------------------------------------------------ magnitudes


@pytest.mark.parametrize("share", [0.0, 0.3, 0.755, 1.0])
def test_the_smallest_weights_are_torchs(share):
    linear = torch.nn.Linear(13, 11)
    mask = smallest(linear.weight, share)
    theirs.l1_unstructured(linear, "weight", amount=share)
    assert torch.equal(mask, linear.weight_mask.bool())
    assert int((~mask).sum()) == round(share * 143)


def test_zeros_stay_zeros(tiny_model):
    model, rows = tiny_model(), make_rows(16)
    own = {name: linear.weight.detach().clone() for name, linear in linears(model).items()}
    masks = sparsify(model, 0.5)
    assert masks.keys() == own.keys() and len(own) == 12
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight, own[name] * mask) and int(mask.sum()) * 2 == mask.numel()
    after = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    fit(model, rows, config=quick(weight_decay=0.1))
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any() and not torch.equal(weight, after[name])


def test_a_smaller_model_does_less(tiny_model):
    """Counted by torch, not timed."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(**FOUR, attn_implementation="eager")

    def flops():
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model.bert.encoder(model.bert.embeddings(IDS))
        return counted.get_total_flops()

    rows, n, whole = 8, 4, flops()
    prune(model, {0: [0, 1], 1: [2]}, "heads")
    heads = 3 * (4 * 2 * rows * 16 * 4 + 2 * 2 * 2 * n * n * 4)  # q, k, v, output of 16 x 4; scores and sums of 2 rows
    assert whole - flops() == heads
    prune(model, {0: [*range(8)], 1: [*range(8)]}, "neurons")
    assert whole - flops() == heads + 2 * 2 * 2 * rows * 16 * 8
    assert model.config.intermediate_size == 24
