"""What the steps of a run compute on: their rows in order, cut into micro-batches, smaller ones when memory runs out.

To copy this module you need: steps.py, rows.py, batching.py, distributed.py, multitask.py, balancing.py and torch.
"""

import gc
import hashlib
import math
import warnings
from array import array
from collections.abc import Iterator
from typing import Any

import torch

from ..inputs.tokenizing import IGNORE, collate, split_by_size, to_device
from ..methods.multitask import TaskSampler
from . import distributed

BUCKET = 16  # compile="reduce-overhead": tokens a row are rounded up to a multiple of this

# ------------------------------------------------------------------------------------------------ which rows


def plan(parts: dict[str, list[dict]], config: Any) -> Iterator[list[dict]]:
    """The rows of every step, without end; the same for the same seed.

    parts: {"": rows}, passed over epoch by epoch; or {task: rows}, mixed by a TaskSampler as config.task_sampler says.
    """
    if list(parts) == [""]:
        rows, epoch = parts[""], 0
        while True:
            order = _order(len(rows), config, epoch)
            for start in range(0, len(rows), config.batch_size):
                yield [rows[i] for i in order[start : start + config.batch_size]]
            epoch += 1
    sizes = {name: len(rows) for name, rows in parts.items()}
    epochs = config.epochs
    if config.max_steps:
        epochs = math.ceil(config.max_steps / math.ceil(sum(sizes.values()) / config.batch_size))
    sampler = TaskSampler(sizes, config.temperature, config.seed, how=config.task_sampler, epochs=epochs)
    streams = {name: _endless(rows, config, place) for place, (name, rows) in enumerate(parts.items())}
    while True:
        yield [next(streams[name]) for name in sampler.draw(config.batch_size)]


def _order(count: int, config: Any, epoch: int, stream: int = 0) -> list[int]:
    if not config.shuffle:
        return list(range(count))
    seed = (config.seed * 1_000_003 + stream * 10_007 + epoch) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _endless(rows: list[dict], config: Any, stream: int) -> Iterator[dict]:
    epoch = 0
    while True:
        yield from (rows[i] for i in _order(len(rows), config, epoch, stream))
        epoch += 1


def digest(parts: dict[str, list[dict]], eval_rows: list[dict]) -> str:
    """SHA-256 of all token ids, their types, and labels."""
    found = hashlib.sha256()
    for name, rows in [*parts.items(), ("eval", eval_rows)]:
        found.update(name.encode())
        for row in rows:
            found.update(array("q", row["input_ids"]).tobytes())
            found.update(repr(row["labels"]).encode())
            if any(kinds := row.get("token_type_ids") or ()):  # all zero is the same as none
                found.update(array("q", kinds).tobytes())
    return found.hexdigest()


def numbers(parts: dict[str, list[dict]], rows: list[dict]) -> list[int] | dict[str, list[int]]:
    """Where the rows of a step stand in the training dataset, in each of several: {name: numbers}."""
    own = {id(row) for row in rows}
    found = {name: [i for i, row in enumerate(part) if id(row) in own] for name, part in parts.items()}
    return found[""] if list(parts) == [""] else {name: places for name, places in found.items() if places}


def hopeless(history: list[dict], config: Any, total: int) -> str | None:
    """Why a run must end that has skipped its last `max_bad_steps` steps, or all `total`; None where it has not."""
    taken = [one for one in reversed(history) if "loss" in one]
    in_a_row = next((place for place, one in enumerate(taken) if "skipped" not in one), len(taken))
    if in_a_row < min(config.max_bad_steps, total):
        return None
    return (
        f"{_bad(taken[0])}, not finite in {in_a_row} steps in a row; the weights are those of the last good step. Look "
        f"for bad labels, or for numbers in the weights that are not finite; or begin anew, in another checkpoint_dir, "
        f"with a lower learning_rate ({config.learning_rate:g}) and with max_grad_norm"
    )


def warn_of(record: dict[str, Any]) -> None:
    """Say which rows were in a step that was skipped."""
    if distributed.rank() == 0:
        warnings.warn(f"{_bad(record)}; the step is skipped", stacklevel=6)


def _bad(record: dict[str, Any]) -> str:
    numbers = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
    return f"step {record['step']}: {numbers} on the rows {record['skipped']} of train_dataset"


def items(label: Any, kind: str) -> int:
    """Labelled items of one row, as `losses.count_labelled` counts them; -100 marks what is not labelled."""
    values = label if isinstance(label, (list, tuple)) else [label]
    return len(values) if kind == "regression" else sum(value != IGNORE for value in values)


