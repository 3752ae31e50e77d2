"""`fit` takes the steps of the stock Trainer, keeps its promises about state, and survives what goes wrong."""

import math

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junk import ROWS
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.core.device import choose_precision
from ftlib.core.loop import schedule_factor
from ftlib.engine import fit as training
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate, labeled, metric_names
from ftlib.engine.settings import Run, TrainConfig
from ftlib.inputs.rows import Rows, rows_for
from ftlib.methods.losses import focal_loss
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import unpad

CPU = torch.device("cpu")


def make_rows(count=16, task="sequence-classification", seed=0, shortest=1, longest=9):
    """Rows of ragged lengths with random ids and labels."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: E731
    rows = []
    for _ in range(count):
        length = int(draw(shortest, longest + 1))
        ids = draw(5, 60, length).tolist()
        labels = {
            "sequence-classification": lambda: int(draw(0, 2)),
            "token-classification": lambda n=length: [-100 if x == 3 else x for x in draw(0, 4, n).tolist()],
            "multi-label-classification": lambda: draw(0, 2, 3).float().tolist(),
            "regression": lambda: float(draw(0, 50)) / 10,
        }[task]()
        rows.append({"input_ids": ids, "labels": labels})
    return rows


LABELS = {"sequence-classification": 2, "token-classification": 3, "multi-label-classification": 3, "regression": 1}


def quick(**options):
    return TrainConfig(**{"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "progress": False} | options)


def before_steps(patch, do):
    """Have `do(number, step)` called where the gradient of a step (from 0) is to be computed."""
    real = training.steps

    def watched(*args, gradient, **options):
        return real(*args, gradient=lambda model, step: [do(step.number, step), gradient(model, step)][1], **options)

    patch.setattr(training, "steps", watched)


def steps(run, key="loss"):
    return [record[key] for record in run.history if key in record]


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ------------------------------------------------------------------------------------------ the Trainer's numbers


@pytest.mark.parametrize(
    ("task", "schedule", "unpadded"),
    [
        ("sequence-classification", "linear", False),
        ("sequence-classification", "cosine", True),
        ("token-classification", "linear", True),
        ("token-classification", "constant", False),
    ],
)
def test_fit_is_the_stock_trainer(tiny_model, tmp_path, task, schedule, unpadded):
    rows = make_rows(14, task)
    stock, ours = (tiny_model(task, LABELS[task]) for _ in range(2))
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1,
        warmup_steps=0.1, max_grad_norm=0.5, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = transformers.Trainer(stock, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    theirs = [record for record in trainer.state.log_history if "loss" in record]
    if unpadded:
        unpad(ours)
    config = quick(
        epochs=3, schedule=schedule, weight_decay=0.1, warmup_fraction=0.1, max_grad_norm=0.5, shuffle=False
    )  # fmt: skip
    run = fit(ours, rows, config=config)
    assert len(theirs) == run.steps == 12
    assert_close(torch.tensor(steps(run)), torch.tensor([r["loss"] for r in theirs]), atol=1e-5, rtol=1e-5)
    assert steps(run, "learning_rate") == pytest.approx([r["learning_rate"] for r in theirs], rel=1e-6)
    assert steps(run, "grad_norm") == pytest.approx([r["grad_norm"] for r in theirs], rel=1e-3, abs=1e-5)
    assert steps(run, "epoch") == pytest.approx([r["epoch"] for r in theirs])
    for (name, expected), found in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=name)


def test_label_smoothing_is_the_stock_one(tiny_model, tmp_path):
    rows = make_rows(8, "token-classification")
    stock, ours = (tiny_model("token-classification", 3) for _ in range(2))
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
        label_smoothing_factor=0.2,
    )  # fmt: skip
    trainer = transformers.Trainer(stock, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    theirs = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    run = fit(
        ours, rows, config=quick(epochs=1, shuffle=False, warmup_fraction=0.0, weight_decay=0.0, label_smoothing=0.2)
    )
    assert steps(run) == pytest.approx(theirs, abs=1e-5)


# -------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("task", LABELS)
def test_cutting_a_step_changes_nothing(tiny_model, task):
    rows = make_rows(32, task)
    results = []
    for cut in ({}, {"micro_batch_size": 8}, {"micro_batch_size": 3}, {"max_tokens": 20}):
        model = tiny_model(task, LABELS[task])
        run = fit(model, rows, config=quick(batch_size=32, epochs=3, learning_rate=1e-3, warmup_fraction=0.0, **cut))
        results.append((torch.tensor(steps(run)), torch.tensor(steps(run, "grad_norm")), weights(model)))
    for loss, norm, state in results[1:]:
        assert_close(loss, results[0][0], atol=1e-6, rtol=1e-6)
        assert_close(norm, results[0][1], atol=1e-5, rtol=1e-5)
        # AdamW divides by the root of tiny second moments, so weights drift a little more than gradients
        for name in state:
            assert_close(state[name], results[0][2][name], atol=1e-4, rtol=0, msg=name)


def test_cutting_a_step_changes_no_sgd_weight(tiny_model):
    rows = make_rows(32, "token-classification")
    states = []
    for cut in ({}, {"micro_batch_size": 8}, {"max_tokens": 20}):
        model = tiny_model("token-classification", 3)
        fit(model, rows, config=quick(batch_size=32, epochs=3, optimizer="sgd", warmup_fraction=0.0, **cut))
        states.append(weights(model))
    for state in states[1:]:
        for name in state:
            assert_close(state[name], states[0][name], atol=1e-6, rtol=0, msg=name)


def test_micro_batches_keep_the_limit(tiny_model):
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    fit(model, make_rows(20), config=quick(batch_size=20, epochs=1, max_tokens=18))
    assert max(rows * width for rows, width in seen) <= 18 and sum(rows for rows, _ in seen) == 20


def test_the_loss_of_a_step_is_the_mean_over_its_items(tiny_model):
    rows = make_rows(4, "token-classification")
    model = tiny_model("token-classification", 3)
    batch = collate(rows)
    with torch.no_grad():
        expected = model(**batch).loss
    run = fit(model, rows, config=quick(epochs=1, micro_batch_size=1))
    assert steps(run) == pytest.approx([float(expected)], abs=1e-6)


# ------------------------------------------------------------------------------------------------- what a run has


def test_records_of_a_run(tiny_model):
    rows = make_rows(10)
    run = fit(tiny_model(), rows, eval_dataset=make_rows(6, seed=1), config=quick(epochs=2, eval_every=2))
    taken = [record for record in run.history if "loss" in record]
    assert [set(record) for record in taken] == [
        {"step", "epoch", "loss", "learning_rate", "grad_norm", "examples", "tokens", "micro_batches", "seconds"}
    ] * 6
    assert [record["step"] for record in taken] == [1, 2, 3, 4, 5, 6] and run.steps == 6
    assert [record["examples"] for record in taken] == [4, 4, 2, 4, 4, 2]
    assert sum(record["tokens"] for record in taken[:3]) == sum(len(row["input_ids"]) for row in rows)
    seconds = [record["seconds"] for record in taken]
    assert seconds == sorted(seconds) and 0 < seconds[-1] <= run.seconds
    evaluated = [record for record in run.history if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [2, 4, 6]
    assert {f"eval_{name}": value for name, value in run.metrics.items()}.items() <= evaluated[-1].items()
    assert run.stopped == "finished" and run.precision == "fp32" and run.reason == choose_precision(CPU)[1]
    assert steps(run, "micro_batches") == [1] * 6 and (run.micro_batch_size, run.max_tokens) == (None, None)
    assert 50 < run.peak_memory_mb < 50_000  # torch alone takes some hundred
    assert steps(run, "learning_rate") == pytest.approx([1e-2 * schedule_factor(s, 6, warmup=1) for s in range(6)])


def test_evaluation_comes_after_every_epoch_and_at_the_end(tiny_model):
    run = fit(tiny_model(), make_rows(10), eval_dataset=make_rows(4), config=quick(epochs=2))
    assert [record["step"] for record in run.history if "eval_loss" in record] == [3, 6]
    cut = fit(tiny_model(), make_rows(10), eval_dataset=make_rows(4), config=quick(max_steps=4))
    assert [record["step"] for record in cut.history if "eval_loss" in record] == [3, 4]
    assert cut.steps == 4 and steps(cut, "learning_rate")[-1] == pytest.approx(1e-2 / 3)
    longer = fit(tiny_model(), make_rows(10), config=quick(epochs=1, max_steps=7))
    assert longer.steps == 7


def test_fewer_rows_than_a_batch(tiny_model):
    run = fit(tiny_model(), make_rows(3), config=quick(batch_size=32, epochs=2))
    assert run.steps == 2 and steps(run, "examples") == [3, 3]
    assert fit(tiny_model(), make_rows(1), config=quick(epochs=1, micro_batch_size=5)).steps == 1


def test_every_row_once_an_epoch_in_a_new_order(tiny_model):
    rows = [{"input_ids": [5 + i], "labels": 0} for i in range(20)]
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.extend(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    fit(model, rows, config=quick(epochs=2))
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(5, 25)) and seen[:20] != seen[20:]
    del seen[:]
    fit(model, rows, config=quick(epochs=1, shuffle=False))
    assert seen == list(range(5, 25))


def test_training_learns_and_plot_draws(tiny_model):
    pytest.importorskip("matplotlib").use("Agg")
    rows = [{"input_ids": [2, 5 + i % 2, 3], "labels": i % 2} for i in range(32)]
    model = unpad(tiny_model())
    run = fit(model, rows, eval_dataset=rows, config=quick(epochs=15, batch_size=8, learning_rate=0.03))
    assert steps(run)[0] > 0.6 and steps(run)[-1] < 0.1 and run.metrics["accuracy"] == 1.0
    assert run.plot().lines
    assert Run(TrainConfig()).metrics == {}


# --------------------------------------------------------------------------------------------------------- seeds


def test_a_seed_reproduces_bit_for_bit_and_global_state_stays(tiny_model):
    rows, states, runs = make_rows(12), [], []
    for seed, ambient in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        model = tiny_model(hidden_dropout_prob=0.2)
        runs.append(fit(model, rows, eval_dataset=rows, config=quick(seed=seed)))
        states.append(weights(model))
        assert torch.equal(torch.get_rng_state(), before)
    assert same(states[0], states[1]) and steps(runs[0]) == steps(runs[1])
    assert not same(states[0], states[2])


def test_evaluating_does_not_change_training(tiny_model):
    rows, states = make_rows(12), []
    for every, options in ((None, {}), (1, {"eval_dataset": make_rows(5, seed=3)})):
        model = tiny_model(hidden_dropout_prob=0.2)
        fit(model, rows, config=quick(eval_every=every), **options)
        states.append(weights(model))
    assert same(*states)


@pytest.mark.parametrize("trains", [True, False])
def test_modes_come_back(tiny_model, trains):
    model = tiny_model().train(trains)
    model.bert.pooler.train(not trains)
    fit(model, make_rows(4), eval_dataset=make_rows(4), config=quick(epochs=1))
    assert model.training == model.bert.encoder.training == trains and model.bert.pooler.training != trains
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mine"):
        fit(model, make_rows(4), config=quick(epochs=1), loss=raising(RuntimeError("mine")))
    assert model.training == trains and model.bert.pooler.training != trains
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def counted(monkeypatch):
    """Own losses are called once a micro-batch, so that a test can count the calls."""
    monkeypatch.setattr(training.task_gradients.Losses, "_look", lambda *given: None)


def raising(error, at=1, loss=None):
    """A loss that fails the `at`-th time it is called."""
    calls = []

    def work(logits, labels):
        calls.append(1)
        if len(calls) == at:
            raise error
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    return work


# ---------------------------------------------------------------------------------------------- early stopping


def test_early_stopping_keeps_the_best_weights(tiny_model, monkeypatch):
    scores = iter([0.5, 0.7, 0.6, 0.65, 0.9])
    seen = []

    def pretend(model, dataset, **options):
        seen.append(weights(model))
        return {"accuracy": next(scores), "loss": 1.0}

    monkeypatch.setattr(training, "scores", pretend)
    model = tiny_model()
    config = quick(epochs=10, patience=2, metric="accuracy")
    run = fit(model, make_rows(8), eval_dataset=make_rows(4), config=config)
    assert run.stopped == "early stopping" and run.steps == 8 and len(seen) == 4
    assert run.metrics["accuracy"] == 0.7
    assert same(weights(model), seen[1]) and not same(weights(model), seen[3])


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("loss", [0.5, 0.4, 0.6, 0.7], 1),
        ("mse", [0.5, 0.6, 0.7], 0),
        ("pearson", [float("nan"), 0.1, 0.0, 0.05], 1),  # a metric that is not a number is the worst
        ("pearson", [0.3, float("nan"), 0.2], 0),
    ],
)
def test_which_way_is_better(tiny_model, monkeypatch, metric, values, best):
    given_values, seen = iter(values), []

    def pretend(model, dataset, **options):
        seen.append(weights(model))
        return {metric: next(given_values)}

    monkeypatch.setattr(training, "scores", pretend)
    model, rows = tiny_model("regression", 1), make_rows(8, "regression")
    run = fit(model, rows, eval_dataset=rows[:4], config=quick(epochs=9, patience=2, metric=metric))
    assert run.stopped == "early stopping" and len(seen) == len(values)
    assert run.metrics[metric] == values[best] and same(weights(model), seen[best])


def test_the_best_weights_are_kept_even_when_the_run_ends(tiny_model, monkeypatch):
    scores, seen = iter([0.9, 0.1]), []

    def pretend(model, dataset, **options):
        seen.append(weights(model))
        return {"accuracy": next(scores)}

    monkeypatch.setattr(training, "scores", pretend)
    model = tiny_model()
    config = quick(epochs=2, patience=5, metric="accuracy")
    run = fit(model, make_rows(8), eval_dataset=make_rows(4), config=config)
    assert run.stopped == "finished" and run.metrics == {"accuracy": 0.9} and same(weights(model), seen[0])


def test_metrics_that_are_not_there(tiny_model):
    with pytest.raises(ValueError, match="metric='f2': evaluation gives loss, accuracy"):
        fit(tiny_model(), make_rows(4), eval_dataset=make_rows(4), config=quick(patience=1, metric="f2"))
    with pytest.raises(ValueError, match="patience needs eval_dataset"):
        fit(tiny_model(), make_rows(4), config=quick(patience=1))
    with pytest.raises(ValueError, match="eval_every=2 needs eval_dataset"):
        fit(tiny_model(), make_rows(4), config=quick(eval_every=2))
    with pytest.warns(UserWarning, match="metric='f2' has no effect without patience") as said:
        fit(tiny_model(), make_rows(4), eval_dataset=make_rows(4), config=quick(metric="f2", epochs=1))
    assert said[0].filename == __file__


@pytest.mark.parametrize("task", [*LABELS, "entities", "several"])
def test_the_names_of_the_metrics_are_known_before_the_first_step(tiny_model, task):
    """Those that `evaluate` gives; found without a forward pass, and a missing one is refused before any."""
    rows = make_rows(9, task if task in LABELS else "token-classification")
    model = tiny_model(task, LABELS[task]) if task in LABELS else tiny_model("token-classification", 3)
    if task == "entities":
        model.config.id2label = {0: "O", 1: "B-city", 2: "I-city"}
    if task == "several":
        model = MultiTaskModel(tiny_model("encoder"), {"a": Head("token-classification", 3), "b": Head()})
        rows = [{**row, "labels": {"a": row["labels"]}} for row in rows]  # "b" has no row to be scored on
    assert metric_names(model, rows_for(rows, model, name="rows")) == list(evaluate(model, rows))
    model.register_forward_hook(lambda *given: pytest.fail("a forward pass"))
    with pytest.raises(ValueError, match=r"metric='acuracy': evaluation gives .*loss"):
        fit(model, rows, eval_dataset=rows, config=quick(patience=1, metric="acuracy"))
    for row in rows:
        row["labels"] = {"a": [-100] * len(row["input_ids"])} if task == "several" else -100
    if task in ("sequence-classification", "several"):
        with pytest.raises(ValueError, match="eval_dataset: every label is -100"):
            fit(model, make_rows(4) if task != "several" else rows, eval_dataset=rows, config=quick(patience=1))


def test_tags_that_are_not_all_of_entities_are_scored_as_classes(tiny_model):
    """seqeval can't read a "verb", nor BILOU's "L-"; without patience too a wrong set of rows is refused first."""
    model, rows = tiny_model("token-classification", 3), make_rows(9, "token-classification")
    for names in ("O B-city verb", "O B-city L-city"):
        model.config.id2label = dict(enumerate(names.split()))
        run = fit(model, rows, eval_dataset=rows, config=quick(epochs=1))
        assert set(run.metrics) == {"loss", "accuracy", "f1_macro", "precision", "recall"}
    model.register_forward_hook(lambda *given: pytest.fail("a forward pass"))
    ignored = [row | {"labels": [-100] * len(row["labels"])} for row in rows]
    with pytest.raises(ValueError, match="eval_dataset: every label is -100"):
        fit(model, rows, eval_dataset=ignored, config=quick())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "exponential"])
def test_a_run_of_one_step_moves_the_weights(tiny_model, schedule):
    """Its warm-up would be that step, at a rate of 0."""
    model = tiny_model()
    before = weights(model)
    run = fit(model, make_rows(4), config=quick(epochs=1, schedule=schedule))
    assert steps(run, "learning_rate") == [1e-2] and not same(weights(model), before)


# -------------------------------------------------------------------------------------------------------- own losses

_OWN = {
    "a module": lambda how: torch.nn.CrossEntropyLoss(torch.tensor([1.0, 3.0]), reduction=how),
    "a function": lambda how: lambda x, y: torch.nn.functional.cross_entropy(x, y, reduction=how),
    "several labels": lambda how: torch.nn.BCEWithLogitsLoss(reduction=how),
    "numbers": lambda how: torch.nn.SmoothL1Loss(reduction=how),
}
_TASK = {"several labels": "multi-label-classification", "numbers": "regression"}


@pytest.mark.parametrize("name", _OWN)
@pytest.mark.parametrize("micro", [None, 1])
def test_an_own_loss_that_is_a_mean(tiny_model, name, micro):
    """Of torch.nn's modules a copy sums, and it is said; a function is refused on the first batch, rows alone too."""
    task = _TASK.get(name, "sequence-classification")
    rows, config = make_rows(8, task), quick(max_steps=2, micro_batch_size=micro)

    def run(how):
        loss = _OWN[name](how)
        if name == "numbers":
            inner, loss = loss, lambda x, y: inner(x[:, 0], y)
        model = tiny_model(task, LABELS[task])
        return lambda: (steps(fit(model, rows, config=config, loss=loss)), weights(model), loss)

    losses, right, _ = run("sum")()
    for how in ("mean", "none") if name == "a module" else ("mean",):
        go = run(how)
        if name in ("a module", "several labels"):
            with pytest.warns(UserWarning, match=f"Loss has reduction='{how}'.* takes reduction='sum'") as said:
                found, moved, loss = go()
            assert found == losses and same(moved, right) and loss.reduction == how and len(said) == 1
        else:
            with pytest.raises(ValueError, match=r"a mean; fit needs the sum over items, reduction='sum'"):
                go()


