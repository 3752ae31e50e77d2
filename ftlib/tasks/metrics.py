"""Metrics that fit each task: plain functions on lists, arrays or tensors.

To copy: this file and tasks/overlap.py.

Class labels of -100 (`IGNORE`) are left out, as in the losses. A macro average runs over the labels that occur on
either side; anything divided by zero is 0. A correlation with a constant is nan: 0.0 would read as "no relation".
"""

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np

from .overlap import bleu, chrf, rouge

IGNORE = -100  # the label PyTorch's and our losses skip


def _array(values, what: str) -> np.ndarray:
    """Finite float64 numbers; a tensor may be on any device, and bfloat16, which numpy lacks."""
    values = np.asarray(values.detach().double().cpu() if hasattr(values, "detach") else values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{what} must be numbers, and are {values.dtype}")
    if len(bad := np.argwhere(~np.isfinite(values))):
        raise ValueError(f"{what} row {bad[0][0]} is {values[tuple(bad[0])]}: expected a finite number")
    return values.astype(np.float64)


def _pair(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as arrays of one shape, (n,) or (n, labels)."""
    predictions, labels = _array(predictions, "predictions"), _array(labels, "labels")
    if predictions.shape != labels.shape or labels.size == 0 or labels.ndim > 2:
        shapes = f"predictions have shape {predictions.shape}, labels {labels.shape}"
        raise ValueError(f"{shapes}: give class ids (n,) (the argmax of logits) or, for multi-label, 0/1 (n, labels)")
    return predictions, labels


def _ids(predictions, labels, names: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (n,) or 0/1 matrices (n, labels) as int64, without what is to be ignored."""
    predictions, labels = _pair(predictions, labels)
    matrix, ignored = labels.ndim == 2, labels == IGNORE
    largest = 1 if matrix else len(names) - 1 if names else np.inf
    # a matrix entry that is 0 on both sides changes no F1 and breaks no exact match
    predictions, labels = np.where(ignored, 0, predictions), np.where(ignored, 0, labels)
    for what, array in (("predictions", predictions), ("labels", labels)):
        if len(bad := np.argwhere((array != np.floor(array)) | (array < 0) | (array > largest))):
            row, value = bad[0][0], array[tuple(bad[0])]
            raise ValueError(f"{what} row {row} is {value:g}: expected a whole number, 0 to {largest}")
    keep = ~(ignored.all(axis=1) if matrix else ignored)
    if not keep.any():
        raise ValueError(f"all labels are {IGNORE} (ignored): nothing to score")
    return predictions[keep].astype(np.int64), labels[keep].astype(np.int64)


def accuracy(predictions, labels) -> float:
    """Share of rows that are right; in 0/1 matrices (n, labels), rows with every label right (exact match)."""
    predictions, labels = _ids(predictions, labels)
    return float((predictions == labels).reshape(len(labels), -1).all(axis=1).mean())


def _averaged(predictions, labels, average: str) -> tuple[float, float, float]:
    """Precision, recall, F1 over the labels that occur on either side."""
    from sklearn.metrics import precision_recall_fscore_support as prf

    predictions, labels = _ids(predictions, labels)
    matrix = labels.ndim == 2
    present = np.flatnonzero((predictions + labels).any(axis=0)) if matrix else np.union1d(predictions, labels)
    if len(present) == 0:
        return 0.0, 0.0, 0.0
    return tuple(map(float, prf(labels, predictions, labels=present, average=average, zero_division=0)[:3]))


def precision(predictions, labels) -> float:
    """Macro precision: of the rows predicted to be a label, the share that are; the mean over labels."""
    return _averaged(predictions, labels, "macro")[0]


def recall(predictions, labels) -> float:
    """Macro recall: of the rows that are a label, the share predicted to be; the mean over labels."""
    return _averaged(predictions, labels, "macro")[1]


def f1_macro(predictions, labels) -> float:
    """Mean over labels of F1 = 2 · right / (predicted + true): each label weighs the same, however rare."""
    return _averaged(predictions, labels, "macro")[2]


def f1_micro(predictions, labels) -> float:
    """F1 of the counts added up over labels; equals accuracy where every row has exactly one label.

    >>> f1_micro([[1, 0], [1, 1]], [[1, 0], [0, 1]])
    0.8
    """
    return _averaged(predictions, labels, "micro")[2]


def matthews(predictions, labels) -> float:
    """Matthews correlation of class ids (n,), from -1 to 1; 0 (chance) when one side holds a single class."""
    from sklearn.metrics import matthews_corrcoef

    predictions, labels = _ids(predictions, labels)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def mse(predictions, labels) -> float:
    """Mean squared error of numbers (n,), in the squared unit of the labels."""
    return float(np.square(np.subtract(*_pair(predictions, labels))).mean())


def _correlation(kind: str, predictions, labels) -> float:
    from scipy import stats

    predictions, labels = _pair(predictions, labels)
    if labels.ndim == 2:
        raise ValueError(f"a correlation needs one number a row, labels have shape {labels.shape}")
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return float(getattr(stats, kind)(predictions, labels).statistic)


def pearson(predictions, labels) -> float:
    """Pearson correlation of numbers (n,): how near the points lie to a rising line; nan if one is constant."""
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions, labels) -> float:
    """Spearman correlation of numbers (n,): Pearson of the ranks, ties averaged; nan if one is constant."""
    return _correlation("spearmanr", predictions, labels)


def _is_entity_tag(tag) -> bool:
    return isinstance(tag, str) and (tag == "O" or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2))


