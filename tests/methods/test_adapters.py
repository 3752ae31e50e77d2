"""LoRA is PEFT's, merged or not; adapters sit where their papers put them; eight bits cost half a step."""

import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from test_fit import make_rows, quick
from test_multitask import structured
from torch import nn
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.methods.adapters import Bottleneck, Int8Linear, LoRA, adapters_of
from ftlib.methods.tuning import merge, tune, tuning_of

KINDS = ("bert", "distilbert", "modernbert", "roberta", "electra")
CHOICES = [{}, dict(rank=4, alpha=3, rslora=True), dict(rank=2, targets="all-linear")]


@pytest.fixture
def batch():
    return collate(make_rows(6))


def stir(model, part="lora_B", std=0.5):
    """Random numbers in place of zeros, so that the adapters count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.copy_(torch.randn(p.shape, generator=generator) * std)


# ----------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("options", CHOICES)
def test_lora_is_pefts(tiny_model, batch, model_type, options):
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_model(model_type=model_type), tiny_model(model_type=model_type)
    before = ours(**batch).logits
    tune(ours, "lora", **options)
    assert torch.equal(ours(**batch).logits, before)  # B is zero: exactly the pretrained model
    names = list(adapters_of(ours))
    per_layer = {"bert": 6, "distilbert": 6, "modernbert": 4, "roberta": 6, "electra": 6}[model_type]
    if options.get("targets") == "all-linear":
        assert len(names) == 2 * per_layer
        stock = tiny_model(model_type=model_type)
        tune(stock, peft.LoraConfig(target_modules="all-linear"))
        assert {n.removesuffix(".lora_A") for n, _ in stock.named_modules() if n.endswith(".lora_A")} == set(names)
    wanted = {"rank": 8, "alpha": 16, "rslora": False} | options
    config = peft.LoraConfig(
        r=wanted["rank"], lora_alpha=wanted["alpha"], use_rslora=wanted["rslora"], target_modules=names,
        modules_to_save=["classifier"],
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config)
    stir(ours)
    own = dict(ours.named_parameters())
    pairs = []
    for name, p in theirs.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".default", "")
        if "lora_" in name:
            p.data.copy_(own[plain])
            pairs.append((plain, p))
    assert len(pairs) == 2 * len(names)
    found, expected = ours(**batch), theirs(**batch)
    assert_close(found.logits, expected.logits, atol=1e-6, rtol=0)
    assert float((found.logits - before).detach().abs().max()) > 1e-4
    found.loss.backward(), expected.loss.backward()
    for plain, p in pairs:
        assert_close(own[plain].grad, p.grad, atol=1e-6, rtol=1e-5, msg=plain)
    assert all(p.grad is not None for n, p in own.items() if n.startswith("classifier"))
    assert all(p.grad is None for n, p in own.items() if "base_layer" in n or "embeddings" in n)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize(
    "model_type", "gpt2 llama qwen3 falcon gpt_neox bloom t5 bart deberta deberta-v2 mixtral xlnet".split()
)
def test_lora_has_pefts_layers_on_any_structure(model_type, targets):
    """Names and sizes; PEFT's "all-linear" takes linear layers outside the Transformer layers too."""
    peft = pytest.importorskip("peft")
    if (model_type, targets) in (("mixtral", "all-linear"), ("xlnet", None)):  # refused, see test_tuning
        return
    ours, theirs = (structured(model_type, "AutoModelForSequenceClassification") for _ in range(2))
    tune(ours, "lora", rank=2, **({} if targets is None else {"targets": targets}))
    named = ["q_proj", "v_proj"] if model_type == "mixtral" else targets  # PEFT's default finds nothing there
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=named, task_type="SEQ_CLS"))
    layers = "blocks", "layers", "layer", "block", "h"
    expected = {
        name.replace(".default", ""): p.shape for name, p in wrapped.get_base_model().named_parameters()
        if "lora_" in name and any(part in layers for part in name.split("."))
    }  # fmt: skip
    assert {name: p.shape for name, p in ours.named_parameters() if "lora_" in name} == expected != {}


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("model_type", ["falcon", "gpt2", "t5", "bart", "deberta", "xlnet", "bloom"])
def test_merged_on_any_structure(model_type, bits):
    """Falcon's own linear layers and GPT-2's Conv1D come out as they went in."""
    model = structured(model_type, "AutoModelForSequenceClassification")
    kinds, ids = [(name, type(module)) for name, module in model.named_modules()], torch.tensor([[5, 6, 7, 3]])
    with torch.no_grad():
        before = model(ids).logits
        tune(model, "lora", targets="all-linear", base_bits=bits)
        assert_close(model(ids).logits, before, atol=1e-6 if bits is None else 0.05, rtol=0)
        stir(model, std=0.3)
        expected = model(ids).logits
        assert float((expected - before).abs().max()) > 1e-4
        assert_close(merge(model)(ids).logits, expected, atol=1e-4, rtol=0)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds


