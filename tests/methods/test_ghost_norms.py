"""Lengths and weighted sums of the rows' gradients: those of autograd, a row at a time, and of Opacus."""

import pytest
import torch
import transformers
from conftest import make_tiny_model
from torch import nn
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.methods import ghost_norms
from ftlib.methods.ghost_norms import GhostNorms, role_of
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import unpad

ROWS = [[5, 6, 7, 5, 9, 8], [10, 6], [11, 12, 12, 12], [7, 8, 9, 10, 11]]


def batch_of(rows=ROWS, side="right"):
    batch = collate([{"input_ids": ids} for ids in rows], padding_side=side)
    return {**batch, "labels": torch.tensor([i % 2 for i in range(len(rows))])}


def classified(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def continued(model, batch):
    """The mean loss of each row's next tokens."""
    logits, ids = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["input_ids"]
    targets = ids.masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return losses.sum(1) / (targets != -100).sum(1)


def tagged(model, batch):
    """A token's tag is whether its id is even; some rows have a token that counts, some more."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)


def alone(model, rows, batch):
    """Gradients of each row by autograd, {name: (rows, ...)}, on the batch cut to this row."""
    named, found = {n: p for n, p in model.named_parameters() if p.requires_grad}, []
    for i in range(len(batch["input_ids"])):
        loss = rows(model, {name: value[i : i + 1] for name, value in batch.items()}).sum()
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for g, p in zip(gradients, named.values(), strict=True)])
    return {name: torch.stack(each) for name, each in zip(named, zip(*found, strict=True), strict=True)}


def norms_of(gradients):
    return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def agree(model, rows, batch, factors=(0.5, 0.0, 2.0, 1.0)):
    factors = torch.tensor(factors)
    expected = alone(model, rows, batch)
    found = GhostNorms(model, rows, batch)
    assert_close(found.norms, norms_of(expected), atol=1e-5, rtol=1e-5)
    assert_close(found.losses, rows(model, batch).detach(), atol=1e-6, rtol=1e-5)
    model.zero_grad()
    found.add(factors)
    for name, p in model.named_parameters():
        if p.requires_grad:
            mine = torch.zeros_like(p) if p.grad is None else p.grad
            wanted = (factors.view(-1, *[1] * p.dim()) * expected[name]).sum(0)
            assert_close(mine, wanted, atol=1e-5, rtol=1e-4, msg=name)
    assert all(p.requires_grad for p in model.parameters() if p.grad is not None)
    return found


def decoder(kind="gpt2", auto="AutoModelForCausalLM", **options):
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    if kind == "gpt2":
        sizes = dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=40, pad_token_id=0,
                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    if kind in ("gemma", "qwen3"):
        sizes |= dict(head_dim=8, num_key_value_heads=1)
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **sizes, **options))


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "albert"])
def test_encoders(kind, unpadded):
    """ALBERT's layers are one layer that is used twice; positions are looked up once for all rows."""
    model = make_tiny_model(model_type=kind, **({} if kind == "distilbert" else {"max_position_embeddings": 50}))
    agree(unpad(model) if unpadded else model, classified, batch_of())


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_decoders(kind, unpadded, tied):
    """Tied, the table of words and the output layer are one weight, with one gradient."""
    model = decoder(kind, tie_word_embeddings=tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    if kind == "gemma":  # whose table has a forward of its own
        assert role_of(model.get_input_embeddings()) is None
        model.get_input_embeddings().requires_grad_(False)
    agree(unpad(model) if unpadded else model, continued, batch_of(side="left" if unpadded else "right"))


@pytest.mark.parametrize("unpadded", [False, True])
def test_tags_and_left_padding(unpadded):
    model = make_tiny_model("token-classification", 2)
    agree(unpad(model) if unpadded else model, tagged, batch_of(side="left"))


@pytest.mark.parametrize("strategy", ["lora", "head-only", "bitfit", "layer-norm", "houlsby", "last-layers"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_tune_leaves_trainable(strategy, kind):
    model = make_tiny_model() if kind == "bert" else decoder(auto="AutoModelForSequenceClassification")
    options = {"lora": {"rank": 2, "targets": "all-linear"}, "last-layers": {"layers": 1}}.get(strategy, {})
    tune(model, strategy, **options)
    for name, p in model.named_parameters():  # B of LoRA is zero at the start, and A would have no gradient
        if "lora_B" in name or ".up." in name:
            nn.init.normal_(p, std=0.1)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    agree(unpad(model), classified, batch_of())
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)


def test_both_ways_to_the_length_of_a_linear_layer(monkeypatch):
    """By the products of tokens, or by the gradient of each row: whichever is less work, the number is the same."""
    a, b = torch.randn(3, 5, 40), torch.randn(3, 5, 30)
    expected = torch.einsum("bti,bto->boi", a, b).flatten(1).square().sum(1)
    assert_close(ghost_norms._linear_squares(a, b), expected, rtol=1e-4, atol=1e-4)
    narrow = a[..., :3], b[..., :2]
    expected = torch.einsum("bti,bto->boi", *narrow).flatten(1).square().sum(1)
    assert_close(ghost_norms._linear_squares(*narrow), expected, rtol=1e-4, atol=1e-4)


def test_a_length_by_hand():
    """w x, x = 3 and 4, loss w x: the gradients are 3 and 4; a row whose factor is 0 may hold anything."""
    model = nn.Linear(1, 1, bias=False)
    model.config = type("Config", (), {})()
    batch = {"input_ids": torch.tensor([[3.0], [4.0]]), "attention_mask": torch.ones(2, 1)}
    taken = GhostNorms(model, lambda model, batch: model(batch["input_ids"])[:, 0], batch)
    assert taken.norms.tolist() == [3.0, 4.0]
    taken.add(torch.tensor([1.0, 0.25]))
    assert model.weight.grad.tolist() == [[4.0]]
    batch["input_ids"][0] = torch.inf
    taken, model.weight.grad = GhostNorms(model, lambda model, batch: model(batch["input_ids"])[:, 0], batch), None
    taken.add(torch.tensor([0.0, 1.0]))
    assert model.weight.grad.tolist() == [[4.0]] and not taken.norms[0].isfinite()


def test_gradients_are_those_of_opacus():
    opacus = pytest.importorskip("opacus")
    model, batch = make_tiny_model(), batch_of()
    batch["position_ids"] = torch.arange(6).expand(4, 6)  # Opacus wants a row each
    found = GhostNorms(model, classified, batch)
    factors = 0.3 / found.norms.clamp(min=0.3)
    found.add(factors)
    theirs = opacus.GradSampleModule(make_tiny_model().train(), loss_reduction="sum")
    classified(theirs, batch).sum().backward()
    samples = {name.removeprefix("_module."): p.grad_sample for name, p in theirs.named_parameters()}
    assert_close(found.norms, norms_of(samples), atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        wanted = torch.einsum("b,b...->...", factors, samples[name])
        assert_close(p.grad, wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_layers_without_ghost_norms_are_known():
    for module in (nn.LayerNorm(2), nn.RMSNorm(2)):
        assert role_of(module) == "scale"
    assert role_of(nn.Linear(2, 2)) == "linear" and role_of(nn.Embedding(2, 2)) == "table"
    tables = nn.Embedding(2, 2, max_norm=1.0), nn.Embedding(2, 2, sparse=True)
    for module in (*tables, nn.Conv1d(2, 2, 1), nn.GroupNorm(1, 2), nn.Bilinear(2, 2, 2), nn.LSTM(2, 2)):
        assert role_of(module) is None, module


def test_an_input_without_a_row_each_is_refused():
    model = make_tiny_model()
    model.bert.embeddings.position_embeddings.register_forward_pre_hook(lambda module, args: (args[0][0],))
    with pytest.raises(ValueError, match=r"Embedding takes \(6, 16\) for 4 rows of 6 tokens: no row"):
        GhostNorms(model, classified, batch_of())
