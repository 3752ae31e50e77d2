"""Several tasks in `fit`: the step each method promises, by plain PyTorch loops; what is recorded, resumed, refused."""

import copy
import math
from functools import partial

import pytest
import torch
from test_checkpoints import history, resumed
from test_fit import make_rows, quick, same, steps, weights
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.engine.task_gradients import Joint
from ftlib.methods import balancing
from ftlib.methods.balancing import Weighting
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import STRATEGIES, tune
from ftlib.methods.unpadding import unpad
from ftlib.tasks.task import task_loss

TASKS = {"a": Head("sequence-classification", 2), "b": Head("token-classification", 3, weight=0.5),
         "c": Head("regression", 1, weight=2.0)}  # fmt: skip
KINDS = {name: head.task for name, head in TASKS.items()}
PLAIN = dict(optimizer="sgd", schedule="constant", warmup_fraction=0.0, weight_decay=0.0, max_grad_norm=None,
             shuffle=False)  # fmt: skip


def rows_of(counts, seed=0):
    """Rows with one task each, {task: number of rows}, one task after the other in turn."""
    parts = {t: make_rows(n, KINDS[t], seed=seed + i) for i, (t, n) in enumerate(counts.items())}
    rows = []
    for place in range(max(counts.values())):
        left = {task: part[place] for task, part in parts.items() if place < len(part)}
        rows += [{**row, "labels": {task: row["labels"]}} for task, row in left.items()]
    return rows


def rows_with_all(count, seed=0):
    """Rows with a label of every task."""
    first, second = make_rows(count, seed=seed), make_rows(count, "token-classification", seed=seed + 1)
    rows = []
    for place, (row, tags) in enumerate(zip(first, second, strict=True)):
        labels = {"a": row["labels"], "b": [max(x, 0) for x in tags["labels"]], "c": place / 4}
        rows.append({"input_ids": tags["input_ids"], "labels": labels})
    return rows


@pytest.fixture
def build(tiny_model):
    return lambda heads=TASKS, **options: MultiTaskModel(tiny_model("encoder", **options), heads)


def mean_losses(model, rows):
    """{task: mean loss over its labeled items}, by a forward pass a task."""
    found = {}
    for task in model.tasks:
        own = [{**row, "labels": row["labels"][task]} for row in rows if task in row["labels"]]
        if own:
            batch = collate(own)
            labels = batch["labels"]
            logits = model(batch["input_ids"], batch["attention_mask"], task=task)
            items = labels.numel() if KINDS[task] == "regression" else (labels != -100).sum()
            found[task] = task_loss(KINDS[task])(logits, labels) / items
    return found


def gradient_of(loss, parameters):
    """The gradient of each parameter, zeros where the loss does not depend on it."""
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def moved(model, before):
    return {name: before[name] - value for name, value in weights(model).items()}


# ------------------------------------------------------------------------------------------ joining gradients

CUTS = [{}, {"micro_batch_size": 2}, {"max_tokens": 18}]


@pytest.mark.parametrize(
    ("data", "unpadded", "options"),
    [
        ("apart", False, {}), ("apart", True, {"max_tokens": 18}), ("apart", False, {"gradient_checkpointing": True}),
        ("all", True, {"gradient_checkpointing": True}), ("all", False, {"micro_batch_size": 2, "task_cosines": 2}),
    ],
)  # fmt: skip
def test_gradients_taken_apart_and_summed_are_the_plain_step(build, data, unpadded, options):
    """As many rows of every task a step, so the plain step counts tasks alike too; AdamW sees which parameters rest."""
    rows = rows_of({"a": 4, "b": 4, "c": 4}) if data == "apart" else rows_with_all(6)
    models, runs = [], []
    for extra in ({}, {"task_gradients": lambda jacobian: jacobian.sum(0), **options}):
        model = build()
        models.append(unpad(model) if unpadded else model)
        runs.append(fit(model, rows, config=quick(batch_size=3, shuffle=False, learning_rate=1e-3, **extra)))
    plain, apart = runs
    assert steps(apart) == pytest.approx(steps(plain), abs=1e-5)
    assert steps(apart, "grad_norm") == pytest.approx(steps(plain, "grad_norm"), rel=1e-3)
    for name, value in weights(models[0]).items():
        if "key.bias" not in name:  # has no influence, so its gradient is rounding, which Adam blows up
            assert_close(weights(models[1])[name], value, atol=2e-5, rtol=0, msg=name)


