"""Losses against torch's own, against numbers worked out by hand, at their edges, and on bad input."""

import importlib.util
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ftlib.methods.losses
from ftlib.methods.losses import (
    IGNORE,
    binary_cross_entropy,
    class_weights,
    cross_entropy,
    focal_loss,
    mean_squared_error,
)

REDUCTIONS = ("mean", "sum", "none")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_same_loss_and_gradient(ours, theirs, logits):
    """ours, theirs: functions of the logits. A weighted sum makes "none" a scalar that mixes nothing up."""
    results = []
    for function in (ours, theirs):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        mix = torch.linspace(1.0, 2.0, max(loss.numel(), 1))[: loss.numel()].reshape(loss.shape)
        results.append((loss.detach(), torch.autograd.grad((loss * mix).sum(), leaf)[0]))
    (our_loss, our_gradient), (their_loss, their_gradient) = results
    close(our_loss, their_loss)
    close(our_gradient, their_gradient)


# ---- cross-entropy ----


def test_cross_entropy_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [5.0, 1.0]])  # probabilities 3/4 1/4, 1/2 1/2
    labels = torch.tensor([0, 1, IGNORE])
    expected = torch.tensor([math.log(4 / 3), math.log(2), 0.0])
    close(cross_entropy(logits, labels, reduction="none"), expected)
    close(cross_entropy(logits, labels, reduction="sum"), expected.sum())
    close(cross_entropy(logits, labels), expected.sum() / 2)  # two labels count
    weight = torch.tensor([1.0, 3.0])
    close(cross_entropy(logits, labels, weight=weight), (math.log(4 / 3) + 3 * expected[1]) / 4)
    # smoothing 0.2 over two classes: target 0.9 on the label and 0.1 on the other
    smoothed = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4))
    close(cross_entropy(logits[:1], labels[:1], label_smoothing=0.2), torch.tensor(smoothed))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [IGNORE, 2])
def test_cross_entropy_same_as_torch(reduction, smoothing, weighted, ignore_index):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator) * 3
    labels = torch.tensor([0, 3, ignore_index, 2, 1, ignore_index, 0])
    weight = torch.tensor([0.5, 2.0, 1.0, 0.1]) if weighted else None
    options = dict(weight=weight, label_smoothing=smoothing, ignore_index=ignore_index, reduction=reduction)
    assert_same_loss_and_gradient(
        lambda z: cross_entropy(z, labels, **options), lambda z: F.cross_entropy(z, labels, **options), logits
    )


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), max_size=3),
    classes=st.integers(1, 5),
    smoothing=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    seed=st.integers(0, 999),
)
def test_cross_entropy_same_as_torch_at_any_shape(
    shape, classes, smoothing, weighted, reduction, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, classes, generator=generator) * 10
    labels = torch.randint(classes, shape, generator=generator)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.2, IGNORE)
    if reduction == "mean" and torch.all(labels == IGNORE):
        labels = torch.zeros_like(labels)  # torch's mean is NaN there; ours has its own test
    options = dict(label_smoothing=smoothing, weight=torch.arange(1.0, classes + 1) if weighted else None)

    def theirs(z):
        flat = F.cross_entropy(z.reshape(-1, classes), labels.flatten(), reduction=reduction, **options)
        return flat.reshape(shape) if reduction == "none" else flat

    def ours(z):
        return cross_entropy(z, labels.to(dtype), reduction=reduction, **options)

    assert_same_loss_and_gradient(ours, theirs, logits)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4], [1e4, 1e4]])
    for loss in (cross_entropy, lambda *a, **k: focal_loss(*a, gamma=0.0, **k)):
        close(loss(logits, torch.tensor([1, 0]), reduction="none"), torch.tensor([2e4, math.log(2)]))
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf, torch.tensor([1, 0]), reduction="sum").backward()
    close(leaf.grad, torch.tensor([[1.0, -1.0], [-0.5, 0.5]]))
    naive = -(logits.exp() / logits.exp().sum(-1, keepdim=True)).log()  # the formula as it is often typed
    assert torch.isnan(naive).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 5, generator=generator) * 8).to(dtype)
    labels = torch.randint(5, (64,), generator=generator)
    targets = (torch.rand(64, 5, generator=generator) > 0.5).float()
    pairs = [
        (cross_entropy(logits, labels), F.cross_entropy(logits.float(), labels)),
        (focal_loss(logits, labels, gamma=0.0), F.cross_entropy(logits.float(), labels)),
        (
            binary_cross_entropy(logits, targets),
            F.binary_cross_entropy_with_logits(logits.float(), targets),
        ),
        (mean_squared_error(logits, targets), F.mse_loss(logits.float(), targets)),
    ]
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        close(ours, theirs)
    extreme = torch.full((9, 2), 1e4, dtype=dtype) * torch.tensor([1, -1], dtype=dtype)
    total = cross_entropy(extreme, torch.ones(9, dtype=torch.long), reduction="sum")
    assert total == 9 * 2 * extreme[0, 0].float()  # 180,000 is infinite in float16
    assert cross_entropy(logits.double(), labels).dtype == torch.float64


