"""The CPU shortcuts give the numbers of the modules they stand in for."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ftlib.methods import speedups


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def gradients(function, *tensors):
    """The result and the gradients with respect to every tensor, for one fixed incoming gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    (out * weights).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 3, 200_001])
def test_keep_mask_has_the_asked_share(p, count):
    mask = speedups.keep_mask(torch.empty(count), p)
    assert mask.shape == (count,) and set(mask.tolist()) <= {0.0, 1.0}
    if count > 1000:
        assert abs(mask.mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5


def test_keep_mask_of_almost_one():
    assert speedups.keep_mask(torch.empty(1000), 0.999999).sum() <= 5


def test_keep_mask_draws_are_independent_between_neighbours():
    """The four 16-bit pieces of one draw: pairs of elements are dropped together as often as chance says."""
    mask = speedups.keep_mask(torch.empty(400_000), 0.5).view(-1, 4)
    for a in range(4):
        for b in range(a):
            together = (mask[:, a] * mask[:, b]).mean().item()
            assert together == pytest.approx(0.25, abs=0.01)


def test_keep_mask_follows_the_seed():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(speedups.keep_mask(torch.empty(100), 0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_dropout_scales_what_it_keeps_and_its_gradient_is_the_same_mask():
    x = torch.ones(50, 20, requires_grad=True)
    out = speedups.dropout(x, p=0.2)
    assert set(out.unique().tolist()) == {0.0, 1.25}
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_dropout_that_drops_nothing_is_the_identity(p, training):
    x = torch.randn(3)
    assert speedups.dropout(x, p, training) is x


def test_dropout_of_everything():
    assert speedups.dropout(torch.ones(5), p=1.0).tolist() == [0.0] * 5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 24), (2, 33, 24), (1, 16, 24), (3, 24)])
def test_linear_is_torch_linear(shape, bias):
    x, weight = torch.randn(shape), torch.randn(10, 24)
    rest = [torch.randn(10)] if bias else []
    for ours, twin in zip(
        gradients(speedups.linear, x, weight, *rest), gradients(F.linear, x, weight, *rest), strict=True
    ):
        torch.testing.assert_close(ours, twin, atol=1e-4, rtol=1e-5)


def test_linear_of_double_precision_under_autocast_and_without_gradients():
    x, weight = torch.randn(40, 24), torch.randn(10, 24)
    assert speedups.linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert speedups.linear(x, weight).dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(speedups.linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_linear_with_frozen_weights_gives_only_the_gradient_that_is_needed():
    x = torch.randn(40, 24, requires_grad=True)
    weight, bias = torch.randn(10, 24), torch.randn(10, requires_grad=True)
    speedups.linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), atol=1e-5, rtol=1e-5)
    assert weight.grad is None and bias.grad.tolist() == [40.0] * 10


@pytest.mark.skipif(not speedups.ONEDNN, reason="this processor takes the ordinary product")
def test_linear_takes_onednn_where_it_is_the_quicker_one(monkeypatch):
    calls = []
    product = speedups._product
    monkeypatch.setattr(speedups, "_product", lambda *args: calls.append(1) or product(*args))
    speedups.linear(torch.randn(64, 8), torch.randn(4, 8))
    assert calls == [1]


def test_what_a_linear_layer_gives_may_be_changed_in_place():
    x = torch.randn(2, 20, 8, requires_grad=True)
    layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    with speedups.shortcuts(layer):
        layer(x).sum().backward()
        out = layer[0](x)
        out -= 0.5
    assert x.grad.shape == x.shape
    torch.testing.assert_close(out, F.linear(x, layer[0].weight, layer[0].bias) - 0.5)


def test_linear_without_onednn_is_the_ordinary_one(monkeypatch):
    monkeypatch.setattr(speedups, "ONEDNN", False)
    x, weight = torch.randn(64, 8), torch.randn(4, 8)
    assert torch.equal(speedups.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [2, 2, 2], [3, 3, 1, 1, 3], [90, 90, 4], [150, 2]])
