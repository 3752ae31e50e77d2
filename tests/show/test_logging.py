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


def test_lines_of_a_log(capsys):
    write = logging.lines(every=3)
    for step in range(1, 7):
        write({"step": step, "epoch": step / 3, "loss": 0.5, "learning_rate": 5e-5, "seconds": 1.26, "tokens": 99})
    write({"step": 6, "epoch": 2.0, "eval_loss": 0.25, "eval_accuracy": 1.0})
    write({"step": 7, "epoch": 7 / 3, "loss": float("nan"), "learning_rate": 5e-5, "seconds": 2.0, "skipped": [3, 4]})
    assert capsys.readouterr().out.splitlines() == [
        "step 1  epoch 0.33  loss 0.5  learning_rate 5e-05  seconds 1.3",
        "step 3  epoch 1.00  loss 0.5  learning_rate 5e-05  seconds 1.3",
        "step 6  epoch 2.00  loss 0.5  learning_rate 5e-05  seconds 1.3",
        "step 6  epoch 2.00  eval_loss 0.25  eval_accuracy 1",
        "step 7  epoch 2.33  loss nan  learning_rate 5e-05  seconds 2.0  skipped",
    ]


def test_every_record_of_a_run_makes_a_line(tiny_model, capsys):
    fit(tiny_model(), make_rows(8), eval_dataset=make_rows(4), config=quick(), on_record=logging.lines(every=1))
    found = [line.split()[1::2] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [step for step, *_ in found] == ["1", "2", "2", "3", "4", "4"]


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