def test_looking_at_an_own_loss_changes_nothing(tiny_model, monkeypatch):
    """A loss that draws random numbers draws the same ones; one that is 0 or knows its batch passes."""
    noisy = lambda x, y: torch.nn.functional.cross_entropy(x + torch.randn(2), y, reduction="sum")  # noqa: E731
    found = []
    for look in (training.task_gradients.Losses._look, lambda *given: None):
        with monkeypatch.context() as patch:
            patch.setattr(training.task_gradients.Losses, "_look", look)
            model = tiny_model(hidden_dropout_prob=0.2)
            fit(model, make_rows(8), config=quick(), loss=noisy)
            found.append(weights(model))
    assert same(*found)
    nothing = lambda x, y: x.sum() * 0.0  # noqa: E731
    pairs = lambda x, y: ((x @ x.T).logsumexp(1) - (x * x).sum(1)).sum()  # noqa: E731  each row against all of its batch
    assert fit(tiny_model(), make_rows(8), config=quick(), loss=nothing).stopped == "finished"
    assert fit(tiny_model(), make_rows(8), config=quick(), loss=pairs).stopped == "finished"


def test_an_own_loss_that_pairs_every_row_with_all(tiny_model):
    """(n, 1) against (n,) is n x n differences."""
    rows, model = make_rows(8, "regression"), tiny_model("regression", 1)
    with pytest.raises(ValueError, match=r"pairs logits \(4, 1\) against labels \(4,\): each with all"):
        fit(model, rows, config=quick(), loss=lambda x, y: ((x - y) ** 2).sum())
    own = fit(tiny_model("regression", 1), rows, config=quick(), loss=lambda x, y: ((x[:, 0] - y) ** 2).sum())
    assert steps(own) == pytest.approx(steps(fit(tiny_model("regression", 1), rows, config=quick())), rel=1e-6)


