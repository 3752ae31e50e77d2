"""Own data as a datasets.Dataset: DataFrames, lists of dicts, torch Datasets, iterators, files, folders of files.

What is read is held in memory, in Arrow; nothing is written.  Row numbers in messages count the user's rows from 0.
To copy: this file, core/batches.py and tasks/classification.py (datasets).
"""

import json
import re
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.batches import short
from ..tasks.classification import plain

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
TAKES = (
    "tokenize takes a datasets.Dataset or DatasetDict (build one with Dataset.from_dict({...}), or read one with "
    "load_from_disk(folder)), a pandas or polars DataFrame, {column: list}, a list or torch Dataset of dicts, "
    f"{{split: one of these}}, or the path of a file: *{', *'.join(SUFFIXES)}"
)
_SPLITS = ("train", "validation", "test")
# As datasets reads the names of files: a word of a split, with no letter beside it.
_WORDS = re.compile(r"(?<![a-z])(?:(train(?:ing)?)|(valid(?:ation)?|val|dev)|(test(?:ing)?|eval(?:uation)?))(?![a-z])")


def as_dataset(data: Any) -> Any:
    """A `datasets.Dataset`, `DatasetDict` or `IterableDataset` of what holds a table; those three as they are.

    data: a DataFrame (pandas, polars, pyarrow); {column: list}; a sequence, torch Dataset or iterator of dicts, which
    is read to its end; any other iterable of dicts, which becomes a stream; {split: any of these}; or the path of a
    CSV, TSV, JSON (rows or columns), JSON Lines or Parquet file, in UTF-8.  NaN, and what a dict lacks, is None.
    Raises TypeError or ValueError naming row, column and value, or the file and what is wrong in it, and the remedy.

    >>> as_dataset([{"text": "good", "label": 1}, {"text": "bad", "label": 0}])["label"][:]
    [1, 0]
    """
    import datasets
    import pyarrow

    if hasattr(data, "column_names") and hasattr(data, "map"):
        return data
    if isinstance(data, (str, Path)):
        return _file(Path(data))
    if isinstance(data, Mapping) or hasattr(data, "iloc"):  # pandas, whose index is no column
        columns = [_is_column(value) for _, value in data.items()]
        if hasattr(data, "columns") or all(columns):
            return _of_columns(data.items())
        if not any(columns):
            return datasets.DatasetDict({str(split): as_dataset(part) for split, part in data.items()})
    elif hasattr(data, "to_arrow") or hasattr(data, "__arrow_c_stream__"):
        return _dataset(data.to_arrow() if hasattr(data, "to_arrow") else pyarrow.table(data))
    elif hasattr(data, "__next__"):
        return _of_rows(list(data))
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, bytes):
        return _of_rows([data[i] for i in range(len(data))])
    elif isinstance(data, Iterable) and not hasattr(data, "__len__"):
        return datasets.IterableDataset.from_generator(data.__iter__)
    raise TypeError(f"got {short(data)} ({type(data).__name__}); {TAKES}")


def _is_column(value: Any) -> bool:
    """Whether it is a list, an array, a Series; not a table, nor a list of rows."""
    listed = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not hasattr(value, "columns")
    return listed and not isinstance(value, (str, bytes, Mapping)) and not isinstance(next(iter(value), 0), Mapping)


def _of_rows(rows: list) -> Any:
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {i} is {short(row)}; rows are dicts: {{'text': ..., 'label': ...}}")
    names = dict.fromkeys(name for row in rows for name in row)
    return _of_columns((name, [row.get(name) for row in rows]) for name in names)


