"""What holds a table becomes the same Dataset; what does not is named: row, column, value, file."""

import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.inputs.reading import as_dataset

ROWS = [{"text": "a fine film", "label": 1}, {"text": 'a "dull", slow one', "label": 0}, {"text": "é\nnot", "label": 2}]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


class Own(torch.utils.data.Dataset):
    """Rows as in PyTorch's tutorials: __len__ and __getitem__, no __iter__, numbers as tensors."""

    items = columns = ROWS  # users' names, which say nothing

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {"text": ROWS[i]["text"], "label": torch.tensor(ROWS[i]["label"])}


class Polars:
    """What a polars DataFrame is to us: `to_arrow`, with text as large_string, and categories."""

    def __init__(self, text):
        self.text = text

    def to_arrow(self):
        return pa.table({"text": self.text, "label": pa.array(COLUMNS["label"])})


FRAME = pd.DataFrame(COLUMNS, index=[7, 3, 9])
TEXT = pa.array(COLUMNS["text"])
KINDS = {
    "pandas": lambda: FRAME,
    "pandas categories": lambda: FRAME.astype({"text": "category"}),
    "large strings": lambda: Polars(TEXT.cast(pa.large_string())),
    "categories": lambda: Polars(TEXT.cast(pa.large_string()).dictionary_encode()),
    "pyarrow": lambda: pa.table(COLUMNS),
    "list": lambda: ROWS,
    "records of pandas": lambda: FRAME.to_dict("records"),
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "columns": lambda: COLUMNS,
    "arrays": lambda: {"text": np.array(COLUMNS["text"]), "label": torch.tensor(COLUMNS["label"])},
    "series": lambda: {"text": FRAME["text"], "label": FRAME["label"]},
    "columns of a Dataset": lambda: {name: Dataset.from_dict(COLUMNS)[name] for name in COLUMNS},
    "torch": Own,
    "torch's part": lambda: torch.utils.data.Subset(Own(), [0, 1, 2]),
    "Dataset": lambda: Dataset.from_dict(COLUMNS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_from_every_kind(kind):
    done = as_dataset(KINDS[kind]())
    assert isinstance(done, Dataset) and done.column_names == ["text", "label"]
    assert done.to_list() == ROWS


WRITTEN = {  # by others than us: pandas, Python's json, the datasets library
    "a.csv": lambda path: FRAME.to_csv(path, index=False),
    "bom.CSV": lambda path: FRAME.to_csv(path, index=False, encoding="utf-8-sig"),
    "a.tsv": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "a.json": lambda path: FRAME.to_json(path, orient="records"),
    "columns.json": lambda path: path.write_text(json.dumps(COLUMNS)),
    "lines.json": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "a.jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, ROWS)), "utf-8-sig"),
    "a.parquet": lambda path: FRAME.to_parquet(path),  # with pandas' index
    "categories.parquet": lambda path: FRAME.astype("category").to_parquet(path),
    "hub.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(str(path)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files(tmp_path, name, monkeypatch):
    """Nothing is left beside the file, nor in the library's cache."""
    path, cache = tmp_path / "data" / name, tmp_path / "cache"
    path.parent.mkdir()
    cache.mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    WRITTEN[name](path)
    assert as_dataset(path).to_list() == as_dataset(str(path)).to_list() == ROWS
    assert os.listdir(path.parent) == [name] and not any(cache.iterdir())


def test_the_names_of_classes_come_with_a_parquet_file(tmp_path):
    data = Dataset.from_list(ROWS).cast_column("label", ClassLabel(names=["bad", "good", "odd"]))
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert as_dataset(tmp_path / "a.parquet").features == data.features


def test_splits(tmp_path):
    FRAME.to_csv(tmp_path / "test.csv", index=False)
    done = as_dataset({"train": FRAME, "dev": ROWS, "test": str(tmp_path / "test.csv")})
    assert isinstance(done, DatasetDict) and {split: part.to_list() for split, part in done.items()} == {
        "train": ROWS, "dev": ROWS, "test": ROWS
    }  # fmt: skip
    assert as_dataset(done) is done


def test_what_can_be_read_again_stays_a_stream():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    done = as_dataset(Stream())
    assert isinstance(done, IterableDataset) and list(done) == list(done) == ROWS
    assert as_dataset(done) is done


def test_keys_that_come_late_and_missing_values():
    rows = [{"text": "a"}, {"text": None, "label": 1.0}, {"text": float("nan"), "label": float("nan")}]
    want = [{"text": "a", "label": None}, {"text": None, "label": 1.0}, {"text": None, "label": None}]
    assert as_dataset(rows).to_list() == as_dataset(pd.DataFrame(rows)).to_list() == want


def test_the_first_odd_value_of_many_is_named():
    """Whole numbers and fractions go together."""
    values = [*range(20_000), 0.5]
    assert as_dataset({"label": value} for value in values)["label"][:] == values
    with pytest.raises(TypeError, match="row 20001, column 'label': 'x' beside 0"):
        as_dataset({"label": value} for value in [*values, "x", b"y"])


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([{"l": "a"}, {"l": 1}], TypeError, "row 1, column 'l': 1 beside 'a'.*mend the row"),
        (pd.DataFrame({"l": ["a", None, 1]}), TypeError, "row 2, column 'l': 1 beside 'a'"),
        ({"l": [True, 1]}, TypeError, "row 1, column 'l': 1 beside True"),
        ([{"l": "a"}, {"l": "\udcff"}], TypeError, r"row 1, column 'l': '\\udcff' beside 'a'"),
        ([{"l": 1}, {"l": 2**70}], TypeError, "row 1, column 'l': 1180591620717411303424 beside 1"),
        ([{"l": [1]}, {"l": ["a"]}], TypeError, r"row 1, column 'l': \['a'\] beside \[1\]"),
        ([("a fine film", 1)], TypeError, r"row 0 is \('a fine film', 1\); rows are dicts: {'text'"),
        (["a fine film"], TypeError, "row 0 is 'a fine film'; rows are dicts"),
        ((row for row in [{"a": 1}, 3]), TypeError, "row 1 is 3; rows are dicts"),
        ({"text": ["a"], "label": [1, 2]}, ValueError, "named label expected length 1 but got length 2"),
        ({"text": "a", "label": [1]}, TypeError, "got {'text': 'a', 'label': .*tokenize takes"),
        (pd.DataFrame([["a", "b"]], columns=["x", "x"]), ValueError, "several columns are called 'x'"),
        (pa.table([[1], [2]], names=["x", "x"]), ValueError, "several columns are called 'x'"),
        (None, TypeError, r"got None \(NoneType\); tokenize takes a datasets.Dataset .*DataFrame.*csv"),
        (3, TypeError, "got 3"), (b"good", TypeError, "got b'good'"), ({1, 2}, TypeError, "got {1, 2}"),
        ("good", TypeError, r"got 'good'; tokenize takes .*\*.csv"), ("no.csv", FileNotFoundError, "no.csv"),
        (torch.utils.data.DataLoader(Own()), TypeError, "DataLoader"),
    ],
)  # fmt: skip
def test_what_is_no_table(data, kind, message):
    with pytest.raises(kind, match=message):
        as_dataset(data)


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.csv", "text,label\na,1\n\nb,c,2\n", ValueError, r"a.csv: row 1: Expected 2 columns, got 3: b,c,2; quote"),
        ("a.csv", 'text,label\na,1\n"b,1\nc,2\n', ValueError, "a.csv: row 1: Expected 2 columns, got 1"),
        ("a.csv", "text;label\na, b;1\n", ValueError, r"row 0: .* got 2: a, b;1; .*read_csv\(path, sep=';'"),
        ("a.csv", "text;label\na b;1\n", ValueError, r"one column, 'text;label'; pass pandas.read_csv\(path, sep=';'"),
        ("a.csv", "text\tlabel\na\t1\n", ValueError, r"one column, 'text\\tlabel'.*sep='\\t'"),
        ("a.tsv", "text,label\na,1\n", ValueError, "one column, 'text,label'.*sep=','"),
        ("a.csv", "text,text\na,b\n", ValueError, "a.csv: several columns are called 'text'"),
        ("a.csv", "", ValueError, "a.csv: Empty CSV"),
        ("a.csv", "text,label\na,1\ncafé,1\n".encode("latin-1"), ValueError, "byte 0xe9 in position 18.*as UTF-8"),
        ("a.csv", "té,label\na,1\n".encode("latin-1"), ValueError, "byte 0xe9 in position 1: .*encoding='latin-1'"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), ValueError, "byte 0xff in position 0"),
        ("a.jsonl", '{"text": "é"}\n'.encode("latin-1"), ValueError, "byte 0xe9 in position 10"),
        ("a.jsonl", '{"l": 1}\n\n{"l": \n', ValueError, "a.jsonl: row 1 is no JSON"),
        ("a.jsonl", '{"l": 1}\n{"l": "a"}\n', TypeError, "a.jsonl: row 1, column 'l': 'a' beside 1"),
        ("a.jsonl", "1\n", TypeError, "a.jsonl: row 0 is 1; rows are dicts"),
        ("a.json", "[1, ", ValueError, "a.json: row 0 is no JSON: Expecting value"),
        ("a.parquet", "no", ValueError, "a.parquet: .*Parquet"),
        ("a.txt", "text", TypeError, "a.txt'; tokenize takes"),
    ],
)  # fmt: skip
def test_files_that_are_none(tmp_path, name, content, kind, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=message):
        as_dataset(tmp_path / name)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(TypeError, match=r"load_from_disk\(folder\)"):
        as_dataset(tmp_path)


