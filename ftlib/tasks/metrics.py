"""Metrics that fit each task: plain functions on arrays, and the same as offline `evaluate` metrics.

Three rules hold everywhere. Class labels of -100 (`IGNORE`) are left out, as in the losses. A macro average
runs over the labels that occur in the references or in the predictions: a label predicted but never right
counts 0, one that occurs on neither side is left out, and anything divided by zero is 0. A correlation with a
constant is undefined and comes back as nan: 0.0 would read as a measured "no relation", and would slip unseen
into a mean over seeds.

Needs numpy; scikit-learn, scipy and seqeval where used; `evaluate` for `load_metric` and `combine` only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IGNORE = -100  # the label PyTorch's and our losses skip


def _host(values):
    """A tensor on any device as a numpy array (which has no bfloat16); anything else as it is."""
    if not hasattr(values, "detach"):
        return values
    return (values.double() if values.is_floating_point() else values).detach().cpu().numpy()


def _array(values, what: str) -> np.ndarray:
    """Finite float64 numbers of shape (n,) or (n, labels)."""
    values = _host(values)
    try:
        if np.asarray(values).dtype.kind in "USM":
            raise ValueError("found text")
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be numbers in rows of equal length: {error}") from None
    if array.size == 0 or array.ndim not in (1, 2):
        raise ValueError(f"{what} have shape {array.shape}: expected (n,) or (n, labels), n of at least 1")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{what} row {bad[0][0]} is {array[tuple(bad[0])]}: expected a finite number")
    return array


def _pair(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as arrays of one shape."""
    predictions, labels = _array(predictions, "predictions"), _array(labels, "labels")
    if len(predictions) != len(labels):
        short = min(len(predictions), len(labels))
        raise ValueError(
            f"{len(predictions)} predictions for {len(labels)} labels: row {short} has no partner"
        )
    if predictions.shape != labels.shape:
        shapes = f"predictions have shape {predictions.shape}, labels {labels.shape}"
        raise ValueError(f"{shapes}: give class ids (the argmax of logits) or, for multi-label, 0/1 matrices")
    return predictions, labels