def test_cross_entropy_takes_tags(tiny_model):
    """PyTorch's wants the classes second."""
    rows, loss = make_rows(8, "token-classification"), torch.nn.CrossEntropyLoss(reduction="sum")
    own = fit(tiny_model("token-classification", 3), rows, eval_dataset=rows, config=quick(), loss=loss)
    wanted = fit(tiny_model("token-classification", 3), rows, eval_dataset=rows, config=quick())
    assert steps(own) == pytest.approx(steps(wanted), rel=1e-6)
    assert own.metrics == pytest.approx(wanted.metrics, rel=1e-6)


def test_what_is_idle_is_said(tiny_model):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            return torch.nn.functional.cross_entropy(x * self.temperature, y, reduction="sum")

    with pytest.warns(UserWarning, match="the loss has parameters of its own, which do not train"):
        fit(tiny_model(), make_rows(4), config=quick(epochs=1), loss=Own())
    with pytest.warns(UserWarning, match=r"r_drop=1.0 only costs time: all dropout rates of the model are 0"):
        fit(tiny_model(), make_rows(4), config=quick(epochs=1, r_drop=1.0))
    rows = [row | {"labels": 1.0} for row in make_rows(4)]
    with pytest.warns(UserWarning, match="pearson is not a number at step 1"):
        config = quick(epochs=1, patience=1, metric="pearson")
        fit(tiny_model("regression", 1), rows, eval_dataset=rows, config=config)


