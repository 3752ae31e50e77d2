"""Labels of own data, on to what `tokenize` makes of them: hidden ones left out, other kinds refused."""

import warnings

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import LabelEncoder, MultiLabelBinarizer

from ftlib.engine.runfile import labeled
from ftlib.inputs.tokenizing import tokenize

CLASSES, SEVERAL, TAGS = "sequence-classification", "multi-label-classification", "token-classification"


@pytest.fixture(scope="module")
def read(tiny_tokenizer):
    """{split: labels as they come out of `tokenize`}, the names of the classes, and what was said."""

    def read(task, splits, column="mood"):
        said = []
        done = labeled(splits, column, task, said.append)
        if task == TAGS:  # a word a tag
            done = {
                split: part.remove_columns("text").add_column("text", [["good"] * len(row) for row in part["label"]])
                for split, part in done.items()
            }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = tokenize(DatasetDict(done), tiny_tokenizer, text="text", label="label", task=task)
        labels = {split: part["labels"][:] for split, part in rows.items()}
        if task == TAGS:
            labels = {split: [row[1:-1] for row in own] for split, own in labels.items()}
        feature = rows["train"].features["labels"]
        return labels, getattr(getattr(feature, "feature", feature), "names", None), "\n".join(said)

    return read


def parts(column="mood", feature=None, **splits):
    def one(values):
        data = Dataset.from_dict({"text": ["good"] * len(values), column: values})
        return data.cast_column(column, feature) if feature else data

    return {split: one(values) for split, values in splits.items()}


FEW = settings(max_examples=15, deadline=None)


@FEW
@given(values=st.one_of(
    st.lists(st.integers(-5, 12), min_size=2), st.lists(st.text("abcé", min_size=1, max_size=3), min_size=2),
    st.lists(st.booleans(), min_size=2),
))  # fmt: skip
def test_classes_are_numbered_in_their_order(read, values):
    """As LabelEncoder does, and kept in the feature."""
    right = LabelEncoder().fit(values)
    found, names, _ = read(CLASSES, parts(train=values, test=values[:1]))
    assert found["train"] == right.transform(values).tolist()
    assert found["test"] == found["train"][:1] and names == [str(one) for one in right.classes_.tolist()]


@FEW
@given(values=st.lists(st.lists(st.sampled_from(["news", "sport", "art", "law"]), unique=True), min_size=1))
def test_lists_of_names_become_rows_of_0_and_1(read, values):
    values = [["art", "law"], *values]
    right = MultiLabelBinarizer().fit(values)
    found, names, _ = read(SEVERAL, parts(feature=List(Value("string")), train=values))
    assert names == right.classes_.tolist()
    np.testing.assert_array_equal(found["train"], right.transform(values))


def test_lists_of_numbers_are_classes_or_rows_of_0_and_1(read):
    feature = List(ClassLabel(names=["x", "y", "z"]))  # as go_emotions has them
    found, names, _ = read(SEVERAL, parts(feature=feature, train=[[0, 2], [], [1]]))
    assert (found["train"], names) == ([[1, 0, 1], [0, 0, 0], [0, 1, 0]], ["x", "y", "z"])
    found, names, said = read(SEVERAL, parts(train=[[0, 1, 1], [0.0, 0, 0]], test=[[-1, -1, -1]]))
    assert (found, names) == ({"train": [[0, 1, 1], [0, 0, 0]]}, None) and "test is left out" in said
    found, names, _ = read(SEVERAL, parts(train=[[7], [7, 30]]))
    assert (found["train"], names) == ([[1, 0], [1, 1]], ["7", "30"])
    table = {
        "train": Dataset.from_dict({"rude": [0, 1], "kind": [1, 0]}),
        "test": Dataset.from_dict({"rude": [-1], "kind": [-1]}),
    }
    table = {split: part.add_column("text", ["good"] * len(part)) for split, part in table.items()}
    assert read(SEVERAL, table, ["rude", "kind"])[0] == {"train": [[0, 1], [1, 0]]}  # as Jigsaw's comments


