"""Which rows a step computes on: epochs in a new order each, several datasets mixed, streams shuffled in a buffer.

All of it follows from a seed: a run that goes on walks the plan to where it stopped.

To copy: this file and core/batches.py.
Source: temperature sampling: Raffel et al. 2020 (T5, arXiv:1910.10683), 3.5.2; annealed sampling: Stickland & Murray
2019 (arXiv:1902.02671), 3.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from .batches import number, one_of, whole

SAMPLERS = ("temperature", "uniform", "annealed", "remaining")
Place = tuple[str, Any]  # a dataset's name ("" where there is one), and the row's number in it; of a stream the row


def plan(sizes: dict[str, int], config: Any) -> Iterator[list[Place]]:
    """The rows of every step, [(dataset, number)], without end; the same for the same seed.

    sizes: {"": rows}, passed over epoch by epoch; or {task: rows}, mixed by a TaskSampler as config.task_sampler says.
    """
    if list(sizes) == [""]:
        epoch = 0
        while True:
            order = _order(sizes[""], config, epoch)
            for start in range(0, len(order), config.batch_size):
                yield [("", int(i)) for i in order[start : start + config.batch_size]]
            epoch += 1
    epochs = config.epochs
    if config.max_steps:
        epochs = math.ceil(config.max_steps / math.ceil(sum(sizes.values()) / config.batch_size))
    sampler = TaskSampler(sizes, config.temperature, config.seed, how=config.task_sampler, epochs=epochs)
    streams = {name: _endless(size, config, place) for place, (name, size) in enumerate(sizes.items())}
    while True:
        yield [(name, next(streams[name])) for name in sampler.draw(config.batch_size)]


def stream_plan(rows: Iterable[Any], config: Any) -> Iterator[list[Place]]:
    """The rows of every step from a stream, [("", row)]; again from its start where it ends, if it has a new start.

    A buffer of config.shuffle_buffer rows is kept full, and every row is drawn from it at random.
    """
    generator = torch.Generator().manual_seed(config.seed % 2**63)
    size = config.shuffle_buffer if config.shuffle else 1
    epoch, buffer, step = 0, [], []
    while True:
        source, came = iter(rows), 0
        for row in source:
            came += 1
            buffer.append(row)
            if len(buffer) >= size:
                step.append(("", _drawn(buffer, generator)))
            if len(step) == config.batch_size:
                yield step
                step = []
        epoch += 1
        if source is rows or not came:  # a generator, or nothing more
            break
    while buffer:
        step.append(("", _drawn(buffer, generator)))
        if len(step) == config.batch_size or not buffer:
            yield step
            step = []


def _drawn(buffer: list, generator: torch.Generator) -> Any:
    place = int(torch.randint(len(buffer), (), generator=generator)) if len(buffer) > 1 else 0
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _order(count: int, config: Any, epoch: int, stream: int = 0) -> Any:
    if not config.shuffle:
        return range(count)
    seed = (config.seed * 1_000_003 + stream * 10_007 + epoch) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


def _endless(count: int, config: Any, stream: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from map(int, _order(count, config, epoch, stream))
        epoch += 1


class TaskSampler:
    """Draw the task of every example, from {task: number of examples}; an epoch is as many draws as examples.

    - "temperature": with probability proportional to size ** (1 / temperature).  1 is proportional to the sizes, a
      large one approaches uniform: small tasks are seen more often, and large ones less.
    - "uniform": every task alike.
    - "annealed": proportional to size ** a, with a falling evenly from 1 in the first of `epochs` to 0.2 in the last.
    - "remaining": proportional to the examples that remain of the epoch, so every example comes once an epoch.
    The same seed draws the same tasks.

    >>> TaskSampler({"big": 9000, "small": 1000}, temperature=2).probabilities
    {'big': 0.75, 'small': 0.25}
    """

    def __init__(
        self, sizes: dict[str, int], temperature: float = 1.0, seed: int = 0, *,
        how: str = "temperature", epochs: int = 1,
    ):  # fmt: skip
        if not sizes:
            raise ValueError("sizes is empty; pass {task name: number of examples}")
        for name, size in sizes.items():
            whole(f"examples of the task {name!r}", size)
        number("temperature", temperature, 1e-6)
        one_of("sampler", how, SAMPLERS)
        whole("epochs", epochs)
        self.sizes, self.temperature, self.how, self.epochs = dict(sizes), temperature, how, epochs
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0
        self.order: list[str] = []  # "remaining": the tasks of what is left of the epoch

    @property
    def probabilities(self) -> dict[str, float]:
        """{task: its probability in the next draw}."""
        if self.how == "remaining":
            left = self.order or list(self._repeated())
            return {name: left.count(name) / len(left) for name in self.sizes}
        power = 1 / self.temperature
        if self.how == "uniform":
            power = 0.0
        elif self.how == "annealed" and self.epochs > 1:
            epoch = min(self.drawn // sum(self.sizes.values()), self.epochs - 1)  # from 0
            power = 1 - 0.8 * epoch / (self.epochs - 1)
        largest = max(self.sizes.values())  # shares of it, so that no power overflows
        weights = {name: (size / largest) ** power for name, size in self.sizes.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def draw(self, count: int) -> list[str]:
        """The tasks of the next `count` examples."""
        if self.how == "remaining":
            while len(self.order) < count:
                names = list(self._repeated())
                self.order += [names[i] for i in torch.randperm(len(names), generator=self.generator).tolist()]
            drawn, self.order = self.order[:count], self.order[count:]
            return drawn
        probabilities = self.probabilities
        names = list(probabilities)
        weights = torch.tensor(list(probabilities.values()), dtype=torch.float64)
        self.drawn += count
        drawn = torch.multinomial(weights, count, replacement=True, generator=self.generator)  # (count,)
        return [names[i] for i in drawn.tolist()]

    def _repeated(self) -> Iterator[str]:
        return chain.from_iterable([name] * size for name, size in self.sizes.items())
