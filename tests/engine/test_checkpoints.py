"""A resumed run is the run that was never stopped; a folder is a whole model or none."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_fit import LABELS, before_steps, make_rows, quick, raising, same, weights

from ftlib.core.batches import collate
from ftlib.engine import checkpoints, feeding, recovery, task_gradients
from ftlib.engine import fit as training
from ftlib.engine.checkpoints import damage
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate
from ftlib.engine.saving import load, save
from ftlib.inputs import files
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import is_unpadded, unpad

# ----------------------------------------------------------------------------------------------- training states


def history(run):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.history]


def stop_after(monkeypatch, count):
    """The run is killed after `count` steps, as if the machine had gone away: nothing is tidied up."""

    def die(number, step):
        if number >= count:
            raise SystemExit

    before_steps(monkeypatch, die)


def resumed(monkeypatch, build, data, config, stops, **options):
    """Runs that are killed after so many steps each, then a last one to the end; no checkpoint may be skipped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="skipped checkpoint")
        for stop in stops:
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                stop_after(patch, stop)
                fit(build(), data, config=config, **options)
        model = build()
        return model, fit(model, data, config=config, **options)


@pytest.mark.parametrize(
    ("stops", "options"),
    [
        ((1,), {}),
        ((4,), {"optimizer": "sgd", "label_smoothing": 0.1}),
        ((2, 3, 5, 7), {"checkpoint_every": 2, "schedule": "cosine", "micro_batch_size": 3}),
        ((6,), {"checkpoint_every": 4, "precision": "bf16"}),
    ],
)
def test_resuming_is_exact(tiny_model, tmp_path, monkeypatch, stops, options):
    rows, held_out = make_rows(14), make_rows(6, seed=1)
    build = lambda: unpad(tiny_model(hidden_dropout_prob=0.3))  # noqa: E731
    whole = build()
    expected = fit(
        whole, rows, eval_dataset=held_out, config=quick(**{k: v for k, v in options.items() if "check" not in k})
    )
    config = quick(**{"checkpoint_every": 1, **options}, checkpoint_dir=str(tmp_path), resume="auto")
    model, run = resumed(monkeypatch, build, rows, config, stops, eval_dataset=held_out)
    assert same(weights(model), weights(whole))
    assert history(run) == history(expected) and run.metrics == expected.metrics and run.steps == 8


def test_resuming_several_tasks_and_early_stopping_is_exact(tiny_model, tmp_path, monkeypatch):
    data = {"a": make_rows(9), "b": make_rows(5, "token-classification")}
    heads = {"a": Head(), "b": Head("token-classification", 3)}
    build = lambda: MultiTaskModel(tiny_model("encoder", hidden_dropout_prob=0.3), heads)  # noqa: E731
    options = dict(epochs=20, patience=3, metric="a/loss", temperature=2.0, eval_every=1, learning_rate=0.1)
    whole = build()
    expected = fit(whole, data, eval_dataset=data, config=quick(**options))
    assert expected.stopped == "early stopping" and expected.steps > 4
    config = quick(**options, checkpoint_dir=str(tmp_path), checkpoint_every=1, resume="auto")
    model, run = resumed(
        monkeypatch, build, data, config, (3, expected.steps - 1, expected.steps - 1), eval_dataset=data
    )  # fmt: skip
    assert run.stopped == "early stopping" and run.metrics == expected.metrics
    assert history(run) == history(expected) and same(weights(model), weights(whole))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_resuming_is_exact_on_a_gpu_with_deterministic_settings():
    """The tests above once more, where the settings are made before the GPU is first used."""
    code = "import sys, pytest, torch; torch.use_deterministic_algorithms(True); sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-p", "no:xdist", __file__, "-k", "resuming and exact and not gpu"]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("where", ["forward", "evaluation"])
