"""The loop takes the stock Trainer's steps, and those of `fit`, bit for bit; its seams do what they say."""

import ast
import itertools
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_fit import LABELS, make_rows, quick, same, weights
from torch import nn
from torch.testing import assert_close

from ftlib.core import loop
from ftlib.core.batches import collate, split_by_size
from ftlib.core.loop import SCHEDULES, cross_entropy, labeled, schedule_factor, steps, summed
from ftlib.core.sampling import plan
from ftlib.engine.fit import fit
from ftlib.methods.optimizing import optimizer as optimizer_for


def adamw(model, rate=1e-2, decay=0.1):
    """The Trainer's: decay of all but biases and norms."""
    plain = [p for n, p in model.named_parameters() if "bias" in n or "norm" in n.lower()]
    decayed = [p for n, p in model.named_parameters() if not ("bias" in n or "norm" in n.lower())]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate)


def warmed(count):
    return lambda step, total: schedule_factor(step, total, warmup=count)


def line(value=0.0):
    """A model of one weight, and SGD that `pull` makes take whole steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model, torch.optim.SGD(model.parameters(), lr=2.0)


def pull(model, step):
    """Loss -w/2: each step of full rate moves the weight by 1; the batch says by what to multiply."""
    loss = -model.weight.sum() * step[0]["by"] / 2
    loss.backward()
    return loss


def batches(*by):
    return [[{"by": torch.tensor(float(value))}] for value in by]


def constant(step, total):
    return 1.0


# ------------------------------------------------------------------------------------------- the Trainer's numbers


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_loop_is_the_stock_trainer(tiny_model, tmp_path, task, parts):
    """Also with steps of ragged micro-batches, of which each counts by its labeled items: the Trainer is told how, as
    the losses of Transformers' classifiers leave its count of them out."""
    rows = make_rows(24, task)
    stock, ours = (tiny_model(task, LABELS[task]) for _ in range(2))
    size = 4 // parts
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, max_grad_norm=0.5, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, lr_scheduler_type="linear", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    mean = lambda out, labels, num_items_in_batch: cross_entropy(out.logits, labels) / num_items_in_batch  # noqa: E731
    trainer = transformers.Trainer(
        stock, arguments, train_dataset=rows, data_collator=collate,
        compute_loss_func=mean,
    )  # fmt: skip
    trainer.train()
    theirs = [record for record in trainer.state.log_history if "loss" in record]
    micro = [collate(rows[i : i + size]) for i in range(0, 24, size)] * 2
    ragged = [micro[i : i + parts] for i in range(0, len(micro), parts)]
    records = list(steps(ours, ragged, adamw(ours), total=12, schedule=warmed(2), max_grad_norm=0.5))
    assert len(theirs) == len(records) == 12
    assert parts == 1 or any(len({labeled(b["labels"]) for b in step}) > 1 for step in ragged) == (task[0] == "t")
    for key, name, close in (
        ("loss", "loss", 1e-6),
        ("learning_rate", "learning_rate", 1e-9),
        ("grad_norm",) * 2 + (1e-5,),
    ):
        expected = torch.tensor([record[name] for record in theirs], dtype=torch.float64)
        assert_close(torch.tensor([r[key] for r in records], dtype=torch.float64), expected, atol=close, rtol=1e-5)
    for (name, expected), found in zip(stock.named_parameters(), ours.parameters(), strict=True):
        if not name.endswith("key.bias"):  # AdamW makes steps of the rounding of a zero gradient
            assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------------ the steps of fit


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 3}, {"max_tokens": 20}])
def test_fit_is_the_loop_bit_for_bit(tiny_model, monkeypatch, task, cut):
    monkeypatch.setattr("ftlib.engine.fit.choose_device", lambda: torch.device("cpu"))
    rows = make_rows(22, task)
    options = {"hidden_dropout_prob": 0.1}
    theirs, ours = (tiny_model(task, LABELS[task], **options) for _ in range(2))
    config = quick(epochs=3, batch_size=8, shortcuts=False, weight_decay=0.1, warmup_fraction=0.2, seed=7, **cut)
    run = fit(theirs, rows, config=config)

    def feed():
        for places in itertools.islice(plan({"": len(rows)}, config), 9):
            own = [rows[i] for _, i in places]
            parts = [range(len(own))]
            if cut:
                sizes = {{"micro_batch_size": "batch_size"}.get(name, name): value for name, value in cut.items()}
                parts = split_by_size(parts[0], [len(row["input_ids"]) for row in own], **sizes)
            yield [collate([own[i] for i in part]) for part in parts]

    torch.manual_seed(7)
    chosen = optimizer_for(ours, config)
    records = list(steps(ours, feed(), chosen, total=9, schedule=warmed(math.ceil(0.2 * 9))))
    assert run.steps == len(records) == 9
    for key in ("loss", "grad_norm", "learning_rate", "step"):
        assert [record[key] for record in records] == [record[key] for record in run.history]
    assert same(weights(theirs), weights(ours))


