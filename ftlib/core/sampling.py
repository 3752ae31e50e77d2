"""Which rows a step computes on: epochs in a new order each, several datasets mixed, streams shuffled in a buffer.

All of it follows from a seed: a run that goes on walks the plan to where it stopped.

To copy: this file and core/batches.py.
Source: temperature sampling: Raffel et al. 2020 (T5, arXiv:1910.10683), 3.5.2; annealed sampling: Stickland & Murray
2019 (arXiv:1902.02671), 3.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .batches import number, one_of, whole

SAMPLERS = ("temperature", "uniform", "annealed", "remaining")
Place = tuple[str, Any]  # a dataset's name ("" where there is one), and the row's number in it; of a stream the row


def plan(sizes: dict[str, int], config: Any) -> Iterator[list[Place]]:
    """The rows of every step, [(dataset, number)], without end; the same for the same seed.

    sizes: {"": rows}, passed over epoch by epoch; or {task: rows}, mixed by a TaskSampler as config.task_sampler says.
    """
    orders = {name: _orders(size, config, place) for place, (name, size) in enumerate(sizes.items())}
    if list(sizes) == [""]:
        for order in orders[""]:
            for start in range(0, len(order), config.batch_size):
                yield [("", int(i)) for i in order[start : start + config.batch_size]]
    epochs = config.epochs
    if config.max_steps:
        epochs = math.ceil(config.max_steps / math.ceil(sum(sizes.values()) / config.batch_size))
    sampler = TaskSampler(sizes, config.temperature, config.seed, how=config.task_sampler, epochs=epochs)
    endless = {name: (int(i) for order in own for i in order) for name, own in orders.items()}
    while True:
        yield [(name, next(endless[name])) for name in sampler.draw(config.batch_size)]


def _orders(count: int, config: Any, stream: int) -> Iterator[Any]:
    """The rows' order in every epoch."""
    epoch = stream * 10_007
    while True:
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % 2**63)
        yield torch.randperm(count, generator=generator).numpy() if config.shuffle else range(count)
        epoch += 1


def stream_plan(rows: Iterable[Any], config: Any) -> Iterator[list[Place]]:
    """The rows of every step from a stream, [("", row)]; again from its start where it ends, if it has a new start."""
    generator = torch.Generator().manual_seed(config.seed % 2**63)
    size = config.shuffle_buffer if config.shuffle else 1
    step: list[Place] = []
    for row in _buffered(_repeated(rows), size, generator):
        step.append(("", row))
        if len(step) == config.batch_size:
            yield step
            step = []
    if step:
        yield step


def _repeated(rows: Iterable[Any]) -> Iterator[Any]:
    came = True
    while came:
        source, came = iter(rows), False
        for row in source:
            yield row
            came = source is not rows  # a generator has no new start


def _buffered(rows: Iterator[Any], size: int, generator: torch.Generator) -> Iterator[Any]:
    """Every row drawn at random from `size` of them that are held."""
    held: list[Any] = []
    for row in rows:
        held.append(row)
        if len(held) >= size:
            yield held.pop(int(torch.randint(len(held), (), generator=generator)) if size > 1 else 0)
    while held:
        yield held.pop(int(torch.randint(len(held), (), generator=generator)))


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
        self.sizes, self.temperature, self.how, self.epochs = dict(sizes), temperature, how, whole("epochs", epochs)
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0
        self.order: list[str] = []  # "remaining": the tasks of what is left of the epoch

    @property
    def probabilities(self) -> dict[str, float]:
        """{task: its probability in the next draw}."""
        power = {"temperature": 1 / self.temperature, "uniform": 0.0}.get(self.how, 1.0)
        if self.how == "annealed" and self.epochs > 1:
            epoch = min(self.drawn // sum(self.sizes.values()), self.epochs - 1)  # from 0
            power = 1 - 0.8 * epoch / (self.epochs - 1)
        left = Counter(self.order) if self.order else self.sizes
        largest = max(left.values())  # shares of it, so that no power overflows
        weights = {name: (left[name] / largest) ** power for name in self.sizes}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def draw(self, count: int) -> list[str]:
        """The tasks of the next `count` examples."""
        if self.how == "remaining":
            names = [name for name, size in self.sizes.items() for _ in range(size)]
            while len(self.order) < count:
                self.order += [names[i] for i in torch.randperm(len(names), generator=self.generator).tolist()]
            drawn, self.order = self.order[:count], self.order[count:]
            return drawn
        names, weights = zip(*self.probabilities.items(), strict=True)
        self.drawn += count
        weights = torch.tensor(weights, dtype=torch.float64)
        drawn = torch.multinomial(weights, count, replacement=True, generator=self.generator)  # (count,)
        return [names[i] for i in drawn.tolist()]