def test_recording_cosines_leaves_the_step_as_it_is(build):
    """Also with unlike shares, and tasks that are not in every step, whose heads rest (no decay, no moments)."""
    rows = rows_of({"a": 9, "b": 3, "c": 1})
    models = build(), build()
    runs = [
        fit(model, rows, config=quick(task_cosines=cosines, learning_rate=1e-3, weight_decay=0.1))
        for model, cosines in zip(models, (None, 1), strict=True)
    ]
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=1e-5)
    for name, value in weights(models[0]).items():
        if "key.bias" not in name:
            assert_close(weights(models[1])[name], value, atol=2e-5, rtol=0, msg=name)
    keys = {key for record in runs[1].history for key in record if key.startswith("cosine")}
    assert keys == {"cosine/a/b", "cosine/a/c", "cosine/b/c"}
    assert not any(key.startswith("cosine") for record in runs[0].history for key in record)


class Largest(torch.nn.Module):
    """A module, as TorchJD's aggregators are."""

    def forward(self, jacobian):
        return jacobian.abs().amax(0)


METHODS = {
    "pcgrad": "pcgrad",
    "cagrad": "cagrad",
    "mgda": "mgda",
    "partial": partial(balancing.cagrad, c=0.9),
    "function": lambda jacobian: jacobian.median(0).values,
    "module": Largest(),
}


@pytest.mark.parametrize(
    ("data", "name", "cut"),
    [
        *(("unlike shares", name, CUTS[1]) for name in METHODS), ("all", "pcgrad", CUTS[0]), ("all", "mgda", CUTS[1]),
        ("apart", "pcgrad", CUTS[2]), ("all", "cagrad", CUTS[2]),
    ],
)  # fmt: skip
def test_a_balanced_step_is_the_methods_gradient_of_the_shared_parameters(build, data, name, cut):
    rows = {"apart": rows_of({"a": 2, "b": 2, "c": 2}), "all": rows_with_all(6),
            "unlike shares": rows_of({"a": 3, "b": 2, "c": 1})}[data]  # fmt: skip
    model = build().train()
    share = 1.0 if data == "all" else 1 / 3  # whatever the number of a task's rows
    inside = dict(model.encoder.named_parameters())
    parts = [share * TASKS[task].weight * loss for task, loss in mean_losses(model, rows).items()]
    total = float(sum(parts))
    gradients = [gradient_of(part, model.parameters()) for part in parts]
    names = [name for name, _ in model.named_parameters()]
    shared = [i for i, name in enumerate(names) if name.removeprefix("encoder.") in inside]
    jacobian = torch.stack([torch.cat([row[i].flatten() for i in shared]) for row in gradients])
    torch.manual_seed(0)  # the seed and step of the first step: PCGrad's order
    method = METHODS[name]
    joined = (getattr(balancing, method) if isinstance(method, str) else method)(jacobian)
    pieces = joined.split([gradients[0][i].numel() for i in shared])
    expected = {names[i]: piece for i, piece in zip(shared, pieces, strict=True)}
    before = weights(model)
    config = quick(**PLAIN, learning_rate=1.0, max_steps=1, batch_size=6, task_gradients=method, **cut)
    run = fit(model, rows, config=config)
    assert steps(run) == pytest.approx([total], abs=1e-5)
    found = moved(model, before)
    for i, parameter in enumerate(names):
        want = expected[parameter].view_as(found[parameter]) if i in shared else sum(row[i] for row in gradients)
        assert_close(found[parameter], want, atol=2e-5, rtol=1e-4, msg=parameter)


def test_a_row_goes_through_the_encoder_once_and_back_for_its_own_tasks(build):
    """Rows of one task each: as much work as a plain step. Rows with all tasks: one pass there, three back."""
    counts = {}
    for data, rows in (("apart", rows_of({"a": 4, "b": 2, "c": 3})), ("all", rows_with_all(4))):
        for method in (None, "pcgrad"):
            model, seen = build(), [0, 0]

            def forward(module, args, output, seen=seen):
                seen[0] += output[0].shape[0] if isinstance(output, tuple) else output.shape[0]

            def backward(module, before, after, seen=seen):
                seen[1] += after[0].shape[0]

            layer = model.encoder.encoder.layer[0].output.dense
            layer.register_forward_hook(forward)
            layer.register_full_backward_hook(backward)
            fit(model, rows, config=quick(max_steps=1, batch_size=9, task_gradients=method))
            counts[data, method] = seen
    assert counts["apart", "pcgrad"] == counts["apart", None] == [9, 9]
    assert counts["all", None] == [4, 4] and counts["all", "pcgrad"] == [4, 12]


