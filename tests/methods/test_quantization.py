"""Codes and scales against torch.ao's observers, and torchao where it is; layers against what they stand for."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_fit import make_rows, quick, same, weights
from torch import nn
from torch.testing import assert_close

import ftlib
from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.methods.adapters import linears
from ftlib.methods.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    affine,
    quantize,
    rounded,
    rounding,
    whole_product,
)
from ftlib.methods.tuning import merge, tune
from ftlib.methods.unpadding import unpad

SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def drawn(*shape, seed=0, spread=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-2, 1, shape[0])[:, None] * spread + 0.1


# ---------------------------------------------------------------------------------------------------- whole numbers


def test_codes_by_hand():
    x = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale, zero = affine(x, bits=4, dim=1)
    assert_close(scale[:, 0], torch.tensor([2 / 7.5, torch.finfo(torch.float32).eps]))
    assert codes.tolist() == [[-4, 0, 2, 7], [0, 0, 0, 0]] and not zero.any()  # -3.75, 1.875, and 7.5, cut at 7
    codes, scale, zero = affine(x, bits=4, dim=1, symmetric=False)
    assert_close(scale[0, 0], torch.tensor(3 / 15))
    assert codes[0].tolist() == [-8, -3, -1, 7] and zero[0].item() == -3  # 0.5 / 0.2 = 2.5 rounds to 2, the even one


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("spread", [1.0, 1e-9])
def test_codes_are_torchs(symmetric, channels, spread):
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

    x = drawn(6, 50, spread=spread)
    scheme = f"per_{'channel' if channels else 'tensor'}_{'symmetric' if symmetric else 'affine'}"
    kind = PerChannelMinMaxObserver if channels else MinMaxObserver
    observer = kind(dtype=torch.qint8, qscheme=getattr(torch, scheme), quant_min=-128, quant_max=127)
    observer(x)
    scale, zero = observer.calculate_qparams()
    if channels:
        theirs = torch.quantize_per_channel(x, scale, zero, 0, torch.qint8)
    else:
        theirs = torch.quantize_per_tensor(x, float(scale), int(zero), torch.qint8)
    codes, own_scale, own_zero = affine(x, dim=1 if channels else (), symmetric=symmetric)
    assert torch.equal(own_scale.flatten(), scale) and own_zero.flatten().tolist() == zero.tolist()
    assert torch.equal(codes, theirs.int_repr())
    assert_close((codes - own_zero) * own_scale, theirs.dequantize(), atol=1e-6, rtol=1e-6)
    if not channels:
        faked = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), -128, 127)
        assert_close((codes - own_zero) * own_scale, faked, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)])
def test_codes_are_torchaos(bits, symmetric):
    why = "not locked: it loads, and prints, with every model"
    quant = pytest.importorskip("torchao.quantization.quant_primitives", reason=why)
    x, block = drawn(6, 128), (1, 64 if bits == 4 else 128)
    kind = quant.MappingType.SYMMETRIC if symmetric else quant.MappingType.ASYMMETRIC
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    how = dict(target_dtype=torch.int8, quant_min=low, quant_max=high)
    eps = torch.finfo(torch.float32).eps
    how |= dict(eps=eps, scale_dtype=torch.float32, zero_point_dtype=torch.int32)
    scale, zero = quant.choose_qparams_affine(x, kind, block, **how)
    theirs = quant.quantize_affine(x, block, scale, zero, torch.int8, low, high)
    codes, own_scale, own_zero = affine(x.view(-1, block[1]), bits, dim=1, symmetric=symmetric)
    assert torch.equal(own_scale.flatten(), scale.flatten()) and torch.equal(codes.view_as(x), theirs)
    assert own_zero.flatten().tolist() == zero.flatten().tolist()
    if symmetric:
        whole = quant.dequantize_affine(theirs, block, scale, zero, torch.int8, low, high)
        assert_close(rounded(x, bits), whole, atol=1e-6, rtol=1e-6)


def test_products_of_whole_numbers_are_exact(monkeypatch):
    a, b = torch.randint(-127, 128, (19, 16), dtype=torch.int8), torch.randint(-127, 128, (24, 16), dtype=torch.int8)
    wanted = (a.long() @ b.long().T).float()
    assert torch.equal(whole_product(a, b), wanted)
    monkeypatch.delattr(torch, "_int_mm")
    assert torch.equal(whole_product(a, b), wanted)


# ----------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("conv", [False, True])
def test_a_layer_computes_with_the_rounded_weight(bits, conv):
    linear = transformers.pytorch_utils.Conv1D(10, 9) if conv else nn.Linear(9, 10)  # 90 numbers: 64, and 26 filled up
    linear.weight.data = (drawn(10, 9).T.contiguous() if conv else drawn(10, 9))
    linear.bias.data.normal_()
    small, x = QuantizedLinear(linear, bits), torch.randn(2, 3, 9)
    weight = linear.weight.T if conv else linear.weight
    assert torch.equal(small.weight, rounded(weight.detach(), bits))
    assert_close(small(x), F.linear(x, rounded(weight.detach(), bits), linear.bias))
    assert small.codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert small.codes.numel() == (90 if bits == 8 else 64) and not any(p.requires_grad for p in small.parameters())
    off = (small.weight - weight).abs()
    step = small.scale if bits == 8 else small.scale.repeat_interleave(64)[:90].view(10, 9)
    assert bool((off <= step * 0.501).all()) and bool((off > 0).any())  # half a step beyond the last code too


def test_dynamic_is_torchs_product_of_rounded_numbers():
    linear, x = nn.Linear(16, 24), torch.randn(3, 7, 16)
    small = QuantizedLinear(linear, dynamic=True)
    rows = x.flatten(0, 1)
    scale = rows.abs().amax(1, keepdim=True) / 127.5
    inputs = torch.fake_quantize_per_channel_affine(rows, scale[:, 0], torch.zeros(21, dtype=torch.int32), 0, -128, 127)
    weight = torch.fake_quantize_per_channel_affine(
        linear.weight, small.scale[:, 0], torch.zeros(24, dtype=torch.int32), 0, -128, 127
    )
    assert_close(small(x), F.linear(inputs, weight, linear.bias).view(3, 7, 24), atol=1e-5, rtol=1e-5)
    assert small(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"dynamic": True}, {"words": True}])
def test_a_model_of_few_bits(tiny_model, options):
    """Every linear layer inside the layers, and nothing else, is replaced; unpadded or not it computes the same."""
    model, batch = tiny_model(hidden_size=32, intermediate_size=64), collate(make_rows(6))
    batch.pop("labels")
    plain = copy.deepcopy(model)
    assert quantize(model, **options) is model
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(QuantizedLinear) == 12 and kinds.count(nn.Linear) == 2  # the pooler and the head stay
    assert kinds.count(QuantizedEmbedding) == (1 if options.get("words") else 0)
    with torch.no_grad():
        for name, module in plain.named_modules():  # a float model of the rounded weights
            if isinstance(model.get_submodule(name), (QuantizedLinear, QuantizedEmbedding)):
                module.weight.copy_(rounded(module.weight, options.get("bits", 8)))
        found, wanted = model(**batch).logits, plain(**batch).logits
        assert_close(found, wanted, atol=2e-2 if options.get("dynamic") else 1e-5, rtol=0)
        assert_close(unpad(model)(**batch).logits, found, atol=1e-5, rtol=0)
        again = quantize(tiny_model(hidden_size=32, intermediate_size=64, seed=9), **options)
        again.load_state_dict(model.state_dict())
        assert_close(again(**batch).logits, found, atol=1e-5, rtol=0)
    size = lambda one: sum(t.numel() * t.element_size() for t in one.bert.encoder.state_dict().values())  # noqa: E731
    assert size(model) < size(plain) / (5 if options.get("bits") == 4 else 2.8)


def test_decoders_have_few_bits_too():
    sizes = dict(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ids, plain = torch.tensor([[5, 6, 7]]), copy.deepcopy(model)
    with torch.no_grad():
        assert_close(quantize(model)(ids).logits, plain(ids).logits, atol=2e-2, rtol=0)
    with pytest.raises(ValueError, match="the output layer shares the table; words=False"):
        quantize(plain, words=True)


def test_what_can_not_be_quantized_is_said(tiny_model, tmp_path):
    model = tiny_model()
    both = {"bits": 4, "dynamic": True}
    for options, said in (({"bits": 5}, "bits=5: choose one of 8, 4"), (both, "bits=4: choose one of 8")):
        with pytest.raises(ValueError, match=said):
            quantize(model, **options)
        with pytest.raises(ValueError, match=said), rounding(model, **options):
            pass
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    tune(model, "lora", rank=2)
    for refused in (quantize, lambda model: rounding(model).__enter__()):
        with pytest.raises(ValueError, match=r"ftlib.merge\(model\)"):
            refused(model)
    quantize(merge(model))
    with pytest.raises(ValueError, match="no linear layers are left inside the layers of bert"):
        quantize(model)
    with pytest.raises(ValueError, match=r"query.codes is quantized, .*save the model before ftlib.quantize"):
        ftlib.save(model, tmp_path / "m")
    assert not (tmp_path / "m" / "config.json").exists()


# -------------------------------------------------------------------------------------------------- training for it


@pytest.mark.parametrize("bits", [8, 4])
def test_inside_rounding_the_model_is_what_it_will_be(tiny_model, bits):
    model, batch = tiny_model(hidden_size=32), collate(make_rows(6))
    batch.pop("labels")
    with torch.no_grad():
        for linear in linears(model).values():
            linear.weight *= 10  # so that rounding is seen
    with rounding(model, bits), torch.no_grad():
        inside = model(**batch).logits
        scores = ftlib.evaluate(model, make_rows(6))  # whose shortcuts go around no rounding
    plain = copy.deepcopy(model)
    with torch.no_grad():
        assert_close(quantize(model, bits)(**batch).logits, inside, atol=1e-5, rtol=0)
        assert not torch.allclose(plain(**batch).logits, inside, atol=1e-5)
    assert_close(ftlib.evaluate(model, make_rows(6))["loss"], scores["loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"bits": 4}, {"dynamic": True}])
def test_a_layer_inside_rounding_is_what_it_will_be(options):
    """Inputs that differ in their last digit may be rounded to other codes, so of one layer, not of a model."""
    model, x = transformers.BertModel(transformers.BertConfig(**SMALL)).eval(), torch.randn(2, 3, 16)
    place = "encoder.layer.0.attention.self.key"
    with rounding(model, **options):
        inside = model.get_submodule(place)(x)
    assert not torch.allclose(model.get_submodule(place)(x), inside, atol=1e-5)
    assert_close(quantize(model, **options).get_submodule(place)(x), inside, atol=1e-6, rtol=1e-5)


def test_gradients_go_straight_through():
    model, x = transformers.BertModel(transformers.BertConfig(**SMALL)), torch.randn(5, 16)
    linear = model.encoder.layer[0].attention.self.key
    with rounding(model, bits=4):
        linear(x).square().sum().backward()
    own = linear.weight.grad.clone()
    weight = rounded(linear.weight.detach(), 4).requires_grad_()
    F.linear(x, weight, linear.bias).square().sum().backward()
    assert_close(own, weight.grad)


def test_training_for_four_bits_pays(tiny_model):
    """fit inside `rounding` lowers the loss of the quantized model; the weights are floats and go on moving."""
    rows = make_rows(32)
    model = unpad(tiny_model(hidden_size=32))
    before = weights(model)
    with rounding(model, bits=4):
        run = fit(model, rows, eval_dataset=rows, config=quick(epochs=6, learning_rate=5e-3))
    assert not same(weights(model), before)
    assert_close(ftlib.evaluate(quantize(model, bits=4), rows)["loss"], run.metrics["loss"], atol=1e-4, rtol=0)
    assert run.metrics["loss"] < 0.6
