"""Padding and cutting into batches, by hand; the numbers that settings share."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junk import ROWS
from torch.testing import assert_close

from ftlib.core.batches import IGNORE, collate, number, one_of, padded, short, split_by_size, stacked, to_device, whole

LOOSE = settings(
    deadline=None, max_examples=200, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

# --------------------------------------------------------------------------------------------------- padding


def test_collate_pads_on_the_right():
    rows = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "labels": 1},
        {"input_ids": [8], "token_type_ids": [1], "labels": 0},
    ]
    batch = collate(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_collate_pads_on_the_left():
    rows = [{"input_ids": [5, 6, 7], "labels": [1, -100, 2]}, {"input_ids": [8], "labels": [0]}]
    batch = collate(rows, pad_token_id=9, padding_side="left")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[1, -100, 2], [-100, -100, 0]]


@pytest.mark.parametrize(
    ("labels", "expected", "dtype"),
    [
        ([0.5, 2.0], [0.5, 2.0], torch.float32),
        ([[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]], torch.float32),
        ([[1, 2], [3]], [[1, 2], [3, -100]], torch.int64),
        ([1, -100], [1, -100], torch.int64),
    ],
)
def test_collate_keeps_the_kind_of_label(labels, expected, dtype):
    rows = [{"input_ids": [5, 6], "labels": labels[0]}, {"input_ids": [7], "labels": labels[1]}]
    batch = collate(rows)
    assert batch["labels"].tolist() == expected
    assert batch["labels"].dtype == dtype


def test_collate_of_several_tasks():
    rows = [
        {"input_ids": [5, 6], "labels": {"tags": [1, -100]}},
        {"input_ids": [7], "labels": {"stars": 2.5, "topic": 3}},
        {"input_ids": [8], "labels": {"tags": [0], "topic": 1}},
    ]
    batch = collate(rows)
    assert {task: index.tolist() for task, index in batch["rows"].items()} == {
        "tags": [0, 2],
        "stars": [1],
        "topic": [1, 2],
    }
    assert batch["labels"]["tags"].tolist() == [[1, -100], [0, -100]]
    assert batch["labels"]["stars"].tolist() == [2.5]
    assert batch["labels"]["topic"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows that do not go together"),
        ([{"input_ids": [1]}], {"padding_side": "middle"}, "padding_side=.middle.: choose one of left, right"),
        ([{"ids": [1]}], {}, "rows that do not go together .*input_ids"),
        ([{"input_ids": [1], "labels": 1}, {"input_ids": [1]}], {}, "rows that do not go together"),
        ([{"input_ids": [1], "token_type_ids": [0]}, {"input_ids": [1]}], {}, "rows that do not go together"),
        ([{"input_ids": [1], "labels": [1.0]}, {"input_ids": [1], "labels": [1.0, 2.0]}], {}, "do not go together"),
        ([{"input_ids": [2**70]}], {}, "rows that do not go together"),
    ],
)  # fmt: skip
def test_rows_that_do_not_collate(rows, options, message):
    with pytest.raises(ValueError, match=message):
        collate(rows, **options)


def test_to_device_reaches_nested_tensors():
    batch = {"a": torch.ones(1), "b": {"c": torch.zeros(1)}, "d": "text"}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].device.type == moved["b"]["c"].device.type == "meta"
    assert moved["d"] == "text" and batch["a"].device.type == "cpu"


# --------------------------------------------------------------------------------------------------- batches


def test_split_by_size_by_hand():
    lengths = [3, 9, 1, 4, 4]
    assert split_by_size(range(5), lengths, batch_size=2) == [[1, 3], [4, 0], [2]]
    assert split_by_size(range(5), lengths, max_tokens=9) == [[1], [3, 4], [0, 2]]
    assert split_by_size(range(5), lengths, batch_size=1, max_tokens=9) == [[1], [3], [4], [0], [2]]
    assert split_by_size([2, 0], lengths) == [[0, 2]]
    assert split_by_size([], lengths, batch_size=2) == []


@LOOSE
@given(st.lists(st.integers(1, 20), max_size=30), st.none() | st.integers(1, 8), st.none() | st.integers(20, 60))
def test_split_by_size_loses_nothing_and_keeps_both_limits(lengths, batch_size, max_tokens):
    plan = split_by_size(range(len(lengths)), lengths, batch_size=batch_size, max_tokens=max_tokens)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    longest = [lengths[batch[0]] for batch in plan]
    assert longest == sorted(longest, reverse=True)
    for batch in plan:
        assert batch_size is None or len(batch) <= batch_size
        assert max_tokens is None or len(batch) * max(lengths[i] for i in batch) <= max_tokens


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_tokens": -1}, {"batch_size": 2.0}, {"max_tokens": True}])
def test_split_by_size_refuses(options):
    with pytest.raises(ValueError, match="need a whole number of at least 1"):
        split_by_size([0], [1], **options)


def test_rows_of_one_length_go_together():
    assert split_by_size(range(6), [3, 2, 3, 2, 1, 3], batch_size=2, alike=True) == [[0, 2], [5], [1, 3], [4]]
    assert split_by_size(range(3), [2, 2, 1], alike=True) == [[0, 1], [2]]


def test_split_by_size_names_the_row_that_is_too_long():
    with pytest.raises(ValueError, match=r"row 1 has 9 tokens, over max_tokens=8; raise it or cut it"):
        split_by_size([0, 1], [3, 9], max_tokens=8)


# ------------------------------------------------------------------------------------------------- bad input


@LOOSE
@given(ROWS)
def test_any_rows_collate_or_give_a_plain_error(rows):
    try:
        batch = collate(rows)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert batch["input_ids"].shape == batch["attention_mask"].shape


# --------------------------------------------------------------------------------------------------- further columns


@pytest.mark.parametrize("side", ["right", "left"])
def test_other_columns_are_padded_where_they_have_a_value_a_token_else_stacked(side):
    rows = [
        {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2], "marker_positions": [1, 2], "labels": 0},
        {"input_ids": [8], "position_ids": [4], "marker_positions": [0, 0], "labels": 1},
    ]
    batch = collate(rows, padding_side=side)
    assert batch["position_ids"].tolist() == [[0, 1, 2], [4, 0, 0] if side == "right" else [0, 0, 4]]
    assert batch["marker_positions"].tolist() == [[1, 2], [0, 0] if side == "right" else [2, 2]]


def test_rows_of_several_tasks_may_have_columns_that_others_have_not():
    rows = [
        {"input_ids": [5, 6, 7], "labels": {"a": 0}},
        {"input_ids": [8, 9], "token_type_ids": [0, 1], "marker_positions": [0, 1], "labels": {"b": 1}},
        {"input_ids": [5, 8, 9, 7], "token_type_ids": [0, 1, 1, 1], "marker_positions": [1, 3], "labels": {"b": 1}},
    ]
    for order in ([0, 1, 2], [2, 1, 0]):
        batch = collate([rows[i] for i in order])
        types, places = batch["token_type_ids"][order].tolist(), batch["marker_positions"][order].tolist()
        assert types == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]] and places == [[0, 0], [0, 1], [1, 3]]


def test_columns_that_are_no_inputs_are_left_out():
    batch = collate([{"input_ids": [5, 6], "word_starts": [0, None]}])
    assert set(batch) == {"input_ids", "attention_mask"} and batch["attention_mask"].tolist() == [[1, 1]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_a_rows_own_mask_hides_stays_hidden(side):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, {"input_ids": [8]}]
    batch = collate(rows, padding_side=side)
    assert batch["attention_mask"].tolist() == [[1, 0, 1], [1, 0, 0] if side == "right" else [0, 0, 1]]
    with pytest.raises(ValueError, match="rows that do not go together"):
        collate([{"input_ids": [5, 6, 7], "attention_mask": [1, 1]}])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_list_of_numbers_a_token_is_padded_with_zeros(side):
    rows = [{"input_ids": [5, 6], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}, {"input_ids": [8], "bbox": [[9, 9, 9, 9]]}]
    second = [[9, 9, 9, 9], [0, 0, 0, 0]] if side == "right" else [[0, 0, 0, 0], [9, 9, 9, 9]]
    assert collate(rows, padding_side=side)["bbox"].tolist() == [rows[0]["bbox"], second]
    mixed = [rows[0] | {"labels": {"a": 1}}, {"input_ids": [8], "labels": {"b": 1}}]  # another task's row has none
    assert collate(mixed)["bbox"].tolist() == [rows[0]["bbox"], [[0, 0, 0, 0]] * 2]


def test_rows_may_be_arrays():
    rows = [{"input_ids": np.array([5, 6], dtype=np.int32), "labels": np.array([1, -100])}, {"input_ids": np.array([7]),
            "labels": np.array([2])}]  # fmt: skip
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]] and batch["input_ids"].dtype == torch.int64
    assert batch["labels"].tolist() == [[1, -100], [2, -100]]


def test_a_way_to_stack_of_ones_own():
    rows = [{"input_ids": [5, 6], "labels": [1, 2]}, {"input_ids": [7, 8], "labels": [3, 4]}]
    seen = []
    given_ = {"": lambda labels, sizes, side: seen.append((list(labels), list(sizes), side)) or torch.tensor([9, 9])}
    assert collate(rows, stack=given_)["labels"].tolist() == [9, 9]
    assert seen == [([[1, 2], [3, 4]], [2, 2], "right")]
    mixed = [{**row, "labels": {"a": row["labels"]}} for row in rows]
    assert collate(mixed, stack={"a": lambda labels, sizes, side: torch.tensor(labels)})["labels"]["a"].shape == (2, 2)


def test_padded_and_stacked_by_hand():
    assert padded([[1], [2, 3]], [1, 2], fill=9).tolist() == [[1, 9], [2, 3]]
    assert padded([[1], [2, 3]], [1, 4], "left", 9).tolist() == [[9, 9, 9, 1], [9, 9, 2, 3]]
    assert stacked([1, IGNORE], [3, 3]).tolist() == [1, -100]
    assert stacked([[1, 0], [0, 1]], [3, 3]).dtype == torch.float32  # not one a token: several labels


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "low", "high", "below", "good"),
    [
        (0, 0, 1, False, True), (1, 0, 1, False, True), (0.5, 0, 1, False, True), (1.0, 0, 1, True, False),
        (0.999, 0, 1, True, True), (-1e-9, 0, 1, False, False), (1.1, 0, 1, False, False), (True, 0, 1, False, False),
        ("1", 0, 1, False, False), (None, 0, 1, False, False), (math.nan, 0, 1, False, False),
        (math.inf, 0, math.inf, False, False), (1e300, 0, math.inf, False, True), (10**400, 0, math.inf, False, False),
        (-math.inf, -math.inf, math.inf, False, False), (np.float32(0.5), 0, 1, False, False),
        ([1], 0, 1, False, False),
    ],
)  # fmt: skip
def test_number(value, low, high, below, good):
    if good:
        assert number("rate", value, low, high, below=below) is value
    else:
        with pytest.raises(ValueError, match=r"rate=.*: need a number from"):
            number("rate", value, low, high, below=below)


def test_what_number_says():
    for options, said in (
        (dict(low=0), "x=-1: need a number from 0, finite"), (dict(low=0, high=1), "x=-1: need a number from 0 to 1"),
        (dict(low=0, high=1, below=True), "x=-1: need a number from 0 to below 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{said}$"):
            number("x", -1, **options)


@pytest.mark.parametrize(
    ("value", "low", "good"),
    [
        (1, 1, True), (0, 0, True), (0, 1, False), (-1, 0, False), (2**31 - 1, 1, True), (2**31, 1, False),
        (1.0, 1, False), (True, 1, False), ("1", 1, False), (None, 1, False), (np.int64(3), 1, False), (-3, -5, True),
    ],
)  # fmt: skip
def test_whole(value, low, good):
    if good:
        assert whole("size", value, low) is value
    else:
        with pytest.raises(ValueError, match=r"size.*need a whole number"):
            whole("size", value, low)


def test_a_huge_whole_number_is_not_printed():
    with pytest.raises(ValueError, match=r"^size has 33220 bits: need a whole number below 2\*\*31$"):
        whole("size", 10**10_000)


@pytest.mark.parametrize(
    ("value", "choices", "good"),
    [
        ("a", ("a", "b"), True), ("c", ("a", "b"), False), (True, (True, False), True), (1, (True, False), False),
        (None, (None, "auto"), True), (1.0, (1, 2), False), (2, iter((1, 2)), True), ([], ("a",), False),
        (np.zeros(2), ("a",), False),
    ],
)  # fmt: skip
def test_one_of(value, choices, good):
    if good:
        assert one_of("way", value, choices) is value
    else:
        with pytest.raises(ValueError, match=r"(?s)way=.*: choose one of"):
            one_of("way", value, choices)


def test_short():
    assert short([1]) == "[1]" and short("x" * 58) == repr("x" * 58)
    assert len(short("x" * 59)) == 60 and short("x" * 99).endswith("...")


def test_further_inputs_keep_their_kind():
    first = {"input_ids": [5, 6, 7], "w": [0.5, 0.25, 0.9], "v": [1.5, 2.0]}
    batch = collate([first, {"input_ids": [8], "w": [0.1], "v": [3.0, 4.0]}])
    assert_close(batch["w"], torch.tensor([[0.5, 0.25, 0.9], [0.1, 0.0, 0.0]]))
    assert_close(batch["v"], torch.tensor([[1.5, 2.0], [3.0, 4.0]]))


def test_positions_of_tokens_move_with_padding_on_the_left():
    rows = [{"input_ids": [5, 6, 7], "marker_positions": [0, 2]}, {"input_ids": [8, 9], "marker_positions": [0, 1]}]
    assert collate(rows, padding_side="left")["marker_positions"].tolist() == [[0, 2], [1, 2]]
    assert collate(rows)["marker_positions"].tolist() == [[0, 2], [0, 1]]
