"""A resumed run is the run that was never stopped; a folder is a whole model or none."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_training import LABELS, make_rows, quick, raising, same, weights

import ftlib.checkpoints as checkpoints
import ftlib.training as training
from ftlib.batching import collate
from ftlib.checkpoints import damage
from ftlib.multitask import Head, MultiTaskModel
from ftlib.saving import load, save
from ftlib.training import fit
from ftlib.tuning import tune
from ftlib.unpadding import is_unpadded, unpad

# ----------------------------------------------------------------------------------------------- training states


def history(run):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.history]


def stop_after(monkeypatch, count):
    """The run is killed after `count` steps, as if the machine had gone away: nothing is tidied up."""
    real = training._Loop.step

    def step(self, number, rows):
        if number >= count:
            raise SystemExit
        real(self, number, rows)

    monkeypatch.setattr(training._Loop, "step", step)


def resumed(monkeypatch, build, data, config, stops, **options):
    """Runs that are killed after so many steps each, then a last one to the end."""
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
            patch.setattr(training, "evaluate", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
        stopped = fit(build(), rows, eval_dataset=held_out, config=config, loss=loss)
    assert stopped.stopped == "interrupted" and stopped.steps == (1 if where == "forward" else 3)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{stopped.steps:08d}"]
    model = build()
    run = fit(model, rows, eval_dataset=held_out, config=config)
    assert history(run) == history(expected) and same(weights(model), weights(whole))


def test_an_interrupt_between_weights_and_history_writes_nothing(tiny_model, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.amp.GradScaler, "update", interrupt)
    run = fit(tiny_model(), make_rows(4), config=quick(checkpoint_dir=str(tmp_path / "c")))
    assert run.stopped == "interrupted" and not list(tmp_path.glob("c/*"))


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
    assert load_file(tmp_path / "step-00000006" / "state.safetensors")["rng.cpu.0"].dtype == torch.uint8


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
    with pytest.warns(UserWarning, match="skipped checkpoint step-00000004: state.safetensors is missing"):
        again = fit(model, make_rows(12), config=config)
    assert history(again) == history(run) and same(weights(model), weights(expected))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(learning_rate=1e-3), r"config.learning_rate differ"),
        (dict(seed=1), r"config.seed"),
        (dict(epochs=3), r"steps"),
        (dict(batch_size=2), r"config.batch_size, steps"),
        ("rows", r"rows, data"),
        ("labels", r"data differ"),
        ("frozen", r"model differ"),
        ("wider", r"model differ"),
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


def test_a_failed_write_leaves_the_checkpoints_before_it(tiny_model, tmp_path, monkeypatch):
    calls, real = [], checkpoints.save_file

    def failing(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
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
    assert names == {".safetensors", ".json"}


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
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}
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


@pytest.mark.parametrize("content", ["notes.txt", "config.json", "code.py", "1_Pooling/config.json"])
def test_what_is_no_model_is_not_overwritten(tiny_model, tmp_path, content):
    folder = tmp_path / "f"
    if content in ("code.py", "1_Pooling/config.json"):  # a model, and something that is no part of one
        save(tiny_model(), folder)
    (folder / content).parent.mkdir(parents=True, exist_ok=True)
    (folder / content).write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds files but no model|holds more than a model: (code.py|1_Pooling)"):
        save(tiny_model(), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="is a file; name a folder"):
        save(tiny_model(), folder / content)


@pytest.mark.parametrize("broken", ["writing", "the rename"])
def test_a_failed_save_leaves_the_old_model(tiny_model, tmp_path, monkeypatch, broken):
    old = tiny_model()
    save(old, tmp_path / "m")
    new = tiny_model(seed=5)
    if broken == "writing":

        def half(folder, **options):
            (folder / "config.json").write_text("{")
            raise OSError("No space left on device")

        monkeypatch.setattr(new, "save_pretrained", half, raising=False)
    else:
        real = os.rename

        def rename(self, target):
            if self.name.endswith(".new"):
                raise OSError("No space left on device")
            real(self, target)

        monkeypatch.setattr(checkpoints.Path, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        save(new, tmp_path / "m")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert same(weights(load(tmp_path / "m")), weights(old))


def test_there_is_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; save a model there first"):
        load(tmp_path / "nowhere")


def edited(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json: expected a JSON object, got list"),
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
        (lambda f: shutil.rmtree(f) or f.mkdir(), "config.json is missing"),
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
        (lambda f: (f / "multitask.json").write_text("{}"), "multitask.json: no 'heads'"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"a": 1}}'), "multitask.json: "),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"a": {"task": "x"}}}'), "unknown task 'x'"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"a": {"speed": 1}}}'), "multitask.json: .*speed"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"b": {}}}'), "heads.safetensors does not fit"),
        (lambda f: (f / "multitask.json").write_text('{"heads": {"a": {"num_labels": 7}}}'), "does not fit"),
        (lambda f: (f / "heads.safetensors").unlink(), "heads.safetensors is missing"),
        (lambda f: (f / "heads.safetensors").write_bytes(b"junk"), "heads.safetensors: not a whole safetensors file"),
        (lambda f: shutil.rmtree(f / "encoder"), "config.json is missing"),
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


def test_adapters_that_peft_made_need_a_base_by_name(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    folder = save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="names no base model; pass base="):
        load(folder)
    save(model, folder)  # over itself


def test_what_can_not_be_saved(tiny_model, tmp_path):
    for model, tokenizer in ((None, None), (torch.nn.Linear(2, 2), None), (tiny_model(), "minilm")):
        with pytest.raises(TypeError, match="which can't be saved; pass one of Transformers'"):
            save(model, tmp_path / "m", tokenizer)
    assert not list(tmp_path.iterdir())
