"""Whether a classifier is right as often as it is sure: reliability, calibration error, temperature.

To copy: this file alone.
"""

from typing import NamedTuple

import numpy as np

IGNORE = -100  # a label that counts nowhere


class Reliability(NamedTuple):
    """Of every bin of confidence that has rows: mean confidence, share that is right, and rows; (bins,) each."""

    confidence: np.ndarray
    accuracy: np.ndarray
    rows: np.ndarray


def reliability(probabilities, labels, bins: int = 10) -> Reliability:
    """Rows by the probability of the likeliest class, in `bins` equal widths: (0, 1/bins], …, (1 - 1/bins, 1].

    probabilities: (n, classes), rows that sum to 1; labels: class ids (n,), -100 left out.
    Raises ValueError naming the row for labels or probabilities that can't be.

    >>> reliability([[0.9, 0.1], [0.25, 0.75]], [0, 0], bins=2).accuracy
    array([0.5])
    """
    values, labels, rows = labelled_rows(probabilities, labels)
    if len(bad := np.flatnonzero((values < 0).any(1) | (abs(values.sum(1) - 1) > 1e-3))):
        what = f"probabilities row {rows[bad[0]]} is {values[bad[0]]}"
        raise ValueError(f"{what}: expected a sum of 1; of logits take the softmax")
    sure, right = values.max(1), values.argmax(1) == labels  # (n,)
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], sure)
    count, sums = np.bincount(place), [np.bincount(place, one) for one in (sure, right)]
    return Reliability(*(one[count > 0] / count[count > 0] for one in sums), count[count > 0])


def calibration_error(probabilities, labels, bins: int = 15) -> float:
    """Expected calibration error, 0 to 1: |accuracy - confidence| of the bins, each weighed by its rows.

    It hangs on `bins`, and is above 0 by chance for few rows.  Arguments as of `reliability`.
    Source: Guo et al. 2017 (arXiv:1706.04599), equation 3.

    >>> round(calibration_error([[0.9, 0.1], [0.25, 0.75]], [0, 0], bins=2), 3)  # right 1 of 2, sure 0.825
    0.325
    """
    confidence, accuracy, rows = reliability(probabilities, labels, bins)
    return float(np.average(abs(accuracy - confidence), weights=rows))


def temperature(logits, labels) -> float:
    """The T > 0 for which softmax(logits / T) has the least cross-entropy; above 1 the classifier was too sure.

    Fit it on validation rows; decisions stay as they are.  logits: (n, classes); labels as of `reliability`.
    Raises ValueError where no T is best: every row is right, or the labels have nothing to do with the logits.
    Source: Guo et al. 2017, section 4.2.

    >>> round(temperature([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], [0, 0, 1]), 4)  # 2 / T = ln 2, odds of 2 to 1
    2.8854
    """
    from scipy.optimize import brentq

    values, labels, _ = labelled_rows(logits, labels)
    gaps = values - np.take_along_axis(values, labels[:, None], 1)  # (n, classes), 0 at the label

    def slope(log_t: float) -> float:  # of the cross-entropy by 1 / T, which rises with 1 / T
        weights = np.exp(np.exp(-log_t) * (gaps - gaps.max(1, keepdims=True)))
        return float(((weights * gaps).sum(1) / weights.sum(1)).mean())

    if not slope(20.0) < 0 < slope(-20.0):
        raise ValueError("no temperature is best: these logits get every row right, or none better than chance")
    return float(np.exp(brentq(slope, -20.0, 20.0, xtol=1e-12)))


def labelled_rows(values, labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked: values of the labeled rows, float64 (n, classes); labels, int64 (n,); which rows these are."""
    sides = (side.detach().double().cpu() if hasattr(side, "detach") else side for side in (values, labels))
    values, labels = (np.asarray(side, np.float64) for side in sides)
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise ValueError(f"shapes {values.shape} and {labels.shape}: expected (n, classes), and class ids (n,)")
    if len(bad := np.flatnonzero(~np.isfinite(values).all(1))):
        raise ValueError(f"row {bad[0]} is {values[bad[0]]}: expected finite numbers")
    if len(bad := np.flatnonzero(~np.isin(labels, [IGNORE, *range(values.shape[1])]))):
        raise ValueError(f"labels row {bad[0]} is {labels[bad[0]]:g}: expected a class, 0 to {values.shape[1] - 1}")
    if not len(rows := np.flatnonzero(labels != IGNORE)):
        raise ValueError(f"no label other than {IGNORE}: nothing to judge")
    return values[rows], labels[rows].astype(np.int64), rows
