"""A few labels: episodes, prototypes, pairs as SetFit makes them, inner loops as gradients, what to label next.

To copy: this file, core/{batches,loop}.py, numpy and torch.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.batches import number, one_of, refuse, whole
from ..core.loop import Gradient, summed

STRATEGIES = ("oversampling", "undersampling", "unique")
DISTANCES = ("euclidean", "cosine")


def episodes(
    labels: Sequence[int], *, ways: int, shots: int, queries: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Small tasks of `ways` classes without end: rows to learn from, (ways, shots), and to be asked, (ways, queries).

    No row is in both; the n-th line has rows of one class, which is class n in this episode.
    Raises ValueError for fewer classes than `ways`, and for a class with fewer rows than shots + queries.
    Source: Vinyals et al. 2016 (matching networks, arXiv:1606.04080), section 2.2.

    >>> support, query = next(episodes([0, 0, 1, 1], ways=2, shots=1, queries=1))
    >>> support.shape, sorted([*support.flatten(), *query.flatten()]) == [0, 1, 2, 3]
    ((2, 1), True)
    """
    for name, value, low in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
        whole(name, value, low)
    values, rng, need = np.asarray(labels), np.random.default_rng(seed), shots + queries
    rows = {name: np.flatnonzero(values == name) for name in np.unique(values).tolist()}
    refuse(
        (len(rows) < ways, f"ways={ways}: there are {len(rows)} classes"),
        *((len(own) < need, f"class {name!r} has {len(own)} rows, an episode takes {need}; take fewer, or leave it out")
          for name, own in rows.items()),
    )  # fmt: skip

    def draw() -> tuple[np.ndarray, np.ndarray]:
        classes = rng.permutation([*rows])[:ways].tolist()
        drawn = np.stack([rng.permutation(rows[name])[:need] for name in classes])  # (ways, need)
        return drawn[:, :shots], drawn[:, shots:]

    return (draw() for _ in count())


def prototypes(vectors: Tensor, labels: Tensor) -> Tensor:
    """The mean vector of each class: float (classes, hidden) of (rows, hidden) and int64 (rows,), classes from 0.

    Raises ValueError for a class below the largest without a row.
    """
    counts = torch.bincount(labels)
    refuse((bool((counts == 0).any()), f"class {int(counts.argmin())} has no row, so it has no prototype"))
    return vectors.new_zeros(len(counts), vectors.shape[1]).index_add(0, labels, vectors) / counts[:, None]


def prototype_logits(vectors: Tensor, means: Tensor, distance: str = "euclidean", scale: float = 1.0) -> Tensor:
    """Scores (rows, classes) of vectors (rows, hidden): minus the squared distance to each mean, or the cosine.

    Their argmax is the prediction, their cross-entropy the loss; scale multiplies them: a cosine wants 10 or more.
    Source: Snell et al. 2017 (prototypical networks, arXiv:1703.05175), equations 1 and 2.

    >>> prototype_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([[-4., -1.]])
    """
    if one_of("distance", distance, DISTANCES) == "cosine":
        return scale * F.normalize(vectors, dim=-1) @ F.normalize(means, dim=-1).T
    return -scale * (vectors[:, None] - means).square().sum(-1)


def prototypical(distance: str = "euclidean", scale: float = 1.0) -> Gradient:
    """A gradient function for `ftlib.steps`: a step is a list of episodes, (support, queries), two batches each.

    The model gives a vector a text, as its logits; "labels" are classes of the episode, from 0.  The loss is the mean
    over all queries.
    """

    def gradient(model: nn.Module, step: Any) -> Tensor:
        parts, asked = [], sum(len(queries["labels"]) for _, queries in step)
        for pair in step:
            vectors = [model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in pair]
            labels = [batch["labels"] for batch in pair]
            logits = prototype_logits(vectors[1], prototypes(vectors[0], labels[0]), distance, scale)
            part = F.cross_entropy(logits, labels[1], reduction="sum") / asked
            part.backward()
            parts.append(part.detach())
        return torch.stack(parts).sum()

    return gradient


def first_order_maml(rate: float, steps: int = 1, gradient: Gradient | None = None) -> Gradient:
    """A gradient function for `ftlib.steps`: the queries' gradient where `steps` of SGD on the support rows lead.

    A step is a list of episodes, (support, queries), two batches each; gradients and losses are means over episodes.
    rate: of the inner SGD.  gradient: of a batch alone, as `ftlib.steps` takes one; default: cross-entropy.
    What moves is what has requires_grad, so an adapter may be what is learned.
    Source: Finn et al. 2017 (arXiv:1703.03400), sections 2.2 and 5.2: the second derivatives are left out.
    """
    return _inner(rate, steps, gradient or summed(), asks=True)


def reptile(rate: float, steps: int = 5, gradient: Gradient | None = None) -> Gradient:
    """The same with the way that the weights went on the support rows, start - end, in place of a gradient.

    Queries are not looked at.  With SGD of learning rate e, and max_grad_norm=None in `ftlib.steps`, the weights move
    by e * (end - start).  The loss is that of the last inner step.
    Source: Nichol et al. 2018 (arXiv:1803.02999), algorithm 2.
    """
    return _inner(rate, steps, gradient or summed(), asks=False)