def _ids(predictions, labels, names: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (n,) or 0/1 matrices (n, labels) as int64, without what is to be ignored."""
    predictions, labels = _pair(predictions, labels)
    matrix = labels.ndim == 2
    if matrix and names is not None and labels.shape[1] != len(names):
        raise ValueError(f"labels have {labels.shape[1]} columns for {len(names)} label names")
    size = 2 if matrix else np.inf if names is None else len(names)
    ignored = labels == IGNORE
    # a matrix entry that is 0 on both sides changes no F1 and breaks no exact match
    predictions, labels = np.where(ignored, 0, predictions), np.where(ignored, 0, labels)
    for what, array in (("predictions", predictions), ("labels", labels)):
        bad = np.argwhere((array != np.floor(array)) | (array < 0) | (array >= size))
        if len(bad):
            allowed = "a whole number >= 0" if size == np.inf else f"a whole number from 0 to {size - 1}"
            raise ValueError(f"{what} row {bad[0][0]} is {array[tuple(bad[0])]:g}: expected {allowed}")
    keep = ~(ignored.all(axis=1) if matrix else ignored)
    if not keep.any():
        raise ValueError(f"all labels are {IGNORE} (ignored): nothing to score")
    return predictions[keep].astype(np.int64), labels[keep].astype(np.int64)


def accuracy(predictions, labels) -> float:
    """Share of rows that are right; in 0/1 matrices (n, labels), rows with every label right (exact match).

    >>> accuracy([0, 1, 1, 2], [0, 1, 0, 2])
    0.75
    """
    predictions, labels = _ids(predictions, labels)
    return float((predictions == labels).reshape(len(labels), -1).all(axis=1).mean())


def _averaged(predictions, labels, average: str) -> tuple[float, float, float]:
    """Precision, recall, F1 over the labels that occur on either side."""
    from sklearn.metrics import precision_recall_fscore_support as prf

    predictions, labels = _ids(predictions, labels)
    if labels.ndim == 1:
        present = np.union1d(predictions, labels)
    elif len(present := np.flatnonzero((predictions + labels).any(axis=0))) == 0:
        return 0.0, 0.0, 0.0
    scores = prf(labels, predictions, labels=present, average=average, zero_division=0)
    return tuple(map(float, scores[:3]))


def precision(predictions, labels) -> float:
    """Macro precision: of the rows predicted to be a label, the share that are; the mean over labels.

    >>> precision([0, 1, 1], [0, 1, 0])
    0.75
    """
    return _averaged(predictions, labels, "macro")[0]


def recall(predictions, labels) -> float:
    """Macro recall: of the rows that are a label, the share predicted to be; the mean over labels.

    >>> recall([0, 1, 1], [0, 0, 1])
    0.75
    """
    return _averaged(predictions, labels, "macro")[1]


def f1_macro(predictions, labels) -> float:
    """Mean over labels of F1 = 2 · right / (predicted + true): each label weighs the same, however rare.

    >>> round(f1_macro([0, 1, 1], [0, 1, 0]), 4)
    0.6667
    """
    return _averaged(predictions, labels, "macro")[2]


def f1_micro(predictions, labels) -> float:
    """F1 of the counts added up over labels; equals accuracy where every row has exactly one label.

    >>> f1_micro([[1, 0], [1, 1]], [[1, 0], [0, 1]])
    0.8
    """
    return _averaged(predictions, labels, "micro")[2]


def matthews(predictions, labels) -> float:
    """Matthews correlation of class ids (n,), from -1 to 1; 0 (chance) when one side holds a single class.

    >>> matthews([0, 1, 1, 0], [0, 1, 0, 1])
    0.0
    """
    from sklearn.metrics import matthews_corrcoef

    predictions, labels = _ids(predictions, labels)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def mse(predictions, labels) -> float:
    """Mean squared error of numbers (n,), in the squared unit of the labels.

    >>> mse([1.0, 2.0], [1.0, 4.0])
    2.0
    """
    predictions, labels = _pair(predictions, labels)
    return float(np.square(predictions - labels).mean())


def _correlation(kind: str, predictions, labels) -> float:
    from scipy import stats

    predictions, labels = _pair(predictions, labels)
    if labels.ndim == 2:
        raise ValueError(f"a correlation needs one number a row, labels have shape {labels.shape}")
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return float(getattr(stats, kind)(predictions, labels).statistic)


def pearson(predictions, labels) -> float:
    """Pearson correlation of numbers (n,): how near the points lie to a rising line; nan if one is constant.

    >>> round(pearson([1, 2, 3], [2, 4, 6]), 6)
    1.0
    """
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions, labels) -> float:
    """Spearman correlation of numbers (n,): Pearson of the ranks, ties averaged; nan if one is constant.

    >>> round(spearman([1, 2, 3], [1, 10, 1000]), 6)
    1.0
    """
    return _correlation("spearmanr", predictions, labels)


def _is_entity_tag(tag) -> bool:
    return isinstance(tag, str) and (tag == "O" or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2))


def entity_scores(predictions, labels) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, and accuracy of single tags.

    Rows are sentences of tags such as "B-city", "I-city", "O". An entity counts when its type, first and last
    token are all right; counts are added up over types, as the CoNLL-2000 script does (seqeval's default).
    Raises ValueError for sentences of different length and for a tag that is not BIO.

    >>> entity_scores([["B-city", "O", "O"]], [["B-city", "I-city", "O"]])["f1"]
    0.0
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    predictions, labels = [list(row) for row in predictions], [list(row) for row in labels]
    _same_lengths(predictions, labels)
    for row, sides in enumerate(zip(predictions, labels, strict=True)):
        wrong = [tag for side in sides for tag in side if not _is_entity_tag(tag)]
        if wrong:
            raise ValueError(f"row {row} has the tag {wrong[0]!r}: expected 'O', 'B-…' or 'I-…'")
    if not any(labels):
        raise ValueError("no tags: nothing to score")
    right = np.concatenate([np.equal(a, b) for a, b in zip(predictions, labels, strict=True) if b])
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    found = {name: float(score(labels, predictions, zero_division=0)) for name, score in scores.items()}
    return {**found, "accuracy": float(right.mean())}


def _same_lengths(predictions, labels) -> None:
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} rows of predictions for {len(labels)} rows of labels")
    for row, (guess, truth) in enumerate(zip(predictions, labels, strict=True)):
        if len(guess) != len(truth):
            raise ValueError(
                f"row {row}: {len(guess)} predictions for {len(truth)} labels (trim the padding)"
            )


def compute_metrics(task: str, predictions, labels, label_names: Sequence[str] | None = None) -> dict:
    """The metrics that fit a task, by name.

    - "sequence-classification": class ids (n,) -> accuracy, f1_macro, precision, recall (macro), matthews.
    - "multi-label-classification": 0/1 matrices (n, labels) -> f1_micro, f1_macro, accuracy (exact match).
    - "regression": numbers (n,) or (n, 1) -> mse, pearson, spearman.
    - "token-classification": a row of ids per sentence; when `label_names` are BIO tags -> precision, recall,
      f1 of entities, accuracy of tokens; otherwise (parts of speech) the scores of tokens as classes.

    Raises ValueError for another task, unequal lengths, nothing to score, nan, and ids outside `label_names`.

    >>> compute_metrics("regression", [1.0, 2.0, 3.0], [1.0, 2.0, 4.0])["spearman"]
    1.0
    """
    if task not in _FITTING:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(map(repr, _FITTING))}")
    if task == "token-classification":
        return _token_scores(predictions, labels, label_names)
    if task == "regression":  # a head with one output gives (n, 1)
        sides = [_array(predictions, "predictions"), _array(labels, "labels")]
        sides = [side[:, 0] if side.ndim == 2 and side.shape[1] == 1 else side for side in sides]
    else:
        sides = _ids(predictions, labels, label_names)
        if (sides[1].ndim == 2) != (task == "multi-label-classification"):
            raise ValueError(f"labels have shape {sides[1].shape}, which does not fit {task}")
    return {name: METRICS[name](*sides) for name in _FITTING[task]}


def _token_scores(predictions, labels, label_names: Sequence[str] | None) -> dict[str, float]:
    predictions, labels = _host(predictions), _host(labels)
    _same_lengths(predictions, labels)
    rows = []  # one (predictions, labels) per sentence, without the ignored tokens
    for row, (guess, truth) in enumerate(zip(predictions, map(_host, labels), strict=True)):
        if (np.asarray(truth) == IGNORE).all():
            continue
        try:
            rows.append(_ids(guess, truth, label_names))
        except ValueError as error:
            raise ValueError(f"sentence {row}: {error}") from None
    if not rows:
        raise ValueError(f"no token has a label other than {IGNORE}: nothing to score")
    guesses, truths = zip(*rows, strict=True)
    names = list(label_names or [])
    if any(_is_entity_tag(name) and name != "O" for name in names):
        return entity_scores(*([[names[i] for i in row] for row in side] for side in (guesses, truths)))
    flat = np.concatenate(guesses), np.concatenate(truths)
    return {name: METRICS[name](*flat) for name in _FITTING["token-classification"]}


METRICS = {
    "accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1_macro, "f1_macro": f1_macro,
    "f1_micro": f1_micro, "matthews": matthews, "pearson": pearson, "spearman": spearman, "mse": mse,
    "seqeval": entity_scores,
}  # fmt: skip
_FITTING = {
    "sequence-classification": ("accuracy", "f1_macro", "precision", "recall", "matthews"),
    "multi-label-classification": ("f1_micro", "f1_macro", "accuracy"),
    "regression": ("mse", "pearson", "spearman"),
    "token-classification": ("accuracy", "f1_macro", "precision", "recall"),  # if no name is a BIO tag
}


def load_metric(name: str):
    """An `evaluate.Metric` that needs no download and gives the numbers of the functions above.

    Names: the keys of METRICS (precision, recall, f1 are macro; seqeval takes rows of BIO tags). The result's
    key is the name. All stays in memory (no cache folder is made), so it serves one process, not several.

    >>> load_metric("accuracy").compute(predictions=[0, 1], references=[0, 0])
    {'accuracy': 0.5}
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: expected one of {', '.join(METRICS)}")
    import datasets
    import evaluate

    # ids travel as floats so that 0.7 or nan reaches our check; an integer column would cut 0.7 down to 0
    kind = datasets.Value("string" if name == "seqeval" else "float64")
    shapes = [datasets.Sequence(kind)] + ([] if name == "seqeval" else [kind])

    class Metric(evaluate.Metric):
        def _info(self):
            text = (METRICS[name].__doc__ or "").partition(">>>")[0].strip()
            features = [datasets.Features(predictions=shape, references=shape) for shape in shapes]
            return evaluate.MetricInfo(text, "", features, inputs_description=text)

        def _build_data_dir(self):
            return ""  # kept in memory: nothing is written, so no folder is made

        def _infer_feature_from_batch(self, batch):
            for column, values in batch.items():
                if values is None or len(values) == 0:
                    raise ValueError(f"{column} are empty: nothing to score")
            return super()._infer_feature_from_batch(batch)

        def _finalize(self):
            if self.writer is None:
                raise ValueError("nothing to score: give predictions and references, or call add_batch first")
            super()._finalize()

        def _compute(self, predictions, references):
            scores = METRICS[name](predictions, references)
            return scores if isinstance(scores, dict) else {name: scores}

    Metric.__name__ = name  # evaluate takes a metric's name from its class
    return Metric(keep_in_memory=True)


def combine(names: Sequence[str]):
    """`evaluate.combine` of the metrics with these names: one object whose `compute` gives all their values.

    >>> combine(["accuracy", "f1_macro"]).compute(predictions=[0, 1], references=[0, 1])
    {'accuracy': 1.0, 'f1_macro': 1.0}
    """
    import evaluate

    if isinstance(names, str) or not names:
        raise ValueError(f"combine takes a list of metric names, got {names!r}")
    return evaluate.combine([load_metric(name) for name in names])
