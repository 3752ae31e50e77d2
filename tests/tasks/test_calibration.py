"""Calibration error, reliability and temperature: numbers worked out by hand, and scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ftlib.tasks.calibration import calibration_error, reliability, temperature


def too_sure(n=400, classes=3, seed=0):
    """Logits three times as large as they should be, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return 3 * logits, np.array([rng.choice(classes, p=own) for own in shares])


def softmax(logits):
    return torch.tensor(logits).softmax(-1).numpy()


def test_calibration_error_by_hand():
    # bins (0.5, 0.6], (0.6, 0.8], (0.8, 1]: the first and the last of five have rows
    probabilities = [[0.55, 0.45], [0.6, 0.4], [0.1, 0.9], [0.05, 0.95], [0.0, 1.0]]
    labels = [0, 1, 1, 1, 0]
    found = reliability(probabilities, labels, bins=5)
    assert np.allclose(found.confidence, [0.575, (0.9 + 0.95 + 1) / 3]) and found.rows.tolist() == [2, 3]
    assert np.allclose(found.accuracy, [1 / 2, 2 / 3])
    by_hand = 2 / 5 * abs(0.5 - 0.575) + 3 / 5 * abs(2 / 3 - 2.85 / 3)
    assert calibration_error(probabilities, labels, bins=5) == pytest.approx(by_hand)
    assert calibration_error([[0.5, 0.5], *probabilities], [-100, *labels], bins=5) == pytest.approx(by_hand)


def test_reliability_is_scikit_learns_calibration_curve():
    from sklearn.calibration import calibration_curve

    logits, labels = too_sure()
    probabilities = softmax(logits)
    found = reliability(torch.tensor(probabilities), torch.tensor(labels), bins=10)
    right = probabilities.argmax(1) == labels
    accuracy, confidence = calibration_curve(right, probabilities.max(1), n_bins=10)
    assert np.allclose(found.accuracy, accuracy) and np.allclose(found.confidence, confidence)
    assert found.rows.sum() == 400


def test_temperature_is_what_lbfgs_finds_and_what_was_put_in():
    logits, labels = too_sure()
    found = temperature(logits, labels)
    power = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([power], line_search_fn="strong_wolfe", tolerance_grad=1e-12, max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(torch.tensor(logits) / power.exp(), torch.tensor(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert found == pytest.approx(power.exp().item(), rel=1e-5)
    assert found == pytest.approx(3, rel=0.15)  # by how much they were too large
    before, after = (calibration_error(softmax(values), labels) for values in (logits, logits / found))
    assert after < before / 2


def test_temperature_is_scikit_learns():
    calibration = pytest.importorskip("sklearn", minversion="1.8").calibration
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.frozen import FrozenEstimator

    class Logits(ClassifierMixin, BaseEstimator):
        def fit(self, x, y):
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, x):
            return x

        def predict(self, x):
            return x.argmax(1)

    logits, labels = too_sure()
    fitted = FrozenEstimator(Logits().fit(logits, labels))
    theirs = calibration.CalibratedClassifierCV(fitted, method="temperature").fit(logits, labels)
    ours = softmax(logits / temperature(logits, labels))
    assert np.allclose(theirs.predict_proba(logits), ours, atol=1e-5)


def test_temperature_by_hand():
    # two of three right, each with logits (2, 0): best where the odds are 2 to 1, 2 / T = ln 2
    assert temperature([[2.0, 0.0]] * 3, [0, 0, 1]) == pytest.approx(2 / math.log(2))
    assert temperature([[0.2, 0.0]] * 3, [0, 0, 1]) == pytest.approx(0.2 / math.log(2))
    assert temperature([[2e4, 0.0]] * 3, [0, 0, 1]) == pytest.approx(2e4 / math.log(2))  # exp(2e4) is inf


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: temperature([[2.0, 0.0], [0.0, 1.0]], [0, 1]), "get every row right"),
        (lambda: temperature([[2.0, 0.0]] * 3, [1, 1, 0]), "none better than chance"),
        (lambda: temperature([[2.0, math.nan]], [1]), "row 0 is .*nan.*: expected finite"),
        (lambda: temperature([[2.0, 0.0]], [2]), "labels row 0 is 2: expected a class, 0 to 1"),
        (lambda: temperature([[2.0, 0.0]], [0.5]), "labels row 0 is 0.5"),
        (lambda: temperature([2.0, 0.0], [0, 1]), "expected \\(n, classes\\)"),
        (lambda: temperature([[2.0, 0.0]], [-100]), "no label other than -100"),
        (lambda: reliability([[0.5, 0.5], [2.0, 0.0]], [-100, 0]), "row 1 is .*: expected a sum of 1; of logits take"),
        (lambda: calibration_error([[1.5, -0.5]], [0]), "expected a sum of 1"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