def test_label_smoothing_and_an_own_loss(tiny_model):
    """Used where the loss knows it, as in the task's own loss; else refused; evaluation is without it."""
    rows, config = make_rows(12), quick(epochs=1, label_smoothing=0.3)
    own, plain, held_out = torch.nn.CrossEntropyLoss(reduction="sum"), tiny_model(), make_rows(6, seed=1)
    wanted = fit(plain, rows, eval_dataset=held_out, config=config)
    found = fit(tiny_model(), rows, eval_dataset=held_out, config=config, loss=own)
    assert steps(found) == pytest.approx(steps(wanted), rel=1e-6) and own.label_smoothing == 0
    assert found.metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=1e-5)
    for loss in (_OWN["a function"]("sum"), torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)):
        with pytest.raises(ValueError, match=r"label_smoothing=0.3 and an own loss: smooth the labels in the loss"):
            fit(tiny_model(), rows, config=config, loss=loss)


@pytest.mark.parametrize(
    "where", [(training.optimizing, "optimizer"), (training.recovery, "RandomState"), (training, "Feed")]
)
def test_an_interrupt_before_the_first_step_leaves_the_model_whole(tiny_model, monkeypatch, where):
    model = tiny_model(vocab_size=400)
    real = getattr(*where)

    def interrupted(*args, **options):
        real(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, interrupted)
        fit(model, make_rows(4), config=quick())
    embedding = model.get_input_embeddings()
    assert embedding.weight.shape == (400, 16) and not embedding._forward_pre_hooks
    assert same(weights(model), weights(tiny_model(vocab_size=400)))


# ---------------------------------------------------------------------------------------------- when it goes wrong


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupt_gives_the_run_so_far(tiny_model, at):
    model = tiny_model()
    loss = raising(KeyboardInterrupt(), at=at)
    run = fit(model, make_rows(16), config=quick(epochs=2), loss=loss)
    assert run.stopped == "interrupted" and run.steps == at - 1 == len(steps(run))
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("counted")
def test_an_interrupted_run_with_patience_keeps_the_best_weights(tiny_model):
    model = tiny_model()
    run = fit(
        model, make_rows(8), eval_dataset=make_rows(4), config=quick(epochs=9, patience=9),
        loss=raising(KeyboardInterrupt(), at=5),
    )  # fmt: skip
    assert run.stopped == "interrupted" and run.steps == 3 and run.metrics["loss"] == run.history[2]["eval_loss"]


