"""Which rows a step computes on: epochs, mixed datasets, streams in a buffer.  To copy: this file alone."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import torch

Place = tuple[str, Any]  # a dataset's name ("" where there is one), and the row's number in it; of a stream the row


def plan(sizes: dict[str, int], config: Any, draw: Callable[[int], list[str]] | None = None) -> Iterator[list[Place]]:
    """The rows of every step, [(dataset, number)], without end: of {"": rows} by epochs, of {task: rows} by `draw`."""
    orders = {name: _orders(size, config, place) for place, (name, size) in enumerate(sizes.items())}
    if draw is None:
        for order in orders[""]:
            for start in range(0, len(order), config.batch_size):
                yield [("", int(i)) for i in order[start : start + config.batch_size]]
    endless = {name: (int(i) for order in own for i in order) for name, own in orders.items()}
    while True:
        yield [(name, next(endless[name])) for name in draw(config.batch_size)]


def _orders(size: int, config: Any, stream: int) -> Iterator[Any]:
    for epoch in count(stream * 10_007):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % 2**63)
        yield torch.randperm(size, generator=generator).numpy() if config.shuffle else range(size)


def stream_plan(rows: Iterable[Any], config: Any) -> Iterator[list[Place]]:
    """The rows of every step from a stream, [("", row)]; again from its start where it ends, if it has a new start."""
    generator = torch.Generator().manual_seed(config.seed % 2**63)
    drawn = _buffered(rows, config.shuffle_buffer if config.shuffle else 1, generator)
    while step := [("", row) for row in islice(drawn, config.batch_size)]:
        yield step


def _buffered(rows: Iterable[Any], size: int, generator: torch.Generator) -> Iterator[Any]:
    """Every row drawn at random from `size` of them that are held."""
    held, again = [], True
    while again:
        source, again = iter(rows), False
        for row in source:
            held.append(row)
            again = source is not rows  # a generator has no new start
            if len(held) >= size:
                yield held.pop(int(torch.randint(len(held), (), generator=generator)) if size > 1 else 0)
    while held:
        yield held.pop(int(torch.randint(len(held), (), generator=generator)))