def test_an_interrupted_run_goes_on_exactly(tiny_model, tmp_path, monkeypatch, where):
    """Ctrl-C in the middle of a step (dropout has drawn already), or of an evaluation (its record is missing)."""
    rows, held_out = make_rows(12), make_rows(6, seed=1)
    build = lambda: tiny_model(hidden_dropout_prob=0.3)  # noqa: E731
    options = dict(micro_batch_size=2, patience=9)
    whole = build()
    expected = fit(whole, rows, eval_dataset=held_out, config=quick(**options))
    config = quick(**options, checkpoint_dir=str(tmp_path), checkpoint_every=100, resume="auto")
    with monkeypatch.context() as patch:
        if where == "forward":
            loss = raising(KeyboardInterrupt(), at=4)  # the second half of step 2
        else:
            loss = None
            patch.setattr(training, "scores", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
        stopped = fit(build(), rows, eval_dataset=held_out, config=config, loss=loss)
    assert stopped.stopped == "interrupted" and stopped.steps == (1 if where == "forward" else 3)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{stopped.steps:08d}"]
    model = build()
    run = fit(model, rows, eval_dataset=held_out, config=config)
    assert history(run) == history(expected) and same(weights(model), weights(whole))


def test_a_folder_for_checkpoints_that_can_be_none(tiny_model, tmp_path):
    (tmp_path / "c").write_text("notes")
    with pytest.raises(OSError, match=r"checkpoint_dir='.*c' can't be written to .*; choose another"):
        fit(tiny_model(), make_rows(4), config=quick(checkpoint_dir=str(tmp_path / "c")))
    assert (tmp_path / "c").read_text() == "notes"


def test_a_run_stopped_by_bad_steps_never_finishes(tiny_model, tmp_path):
    """However often it is started again: every time another step is tried, and none moves anything."""
    config = quick(checkpoint_dir=str(tmp_path / "c"), resume="auto")
    model = tiny_model()
    for at in (5, 6, 7, 8, 8, 8):  # 8 steps in all
        with pytest.raises(ValueError, match=rf"step {at}: loss nan.* not finite in {at} steps in a row"):
            fit(model, make_rows(14), config=config, loss=lambda logits, labels: logits.sum() * float("nan"))
    assert same(weights(model), weights(tiny_model()))


def test_a_checkpoint_that_can_not_be_read_is_skipped(tiny_model, two_checkpoints, monkeypatch):
    _, config, expected, run = two_checkpoints
    real = checkpoints._print

    def dying(path):
        if path.parent.name == "step-00000006":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoints, "_print", dying)
    model = tiny_model(hidden_dropout_prob=0.3)
    with pytest.warns(UserWarning, match=r"skipped checkpoint step-00000006: .* can't be read .*Input/output error"):
        again = fit(model, make_rows(12), config=config)
    assert history(again) == history(run) and same(weights(model), weights(expected))


def test_an_error_in_the_evaluation_costs_no_step(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "scores", lambda *given, **options: 1 / 0)
    config = quick(checkpoint_dir=str(tmp_path / "c"), patience=1, epochs=1)
    with pytest.raises(ZeroDivisionError):
        fit(tiny_model(), make_rows(12), eval_dataset=make_rows(4), config=config)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000003"]


def test_early_stopping_leaves_a_checkpoint_at_its_end(tiny_model, tmp_path):
    options = dict(checkpoint_dir=str(tmp_path / "c"), patience=1, eval_every=1, epochs=30, learning_rate=0.1)
    config = quick(**options, resume="auto")
    runs = [fit(tiny_model(), make_rows(12), eval_dataset=make_rows(6, seed=1), config=config) for _ in range(2)]
    assert runs[0].stopped == runs[1].stopped == "early stopping" and runs[0].steps < 90
    assert history(runs[0]) == history(runs[1]) and runs[0].metrics == runs[1].metrics
    assert f"step-{runs[0].steps:08d}" in [path.name for path in (tmp_path / "c").iterdir()]


def _other_start(model):
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.add_(1.0)
    return model


def test_a_run_goes_on_in_its_precision_alone(tiny_model, tmp_path, monkeypatch):
    rows, config = make_rows(8), quick(checkpoint_dir=str(tmp_path / "c"), resume="auto")
    fit(tiny_model(), rows, config=config)
    monkeypatch.setenv("FTLIB_PRECISION", "bf16")  # as another machine's "auto" would
    with pytest.raises(ValueError, match="from another run: precision was 'fp32' and is 'bf16'"):
        fit(tiny_model(), rows, config=config)


@pytest.mark.parametrize("what", ["dtype", "dropout", "types", "l2-sp", "mixout", "peft", "head"])
def test_what_makes_a_run_another(tiny_model, tmp_path, monkeypatch, what):
    rows, config = make_rows(8), quick(checkpoint_dir=str(tmp_path / "c"), resume="auto")

    def build(other):
        model = tiny_model(hidden_dropout_prob=0.2 if other and what == "dropout" else 0.1)
        if what == "head":
            heads = {"a": Head(weight=50.0 if other else 1.0)}
            return MultiTaskModel(tiny_model("encoder"), heads)
        if what in ("l2-sp", "mixout"):
            model = _other_start(model) if other else model
            tune(model, what)
        elif what == "peft":
            peft = pytest.importorskip("peft")
            tune(model, peft.LoraConfig(r=2, lora_alpha=64 if other else 4))
        elif what == "dtype":  # of frozen weights, which stay as they are; those that train are float32 in any case
            monkeypatch.delenv("FTLIB_PRECISION", raising=False)
            tune(model, "head-only")
        return model.to(torch.bfloat16) if other and what == "dtype" else model

    data = {"a": rows} if what == "head" else rows
    fit(build(False), data, config=config)
    assert fit(build(False), data, config=config).steps == 4  # the same run: nothing is left to do
    if what == "types":
        data = [row | {"token_type_ids": [1] * len(row["input_ids"])} for row in rows]
    with pytest.raises(ValueError, match=rf"is from another run: {'data' if what == 'types' else 'model'} differs"):
        fit(build(True), data, config=config)


