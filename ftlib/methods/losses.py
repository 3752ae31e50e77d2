"""Losses by their formulas, in a form that never overflows.

For reading and for checking; training runs PyTorch's fused ones (`ftlib.tasks`), which give the same numbers.  Shared:
- a label equal to IGNORE (-100, as in PyTorch and Transformers) counts neither in the sum nor in the mean;
- the loss of half-precision logits is float32; a mean over nothing is 0 with zero gradients, not NaN;
- shapes and dtypes are always checked, values only on CPU: reading them on a GPU would wait for it at each step.
To copy: this file alone.
"""

import torch
from torch import Tensor

IGNORE = -100


def cross_entropy(
    logits: Tensor, labels: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0,
    ignore_index: int = IGNORE, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """-log softmax(logits)[label]: surprise at the right class, in nats; ln(classes) is chance.

    logits: float (…, classes); labels: int (…) in 0 … classes-1 or ignore_index; weight: float (classes,).
    label_smoothing ε in [0, 1] moves ε of the target from the label to all classes evenly.
    Returns float (…) for reduction "none", else a scalar. "mean" divides by the summed weights of the labels that
    count, as F.cross_entropy does, and by 1 where that is 0.
    Raises TypeError for float labels, ValueError for shapes, labels or options that don't fit.
    Source of smoothing: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> cross_entropy(logits, torch.tensor([0, 1]), reduction="none")  # ln(1 + e⁻²), ln 2
    tensor([0.1269, 0.6931])
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it is a share of the target, in [0, 1]")
    log_probs, log_p, weight, label_weight, counts = _prepare(logits, labels, weight, ignore_index)
    loss = -label_weight * log_p  # (…)
    if label_smoothing > 0.0:
        evenly = -(weight * log_probs).mean(dim=-1) * counts  # (…)
        loss = (1 - label_smoothing) * loss + label_smoothing * evenly
    return _reduce(loss, label_weight, counts, reduction)


def focal_loss(
    logits: Tensor, labels: Tensor, *, gamma: float = 2.0, weight: Tensor | None = None,
    ignore_index: int = IGNORE, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """-(1 - p)^γ log p, with p the probability of the right class: easy examples fade, hard ones are heard.

    Inputs, reductions and errors as in `cross_entropy`, which it equals at gamma 0; gamma is 0 or more.
    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equations 4 and 5 (α is `weight`).

    >>> logits = torch.tensor([[0.0, 0.0]])
    >>> focal_loss(logits, torch.tensor([0]), gamma=2.0)  # (1 - 1/2)² ln 2
    tensor(0.1733)
    """
    if not gamma >= 0.0:
        raise ValueError(f"gamma is {gamma}; it is 0 (plain cross-entropy) or more")
    _, log_p, _, label_weight, counts = _prepare(logits, labels, weight, ignore_index)
    # 1 - p = -expm1(log p) keeps its digits when p is near 1; the clamp keeps slopes finite at p = 1.
    doubt = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)  # (…)
    return _reduce(-label_weight * doubt**gamma * log_p, label_weight, counts, reduction)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, *, pos_weight: Tensor | None = None,
    ignore_index: int = IGNORE, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """-[y log σ(z) + (1 - y) log(1 - σ(z))]: a yes-or-no question per logit; several may hold.

    logits: float (…, labels); targets: float of the same shape, in [0, 1] or ignore_index; pos_weight: float
    (labels,), how much a "yes" counts against a "no". Returns (…, labels) for "none", else a scalar; "mean" is over
    entries. log(sigmoid(z)) in float32 is -inf from about z = -89 down; logaddexp does not overflow.
    Raises TypeError for integer targets, ValueError for shapes or targets that don't fit.

    >>> binary_cross_entropy(torch.tensor([0.0, 10000.0]), torch.tensor([1.0, 0.0]), reduction="none")
    tensor([6.9315e-01, 1.0000e+04])
    """
    logits = _checked_logits(logits)
    if not targets.is_floating_point():
        raise TypeError(f"targets is {targets.dtype}; multi-label targets are 0.0 to 1.0: cast with .float()")
    _check_same_shape("targets", targets, "logits", logits)
    counts = targets != ignore_index  # (…, labels)
    remedy = f"is not in [0, 1]; use 0 for no, 1 for yes, {ignore_index} for unknown"
    _refuse("targets", targets, counts & ~((targets >= 0) & (targets <= 1)), remedy)
    y = targets.to(logits.dtype).masked_fill(~counts, 0.0)  # (…, labels)
    zero = torch.zeros_like(logits)
    minus_log_yes = torch.logaddexp(zero, -logits)  # -log σ(z) = log(e⁰ + e^-z), (…, labels)
    minus_log_no = torch.logaddexp(zero, logits)  # -log(1 - σ(z)) = log(e⁰ + e^z), (…, labels)
    if pos_weight is not None:
        minus_log_yes = _checked_weight("pos_weight", pos_weight, logits) * minus_log_yes
    loss = (y * minus_log_yes + (1 - y) * minus_log_no) * counts  # (…, labels)
    return _reduce(loss, counts, counts, reduction)


def mean_squared_error(predictions: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """(prediction - target)², in the square of the target's unit.

    predictions: float, any shape; targets: numbers of the same shape: (n, 1) against (n,) would broadcast to n × n
    pairs, a famous silent bug. Returns that shape for "none", else a scalar.
    Raises ValueError for a shape that differs or for a target that is NaN or infinite, naming the row.
    """
    predictions = _checked_logits(predictions, "predictions", classes=False)
    _check_same_shape("targets", targets, "predictions", predictions)
    _refuse("targets", targets, ~torch.isfinite(targets), "is not a finite number; drop or fill the row")
    loss = (predictions - targets.to(predictions.dtype)).square()  # as predictions
    everything = torch.ones_like(loss, dtype=torch.bool)
    return _reduce(loss, everything, everything, reduction)


def class_weights(labels, num_classes: int) -> Tensor:
    """Weights that make all classes count equally: n / (num_classes · count), for `weight=` of the losses.

    labels: int tensor or list, any shape; IGNORE is left out. Returns float32 (num_classes,), mean 1 over the labels,
    as scikit-learn's class_weight="balanced". Raises ValueError naming a class that never occurs.

    >>> class_weights([0, 0, 0, 1], num_classes=2)
    tensor([0.6667, 2.0000])
    """
    labels = torch.as_tensor(labels).flatten()  # (n,)
    labels = _whole_labels(labels.long() if labels.numel() == 0 else labels, num_classes, IGNORE)
    labels = labels[labels != IGNORE]  # (labeled,)
    counts = labels.bincount(minlength=num_classes)  # (num_classes,)
    if len(missing := (counts == 0).nonzero()):
        raise ValueError(f"class {int(missing[0])} of {num_classes} never occurs in {labels.numel()} labels; add one")
    return labels.numel() / (num_classes * counts.float())  # (num_classes,)


def _prepare(logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int):
    """Checks, then log softmax: log p_k = (z_k - m) - log Σⱼ exp(z_j - m).

    exp(1e4) is infinite; taking m = max z off every logit changes no probability and leaves exponents of at most 0.
    Returns log p (…, classes), the label's (…), weights (classes,), the label's (…), and where there is one, bool (…).
    """
    logits = _checked_logits(logits)
    _check_same_shape("labels", labels, "logits without its last dimension", logits[..., 0])
    labels = _whole_labels(labels, logits.shape[-1], ignore_index)
    counts = labels != ignore_index  # (…), True where labeled
    labels = labels.masked_fill(~counts, 0)  # (…), any valid class
    shifted = logits - logits.amax(dim=-1, keepdim=True).detach()  # (…, classes), at most 0
    log_probs = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()  # (…, classes)
    weight = _checked_weight("weight", logits.new_ones(()) if weight is None else weight, logits)
    return log_probs, log_probs.gather(-1, labels[..., None])[..., 0], weight, weight[labels] * counts, counts


def _reduce(loss: Tensor, weights: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """loss, weights, counts: one shape; entries with counts False are dropped even if infinite or NaN."""
    loss = torch.where(counts, loss, 0.0)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}; choose "mean", "sum" or "none"')
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    total = weights.sum(dtype=loss.dtype)
    return loss.sum() / torch.where(total == 0, 1.0, total)  # not `if`: no wait for the device


def _checked_logits(logits: Tensor, name: str = "logits", classes: bool = True) -> Tensor:
    if not logits.is_floating_point():
        raise TypeError(f"{name} is {logits.dtype}; the model's float outputs are needed, before any argmax")
    if classes and (logits.dim() == 0 or logits.shape[-1] == 0):
        raise ValueError(f"{name} has shape {tuple(logits.shape)}; the last one must hold the classes")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _whole_labels(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels is {labels.dtype}; cross-entropy needs whole class numbers: cast with .long()")
    labels = labels.long()  # before comparing: -100 would wrap round to 156 in uint8
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    remedy = f"check num_labels and the label column, or use {ignore_index} to leave it out"
    _refuse("labels", labels, bad, f"is not one of {classes} classes, 0 … {classes - 1}; {remedy}")
    return labels


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        shapes = f"{name} has shape {tuple(tensor.shape)} but {other_name} {tuple(other.shape)}"
        raise ValueError(f"{shapes}; they must be equal (a stray dimension of 1 goes away with .squeeze(-1))")


def _checked_weight(name: str, weight: Tensor, logits: Tensor) -> Tensor:
    columns = logits.shape[-1]
    if weight.dim() > 1 or (weight.dim() == 1 and len(weight) != columns):
        raise ValueError(f"{name} has shape {tuple(weight.shape)} but the logits have {columns} columns, one each")
    return weight.to(logits).expand(columns)  # device and dtype too


def _refuse(name: str, values: Tensor, bad: Tensor, why: str) -> None:
    """Raise ValueError for the first entry where `bad` holds, with its place and value; on CPU alone."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and bad.any():
        place = bad.nonzero()[0].tolist()  # one index per dimension
        raise ValueError(f"{name}{place or ''} = {values[tuple(place)].item():g} {why}")
