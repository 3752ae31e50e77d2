"""Classes, several labels, numbers: one answer a text.  What a label may be, its loss, and what is made of logits.

Losses are summed over the labeled items (-100 is not labeled) by PyTorch's fused functions, in float32 where logits
come in half precision; the formulas to read are in methods/losses.py.  Labels were checked when the rows were.

To copy: this file and core/batches.py.
"""

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batches import IGNORE, short

_LARGEST = 3.4e38  # what fits into a float32


def plain(value: Any) -> Any:
    """Tensors and numpy values as Python's lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def text_of(value: Any, where: str) -> str:
    """The value, a text; TypeError or ValueError saying where for what is none, is empty or is no valid Unicode."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise TypeError(f"{where}: expected text, got {short(value)} ({kind}); fill it in or drop the row")
    if not value.strip():
        raise ValueError(f"{where}: the text is empty; fill it in or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode at character {error.start}; decode the file again") from None
    return value


def labeled(labels: Any) -> Any:
    """How many items are labeled, of an array or a tensor of any shape."""
    return (labels != IGNORE).sum()


def check_class(label: Any, num_labels: int, length: int, where: str) -> int:
    """A class number, or -100; ValueError or TypeError saying where, what and the remedy for anything else."""
    if isinstance(label, (list, tuple)):
        raise ValueError(f"{where}: a list of {len(label)} labels, but the model gives one label per text")
    return check_classes([label], num_labels, where)[0]


def check_classes(values: list, num_labels: int, where: str) -> list[int]:
    """Class numbers; also of the words of a text."""
    if set(map(type, values)) <= {int} and -1 < min(values, default=0) <= max(values, default=0) < num_labels:
        return values
    for value in map(plain, values):
        if isinstance(value, bool) or not isinstance(value, Integral):
            need = "cross-entropy needs whole numbers (int): cast the column, or load the model for task='regression'"
            raise TypeError(f"{where}: {short(value)} is no class number; {need}")
        if value != IGNORE and not 0 <= value < num_labels:
            remedy = f"give the model num_labels={value + 1}" if value >= num_labels else "count labels from 0"
            raise ValueError(f"{where}: label {value} is outside 0..{num_labels - 1}; {remedy} or mend the label")
    return [int(plain(value)) for value in values]


def check_labels(label: Any, num_labels: int, length: int, where: str) -> list[float]:
    """A list of 0, 1 or -100, one a label."""
    if not isinstance(label, (list, tuple)) or len(label) != num_labels:
        raise ValueError(f"{where}: {short(label)}; multi-label needs a list of {num_labels} values, each 0.0 or 1.0")
    values = [plain(value) for value in label]
    if bad := [value for value in values if value not in (0, 1, IGNORE)]:
        raise ValueError(f"{where}: {short(bad[0])} is neither 0, 1 nor {IGNORE} (ignored)")
    return [float(value) for value in values]


def check_numbers(label: Any, num_labels: int, length: int, where: str) -> float | list[float]:
    """A finite number, or as many as the model has outputs."""
    values = [plain(value) for value in (label if isinstance(label, (list, tuple)) else [label])]
    if len(values) != num_labels:
        raise ValueError(f"{where}: {len(values)} values for {num_labels} outputs")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{where}: {short(value)} is no number; regression needs a float")
        if not abs(value) < _LARGEST:
            raise ValueError(f"{where}: the value is {short(value)}; drop the row or fill it in")
    return [float(value) for value in values] if num_labels > 1 else float(values[0])


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy; logits (..., classes), labels int64 (...).  TypeError for labels that are floats."""
    if labels.is_floating_point():
        raise TypeError(f"labels is {labels.dtype}; cross-entropy needs whole class numbers: cast with .long()")
    logits, labels = _float(logits).reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over labels; logits and labels (batch, labels), 0 to 1 or -100."""
    logits, counts = _float(logits), labels != IGNORE  # (batch, labels)
    labels, weight = labels.to(logits.dtype).masked_fill(~counts, 0.0), counts.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels, weight=weight, reduction="sum")


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed; logits (batch, 1) or (batch,) with labels (batch,), or both (batch, k)."""
    logits = _float(logits)
    if logits.dim() == labels.dim() + 1 and logits.shape[-1] == 1:
        logits = logits[..., 0]  # (batch,)
    if logits.shape != labels.shape:  # would be spread out to n x n pairs
        raise ValueError(f"labels has shape {tuple(labels.shape)} but logits {tuple(logits.shape)}; they must be equal")
    return F.mse_loss(logits, labels.to(logits.dtype), reduction="sum")


def _float(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def divergence_of_classes(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """(KL(p‖q) + KL(q‖p)) / 2 of two predicted distributions, (..., classes), summed over labeled items, in nats."""
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    each = ((p.exp() - q.exp()) * (p - q)).sum(-1)  # KL(p‖q) + KL(q‖p)
    return each[labels != IGNORE].sum() / 2


def divergence_of_labels(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """The same for a Bernoulli distribution a label, (items, labels), summed over labels."""
    a, b = first.float(), second.float()
    each = (a.sigmoid() - b.sigmoid()) * (a - b)  # KL both ways: the logarithms of 1-p cancel
    return each[labels != IGNORE].sum() / 2