def test_a_set_of_targets_is_the_same_in_every_process(tiny_model):
    from ftlib.methods.optimizing import described

    names = [f"name{i}" for i in range(20)]
    found = []
    for targets in (set(names), set(reversed(names)), frozenset(names)):
        model = tiny_model()
        tune(model, "lora")
        model.tuning.options["targets"] = targets
        found.append(described(model))
    assert len(set(found)) == 1 and str(sorted(names))[1:9].replace("'", '"') in found[0]


def test_weights_that_lie_transposed_in_memory(tiny_model, tmp_path, monkeypatch):
    """The optimizer's state lies as they do, also after resuming: in another layout its last bits differ."""

    def build():
        model = tiny_model(hidden_dropout_prob=0.3)
        weight = model.classifier.weight.detach()
        model.classifier.weight = torch.nn.Parameter(weight.T.contiguous().T)
        return model

    rows, whole = make_rows(20), build()
    fit(whole, rows, config=quick())
    config = quick(checkpoint_dir=str(tmp_path / "c"), checkpoint_every=1, resume="auto")
    again, _ = resumed(monkeypatch, build, rows, config, [3])
    assert same(weights(again), weights(whole))


def test_an_interrupt_between_weights_and_history_writes_nothing(tiny_model, tmp_path, monkeypatch):
    """Raised by a signal handler of the user's own, which fit leaves alone."""
    calls = []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 4:  # one is before the first step
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda *args, **options: interrupt())
    run = fit(tiny_model(), make_rows(16), config=quick(checkpoint_dir=str(tmp_path / "c")))
    assert run.stopped == "interrupted" and run.steps == 2 and not list(tmp_path.glob("c/*"))