# ---- binary cross-entropy ----


def test_binary_cross_entropy_by_hand():
    logits = torch.tensor([[math.log(3), 0.0, 2.0]])  # σ = 3/4, 1/2
    targets = torch.tensor([[0.0, 1.0, IGNORE]])
    expected = torch.tensor([[math.log(4), math.log(2), 0.0]])
    close(binary_cross_entropy(logits, targets, reduction="none"), expected)
    close(binary_cross_entropy(logits, targets), expected.sum() / 2)
    close(binary_cross_entropy(torch.zeros(1, 1), torch.full((1, 1), 0.5)), torch.tensor(math.log(2)))


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    spread=st.sampled_from([0.0, 1.0, 1e4]),
    soft=st.booleans(),
    weighted=st.booleans(),
    ignored=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 999),
)
def test_binary_cross_entropy_same_as_torch(shape, spread, soft, weighted, ignored, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * spread  # spread 0: where |z| and max have a kink
    targets = torch.rand(shape, generator=generator)
    targets = targets if soft else targets.round()
    counts = torch.ones(shape, dtype=torch.bool)
    if ignored:
        counts = torch.rand(shape, generator=generator) > 0.3
        counts.view(-1)[0] = True  # at least one entry counts
    pos_weight = torch.arange(1.0, shape[-1] + 1) if weighted else None

    def theirs(z):
        loss = F.binary_cross_entropy_with_logits(z, targets, pos_weight=pos_weight, reduction="none")
        loss = loss * counts
        return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / counts.sum()}[reduction]

    def ours(z):
        given = targets.masked_fill(~counts, IGNORE)
        return binary_cross_entropy(z, given, pos_weight=pos_weight, reduction=reduction)

    assert_same_loss_and_gradient(ours, theirs, logits)


# ---- mean squared error ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (3, 2), ()])
def test_mean_squared_error_same_as_torch(reduction, shape):
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    assert_same_loss_and_gradient(
        lambda p: mean_squared_error(p, targets, reduction=reduction),
        lambda p: F.mse_loss(p, targets, reduction=reduction),
        predictions,
    )


def test_mean_squared_error_by_hand():
    predictions, targets = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[1, 4], [3, 4]])
    assert mean_squared_error(predictions, targets, reduction="none").tolist() == [[0.0, 4.0], [9.0, 0.0]]
    assert mean_squared_error(predictions, targets).item() == 13 / 4


# ---- focal loss ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_at_gamma_zero_is_cross_entropy(reduction, weighted):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 4
    labels = torch.tensor([0, 2, IGNORE, 1, 1, 0])
    options = dict(weight=torch.tensor([0.5, 2.0, 1.0]) if weighted else None, reduction=reduction)
    assert_same_loss_and_gradient(
        lambda z: focal_loss(z, labels, gamma=0.0, **options),
        lambda z: F.cross_entropy(z, labels, **options),
        logits,
    )