def test_paths_inside_a_file_are_not_followed(tmp_path):
    (tmp_path / "other.csv").write_text("text\nsecret\n")
    for i, content in enumerate((str(tmp_path / "other.csv"), {"train": str(tmp_path / "other.csv")})):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(content))
        try:
            assert "secret" not in str(as_dataset(path).to_list())
        except TypeError as error:
            assert "rows are dicts" in str(error)


def test_text_that_looks_missing_stays_text(tmp_path):
    """pandas reads these as missing values."""
    (tmp_path / "a.csv").write_text("text,label\nNA,0\nnull,1\nfine,0\n")
    assert as_dataset(tmp_path / "a.csv")["text"][:] == ["NA", "null", "fine"]


def test_columns_without_a_name(tmp_path):
    """pandas' index, and separators at the ends of lines, as spreadsheets write them."""
    (tmp_path / "a.csv").write_text(",text,,\n0,fine,,\n")
    assert as_dataset(tmp_path / "a.csv").select_columns(["Unnamed: 0", "text"]).to_list() == [
        {"Unnamed: 0": 0, "text": "fine"}
    ]


def test_types_follow_from_all_values(tmp_path):
    """A text in the last of 300,000 rows makes the column one of texts."""
    (tmp_path / "a.csv").write_text("label\n" + "1\n" * 300_000 + "x\n")
    assert as_dataset(tmp_path / "a.csv")["label"][-2:] == ["1", "x"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["\udcff", b"x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "a"]), inner, max_size=2),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(JUNK | st.lists(st.dictionaries(st.sampled_from(["a", "text"]), JUNK, max_size=2), max_size=4))
def test_anything_becomes_a_dataset_or_a_plain_error(data):
    try:
        done = as_dataset(data)
    except (ValueError, TypeError, FileNotFoundError) as error:
        assert str(error)
        return
    if isinstance(done, Dataset) and isinstance(data, list):
        assert len(done) == len(data) or not done.column_names


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    st.binary(max_size=40) | st.text('a,;"\n\t1', max_size=30).map(str.encode),
    st.sampled_from(["csv", "jsonl", "json"]),
)
def test_any_file_is_read_or_refused_by_name(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("any") / f"a.{suffix}"
    path.write_bytes(content)
    try:
        as_dataset(path)
    except (ValueError, TypeError) as error:
        assert str(path) in str(error)