@pytest.fixture
def interruptible():
    """SIGINT as a program at a terminal has it; in the background of a script it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "where",
    [
        (torch.optim.AdamW, "step"), (torch.optim.AdamW, "zero_grad"), (recovery, "random_state"),
        (task_gradients.Losses, "parts"), (training.Best, "score"), (training.Best, "look"),
        (feeding.Feed, "ahead"), (checkpoints.Checkpoints, "save"), (checkpoints, "save_file"),
        (files, "_sync"), (training, "scores"),
    ],
    ids=lambda where: where[1],
)  # fmt: skip
@pytest.mark.parametrize("at", [4, 5, 6])
def test_control_c_loses_nothing(tiny_model, tmp_path, monkeypatch, interruptible, where, at):
    """The signal itself, at the end of one of the functions a step is made of; then the run goes on."""
    rows, held_out = make_rows(20), make_rows(6, seed=1)
    build = lambda: tiny_model(hidden_dropout_prob=0.3, vocab_size=200)  # noqa: E731
    options = dict(patience=9, eval_every=2, weight_decay=0.1)
    whole = build()
    expected = fit(whole, rows, eval_dataset=held_out, config=quick(**options))
    config = quick(**options, checkpoint_dir=str(tmp_path), checkpoint_every=1, resume="auto")
    model, calls = build(), []
    with monkeypatch.context() as patch:
        real = getattr(*where)

        def then_interrupted(*args, **options):
            value = real(*args, **options)
            calls.append(1)
            if len(calls) == (at - 3 if where[1] in ("scores", "score", "look") else at):
                os.kill(os.getpid(), signal.SIGINT)
            return value

        patch.setattr(*where, then_interrupted)
        stopped = fit(model, rows, eval_dataset=held_out, config=config)
    assert stopped.stopped == "interrupted" and 0 < stopped.steps < 10
    assert [r["step"] for r in stopped.history if "loss" in r] == [*range(1, stopped.steps + 1)]
    assert f"step-{stopped.steps:08d}" in [path.name for path in checkpoints._folders(tmp_path)]
    assert all(damage(path) is None for path in tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    evaluate(model, held_out)  # usable, and so
    assert all(p.grad is None for p in model.parameters())
    save(model, tmp_path.with_suffix(".model"))
    again = build()
    run = fit(again, rows, eval_dataset=held_out, config=config)
    assert history(run) == history(expected) and same(weights(again), weights(whole))


def test_a_finished_run_is_not_run_again(tiny_model, tmp_path):
    config = quick(checkpoint_dir=str(tmp_path), resume="auto")
    first = tiny_model()
    expected = fit(first, make_rows(8), eval_dataset=make_rows(4), config=config)
    again = tiny_model()
    run = fit(again, make_rows(8), eval_dataset=make_rows(4), config=config)
    assert (
        history(run) == history(expected) and same(weights(again), weights(first)) and run.metrics == expected.metrics
    )
    assert run.seconds == pytest.approx(expected.seconds, abs=5)


def test_only_the_last_ones_are_kept(tiny_model, tmp_path):
    (tmp_path / "step-notes").mkdir()
    fit(tiny_model(), make_rows(12), config=quick(checkpoint_dir=str(tmp_path), checkpoint_every=1, keep_last=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000004", "step-00000005", "step-00000006", "step-notes",
    ]  # fmt: skip
    files = {path.name for path in (tmp_path / "step-00000006").iterdir()}
    assert files == {"state.json", "state.safetensors", "manifest.json"}
    assert load_file(tmp_path / "step-00000006" / "state.safetensors")["random.cpu.0"].dtype == torch.uint8


@pytest.fixture
def two_checkpoints(tiny_model, tmp_path):
    """A run of 6 steps with whole checkpoints at 4 and 6, its configuration, and what it gave."""
    config = quick(checkpoint_dir=str(tmp_path), checkpoint_every=2, resume="auto")
    model = tiny_model(hidden_dropout_prob=0.3)
    run = fit(model, make_rows(12), config=config)
    return tmp_path, config, model, run


def break_file(how, folder):
    path = folder / how.split()[-1]
    if how.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-10])
    elif how.startswith("flipped"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how.startswith("missing"):
        path.unlink()
    elif how.startswith("empty"):
        path.write_bytes(b"")
    else:
        path.write_text(how.split()[0])


@pytest.mark.parametrize(
    "how",
    [f"{how} state.{kind}" for how in ("truncated", "flipped", "missing", "empty") for kind in ("safetensors", "json")]
    + ["missing manifest.json", "truncated manifest.json", "[] manifest.json", '{"state.json":1} manifest.json',
       '{"state.json":1,"state.safetensors":2} manifest.json'],
)  # fmt: skip
def test_a_damaged_checkpoint_is_skipped_and_named(tiny_model, two_checkpoints, how):
    folder, config, expected, run = two_checkpoints
    break_file(how, folder / "step-00000006")
    model = tiny_model(hidden_dropout_prob=0.3)
    name = (
        how.split()[-1] if how.startswith(("truncated", "flipped", "missing", "empty")) else "manifest.json|state.json"
    )
    with pytest.warns(UserWarning, match=rf"skipped checkpoint step-00000006: .*({name})"):
        again = fit(model, make_rows(12), config=config)
    assert again.steps == 6 and history(again) == history(run) and same(weights(model), weights(expected))
    assert damage(folder / "step-00000006") is None  # written anew


def test_all_checkpoints_damaged_means_from_the_start(tiny_model, two_checkpoints):
    folder, config, expected, run = two_checkpoints
    for path in folder.iterdir():
        break_file("missing state.safetensors", path)
    model = tiny_model(hidden_dropout_prob=0.3)
    with pytest.warns(
        UserWarning, match="skipped checkpoint step-00000004: a file can.t be read .*No such file.*state.safetensors"
    ):
        again = fit(model, make_rows(12), config=config)
    assert history(again) == history(run) and same(weights(model), weights(expected))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(learning_rate=1e-3), r"config.learning_rate was 0.01 and is 0.001; use"),
        (dict(seed=1), r"config.seed was 0 and is 1; use"),
        (dict(epochs=3), r"steps was 6 and is 9"),
        (dict(batch_size=2), r"config.batch_size was 4 and is 2, steps was 6 and is 12; use"),
        ("rows", r"rows was {'': 12} and is {'': 11}, data differs; use"),
        ("labels", r"data differs; use"),
        ("frozen", r"model differs; use"),
        ("wider", r"model differs; use"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tiny_model, two_checkpoints, change, said):
    folder, config, _, _ = two_checkpoints
    rows, model = make_rows(12), tiny_model(hidden_dropout_prob=0.3)
    if change == "rows":
        rows = make_rows(11)
    elif change == "labels":
        rows[3]["labels"] = 1 - rows[3]["labels"]
    elif change == "frozen":
        tune(model, "head-only")
    elif change == "wider":
        model = tiny_model(hidden_dropout_prob=0.3, intermediate_size=64)
    else:
        config = quick(**{**vars(config), **change})
    with pytest.raises(ValueError, match=rf"step-00000006 is from another run: .*{said}"):
        fit(model, rows, config=config)
    assert len(list(folder.iterdir())) == 2


def test_what_may_change_between_runs(tiny_model, two_checkpoints, tmp_path):
    folder, config, expected, _ = two_checkpoints
    moved = tmp_path.parent / (tmp_path.name + "-moved")
    shutil.copytree(folder, moved)
    model = tiny_model(hidden_dropout_prob=0.3)
    changed = {"checkpoint_dir": str(moved), "keep_last": 5, "checkpoint_every": 1, "progress": True}
    run = fit(model, make_rows(12), config=quick(**{**vars(config), **changed}))
    assert run.steps == 6 and same(weights(model), weights(expected))


def test_a_new_run_does_not_mix_with_an_old_one(tiny_model, two_checkpoints):
    folder, _, _, _ = two_checkpoints
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=r"holds step-00000006 of an earlier run; go on with it \(resume='auto'\)"):
        fit(tiny_model(), make_rows(4), config=quick(checkpoint_dir=str(folder)))
    assert sorted(path.name for path in folder.iterdir()) == before


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_best_one_is_kept_too(tiny_model, tmp_path, monkeypatch):
    values = iter([0.6, 0.5, 0.7, 0.4, 0.8, 0.9, 0.9, 0.9])
    monkeypatch.setattr(training, "scores", lambda *args, **options: {"loss": next(values)})
    seen, real, kept = [], checkpoints.Checkpoints.save, checkpoints.Checkpoints
    monkeypatch.setattr(kept, "save", lambda *args, **best: (real(*args, **best), seen.append(names(tmp_path))))
    options = dict(checkpoint_every=1, eval_every=1, patience=9, keep_last=1, weight_decay=0.0)
    config = quick(**options, checkpoint_dir=str(tmp_path))
    run = fit(tiny_model(), make_rows(16), eval_dataset=make_rows(2), config=config)
    step = "step-{:08d}".format
    assert seen == [[step(i)] if i in (1, 2, 4) else [step(2 if i < 4 else 4), step(i)] for i in range(1, 9)]
    assert run.metrics == {"loss": 0.4}
    state = json.loads((tmp_path / step(8) / "state.json").read_text())
    assert state["best"] == {"step": 4, "metrics": {"loss": 0.4}, "since": 4}
    best = load_file(tmp_path / step(4) / "state.safetensors")
    last = load_file(tmp_path / step(8) / "state.safetensors")
    parameters = [name for name, _ in tiny_model().named_parameters()]
    assert all(torch.equal(best[f"model.{name}"], last[f"best.{name}"]) for name in parameters)


def test_a_damaged_later_checkpoint_does_not_push_the_whole_ones_out(tiny_model, tmp_path, monkeypatch):
    """The one at step 6 can't be read; killed again after step 5, the run still has that."""
    options = dict(checkpoint_dir=str(tmp_path), checkpoint_every=1, resume="auto")
    fit(tiny_model(), make_rows(12), config=quick(**options, keep_last=3))
    break_file("truncated state.safetensors", tmp_path / "step-00000006")
    break_file("empty manifest.json", tmp_path / "step-00000005")
    with monkeypatch.context() as patch, pytest.raises(SystemExit), pytest.warns(UserWarning, match="step-00000006"):
        stop_after(patch, 5)
        fit(tiny_model(), make_rows(12), config=quick(**options, keep_last=1))
    assert names(tmp_path) == ["step-00000005", "step-00000006"] and damage(tmp_path / "step-00000005") is None
    with pytest.warns(UserWarning, match="skipped checkpoint step-00000006: state.safetensors has"):
        run = fit(tiny_model(), make_rows(12), config=quick(**options, keep_last=1))
    assert run.steps == 6 and names(tmp_path) == ["step-00000006"]