def test_balancing_in_bfloat16_stays_near(build):
    losses = {}
    for precision in ("fp32", "bf16"):
        run = fit(build(), rows_with_all(8), config=quick(precision=precision, task_gradients="mgda", task_cosines=1))
        losses[precision] = steps(run)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03) and losses["bf16"] != losses["fp32"]


def test_a_step_without_memory_is_done_again_with_all_it_keeps(build):
    rows, models, failed = rows_with_all(8), (build(), build()), []

    def out_of_memory(module, args, output):
        if len(output[0]) > 4 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    models[1].encoder.register_forward_hook(out_of_memory)
    options = dict(batch_size=8, task_gradients="cagrad", task_weighting="gradnorm", task_cosines=1)
    runs = [fit(models[0], rows, config=quick(**options))]
    with pytest.warns(UserWarning, match="out of memory: the step is done again"):
        runs.append(fit(models[1], rows, config=quick(**options)))
    assert failed and runs[1].history[0]["micro_batches"] == 2
    for key in ("loss", "a/loss", "a/weight", "cosine/a/b"):
        assert steps(runs[1], key) == pytest.approx(steps(runs[0], key), abs=1e-3), key


# ------------------------------------------------------------------------------------------------- weighting

STEPS = 8


def by_hand(how, model, rows, rate=0.05):
    """SGD on Σ weight × loss over all rows every step, each method as its paper writes it; the losses of every step."""
    value = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([value], lr=0.025, weight_decay=1e-3 if how == "famo" else 0.0)
    sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)  # as fit's
    heads = torch.tensor([head.weight for head in TASKS.values()])
    layer = list(model.encoder.encoder.layer[-1].parameters())
    first, record, weighed = None, [], []
    for step in range(STEPS):
        losses = torch.stack(list(mean_losses(model, rows).values()))
        first = losses.detach() if first is None else first
        extra = 0.0
        if how == "uncertainty":
            factor = torch.tensor([1, 1, 0.5]) * torch.exp(-value)
            extra = (factor * losses.detach()).sum() + value.sum() / 2
        elif how == "gradnorm":
            factor = 3 * value.softmax(0)
            lengths = torch.stack([flat(gradient_of(loss, layer)).norm() for loss in losses])
            ratio = losses.detach() / first
            norms = factor * lengths
            extra = (norms - (norms.mean() * (ratio / ratio.mean()) ** 1.5).detach()).abs().sum()
        elif how == "famo":
            shares = value.softmax(0)
            factor = 3 * shares / losses.detach() / (shares / losses.detach()).sum()
        elif how == "dwa":  # every step is an epoch here
            factor = torch.ones(3)
            if step > 1:
                factor = 3 * (record[-1] / record[-2] / 2).softmax(0)
        record.append(losses.detach())
        weighed.append(factor.detach())
        sgd.zero_grad()
        (factor.detach() * heads * losses).sum().backward()
        sgd.step()
        if how == "famo":
            with torch.no_grad():
                after = torch.stack(list(mean_losses(model, rows).values()))
            fall = torch.log(losses.detach()) - torch.log(after)
            (extra,) = (value.softmax(0) @ fall.double(),)
        if how != "dwa":
            adam.zero_grad()
            extra.backward()
            adam.step()
    return torch.stack(record), torch.stack(weighed)