@pytest.mark.usefixtures("counted")
def test_a_failed_run_leaves_a_whole_model_with_what_was_learnt(tiny_model):
    model, twin = tiny_model(), tiny_model()
    config = dict(warmup_fraction=0.0, schedule="constant", weight_decay=0.1)
    with pytest.raises(KeyError):
        fit(model, make_rows(16), config=quick(**config), loss=raising(KeyError(), at=3))
    fit(twin, make_rows(16), config=quick(**config, max_steps=2))
    assert same(weights(model), weights(twin))
    with pytest.raises(KeyError):  # nothing has decayed, nothing is to be put back
        fit(model, make_rows(16), config=quick(**config), loss=raising(KeyError(), at=1))
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_shortcuts_train_the_same_weights(tiny_model, optimizer):
    models, runs = [], []
    for shortcuts in (False, True):
        model = unpad(tiny_model())
        config = quick(optimizer=optimizer, shortcuts=shortcuts, weight_decay=0.1, learning_rate=1e-3)
        runs.append(fit(model, make_rows(40), eval_dataset=make_rows(8, seed=1), config=config))
        models.append(model)
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=1e-5)
    assert runs[1].metrics == pytest.approx(runs[0].metrics, abs=1e-5)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if optimizer == "sgd" or not name.endswith("key.bias"):  # AdamW makes steps of the rounding of a zero gradient
            torch.testing.assert_close(b, a, atol=2e-5, rtol=0, msg=name)


def not_finite(*calls, gradient=False):
    """Cross-entropy, but not finite at these calls: the loss itself, or its gradient alone."""
    count = 0

    def loss(logits, labels):
        nonlocal count
        count += 1
        good = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        if count not in calls:
            return good
        return good + (logits.sum() * 0).sqrt() if gradient else good * math.nan

    return loss


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_is_skipped(tiny_model, optimizer, gradient):
    """As if its rows were not there: no weight, momentum or decay moves."""
    rows = make_rows(20)
    options = dict(epochs=1, shuffle=False, schedule="constant", warmup_fraction=0.0, shortcuts=False)
    config = quick(**options, optimizer=optimizer)
    model, twin = tiny_model(), tiny_model()
    said = r"step 3: loss .*, gradient norm nan on the rows \[8, 9, 10, 11\] of train_dataset; the step is skipped"
    with pytest.warns(UserWarning, match=said) as warned:
        run = fit(model, rows, config=config, loss=not_finite(3, gradient=gradient))
    assert warned[0].filename == __file__
    fit(twin, rows[:8] + rows[12:], config=config)
    assert same(weights(model), weights(twin))
    assert [record.get("skipped") for record in run.history] == [None, None, [8, 9, 10, 11], None, None]
    assert math.isnan(run.history[2]["grad_norm"]) and math.isnan(run.history[2]["loss"]) is not gradient


def test_skipped_rows_are_numbered_in_their_own_dataset(tiny_model):
    data = {"a": make_rows(5), "b": make_rows(6, seed=2)}
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head()})
    with pytest.warns(UserWarning, match="step 1: loss nan"):
        run = fit(model, data, config=quick(epochs=2, batch_size=11), loss=not_finite(1))
    skipped = run.history[0]["skipped"]
    assert set(skipped) == {"a", "b"} and set(skipped["a"]) <= set(range(5)) and set(skipped["b"]) <= set(range(6))


@pytest.mark.usefixtures("counted")
@pytest.mark.filterwarnings("ignore:step .* is skipped")
def test_too_many_steps_that_are_not_finite_stop_the_run(tiny_model, tmp_path):
    rows, seen = make_rows(40), []

    def looking(model, loss):
        return lambda logits, labels: (seen.append(weights(model)), loss(logits, labels))[1]

    options = dict(epochs=1, shortcuts=False, max_bad_steps=3, warmup_fraction=0.0, checkpoint_every=3)
    config = quick(**options, checkpoint_dir=str(tmp_path), resume="auto")
    model, bad = tiny_model(), not_finite(2, 3, 5, 6, 7)
    said = r"step 7: loss nan, .* on the rows \[.*\] of train_dataset, not finite in 3 steps in a row; .*\(0.01\)"
    with pytest.raises(ValueError, match=said):
        fit(model, rows, config=config, loss=looking(model, bad))
    assert len(seen) == 7 and same(weights(model), seen[4]) and not same(seen[4], seen[3])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000006", "step-00000007"]  # its state
    run = fit(model, rows, config=config)  # it goes on from there
    assert run.steps == 10 and [r["step"] for r in run.history if "skipped" in r] == [2, 3, 5, 6, 7]
    twin = tiny_model()
    config = quick(**options | {"checkpoint_every": None, "max_bad_steps": 9})
    fit(twin, rows, config=config, loss=not_finite(2, 3, 5, 6, 7))
    assert same(weights(model), weights(twin))


@pytest.mark.usefixtures("counted")
def test_one_bad_step_stops_where_so_asked_and_so_do_all(tiny_model):
    with pytest.raises(ValueError, match=r"step 3: .* not finite in 1 steps in a row"):
        fit(tiny_model(), make_rows(16), config=quick(max_bad_steps=1), loss=not_finite(3))
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    with (
        pytest.warns(UserWarning, match="step 1: loss nan"),
        pytest.raises(ValueError, match=r"step 2: loss nan.* not finite in 2 steps in a row"),
    ):
        fit(model, make_rows(4), config=quick())


def test_overflow_in_fp16_is_the_scalers(tiny_model, monkeypatch, recwarn):
    """With the scale of 65,536 it begins with, 1,000 times the loss has gradients beyond fp16's 65,504."""
    monkeypatch.setattr(training, "choose_precision", lambda device, wanted: ("fp16", "a test"))
    large = lambda logits, labels: 1e3 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")  # noqa: E731
    model = tiny_model()
    before = weights(model)
    run = fit(model, make_rows(64), config=quick(epochs=1, warmup_fraction=0.0), loss=large)
    norms = [record["grad_norm"] for record in run.history]
    assert len(norms) == 16 and not any(map(math.isfinite, norms[:6])) and all(map(math.isfinite, norms[-3:]))
    assert not any("skipped" in record for record in run.history) and not recwarn
    assert not same(weights(model), before) and all(p.isfinite().all() for p in model.parameters())
    with pytest.warns(UserWarning, match="step 18: "), pytest.raises(ValueError, match=r"step 20: .* 3 steps in a row"):
        always = not_finite(*range(99), gradient=True)  # no scale helps
        fit(model, make_rows(200), config=quick(epochs=1, max_bad_steps=3), loss=always)


