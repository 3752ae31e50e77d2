"""The door for data: texts, and rows of token ids and labels, checked against a model once, in one pass.

A label outside the model's classes is an index error inside a GPU kernel, a float label trains the wrong loss, and a
row padded by hand feeds padding to the model as if it were text.  All of it is found here, before any training, and
said with row, column, value and remedy; behind the door rows are trusted.  A Dataset's rows stay in Arrow and are read
when a step needs them; a stream's are checked as they come.

To copy: this file, core/anatomy.py, core/batches.py and tasks/.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
from torch import nn

from ..core import anatomy
from ..core.anatomy import max_positions
from ..core.batches import Row, short
from ..tasks.classification import plain
from ..tasks.task import TASKS, tasks_of

CHUNK = 1_000  # rows of a Dataset read at a time for the check


@dataclass(frozen=True)
class Door:
    """What a model takes, and `row`, which checks one row.  tasks: {task, "" for a single one: (kind, labels)}."""

    tasks: dict[str, tuple[str, int]]
    name: str = "dataset"
    vocab_size: int | None = None
    max_positions: int | None = None
    type_vocab_size: int | None = None
    labels_needed: bool = True
    inputs: frozenset[str] = frozenset({"token_type_ids"})  # further columns that the model's forward takes
    under: str = ""  # the task whose labels plain ones are
    first: list = field(default_factory=list)  # the columns of the first row

    @classmethod
    def of(cls, model: nn.Module, name: str, labels_needed: bool = True, under: str = "") -> "Door":
        config = model.config
        limits = {
            "vocab_size": getattr(config, "vocab_size", None), "max_positions": max_positions(config),
            "type_vocab_size": getattr(config, "type_vocab_size", None) or None,
        }  # fmt: skip
        return cls(tasks_of(model), name, **limits, labels_needed=labels_needed, inputs=inputs_of(model), under=under)

    def row(self, row: Any, i: int) -> Row:
        """The row as a dict of its own: ids, further inputs and labels as plain numbers, without what a mask hides."""
        where = f"{self.name} row {i}"
        if not isinstance(row, dict) or "input_ids" not in row:
            raise ValueError(f"{where}: expected a dict with 'input_ids', got {short(row)}; use ftlib.tokenize")
        out: Row = {"input_ids": _numbers(row, "input_ids", self.vocab_size, where)}
        length = len(out["input_ids"])
        for name in sorted(self.inputs & row.keys()):
            if (value := row[name]) is not None and name == "token_type_ids":
                out[name] = _numbers(row, name, self.type_vocab_size, where, length)
            elif value is not None:
                out[name] = _input(name, value, length, where)
        columns = [name for name in out if name != "input_ids"]
        self.first or self.first.append(columns)
        if self.first[0] != columns:
            odd = min({*self.first[0]} ^ {*columns}, default="inputs")
            raise ValueError(f"{where}: {odd} in some rows and not in others; tokenize all rows alike")
        mask = None
        if row.get("attention_mask") is not None:
            mask = _numbers(row, "attention_mask", 2, where, length)
            mask = None if all(mask) else list(mask)
        if mask:
            moved = {name: [sum(mask[:place]) for place in out[name]] for name in out if name.endswith("_positions")}
            out |= {key: _kept(value, mask) for key, value in out.items() if np.ndim(value) and len(value) == length}
            out |= moved
        real = len(out["input_ids"])
        if real == 0:
            raise ValueError(f"{where}, column 'input_ids': no tokens; drop the row")
        if self.max_positions is not None and real > self.max_positions:
            most = f"the model takes {self.max_positions}; tokenize with max_length={self.max_positions}"
            raise ValueError(f"{where}, column 'input_ids': {real} tokens, {most}")
        labels = plain(row.get("labels"))
        if isinstance(labels, dict):  # Arrow fills tasks that a row does not have with None
            labels = {task: label for task, label in labels.items() if label is not None}
        if labels is not None and labels != {}:
            out["labels"] = self._labels(labels, length, mask, f"{where}, column 'labels'")
        elif self.labels_needed:
            raise ValueError(f"{where}: no 'labels'; tokenize a dataset that has a label column: label=...")
        if "word_starts" in row:
            out["word_starts"] = row["word_starts"]
        return out

    def _labels(self, labels: Any, length: int, mask: list[int] | None, where: str) -> Any:
        if not isinstance(labels, dict) and self.under:
            labels = {self.under: labels}
        if not isinstance(labels, dict) and "" not in self.tasks:
            has = ", ".join(self.tasks)
            raise ValueError(f"{where}: a plain label, but the model has the tasks {has}: {{task: label}}")
        clean = {}
        for task, label in labels.items() if isinstance(labels, dict) else [("", labels)]:
            if task not in self.tasks:
                has = "one task" if "" in self.tasks else ", ".join(map(repr, self.tasks))
                raise ValueError(f"{where}: labels for a task {task!r}; the model has {has}")
            kind, num_labels = self.tasks[task]
            record = TASKS[kind]
            clean[task] = record.check(plain(label), num_labels, length, where + (f" ({task})" if task else ""))
            if mask and record.a_token:
                clean[task] = _kept(clean[task], mask)
        return clean[""] if "" in self.tasks else clean


_NO_INPUTS = frozenset(  # what a batch has anyway, and switches
    "attention_mask cache_position input_ids inputs_embeds kwargs labels logits_to_keep output_attentions "
    "output_hidden_states past_key_values return_dict self use_cache".split()
)


def inputs_of(model: nn.Module) -> frozenset[str]:
    """The names of what a model's forward takes beside token ids, mask and labels."""
    parameters = inspect.signature(anatomy.unwrapped(model).forward).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    return frozenset(getattr(model, "input_names", named)) - _NO_INPUTS  # a MultiTaskModel knows them