@pytest.mark.parametrize("threads", [1, 2])
def test_attend_is_scaled_dot_product_attention_of_each_example(lengths, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = [torch.randn(3, sum(lengths), 8) for _ in range(3)]

        def ours(q, k, v):
            return speedups.attend(q, k, v, lengths, scale=8**-0.5)

        def twin(q, k, v):
            parts = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
            return torch.cat([F.scaled_dot_product_attention(a, b, c) for a, b, c in parts], 1)

        for a, b in zip(gradients(ours, *inputs), gradients(twin, *inputs), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs), twin(*inputs), atol=1e-5, rtol=1e-5)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_attend_with_dropout_has_the_right_mean_and_gradient():
    q, k, v = (torch.randn(2, 6, 4) for _ in range(3))
    plain = speedups.attend(q, k, v, [4, 2])
    mean = torch.stack([speedups.attend(q, k, v, [4, 2], p=0.3) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, plain, atol=0.1, rtol=0)

    def seeded(*inputs):
        torch.manual_seed(7)  # the same mask at every call
        return speedups.attend(*inputs, [4, 2], p=0.3)

    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(seeded, inputs)


@pytest.mark.parametrize(("lengths", "causal"), [
    ([5], False), ([3, 3, 7, 1], False), ([150, 2], False), ([3, 7, 1], True), ([150, 2], True), ([400, 2], True),
])  # fmt: skip
def test_attend_in_half_precision_is_attend_of_the_same_numbers(lengths, causal):
    """The result, and the gradients, rounded to bfloat16 at the end: within 2 units in its last place."""
    wide = [torch.randn(2, sum(lengths), 8).bfloat16().float().requires_grad_() for _ in range(3)]
    half = [x.detach().bfloat16().requires_grad_() for x in wide]
    with torch.autocast("cpu", torch.bfloat16):
        mine = speedups.attend(*half, lengths, scale=8**-0.5, causal=causal)
    theirs = speedups.attend(*wide, lengths, scale=8**-0.5, causal=causal)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.float(), theirs, atol=2**-6, rtol=2**-6)
    for out in (mine, theirs):
        out.float().pow(2).sum().backward()
    for a, b in zip(half, wide, strict=True):
        assert a.grad.dtype == torch.bfloat16
        torch.testing.assert_close(a.grad.float(), b.grad, atol=0.05, rtol=0.05)


def test_dropout_in_half_precision_keeps_what_the_seed_says_in_both_types():
    x = torch.randn(1000).bfloat16()
    outs = []
    for one in (x, x.float()):
        torch.manual_seed(5)
        outs.append(speedups.dropout(one, 0.25))
    assert outs[0].dtype == torch.bfloat16 and torch.equal(outs[0] == 0, outs[1] == 0)
    torch.testing.assert_close(outs[0].float(), outs[1], atol=0, rtol=2**-7)
    assert 0.2 < (outs[0] == 0).float().mean() < 0.3


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "albert", "modernbert", "gpt2", "llama"])
def test_half_precision_by_shortcuts_is_no_farther_from_float32_than_stock_autocast(tiny_model, model_type):
    """Logits and gradients of real sizes of rounding: at most twice the stock error, and of the same direction."""
    kind = "sequence-classification"
    model = tiny_model(kind, model_type=model_type).eval()
    inputs = {"input_ids": torch.randint(5, 60, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}

    def run(autocast, quick):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with speedups.shortcuts(model) if quick else nullcontext():
                logits = model(**inputs).logits
        logits.float().logsumexp((0, 1)).backward()
        return logits.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    right, stock, ours = run(False, False), run(True, False), run(True, True)
    for a, b, c in zip(right, stock, ours, strict=True):
        assert 0 < (c - a).norm() < 2 * (b - a).norm() + 1e-3 * a.norm()
        assert torch.cosine_similarity(a.flatten(), c.flatten(), dim=0) > 0.999


def test_a_layer_norm_hands_on_what_is_computed_in():
    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    with speedups.shortcuts(nn.Sequential(norm)):
        assert norm(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            half = norm(x)
        assert half.dtype == torch.bfloat16 and torch.equal(half, norm(x).bfloat16())
        with torch.autocast("cpu", torch.float16):  # not ours: as it is
            assert norm(x).dtype == torch.float32


RMS_TYPES = {  # model type -> options of its tiny config that bring in the norms of heads
    "exaone4": {}, "gemma": {"head_dim": 8}, "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}, "glm": {},
    "glm4": {}, "granite": {}, "llama": {}, "ministral3": {}, "mistral": {}, "olmo2": {}, "olmo3": {}, "phi3": {},
    "qwen2": {}, "qwen3": {"head_dim": 8}, "seed_oss": {}, "smollm3": {},
    **{kind: {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2} for kind in ("mt5", "t5", "umt5")},
}  # fmt: skip


def rms_norms(model):
    return [m for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "T5LayerNorm"))]


