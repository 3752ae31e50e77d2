"""What the steps of a run compute on: their rows in order, cut into micro-batches, on the device, one step ahead."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..core.batches import Row, collate, split_by_size, to_device
from ..core.sampling import Place, plan, stream_plan
from ..inputs.agreement import Padding
from ..inputs.rows import Rows, Stream, take
from ..methods.multitask import TaskSampler
from ..tasks.task import TASKS
from . import distributed


def best_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows packed into batches of at most `most` tokens, each where it leaves the least room: best fit decreasing.

    >>> best_fit([5, 3, 4, 2], most=7)
    [[0, 3], [2, 1]]
    """
    out, room = [], []  # room: tokens that still go into each batch
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = min((k for k, left in enumerate(room) if left >= lengths[i]), key=room.__getitem__, default=len(out))
        if place == len(out):
            out.append([])
            room.append(most)
        out[place].append(i)
        room[place] -= lengths[i]
    return out


class Step(list):
    """The micro-batches of one optimizer step (this process's), with the rows of all processes that they are cut from.

    weights: of each micro-batch, 0.0 for one that only takes part.  items: {task: labeled items of the whole step}.
    shares: {task: its share of the rows}, 0 without labeled items.
    """

    def __init__(self, feed: "Feed", number: int, places: list[Place]):
        super().__init__()
        self.feed, self.number, self.places = feed, number, places
        self.rows = feed.as_read(take(feed.parts, places), number, places)
        self.items, self.shares, labels = {}, {}, [row["labels"] for row in self.rows]
        for task, (kind, _) in feed.tasks.items():
            own = [label[task] for label in labels if task in label] if task else labels
            self.items[task] = sum(int(TASKS[kind].items(np.asarray(label))) for label in own)
            self.shares[task] = len(own) / len(self.rows) if self.items[task] else 0.0
        self.cut()

    def cut(self) -> None:
        """Make the micro-batches, of the size the run is at, and send them to the device, without waiting."""
        self.sizes = self.feed.sizes()
        world = distributed.world_size()
        parts = distributed.evened([self.feed.cut(self.rows[place::world]) for place in range(world)])
        self.weights = [weight for _, weight in parts]
        options = {"pad_token_id": self.feed.pad.id, "padding_side": self.feed.pad.side, "stack": self.feed.stack}
        self[:] = [to_device(collate(part, **options), self.feed.device) for part, _ in parts]

    def halve(self) -> None:
        """Make the run's micro-batches half as large, and warn; MemoryError for one row, and for several processes."""
        run = self.feed.run
        count = max(len(batch["input_ids"]) for batch in self)
        each = [batch["attention_mask"] if self.feed.packed else batch["input_ids"] for batch in self]
        tokens = max(int(one.sum()) if self.feed.packed else one.numel() for one in each)
        less = "ftlib.tune(model, 'lora'), a smaller max_length in tokenize, or a smaller model"
        if count == 1:
            remedy = f"try gradient_checkpointing=True, precision='bf16', {less}"
            raise MemoryError(f"out of memory with one row of {tokens} tokens at a time; {remedy}")
        if distributed.world_size() > 1:
            # one that computes in other portions than its neighbors would wait for them for ever
            who = f"process {distributed.rank()} is out of memory with {count} rows at a time; one can't cut them alone"
            raise MemoryError(f"{who}: begin with micro_batch_size={count // 2}, or gradient_checkpointing=True")
        rows = not run.max_tokens or tokens // 2 < self.feed.longest
        name, size = ("micro_batch_size", count) if rows else ("max_tokens", tokens)
        setattr(run, name, size // 2)
        said = f"out of memory: the step is done again with {name} {size // 2} instead of {size}"
        warnings.warn(f"{said}, and so are the steps after it", stacklevel=3)

    def row_numbers(self) -> list[int] | dict[str, list[int]]:
        """Where the rows stand in the training dataset, in each of several: {name: numbers}; -1 in a stream."""
        found: dict[str, list[int]] = {}
        for name, place in sorted((name, place if isinstance(place, int) else -1) for name, place in self.places):
            found.setdefault(name, []).append(place)
        return found.get("", found)


class Feed:
    """The steps of a run, one after the other, for `core.loop.steps`; `first`: how many of them an earlier run took.

    While a GPU works on what was launched Python is idle, so `ahead` makes the next step's batches there: no second
    thread, and the order of everything is as without it.
    """

    def __init__(self, parts: dict, tasks: dict, run: Any, pad: Padding, device: torch.device, packed: bool = False):
        self.parts, self.tasks, self.run, self.pad, self.device, self.packed = parts, tasks, run, pad, device, packed
        self.stack = {task: TASKS[kind].stack for task, (kind, _) in tasks.items()}
        self.streams = isinstance(parts.get(""), Stream)
        self.rows = {} if self.streams else {name: len(rows) for name, rows in parts.items()}
        self.longest = max((int(parts[name].lengths.max()) for name in self.rows), default=0)
        if run.config.max_tokens and self.longest > run.config.max_tokens:
            raise ValueError(f"max_tokens={run.config.max_tokens}: the longest training row has {self.longest} tokens")

    def start(self, first: int, total: int, places: Iterator[list[Place]] | None = None) -> None:
        """Walk to step `first` (0-based): the order is a function of the seed; places: each step's, if given."""
        config = self.run.config
        if places is None and not self.streams:
            places = plan(self.rows, config, None if "" in self.parts else TaskSampler.of(self.rows, config).draw)
        self.plan = stream_plan(self.parts[""], config) if places is None else places
        self.number, self.total, self.ready, self.drawn, self.late = first, total, None, None, None
        if any(next(self.plan, None) is None for _ in range(first)):
            raise ValueError(f"train_dataset ends before step {first}, which a checkpoint has; pass it from its start")

    def __iter__(self) -> Iterator[Step]:
        while (step := self._next() if self.ready is None else self.ready) is not None:
            self.ready = None
            if step.sizes != self.sizes():  # made before memory ran out
                step.cut()
            self.number += 1
            self.step = step  # that is being taken
            yield step

    def as_read(self, rows: list[Row], number: int, places: list[Place]) -> list[Row]:
        """The rows of step `number` as the model reads them: new ones in every epoch, by seed, epoch and row."""
        for draw in {TASKS[kind].draw for kind, _ in self.tasks.values()} - {None}:
            seed, (size, *_) = self.run.config.seed % 2**63, (*self.rows.values(), 0)
            epoch = number // -(-size // self.run.config.batch_size) if size else number  # of a stream the step
            keys = [(seed, epoch, place if size else i) for i, (_, place) in enumerate(places)]
            rows = draw(rows, keys)
        return rows

    def ahead(self) -> None:
        """Make the next step, if there is one; what goes wrong is for that step: this one is to be finished first."""
        try:
            self.ready = self._next()
        except Exception as error:
            self.late = None if self.drawn else error  # with its rows drawn it is tried again

    def _next(self) -> Step | None:
        if self.late:
            raise self.late
        if self.drawn is None and self.number < self.total:
            self.drawn = next(self.plan, None)
        step = None if self.drawn is None else Step(self, self.number, self.drawn)  # one without rows is one
        self.drawn = None
        return step

    def sizes(self) -> tuple[int | None, int | None]:
        return self.run.micro_batch_size, self.run.max_tokens

    def cut(self, rows: list[Row]) -> list[list[Row]]:
        """Rows in micro-batches; with task_gradients only rows of the same tasks together."""
        alike: dict[tuple, list[Row]] = {}  # so no backward pass computes for rows of another task
        for row in rows:
            tasks = () if self.run.config.task_gradients is None else tuple(sorted(row["labels"]))
            alike.setdefault(tasks, []).append(row)
        (batch_size, max_tokens), out = self.sizes(), []
        if not batch_size and not max_tokens and not self.pad.alike:
            return list(alike.values())  # in the order they came
        for group in alike.values():
            lengths = [len(row["input_ids"]) for row in group]
            if max_tokens and self.packed:
                cuts = best_fit(lengths, max_tokens)
            else:
                sizes = dict(batch_size=batch_size, max_tokens=max_tokens, alike=self.pad.alike)
                cuts = split_by_size(range(len(group)), lengths, **sizes)
            out += [[group[i] for i in cut] for cut in cuts]
        return out

    def digest(self, others: list[Rows]) -> str:
        """SHA-256 of all token ids, further inputs, and labels; a stream has none."""
        found = hashlib.sha256()
        for name, part in [] if self.streams else [*self.parts.items(), *(("eval", rows) for rows in others)]:
            found.update(name.encode())
            for row in part:
                inputs = {k: v for k, v in row.items() if k not in ("labels", "word_starts") and np.any(v)}
                for key, value in sorted(inputs.items()):  # all zero is the same as none
                    found.update(key.encode() + np.asarray(value, dtype=np.float64).tobytes())
                found.update(repr(row["labels"]).encode())
        return found.hexdigest()