def test_what_a_killed_process_left_is_swept_away(tiny_model, two_checkpoints):
    folder, config, _, _ = two_checkpoints
    (folder / ".step-00000006.0123abcd.new").mkdir()
    (folder / ".step-00000006.0123abcd.new" / "state.json").write_text("{")
    (folder / "step-00000006").rename(folder / ".step-00000006.4567abcd.old")  # killed between the two renames
    shutil.copytree(folder / "step-00000004", folder / ".step-00000004.4567abcd.old")
    (folder / ".step-mine").mkdir()
    (folder / "step-00000003").write_text("a file")
    run = fit(tiny_model(hidden_dropout_prob=0.3), make_rows(12), config=config)
    assert run.steps == 6
    assert names(folder) == [".step-mine", "step-00000003", "step-00000004", "step-00000006"]
    assert damage(folder / "step-00000006") is None


def test_folders_are_synced_after_the_files_and_after_the_rename(tiny_model, tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (sync(handle), done.append(os.readlink(f"/proc/self/fd/{handle}"))))
    monkeypatch.setattr(os, "rename", lambda *names: (rename(*names), done.append("rename")))
    fit(tiny_model(), make_rows(4), config=quick(epochs=1, checkpoint_dir=str(tmp_path / "c")))
    done = [Path(name).name.split(".")[-1] if "." in name else name.removeprefix(str(tmp_path)) for name in done]
    assert sorted(done[:-3]) == ["json", "json", "safetensors"] and done[-3:] == ["new", "rename", "/c"]