def test_tags(read):
    splits = parts(feature=List(Value("string")), train=[["B-x", "O"], ["A"]], test=[[], ["O"]])
    found, names, said = read(TAGS, splits)
    assert (found, names) == ({"train": [[2, 0], [1]], "test": [[0]]}, ["O", "A", "B-x"])
    assert "test: 1 rows without a label are left out" in said
    found, names, _ = read(TAGS, parts(train=[[3, 10], [1]], validation=[[-100, -100]]))
    assert (found, names) == ({"train": [[1, 2], [0]]}, ["1", "3", "10"])
    named = List(ClassLabel(names=["O", "A"]))
    assert read(TAGS, parts(feature=named, train=[[1, -100], [0]]))[0] == {"train": [[1, -100], [0]]}


def test_hidden_labels_and_classes_that_look_like_them(read):
    named = ClassLabel(names=["n", "p"])
    found, names, said = read(CLASSES, parts(feature=named, train=[1, 0], validation=[-1, 1], test=[-1, -1]))
    assert (found, names) == ({"train": [1, 0], "validation": [1]}, ["n", "p"])
    assert "validation: 1 rows without" in said and "test is left out: no row of it has a label" in said
    found, names, _ = read(CLASSES, parts(train=[-1, 0, 1], test=[-1]))  # negative, neutral, positive
    assert (found, names) == ({"train": [0, 1, 2], "test": [0]}, ["-1", "0", "1"])
    found, names, _ = read(CLASSES, parts(train=["b", "a"], test=["", None]))
    assert (found, names) == ({"train": [1, 0]}, ["a", "b"])
    assert read(CLASSES, parts(train=["10", "9"]))[1] == ["9", "10"]
    with pytest.raises(ValueError, match="split 'train': row 2, column 'label': the label is None"):
        read(CLASSES, parts(train=["b", "a", None]))


def test_numbers(read):
    found, names, _ = read("regression", parts(train=[1, 5], test=[-1, 2]))
    assert (found, names) == ({"train": [1.0, 5.0], "test": [-1.0, 2.0]}, None)
    assert read("regression", parts(train=[0.5, 5.0], test=[-1.0, -1.0]))[0] == {"train": [0.5, 5.0]}  # as GLUE's stsb
    assert read("regression", parts(train=[0.5], test=[float("nan"), None]))[0] == {"train": [0.5]}
    assert read("regression", parts(train=[0.5], test=[float("nan"), -1.0, 2.0]))[0]["test"] == [-1.0, 2.0]
    found, _, _ = read("regression", parts(train=[[0.5, 1.0], [2.0, 3.0]]))
    assert found["train"] == [[0.5, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (CLASSES, [0.5, 1.5], "holds 0.5; write whole numbers or words for classes, .*or set task = "),
        (CLASSES, [0.0, 1.0], "holds 0.0; write whole"),
        (CLASSES, [["a"], ["b"]], "holds lists, not one label a row"),
        (CLASSES, [{"a": 1}], "'mood' holds .*'a'.*; write whole"),
        (CLASSES, [[[1]]], "holds lists, not one"),
        (SEVERAL, [[[1]]], r"'mood' holds \[1\]; write whole"),
        (TAGS, ["O", "O"], "holds one label a row, no lists"),
        (SEVERAL, ["a", "b"], r"holds one label a row, no lists \(JSON Lines\), or name columns of 0 and 1: label ="),
        (SEVERAL, [[0.5, 1.0]], "holds 0.5; write whole"),
        (TAGS, [[0, -100, 1]], "holds -100, which is no class; give the column a datasets.ClassLabel"),
        ("regression", ["2,5", "3"], "holds '2,5'; write plain numbers"),
    ],
)
def test_labels_of_another_kind_are_refused_with_the_remedy(task, values, message):
    with pytest.raises(ValueError, match=message):
        labeled(parts(train=values), "mood", task, print)


def test_columns_of_several_labels_hold_0_and_1():
    table = {"train": Dataset.from_dict({"rude": ["yes", "no"], "kind": ["no", "no"]})}
    with pytest.raises(ValueError, match=r"its \['rude', 'kind'\] holds 'no'; .*0 or 1 in several columns"):
        labeled(table, ["rude", "kind"], SEVERAL)


def test_columns_called_label_make_way_and_nothing_is_written(tmp_path):
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [9, 9, 9], "mood": ["x", "y", None]})
    data.save_to_disk(tmp_path / "own")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    part = Dataset.load_from_disk(tmp_path / "own")
    done = labeled({"train": part, "test": part}, "mood", CLASSES, lambda words: None)
    assert done["train"].column_names == ["text", "label"] and done["test"]["label"][:] == ["x", "y"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