def entity_scores(predictions, labels) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, and accuracy of single tags.

    Rows are sentences of tags such as "B-city", "I-city", "O". An entity counts when its type, first and last token are
    all right; counts are added up over types, as the CoNLL-2000 script does (seqeval's default).
    Raises ValueError for sentences of different length and for a tag that is not BIO.

    >>> entity_scores([["B-city", "O", "O"]], [["B-city", "I-city", "O"]])["f1"]
    0.0
    """
    from seqeval.metrics import accuracy_score
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as prf

    predictions, labels = [list(row) for row in predictions], [list(row) for row in labels]
    _same_lengths(predictions, labels)
    sides = [*enumerate(predictions), *enumerate(labels)]
    wrong = [(i, tag) for i, row in sides for tag in row if not _is_entity_tag(tag)]
    if wrong or not any(labels):
        found = f"row {wrong[0][0]} has the tag {wrong[0][1]!r}" if wrong else "no tags, nothing to score"
        raise ValueError(f"{found}: expected 'O', 'B-…' or 'I-…'")
    scores = *prf(labels, predictions, average="micro", zero_division=0)[:3], accuracy_score(labels, predictions)
    return dict(zip(("precision", "recall", "f1", "accuracy"), map(float, scores), strict=True))


def span_scores(predictions, labels) -> dict[str, float]:
    """Of [start, end] in tokens, (windows, 2): how many are right, and the mean of F1 = 2 · shared / (found + wanted).

    >>> span_scores([[3, 4]], [[4, 4]])  # tokens 3 and 4, end included, for token 4: 2 · 1 / (2 + 1)
    {'span_exact': 0.0, 'span_f1': 0.6666666666666666}
    """
    predictions, labels = _pair(*(np.reshape(side, (-1, 2)) for side in (predictions, labels)))
    if not (keep := labels[:, 0] != IGNORE).any():
        raise ValueError(f"all labels are {IGNORE} (ignored): nothing to score")
    (a, b), (c, d) = predictions[keep].T, labels[keep].T
    shared = np.clip(np.minimum(b, d) - np.maximum(a, c) + 1, 0, None)
    f1 = 2 * shared / (b - a + d - c + 2)
    return {"span_exact": float(((a == c) & (b == d)).mean()), "span_f1": float(f1.mean())}


def _texts(values, what: str) -> list[str]:
    values = [] if isinstance(values, str) else list(values)
    if not values or not all(isinstance(text, str) for text in values):
        raise ValueError(f"{what} must be a list of texts, at least one; got {values[:3]!r}")
    return values


def _words(predictions, references) -> list[tuple[list[str], list[str]]]:
    """Both sides' words, lower case, without ASCII punctuation and articles."""
    pairs = zip_longest(_texts(predictions, "predictions"), _texts(references, "references"))
    words = []
    for row, pair in enumerate(pairs):
        if None in pair:
            raise ValueError(f"row {row}: a prediction without a reference, or the reverse")
        words.append(tuple(map(_plain, pair)))
    return words


def _plain(text: str) -> list[str]:
    no_marks = str.maketrans("", "", string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(no_marks)).split()


def exact_match(predictions, references) -> float:
    """Share of texts that are the reference, capitals, punctuation, articles and white space aside: "-1.5" is "15".

    Source: Rajpurkar et al. 2016 (SQuAD, arXiv:1606.05250), section 6.1.

    >>> exact_match(["The cat.", "a dog"], ["cat", "dogs"])
    0.5
    """
    return float(np.mean([found == wanted for found, wanted in _words(predictions, references)]))


def token_f1(predictions, references) -> float:
    """Mean over texts of F1 = 2 · shared / (found + wanted) of their words, compared as in `exact_match`.

    >>> token_f1(["the black cat"], ["cat"])  # 2 · 1 / (2 + 1)
    0.6666666666666666
    """
    pairs = _words(predictions, references)  # where both are empty, 1: SQuAD 2's rule for no answer
    shared = [(Counter(found) & Counter(wanted)).total() for found, wanted in pairs]
    return float(np.mean([2 * n / (len(a) + len(b)) if a or b else 1 for n, (a, b) in zip(shared, pairs, strict=True)]))


def squad(predictions, references) -> dict[str, float]:
    """`exact_match` and `f1` (`token_f1`) of answers, each against the best of its references; shares, not percent.

    predictions: texts, "" for no answer, or what `predict` gives.  references: a list of texts each, or SQuAD's
    {"text": [...]}; none: there is no answer.  Where some have one and some have none, has_answer_* and no_answer_*
    are over these alone, as in the script of SQuAD 2.0 (Rajpurkar et al. 2018, arXiv:1806.03822).

    >>> squad(["the cat", ""], [["A cat!", "dog"], []])["has_answer_exact_match"]
    1.0
    """
    predictions = [one["answer"] if isinstance(one, Mapping) else one for one in predictions]
    golds = [list(one["text"] if isinstance(one, Mapping) else one) for one in references]
    if len(golds) != len(predictions) or not golds or any(isinstance(one, str) for one in references):
        need = "a list of right answers for each prediction, at least one"
        raise ValueError(f"{len(predictions)} predictions, {len(golds)} references: need {need}")
    golds = [[gold for gold in own if _plain(gold)] for own in golds]  # "The." is none
    each = {"exact_match": exact_match, "f1": token_f1}
    rows = np.array([[max(score([found], [gold]) for gold in own or [""]) for score in each.values()]
                     for found, own in zip(predictions, golds, strict=True)])  # fmt: skip
    has = np.array([bool(own) for own in golds])
    groups = {"": has | True} | ({"has_answer_": has, "no_answer_": ~has} if 0 < has.sum() < len(has) else {})
    means = {group: rows[own].mean(0) for group, own in groups.items()}
    return {group + name: float(mean[i]) for group, mean in means.items() for i, name in enumerate(each)}


def valid_json(predictions) -> float:
    """Share of texts that are a JSON object or array, white space around it aside.

    >>> valid_json(['{"city": "boston"}', '{"city": boston}', '3'])
    0.3333333333333333
    """
    return float(np.mean([_is_json(text) for text in _texts(predictions, "predictions")]))


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=int), (dict, list))  # int refuses NaN, as JSON does
    except (ValueError, RecursionError):
        return False