@pytest.mark.parametrize("what", ["no field", "no weight", "a weight", "foreign", "random state", "no fingerprint"])
def test_whole_files_of_another_make_are_refused(tiny_model, two_checkpoints, what):
    """A change that the manifest agrees with, as if another program had written the files."""
    folder, config, _, _ = two_checkpoints
    newest, weight = folder / "step-00000006", "model.classifier.weight"
    state, tensors = json.loads((newest / "state.json").read_text()), load_file(newest / "state.safetensors")
    {
        "no field": lambda: state.pop("scaler"),
        "no weight": lambda: tensors.pop(weight),
        "a weight": lambda: tensors.update({weight: tensors[weight].T.contiguous()}),
        "foreign": lambda: tensors.update({"optimizer.99.step": torch.tensor(1.0)}),
        "random state": lambda: tensors.update({"random.cpu.0": torch.zeros(3, dtype=torch.uint8)}),
        "no fingerprint": lambda: state.update(fingerprint=None),
    }[what]()
    (newest / "state.json").write_text(json.dumps(state))
    save_file(tensors, newest / "state.safetensors")
    found = {name: newest / name for name in ("state.json", "state.safetensors")}
    (newest / "manifest.json").write_text(json.dumps({n: checkpoints._print(path) for n, path in found.items()}))
    said = "is from another run" if what == "no fingerprint" else "whole, but not as fit writes it; delete it"
    with pytest.raises(ValueError, match=f"step-00000006.* {said}"):
        fit(tiny_model(hidden_dropout_prob=0.3), make_rows(12), config=config)


def test_a_manifest_that_lists_other_files(two_checkpoints):
    folder = two_checkpoints[0] / "step-00000006"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"../../etc/passwd": {"bytes": 1, "sha256": ""}}))
    assert damage(folder) == (
        "manifest.json lists state.json, state.safetensors, ../../etc/passwd, not state.json and state.safetensors"
    )


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["state.safetensors", "state.json", "manifest.json"]), st.data())
def test_any_cut_and_any_flipped_bit_is_found(two_checkpoints, file, data):
    folder = two_checkpoints[0] / "step-00000006"
    path, whole = folder / file, (folder / file).read_bytes()
    content = bytearray(whole)
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(content)
        found = damage(folder)
        if file == "manifest.json" and found is None:  # a change that says the same, such as another white space
            assert json.loads(content) == json.loads(whole)
        else:
            assert file in found or file == "manifest.json"
    finally:
        path.write_bytes(whole)


