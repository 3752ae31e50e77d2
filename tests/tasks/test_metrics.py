"""Each metric against numbers worked out by hand, and scikit-learn, scipy, seqeval and SQuAD's; then bad input."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.tasks import metrics
from ftlib.tasks.metrics import compute_metrics, entity_scores

TAGS = ["O", "B-city", "I-city", "B-day"]


def random_ids(classes=5, n=60, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, n), rng.integers(0, classes, n)


# ---------------------------------------------------------------------------------------------- by hand


def test_three_classes_by_hand():
    # class 0: 1 predicted, right, 2 true; class 1: 2 predicted, 1 right, 1 true; class 2: 1 predicted, right
    found = compute_metrics("sequence-classification", [0, 1, 1, 2], [0, 0, 1, 2], ["a", "b", "c"])
    assert list(found) == ["accuracy", "f1_macro", "precision", "recall", "matthews"]
    assert found["accuracy"] == 0.75
    assert found["precision"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found["recall"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert all(type(value) is float for value in found.values())


def test_matthews_by_hand():
    # right positive 2, right negative 1, wrong positive 1, wrong negative 0
    by_hand = (2 * 1 - 1 * 0) / math.sqrt((2 + 1) * (2 + 0) * (1 + 1) * (1 + 0))
    assert metrics.matthews([1, 1, 1, 0], [1, 1, 0, 0]) == pytest.approx(by_hand)


def test_multi_label_by_hand():
    predictions, labels = [[1, 0, 0], [1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    found = compute_metrics("multi-label-classification", predictions, labels)
    assert found["accuracy"] == pytest.approx(1 / 3)  # only the first row is right in every column
    assert found["f1_micro"] == pytest.approx(2 * 2 / (3 + 3))
    # column 2 never occurs on either side and is left out of the mean
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_regression_by_hand():
    found = compute_metrics("regression", [1.0, 2.0, 3.0], [2.0, 2.0, 5.0])
    assert found["mse"] == pytest.approx((1 + 0 + 4) / 3)
    assert found["pearson"] == pytest.approx(3 / math.sqrt(2 * 6))
    assert found["spearman"] == pytest.approx(1.5 / math.sqrt(2 * 1.5))  # ranks 1, 2, 3 and 1.5, 1.5, 3
    assert compute_metrics("regression", [[1.0, 2.0]], [[3.0, 2.0]]) == {"mse": 2.0}  # several numbers a row
    column = compute_metrics("regression", np.array([[1.0], [2.0], [3.0]]), [2.0, 2.0, 5.0])
    assert column == found


def test_entities_by_hand():
    # true: city at 1-2, day at 4; predicted: city at 1 (too short), day at 4
    labels = [[-100, 0, 1, 2, 0, -100], [-100, 3, -100]]
    predictions = [[2, 0, 1, 0, 0, 1], [0, 3, 3]]
    found = compute_metrics("token-classification", predictions, labels, TAGS)
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": pytest.approx(4 / 5)}


def test_tokens_without_bio_names_are_scored_as_classes():
    found = compute_metrics("token-classification", [[0, 1], [1]], [[0, -100], [0]], ["NOUN", "VERB"])
    assert found["accuracy"] == 0.5
    assert set(found) == {"accuracy", "f1_macro", "precision", "recall"}


def test_padded_arrays_and_all_ignored_rows():
    labels = torch.tensor([[0, 1, -100], [-100, -100, -100]])
    found = compute_metrics("token-classification", torch.tensor([[0, 1, 3], [1, 1, 1]]), labels, TAGS)
    assert found["f1"] == found["accuracy"] == 1.0


def test_generated_texts_by_hand():
    predictions = ['{"city": "Boston"}', "The  quick fox.", "no"]
    references = ['{"city": "boston"}', "a quick brown fox", "yes"]
    found = compute_metrics("causal-lm", predictions, references)
    # words: city boston = city boston; quick fox, of quick brown fox: 2 * 2 / (2 + 3); nothing shared
    assert found == {
        "exact_match": pytest.approx(1 / 3),
        "f1": pytest.approx((1 + 4 / 5 + 0) / 3),
        "valid_json": pytest.approx(1 / 3),
    }
    assert list(found) == ["exact_match", "f1", "valid_json"]
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("[]", 1), ('  {"a": [1, null, "x"]}\n', 1), ('{"a": 1}{"b": 2}', 0), ("{'a': 1}", 0), ('{"a": 1', 0),
        ("3", 0), ('"text"', 0), ("null", 0), ("", 0), ('{"a": NaN}', 0), ('[Infinity, -Infinity]', 0),
        ('```json\n{"a": 1}\n```', 0), ("[" * 100_000, 0), ('{"a": 1} and more', 0), ('{"a": "\n"}', 0),
    ],
)  # fmt: skip
def test_valid_json_is_an_object_or_an_array(text, valid):
    assert metrics.valid_json([text]) == valid


# ------------------------------------------------------------------------------------------- defined cases


def test_macro_runs_over_the_labels_that_occur():
    # names has four labels; 2 is only predicted (counts 0), 3 occurs nowhere (left out)
    found = compute_metrics("sequence-classification", [0, 1, 2], [0, 1, 1], ["a", "b", "c", "d"])
    assert found["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["recall"] == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_no_positive_label_at_all_gives_zero():
    found = compute_metrics("multi-label-classification", [[0, 0]], [[0, 0]])
    assert found == {"f1_micro": 0.0, "f1_macro": 0.0, "accuracy": 1.0}


def test_constant_predictions():
    found = compute_metrics("regression", [2.5, 2.5, 2.5], [1.0, 2.0, 3.0])
    assert math.isnan(found["pearson"]) and math.isnan(found["spearman"])
    assert found["mse"] == pytest.approx((2.25 + 0.25 + 0.25) / 3)
    assert math.isnan(metrics.pearson([1.0], [1.0]))
    assert metrics.matthews([1, 1], [1, 0]) == 0.0


@pytest.mark.filterwarnings("error")
def test_no_warning_for_defined_cases():
    compute_metrics("sequence-classification", [0, 0], [1, 1])
    compute_metrics("regression", [1.0, 1.0], [1.0, 2.0])
    assert compute_metrics("token-classification", [[0, 0]], [[1, 2]], TAGS)["f1"] == 0.0


def test_ignored_labels_are_left_out():
    assert metrics.accuracy([0, 1, 1], [0, -100, 1]) == 1.0
    assert metrics.accuracy([[1, 0], [1, 1]], [[1, -100], [-100, -100]]) == 1.0
    assert metrics.f1_micro([[1, 1], [0, 1]], [[1, -100], [1, 1]]) == pytest.approx(2 * 2 / (2 + 3))


def test_tensors_lists_and_arrays_agree():
    predictions, labels = random_ids()
    expected = compute_metrics("sequence-classification", predictions, labels)
    assert compute_metrics("sequence-classification", predictions.tolist(), labels.tolist()) == expected
    tensors = torch.tensor(predictions), torch.tensor(labels)
    assert compute_metrics("sequence-classification", *tensors) == expected
    half = torch.tensor([0.5, 1.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert metrics.mse(half, [0.5, 1.5, 3.0]) == pytest.approx(1 / 3)


# -------------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_scikit_learn_twin(classes):
    from sklearn import metrics as twin

    predictions, labels = random_ids(classes)
    found = compute_metrics("sequence-classification", predictions, labels)
    assert found["accuracy"] == pytest.approx(twin.accuracy_score(labels, predictions))
    for name, score in (
        ("f1_macro", twin.f1_score),
        ("precision", twin.precision_score),
        ("recall", twin.recall_score),
    ):
        assert found[name] == pytest.approx(score(labels, predictions, average="macro", zero_division=0))
    assert found["matthews"] == pytest.approx(twin.matthews_corrcoef(labels, predictions))
    assert metrics.f1_micro(predictions, labels) == pytest.approx(found["accuracy"])


def test_scikit_learn_twin_for_matrices():
    from sklearn import metrics as twin

    rng = np.random.default_rng(1)
    predictions, labels = rng.integers(0, 2, (30, 4)), rng.integers(0, 2, (30, 4))
    found = compute_metrics("multi-label-classification", predictions, labels)
    assert found["accuracy"] == pytest.approx(twin.accuracy_score(labels, predictions))
    for average in ("micro", "macro"):
        assert found[f"f1_{average}"] == pytest.approx(twin.f1_score(labels, predictions, average=average))


def test_scipy_twin():
    from scipy import stats

    rng = np.random.default_rng(2)
    predictions, labels = rng.normal(size=50), rng.integers(0, 6, 50)
    found = compute_metrics("regression", predictions, labels)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predictions, labels).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions, labels).statistic)


def test_seqeval_twin():
    from seqeval import metrics as twin

    rng = np.random.default_rng(3)
    rows = [rng.integers(0, 4, (2, length)) for length in (1, 7, 12, 30)]
    found = compute_metrics("token-classification", [r[0] for r in rows], [r[1] for r in rows], TAGS)
    predictions, labels = ([[TAGS[i] for i in row[side]] for row in rows] for side in (0, 1))
    assert 0 < found["f1"] < 1
    assert found["f1"] == pytest.approx(twin.f1_score(labels, predictions))
    assert found["precision"] == pytest.approx(twin.precision_score(labels, predictions))
    assert found["recall"] == pytest.approx(twin.recall_score(labels, predictions))
    assert found["accuracy"] == pytest.approx(twin.accuracy_score(labels, predictions))


def squad(prediction, reference):
    """(exact match, F1) step by step, as the script that came with SQuAD 2.0 describes it."""
    import collections
    import re
    import string

    def normal(text):
        text = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
        return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split())

    found, wanted = normal(prediction).split(), normal(reference).split()
    same = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    if not found or not wanted:
        return int(normal(prediction) == normal(reference)), int(found == wanted)
    precision, recall = same / len(found), same / len(wanted)
    f1 = 0 if same == 0 else 2 * precision * recall / (precision + recall)
    return int(normal(prediction) == normal(reference)), f1


def test_squad_twin():
    cases = [
        ("The Norman conquest", "norman Conquest", 1, 1),
        ("in the 10th and 11th centuries", "10th and 11th centuries", 0, 2 * 4 / (5 + 4)),
        ("a a b b b", "b b a", 0, 1 * 2 * 2 / (3 + 2)),  # articles go, also where they are letters: b b b, b b
        ("theatre an", "the atre", 0, 0),  # whole words alone are articles
        ("U.S.", "us", 1, 1),
        ("1,000", "1000", 1, 1),
        ("well-known", "well known", 0, 0),  # wellknown
        ("", "", 1, 1),
        ("the", "a.", 1, 1),
        ("", "x", 0, 0),
        ("café", "CAFÉ", 1, 1),
        ("«oui»", "oui", 0, 0),  # only ASCII punctuation goes
        ("x  \t\n y", "x y", 1, 1),
        ("the-cat", "cat", 0, 0),  # punctuation goes first: thecat
    ]
    for prediction, reference, exact, f1 in cases:
        assert squad(prediction, reference) == (exact, pytest.approx(f1)), prediction
        assert metrics.exact_match([prediction], [reference]) == exact, prediction
        assert metrics.token_f1([prediction], [reference]) == pytest.approx(f1), prediction
    predictions, references, exact, f1 = zip(*cases, strict=True)
    found = compute_metrics("causal-lm", predictions, references)
    assert found["exact_match"] == pytest.approx(np.mean(exact))
    assert found["f1"] == pytest.approx(np.mean(f1))


@settings(max_examples=100, deadline=None)
@given(*[st.text(st.sampled_from("aA bt.-the\n\u00a0é "), max_size=12)] * 2)
def test_squad_twin_for_any_text(prediction, reference):
    pair = metrics.exact_match([prediction], [reference]), metrics.token_f1([prediction], [reference])
    assert pair == pytest.approx(squad(prediction, reference))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20), st.randoms())
def test_order_of_rows_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    first = compute_metrics("sequence-classification", *zip(*rows, strict=True))
    second = compute_metrics("sequence-classification", *zip(*shuffled, strict=True))
    assert first == pytest.approx(second)
    assert all(0 <= value <= 1 for name, value in first.items() if name != "matthews")


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        ("sequence-classification", [0, 1], [0], r"shape \(2,\), labels \(1,\)"),
        ("sequence-classification", [], [], r"shape \(0,\)"),
        (
            "sequence-classification",
            [0, 3],
            [0, 1],
            "predictions row 1 is 3: expected a whole number, 0 to 2",
        ),
        ("sequence-classification", [0, 1], [0, -1], "labels row 1 is -1"),
        ("sequence-classification", [0, -100], [0, 1], "predictions row 1 is -100"),
        ("sequence-classification", [0, 0.7], [0, 1], "predictions row 1 is 0.7"),
        ("sequence-classification", [0, math.nan], [0, 1], "predictions row 1 is nan"),
        ("sequence-classification", ["0", "1"], [0, 1], "predictions must be numbers"),
        ("sequence-classification", [[0.1, 0.2, 0.7]], [2], "argmax"),
        ("sequence-classification", [[0, 1, 1]], [[0, 1, 1]], "does not fit sequence-classification"),
        ("sequence-classification", [0, 1], [-100, -100], "nothing to score"),
        ("multi-label-classification", [[0, 1, 2]], [[0, 1, 1]], "predictions row 0 is 2"),
        ("multi-label-classification", [0, 1], [0, 1], "does not fit multi-label-classification"),
        ("regression", [1.0, math.nan], [1.0, 2.0], "predictions row 1 is nan"),
        ("regression", [1.0, math.inf], [1.0, 2.0], "predictions row 1 is inf"),
        ("regression", [1.0, None], [1.0, 2.0], "predictions must be numbers"),
        ("token-classification", [[0]], [[0], [1]], "row 1: no predictions for 1 labels"),
        ("token-classification", [[0], [0, 1]], [[0], [1]], "row 1: 2 predictions for 1 labels"),
        ("token-classification", [[0], [7]], [[0], [1]], "sentence 1: predictions row 0 is 7"),
        ("token-classification", [[0]], [[-100]], "nothing to score"),
        ("token-classification", [], [], "nothing to score"),
        ("causal-lm", ["a"], ["a", "b"], "row 1: a prediction without a reference"),
        ("causal-lm", ["a", "b"], ["a"], "row 1: a prediction without a reference"),
        ("causal-lm", [], [], "predictions must be a list of texts, at least one"),
        ("causal-lm", ["a", None], ["a", "b"], r"predictions must be .*got \['a', None\]"),
        ("causal-lm", ["a"], [3], r"references must be .*got \[3\]"),
        ("causal-lm", "a", "a", "predictions must be a list of texts"),
        ("translation", [0], [0], "unknown task 'translation'"),
    ],
)
def test_bad_input(task, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(task, predictions, labels, ["a", "b", "c"])


def test_no_texts_are_no_valid_json():
    with pytest.raises(ValueError, match="at least one"):
        metrics.valid_json([])


def test_bad_tags():
    with pytest.raises(ValueError, match=r"row 0 has the tag 'city'"):
        entity_scores([["O", "city"]], [["O", "O"]])
    with pytest.raises(ValueError, match="no tags"):
        entity_scores([[]], [[]])


def test_scores_without_evaluate_and_datasets():
    program = """
import sys
sys.modules["evaluate"] = sys.modules["datasets"] = None  # importing either now fails
from ftlib.tasks.metrics import compute_metrics
print(compute_metrics("sequence-classification", [0, 1], [0, 0])["accuracy"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "0.5\n", done.stderr