def test_a_batch_without_a_label_moves_nothing(tiny_model):
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}] * 4
    model = tiny_model("token-classification", 3)
    before = weights(model)
    with pytest.warns(UserWarning, match="train_dataset: every label is -100 .*, nothing is learned"):
        run = fit(model, rows, config=quick(epochs=1, weight_decay=0.0))
    assert steps(run) == [0.0] and same(weights(model), before)


def test_a_label_that_never_occurs(tiny_model):
    """Its class trains like any other, as one that is never right; the metrics count the classes that occur."""
    rows = [row | {"labels": 2 * row["labels"]} for row in make_rows(12)]  # of 4 classes, 1 and 3 are not there
    model = tiny_model(num_labels=4)
    run = fit(model, rows, eval_dataset=rows, config=quick())
    assert all(map(math.isfinite, [*steps(run), *run.metrics.values()])) and len(run.metrics) > 2
    tags = [row | {"labels": [0] * len(row["input_ids"])} for row in make_rows(4)]
    assert math.isfinite(steps(fit(tiny_model("token-classification", 3), tags, config=quick()))[-1])


def test_one_example_only(tiny_model):
    """Of every kind; an evaluation of it gives numbers, or NaN where one example has none (a correlation)."""
    for task, labels in LABELS.items():
        row = make_rows(1, task)
        run = fit(tiny_model(task, labels), row, eval_dataset=row, config=quick(epochs=3, patience=9))
        assert len(steps(run)) == 3 and steps(run)[-1] < steps(run)[0]
        assert math.isfinite(run.metrics["loss"])


def test_an_ignored_batch_among_others_is_a_step_without_gradient(tiny_model):
    rows = [*make_rows(4), *[row | {"labels": -100} for row in make_rows(4, seed=1)], *make_rows(4, seed=2)]
    model = tiny_model()
    run = fit(model, rows, config=quick(epochs=1, shuffle=False))
    assert steps(run)[1] == 0.0 and steps(run, "grad_norm")[1] == 0.0 and "skipped" not in run.history[1]
    assert all(p.isfinite().all() for p in model.parameters())


def test_regression_counts_a_label_of_minus_100(tiny_model):
    rows = [{"input_ids": [5], "labels": -100.0}, {"input_ids": [6], "labels": 0.0}]
    model = tiny_model("regression", 1)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert steps(fit(model, rows, config=quick(epochs=1))) == pytest.approx([5000.0])


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([], ValueError, "train_dataset has zero examples"),
        ({}, ValueError, "train_dataset is empty"),
        ("good", TypeError, "train_dataset must be a Dataset or a list of rows, got str"),
        ([{"input_ids": [1], "labels": 2}], ValueError, "train_dataset row 0, column 'labels': label 2 is outside"),
        ([{"input_ids": [1], "labels": 1.0}], TypeError, "train_dataset row 0, column 'labels': 1.0 is no class"),
        ([{"input_ids": [1]}], ValueError, "train_dataset row 0: no 'labels'"),
        ([{"input_ids": [64], "labels": 1}], ValueError, r"id 64 is outside 0..63"),
        ([{"input_ids": [1] * 41, "labels": 1}], ValueError, "41 tokens, the model takes 40"),
        ({"a": [{"input_ids": [1], "labels": 1}]}, ValueError, "train_dataset has 'a', but the model has one task"),
    ],
)
def test_bad_rows_are_found_before_training(tiny_model, rows, kind, message):
    model = tiny_model()
    before = weights(model)
    with pytest.raises(kind, match=message):
        fit(model, rows, config=quick())
    with pytest.raises(kind, match=message.replace("train_dataset", "eval_dataset")):
        fit(model, make_rows(4), eval_dataset=rows, config=quick())
    assert same(weights(model), before)


def test_bad_arguments(tiny_model):
    rows = make_rows(4)
    with pytest.raises(ValueError, match="max_tokens=3: the longest training row has"):
        fit(tiny_model(), make_rows(20), config=quick(max_tokens=3))
    with pytest.raises(ValueError, match="no parameter is trainable"):
        fit(tiny_model().requires_grad_(False), rows, config=quick())
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 has no meaning for regression"):
        fit(tiny_model("regression", 1), make_rows(4, "regression"), config=quick(label_smoothing=0.1))
    with pytest.raises(TypeError, match=r"config is {'epochs': 1}; pass ftlib.TrainConfig"):
        fit(tiny_model(), rows, config={"epochs": 1})
    with pytest.raises(ValueError, match="BertModel has no classification head"):
        fit(tiny_model("encoder"), rows, config=quick())


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        ("ce", TypeError, "loss is 'ce'; pass a function"),
        (lambda x, y: torch.nn.functional.cross_entropy(x, y, reduction="none"), ValueError, r"gives shape \(4,\)"),
        (lambda x, y: 1.0, ValueError, "the loss gives float; it must give one number"),
        (lambda x, y: None, ValueError, "the loss gives NoneType"),
        (lambda x, y: torch.tensor(1.0), ValueError, "the loss depends on no trainable parameter"),
        (lambda x, y: x.detach().sum(), ValueError, "the loss depends on no trainable parameter"),
    ],
)
def test_losses_that_are_none(tiny_model, loss, kind, message):
    with pytest.raises(kind, match=message):
        fit(tiny_model(), make_rows(4), config=quick(), loss=loss)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_even_where_the_caller_turned_them_off(tiny_model, around):
    model, twin = tiny_model(), tiny_model()
    with around():
        fit(model, make_rows(4), config=quick(epochs=1, warmup_fraction=0.0))
    fit(twin, make_rows(4), config=quick(epochs=1, warmup_fraction=0.0))
    assert same(weights(model), weights(twin))


def test_a_checkpoint_folder_that_can_not_be_is_said_before_training(tiny_model, tmp_path):
    (tmp_path / "file").touch()
    model = tiny_model()
    before = weights(model)
    with pytest.raises(OSError, match="file"):
        fit(model, make_rows(4), config=quick(checkpoint_dir=str(tmp_path / "file")))
    assert same(weights(model), before)