def test_a_full_disk_leaves_the_checkpoints_before_it_and_says_so(tiny_model, tmp_path):
    """A real limit: no file of this process may grow beyond so many bytes; the state outgrows it at step 3."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = quick(checkpoint_dir=str(tmp_path), checkpoint_every=1, resume="auto")
    model = tiny_model()

    def fill(number, step):
        if number == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    said = (
        r"could not write .*step-00000003 \(.*File too large.*\); what was there before is as it was. "
        r"The last checkpoint is step-00000002; make room, or mend the disk, and go on with resume='auto'"
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=said):
        before_steps(patch, fill)
        try:
            fit(model, make_rows(12), config=config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert all(damage(path) is None for path in tmp_path.iterdir())
    evaluate(model, make_rows(4))
    whole, again = tiny_model(), tiny_model()
    expected, run = fit(whole, make_rows(12), config=quick()), fit(again, make_rows(12), config=config)
    assert history(run) == history(expected) and same(weights(again), weights(whole))


def test_a_failed_write_leaves_the_checkpoints_before_it(tiny_model, tmp_path, monkeypatch):
    calls, real = [], checkpoints.save_file

    def failing(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", failing)
    with pytest.raises(OSError, match=r"No space left.*The last checkpoint is step-00000002"):
        fit(tiny_model(), make_rows(12), config=quick(checkpoint_dir=str(tmp_path), checkpoint_every=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert all(damage(path) is None for path in tmp_path.iterdir())


def test_tied_weights_are_saved_and_come_back(tiny_model, tmp_path, monkeypatch):
    def build():
        model = tiny_model(hidden_dropout_prob=0.3)
        model.bert.encoder.layer[1].output.dense.weight = model.bert.encoder.layer[0].output.dense.weight
        return model

    whole = build()
    fit(whole, make_rows(8), config=quick())
    config = quick(checkpoint_dir=str(tmp_path), checkpoint_every=1, resume="auto")
    model, _ = resumed(monkeypatch, build, make_rows(8), config, (2,))
    assert same(weights(model), weights(whole))
    layers = model.bert.encoder.layer
    assert layers[0].output.dense.weight is layers[1].output.dense.weight


def test_no_pickle_is_written_or_read(tiny_model, tmp_path, monkeypatch):
    import pickle

    def refuse(*args, **options):
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    config = quick(checkpoint_dir=str(tmp_path / "c"), resume="auto")
    for _ in range(2):
        fit(tiny_model(), make_rows(8), config=config)
    several = MultiTaskModel(tiny_model("encoder"), {"a": Head()})
    load(save(several, tmp_path / "several"))
    load(save(tiny_model(), tmp_path / "one"))
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json", ".md"}


# -------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("task", [*LABELS, "encoder"])
@pytest.mark.parametrize("model_type", ["bert", "albert"])
def test_a_model_comes_back(tiny_model, tiny_tokenizer, tmp_path, task, model_type):
    options = () if task == "encoder" else (LABELS[task],)
    model = unpad(tiny_model(task, *options, model_type=model_type)).train()
    if task != "encoder":
        model.config.id2label = {i: f"name {i}" for i in range(LABELS[task])}
    before = weights(model)
    assert save(model, tmp_path / "a" / "model", tiny_tokenizer) == tmp_path / "a" / "model"
    assert is_unpadded(model) and model.training and same(weights(model), before)
    back = load(tmp_path / "a" / "model")
    assert type(back) is type(model) and not back.training and same(weights(back), before)
    if task != "encoder":
        assert back.config.id2label == model.config.id2label and back.config.problem_type == model.config.problem_type
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert again("the film").input_ids == tiny_tokenizer("the film").input_ids
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]  # nothing left beside it


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "albert"])
def test_several_heads_come_back(tiny_model, tmp_path, model_type):
    heads = {
        "a": Head(num_labels=3, label_names=("x", "y", "z"), weight=0.5), "b": Head("token-classification", 2),
        "c": Head("regression", 1), "d": Head("multi-label-classification", 4),
    }  # fmt: skip
    model = unpad(MultiTaskModel(tiny_model("encoder", model_type=model_type), heads, seed=4)).eval()
    save(model, tmp_path / "m")
    back = load(tmp_path / "m")
    assert back.specs == heads and same(weights(back), weights(model)) and not back.training
    batch = {key: collate(make_rows(3))[key] for key in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    for task, head in heads.items():
        mine, theirs = back(**batch, task=task), model(**batch, task=task)
        if head.task == "token-classification":  # only the unpadded one has zeros at padding
            mine, theirs = mine[real], theirs[real]
        assert torch.allclose(mine, theirs, atol=1e-6)
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "m" / "encoder")
    assert same(weights(encoder), weights(model.encoder))
    save(back, tmp_path / "m")  # over itself
    assert same(weights(load(tmp_path / "m")), weights(model))


def test_an_older_model_is_replaced_all_of_it(tiny_model, tmp_path):
    save(MultiTaskModel(tiny_model("encoder"), {"a": Head()}), tmp_path / "m")
    model = tiny_model(num_labels=3)
    save(model, str(tmp_path / "m"))
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert same(weights(load(str(tmp_path / "m"))), weights(model))


def test_folders_by_other_names(tiny_model, tmp_path, monkeypatch):
    model = tiny_model()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(model, ".")
    assert same(weights(load(tmp_path / "here")), weights(model))
    (tmp_path / "link").symlink_to(tmp_path / "here")
    save(tiny_model(num_labels=5), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load(tmp_path / "here").config.num_labels == 5


@pytest.mark.parametrize("content", ["config.json", "adapter_config.json", "encoder/config.json"])
def test_what_is_no_model_is_not_overwritten(tiny_model, tmp_path, content):
    """Files called like a model's; others stay where they are: test_saving.py."""
    folder = tmp_path / "f"
    (folder / content).parent.mkdir(parents=True, exist_ok=True)
    (folder / content).write_text("{}")
    with pytest.raises(ValueError, match=rf"{content} is no model's, and a model would take its place"):
        save(tiny_model(), folder)
    assert [path.read_text() for path in folder.rglob("*") if path.is_file()] == ["{}"]
    with pytest.raises(ValueError, match="is a file; name a folder"):
        save(tiny_model(), folder / content)