@pytest.mark.parametrize("cut", CUTS[:2])
@pytest.mark.parametrize("how", ["uncertainty", "gradnorm", "dwa", "famo"])
def test_a_weighting_trains_as_its_paper_says(build, how, cut):
    rows = rows_with_all(6)
    expected, model = build().train(), build()
    losses, weighed = by_hand(how, expected, rows)
    config = quick(**PLAIN, learning_rate=0.05, epochs=STEPS, batch_size=6, task_weighting=how, **cut)
    run = fit(model, rows, config=config)
    for place, task in enumerate(TASKS):
        assert steps(run, f"{task}/loss") == pytest.approx(losses[:, place].tolist(), abs=1e-4)
        assert steps(run, f"{task}/weight") == pytest.approx(weighed[:, place].tolist(), abs=1e-4)
    assert weighed[-1].std() > 0.01
    heads = torch.tensor([head.weight for head in TASKS.values()])
    assert steps(run) == pytest.approx((losses * weighed * heads).sum(1).tolist(), abs=1e-3)
    for name, value in weights(expected).items():
        assert_close(weights(model)[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_with_a_weighting_tasks_count_alike_however_many_rows(build):
    rows = rows_of({"a": 4, "b": 1, "c": 1})
    model = build()
    losses = mean_losses(model.train(), rows)
    run = fit(model, rows, config=quick(max_steps=1, batch_size=6, task_weighting="random", seed=3))
    record = run.history[0]
    for task in TASKS:
        assert record[f"{task}/loss"] == pytest.approx(losses[task].item(), abs=1e-5)
    total = sum(record[f"{t}/weight"] * TASKS[t].weight * losses[t].item() for t in TASKS) / 3
    assert record["loss"] == pytest.approx(total, abs=1e-5)


def test_famo_looks_with_the_dropout_of_the_step_and_leaves_the_random_state(build):
    """Without learning, what falls is nothing; and dropout draws as if nobody had looked."""
    rows = rows_with_all(6)
    options = dict(hidden_dropout_prob=0.3)
    model = build(**options)
    still = fit(model, rows, config=quick(learning_rate=0.0, task_weighting=Weighting("famo", decay=0.0), batch_size=6))
    first, *others = [[r[f"{t}/weight"] * r[f"{t}/loss"] for t in TASKS] for r in still.history]
    assert len(others) == 1 and first == pytest.approx([sum(first) / 3] * 3)
    assert others[0] == pytest.approx([sum(others[0]) / 3] * 3)  # equal shares still: no loss fell
    plain = fit(build(**options), rows, config=quick(learning_rate=0.0, batch_size=6))
    assert steps(still, "a/loss") == pytest.approx(steps(plain, "a/loss"), abs=1e-6)
    cut = fit(build(), rows, config=quick(task_weighting="famo", batch_size=6, micro_batch_size=2))
    whole = fit(build(), rows, config=quick(task_weighting="famo", batch_size=6))
    assert steps(cut, "b/weight") == pytest.approx(steps(whole, "b/weight"), abs=1e-4)


def test_weightings_and_gradients_go_together(build):
    config = quick(task_weighting="gradnorm", task_gradients="pcgrad", task_cosines=3)
    run = fit(build(), rows_with_all(8), config=config)
    assert len(steps(run, "cosine/a/b")) == 2 and len(steps(run, "a/weight")) == 4
    assert all(math.isfinite(x) for x in steps(run))


# ------------------------------------------------------------------------------------------------- records


def test_records_of_the_tasks(build):
    rows = rows_of({"a": 4, "b": 4, "c": 1})
    model = build()
    run = fit(model, rows, config=quick(batch_size=4, shuffle=False, epochs=1, task_cosines=2, learning_rate=0.0))
    first = run.history[0]
    of_tasks = [{key for key in record if "/" in key} for record in run.history]
    assert of_tasks[0] == {"a/loss", "b/loss", "c/loss", "cosine/a/b", "cosine/a/c", "cosine/b/c"}
    assert of_tasks[1:] == [{"a/loss", "b/loss"}, {"b/loss"}]  # a single task has no cosine
    losses = mean_losses(model.train(), rows[:4])
    gradients = []
    for task, loss in losses.items():
        assert first[f"{task}/loss"] == pytest.approx(loss.item(), abs=1e-5)
        gradients.append(flat(gradient_of(loss, model.encoder.parameters())))
    for key, i, j in (("cosine/a/b", 0, 1), ("cosine/a/c", 0, 2), ("cosine/b/c", 1, 2)):
        cosine = torch.cosine_similarity(gradients[i], gradients[j], dim=0)
        assert first[key] == pytest.approx(cosine.item(), abs=1e-4)


# ------------------------------------------------------------------------------------------------ checkpoints

RESUMED = [
    {"task_weighting": "uncertainty"}, {"task_weighting": "gradnorm", "task_sampler": "uniform"},
    {"task_weighting": "dwa", "checkpoint_every": 2}, {"task_weighting": "random"},
    {"task_weighting": "famo", "micro_batch_size": 3, "task_sampler": "remaining"},
    {"task_gradients": "pcgrad", "task_cosines": 2, "task_sampler": "annealed"},
    {"task_gradients": partial(balancing.cagrad, c=0.3), "temperature": 3.0},
]  # fmt: skip


@pytest.mark.parametrize("options", RESUMED)
def test_resuming_is_exact(build, tmp_path, monkeypatch, options):
    data = {"a": make_rows(9), "b": make_rows(5, "token-classification"), "c": make_rows(4, "regression")}
    options = {"epochs": 4, "batch_size": 6, **options}
    whole = build(hidden_dropout_prob=0.3)
    expected = fit(whole, data, config=quick(**{k: v for k, v in options.items() if k != "checkpoint_every"}))
    config = quick(**{"checkpoint_every": 1, **options}, checkpoint_dir=str(tmp_path), resume="auto")
    model, run = resumed(monkeypatch, lambda: build(hidden_dropout_prob=0.3), data, config, (3, 4, 9))
    assert history(run) == history(expected) and run.steps == 12
    assert same(weights(model), weights(whole))


def test_a_checkpoint_of_another_method_is_refused(build, tmp_path):
    data = rows_with_all(4)
    fit(build(), data, config=quick(checkpoint_dir=str(tmp_path), task_gradients="pcgrad"))
    other = quick(checkpoint_dir=str(tmp_path), resume="auto", task_gradients=balancing.mgda)
    with pytest.raises(ValueError, match=r"config\.task_gradients was .* and is"):
        fit(build(), data, config=other)
    other = quick(checkpoint_dir=str(tmp_path), resume="auto", task_gradients="pcgrad", task_weighting=Weighting("dwa"))
    with pytest.raises(ValueError, match=r"config\.task_weighting was .* and is"):
        fit(build(), data, config=other)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"task_gradients": "pcgrad"}, "task_gradients"),
        ({"task_cosines": 5}, "task_cosines"),
        ({"task_weighting": "gradnorm"}, "task_weighting='gradnorm'"),
    ],
)
def test_what_gradients_taken_apart_do_not_go_with(build, tiny_model, option, name):
    rows, model = rows_with_all(4), build()
    with pytest.raises(ValueError, match=f"{name} takes gradients a task at a time, .*compile=False"):
        fit(model, rows, config=quick(compile=True, **option))
    with pytest.raises(ValueError, match=f"{name}: precision 'fp16' .*use bf16 or fp32"):
        Joint(model, quick(**option), "fp16", 1)
    model.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match=f"{name}: the encoder is frozen"):
        fit(model, rows, config=quick(**option))
    with pytest.raises(ValueError, match="task_weighting, task_gradients and task_cosines need a MultiTaskModel"):
        fit(tiny_model(), make_rows(4), config=quick(**option))


