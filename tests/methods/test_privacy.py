"""DP-SGD: what is cut, what noise is added, which rows are drawn, what is spent, and what is refused."""

import copy
import math

import pytest
import torch
import transformers
from conftest import make_tiny_model, tiny_config
from test_checkpoints import history, resumed
from test_fit import make_rows, quick, same, weights
from torch import nn
from torch.testing import assert_close

import ftlib
from ftlib.core.batches import collate
from ftlib.core.loop import steps
from ftlib.engine.fit import fit
from ftlib.methods.augmentation import mixup
from ftlib.methods.privacy import Privacy, Private, add_cut, private_gradient
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import unpad
from ftlib.tasks.language_modeling import cross_entropy

pytest.importorskip("opacus")
CPU = torch.device("cpu")
SGD = dict(optimizer="sgd", schedule="constant", warmup_fraction=0.0, weight_decay=0.0, learning_rate=0.1)


def distinct(count, **options):
    """Rows no two of which are the same."""
    rows = enumerate(make_rows(count, **options))
    return [{**row, "input_ids": [*row["input_ids"], 5 + i % 50, 5 + i // 50]} for i, row in rows]


def classified(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def plan_of(rows, batch_size, seed, count):
    drawn = Private(Privacy(delta=1e-6, noise_multiplier=1.0, seed=seed), rows, batch_size, 1, CPU).places()
    return [[number for _, number in next(drawn)] for _ in range(count)]


def by_hand(model, rows, batches, noise, settings, batch_size, rate):
    """The steps in a plain loop: a row at a time, cut, added up, noise, divided, SGD."""
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    model.train()
    for numbers in batches:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for i in numbers:
            loss = classified(model, collate([rows[i]])).sum()
            found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
            found = zip(found, model.parameters(), strict=True)
            gradients = [torch.zeros_like(p) if g is None else g for g, p in found]
            length = torch.cat([g.flatten() for g in gradients]).norm()
            for sum_, g in zip(total, gradients, strict=True):
                sum_ += g * min(1.0, settings.max_grad_norm / float(length))
        for p, sum_, velocity in zip(model.parameters(), total, momentum, strict=True):
            sum_ += torch.randn(p.shape, generator=noise) * settings.noise_multiplier * settings.max_grad_norm
            velocity.mul_(0.9).add_(sum_ / batch_size)
            p.data -= rate * velocity


@pytest.mark.parametrize("unpadded", [False, True])
def test_fit_takes_the_steps_of_the_paper(unpadded):
    settings = Privacy(delta=1e-3, noise_multiplier=0.5, max_grad_norm=0.2, seed=4)
    rows, ours, theirs = distinct(12), make_tiny_model(), make_tiny_model()
    config = quick(epochs=1, **SGD, privacy=settings, micro_batch_size=3)
    run = fit(unpad(ours) if unpadded else ours, rows, config=config)
    drawn = plan_of(12, 4, 4, 3)
    assert run.steps == 3 and [record["examples"] for record in run.history] == list(map(len, drawn))
    by_hand(theirs, rows, drawn, torch.Generator().manual_seed(4 + 2**31), settings, 4, 0.1)
    for name, value in weights(theirs).items():
        assert_close(weights(ours)[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_row_at_a_time_gives_the_same_steps():
    rows, models = distinct(12), [make_tiny_model() for _ in range(2)]
    for model, ghost in zip(models, (True, False), strict=True):
        fit(model, rows, config=quick(**SGD, privacy=Privacy(delta=1e-3, noise_multiplier=1.0, seed=1, ghost=ghost)))
    for (name, first), second in zip(weights(models[0]).items(), weights(models[1]).values(), strict=True):
        assert_close(first, second, atol=1e-5, rtol=1e-4, msg=name)


# ----------------------------------------------------------------------------------------- clipping and noise


def test_no_row_counts_more_than_max_grad_norm():
    """Measured on gradients: one row's share is what it is if it is short, and of the length asked for if not."""
    rows, model = distinct(8), make_tiny_model()
    _, norms = add_cut(model, classified, collate(rows), 1e9)
    most = float(norms.median())
    for i, row in enumerate(rows):
        model.zero_grad()
        add_cut(model, classified, collate([row]), most)
        length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert_close(length, norms[i].clamp(max=most), atol=1e-5, rtol=1e-4)
    assert (norms > most).sum() >= 3


@pytest.mark.parametrize("drawn", [0, 3])
def test_the_noise_is_as_large_as_it_says(drawn):
    """The gradient of a step, less what it is without noise, times batch_size: 0 on the average, σC wide."""
    model, settings = make_tiny_model(hidden_size=32), Privacy(delta=1e-3, noise_multiplier=1.5, max_grad_norm=0.4)
    step = [collate(distinct(drawn))] if drawn else []
    found = []
    for sigma in (0.0, 1.5):
        model.zero_grad()
        private_gradient(classified, settings, sigma, 8, torch.Generator().manual_seed(0))(model, step)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    noise = 8 * (found[1] - found[0])
    assert found[0].norm() <= drawn * 0.4 / 8 + 1e-6
    assert (found[0].norm() > 0) == (drawn > 0)
    assert len(noise) > 15_000
    assert float(noise.std()) == pytest.approx(1.5 * 0.4, rel=0.02)
    assert abs(float(noise.mean())) < 4 * 0.6 / math.sqrt(len(noise))
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 4 * 0.36 / math.sqrt(len(noise))


def test_noise_is_never_drawn_twice():
    model, settings = make_tiny_model(), Privacy(delta=1e-3, noise_multiplier=1.0)
    private, seen = Private(settings, 100, 4, 5, CPU), []
    gradient = private.gradient(classified)
    for _ in range(3):
        model.zero_grad()
        gradient(model, [])
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    correlations = torch.corrcoef(torch.stack(seen)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.05
    assert Private(settings, 100, 4, 5, CPU).sampler != private.sampler  # without a seed nobody can know it


def test_what_is_not_finite_counts_as_nothing():
    """Nor is the step left out, which would tell that such a row was drawn."""
    model, batch = make_tiny_model(), collate(distinct(3))

    def rows(model, batch):
        return classified(model, batch) * torch.where(batch["input_ids"][:, 0] == first, math.inf, 1.0)

    first = batch["input_ids"][0, 0]
    assert (batch["input_ids"][1:, 0] != first).all()
    gradient = private_gradient(rows, Privacy(delta=1e-3, noise_multiplier=0.0), 0.0, 3, torch.Generator())
    loss = gradient(model, [batch])
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    add_cut(model, classified, {name: value[1:] for name, value in batch.items()}, 1.0)
    for p, mine in zip(model.parameters(), found, strict=True):
        assert_close(mine, p.grad / 3, atol=1e-6, rtol=1e-4)
    assert loss.isfinite()


# ---------------------------------------------------------------------------------------------- which rows


def test_every_row_is_drawn_for_itself():
    """Poisson sampling: as often as the rate says, with steps of all sizes, and no row because of another."""
    drawn = torch.zeros(4_000, 50)
    for step, numbers in enumerate(plan_of(50, 5, 7, 4_000)):
        drawn[step, numbers] = 1
    rate = drawn.mean(0)
    assert (rate - 0.1).abs().max() < 5 * math.sqrt(0.09 / 4_000)
    assert float(drawn.sum(1).var()) == pytest.approx(50 * 0.09, rel=0.15)
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(4_000)
    assert torch.corrcoef(torch.stack((drawn[1:].flatten(), drawn[:-1].flatten())))[0, 1].abs() < 0.02
    assert plan_of(50, 5, 7, 9) == plan_of(50, 5, 7, 9) != plan_of(50, 5, 8, 9)


def test_a_step_without_rows_is_a_step():
    run = fit(make_tiny_model(), distinct(6), config=quick(
        max_steps=12, batch_size=1, privacy=Privacy(delta=1e-3, noise_multiplier=1.0, seed=0)))  # fmt: skip
    sizes = [record["examples"] for record in run.history]
    assert len(sizes) == 12 and 0 in sizes and not any("skipped" in record for record in run.history)


# -------------------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.filterwarnings("ignore")
def test_the_budget_is_what_opacus_counts(accountant):
    from opacus.accountants import create_accountant

    theirs = create_accountant(accountant)
    for _ in range(30):
        theirs.step(noise_multiplier=1.1, sample_rate=4 / 100)
    private = Private(Privacy(delta=1e-5, noise_multiplier=1.1, accountant=accountant), 100, 4, 30, CPU)
    assert private.spent() == 0.0
    private.take(30)
    assert private.spent() == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
    assert Private(Privacy(delta=1e-5, noise_multiplier=0.0), 100, 4, 30, CPU).settings.spent(0.0, 0.04, 1) == math.inf


def test_a_budget_known_beforehand_by_hand():
    """All rows in every step, once: the Gaussian mechanism, whose (ε, δ) Opacus' Rényi bound lies above."""
    from scipy.stats import norm

    epsilon = Privacy(delta=1e-5, noise_multiplier=2.0).spent(2.0, 1.0, 1)
    exact = lambda e: norm.cdf(0.25 - 2 * e) - math.exp(e) * norm.cdf(-0.25 - 2 * e)  # noqa: E731  (Balle & Wang 2018)
    assert exact(epsilon) <= 1e-5 < exact(0.8 * epsilon)


def test_a_target_is_kept_and_used():
    run = fit(make_tiny_model(), distinct(20), config=quick(epochs=2, privacy=Privacy(delta=1e-3, epsilon=2.0)))
    assert 1.9 < run.epsilon <= 2.0
    assert fit(make_tiny_model(), distinct(20), config=quick()).epsilon is None


def test_opacus_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants.utils", None)
    with pytest.raises(ImportError, match="pip install opacus"):
        Privacy(delta=1e-5, epsilon=1.0).noise(0.1, 10)


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("seed", [3, None])
def test_resuming_is_exact_and_spends_nothing_twice(tmp_path, monkeypatch, seed):
    rows, held_out = distinct(14), distinct(6, seed=1)
    build = lambda: unpad(make_tiny_model(hidden_dropout_prob=0.3))  # noqa: E731
    privacy = Privacy(delta=1e-3, noise_multiplier=1.0, seed=seed)

    def draw(*numbers):
        left = iter(numbers)
        monkeypatch.setattr("secrets.randbits", lambda bits: next(left))

    draw(5, 6)
    whole = build()
    expected = fit(whole, rows, eval_dataset=held_out, config=quick(privacy=privacy))
    draw(5, 6, *range(20))  # a resumed process draws others, but goes on with those of the checkpoint
    config = quick(privacy=privacy, checkpoint_dir=str(tmp_path), checkpoint_every=2, resume="auto")
    model, run = resumed(monkeypatch, build, rows, config, (3, 6), eval_dataset=held_out)
    assert same(weights(model), weights(whole))
    assert history(run) == history(expected)
    assert run.epsilon == expected.epsilon == privacy.spent(1.0, 4 / 14, run.steps)


def test_another_budget_is_another_run(tmp_path):
    rows, options = distinct(8), dict(checkpoint_dir=str(tmp_path), epochs=1)
    fit(make_tiny_model(), rows, config=quick(privacy=Privacy(delta=1e-3, noise_multiplier=1.0), **options))
    with pytest.raises(ValueError, match=r"config\.privacy was .*1\.0.* and is .*0\.5"):
        other = Privacy(delta=1e-3, noise_multiplier=0.5)
        fit(make_tiny_model(), rows, config=quick(privacy=other, resume="auto", **options))


# ------------------------------------------------------------------------------------------------- with others


@pytest.mark.parametrize("strategy", ["lora", "head-only", "bitfit", "gradual-unfreezing"])
def test_tuned_models_get_noise_on_what_moves_alone(strategy):
    model = unpad(make_tiny_model())
    tune(model, strategy)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    before = weights(model)
    fit(model, distinct(12), config=quick(epochs=1, privacy=Privacy(delta=1e-3, noise_multiplier=1.0)))
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in moving if name in before}


def test_language_models_are_private_a_text_at_a_time():
    """A row's loss is the mean over its own tokens; the words' table is the output layer too."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=40, pad_token_id=0,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    torch.manual_seed(0)
    ours = transformers.GPT2LMHeadModel(config)
    theirs = copy.deepcopy(ours)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in distinct(8, shortest=2)]
    settings = Privacy(delta=1e-3, noise_multiplier=0.0, max_grad_norm=0.5, seed=2)
    fit(unpad(ours), rows, config=quick(max_steps=1, batch_size=8, **SGD, privacy=settings))

    def continued(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.stack([cross_entropy(x, y) / (y[:, 1:] != -100).sum() for x, y in
                            zip(logits.split(1), batch["labels"].split(1), strict=True)])  # fmt: skip

    (numbers,) = plan_of(8, 8, 2, 1)
    add_cut(theirs, continued, collate([rows[i] for i in numbers]), 0.5, ghost=False)
    for (name, p), mine in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert_close(mine, p - 0.1 * p.grad / 8, atol=1e-5, rtol=1e-4, msg=name)


def test_in_a_loop_of_ones_own():
    rows, model = distinct(8), make_tiny_model()
    settings = Privacy(delta=1e-3, noise_multiplier=1.0, seed=0)
    private = Private(settings, len(rows), 4, 3, CPU)
    batches = ([collate([rows[i] for _, i in drawn])] if drawn else [] for drawn in private.places())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    records = list(steps(model, batches, sgd, total=3, gradient=private.gradient(classified), max_grad_norm=None))
    assert [record["step"] for record in records] == [1, 2, 3]


def test_half_precision_is_near():
    rows, models = distinct(8), [make_tiny_model() for _ in range(2)]
    for model, precision in zip(models, ("fp32", "bf16"), strict=True):
        fit(model, rows, config=quick(max_steps=1, batch_size=8, **SGD, precision=precision,
                                      privacy=Privacy(delta=1e-3, noise_multiplier=0.0, seed=0)))  # fmt: skip
    before, *after = (torch.cat([p.flatten() for p in m.parameters()]) for m in (make_tiny_model(), *models))
    assert (after[1] - after[0]).norm() < 0.05 * (after[0] - before).norm()


# ------------------------------------------------------------------------------------------------- refusals


def private(**options):
    return Privacy(**{"delta": 1e-3, "noise_multiplier": 1.0} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 2}, "delta=2: need a number from 1e-30 to below 1"), ({"noise_multiplier": None}, "one of the two"),
        ({"epsilon": 1.0}, "one of the two"), ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": None, "epsilon": 0.0}, "epsilon=0.0"), ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"accountant": "gdp"}, "accountant='gdp': choose one of rdp, prv"), ({"ghost": 1}, "ghost=1"),
        ({"seed": -1}, "seed=-1"),
    ],
)  # fmt: skip
def test_settings_are_checked_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        private(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_drop": 1.0}, "privacy with r_drop=1.0"), ({"compile": True}, "privacy with compile=True"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True; leave it at False"),
        ({"task_gradients": "pcgrad"}, "task_gradients='pcgrad'"), ({"task_weighting": "dwa"}, "task_weighting='dwa'"),
        ({"precision": "fp16"}, "fp16"), ({"privacy": 3}, "privacy=3: pass ftlib.Privacy"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_privacy_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quick(**{"privacy": private()} | options)


def test_a_table_of_a_run_toml_is_one():
    assert quick(privacy={"delta": 1e-3, "noise_multiplier": 1.0}).privacy == private()


def with_batch_norm(model):
    model.classifier = nn.Sequential(nn.BatchNorm1d(16, affine=False), model.classifier)
    return model


def with_convolution(model):
    model.bert.pooler = nn.Sequential(model.bert.pooler, nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 16, 1), nn.Flatten())
    return model


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (with_batch_norm, {}, r"classifier.0, a BatchNorm1d, mixes rows"),
        (with_batch_norm, {"privacy": private(ghost=False)}, r"classifier.0, a BatchNorm1d, mixes rows"),
        (with_convolution, {}, r"bert.pooler.2, a Conv1d, has no ghost norm; freeze it, or set ghost=False"),
        (lambda model: tune(model, "mixout") and model, {}, "mixout has no ghost norms"),
        (lambda model: model, {"batch_size": 9}, "batch_size=9 of 8 training rows"),
        (lambda model: model, {"privacy": private(delta=0.2)}, "delta=0.2 may give away a row of 8"),
    ],
)
def test_models_that_break_the_guarantee_are_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        fit(change(make_tiny_model()), distinct(8), config=quick(**{"privacy": private()} | options))


def test_a_row_at_a_time_takes_what_has_no_ghost_norm():
    model = with_convolution(make_tiny_model())
    before = weights(model)
    fit(model, distinct(8), config=quick(epochs=1, privacy=private(ghost=False)))
    assert not torch.equal(weights(model)["bert.pooler.2.weight"], before["bert.pooler.2.weight"])


def test_rows_that_see_each_other_are_refused():
    """Found by looking: rows' gradients differ from what they are alone."""
    model = make_tiny_model()
    with mixup(model) as loss, pytest.raises(ValueError, match="rows see each other"):
        fit(model, distinct(8), loss=loss, config=quick(batch_size=8, privacy=private(seed=0)))
    lost = make_tiny_model()
    weight = lost.classifier.weight
    lost.bert.pooler.register_forward_hook(lambda module, args, out: out @ (weight.T @ weight))  # past its layer
    with pytest.raises(ValueError, match=r"gradient of classifier.weight .* used past its layer"):
        fit(lost, distinct(8), config=quick(batch_size=8, privacy=private(seed=0)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: [*distinct(8), distinct(8)[2]], "rows 2 and 8 of train_dataset are the same"),
        (lambda: iter(distinct(8)), "a stream has no number of rows"),
    ],
)
def test_rows_that_break_the_guarantee_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        fit(make_tiny_model(), rows(), config=quick(max_steps=2, privacy=private()))


def test_several_tasks_and_windows_are_refused():
    from ftlib.methods.multitask import Head, MultiTaskModel

    model = MultiTaskModel(make_tiny_model("encoder"), {"a": Head("sequence-classification", 2)})
    with pytest.raises(ValueError, match="a MultiTaskModel's rows are not counted"):
        fit(model, {"a": distinct(8)}, config=quick(privacy=private()))
    answering = transformers.AutoModelForQuestionAnswering.from_config(tiny_config())
    rows = [{"input_ids": row["input_ids"], "labels": [0, 1]} for row in distinct(8)]
    with pytest.raises(ValueError, match="windows of a text are rows"):
        fit(answering, rows, config=quick(privacy=private()))


def test_an_encoder_with_a_decoder_goes_a_row_at_a_time():
    """Against the model's own loss, the mean over a row's labels; T5's biases of positions belong to no row."""
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                   dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    ours = transformers.T5ForConditionalGeneration(config)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][-2:]} for row in distinct(4)]
    with pytest.raises(ValueError, match="no ghost norms for an encoder with a decoder"):
        fit(ours, rows, config=quick(privacy=private()))
    theirs = copy.deepcopy(ours)
    settings = private(noise_multiplier=0.0, max_grad_norm=0.5, seed=3, ghost=False)
    fit(ours, rows, config=quick(max_steps=1, batch_size=4, **SGD, privacy=settings))
    parameters = list(theirs.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in plan_of(4, 4, 3, 1)[0]:
        loss = theirs(input_ids=torch.tensor([rows[i]["input_ids"]]), labels=torch.tensor([rows[i]["labels"]])).loss
        own = torch.autograd.grad(loss, parameters)
        length = torch.cat([g.flatten() for g in own]).norm()
        for sum_, g in zip(total, own, strict=True):
            sum_ += g * min(1.0, 0.5 / float(length))
    for (name, p), mine, sum_ in zip(theirs.named_parameters(), ours.parameters(), total, strict=True):
        assert_close(mine, p - 0.1 * sum_ / 4, atol=1e-5, rtol=1e-4, msg=name)


def test_early_stopping_on_training_rows_is_said():
    rows = distinct(8)
    with pytest.warns(UserWarning, match="early stopping looks at training rows"):
        fit(make_tiny_model(), rows, eval_dataset=rows[:2], config=quick(epochs=1, patience=1, privacy=private()))


def test_memory_that_runs_out_changes_no_noise(monkeypatch):
    """The step is done again before any noise is drawn."""
    rows, models = distinct(8), [make_tiny_model() for _ in range(2)]
    config = quick(epochs=1, batch_size=8, **SGD, privacy=private(seed=0))
    fit(models[0], rows, config=config)
    failed = []

    def fail(module, args, kwargs):
        if len(kwargs.get("input_ids", args[0] if args else ())) > 4 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError

    models[1].register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.warns(UserWarning, match="out of memory"):
        run = fit(models[1], rows, config=config)
    assert failed and run.micro_batch_size is not None
    for (name, first), second in zip(weights(models[0]).items(), weights(models[1]).values(), strict=True):
        assert_close(first, second, atol=1e-5, rtol=1e-4, msg=name)


def test_the_front_door():
    assert ftlib.Privacy is Privacy
