"""What is wrong with a row is found before training, and said with its row, column and value."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import JUNK, ROWS

from ftlib.core.anatomy import max_positions
from ftlib.core.batches import collate
from ftlib.inputs.rows import Door, checked

TASKS = {
    "classes": {"": ("sequence-classification", 2)},
    "tags": {"": ("token-classification", 3)},
    "several": {"": ("multi-label-classification", 3)},
    "number": {"": ("regression", 1)},
    "numbers": {"": ("regression", 2)},
    "mixed": {"a": ("sequence-classification", 2), "b": ("token-classification", 3)},
}


def checked_rows(rows, tasks, **limits):
    return checked(rows, Door(tasks, **limits))


def test_rows_of_a_dataset_stay_in_arrow():
    data = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [1], "text": ["x"]})
    for form in (data, data.with_format("torch")):
        rows = checked_rows(form, TASKS["classes"])
        assert [list(rows[0]["input_ids"]), rows[0]["labels"], list(rows.lengths)] == [[1, 2], 1, [2]]
        assert rows.kept == [] and set(rows[0]) == {"input_ids", "labels"}


def test_the_tasks_a_row_does_not_have_are_dropped_and_no_argument_changes():
    rows = [{"input_ids": [1], "labels": {"a": 1, "b": None}}]
    assert list(checked_rows(rows, TASKS["mixed"])) == [{"input_ids": [1], "labels": {"a": 1}}]
    assert rows == [{"input_ids": [1], "labels": {"a": 1, "b": None}}]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (DatasetDict(train=Dataset.from_dict({"input_ids": [[1]]})), TypeError, r"data is a DatasetDict.*\['train'\]"),
        (Dataset.from_dict({"text": ["x"]}), ValueError, r"no column 'input_ids' \(it has text\); call ftlib"),
        (Dataset.from_dict({"input_ids": []}), ValueError, "data has zero examples"),
        ([], ValueError, "data has zero examples"),
        (["text"], ValueError, r"data row 0: expected a dict with 'input_ids', got 'text'"),
        ([{"input_ids": [1]}, {"text": "x"}], ValueError, "data row 1: expected a dict"),
        ("text", TypeError, "data must be a Dataset or a list of rows, got str"),
        ({"input_ids": [[1]]}, TypeError, "data must be a Dataset or a list of rows, got dict"),
        (None, TypeError, "got NoneType"),
        (5, TypeError, "got int"),
    ],
)  # fmt: skip
def test_what_gives_no_rows(data, kind, message):
    with pytest.raises(kind, match=message):
        checked(data, Door(TASKS["classes"], "data", labels_needed=False))


@pytest.mark.parametrize(
    ("tasks", "label", "expected"),
    [
        ("classes", 1, 1),
        ("classes", -100, -100),
        ("classes", np.int64(1), 1),
        ("classes", torch.tensor(0), 0),
        ("tags", [0, -100], [0, -100]),
        ("tags", np.array([2, 1]), [2, 1]),
        ("tags", [np.int32(2), 1], [2, 1]),
        ("several", [0, 1, 1], [0.0, 1.0, 1.0]),
        ("several", [True, False, -100], [1.0, 0.0, -100.0]),
        ("number", 3, 3.0),
        ("number", [2.5], 2.5),
        ("number", np.float32(0.5), 0.5),
        ("number", -100, -100.0),
        ("numbers", (1, 2.5), [1.0, 2.5]),
        ("mixed", {"a": 1, "b": [0, 2]}, {"a": 1, "b": [0, 2]}),
        ("mixed", {"a": 0}, {"a": 0}),
    ],
)
def test_good_labels(tasks, label, expected):
    (row,) = checked_rows([{"input_ids": [5, 6], "labels": label}], TASKS[tasks])
    assert row["labels"] == expected
    assert type(row["labels"]) is type(expected)


@pytest.mark.parametrize(
    ("tasks", "label", "kind", "message"),
    [
        ("classes", 2, ValueError, r"label 2 is outside 0..1; give the model num_labels=3"),
        ("classes", -1, ValueError, r"label -1 is outside 0..1; count labels from 0"),
        ("classes", 1.0, TypeError, r"1.0 is no class number"),
        ("classes", True, TypeError, r"True is no class number"),
        ("classes", "pos", TypeError, r"'pos' is no class number"),
        ("classes", [1], ValueError, r"a list of 1 labels, but the model gives one label per text"),
        ("classes", None, ValueError, r"no 'labels'"),
        ("classes", {"x": 1}, ValueError, r"labels for a task 'x'; the model has one task"),
        ("tags", [1], ValueError, r"1 labels for 2 tokens"),
        ("tags", 1, ValueError, r"1 for 2 tokens; one label per token"),
        ("tags", [1, 3], ValueError, r"label 3 is outside 0..2"),
        ("tags", [1, 0.5], TypeError, r"0.5 is no class number"),
        ("several", [0.0, 1.0], ValueError, r"\[0.0, 1.0\]; multi-label needs a list of 3 values"),
        ("several", 1, ValueError, r"multi-label needs a list of 3"),
        ("several", [0.0, 1.0, 0.5], ValueError, r"0.5 is neither 0, 1 nor -100"),
        ("several", [0.0, 1.0, float("nan")], ValueError, r"nan is neither"),
        ("number", "3", TypeError, r"'3' is no number"),
        ("number", True, TypeError, r"True is no number"),
        ("number", float("nan"), ValueError, r"the value is nan; drop the row"),
        ("number", float("inf"), ValueError, r"the value is inf"),
        ("number", 10**400, ValueError, r"the value is 1000"),
        ("number", 1e39, ValueError, r"the value is 1e\+39"),
        ("number", [1.0, 2.0], ValueError, r"2 values for 1 outputs"),
        ("numbers", 1.0, ValueError, r"1 values for 2 outputs"),
        ("mixed", 1, ValueError, r"a plain label, but the model has the tasks a, b"),
        ("mixed", {"c": 1}, ValueError, r"labels for a task 'c'; the model has 'a', 'b'"),
        ("mixed", {"a": 5}, ValueError, r"column 'labels' \(a\): label 5 is outside 0..1"),
        ("mixed", {}, ValueError, r"no 'labels'"),
    ],
)
def test_bad_labels(tasks, label, kind, message):
    rows = [{"input_ids": [5, 6], "labels": {"a": 1}} if tasks == "mixed" else {"input_ids": [5, 6]}]
    if tasks != "mixed":
        good = {"classes": 0, "tags": [0, 0], "several": [0, 0, 0], "number": 1, "numbers": [1, 2]}[tasks]
        rows[0]["labels"] = good
    with pytest.raises(kind, match=rf"data row 1.*{message}"):
        checked_rows([*rows, {"input_ids": [5, 6], "labels": label}], TASKS[tasks], name="data")


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"input_ids": []}, ValueError, "column 'input_ids': no tokens"),
        ({"input_ids": [1] * 9}, ValueError, r"9 tokens, the model takes 8; tokenize with max_length=8"),
        ({"input_ids": [1, 64]}, ValueError, r"id 64 is outside 0..63; tokenizer and model differ"),
        ({"input_ids": [-1]}, ValueError, r"id -1 is outside 0..63"),
        ({"input_ids": [1.5]}, TypeError, r"1.5 is no whole number"),
        ({"input_ids": [True]}, TypeError, r"True is no whole number"),
        ({"input_ids": [[1]]}, TypeError, r"\[1\] is no whole number"),
        ({"input_ids": "abc"}, TypeError, r"expected a list of whole numbers, got 'abc'"),
        ({"input_ids": 5}, TypeError, r"expected a list of whole numbers, got 5"),
        ({"input_ids": None}, TypeError, r"expected a list of whole numbers, got None"),
        ({"input_ids": [1, 2], "token_type_ids": [0]}, ValueError, r"1 token_type_ids values for 2 input_ids"),
        ({"input_ids": [1], "token_type_ids": [2]}, ValueError, r"'token_type_ids': id 2 is outside 0..1"),
        ({"input_ids": [1], "token_type_ids": "a"}, ValueError, r"column 'token_type_ids': expected numbers, got 'a'"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, ValueError, r"or 1 for each of 2 input_ids, got \[1\]"),
        ({"input_ids": [1], "attention_mask": [0]}, ValueError, r"no tokens"),
        ({}, ValueError, r"expected a dict with 'input_ids'"),
    ],
)
def test_bad_tokens(row, kind, message):
    with pytest.raises(kind, match=rf"dataset row 0.*{message}"):
        checked_rows(
            [row], TASKS["classes"], vocab_size=64, max_positions=8, sizes={"token_type_ids": 2}, labels_needed=False
        )  # fmt: skip


def test_token_types_in_some_rows_only():
    rows = [{"input_ids": [1], "token_type_ids": [0]}, {"input_ids": [1]}]
    with pytest.raises(ValueError, match="dataset row 1: token_type_ids in some rows and not in others"):
        checked_rows(rows, TASKS["classes"], labels_needed=False)


def test_tensors_and_arrays_become_lists():
    rows = [{"input_ids": torch.tensor([1, 2]), "labels": np.array([0, 1])}]
    assert list(checked_rows(rows, TASKS["tags"])) == [{"input_ids": [1, 2], "labels": [0, 1]}]


def test_padding_that_a_mask_marks_is_taken_out():
    """Rows that came padded would otherwise feed [PAD] to the model as if it were text."""
    row = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "token_type_ids": [0, 1, 0], "labels": [1, 2, -100]}
    [found] = checked_rows([row], TASKS["tags"])
    assert found == {"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": [1, 2]}
    left = {"input_ids": [0, 5], "attention_mask": torch.tensor([0, 1]), "labels": 1}
    assert list(checked_rows([left], TASKS["classes"])) == [{"input_ids": [5], "labels": 1}]
    mixed = {"input_ids": [5, 0], "attention_mask": [1, 0], "labels": {"a": 1, "b": [2, -100]}}
    assert checked_rows([mixed], TASKS["mixed"])[0]["labels"] == {"a": 1, "b": [2]}
    assert row["input_ids"] == [5, 6, 0]  # the argument stays


@settings(deadline=None, max_examples=300, derandomize=True)
@given(ROWS, st.sampled_from(sorted(TASKS)), st.booleans())
def test_any_rows_are_checked_or_give_a_plain_error(rows, tasks, labels_needed):
    try:
        checked = checked_rows(rows, TASKS[tasks], vocab_size=64, max_positions=8, labels_needed=labels_needed)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert all(row["input_ids"] and all(type(i) is int for i in row["input_ids"]) for row in checked)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(JUNK, st.sampled_from(sorted(TASKS)))
def test_any_label_is_checked_or_gives_a_plain_error(label, tasks):
    try:
        (row,) = checked_rows([{"input_ids": [5, 6], "labels": label}], TASKS[tasks])
    except (ValueError, TypeError) as error:
        assert "dataset row 0" in str(error)
        return
    assert row["labels"] is not None


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    st.sampled_from(["attention_mask", "bbox", "marker_positions", "position_ids", "token_type_ids", "w"]),
    JUNK | st.lists(st.lists(st.integers(-1, 9), max_size=3), max_size=3) | st.lists(st.sampled_from([0, 1.0, True])),
)
def test_any_further_column_is_checked_or_gives_a_plain_error(name, value):
    door = Door(TASKS["classes"], labels_needed=False, inputs=frozenset({name}), sizes={"bbox": 5})
    try:
        rows = checked([{"input_ids": [5, 6], name: value}] * 2, door)
    except (ValueError, TypeError) as error:
        assert "dataset row 0" in str(error)
        return
    assert len(collate(list(rows))["input_ids"]) == 2  # what passed the door makes a batch


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "camembert", "xlm-roberta", "distilbert", "electra", "mpnet"]
)
def test_max_positions_is_what_the_model_takes(tiny_model, model_type):
    options = {"pad_token_id": 1} if model_type in ("roberta", "camembert", "xlm-roberta", "mpnet") else {}
    model = tiny_model("encoder", model_type=model_type, **options)
    limit = max_positions(model.config)
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))
