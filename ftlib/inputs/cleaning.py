"""What is wrong with rows: texts that occur twice, or nearly, across splits; labels that predictions contradict.

To copy: this file and tasks/calibration.py (scikit-learn for `near_duplicates`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..tasks.calibration import labelled_rows


def near_duplicates(
    first: Sequence[str], second: Sequence[str] | None = None, *, least: float = 0.7, n: int = 5
) -> list[tuple[int, int, float]]:
    """(row of first, row of second, similarity) of all pairs of texts that are at least so similar, likest first.

    Similarity is Jaccard's: of the stretches of `n` characters in either text the share that is in both; capitals and
    white space don't count, a shorter text is one stretch.  second: another split; None: pairs within `first`.
    Exact: with scikit-learn's counts and sparse products, of each text's rarest stretches first, of which two
    texts that are alike share some (prefix filtering: Bayardo et al. 2007; several shared: Wang et al. 2012).

    >>> near_duplicates(["A good film.", "Dull"], ["a  good film!", "dull"], least=0.6)
    [(1, 1, 1.0), (0, 0, 0.7777777777777778)]
    """
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import CountVectorizer

    if not 0 < least <= 1 or isinstance(first, str) or isinstance(second, str):
        raise ValueError(f"least={least}: need above 0 to 1, and lists of texts")

    def stretches(text: str) -> set[str]:
        text = " ".join(text.lower().split())
        return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}

    texts, start = [*first, *(second or ())], 0 if second is None else len(first)
    counts = csr_array(CountVectorizer(analyzer=stretches, dtype=np.int32).fit_transform(texts))  # 0/1 (texts, grams)
    rank = np.argsort(np.argsort(np.bincount(counts.indices), kind="stable"))  # 0: the rarest
    sizes = np.diff(counts.indptr)
    row = np.repeat(np.arange(len(texts)), sizes)
    order = np.lexsort((rank[counts.indices], row))  # of each text the rarest first
    place = np.arange(len(row)) - counts.indptr[row]
    common = np.ceil(min(least, 0.1) * sizes - 1e-9)  # of the rarest of two texts that are alike so many are shared
    kept = place < (sizes - np.ceil(least * sizes - 1e-9) + common)[row]
    rare = csr_array((np.ones(kept.sum(), np.int32), (row[kept], counts.indices[order][kept])), counts.shape)
    found = []
    for begin in range(0, len(first), 256):
        likely = (rare[begin : min(begin + 256, len(first))] @ rare[start:].T).tocoo()
        a, b = likely.coords[0] + begin, likely.coords[1] + start
        keep = (a < b) & (likely.data >= np.minimum(common[a], common[b]))
        a, b = a[keep], b[keep]
        shared = counts[a].multiply(counts[b]).sum(1)
        alike = shared / (sizes[a] + sizes[b] - shared)
        found += zip(a.tolist(), (b - start).tolist(), alike.tolist(), strict=True)
    return sorted((pair for pair in found if pair[2] >= least), key=lambda pair: (-pair[2], *pair[:2]))


def confident_errors(probabilities: Any, labels: Any) -> list[dict[str, Any]]:
    """Rows whose label is likely wrong: {row, label, suggested, probability (of the given label)}, least likely first.

    probabilities: (n, classes), of models that did not see the row: by cross-validation.  labels: given ids (n,), -100
    left out.  A row is in a class where its probability is at least the mean one of rows that are labeled so; of
    several such classes the likeliest counts, and if it is not the given one, the row is here.
    Look at these rows; for a class that is hard they may be right.
    Source: Northcutt et al. 2021, Confident Learning (arXiv:1911.00068), equation 1.

    >>> confident_errors([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.9, 0.1]], [0, 0, 1, 1])
    [{'row': 3, 'label': 1, 'suggested': 0, 'probability': 0.1}]
    """
    values, labels, rows = labelled_rows(probabilities, labels)
    least = np.array([values[labels == c, c].mean() if (labels == c).any() else np.inf for c in range(values.shape[1])])
    within = np.where(values >= least, values, -1.0)  # (n, classes)
    suggested, own = within.argmax(1), values[np.arange(len(labels)), labels]
    wrong = np.flatnonzero((within.max(1) >= 0) & (suggested != labels))
    return [
        {"row": int(rows[i]), "label": int(labels[i]), "suggested": int(suggested[i]), "probability": float(own[i])}
        for i in wrong[np.argsort(own[wrong], kind="stable")]
    ]
