"""Every record of a run reaches what asks for it, and the boards get its numbers under their names."""

import sys
from types import SimpleNamespace

import pytest
from test_fit import make_rows, quick

from ftlib.engine.fit import fit
from ftlib.show import logging

RECORDS = [
    {"step": 1, "loss": 0.7, "learning_rate": 0.01, "skipped": [3]}, {"step": 1, "eval_loss": 0.6, "eval_accuracy": 1.0}
]  # fmt: skip
EXPECTED = [
    (1, "train/loss", 0.7), (1, "train/learning_rate", 0.01), (1, "eval/loss", 0.6), (1, "eval/accuracy", 1.0)
]  # fmt: skip


def test_fit_hands_every_record_on_as_it_comes(tiny_model):
    seen, lengths = [], []
    model, rows = tiny_model(), make_rows(8)

    def note(record):
        seen.append(record)
        lengths.append(len(model_run()))

    model_run = lambda: [record for record in seen if "loss" in record]  # noqa: E731
    run = fit(model, rows, eval_dataset=make_rows(4), config=quick(), on_record=note)
    assert seen == run.history and lengths == [1, 2, 2, 3, 4, 4]  # two steps an epoch, then an evaluation
    with pytest.raises(TypeError, match="on_record is 'tensorboard'; pass a function"):
        fit(tiny_model(), rows, config=quick(), on_record="tensorboard")


def test_tensorboard(monkeypatch, tmp_path):
    written = []
    add = lambda name, value, step: written.append((step, name, value))  # noqa: E731
    writer = SimpleNamespace(add_scalar=add, flush=lambda: None)
    board = SimpleNamespace(SummaryWriter=lambda folder: written.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    write = logging.tensorboard(str(tmp_path))
    for record in RECORDS:
        write(record)
    assert written == [str(tmp_path), *EXPECTED]


def test_trackio(monkeypatch):
    logged = []
    board = SimpleNamespace(
        init=lambda **options: logged.append(options),
        log=lambda numbers, step: logged.extend((step, name, value) for name, value in numbers.items()),
    )
    monkeypatch.setitem(sys.modules, "trackio", board)
    write = logging.trackio("films", name="first")
    for record in RECORDS:
        write(record)
    assert logged == [{"project": "films", "name": "first"}, *EXPECTED]