@settings(deadline=None, max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ROWS, st.sampled_from(sorted(LABELS)))
def test_any_rows_train_or_give_a_plain_error(tiny_model, rows, task):
    model = _models.setdefault(task, tiny_model(task, LABELS[task]))
    try:
        run = fit(model, rows, config=quick(max_steps=1, learning_rate=0.0))
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert math.isfinite(run.history[0]["loss"])


_models = {}


# -------------------------------------------------------------------------------------------- the choices there are


@pytest.mark.parametrize("strategy", ["head-only", "last-layers"])
def test_frozen_parameters_stay_bit_equal(tiny_model, strategy):
    model = tiny_model()
    tune(model, strategy, **({"layers": 1} if strategy == "last-layers" else {}))
    before = weights(model)
    fit(model, make_rows(8), config=quick(weight_decay=0.5))
    after = weights(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and moved <= {name for name, p in model.named_parameters() if p.requires_grad}


def test_sgd_by_hand(tiny_model):
    model = tiny_model()
    model.bert.requires_grad_(False)
    rows = make_rows(4)
    bias, weight = model.classifier.bias.detach().clone(), model.classifier.weight.detach().clone()
    batch = collate(rows)
    model(**batch).loss.backward()
    expected = bias - 0.1 * model.classifier.bias.grad
    decayed = weight - 0.1 * (model.classifier.weight.grad + 0.01 * weight)
    fit(
        model,
        rows,
        config=quick(optimizer="sgd", learning_rate=0.1, max_steps=1, warmup_fraction=0.0, max_grad_norm=None),
    )
    assert_close(model.classifier.bias, expected, atol=1e-6, rtol=0)
    assert_close(model.classifier.weight, decayed, atol=1e-6, rtol=0)


def test_weight_decay_spares_biases_unless_told(tiny_model):
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}] * 4  # no gradient: what moves is decayed
    for groups, moved in ((True, {"weight"}), (False, {"weight", "bias"})):
        model = tiny_model("token-classification", 3)
        with torch.no_grad():
            model.classifier.bias.fill_(1.0)
        before = weights(model)
        fit(model, rows, config=quick(weight_decay=0.5, decay_groups=groups, warmup_fraction=0.0))
        after = weights(model)
        assert {
            n.split(".")[1] for n in after if n.startswith("classifier.") and not torch.equal(after[n], before[n])
        } == moved


def test_a_loss_of_ones_own(tiny_model):
    rows = make_rows(8)
    model, twin = tiny_model(), tiny_model()
    run = fit(model, rows, config=quick(), loss=lambda x, y: focal_loss(x, y, gamma=0.0, reduction="sum"))
    assert steps(run) == pytest.approx(steps(fit(twin, rows, config=quick())), abs=1e-5)
    focal = fit(tiny_model(), rows, config=quick(), loss=lambda x, y: focal_loss(x, y, reduction="sum"))
    assert steps(focal)[0] < steps(run)[0]


def test_clipping(tiny_model):
    rows = make_rows(4)
    for limit, expected in ((None, 1.0), (1e-3, 1e-3)):
        model = tiny_model()
        before = weights(model)
        config = quick(optimizer="sgd", learning_rate=1.0, max_steps=1, warmup_fraction=0.0, weight_decay=0.0)
        run = fit(model, rows, config=quick(**{**vars(config), "max_grad_norm": limit}))
        moved = math.sqrt(sum(float((weights(model)[n] - before[n]).square().sum()) for n in before))
        norm = steps(run, "grad_norm")[0]
        assert moved == pytest.approx(norm if limit is None else expected, rel=1e-3)


def test_bfloat16(tiny_model):
    model = unpad(tiny_model())
    run = fit(model, make_rows(8), eval_dataset=make_rows(4), config=quick(precision="bf16"))
    assert (run.precision, run.reason) == ("bf16", "as asked")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    plain = fit(tiny_model(), make_rows(8), config=quick())
    assert steps(run) == pytest.approx(steps(plain), abs=0.05) and steps(run) != steps(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "epochs=0: need a whole number of at least 1"),
        (dict(epochs=1.5), "epochs=1.5"),
        (dict(batch_size=True), "batch_size=True"),
        (dict(max_steps=-1), "max_steps=-1"),
        (dict(patience=0), "patience=0"),
        (dict(keep_last=0), "keep_last=0"),
        (dict(learning_rate=-1e-5), "learning_rate=-1e-05: need a number from 0, finite"),
        (dict(learning_rate="1e-5"), "learning_rate='1e-5'"),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        (dict(learning_rate=float("inf")), "learning_rate=inf"),
        (dict(label_smoothing=1.5), "label_smoothing=1.5: need a number from 0 to 1"),
        (dict(warmup_fraction=2), "warmup_fraction=2"),
        (dict(temperature=0), "temperature=0"),
        (dict(max_grad_norm=0), "max_grad_norm=0"),
        (dict(max_grad_norm="1"), "max_grad_norm='1'"),
        (dict(schedule="step"), "schedule='step': choose one of constant, linear, cosine, exponential"),
        (dict(optimizer="adam"), "optimizer='adam': choose one of adamw, sgd"),
        (dict(precision="half"), "precision='half'"),
        (dict(resume="always", checkpoint_dir="x"), "resume='always': choose one of None, auto"),
        (dict(resume="auto"), "resume='auto' needs checkpoint_dir"),
        (dict(checkpoint_every=5), "checkpoint_every needs checkpoint_dir"),
        (dict(checkpoint_dir=""), "checkpoint_dir='': need the path of a folder"),
        (dict(checkpoint_dir=5), "checkpoint_dir=5"),
        (dict(micro_batch_size=4, max_tokens=100), "set micro_batch_size or max_tokens, not both"),
        (dict(gradient_checkpointing=1), "gradient_checkpointing=1: choose one of True, False"),
        (dict(compile=1), "compile=1: choose one of True, False"),
        (dict(compile="fast"), "compile=.fast.: choose one of True, False"),
        (dict(shuffle="no"), "shuffle=.no.: choose one of True, False"),
        (dict(metric=None), "metric=None: need the name"),
        (dict(seed=1.5), "seed=1.5: need a whole number"),
        (dict(seed=2**40), "seed=1099511627776"),
    ],
)
def test_a_config_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_negative_seeds_and_whole_learning_rates_do(tiny_model):
    assert fit(tiny_model(), make_rows(4), config=quick(seed=-3, learning_rate=0, epochs=1)).steps == 1