def called_with(norm, x, weight):
    return torch.func.functional_call(norm, {"weight": weight}, x)


@pytest.mark.parametrize("kind", RMS_TYPES)
def test_rms_norm_is_that_of_the_stock_classes(tiny_model, kind):
    """All by name; the tuple holds no others, and every RMSNorm of these models is taken."""
    model = tiny_model("encoder", model_type=kind, **RMS_TYPES[kind])
    norms = rms_norms(model)
    assert norms and {type(m).__name__ for m in norms} <= set(speedups._RMS)
    for norm in {type(m): m for m in norms}.values():
        x = torch.randn(3, 40, len(norm.weight)) * 3
        nn.init.normal_(norm.weight)
        function = partial(called_with, norm)
        theirs = gradients(function, x, norm.weight)
        with speedups.shortcuts(model):
            assert norm.forward.func.__name__ == "<lambda>"
            mine = gradients(function, x, norm.weight)
            half = norm(x.bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                handed = norm(x)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
        assert half.dtype == handed.dtype == torch.bfloat16
        torch.testing.assert_close(handed, theirs[0].bfloat16(), atol=0, rtol=2**-7)
        torch.testing.assert_close(half.float(), norm(x.bfloat16().float()), atol=0, rtol=2**-7)


def test_every_rms_norm_by_name_is_tested(tiny_model):
    made = [tiny_model("encoder", model_type=kind, **options) for kind, options in RMS_TYPES.items()]
    assert {type(m).__name__ for model in made for m in rms_norms(model)} == {*speedups._RMS}


def test_rms_norm_of_double_precision_is_the_stock_one(tiny_model):
    model = tiny_model("encoder", model_type="llama").double()
    x = torch.randn(2, 16).double()
    expected = model.norm(x)
    with speedups.shortcuts(model):
        assert torch.equal(model.norm(x), expected)
    inputs = [torch.randn(4, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w: speedups._RMSNorm.apply(x, w, 1e-6, torch.float64), inputs)


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [2, 2, 2], [90, 90, 4], [150, 2], [300, 20, 257, 3], [300]])
@pytest.mark.parametrize("shared", [1, 2])
def test_causal_attention_and_heads_that_share_keys(lengths, shared):
    """Each example is PyTorch's own causal attention of it; rows longer than SHORT go another way."""
    query = torch.randn(4, sum(lengths) + 3, 8)  # three tokens of no row
    key, value = (torch.randn(4 // shared, sum(lengths) + 3, 8) for _ in range(2))

    def ours(q, k, v):
        return speedups.attend(q, k, v, lengths, scale=0.3, causal=True)

    def twin(q, k, v):
        parts = zip(*(x.split([*lengths, 3], 1) for x in (q, k, v)), strict=True)
        options = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
        outs = [F.scaled_dot_product_attention(*(x[None] for x in part), **options)[0] for part in parts]
        return torch.cat([*outs[:-1], outs[-1] * 0], 1)

    for a, b in zip(gradients(ours, query, key, value), gradients(twin, query, key, value), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(query, key, value), twin(query, key, value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5, 2, 5], [150, 2, 20]])
def test_a_bias_of_places(lengths, causal):
    """Added to every row's scores from its first token on; its gradient is the sum over rows."""
    size = -(-max(lengths) // 8) * 8
    query, key, value, bias = *torch.randn(3, 2, sum(lengths) + 3, 8), torch.randn(2, size, size)

    def ours(q, k, v, b):
        return speedups.attend(q, k, v, lengths, scale=0.3, causal=causal, bias=b)

    def twin(q, k, v, b):
        outs = []
        for one in zip(*(x.split([*lengths, 3], 1) for x in (q, k, v)), strict=True):
            n = one[0].shape[1]
            later = torch.ones(n, n, dtype=torch.bool).triu(1) & causal
            added = b[:, :n, :n].masked_fill(later, -torch.inf)
            outs.append(F.scaled_dot_product_attention(*(x[None] for x in one), added[None], scale=0.3)[0])
        return torch.cat([*outs[:-1], outs[-1] * 0], 1)

    given = query, key, value, bias
    for a, b in zip(gradients(ours, *given), gradients(twin, *given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(*given), twin(*given), atol=1e-5, rtol=1e-5)


def test_the_tanh_formula_of_gelu_is_one_function():
    from transformers.activations import ACT2FN

    model, x = nn.Sequential(ACT2FN["gelu_new"]), torch.linspace(-6, 6, 101)
    expected = model(x)
    with speedups.shortcuts(model):
        assert "forward" in vars(model[0])
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lengths", [[5, 2], [150, 2]])
def test_heads_that_share_keys_without_causality(lengths):
    query, key, value = torch.randn(6, sum(lengths), 8), *(torch.randn(2, sum(lengths), 8) for _ in range(2))

    def ours(q, k, v):
        return speedups.attend(q, k, v, lengths, scale=0.3)

    def twin(q, k, v):
        return speedups.attend(q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), lengths, scale=0.3)

    for a, b in zip(gradients(ours, query, key, value), gradients(twin, query, key, value), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(query, key, value), twin(query, key, value), atol=1e-5, rtol=1e-5)


def test_causal_dropout_has_the_right_mean_and_gradient_and_long_rows_keep_it():
    q, k, v = torch.randn(2, 6, 4), torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    plain = speedups.attend(q, k, v, [4, 2], causal=True)
    mean = torch.stack([speedups.attend(q, k, v, [4, 2], p=0.3, causal=True) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, plain, atol=0.1, rtol=0)

    def seeded(*inputs):
        torch.manual_seed(7)  # the same mask at every call
        return speedups.attend(*inputs, [4, 2], p=0.3, causal=True)

    assert torch.autograd.gradcheck(seeded, [x.double().requires_grad_() for x in (q, k, v)])
    long = torch.ones(1, speedups.LONG + 10, 4)
    out = speedups.attend(long, long, long, [speedups.LONG + 10], p=0.5, causal=True)
    assert set(out[0, 0].tolist()) <= {0.0, 2.0} and 0.9 < out[0, 100:].mean() < 1.1 and out[0, 100:].std() > 0.01


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 24, padding_idx=0)
        self.inner = nn.Linear(24, 24)
        self.drop = nn.Dropout(0.0)
        self.out = nn.Linear(24, 2)

    def get_input_embeddings(self):
        return self.words

    def forward(self, ids):
        return self.out(self.drop(self.inner(self.words(ids)).tanh()))


def test_shortcuts_change_nothing_but_the_time_and_leave_no_trace():
    model = Small()
    ids = torch.randint(1, 50, (4, 20))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    plain = model(ids)
    with speedups.shortcuts(model), speedups.shortcuts(model):
        assert "forward" in vars(model.inner)
        torch.testing.assert_close(model(ids), plain, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(checkpoint(model, ids, use_reentrant=False), plain, atol=1e-6, rtol=1e-5)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    copy.deepcopy(model), pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_shortcuts_of_stock_encoders(tiny_model, model_type):
    model = tiny_model("encoder", model_type=model_type).eval()
    inputs = {"input_ids": torch.randint(5, 60, (5, 12)), "attention_mask": torch.ones(5, 12, dtype=torch.long)}
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            plain = model(**inputs).last_hidden_state
            with speedups.shortcuts(model):
                quick = model(**inputs).last_hidden_state
        torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-5)


def test_shortcuts_end_with_an_error_too():
    model = Small()
    with pytest.raises(IndexError), speedups.shortcuts(model):
        model(torch.tensor([[99]]))
    assert not any("forward" in vars(module) for module in model.modules())