@pytest.mark.parametrize("broken", ["writing", "the commit", "the moving"])
def test_a_failed_save_leaves_the_old_model(tiny_model, tmp_path, monkeypatch, broken):
    old = tiny_model()
    save(old, tmp_path / "m")
    before = sorted(path.name for path in (tmp_path / "m").iterdir())
    new = tiny_model(seed=5)

    def full(*_, **__):
        if broken == "writing":
            (tmp_path / "m" / ".saving" / "config.json").write_text("{")
        raise OSError("No space left on device")

    if broken == "writing":
        monkeypatch.setattr(new, "save_pretrained", full, raising=False)
    else:
        monkeypatch.setattr(*((os, "rename") if broken == "the commit" else (shutil, "move")), full)
    said, found = ("the next load or save goes on", new) if broken == "the moving" else ("as it was", old)
    with pytest.raises(OSError, match=rf"could not write {tmp_path / 'm'} .*No space left.* {said}"):
        save(new, tmp_path / "m")
    monkeypatch.undo()
    assert same(weights(load(tmp_path / "m")), weights(found))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == before


def test_there_is_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; save a model there first"):
        load(tmp_path / "nowhere")


def edited(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: not JSON .*No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json: not JSON with an object in it .*list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json: not JSON"),
        (lambda f: edited(f / "config.json", architectures=None), "architectures None names no Transformers model"),
        (lambda f: edited(f / "config.json", architectures="BertModel"), "names no Transformers model"),
        (lambda f: edited(f / "config.json", architectures=["os"]), "names no Transformers model"),
        (lambda f: edited(f / "config.json", architectures=["AutoModel"]), "names no Transformers model"),
        (lambda f: edited(f / "config.json", architectures=["Nonsense"]), "names no Transformers model"),
        (lambda f: edited(f / "config.json", hidden_size="wide"), ""),
        (lambda f: edited(f / "config.json", hidden_size=32), ""),
        (lambda f: edited(f / "config.json", num_hidden_layers=3), "weights missing"),
        (lambda f: (f / "model.safetensors").unlink(), ""),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), ""),
        (lambda f: break_file("truncated model.safetensors", f), ""),
        (lambda f: shutil.rmtree(f) or f.mkdir(), "config.json: not JSON .*No such file"),
    ],
)
def test_a_broken_model_folder_is_said(tiny_model, tmp_path, damage, message):
    folder = save(tiny_model(), tmp_path / "m")
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message or None):
        load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "multitask.json").write_text("{}"), "multitask.json describes no heads"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"a": 1}}'), "multitask.json describes no heads"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"a": {"task": "x"}}}'), "task='x': choose one of"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"a": {"speed": 1}}}'), "describes no heads.*speed"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"b": {}}}'), "heads.safetensors does not fit"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"a": {"num_labels": 7}}}'), "does not fit"),
        (lambda f: (f / "heads.safetensors").unlink(), "heads.safetensors: not a whole .*No such file"),
        (lambda f: (f / "heads.safetensors").write_bytes(b"junk"), "heads.safetensors: not a whole safetensors file"),
        (lambda f: shutil.rmtree(f / "encoder"), "config.json: not JSON .*No such file"),
    ],
)  # fmt: skip
def test_a_broken_folder_of_several_tasks_is_said(tiny_model, tmp_path, damage, message):
    folder = save(MultiTaskModel(tiny_model("encoder"), {"a": Head()}), tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_folder_of_pickles_is_not_opened(tiny_model, tmp_path):
    folder = save(tiny_model(), tmp_path / "m")
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError)):
        load(folder)


def test_code_in_a_folder_does_not_run(tiny_model, tmp_path):
    folder = save(tiny_model(), tmp_path / "m")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edited(folder / "config.json", auto_map={"AutoModelForSequenceClassification": "evil.Evil"})
    load(folder)
    assert not (tmp_path / "ran").exists()


def test_adapters_that_peft_made_bring_a_base_that_has_no_name(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="base model is saved too, in .*m/base: it was loaded from no folder or name"):
        folder = save(model, tmp_path / "m")
    row = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(load(folder)(**row).logits, model.eval()(**row).logits)


def test_what_can_not_be_saved(tiny_model, tmp_path):
    for model, tokenizer in ((None, None), (torch.nn.Linear(2, 2), None), (tiny_model(), "minilm")):
        with pytest.raises(TypeError, match="which can't be saved; pass one of Transformers'"):
            save(model, tmp_path / "m", tokenizer)
    assert not list(tmp_path.iterdir())