def _input(name: str, value: Any, length: int, where: str) -> Any:
    """A further input of the model: numbers; positions are those of tokens of the row."""
    try:
        right = np.asarray(value).dtype.kind in "biuf"
    except ValueError:  # lists of different lengths
        right = False
    what = "positions of the row's tokens" if right and name.endswith("_positions") else "numbers"
    if not right or (what != "numbers" and not 0 <= np.min(value) <= np.max(value) < length):
        raise ValueError(f"{where}, column {name!r}: expected {what}, got {short(value)}; drop the column or mend it")
    return value


def _numbers(row: Row, name: str, size: int | None, where: str, length: int | None = None) -> Sequence[int]:
    """A column's whole numbers, each below `size`, as many as `length`; arrays from Arrow stay where they are."""
    values, where = row[name], f"{where}, column {name!r}"
    if length is not None and np.ndim(values) and len(values) != length:
        raise ValueError(f"{where}: {len(values)} {name} values for {length} input_ids; must be equal")
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim == 1 and len(values):
        if size is None or 0 <= values.min() <= values.max() < size:
            return values
    values = plain(values)
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{where}: expected a list of whole numbers, got {short(values)}")
    if not set(map(type, values)) <= {int}:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{where}: {short(value)} is no whole number")
        values = [int(value) for value in values]
    if size is not None and values and not 0 <= min(values) <= max(values) < size:
        bad = max(values) if max(values) >= size else min(values)
        raise ValueError(f"{where}: id {bad} is outside 0..{size - 1}; tokenizer and model differ")
    return list(values)


def _kept(values: Sequence, mask: list[int]) -> list:
    return [value for value, keep in zip(values, mask, strict=True) if keep]


