"""Every strategy trains in every mode: the same numbers where they are to be the same, and nothing else moves."""

import copy

import pytest
import torch
import transformers
from test_checkpoints import history, resumed
from test_fit import make_rows, quick, same, steps, weights
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate, predict
from ftlib.methods.features import extract_features
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.optimizing import trainer_options, tuning_of
from ftlib.methods.tuning import STRATEGIES, merge, tune
from ftlib.methods.unpadding import repad, unpad

peft = pytest.importorskip("peft")

OPTIONS = {"last-layers": {"layers": 1}, "gradual-unfreezing": {"until": 0.5, "decay": 0.9}}
PEFT = {
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3),
}
ALL = [*STRATEGIES, *PEFT]
ROWS = make_rows(8, longest=12)


def tuned(build, name, **options):
    model = build(**options)
    if name in PEFT:
        tune(model, PEFT[name]())
    else:
        tune(model, name, **OPTIONS.get(name, {}))
    return model


def settings(**options):
    return quick(**{"epochs": 1, "warmup_fraction": 0.0, "shortcuts": False, "optimizer": "sgd"} | options)


def names_that_moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def check(model, names, before):
    """What was to train has moved, bar what has no influence on the loss; nothing else has, to the bit."""
    moved = names_that_moved(model, before)
    assert moved <= names
    still = {name for name in names - moved if "embeddings" not in name and not name.endswith("key.bias")}
    if any("lora_A" in name for name in names):  # at first B is zero
        still = {name for name in still if "lora_A" not in name}
    assert not still


@pytest.fixture(scope="module")
def plain():
    """The run that the modes must repeat, made once for each strategy."""
    from conftest import make_tiny_model

    found = {}

    def run(name):
        if name not in found:
            model = tuned(make_tiny_model, name)
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            names = {n for n, p in model.named_parameters() if p.requires_grad}
            result = fit(model, ROWS, config=settings())
            check(model, names, before)
            found[name] = result, {n: p.detach().clone() for n, p in model.named_parameters()}
        return found[name]

    return run


@pytest.mark.parametrize("mode", ["unpad", "checkpointing", "both", "bf16"])
@pytest.mark.parametrize("name", [name for name in ALL if name != "mixout"])  # that is random: see below
def test_modes_change_no_number(tiny_model, plain, name, mode):
    expected, expected_weights = plain(name)
    model = tiny_model()
    if mode == "both":  # unpadded before it is tuned
        unpad(model)
    tune(model, PEFT[name]() if name in PEFT else name, **OPTIONS.get(name, {}))
    if mode == "unpad":
        unpad(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    config = settings(
        gradient_checkpointing=mode in ("checkpointing", "both"), precision="bf16" if mode == "bf16" else "fp32"
    )
    run = fit(model, ROWS, config=config)
    check(model, names, before)
    if mode == "bf16":
        assert steps(run) == pytest.approx(steps(expected), rel=0.02)
        return
    assert steps(run) == pytest.approx(steps(expected), abs=1e-5)
    for n, p in model.named_parameters():
        assert_close(p, expected_weights[n], atol=1e-5, rtol=0, msg=n)


@pytest.mark.parametrize("mode", [dict(), dict(gradient_checkpointing=True), dict(unpad=True), dict(shortcuts=True)])
def test_mixout_in_all_modes(tiny_model, plain, mode):
    """With p=0 it is plain training; with p>0 checkpointing draws the same masks again."""
    expected, expected_weights = plain("full")
    mode = dict(mode)
    model, other = tiny_model(), tiny_model()
    if mode.pop("unpad", False):
        unpad(model), unpad(other)
    tune(model, "mixout", p=0)
    assert steps(fit(model, ROWS, config=settings(**mode))) == pytest.approx(steps(expected), abs=1e-5)
    for n, p in model.named_parameters():
        assert_close(p, expected_weights[n], atol=1e-5, rtol=0, msg=n)
    tune(other, "mixout", p=0.5)
    run = fit(other, ROWS * 2, config=settings(**mode))
    if "shortcuts" not in mode:  # which draw other numbers
        repeated = tiny_model()
        tune(repeated, "mixout", p=0.5)
        assert steps(fit(repeated, ROWS * 2, config=settings())) == pytest.approx(steps(run), abs=1e-5)


# compiled as on a GPU one strategy takes 10 s; the eager backend captures the same graphs
@pytest.mark.parametrize("name", ["lora", "houlsby", "mixout", "ia3"])
def test_compiled(tiny_model, plain, name, monkeypatch):
    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", dynamic=options.get("dynamic")))
    model = tuned(tiny_model, name)
    if name == "mixout":
        tune(model, "mixout", p=0)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = fit(model, ROWS, config=settings(compile=True))
    check(model, names, before)
    assert steps(run) == pytest.approx(steps(plain("full" if name == "mixout" else name)[0]), abs=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in ALL if name != "mixout"])