# ----------------------------------------------------------------------------------------------- first and total


def test_from_first_to_total():
    model, sgd = line()
    records = list(steps(model, batches(*[1] * 9), sgd, total=5, first=2, gradient=pull, schedule=constant))
    assert [record["step"] for record in records] == [3, 4, 5] and model.weight.item() == 3.0
    assert list(steps(model, batches(1), sgd, total=5, first=5, gradient=pull)) == []


def test_no_batch_is_asked_for_beyond_the_last_step():
    model, sgd = line()
    source = iter(batches(*[1] * 9))
    assert len(list(steps(model, source, sgd, total=3, gradient=pull))) == 3
    assert len(list(source)) == 6


def test_batches_that_end_early_end_the_run():
    model, sgd = line()
    records = list(steps(model, iter(batches(1, 1)), sgd, total=9, gradient=pull, schedule=constant))
    assert [record["step"] for record in records] == [1, 2] and model.weight.item() == 2.0
    assert list(steps(model, [], sgd, total=9, gradient=pull)) == []


def test_a_run_in_two_parts_is_the_run(tiny_model):
    rows = make_rows(16)
    feed = [[collate(rows[i : i + 4])] for i in range(0, 16, 4)] * 2
    whole, halved = tiny_model(), tiny_model()
    records = list(steps(whole, feed, adamw(whole), total=8, schedule=warmed(2)))
    chosen = adamw(halved)
    parts = [*itertools.islice(steps(halved, feed, chosen, total=8, schedule=warmed(2)), 3)]
    parts += steps(halved, feed[3:], chosen, total=8, first=3, schedule=warmed(2))
    assert records == parts and same(weights(whole), weights(halved))


def test_the_rate_is_the_groups_peak_times_the_schedule():
    model, sgd = line()
    sgd.param_groups[0]["lr"] = 0.5  # of 2
    by = lambda step, total: (step + 1) / total  # noqa: E731
    records = list(steps(model, batches(1, 1, 1, 1), sgd, total=4, gradient=pull, schedule=by))
    assert [record["learning_rate"] for record in records] == [0.125, 0.25, 0.375, 0.5]
    assert model.weight.item() == pytest.approx(1.25 / 2)
    again = list(steps(model, batches(1), sgd, total=2, gradient=pull, schedule=by))  # the peak, not what it is now
    assert again[0]["learning_rate"] == 0.25


def test_the_rate_told_is_that_of_the_fastest_group():
    model = nn.Linear(1, 1)
    sgd = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 1.0}])
    (record,) = steps(model, batches(1), sgd, total=2, gradient=pull)
    assert record["learning_rate"] == 1.0 and [group["lr"] for group in sgd.param_groups] == [0.1, 1.0]


# -------------------------------------------------------------------------------------------- what a step does


def test_the_model_is_in_train_mode_at_every_step_and_yours_between():
    model, sgd = line()
    seen = []
    look = lambda model, step: [seen.append(model.training), pull(model, step)][1]  # noqa: E731
    for _ in steps(model, batches(1, 1, 1), sgd, total=3, gradient=look):
        model.eval()
    assert seen == [True] * 3 and not model.training


def test_no_gradient_is_left_behind():
    model, sgd = line()
    for _ in steps(model, batches(1, 1), sgd, total=2, gradient=pull):
        assert model.weight.grad is None


@pytest.mark.parametrize(("limit", "moved"), [(None, 20.0), (0.25, 0.5), (100.0, 20.0)])
def test_clipping(limit, moved):
    model, sgd = line()
    (record,) = steps(model, batches(20), sgd, total=1, gradient=pull, schedule=constant, max_grad_norm=limit)
    assert record["grad_norm"] == 10.0 and model.weight.item() == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_moves_nothing(bad):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    twin = nn.Linear(1, 1, bias=False)
    twin.load_state_dict(model.state_dict())
    found, finite = [], []
    for own, by, out in ((model, (1, bad, 2), found), (twin, (1, 2), finite)):
        chosen = torch.optim.AdamW(own.parameters(), lr=0.1)
        out += steps(own, batches(*by), chosen, total=3, gradient=pull, schedule=constant)
    assert [record.get("skipped") for record in found] == [None, True, None] and found[1]["step"] == 2
    assert not math.isfinite(found[1]["loss"]) and not any("skipped" in record for record in finite)
    assert torch.equal(model.weight, twin.weight)  # neither the weight nor AdamW's moments have seen it