def counts(rows: list[dict], tasks: dict[str, tuple[str, int]]) -> tuple[dict[str, int], dict[str, float]]:
    """{task: labelled items of the step}, and {task: its share of the rows}, 0 without labelled items."""
    found, shares = {}, {}
    for task, (kind, _) in tasks.items():
        own = [row["labels"][task] if task else row["labels"] for row in rows if not task or task in row["labels"]]
        found[task] = sum(items(label, kind) for label in own)
        shares[task] = len(own) / len(rows) if found[task] else 0.0
    return found, shares


# ------------------------------------------------------------------------------------------------ micro-batches


def cut(rows: list[dict], run: Any) -> list[tuple[list[dict], float]]:
    """This process's rows of a step in micro-batches of the size the run is at, [(rows, weight)].

    All processes get as many; one without rows for it computes others with weight 0.
    """
    world = distributed.world_size()
    return distributed.evened([_cut(rows[place::world], run) for place in range(world)])


def _cut(rows: list[dict], run: Any) -> list[list[dict]]:
    if run.config.task_gradients is None:
        return _cut_by_size(rows, run)
    alike: dict[tuple, list[dict]] = {}  # rows of the same tasks: no backward pass computes for rows of another task
    for row in rows:
        alike.setdefault(tuple(sorted(row["labels"])), []).append(row)
    return [part for group in alike.values() for part in _cut_by_size(group, run)]


def _cut_by_size(rows: list[dict], run: Any) -> list[list[dict]]:
    if not run.micro_batch_size and not run.max_tokens:
        return [rows] if rows else []
    lengths = [len(row["input_ids"]) for row in rows]
    sizes = dict(batch_size=run.micro_batch_size, max_tokens=run.max_tokens)
    return [[rows[i] for i in indices] for indices in split_by_size(range(len(rows)), lengths, **sizes)]


class Ahead:
    """The batches of a step, on the device; those of the next step are made while it computes this one.

    A GPU works on what was launched; between the last launch and the first look at a result Python is idle, so
    `make` is called there: no second thread, and the order of everything is as without it.  On a CPU the same work
    is only done a little earlier.
    """

    def __init__(self, run: Any, pad: int, device: torch.device, longest: int | None = None):
        self.run, self.pad, self.device = run, pad, device
        self.longest = longest  # given: round lengths up to BUCKET, to this at most
        self.ready: tuple[list[dict], tuple, list] | None = None  # rows, sizes, their (batch, weight)

    def make(self, rows: list[dict]) -> None:
        """Collate the micro-batches of a step, with their weights, and send them to the device, without waiting."""
        batches = []
        for part, weight in cut(rows, self.run):
            width = max(len(row["input_ids"]) for row in part)
            if self.longest:
                width = min(math.ceil(width / BUCKET) * BUCKET, self.longest)
            batches.append((to_device(collate(part, pad_token_id=self.pad, width=width), self.device), weight))
        self.ready = (rows, self._sizes(), batches)

    def take(self, rows: list[dict]) -> list[tuple[dict, float]]:
        """The batches of this step, made now if they are not there, or not of the size the run is at."""
        if self.ready is None or self.ready[0] is not rows or self.ready[1] != self._sizes():
            self.make(rows)
        (_, _, batches), self.ready = self.ready, None
        return batches

    def _sizes(self) -> tuple[int | None, int | None]:
        return self.run.micro_batch_size, self.run.max_tokens


# -------------------------------------------------------------------------------------------------- out of memory


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU a type of its own, on a CPU only words."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def halve(rows: list[dict], run: Any, longest: int) -> None:
    """Make the run's micro-batches half as large, and warn.

    longest: tokens of the longest row of the whole run, which a token budget must hold.
    Raises MemoryError where a micro-batch is one row, and for several processes, where one that computes in other
    portions than its neighbours would wait for them for ever.
    """
    parts = [part for part, _ in cut(rows, run)]
    count = max(map(len, parts))
    tokens = max(len(part) * max(len(row["input_ids"]) for row in part) for part in parts)
    if count == 1:
        raise MemoryError(
            f"out of memory with one row of {tokens} tokens at a time; try gradient_checkpointing=True, "
            "precision='bf16', ftlib.tune(model, 'lora'), a smaller max_length in tokenize, or a smaller model"
        )
    if distributed.world_size() > 1:
        raise MemoryError(
            f"process {distributed.rank()} is out of memory with {count} rows at a time; one process can't cut them "
            f"smaller on its own, so start again with micro_batch_size={count // 2}, or gradient_checkpointing=True"
        )
    if run.max_tokens and tokens // 2 >= longest:
        old, run.max_tokens, name = run.max_tokens, tokens // 2, "max_tokens"
    else:
        old, run.micro_batch_size, name = count, count // 2, "micro_batch_size"
    warnings.warn(f"out of memory: the step is done again with {name} {getattr(run, name)} instead of {old}, and so "
                  "are the steps after it", stacklevel=2)  # fmt: skip


def free(device: torch.device) -> None:
    """Give the memory of a failed pass back.  Call it after the `except` block, whose error holds on to it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
