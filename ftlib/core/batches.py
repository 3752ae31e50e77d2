"""From rows to batches: pad as late as possible, cut by size; and the checks of numbers that settings share.

A *row* is a dict: `input_ids` (no padding), other inputs with a value a token or a row, and `labels`: an int (class), a
float (regression), a list of floats (multi-label), an int a token (-100: none), or {task name: one of these}.

To copy: this file alone.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

IGNORE = -100  # the label PyTorch's and our losses skip
Row = dict[str, Any]
NOT_INPUTS = ("labels", "attention_mask", "word_starts", "masking", "begins")  # collate makes them, or leaves them out


def collate(
    rows: Sequence[Row], *, pad_token_id: int = 0, padding_side: str = "right", stack: dict[str, Callable] | None = None
) -> dict[str, Any]:
    """Pad rows to the longest among them.

    Returns `input_ids`, `attention_mask`: int64 (batch, tokens); `labels`: int64 (batch,) for classes, (batch, tokens)
    for tags, float32 (batch,) or (batch, k) for numbers.  For multi-task rows `labels` is {task: tensor (rows of the
    task, ...)} and `rows` {task: int64 (rows of the task,)}: their places.  Other columns are padded with 0 where each
    row has a value (or a list of them) a token, else stacked.
    stack: {task: (labels, lengths, padding side) -> tensor}; default: `stacked`, which goes by what the labels are.
    Raises ValueError for no rows, and for rows that do not go together.

    >>> collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])["attention_mask"]
    tensor([[1, 1, 1],
            [1, 0, 0]])
    """
    one_of("padding_side", padding_side, ("left", "right"))
    try:
        return _collate(rows, pad_token_id, padding_side, stack or {})
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"rows that do not go together ({type(error).__name__}: {error})") from error


def _collate(rows: Sequence[Row], fill: int, side: str, stack: dict[str, Callable]) -> dict[str, Any]:
    sizes = [len(row["input_ids"]) for row in rows]
    batch: dict[str, Any] = {"input_ids": padded([row["input_ids"] for row in rows], sizes, side, fill)}
    _, tokens = batch["input_ids"].shape
    masks = [np.broadcast_to(row.get("attention_mask", 1), n) for row, n in zip(rows, sizes, strict=True)]
    batch["attention_mask"] = padded(masks, sizes, side, 0)
    mixed = isinstance(rows[0].get("labels"), dict)
    for name in {name: 0 for row in rows for name in row} if mixed else rows[0]:
        if name not in batch and name not in NOT_INPUTS:
            having = [(row[name], n) for row, n in zip(rows, sizes, strict=True) if name in row or not mixed]
            a_token = all(np.ndim(v) and len(v) == n for v, n in having)
            none = np.zeros_like(having[0][0])  # for rows of another task, which don't have it
            values = [row.get(name, none[[0] * n] if a_token else none) for row, n in zip(rows, sizes, strict=True)]
            kind = np.float32 if np.result_type(*map(np.asarray, values)).kind == "f" else np.int64
            batch[name] = padded(values, sizes, side, 0, kind) if a_token else torch.from_numpy(np.array(values, kind))
            if side == "left" and name.endswith("_positions"):  # of tokens, which padding moves
                batch[name] += torch.tensor([tokens - n for n in sizes])[:, None]
    if mixed:
        batch["labels"], batch["rows"] = {}, {}
        for task in sorted({task for row in rows for task in row["labels"]}):
            own = [i for i, row in enumerate(rows) if task in row["labels"]]
            values, long = [rows[i]["labels"][task] for i in own], [*(sizes[i] for i in own), tokens]
            batch["labels"][task] = stack.get(task, stacked)(values, long, side)
            batch["rows"][task] = torch.tensor(own)
    elif rows[0].get("labels") is not None:
        batch["labels"] = stack.get("", stacked)([row["labels"] for row in rows], sizes, side)
    return batch


def padded(values: Sequence, sizes: Sequence, side: str = "right", fill: int = 0, kind: Any = np.int64) -> torch.Tensor:
    """Rows of numbers, or lists of them, under each other, (rows, the largest of sizes, …), filled up on one side."""
    out = np.full((len(values), max(sizes), *np.shape(values[0])[1:]), fill, dtype=kind)
    for row, value in zip(out, values, strict=True):
        row[slice(len(value)) if side == "right" else slice(len(row) - len(value), len(row))] = value
    return torch.from_numpy(out)


def stacked(values: list[Any], sizes: Sequence[int], side: str = "right") -> torch.Tensor:
    """Labels as one tensor: whole numbers int64, others float32, tags padded with -100."""
    sample = np.asarray(values[0])
    if sample.ndim and sample.dtype.kind != "f" and all(len(v) == n for v, n in zip(values, sizes, strict=False)):
        return padded(values, sizes, side, IGNORE)  # (rows, tokens)
    floats = sample.ndim or sample.dtype.kind == "f"
    return torch.as_tensor(np.array(values), dtype=torch.float32 if floats else torch.int64)  # (rows,) or (rows, k)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch (nested dicts) to a device, without waiting; what was moved keeps what it came from as `host`."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if not isinstance(batch, torch.Tensor) or batch.device == device:
        return batch
    host = batch.pin_memory() if device.type == "cuda" and batch.device.type == "cpu" else batch
    moved = host.to(device, non_blocking=True)
    moved.host = host
    return moved


def split_by_size(
    indices: Iterable[int], lengths: Sequence[int], *, batch_size: int | None = None, max_tokens: int | None = None,
    alike: bool = False,
) -> list[list[int]]:  # fmt: skip
    """Cut indices into batches of at most `batch_size` rows and at most `max_tokens` padded tokens, longest first.

    So padding is low, and memory trouble shows in the first batch.  alike: only rows of one length go together.
    Raises ValueError for a size that is no whole number of at least 1, and for a row longer than `max_tokens`.

    >>> split_by_size([0, 1, 2, 3], [5, 2, 4, 3], max_tokens=10)
    [[0, 2], [3, 1]]
    """
    whole("batch_size", 1 if batch_size is None else batch_size)
    whole("max_tokens", 1 if max_tokens is None else max_tokens)
    ordered = sorted(indices, key=lambda i: -lengths[i])  # stable: equal lengths keep their order
    if max_tokens is not None and ordered and (longest := lengths[ordered[0]]) > max_tokens:
        raise ValueError(f"row {ordered[0]} has {longest} tokens, over max_tokens={max_tokens}; raise it or cut it")
    out, width = [], 0  # tokens of the longest row in the batch being filled
    for i in ordered:
        full = not out or (batch_size is not None and len(out[-1]) >= batch_size) or (alike and lengths[i] < width)
        if full or (max_tokens is not None and width * (len(out[-1]) + 1) > max_tokens):
            out.append([])
            width = lengths[i]
        out[-1].append(i)
    return out


def number(name: str, value: Any, low: float, high: float = float("inf"), *, below: bool = False) -> float:
    """The value, a number from low to high (below: less than high); ValueError naming it for anything else."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not right or abs(value) > sys.float_info.max or (below and value == high):  # an int may exceed any float
        above = ", finite" if high == float("inf") else f" to {'below ' if below else ''}{high:g}"
        raise ValueError(f"{name}={value!r}: need a number from {low:g}{above}")
    return value


def whole(name: str, value: Any, low: int = 1) -> int:
    """The value, a whole number of at least `low`; ValueError naming it for anything else."""
    if type(value) is not int or value < low:
        raise ValueError(f"{name}={value!r}: need a whole number of at least {low}")
    if value >= 2**31:
        raise ValueError(f"{name} has {value.bit_length()} bits: need a whole number below 2**31")
    return value


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """The value, one of the choices; ValueError naming them for anything else."""
    choices = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, choices))}")
    return value


def refuse(*cases: tuple[Any, str], what: str = "") -> None:
    """ValueError for the first (wrong, why) that is wrong: `what`, and why."""
    if found := [why for wrong, why in cases if wrong]:
        raise ValueError(what + found[0])


def short(value: Any) -> str:
    """How a message shows a value: at most 60 signs of it."""
    return text if len(text := repr(value)) <= 60 else text[:57] + "..."