def test_a_part_of_the_encoder_may_be_frozen(build):
    """Then only what moves is balanced; GradNorm's layer is the last one that moves."""
    for option in ({"task_gradients": "mgda"}, {"task_weighting": "gradnorm"}):
        model = build()
        model.encoder.requires_grad_(False)
        moving = [model.encoder.encoder.layer[0].output.dense.weight, model.encoder.encoder.layer[1].output.dense.bias]
        for parameter in moving:
            parameter.requires_grad_(True)
        before = copy.deepcopy(weights(model))
        fit(model, rows_with_all(4), config=quick(**option))
        after = {name for name, value in moved(model, before).items() if value.abs().max() > 0}
        assert {name for name in after if name.startswith("encoder")} == {
            "encoder.encoder.layer.0.output.dense.weight", "encoder.encoder.layer.1.output.dense.bias",
        }  # fmt: skip
        assert {name.split(".")[1] for name in after if name.startswith("heads")} == set(TASKS)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "mixout"])
@pytest.mark.parametrize("options", [{"task_gradients": "cagrad"}, {"task_weighting": "gradnorm"}])
def test_a_strategy_chooses_what_moves_and_the_method_joins_its_gradients(build, strategy, options):
    """Fixed weights and the plain sum as a function give the step of the stock way; other methods another."""
    runs = []
    for other in ({}, {"task_gradients": lambda jacobian: jacobian.sum(0)}, options):
        model = build()
        tune(model, strategy)
        free = {name for name, p in model.named_parameters() if p.requires_grad}
        before = weights(model)
        run = fit(model, rows_with_all(6), config=quick(epochs=1, batch_size=2, **other))
        after = weights(model)
        assert {name for name in after if not torch.equal(after[name], before[name])} <= free
        runs.append((steps(run), after))
    assert runs[1][0] == pytest.approx(runs[0][0], abs=1e-5)
    assert any(not torch.equal(runs[0][1][name], runs[2][1][name]) for name in runs[0][1])


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        (lambda jacobian: jacobian, r"gives shape \(3, \d+\) for a jacobian \(3, \d+\); it must give one gradient"),
        (lambda jacobian: 1.0, "gives float for a jacobian"),
    ],
)
def test_a_function_that_gives_no_gradient(build, combine, message):
    with pytest.raises(ValueError, match=message):
        fit(build(), rows_with_all(4), config=quick(task_gradients=combine))