def _of_columns(columns: Iterable[tuple[Any, Any]]) -> Any:
    """TypeError names the first value that does not go with those above it."""
    import pyarrow as pa

    def array(values: list) -> Any:
        try:
            return pa.array(values, from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return None

    names, arrays = [], []
    for name, column in columns:
        values = [plain(value) for value in plain(column)]
        names.append(str(name))
        arrays.append(array(values))
        if arrays[-1] is None:
            row = bisect_left(range(len(values)), True, key=lambda i, values=values: array(values[: i + 1]) is None)
            first = next(value for value in values if value is not None and value == value)
            remedy = "a column holds one kind of value, valid text or numbers, say: mend the row, or drop the column"
            raise TypeError(f"row {row}, column {name!r}: {short(values[row])} beside {short(first)}; {remedy}")
    return _dataset(pa.table(arrays, names=names))


def _dataset(table: Any) -> Any:
    """A table of Arrow as a Dataset, without pandas' index."""
    import datasets

    names = table.column_names
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several columns are called {min(twice)!r}; rename or drop them")
    return datasets.Dataset(table.drop_columns([name for name in names if name.startswith("__index_level_")]))


def _file(path: Path) -> Any:
    from pyarrow import csv, parquet

    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise TypeError(f"got {str(path)!r}; {TAKES}")
    try:
        if kind == ".parquet":
            return _dataset(parquet.read_table(path, partitioning=None))
        text = path.read_bytes().decode("utf-8-sig")
        if kind.startswith(".json"):
            return as_dataset(_json(text, kind))
        form = csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True)
        options = csv.ReadOptions(use_threads=False, block_size=2**26)  # without threads, errors name the row
        table = csv.read_csv(path, options, form)
        if table.num_columns == 1 and (other := re.search(r"[;|\t,]", name := table.column_names[0])):
            raise ValueError(f"one column, {name!r}; pass pandas.read_csv(path, sep={other[0]!r})")
        return _dataset(table.rename_columns([name or f"Unnamed: {i}" for i, name in enumerate(table.column_names)]))
    except (ValueError, TypeError, NotImplementedError) as error:
        said = re.sub(r"^CSV parse error: Row #(\d+)", lambda found: f"row {int(found[1]) - 2}", str(error))
        if isinstance(error, UnicodeDecodeError):
            said += "; save it as UTF-8, or read it with its encoding: pandas.read_csv(path, encoding='latin-1')"
        elif said != str(error):
            said += "; quote texts that hold the separator; with another one, pass pandas.read_csv(path, sep=';')"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {said}") from None


def _json(text: str, kind: str) -> Any:
    """Rows, columns ({name: list}) or, a value a line, JSON Lines."""
    rows = []
    try:
        for line in [text] if kind == ".json" else filter(str.strip, text.split("\n")):
            rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        if kind == ".json" and error.msg == "Extra data":
            return _json(text, ".jsonl")
        raise ValueError(f"row {len(rows)} is no JSON: {error}") from None
    whole = rows[0] if kind == ".json" else None
    columns = isinstance(whole, dict) and all(isinstance(column, list) for column in whole.values())
    return whole if columns or isinstance(whole, list) else rows


def load_folder(place: str | Path) -> Any:
    """A datasets.DatasetDict of a folder or file; nothing is written there, and no older copy of a file is read.

    A folder: train.csv, dev.csv (valid, val, validation) and test.csv, of any kind that `as_dataset` takes; where no
    name is a split's, all are "train".  Several files for one split keep their names; parts (train-00000-of-00002) are
    joined.  What lies in folders inside is for `datasets.load_dataset`.
    Raises ValueError or OSError naming the folder.
    """
    import datasets

    place = Path(place).expanduser().absolute()  # a bare name such as "json" would be a reader's to datasets
    try:
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            data = datasets.load_from_disk(str(place))
        elif not (files := {"train": [place]} if place.is_file() else _files_of(place)):
            return datasets.load_dataset(str(place))
        else:
            parts = {split: [as_dataset(file) for file in own] for split, own in files.items()}
            data = {split: datasets.concatenate_datasets(own) for split, own in parts.items()}
        return datasets.DatasetDict(data if isinstance(data, dict) else {"train": data})
    except Exception as error:  # datasets and pyarrow have many types for files they can't read
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        raise kind(f"{place} holds no data set that can be read ({reason}); csv, json or parquet files can") from error


def _files_of(folder: Path) -> dict[str, list[Path]]:
    """{split: its files}; empty where they lie deeper."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and path.name[0] not in "._"]
    stem = {path: re.sub(r"-\d+-of-\d+$", "", path.stem) for path in files}
    split = {name: _SPLITS[word.lastindex - 1] for name in stem.values() if (word := _WORDS.search(name.lower()))}
    if not split:
        return {} if any(path.is_dir() for path in folder.iterdir()) or not files else {"train": files}
    if other := [path.name for path in files if stem[path] not in split]:
        warnings.warn(f"{folder}: {', '.join(other)} is no split and not read", stacklevel=4)
    count, found = Counter(split.values()), {}
    for path in files:
        if (name := stem[path]) in split:  # validation_matched and validation_mismatched stay two
            found.setdefault(split[name] if count[split[name]] == 1 else name, []).append(path)
    if several := [own for own in found.values() if len({path.suffix for path in own}) > 1]:
        raise ValueError(f"{' and '.join(path.name for path in several[0])} are one split in several kinds; keep one")
    return found