def _same_lengths(predictions, labels) -> None:
    for row, (found, wanted) in enumerate(zip_longest(map(len, predictions), map(len, labels), fillvalue="no")):
        if found != wanted:
            raise ValueError(f"row {row}: {found} predictions for {wanted} labels (trim the padding)")


def compute_metrics(task: str, predictions, labels, label_names: Sequence[str] | None = None) -> dict:
    """The metrics that fit a task, by name.

    - "sequence-classification": class ids (n,) -> accuracy, f1_macro, precision, recall (macro), matthews.
    - "multi-label-classification": 0/1 matrices (n, labels) -> f1_micro, f1_macro, accuracy (exact match).
    - "regression": numbers (n,) or (n, 1) -> mse, pearson, spearman; (n, k) -> mse.
    - "token-classification": a row of ids per sentence; when `label_names` are BIO tags -> precision, recall,
      f1 of entities, accuracy of tokens; otherwise (parts of speech) the scores of tokens as classes.
    - "question-answering": [start, end] of every window, (n, 2) -> span_exact, span_f1; of answers: `squad`.
    - "causal-lm": generated texts and references -> exact_match, f1 (`token_f1`), valid_json.
    - "seq2seq-lm": the same -> bleu, chrf (0 to 100), rouge1, rouge2, rougeL (0 to 1).

    Raises ValueError for another task, unequal lengths, nothing to score, nan, and ids outside `label_names`.

    >>> compute_metrics("regression", [1.0, 2.0, 3.0], [1.0, 2.0, 4.0])["spearman"]
    1.0
    """
    if task not in _FITTING:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(map(repr, _FITTING))}")
    if task == "seq2seq-lm":
        found = {"bleu": bleu(predictions, labels), "chrf": chrf(predictions, labels)}
        return found | rouge(predictions, labels)
    if task == "causal-lm":
        words = {"exact_match": exact_match(predictions, labels), "f1": token_f1(predictions, labels)}
        return words | {"valid_json": valid_json(predictions)}
    if task == "token-classification":
        return _token_scores(predictions, labels, label_names)
    if task == "question-answering":
        return span_scores(predictions, labels)
    if task == "regression":  # a head with one output gives (n, 1)
        sides = _array(predictions, "predictions"), _array(labels, "labels")
        sides = [side[:, 0] if side.ndim == 2 and side.shape[1] == 1 else side for side in sides]
        if sides[1].ndim > 1:
            return {"mse": mse(*sides)}
    else:
        sides = _ids(predictions, labels, label_names)
        if (sides[1].ndim == 2) != (task == "multi-label-classification"):
            raise ValueError(f"labels have shape {sides[1].shape}, which does not fit {task}")
    return {score.__name__: score(*sides) for score in _FITTING[task]}