class Rows(Sequence):
    """Rows that passed a door.  lengths: tokens of each, int32 (rows,).

    A Dataset stays where it is: rows are read, and made plain, when they are asked for.
    """

    def __init__(self, source: Any, door: Door):
        self.door, self.table, self.kept = door, None, []
        if hasattr(source, "column_names"):
            columns = source.column_names
            wanted = {"input_ids", "attention_mask", "labels", *door.inputs}
            self.table = source.select_columns([c for c in columns if c in wanted]).with_format("arrow")
            self.lengths = np.empty(len(source), dtype=np.int32)
            for start in range(0, len(source), CHUNK):
                rows = self.take(range(start, min(start + CHUNK, len(source))))
                self.lengths[start : start + len(rows)] = [len(row["input_ids"]) for row in rows]
        else:
            self.kept = [door.row(row, i) for i, row in enumerate(source)]
            self.lengths = np.array([len(row["input_ids"]) for row in self.kept], dtype=np.int32)
        if not len(self):
            raise ValueError(f"{door.name} has zero examples")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.take(range(*i.indices(len(self))))
        return self.take([range(len(self))[i]])[0]

    def take(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in this order; several are quicker than one by one."""
        if self.table is None:
            return [self.kept[i] for i in indices]
        table = self.table[indices if isinstance(indices, range) else list(indices)]
        columns = [_values(column) for column in table.columns]
        rows = (dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True))
        return [self.door.row(row, i) for row, i in zip(rows, indices, strict=True)]


def _values(column: Any) -> list:
    """The values of an Arrow column; lists of whole numbers as arrays that share its memory."""
    import pyarrow

    column = column.combine_chunks()
    inner = getattr(column.type, "value_type", None)
    if inner is None or not pyarrow.types.is_integer(inner) or not hasattr(column, "offsets"):
        return column.to_pylist()
    if column.null_count or column.values.null_count:
        return column.to_pylist()
    flat, ends = column.values.to_numpy(), column.offsets.to_numpy()
    return [flat[begin:end] for begin, end in pairwise(ends)]


class Stream:
    """Rows that come one after the other, checked as they come; read again from the start for every epoch."""

    def __init__(self, source: Iterable, door: Door):
        self.source, self.door = source, door

    def __iter__(self) -> Iterator[Row]:
        return (self.door.row(row, i) for i, row in enumerate(self.source))


def take(parts: Mapping[str, Rows | Stream], places: Sequence[tuple[Any, Any]]) -> list[Row]:
    """The rows at [(part, number)], in this order, read part by part; a stream's place is the row itself."""
    wanted: dict[Any, list[int]] = {}
    for name, number in places:
        wanted.setdefault(name, []).append(number)
    read = {}
    for name, own in wanted.items():
        read[name] = iter(own if isinstance(parts[name], Stream) else parts[name].take(own))
    return [next(read[name]) for name, _ in places]


def is_stream(data: Any) -> bool:
    """Whether data is read one row after the other: an IterableDataset, a generator; all but what has a length."""
    return isinstance(data, Iterable) and not hasattr(data, "__len__")


def checked(dataset: Any, door: Door) -> Rows:
    """The rows of a Dataset, or of any collection of dicts; TypeError or ValueError for what is none."""
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, dict):
        raise TypeError(f"{door.name} is a DatasetDict; pass one split, e.g. {door.name}['train']")
    if columns is not None and "input_ids" not in columns and not is_stream(dataset):
        has = ", ".join(columns) or "none"
        raise ValueError(f"{door.name} has no column 'input_ids' (it has {has}); call ftlib.tokenize first")
    if not isinstance(dataset, Iterable) or isinstance(dataset, (str, bytes, dict)):
        raise TypeError(f"{door.name} must be a Dataset or a list of rows, got {type(dataset).__name__}")
    return Rows(list(dataset) if is_stream(dataset) else dataset, door)


def checked_rows(rows: Any, tasks: dict[str, tuple[str, int]], **limits: Any) -> Rows:
    """Rows that fit `tasks`, {task name ("" for a model with one task): (kind, number of labels)}.

    limits: name, vocab_size, max_positions, type_vocab_size, labels_needed of a `Door`.

    >>> checked_rows([{"input_ids": [1], "labels": 7}], {"": ("sequence-classification", 2)})
    Traceback (most recent call last):
    ...
    ValueError: dataset row 0, column 'labels': label 7 is outside 0..1; give the model num_labels=8 or mend the label
    """
    return checked(rows, Door(tasks, **limits))