def test_a_gradient_that_is_not_finite_moves_nothing_either():
    def wrong(model, step):
        loss = pull(model, step)
        model.weight.grad += math.nan
        return loss

    model, sgd = line(3.0)
    (record,) = steps(model, batches(1), sgd, total=1, gradient=wrong)
    assert record["skipped"] and math.isfinite(record["loss"]) and math.isnan(record["grad_norm"])
    assert model.weight.item() == 3.0 and model.weight.grad is None


def test_what_must_go_together_does():
    model, sgd = line()
    seen = []

    @contextmanager
    def whole():
        seen.append(("in", model.weight.item()))
        yield
        seen.append(("out", model.weight.item()))

    def done(record):
        seen.append(("done", model.weight.item(), model.weight.grad, record["step"]))
        record["mine"] = True

    records = steps(
        model, batches(1, math.nan), sgd, total=2, gradient=pull, schedule=constant, whole=whole, done=done
    )  # fmt: skip
    assert [record["mine"] for record in records] == [True, True]
    assert seen[:3] == [("in", 0.0), ("done", 1.0, None, 1), ("out", 1.0)]
    assert seen[3:] == [("in", 1.0), ("done", 1.0, None, 2), ("out", 1.0)]


def test_an_error_in_the_gradient_leaves_the_weights():
    def fails(model, step):
        raise RuntimeError("mine")

    model, sgd = line(2.0)
    with pytest.raises(RuntimeError, match="mine"):
        list(steps(model, batches(1), sgd, total=1, gradient=fails))
    assert model.weight.item() == 2.0


# ----------------------------------------------------------------------------------------------------- gradients


def test_the_plain_gradient_counts_labelled_items(tiny_model):
    """However a step is cut, its gradient is that of the mean over all its items."""
    rows = make_rows(9, "token-classification")
    model, found = tiny_model("token-classification", 3), []
    for cut in ([rows], [rows[:2], rows[2:]], [[row] for row in rows]):
        model.zero_grad()
        loss = summed()(model, [collate(part) for part in cut])
        found.append((loss, *(p.grad.clone() for p in model.parameters())))
    mean = model(**collate(rows)).loss
    assert_close(found[0][0], mean.detach())
    for other in found[1:]:
        for expected, value in zip(found[0], other, strict=True):
            assert_close(value, expected, atol=1e-6, rtol=1e-5)
    assert not found[0][0].requires_grad


def test_a_step_without_labels_has_no_gradient(tiny_model):
    model = tiny_model()
    batch = collate([{"input_ids": [5, 6], "labels": -100}])
    assert summed()(model, [batch]).item() == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_loss_and_a_count_of_ones_own(tiny_model):
    model = tiny_model("regression", 1)
    batch = collate([{"input_ids": [5], "labels": 1.0}, {"input_ids": [6], "labels": 3.0}])
    squared = lambda logits, labels: ((logits[:, 0] - labels) ** 2).sum()  # noqa: E731
    loss = summed(squared, len)(model, [batch])
    assert_close(loss, model(**batch).loss.detach())
    assert "labels" in batch  # the batch stays


def test_the_forward_pass_alone_is_in_autocast(tiny_model):
    inside = []
    watch = lambda logits, labels: [inside.append(torch.is_autocast_enabled("cpu")), cross_entropy(logits, labels)][1]  # noqa: E731
    half = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    model, twin = tiny_model(), tiny_model()
    batch = collate(make_rows(4))
    loss, plain = summed(watch, autocast=half)(model, [batch]), summed()(twin, [batch])
    assert inside == [True] and loss.dtype == torch.float32 and loss != plain
    assert_close(loss, plain, atol=0.02, rtol=0)


def test_a_gradient_of_ones_own_is_two_lines(tiny_model):
    model, twin = tiny_model(), tiny_model()
    feed = [[collate(make_rows(4, seed=seed))] for seed in range(3)]
    stock = lambda model, step: [loss := model(**step[0]).loss, loss.backward()][0]  # noqa: E731
    found = list(steps(model, feed, adamw(model), total=3, gradient=stock))
    plain = list(steps(twin, feed, adamw(twin), total=3))
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in plain], abs=1e-6)


# ------------------------------------------------------------------------------------------------ loss scaling