@pytest.mark.parametrize("model_type", KINDS)
def test_merged_it_is_a_plain_model(tiny_model, batch, tmp_path, model_type):
    model = tiny_model(model_type=model_type)
    kind = [(name, type(module)) for name, module in model.named_modules()]
    tune(model, "lora", targets="all-linear", dropout=0.5)
    stir(model)
    with torch.no_grad():
        expected = model(**batch).logits
        assert merge(model) is model and tuning_of(model) is None
        assert [(name, type(module)) for name, module in model.named_modules()] == kind
        assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert_close(again(**batch).logits, expected, atol=1e-5, rtol=0)
    assert all(p.requires_grad for p in model.parameters())
    tune(model, "lora")  # may be tuned anew


def test_scale_and_dropout_by_hand():
    linear = nn.Linear(2, 1, bias=False)
    lora = LoRA(linear, rank=4, alpha=8, dropout=0.5, rslora=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0]]))
        lora.lora_A.weight.fill_(1.0)
        lora.lora_B.weight.fill_(0.25)
    x = torch.tensor([[1.0, 3.0]])
    assert lora.eval()(x).item() == 7 + 2 * 4 * 0.25 * 4  # W x + (8 / 4) * sum over ranks of B (x1 + x2)
    assert LoRA(linear, rank=4, alpha=8, dropout=0.5, rslora=True).scale == 4
    seen = {lora.train()(x).item() for _ in range(50)}
    assert seen == {7.0, 7 + 4.0, 7 + 12.0, 7 + 16.0}  # inputs are dropped or doubled, W x is not


def test_first_weights_come_from_the_seed_alone(tiny_model):
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        model = tiny_model()
        tune(model, "lora", seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(model.bert.encoder.layer[0].attention.self.query.lora_A.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    bound = math.sqrt(1 / 16)  # kaiming_uniform_ with a=√5: 1 / √in
    assert 0.9 * bound < float(found[0].detach().abs().max()) <= bound


def test_merging_what_is_not_linear(tiny_model):
    model = tiny_model()
    tune(model, "pfeiffer")
    with pytest.raises(ValueError, match="a bottleneck adapter is not linear and can't be merged; save it as it is"):
        merge(model)
    assert adapters_of(model)
    plain = tiny_model()
    tune(plain, "bitfit")
    assert merge(plain) is plain and all(p.requires_grad for p in plain.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merging_through_peft(tiny_model, batch):
    peft = pytest.importorskip("peft")
    for config in (peft.LoraConfig(use_dora=True), peft.IA3Config(), peft.VeraConfig(r=4), peft.LNTuningConfig()):
        model = tiny_model()
        kinds = [(name, type(module)) for name, module in model.named_modules()]
        tune(model, config)
        fit(model, make_rows(4), config=quick(epochs=2, learning_rate=0.1))
        with torch.no_grad():
            expected = model(**batch).logits
            merge(model)
            assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
        assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    tune(model, peft.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING can't be merged into weights; save it as it is"):
        merge(model)


# ----------------------------------------------------------------------------------------------------- bottlenecks


def test_a_bottleneck_by_hand():
    linear = nn.Linear(2, 2)
    adapter = Bottleneck(linear, 1)
    assert torch.equal(adapter(torch.ones(3, 2)), linear(torch.ones(3, 2)))  # at first nothing
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2)), linear.bias.zero_()
        adapter.down.weight.copy_(torch.tensor([[1.0, -1.0]])), adapter.down.bias.fill_(0.5)
        adapter.up.weight.copy_(torch.tensor([[2.0], [0.0]])), adapter.up.bias.copy_(torch.tensor([0.0, 1.0]))
    found = adapter(torch.tensor([[2.0, 1.5]]))
    gelu = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # gelu(2 - 1.5 + 0.5 = 1)
    assert found.tolist() == [[pytest.approx(2 + 2 * gelu), 2.5]]


PLACES = {
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "electra": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "albert": ("attention.dense", "ffn_output"),
}


@pytest.mark.parametrize("model_type", PLACES)
def test_bottlenecks_sit_at_the_end_of_the_blocks(tiny_model, model_type):
    attention, feed_forward = PLACES[model_type]
    layers = 1 if model_type == "albert" else 2  # ALBERT's layers share one set of weights
    for strategy, ends in (("houlsby", [attention, feed_forward]), ("pfeiffer", [feed_forward])):
        model = tiny_model(model_type=model_type)
        found = tune(model, strategy, reduction=4)
        names = sorted(adapters_of(model))
        inside = sorted(name.split("layers.0.")[-1] if layers == 1 else name.split(".", 4)[-1] for name in names)
        if layers == 2:
            inside = sorted(name.split("layer.")[-1].split("layers.")[-1].split(".", 1)[1] for name in names)
        assert inside == sorted(ends * layers)
        width = 16 // 4
        assert found.groups["adapters"] == (len(names) * (16 * width + width + width * 16 + 16),) * 2


@pytest.mark.parametrize(
    ("model_type", "attention", "feed_forward"),
    [
        ("gpt2", {"attn.c_proj"}, {"mlp.c_proj"}),
        ("llama", {"self_attn.o_proj"}, {"mlp.down_proj"}),
        ("t5", {"layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"},
         {"layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"}),
        ("bart", {"self_attn.out_proj", "encoder_attn.out_proj"}, {"fc2"}),
    ],
)  # fmt: skip
def test_bottlenecks_after_both_attentions_of_a_decoder(model_type, attention, feed_forward):
    for strategy, ends in (("houlsby", attention | feed_forward), ("pfeiffer", feed_forward)):
        model = structured(model_type, "AutoModelForSequenceClassification")
        tune(model, strategy)
        found = [re.split(r"\.(?:h|layers|block)\.\d\.", name) for name in adapters_of(model)]
        assert {inside for _, inside in found} == ends
        if model_type == "bart" and strategy == "houlsby":
            assert sum(".decoder" in outside for outside, _ in found) == 2 * 3
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 3]])).logits.isfinite().all()


