"""Near-duplicates against Jaccard's similarity of all pairs; label errors against Northcutt's rule by hand."""

import random

import numpy as np
import pytest

from ftlib.inputs.cleaning import confident_errors, near_duplicates

WORDS = "the a film is good bad great dull we you book flight from to boston denver and not very plot fun".split()


def grams(text, n=5):
    text = " ".join(text.lower().split())
    return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}


def jaccard(a, b):
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def texts(count, seed):
    drawn = random.Random(seed)
    found = [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 9))) for _ in range(count)]
    return found + [text.replace(drawn.choice(text.split()), drawn.choice(WORDS)) for text in found]


@pytest.mark.parametrize("least", [1.0, 0.9, 0.7, 0.5, 0.2, 0.04])
def test_all_pairs_are_found_and_no_others(least):
    first, second = texts(30, 0), texts(25, 1) + texts(30, 0)[40:]
    every = {(i, j): jaccard(a, b) for i, a in enumerate(first) for j, b in enumerate(second)}
    wanted = {pair: alike for pair, alike in every.items() if alike >= least}
    found = near_duplicates(first, second, least=least)
    assert len(wanted) >= 20 and {pair[:2]: pair[2] for pair in found} == pytest.approx(wanted)
    assert [pair[2] for pair in found] == sorted((pair[2] for pair in found), reverse=True)
    within = near_duplicates(first, least=least)
    alike = {(i, j) for i in range(60) for j in range(i + 1, 60) if jaccard(first[i], first[j]) >= least}
    assert len(alike) == len(within) and {pair[:2] for pair in within} == alike


def test_by_hand():
    # "good film" and "good films": 5 stretches and 6, 5 of them shared; capitals and white space don't count
    assert near_duplicates(["Good  film"], ["bad", "good films"]) == [(0, 1, pytest.approx(5 / 6))]
    assert near_duplicates(["Good  film"], ["good films"], least=0.9) == []
    assert near_duplicates(["good film"], ["goof film"], least=0.1, n=2) == [(0, 0, pytest.approx(6 / 10))]
    assert near_duplicates(["ok", "OK", "no"]) == [(0, 1, 1.0)]  # shorter than a stretch


def test_near_duplicates_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"least=1\.2"):
        near_duplicates(["a"], least=1.2)
    with pytest.raises(ValueError, match="lists of texts"):
        near_duplicates("a text")


def test_label_errors_by_hand():
    probabilities = [
        [0.9, 0.1, 0.0],  # 0, sure
        [0.7, 0.2, 0.1],  # 0
        [0.2, 0.7, 0.1],  # labeled 0, is 1
        [0.1, 0.8, 0.1],  # 1
        [0.5, 0.5, 0.0],  # 1: 0.5 is less than class 0's mean, and class 1's: in none
        [0.3, 0.1, 0.6],  # 2
        [0.65, 0.05, 0.3],  # labeled 2, is 0
        [0.9, 0.1, 0.0],  # no label
    ]
    labels = [0, 0, 0, 1, 1, 2, 2, -100]
    # thresholds: (0.9 + 0.7 + 0.2) / 3 = 0.6, (0.8 + 0.5) / 2 = 0.65, (0.6 + 0.3) / 2 = 0.45
    assert confident_errors(probabilities, labels) == [
        {"row": 2, "label": 0, "suggested": 1, "probability": 0.2},
        {"row": 6, "label": 2, "suggested": 0, "probability": 0.3},
    ]


def test_of_several_classes_that_a_row_is_in_the_likeliest_counts():
    # thresholds 0.45 and 0.35: row 3 is in both; a class that no row is labeled as suggests nothing
    probabilities = [[0.5, 0.2, 0.3], [0.3, 0.3, 0.4], [0.4, 0.5, 0.1], [0.45, 0.4, 0.15], [0.0, 0.1, 0.9]]
    found = confident_errors(probabilities, [0, 1, 1, 0, 1])
    # class 0: (0.5 + 0.45) / 2 = 0.475; class 1: (0.3 + 0.5 + 0.1) / 3 = 0.3
    assert found == [{"row": 3, "label": 0, "suggested": 1, "probability": 0.45}]


def test_wrong_labels_are_found_among_many():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    features = rng.normal(size=(400, 4)) + 2.5 * truth[:, None]
    wrong = rng.choice(400, 40, replace=False)
    labels = truth.copy()
    labels[wrong] = 1 - labels[wrong]
    shares = cross_val_predict(LogisticRegression(), features, labels, cv=5, method="predict_proba")
    found = confident_errors(shares, labels)
    rows = {row["row"] for row in found}
    assert len(rows & set(wrong)) >= 25 and len(rows - set(wrong)) <= 4
    assert all(row["suggested"] != row["label"] == labels[row["row"]] for row in found)


def test_label_errors_names_what_is_wrong():
    with pytest.raises(ValueError, match="labels row 1 is 2"):
        confident_errors([[0.5, 0.5], [0.1, 0.9]], [0, 2])