def test_a_scaler_scales_the_gradient_and_unscales_it_before_clipping():
    class Named(nn.Linear):
        def forward(self, input):
            return SimpleNamespace(logits=super().forward(input))

    feed = [[{"input": torch.tensor([[2.0]]), "labels": torch.zeros(1, 1)}]] * 3
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = Named(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        gradient = summed(lambda logits, labels: (3 * logits - 1).sum(), len, scaler=scaler)
        options = dict(total=3, schedule=constant, max_grad_norm=0.5, scaler=scaler, gradient=gradient)
        records = list(steps(model, feed, torch.optim.SGD(model.parameters(), lr=1.0), **options))
        assert [record["grad_norm"] for record in records] == [6.0] * 3
        found.append((records, model.weight.item()))
    assert found[0] == found[1] and found[0][1] == pytest.approx(-1.5, rel=1e-5)


def test_the_default_gradient_gets_the_scaler(tiny_model):
    model, twin = tiny_model(), tiny_model()
    feed = [[collate(make_rows(4, seed=seed))] for seed in range(2)]
    found = list(steps(model, feed, adamw(model), total=2, scaler=torch.amp.GradScaler("cpu", init_scale=256.0)))
    plain = list(steps(twin, feed, adamw(twin), total=2))
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in plain], rel=1e-5)


def test_overflow_is_the_scalers_until_it_can_scale_down_no_more():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def overflows(model, step):
        loss = model.weight.sum()
        scaler.scale(loss).backward()
        model.weight.grad.fill_(math.inf)
        return loss

    model, sgd = line(5.0)
    options = dict(gradient=overflows, schedule=constant, scaler=scaler)
    records = list(steps(model, batches(*[1] * 5), sgd, total=5, **options))
    assert model.weight.item() == 5.0 and scaler.get_scale() < 1
    assert [record.get("skipped") for record in records] == [None, None, None, True, True]  # scale 4, 2, 1, 1/2, 1/4
    nan = lambda model, step: overflows(model, step) * math.nan  # noqa: E731
    scaler.update(1024.0)
    (record,) = steps(model, batches(1), sgd, total=1, gradient=nan, scaler=scaler)
    assert record["skipped"] and model.weight.item() == 5.0  # a loss that is none is nobody's overflow


# -------------------------------------------------------------------------------------------------- to take home


def test_the_loop_needs_torch_alone_and_is_short():
    text = Path(loop.__file__).read_text("utf8")
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    assert names <= {"torch", *sys.stdlib_module_names} and "torch" in names
    assert text.count("\n") <= 150


# --------------------------------------------------------------------------------------------------- schedules

STOCK = {
    "constant": lambda optimizer, warmup, total: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("schedule", STOCK)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (1, 2), (5, 5)])
def test_schedules_are_the_stock_ones(schedule, warmup, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    stock = STOCK[schedule](optimizer, warmup, total)
    for step in range(total):
        expected = optimizer.param_groups[0]["lr"]
        assert schedule_factor(step, total, schedule=schedule, warmup=warmup) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        stock.step()


def test_exponential_falls_by_one_ratio_to_a_hundredth():
    factors = [schedule_factor(step, 10, schedule="exponential", warmup=2) for step in range(11)]
    assert factors[:3] == [0.0, 0.5, 1.0]
    ratios = [b / a for a, b in itertools.pairwise(factors[2:])]
    assert ratios == pytest.approx([0.01 ** (1 / 8)] * 8)
    assert factors[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_stay_between_0_and_1_even_past_the_end(schedule):
    factors = [schedule_factor(step, 5, schedule=schedule, warmup=2) for step in range(20)]
    assert all(0.0 <= factor <= 1.0 and math.isfinite(factor) for factor in factors)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'step'; choose one of constant"):
        schedule_factor(0, 1, schedule="step")


def test_an_optimizer_used_again_begins_at_its_own_rate(tiny_model):
    model, batch = tiny_model(), collate(make_rows(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rate in (0.1, 0.1, 1e-3):
        optimizer.param_groups[0]["lr"] = rate
        found = [record["learning_rate"] for record in steps(model, [[batch]] * 2, optimizer, total=2)]
        assert found == pytest.approx([rate, rate / 2]) and optimizer.param_groups[0]["lr"] == rate


def test_gradients_of_before_are_no_part_of_the_first_step(tiny_model):
    batch, norms = collate(make_rows(4)), []
    for before in (False, True):
        model = tiny_model()
        if before:
            (1000 * model(**batch).loss).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        norms += [record["grad_norm"] for record in steps(model, [[batch]], optimizer, total=1)]
    assert norms[0] == norms[1]
