"""The command line: what a run.toml may say, a whole run on a tiny model, the list of data, the doctor."""

import dataclasses
import json
import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Sequence

import ftlib
from ftlib.__main__ import main, read_run, tokenized_for
from ftlib.inputs import assets

GOOD = 'model = "m"\ntask = "sequence-classification"\ncorpus = "c"\noutput = "o"\n'


def test_read_run(tmp_path):
    (tmp_path / "run.toml").write_text(GOOD + 'tune = "head-only"\nlimit = 5\nresume = "auto"\n[train]\nepochs = 1\n')
    assert read_run(tmp_path / "run.toml") == {
        "model": "m", "task": "sequence-classification", "corpus": "c", "output": "o", "tune": "head-only", "limit": 5,
        "resume": "auto", "train": {"epochs": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "not TOML"),
        ('task = "x"\n', "'model' is missing"),
        (GOOD.replace('corpus = "c"\n', ""), "'corpus' is missing"),
        (GOOD + "speed = 1\n", "unknown key 'speed'; known are model, task"),
        (GOOD.replace('"m"', "3"), "model = 3 must be a str"),
        (GOOD + 'limit = "5"\n', "limit = '5' must be a int"),
        (GOOD + "limit = true\n", "limit = True must be a int"),
        (GOOD + "limit = 0\n", "limit = 0 must be at least 1"),
        (GOOD + "train = 3\n", "train = 3 must be a dict"),
        (GOOD + "[train]\nspeed = 1\n", r"unknown key 'speed' in \[train\]; known are batch_size"),
        (GOOD + "[train]\nepochs = 0\n", "epochs=0: need a whole number"),
        (GOOD + '[train]\nlearning_rate = "1e-3"\n', "learning_rate='1e-3'"),
        (GOOD + 'resume = "always"\n', "resume='always': choose one of"),
        (GOOD + 'tune = "lara"\n', "unknown tune 'lara'; choose one of full, head-only, last-layers"),
        (GOOD + "tune = 3\n", "tune = 3 must be a str or a dict"),
        (GOOD + "[tune]\nrank = 3\n", "unknown tune ''; choose one of full"),
        (GOOD + '[tune]\nstrategy = "lora"\nr = 3\n', r"unknown key 'r' in \[tune\]; 'lora' takes rank, alpha"),
        (GOOD + '[tune]\nstrategy = "bitfit"\nr = 3\n', r"unknown key 'r' in \[tune\]; 'bitfit' takes no options"),
        (GOOD.replace("sequence-classification", "sentiment"), "unknown task 'sentiment'; choose one of"),
    ],
)
def test_a_bad_run_file_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.setattr(ftlib, "load_corpus", None, raising=False)
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert main(["train", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ") and re.search(message, said), said
    assert said.count("\n") == 1


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe")])
def test_files_that_can_not_be_read(tmp_path, capsys, make):
    make(tmp_path / "run.toml")
    assert main(["train", str(tmp_path / "run.toml")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.fixture
def tiny_run(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """A model folder, a corpus in place of the real one, and a function that writes run.toml and runs it."""
    folder = tmp_path / "tiny"
    tiny_model("encoder").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    texts, labels = ["the film is good", "bad film", "great fun", "dull plot"] * 3, [1, 0, 1, 0] * 3
    part = Dataset.from_dict({"text": texts, "label": labels}).cast_column("label", ClassLabel(names=["neg", "pos"]))
    corpus = DatasetDict(train=part, validation=part.select(range(4)), test=part.select(range(6)))
    monkeypatch.setattr(ftlib, "load_corpus", lambda name: corpus, raising=False)

    def run(top="", train="", task="sequence-classification", model=folder):
        path = tmp_path / "run.toml"
        path.write_text(
            f'model = "{model}"\ntask = "{task}"\ncorpus = "films"\noutput = "{tmp_path / "out"}"\n{top}'
            f"[train]\nepochs = 2\nbatch_size = 4\nlearning_rate = 1e-2\nprogress = false\n{train}"
        )
        return main(["train", str(path)])

    run.corpus, run.output = corpus, tmp_path / "out"
    return run


def test_train(tiny_run, capsys, tiny_tokenizer):
    assert tiny_run('tune = "head-only"\nlimit = 10\n') == 0
    said = capsys.readouterr().out
    assert "strategy head-only" in said and "finished after" in said
    numbers = json.loads((tiny_run.output / "metrics.json").read_text())
    assert set(numbers) == {"validation", "test", "seconds", "steps"} and numbers["steps"] == 2 * 3
    model = ftlib.load(tiny_run.output / "model")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    data = ftlib.tokenize(tiny_run.corpus["test"], tiny_tokenizer, max_length=128)
    assert ftlib.evaluate(model, data) == pytest.approx(numbers["test"], abs=1e-5)
    assert [path.name for path in sorted((tiny_run.output / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]
    assert tiny_run('tune = "head-only"\nlimit = 10\n') == 0  # goes on from the last checkpoint: nothing left to do
    assert json.loads((tiny_run.output / "metrics.json").read_text())["test"] == pytest.approx(
        numbers["test"], abs=1e-5
    )


def test_train_says_what_differs_from_the_run_before(tiny_run, capsys):
    assert tiny_run("", "max_steps = 1\n") == 0
    assert tiny_run("", "max_steps = 2\n") == 1
    assert "is from another run: config.max_steps" in capsys.readouterr().err
    assert tiny_run('resume = "never"\n', "max_steps = 2\n") == 1
    assert "holds step-00000001 of an earlier run" in capsys.readouterr().err


def test_train_a_model_that_can_not_be_unpadded(tiny_run, tiny_model, tiny_tokenizer, tmp_path, capsys):
    tiny_model("encoder", model_type="mpnet").save_pretrained(tmp_path / "mpnet")
    tiny_tokenizer.save_pretrained(tmp_path / "mpnet")
    assert tiny_run("", "max_steps = 1\n", model=tmp_path / "mpnet") == 0
    assert "with padding: unpad can't handle model type 'mpnet'" in capsys.readouterr().out


def test_an_interrupted_training_replaces_nothing(tiny_run, monkeypatch, capsys):
    assert tiny_run("", "max_steps = 1\n") == 0
    before = {path.name: path.read_bytes() for path in (tiny_run.output / "model").iterdir()}
    real = ftlib.fit
    monkeypatch.setattr(ftlib, "fit", lambda *a, **k: dataclasses.replace(real(*a, **k), stopped="interrupted"))
    assert tiny_run("", "max_steps = 1\n") == 130 and capsys.readouterr().err.endswith("interrupted\n")
    assert {path.name: path.read_bytes() for path in (tiny_run.output / "model").iterdir()} == before


def test_an_interrupt_has_an_exit_status(tiny_run, monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(ftlib, "load_corpus", interrupted)
    assert tiny_run() == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("regression", "task 'regression' does not fit the corpus: its 'label' holds 2 classes"),
        ("token-classification", "task 'token-classification' needs a column 'tags'; the corpus has text, label"),
    ],
)
def test_a_task_that_does_not_fit_the_corpus(tiny_run, capsys, task, message):
    assert tiny_run(task=task) == 1
    assert message in capsys.readouterr().err


def test_columns_of_every_task(tiny_tokenizer):
    names = ["O", "B-x"]
    slots = Dataset.from_dict(
        {"text": ["book flight"], "tokens": [["book", "flight"]], "tags": [[0, 1]], "intent": [1]}
    )
    slots = slots.cast_column("tags", Sequence(ClassLabel(names=names))).cast_column(
        "intent", ClassLabel(names=["a", "b"])
    )
    data = DatasetDict(train=slots)
    done, found = tokenized_for("token-classification", data, tiny_tokenizer)
    assert found == names and done["train"]["labels"][0] == [-100, 0, 1, -100]
    done, found = tokenized_for("sequence-classification", data, tiny_tokenizer)
    assert found == ["a", "b"] and list(done["train"]["labels"]) == [1]
    pairs = DatasetDict(train=Dataset.from_dict({"text": ["good"], "text_pair": ["bad"], "label": [2.5]}))
    done, found = tokenized_for("regression", pairs, tiny_tokenizer)
    assert found is None and done["train"]["token_type_ids"][0] == [0, 0, 0, 1, 1]


def test_data_list_and_fetch(capsys, monkeypatch, tmp_path):
    assert main(["data", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)}\b", listed, re.MULTILINE) for name in assets.manifest())
    monkeypatch.setattr(assets, "fetch", lambda names: {"minilm": tmp_path})
    assert main(["data", "fetch", "minilm"]) == 0
    assert f"minilm             {tmp_path}" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["data", "fetch", "minilmm"]) == 1
    assert "error: " in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("torch", "transformers", "precision", "cache", "minilm"):
        assert word in said


@pytest.mark.parametrize("arguments", [[], ["data"], ["train"], ["fly"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and "usage: python -m ftlib" in capsys.readouterr().err