# -------------------------------------------------------------------------------------------------- several tasks

TASKS = {"a": Head("sequence-classification", 2), "b": Head("token-classification", 3, weight=0.5),
         "c": Head("regression", 1, weight=2.0)}  # fmt: skip
KINDS = {name: head.task for name, head in TASKS.items()}


def mixed_rows():
    rows = []
    for task, count, seed in (("a", 3, 0), ("b", 2, 1), ("c", 1, 2)):
        rows += [{**row, "labels": {task: row["labels"]}} for row in make_rows(count, KINDS[task], seed=seed)]
    return rows


@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 2}, {"max_tokens": 12}])
def test_a_mixed_step_is_the_weighted_sum_of_the_tasks_losses(tiny_model, cut):
    rows = mixed_rows()
    model = MultiTaskModel(tiny_model("encoder"), TASKS).train()
    total = 0.0  # Σ over tasks: weight × share of the rows × mean loss over the task's labeled items
    for task, share, head_weight in (("a", 3 / 6, 1.0), ("b", 2 / 6, 0.5), ("c", 1 / 6, 2.0)):
        own = [{**row, "labels": row["labels"][task]} for row in rows if task in row["labels"]]
        batch = collate(own)
        logits = model(batch["input_ids"], batch["attention_mask"], task=task)
        labels = batch["labels"]
        if task == "c":
            mean = torch.nn.functional.mse_loss(logits[:, 0], labels)
        else:
            mean = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        total = total + head_weight * share * mean
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = weights(model)  # the gradients are still there: `fit` must not add them to its own
    config = quick(
        optimizer="sgd", learning_rate=1.0, max_steps=1, batch_size=6, warmup_fraction=0.0, weight_decay=0.0,
        max_grad_norm=None, **cut,
    )  # fmt: skip
    run = fit(model, rows, config=config)
    assert steps(run) == pytest.approx([total.item()], abs=1e-5)
    found = {name: before[name] - value for name, value in weights(model).items()}
    assert expected.keys() <= found.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-5, rtol=0, msg=name)


def test_tasks_are_drawn_by_temperature_and_seed(tiny_model):
    data = {"a": make_rows(40), "c": make_rows(4, "regression")}
    shares = {}
    for temperature in (1.0, 1000.0):
        model, seen = MultiTaskModel(tiny_model("encoder"), TASKS), {"a": 0, "c": 0}

        def count(module, args, kwargs, seen=seen):
            for task, index in kwargs["rows"].items():
                seen[task] += len(index)

        model.register_forward_pre_hook(count, with_kwargs=True)
        run = fit(model, data, config=quick(max_steps=40, batch_size=8, temperature=temperature))
        assert sum(seen.values()) == 320 and run.steps == 40
        shares[temperature] = seen["c"] / 320
    assert shares[1.0] == pytest.approx(4 / 44, abs=0.05) and shares[1000.0] == pytest.approx(0.5, abs=0.07)


def test_frozen_tasks_above_a_frozen_encoder_are_passed_over(tiny_model):
    model = MultiTaskModel(tiny_model("encoder"), TASKS).requires_grad_(False)
    model.heads["c"].requires_grad_(True)
    before = weights(model)
    fit(model, {"a": make_rows(8), "c": make_rows(8, "regression")}, config=quick(micro_batch_size=1))
    after = weights(model)
    assert {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])} == {"c"}


def test_several_tasks_train_evaluate_and_reproduce(tiny_model):
    data = {"a": make_rows(9), "b": make_rows(5, "token-classification"), "c": make_rows(7, "regression")}
    states = []
    for _ in range(2):
        model = unpad(MultiTaskModel(tiny_model("encoder", hidden_dropout_prob=0.1), TASKS))
        run = fit(model, data, eval_dataset=data, config=quick(label_smoothing=0.1, patience=5, metric="c/mse"))
        states.append(weights(model))
    assert same(*states)
    assert {"a/accuracy", "b/accuracy", "c/mse", "a/loss"} <= set(run.metrics)
    assert run.steps == 2 * math.ceil(21 / 4)


def test_a_stock_model_under_lora_trains_its_adapters_only(tiny_model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    before = weights(model)
    fit(unpad(model), make_rows(8), eval_dataset=make_rows(4), config=quick())
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "classifier" in name for name in moved)


def test_other_architectures_train(tiny_model):
    for model_type, options in (
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "embd_pdrop": 0.0}),
        ("modernbert", {}),
        ("albert", {}),
    ):
        model = tiny_model(model_type=model_type, **options)
        rows = [{"input_ids": [5 + i % 2, 9, 11], "labels": i % 2} for i in range(16)]
        run = fit(model, rows, eval_dataset=rows, config=quick(epochs=4, batch_size=8))
        assert steps(run)[-1] < steps(run)[0], model_type


def test_embeddings_of_a_type_the_model_lacks_are_refused(tiny_model):
    rows = [{"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": 0}]
    with pytest.raises(ValueError, match=r"column 'token_type_ids': id 1 is outside 0..0"):
        fit(tiny_model(type_vocab_size=1), rows, config=quick())


def test_a_task_is_looked_for_in_its_own_rows_first(tiny_model, monkeypatch):
    """Else the rows of all other tasks would be read to their end before the first step."""
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head()})
    parts = rows_for({"a": make_rows(9), "b": make_rows(9)}, model, name="rows")
    read, real = [], Rows.__iter__
    monkeypatch.setattr(Rows, "__iter__", lambda self: [read.append(self.door.under), real(self)][1])
    assert list(labeled(model, parts)) == ["a", "b"] == read
    assert list(labeled(model, parts[:1])) == ["a"]


def test_the_best_perplexity_is_the_lowest():
    from ftlib.engine.fit import Best

    best = Best({}, "perplexity", 1)
    assert best.score({"perplexity": 3.0}) > best.score({"perplexity": 4.0}) > best.score({"perplexity": float("nan")})
    assert Best({}, "accuracy", 1).score({"accuracy": 0.9}) > Best({}, "accuracy", 1).score({"accuracy": 0.8})