def test_a_loss_that_is_not_finite_is_said_before_anything_is_joined(build):
    def combine(jacobian):
        assert jacobian.isfinite().all()
        return jacobian.sum(0)

    with pytest.raises(ValueError, match="step 1: loss nan"):
        config = quick(task_gradients=combine, max_bad_steps=1)
        fit(build(), rows_with_all(4), config=config, loss=lambda x, y: x.sum() * math.nan)


def test_settings_of_tasks():
    for option, message in (
        ({"task_sampler": "random"}, "task_sampler='random': choose one of temperature, uniform, annealed, remaining"),
        ({"task_sampler": "uniform", "temperature": 2.0}, "temperature=2.0 has no meaning for task_sampler='uniform'"),
        ({"task_weighting": "kendall"}, "task weighting 'kendall': choose one of fixed, uncertainty"),
        ({"task_gradients": "nash"}, "task_gradients='nash': choose one of None, pcgrad, cagrad, mgda, a function"),
        ({"task_gradients": ["pcgrad"]}, r"task_gradients=\['pcgrad'\]"),
        ({"task_cosines": 0}, "task_cosines=0: need a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            quick(**option)
    assert quick(task_weighting=Weighting("gradnorm", alpha=0.5)).task_weighting.alpha == 0.5


def test_a_sampler_needs_several_datasets(build):
    for options in ({"task_sampler": "uniform"}, {"temperature": 2.0}):
        with pytest.raises(ValueError, match=r"task_sampler=.*, temperature=.*: need several datasets"):
            fit(build(), rows_with_all(4), config=quick(**options))


def test_torchjds_aggregators_plug_in(build):
    theirs = pytest.importorskip("torchjd.aggregation", reason="an extra: pip install torchjd")
    pytest.importorskip("quadprog", reason="TorchJD projects with it: pip install 'torchjd[quadprog-projector]'")
    run = fit(build(), rows_with_all(8), config=quick(task_gradients=theirs.UPGrad(), epochs=10))
    assert steps(run)[-1] < steps(run)[0]
    losses = []
    for method in ("pcgrad", theirs.PCGrad()):
        losses.append(steps(fit(build(), rows_with_all(8), config=quick(task_gradients=method))))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": make_rows(3), "b": []}, r"train_dataset\['b'\] has zero examples"),
        ({"a": make_rows(3), "x": make_rows(3)}, r"dataset\['x'\] row 0, .*a task 'x'; the model has 'a', 'b', 'c'"),
        ([{"input_ids": [5], "labels": {"x": 1}}], r"row 0, .*: labels for a task 'x'; the model has 'a', 'b', 'c'"),
        ([{"input_ids": [5], "labels": {"a": 2}}], r"row 0, .* \(a\): label 2 is outside 0..1; .*num_labels=3"),
        ({"b": [{"input_ids": [5, 6], "labels": [0, 3]}]}, r"\['b'\] row 0, .*\(b\): label 3 is outside 0..2"),
        ({"c": [{"input_ids": [5], "labels": math.nan}]}, r"\['c'\] row 0, .*\(c\): the value is nan"),
        ({"a": [{"input_ids": [5], "labels": 1.5}]}, r"\['a'\] row 0, .*\(a\): 1.5 is no class number"),
        (make_rows(2), "a plain label, but the model has the tasks a, b, c"),
        ({}, "train_dataset is empty"),
    ],
)  # fmt: skip
def test_bad_rows_of_several_tasks_are_found_before_training(build, data, message):
    model = build()
    before = weights(model)
    with pytest.raises((ValueError, TypeError), match=message):
        fit(model, data, config=quick(task_gradients="pcgrad"))
    assert same(weights(model), before)


def test_two_tasks_of_one_name_are_refused(tiny_model):
    with pytest.raises(ValueError, match="each name once"):
        MultiTaskModel(tiny_model("encoder"), [("a", Head()), ("a", Head("regression", 1))])


@pytest.mark.parametrize(
    ("name", "how"), [("task_weighting", "gradnorm"), ("task_weighting", "famo"), ("task_gradients", "pcgrad")]
)
def test_one_task_has_nothing_to_weigh(tiny_model, name, how):
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head()})
    with pytest.raises(ValueError, match="the model has one task, so there is nothing to weigh or join"):
        fit(model, {"a": make_rows(4)}, config=quick(**{name: how}))