def test_a_block_that_ends_elsewhere_is_said(tiny_model):
    model = tiny_model()
    model.config.hidden_size = 17
    with pytest.raises(ValueError, match="no feed-forward block that ends in a linear layer of width 17 found in bert"):
        tune(model, "pfeiffer")


# ------------------------------------------------------------------------------------------------------ fewer bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_cost_half_a_step(dtype):
    torch.manual_seed(3)
    linear = nn.Linear(64, 200)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-3, 2, 200)[:, None])
        linear.weight[7] = 0
    linear = linear.to(dtype)
    small = Int8Linear(linear)
    assert small.codes.dtype == torch.int8 and int(small.codes.abs().max()) == 127
    error = (small.codes.double() * small.scale.double() - linear.weight.double()).abs()
    assert bool((error <= small.scale.double() / 2 * 1.001).all())
    assert bool((small.codes.sign() * linear.weight.sign() >= 0).all())
    assert not small.weight[7].any() and small.weight.dtype == dtype


def test_gradients_through_eight_bits():
    linear = nn.Linear(5, 3)
    small = Int8Linear(linear)
    x, y = (torch.randn(4, 5).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    small(x).square().sum().backward()
    F.linear(y, small.weight, linear.bias).square().sum().backward()
    assert_close(x.grad, y.grad, atol=1e-7, rtol=0)
    assert small.bias.grad is None and sum(p.requires_grad for p in small.parameters()) == 0
    whole = small.whole()
    assert type(whole) is nn.Linear and torch.equal(whole.weight, small.weight)
    assert_close(whole(x), small(x))


def test_lora_on_eight_bits(tiny_model, batch):
    model, plain = tiny_model(), tiny_model()
    plain_logits = plain(**batch).logits
    found = tune(model, "lora", base_bits=8)
    expected = tune(plain, "lora")
    assert (found.trainable, found.total) == (expected.trainable, expected.total)
    assert_close(model(**batch).logits, plain_logits, atol=0.02, rtol=0)
    linears = [m for m in model.bert.encoder.modules() if isinstance(m, (nn.Linear, Int8Linear))]
    assert sum(isinstance(m, Int8Linear) for m in linears) == 12  # all six of a layer, frozen
    assert all(m.bias is None for m in linears if type(m) is nn.Linear)  # the others are A and B
    before = model.bert.encoder.layer[0].output.dense.codes.clone()
    run = fit(model, make_rows(16), config=quick(epochs=4, warmup_fraction=0.0))
    losses = [record["loss"] for record in run.history]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert torch.equal(model.bert.encoder.layer[0].output.dense.codes, before)
    with torch.no_grad():
        expected = model(**batch).logits
        assert_close(merge(model)(**batch).logits, expected, atol=1e-5, rtol=0)
    assert not any(isinstance(m, (Int8Linear, LoRA)) for m in model.modules())


def test_four_bits_need_bitsandbytes(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = tiny_model()
    with pytest.raises(ValueError, match=r"base_bits=4 needs bitsandbytes \(pip install bitsandbytes\); base_bits=8"):
        tune(model, "lora", base_bits=4)
    assert not adapters_of(model) and all(p.requires_grad for p in model.parameters())


def test_lora_on_four_bits(tiny_model, batch):
    pytest.importorskip("bitsandbytes", reason="4 bits are bitsandbytes' work; pip install bitsandbytes to test them")
    sizes = dict(hidden_size=64, intermediate_size=128)
    model, plain = tiny_model(**sizes), tiny_model(**sizes)
    tune(model, "lora", base_bits=4)
    assert type(model.bert.encoder.layer[0].output.dense).__name__ == "Linear4bit"
    with torch.no_grad():
        found, expected = model(**batch).logits, plain(**batch).logits
    assert_close(found, expected, atol=0.1, rtol=0)
    before = model.bert.encoder.layer[0].output.dense.weight.clone()
    run = fit(model, make_rows(8), config=quick(epochs=2, warmup_fraction=0.0))
    assert run.steps == 4 and torch.equal(model.bert.encoder.layer[0].output.dense.weight, before)
    with pytest.raises(ValueError, match="can't merge into a Linear4bit; load the base unquantized"):
        merge(model)
