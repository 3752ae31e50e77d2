"""The learning-rate range test."""

import pytest
import torch

from ftlib.engine.range_test import find_learning_rate
from ftlib.engine.settings import TrainConfig

ROWS = [{"input_ids": [2, 5 + i % 20, 3], "labels": i % 2} for i in range(16)]
QUICK = TrainConfig(batch_size=8, progress=False, warmup_fraction=0.5, epochs=1, patience=None)


def test_rates_rise_and_the_model_stays(tiny_model):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = find_learning_rate(model, ROWS, highest=0.1, steps=12, config=QUICK)
    assert found.rates == pytest.approx([0.1 * 1e-5 ** (1 - step / 12) for step in range(12)])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert found == find_learning_rate(model, ROWS, highest=0.1, steps=12, config=QUICK)  # the same seed


def test_smoothing_and_suggestion_by_hand(tiny_model):
    found = find_learning_rate(tiny_model(), ROWS, steps=10, config=QUICK)
    for count in (1, 2, 10):
        weights = [0.9 ** (count - 1 - i) for i in range(count)]
        mean = sum(w * loss for w, loss in zip(weights, found.losses, strict=False)) / sum(weights)
        assert found.smoothed[count - 1] == pytest.approx(mean)
    lowest = found.smoothed.index(min(found.smoothed))
    assert found.suggestion == found.rates[lowest] / 10


def test_plot_and_refusals(tiny_model):
    ax = find_learning_rate(tiny_model(), ROWS, steps=10, config=QUICK).plot()
    assert ax.get_xlabel() == "learning rate" and ax.get_xscale() == "log" and len(ax.get_lines()) == 3
    for steps in (9, 10.0, True):
        with pytest.raises(ValueError, match=f"steps={steps!r}: need a whole number of at least 10"):
            find_learning_rate(tiny_model(), ROWS, steps=steps)
    with pytest.raises(ValueError, match="learning_rate=-1: need a number from 0"):
        find_learning_rate(tiny_model(), ROWS, highest=-1)