def test_the_stock_trainer(tiny_model, tmp_path, name):
    """AdamW in both, the groups and callbacks of the strategy handed to the Trainer."""
    rows = make_rows(16)
    stock, ours = (tuned(tiny_model, name) for _ in range(2))
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, lr_scheduler_type="linear", disable_tqdm=True,
        train_sampling_strategy="sequential", label_names=["labels"],
    )  # fmt: skip
    options = trainer_options(stock, learning_rate=1e-2, weight_decay=0.1)
    names = {n for n, p in stock.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in stock.named_parameters()}
    trainer = transformers.Trainer(stock, arguments, train_dataset=rows, data_collator=collate, **options)
    trainer.train()
    check(stock, names, before)
    assert {n for n, p in stock.named_parameters() if p.requires_grad} == names
    config = quick(epochs=1, weight_decay=0.1, warmup_fraction=0.0, shuffle=False, shortcuts=False)
    run = fit(ours, rows, config=config)
    theirs = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert steps(run) == pytest.approx(theirs, abs=1e-4)
    assert len(theirs) == 4


def test_mixout_in_the_stock_trainer(tiny_model, tmp_path):
    model = tuned(tiny_model, "mixout")
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    before = weights(model)
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS, data_collator=collate)
    assert trainer.train().training_loss > 0 and not same(weights(model), before)


@pytest.mark.parametrize("name", ["gradual-unfreezing", "layer-decay", "l2-sp", "mixout", "lora", "dora", "prompt"])
def test_resuming_is_exact(tiny_model, tmp_path, monkeypatch, name):
    dropout = dict(hidden_dropout_prob=0.2)
    config = quick(checkpoint_dir=str(tmp_path / "c"), checkpoint_every=1, resume="auto")
    model, run = resumed(monkeypatch, lambda: tuned(tiny_model, name, **dropout), ROWS, config, (1, 3))
    other = tuned(tiny_model, name, **dropout)
    whole = fit(other, ROWS, config=quick())
    assert history(run) == history(whole) and same(weights(model), weights(other))


def test_another_strategy_is_another_run(tiny_model, tmp_path):
    config = quick(checkpoint_dir=str(tmp_path / "c"), resume="auto")
    fit(tuned(tiny_model, "l2-sp"), ROWS, config=config)
    model = tiny_model()
    tune(model, "l2-sp", strength=0.5)
    with pytest.raises(ValueError, match="is from another run: model differs; use"):
        fit(model, ROWS, config=config)