def _inner(rate: float, steps: int, gradient: Gradient, asks: bool) -> Gradient:
    number("rate", rate, 1e-12)
    whole("steps", steps)

    def outer(model: nn.Module, step: Any) -> Tensor:
        moving, losses = [p for p in model.parameters() if p.requires_grad], []
        start, sums = [p.detach().clone() for p in moving], [torch.zeros_like(p) for p in moving]
        inner = torch.optim.SGD(moving, lr=rate)
        for support, queries in step:
            try:
                for _ in range(steps):
                    loss = gradient(model, [support])
                    inner.step()
                    model.zero_grad(set_to_none=True)
                loss = gradient(model, [queries]) if asks else loss
                losses.append(loss.detach())
                for total, p, before in zip(sums, moving, start, strict=True):
                    way = p.grad if asks else before - p.detach()
                    total += 0 if way is None else way / len(step)
            finally:
                for p, before in zip(moving, start, strict=True):
                    p.data.copy_(before)
                model.zero_grad(set_to_none=True)
        for p, total in zip(moving, sums, strict=True):
            p.grad = total
        return torch.stack(losses).mean()

    return outer


def contrastive_pairs(
    labels: Sequence[Any], *, strategy: str = "oversampling", iterations: int | None = None, seed: int = 42
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows for the cosine loss, as SetFit makes them: int64 (pairs, 2), and scores float64 (pairs,).

    Of all pairs, each row with itself among them, in an order drawn by `seed`, one of the same class (1.0) and one of
    two classes (0.0) in turn.  Of both as many as there are of the more frequent kind, the others begun again
    ("oversampling"), of the rarer kind ("undersampling"); "unique": every pair once, what is left of a kind at the end.
    iterations: so many of both a row, whatever the strategy.
    labels: a class a row, or a list of 0 or 1 each, of which one in common makes a pair the same.
    Raises ValueError where all pairs are of one kind.  Source: Tunstall et al. 2022 (SetFit, arXiv:2209.11055), 3.1.

    >>> pairs, scores = contrastive_pairs([0, 0, 1])
    >>> scores.tolist(), len({tuple(pair) for pair in pairs.tolist()})
    ([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 6)
    """
    one_of("strategy", strategy, STRATEGIES)
    values = np.asarray(labels)
    pairs = np.stack(np.triu_indices(len(values)), axis=1)
    pairs = pairs[np.random.RandomState(seed).permutation(len(pairs))]
    first, second = values[pairs[:, 0]], values[pairs[:, 1]]
    same = first == second if values.ndim == 1 else (first.astype(bool) & second.astype(bool)).any(1)
    kinds = pairs[same], pairs[~same]
    refuse((not all(map(len, kinds)), "labels: all pairs are of one kind; contrast needs two classes"))
    sizes = [*map(len, kinds)]
    if iterations is not None:
        sizes = [whole("iterations", iterations) * len(values)] * 2
    elif strategy != "unique":
        sizes = [(max if strategy == "oversampling" else min)(sizes)] * 2
    taken = np.concatenate([own[np.arange(size) % len(own)] for own, size in zip(kinds, sizes, strict=True)])
    turns = np.concatenate([2 * np.arange(sizes[0]), 2 * np.arange(sizes[1]) + 1]).argsort()
    return taken[turns], np.repeat([1.0, 0.0], sizes)[turns]


def uncertainty(probabilities: Any, how: str = "entropy") -> np.ndarray:
    """How unsure a model is of each row, float64 (rows,), of (rows, classes): the rows to label next have the most.

    "entropy" in nats; "margin": 1 less the likeliest class's lead over the next.  Source: Settles 2009, section 3.1.

    >>> uncertainty([[0.5, 0.5], [0.9, 0.1]], "margin").round(3).tolist()
    [1.0, 0.2]
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if one_of("how", how, ("entropy", "margin")) == "margin":
        return 1 + np.diff(np.sort(values, axis=1)[:, :-3:-1], axis=1)[:, 0]
    return -(values * np.log(np.where(values > 0, values, 1))).sum(1)


def k_center(vectors: Any, count: int, chosen: Sequence[int] = ()) -> list[int]:
    """`count` more rows that cover the vectors (rows, hidden): each the farthest from all `chosen`, itself then one.

    Without any the first is the row nearest to the mean.  Distances are Euclidean; of equal ones the first row.
    Raises ValueError where fewer rows are left.
    Source: Sener & Savarese 2018 (core-set, arXiv:1708.00489), algorithm 1.

    >>> k_center([[0.0], [1.0], [5.0], [9.0]], 2, chosen=[0])
    [3, 2]
    """
    points, found = np.asarray(vectors, dtype=np.float64), [*chosen]
    left = len(points) - len({*chosen})
    refuse((whole("count", count) > left, f"count={count}: {left} rows are left"))
    nearest = np.full(len(points), np.inf)  # squared distance to the nearest of `found`
    for row in found:
        nearest = np.minimum(nearest, np.square(points - points[row]).sum(1))
    for _ in range(count):
        scores = nearest if found else -np.square(points - points.mean(0)).sum(1)
        scores[found] = -np.inf  # also where a copy of one would be as near as itself
        found.append(int(scores.argmax()))
        nearest = np.minimum(nearest, np.square(points - points[found[-1]]).sum(1))
    return found[len(chosen) :]
