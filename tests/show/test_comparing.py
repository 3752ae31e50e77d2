"""The one rule: intervals are scipy's, false alarms as rare as promised, several comparisons corrected by Holm."""

import math

import numpy as np
import pytest
from scipy import stats

from ftlib import results_table
from ftlib.show.comparing import Difference, against, bootstrap, paired


def test_a_paired_difference_is_scipys():
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 5, 20):
        a, b = rng.normal(0.7, 0.02, seeds), rng.normal(0.69, 0.02, seeds)
        found, theirs = paired(a, b), stats.ttest_rel(a, b)
        low, high = theirs.confidence_interval()
        assert found[:4] == pytest.approx((np.mean(a - b), low, high, theirs.pvalue))
        assert (found.verdict == "tie") == (low <= 0 <= high)


def test_by_hand():
    found = paired([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])  # gaps 0.1, 0.2, 0.3: half 4.303 * 0.1 / sqrt(3)
    assert found[:3] == pytest.approx((0.2, 0.2 - 0.2484, 0.2 + 0.2484), abs=1e-4) and found.verdict == "tie"
    assert paired([0.4, 0.5, 0.45], 0.9).verdict == "less" and paired(np.array([0.9, 0.9]), 0.1).verdict == "more"
    assert paired([0.5, 0.5], [0.5, 0.5]) == (0, 0, 0, 1, "tie")
    assert paired([0.52, 0.53, 0.52], 0.51, least=1 / 50).verdict == "tie"  # under one row of a test of 50
    assert paired([0.9], [0.1]).verdict == "tie" and str(paired([0.9], [0.1])) == "+0.800 (one seed)"


@pytest.mark.parametrize(
    "first, second, message",
    [([1, 2], [1, 2, 3], "same seeds"), ([], [], "same seeds"), ([[1.0]], 0, "same seeds"),
     ([1.0, math.nan], [0, 0], "nan at seed number 1"), ([1.0], math.inf, "-inf at seed number 0")],
)  # fmt: skip
def test_what_cannot_be_compared(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired(first, second)


@pytest.mark.parametrize("seeds", [3, 5])
def test_false_alarms_are_one_in_twenty(seeds, tables=3000, methods=6):
    rng = np.random.default_rng(1)
    alone, family = 0, 0
    for _ in range(tables):
        shared = rng.normal(0.7, 0.05, seeds)  # what a seed does to every method
        runs = {name: shared + rng.normal(0, 0.01, seeds) for name in range(methods)}
        alone += paired(runs[1], runs[0]).verdict != "tie"
        family += any(found.verdict != "tie" for found in against(runs, 0).values())
    assert 0.04 < alone / tables < 0.06
    assert family / tables < 0.06


def test_real_differences_are_found():
    rng = np.random.default_rng(2)
    found = [paired(rng.normal(0.74, 0.01, 5), rng.normal(0.7, 0.01, 5)).verdict for _ in range(200)]
    assert found.count("more") > 190 and "less" not in found


def test_holm_by_hand():
    """p-values 0.012, 0.02, 0.03, 0.2 against 0.05 / 4, / 3, / 2, / 1: the second is a tie, and so all behind it."""
    base, shape = np.zeros(5), np.array([-1, -0.5, 0, 0.5, 1])
    error = shape.std(ddof=1) / math.sqrt(5)
    runs = {
        name: shape + stats.t.isf(p / 2, 4) * error for name, p in zip("dacb", (0.2, 0.012, 0.03, 0.02), strict=True)
    }
    found = against({"base": base, **runs}, "base")
    assert {name: one.p for name, one in found.items()} == pytest.approx({"d": 0.2, "a": 0.012, "c": 0.03, "b": 0.02})
    assert {name: one.verdict for name, one in found.items()} == {"d": "tie", "a": "more", "c": "tie", "b": "tie"}
    assert paired(runs["c"], base).verdict == "more"  # alone it would be told apart


def test_bootstrap_is_scipys_and_pairs_the_rows():
    rng = np.random.default_rng(3)
    a = rng.random(300) < 0.8
    b = np.where(rng.random(300) < 0.1, ~a, a)  # the same answers but for one in ten

    def gap(x, y):
        return x.mean() - y.mean()

    ours = bootstrap(gap, a, b, draws=4000)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=4000, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert ours[:3] == pytest.approx((gap(a, b), theirs.low, theirs.high), abs=0.006)
    assert bootstrap(gap, a, a)[:4] == (0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"one length, got \[3, 2\]"):
        bootstrap(gap, [1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"one length, got \[0, 0\]"):
        bootstrap(gap, [], [])
    with pytest.raises(ValueError, match="measure gives nan for some"):  # as a correlation of equal numbers
        bootstrap(lambda x: x.mean() if len({*x}) > 1 else np.nan, [0, 1, 0])


def test_bootstraps_false_alarms():
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(400):
        a, b = rng.random((2, 200)) < 0.7
        alarms += bootstrap(lambda x, y: x.mean() - y.mean(), a, b, draws=200).verdict != "tie"
    assert alarms / 400 < 0.08


def test_in_a_table():
    table = results_table([{"method": "a", "gap": paired([0.2, 0.3], 0.1)}, {"method": "b", "gap": None}], digits=2)
    assert table.rows == [["a", "+0.15 ± 0.64"], ["b", "–"]] and table.numeric == [False, True]
    assert f"{Difference(0.2, 0.1, 0.25, 0.01, 'more'):.2f}" == "+0.20 [+0.10, +0.25]"