@pytest.mark.parametrize("name", ALL)
def test_fit_twice_and_look_at_it(tiny_model, tiny_tokenizer, name):
    model = tuned(tiny_model, name)
    before = [fit(model, ROWS, config=quick(epochs=1)).steps for _ in range(2)]
    assert before == [2, 2] and not model.training
    assert evaluate(model, ROWS)["loss"] == pytest.approx(evaluate(unpad(copy.deepcopy(model)), ROWS)["loss"], abs=1e-5)
    assert predict(model, ["the film is good", "bad"], tokenizer=tiny_tokenizer).shape == (2,)
    repad(unpad(model))
    assert fit(model, ROWS, config=quick(epochs=1)).steps == 2


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "houlsby", "gradual-unfreezing"])
def test_features_are_those_of_the_tuned_encoder(tiny_model, tiny_tokenizer, name):
    model = tuned(tiny_model, name)
    fit(model, ROWS, config=quick(epochs=1, learning_rate=0.05))
    found = extract_features(model, ["the film is good", "bad"], tokenizer=tiny_tokenizer, pooling="cls")
    batch = tiny_tokenizer(["the film is good", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states[-1][:, 0]
    assert_close(torch.as_tensor(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_several_heads(tiny_model, name):
    rows = {"a": make_rows(6), "b": make_rows(6, "token-classification")}
    build = lambda: MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head("token-classification", 3)})  # noqa: E731
    model, other = tuned(build, name), tuned(build, name)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = fit(model, rows, config=settings())
    check(model, names, before)
    if name != "mixout":
        again = fit(unpad(other), rows, config=settings(gradient_checkpointing=True))
        assert steps(again) == pytest.approx(steps(run), abs=1e-5)


@pytest.mark.parametrize("name", ["lora", "houlsby", "l2-sp", "mixout", "dora", "prompt"])
def test_another_dtype(tiny_model, name):
    model = tuned(lambda: tiny_model().to(torch.bfloat16), name)
    run = fit(model, ROWS, config=quick(epochs=1))
    assert run.steps == 2 and all(loss == loss for loss in steps(run))


def test_adapters_in_8_bits_in_all_modes(tiny_model):
    def build():
        model = tiny_model()
        tune(model, "lora", base_bits=8, targets="all-linear")
        return model

    run = fit(build(), ROWS, config=settings())
    for wanted in (dict(gradient_checkpointing=True), dict(shortcuts=True)):
        assert steps(fit(build(), ROWS, config=settings(**wanted))) == pytest.approx(steps(run), abs=1e-5)
    assert steps(fit(unpad(build()), ROWS, config=settings())) == pytest.approx(steps(run), abs=1e-5)
    assert steps(fit(build(), ROWS, config=settings(precision="bf16"))) == pytest.approx(steps(run), rel=0.02)
    half = tiny_model().to(torch.bfloat16)
    tune(half, "lora", base_bits=8)
    assert fit(half, ROWS, config=quick(epochs=1)).steps == 2


def test_prefix_tuning_and_what_it_can_not(tiny_model):
    model = tiny_model()
    tune(model, peft.PrefixTuningConfig(num_virtual_tokens=3))
    before = weights(model)
    fit(model, ROWS, config=quick(epochs=1, warmup_fraction=0.0))
    assert {n for n, p in weights(model).items() if not torch.equal(p, before[n])} == set(tuning_of(model).names)
    with pytest.raises(ValueError, match="gradient_checkpointing=True drops the prefix"):
        fit(model, ROWS, config=quick(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="prefix tuning call repad"):
        fit(unpad(model), ROWS, config=quick())
    fit(repad(model), ROWS, config=quick(epochs=1))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_unseen_words_stay_as_they_are(tiny_model, name):
    """What weight decay and L2-SP do to words that never occur does not depend on the shortcuts."""
    for other in (name, "l2-sp", "layer-decay"):
        models = []
        for shortcuts in (True, False):
            model = tuned(lambda: tiny_model(vocab_size=200), other)
            fit(model, ROWS, config=quick(epochs=1, shortcuts=shortcuts, weight_decay=0.1))
            models.append(weights(model))
        for key, value in models[0].items():
            if not key.endswith("key.bias"):
                assert_close(value, models[1][key], atol=1e-4, rtol=0, msg=key)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_merged_after_training_in_a_mode(tiny_model, name):
    model = unpad(tuned(tiny_model, name))
    fit(model, ROWS, config=quick(epochs=1, gradient_checkpointing=True, learning_rate=0.05))
    batch = collate(ROWS)
    batch.pop("labels")
    with torch.no_grad():
        expected = model(**batch).logits
        assert_close(merge(model)(**batch).logits, expected, atol=1e-5, rtol=0)
    assert fit(model, ROWS, config=quick(epochs=1)).steps == 2