def test_focal_loss_by_hand():
    logits = torch.tensor([[math.log(9), 0.0], [math.log(9), 0.0]])  # p = 0.9 and 0.1
    labels = torch.tensor([0, 1])
    easy, hard = -(0.1**2) * math.log(0.9), -(0.9**2) * math.log(0.1)
    close(focal_loss(logits, labels, reduction="none"), torch.tensor([easy, hard]))
    close(
        focal_loss(logits, labels, gamma=1.0), torch.tensor(-(0.1 * math.log(0.9) + 0.9 * math.log(0.1)) / 2)
    )
    weight = torch.tensor([0.25, 0.75])
    close(focal_loss(logits, labels, weight=weight), torch.tensor(0.25 * easy + 0.75 * hard))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_has_finite_gradients_for_certain_answers(gamma):
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4], [3.0, 2.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0, 1]), gamma=gamma).backward()
    assert torch.isfinite(logits.grad).all()


def test_focal_loss_gradient_matches_finite_differences():
    logits = torch.randn(
        4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    labels = torch.tensor([0, 2, IGNORE, 1])
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, labels, gamma=2.0), logits)


# ---- nothing to learn from ----


def test_a_mean_over_nothing_is_zero_with_zero_gradients():
    logits = torch.randn(3, 2, requires_grad=True)
    labels = torch.full((3,), IGNORE)
    losses = [
        cross_entropy(logits, labels),
        cross_entropy(logits, labels, weight=torch.tensor([2.0, 3.0]), label_smoothing=0.1),
        focal_loss(logits, labels),
        binary_cross_entropy(logits, torch.full((3, 2), float(IGNORE))),
        mean_squared_error(logits[:0], torch.zeros(0, 2)),
        cross_entropy(logits[:0], labels[:0]),
    ]
    for loss in losses:
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.all(gradient == 0)
    assert torch.isnan(F.cross_entropy(logits, labels))  # what torch does instead


def test_only_classes_of_weight_zero_give_zero():
    loss = cross_entropy(torch.randn(2, 2), torch.tensor([0, 0]), weight=torch.tensor([0.0, 1.0]))
    assert loss.item() == 0.0


# ---- class weights ----


@settings(max_examples=25, deadline=None)
@given(extra=st.lists(st.integers(0, 3) | st.just(IGNORE), max_size=20))
def test_class_weights_same_as_sklearn(extra):
    import numpy as np
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0, 1, 2, 3, *extra]
    kept = np.array([label for label in labels if label != IGNORE])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=kept)
    weights = class_weights(labels, 4)
    close(weights, torch.tensor(expected, dtype=torch.float32))
    close(weights[torch.from_numpy(kept)].mean(), torch.tensor(1.0))


def test_class_weights_name_the_missing_class():
    with pytest.raises(ValueError, match="class 1 of 3 never occurs in 3 labels"):
        class_weights(torch.tensor([[0, 2], [2, IGNORE]]), 3)
    with pytest.raises(ValueError, match="class 0 of 2 never occurs in 0 labels"):
        class_weights([], 2)
    with pytest.raises(ValueError, match=r"labels\[1\] = 2 is not one of 2 classes"):
        class_weights([0, 2], 2)
    with pytest.raises(ValueError, match="is not one of 0 classes"):
        class_weights([0], 0)


# ---- errors ----


def test_errors_name_the_row_the_value_and_the_remedy():
    logits = torch.zeros(3, 4)
    labels = torch.tensor([0, 4, -1])
    for loss in (cross_entropy, focal_loss):
        with pytest.raises(
            ValueError, match=r"labels\[1\] = 4 is not one of 4 classes, 0 … 3; check num_labels"
        ):
            loss(logits, labels)
        with pytest.raises(
            ValueError, match=r"labels\[0, 1\] = -1 is not one of 4 classes.* -100 to leave it out"
        ):
            loss(torch.zeros(1, 2, 4), torch.tensor([[0, -1]]))
        with pytest.raises(TypeError, match=r"labels is torch\.float32.*cast with \.long\(\)"):
            loss(logits, labels.float())
        with pytest.raises(TypeError, match=r"labels is torch\.bool"):
            loss(logits, labels > 0)
        with pytest.raises(ValueError, match=r"labels has shape \(3, 1\) but logits .*\(3,\).*squeeze\(-1\)"):
            loss(logits, labels[:, None])
        with pytest.raises(TypeError, match=r"logits is torch\.int64.*before any argmax"):
            loss(logits.long(), labels)
        with pytest.raises(ValueError, match=r"logits has shape \(3, 0\)"):
            loss(torch.zeros(3, 0), labels)
    with pytest.raises(ValueError, match="labels = 7 is not one of 4 classes"):
        cross_entropy(logits[0], torch.tensor(7))