def rows_for(dataset: Any, model: nn.Module, *, name: str, labels_needed: bool = True) -> list[Rows]:
    """Checked rows from a dataset, or from {task or mixture name: dataset} for a MultiTaskModel: a part each."""
    if isinstance(dataset, dict) and not hasattr(dataset, "column_names"):
        return list(parts_for(dataset, model, name=name).values())
    return [checked(dataset, Door.of(model, name, labels_needed))]


def parts_for(dataset: Any, model: nn.Module, *, name: str, stream: bool = False) -> dict[str, Rows | Stream]:
    """{name: checked rows} from {name: dataset}; plain labels under a task's name become {task: label}.

    stream: what has no length stays a `Stream`; else it is read to its end.
    """
    if not isinstance(dataset, dict) or hasattr(dataset, "column_names"):
        door = Door.of(model, name)
        if is_stream(dataset) and hasattr(dataset, "take") and not stream:  # it may have no end
            raise ValueError(f"{name} is a {type(dataset).__name__}, of unknown length; say how far: max_steps")
        return {"": Stream(dataset, door) if stream and is_stream(dataset) else checked(dataset, door)}
    tasks = tasks_of(model)
    if not dataset:
        raise ValueError(f"{name} is empty; pass {{task name: dataset}}")
    if "" in tasks:
        raise ValueError(f"{name} has {', '.join(map(repr, dataset))}, but the model has one task; pass one dataset")
    parts = {}
    for key, part in dataset.items():
        if is_stream(part) and hasattr(part, "take"):
            raise ValueError(f"{name}[{key!r}] is a stream; several datasets are mixed by size, so load it whole")
        parts[key] = checked(part, Door.of(model, f"{name}[{key!r}]", under=key))
    return parts


# ------------------------------------------------------------------------------------------------------- texts


def token_limit(max_length: Any, tokenizer: Any, config: Any) -> Any:
    """Tokens a text may have: as asked for, or as the tokenizer knows, but no more than the model takes."""
    limit = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    most = max_positions(config)
    if type(limit) is int and most is not None:  # what is no number is for the tokenizing to refuse
        return min(limit, most)
    return most if limit is None else limit


def text_iterator(texts: Iterable[Any]) -> Iterator[Any]:
    """An iterator over texts; TypeError for one text alone, and for what is no collection."""
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts is {short(texts)}; pass a list of texts, even for one: [text]")
    return iter(texts)


def checked_texts(texts: Sequence[Any], indices: Sequence[int]) -> tuple[list, list | None]:
    """First and second texts (None where there are no pairs); ValueError or TypeError naming the row: `indices`."""
    pairs = len(texts) > 0 and isinstance(texts[0], tuple)
    for row, value in zip(indices, texts, strict=True):
        if pairs != isinstance(value, tuple) or (pairs and len(value) != 2):
            raise ValueError(f"row {row}: {short(value)}; either all texts are (text, text_pair) tuples or none is")
    first, second = zip(*texts, strict=True) if pairs else (texts, None)
    return checked_column(first, indices, "text"), checked_column(second, indices, "text_pair") if pairs else None


def checked_column(values: Sequence[Any], indices: Sequence[int], column: str) -> list:
    return [checked_text(value, row, column) for row, value in zip(indices, values, strict=True)]


def checked_text(value: Any, row: int, column: str, inside: bool = False) -> Any:
    """The text, or list of words, as it is; ValueError or TypeError naming row and column for one that is none."""
    where = f"row {row}, column {column!r}"
    if isinstance(value, (list, tuple)) and not inside:
        if not value:
            raise ValueError(f"{where}: the list of words is empty; drop the row or give it words")
        return [checked_text(word, row, f"{column}[{i}]", inside=True) for i, word in enumerate(value)]
    if not isinstance(value, str):
        got = f"{short(value)} ({type(value).__name__})"
        raise TypeError(f"{where}: expected text, got {got}; drop the row or fill it in")
    if not value.strip():
        raise ValueError(f"{where}: the text is empty; drop the row or give it text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode at character {error.start}; decode the file again") from None
    return value
