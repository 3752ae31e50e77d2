"""When is one method better than another? One rule for tables, figures and sentences.

Methods share their seeds, and are compared seed by seed. A difference has a 95 % interval: Student's t over seeds, or a
bootstrap over test rows where one model of each is compared. Where the interval holds 0, or the difference is below
what counts (`least`, such as one test row), it is a tie. Several comparisons of one table are corrected (Holm 1979).

To copy: this file alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ALPHA = 0.05  # 1 less the level of the intervals; the share of false alarms


class Difference(NamedTuple):
    """A difference, its 95 % interval from low to high, the p-value, and what it means: "more", "less" or "tie".

    >>> f"{Difference(0.0121, 0.0091, 0.0151, 0.01, 'more'):.3f}"
    '+0.012 ± 0.003'
    """

    value: float
    low: float
    high: float
    p: float
    verdict: str

    def __format__(self, spec: str) -> str:
        value, low, high = (format(number, f"+{spec or '.3f'}") for number in self[:3])
        if not math.isfinite(self.high - self.low):
            return f"{value} (one seed)"
        even = math.isclose(self.value - self.low, self.high - self.value, rel_tol=1e-6, abs_tol=1e-12)
        return f"{value} ± {self.high - self.value:{spec or '.3f'}}" if even else f"{value} [{low}, {high}]"

    def __repr__(self) -> str:
        return format(self)

    __str__ = __repr__


def _judged(value: float, low: float, high: float, p: float, least: float) -> Difference:
    tie = low <= 0 <= high or abs(value) < least
    return Difference(value, low, high, p, "tie" if tie else "more" if value > 0 else "less")


def paired(first: Sequence[float], second: Sequence[float] | float = 0.0, *, least: float = 0.0) -> Difference:
    """The mean of first less second, one number a seed and in the same order; t interval over the seeds.

    second: a single number where the other method has no seeds.  least: a smaller difference is a tie.
    A single seed gives no interval and a tie.  Raises ValueError for different numbers of seeds, and for nan.

    >>> paired([0.71, 0.73, 0.74], [0.70, 0.70, 0.72]), paired([0.71, 0.73, 0.74], [0.70, 0.70, 0.72]).verdict
    (+0.020 ± 0.025, 'tie')
    """
    first, second = np.atleast_1d(np.asarray(first, float)), np.asarray(second, float)
    if (second.ndim and first.shape != second.shape) or first.ndim != 1 or not first.size:
        raise ValueError(f"paired needs the same seeds for both, got {first.shape} and {second.shape} numbers")
    gaps = first - second
    if not np.isfinite(gaps).all():
        raise ValueError(f"paired got {gaps[~np.isfinite(gaps)][0]} at seed number {(~np.isfinite(gaps)).argmax()}")
    value, seeds = float(gaps.mean()), len(gaps)
    if seeds < 2:
        return Difference(value, -math.inf, math.inf, 1.0, "tie")
    from scipy import stats

    error = float(gaps.std(ddof=1)) / math.sqrt(seeds)
    half = float(stats.t.ppf(1 - ALPHA / 2, seeds - 1)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, seeds - 1)) if error else float(value == 0)
    return _judged(value, value - half, value + half, p, least)


def bootstrap(
    measure: Callable[..., float], *rows: Any, draws: int = 2000, seed: int = 0, least: float = 0.0
) -> Difference:
    """`measure(*rows)` over test rows, a difference of two models, say; percentile interval of a bootstrap.

    rows: arrays of one length, an entry a test row; every draw takes as many with replacement, the same ones of each,
    so that both models are measured on the same rows.  It tells what other test rows would give, not other seeds.
    Raises ValueError for arrays of different lengths or without rows, and where `measure` gives nan.

    >>> right = np.array([1, 1, 0, 1] * 50), np.array([1, 0, 0, 1] * 50)
    >>> bootstrap(lambda a, b: a.mean() - b.mean(), *right).verdict
    'more'
    """
    arrays = [np.asarray(own) for own in rows]
    if len({len(own) for own in arrays}) != 1 or not len(arrays[0]):
        raise ValueError(f"bootstrap needs arrays of one length, got {[len(own) for own in arrays]}")
    generator, count = np.random.default_rng(seed), len(arrays[0])
    drawn = [generator.integers(0, count, count) for _ in range(draws)]
    values = np.array([measure(*(own[places] for own in arrays)) for places in drawn])
    if not np.isfinite(values).all():
        raise ValueError(f"bootstrap: measure gives {values[~np.isfinite(values)][0]} for some of the draws")
    low, high = np.quantile(values, (ALPHA / 2, 1 - ALPHA / 2))
    p = 2 * (1 + min((values <= 0).sum(), (values >= 0).sum())) / (1 + draws)
    return _judged(float(measure(*arrays)), float(low), float(high), min(1.0, float(p)), least)


def against(runs: Mapping[Any, Sequence[float]], base: Any, *, least: float = 0.0) -> dict[Any, Difference]:
    """Every other method less `base`, {name: numbers of the shared seeds}; the verdicts corrected by Holm's method.

    With m comparisons one in 20 tables has a false alarm, not m in 20; the intervals are those of one comparison.
    """
    found = {name: paired(own, runs[base], least=least) for name, own in runs.items() if name != base}
    told = True
    for rank, name in enumerate(sorted(found, key=lambda name: found[name].p)):
        told = told and found[name].p < ALPHA / (len(found) - rank)
        if not told:  # nor are those behind it, whose p is larger
            found[name] = found[name]._replace(verdict="tie")
    return found