def test_errors_of_float_targets():
    logits = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"targets is torch\.int64.*cast with \.float\(\)"):
        binary_cross_entropy(logits, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets\[1, 2\] = 1\.5 is not in \[0, 1\]; use 0 for no"):
        binary_cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0], [1.0, IGNORE, 1.5]]))
    with pytest.raises(ValueError, match=r"targets\[0, 0\] = nan"):
        binary_cross_entropy(logits, torch.full((2, 3), math.nan))
    with pytest.raises(ValueError, match=r"targets has shape \(2,\) but logits \(2, 3\)"):
        binary_cross_entropy(logits, torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"targets has shape \(2,\) but predictions \(2, 1\); .*squeeze\(-1\)"
    ):
        mean_squared_error(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"targets\[1\] = nan is not a finite number; drop or fill the row"):
        mean_squared_error(torch.zeros(2), torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"targets\[0\] = -inf"):
        mean_squared_error(torch.zeros(1), torch.tensor([-math.inf]))


def test_errors_of_options():
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="reduction is 'avg'; choose"):
        cross_entropy(logits, labels, reduction="avg")
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        cross_entropy(logits, labels, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"weight has shape \(2,\) but the logits have 3 columns"):
        cross_entropy(logits, labels, weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"pos_weight has shape \(4,\)"):
        binary_cross_entropy(logits, torch.zeros(2, 3), pos_weight=torch.ones(4))
    for gamma in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"gamma is {gamma}"):
            focal_loss(logits, labels, gamma=gamma)


ANY_SHAPE = st.lists(st.integers(0, 3), max_size=3)
ANY_DTYPE = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)


@settings(max_examples=150, deadline=None)
@given(
    loss=st.sampled_from(
        [cross_entropy, focal_loss, binary_cross_entropy, mean_squared_error]
    ),
    shape=ANY_SHAPE,
    other=st.none() | ANY_SHAPE,
    logits_dtype=ANY_DTYPE,
    labels_dtype=ANY_DTYPE,
    value=st.sampled_from([0, 1, 2, 7, -1, IGNORE, math.nan, math.inf]),
)
def test_bad_input_gives_value_or_type_errors_only(loss, shape, other, logits_dtype, labels_dtype, value):
    logits = torch.ones(shape).to(logits_dtype)
    labels = torch.full(shape[:-1] if other is None else other, value, dtype=torch.float64)
    if labels_dtype in (torch.int64, torch.uint8, torch.bool):
        labels = labels.nan_to_num(0.0, 9.0)
    labels = (
        labels.to(torch.int64).to(labels_dtype) if labels_dtype == torch.uint8 else labels.to(labels_dtype)
    )
    try:
        result = loss(logits, labels)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 30  # says what to do, not just "bad"
    else:
        assert result.dtype == torch.float32 and result.shape == () and torch.isfinite(result)


def test_values_are_not_read_off_the_cpu():
    """On the meta device, which has no values, any read raises: so on a GPU no loss waits for the device."""
    logits = torch.empty(2, 3, device="meta", requires_grad=True)
    labels = torch.empty(2, dtype=torch.long, device="meta")
    targets = torch.empty(2, 3, device="meta")
    for reduction in REDUCTIONS:
        for loss in (
            cross_entropy(logits, labels, label_smoothing=0.1, reduction=reduction),
            focal_loss(logits, labels, reduction=reduction),
            binary_cross_entropy(logits, targets, reduction=reduction),
            mean_squared_error(logits, targets, reduction=reduction),
        ):
            assert loss.device.type == "meta"


def test_runs_alone_in_an_empty_folder(tmp_path, monkeypatch):
    """What the docstring promises to someone who copies the file: it needs torch and nothing of ours."""
    copied = shutil.copy(ftlib.methods.losses.__file__, tmp_path / "copied_losses.py")
    for name in ("ftlib", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would now raise
    spec = importlib.util.spec_from_file_location("copied_losses", copied)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    close(module.cross_entropy(torch.zeros(1, 2), torch.tensor([0])), torch.tensor(math.log(2)))