def _token_scores(predictions, labels, label_names: Sequence[str] | None) -> dict[str, float]:
    _same_lengths(predictions, labels)
    rows = []  # one (predictions, labels) per sentence, without the ignored tokens
    for row, (guess, truth) in enumerate(zip(predictions, labels, strict=True)):
        try:
            if (_array(truth, "labels") != IGNORE).any():
                rows.append(_ids(guess, truth, label_names))
        except ValueError as error:
            raise ValueError(f"sentence {row}: {error}") from None
    if not rows:
        raise ValueError(f"no token has a label other than {IGNORE}: nothing to score")
    guesses, truths = zip(*rows, strict=True)
    names = list(label_names or [])
    if set(names) - {"O"} and all(map(_is_entity_tag, names)):
        return entity_scores(*([[names[i] for i in row] for row in side] for side in (guesses, truths)))
    flat = np.concatenate(guesses), np.concatenate(truths)
    return {score.__name__: score(*flat) for score in _FITTING["token-classification"]}


_FITTING = {
    "sequence-classification": (accuracy, f1_macro, precision, recall, matthews),
    "multi-label-classification": (f1_micro, f1_macro, accuracy),
    "regression": (mse, pearson, spearman),
    "token-classification": (accuracy, f1_macro, precision, recall),  # if no name is a BIO tag
    "question-answering": (),  # `span_scores`
    "causal-lm": (exact_match, token_f1, valid_json),
    "seq2seq-lm": (bleu, chrf, rouge),
}
