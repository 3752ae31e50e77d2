"""The door for data: texts, and rows of token ids and labels, checked against a model once, in one pass.

All that is wrong is found here, before any training, and said with row, column, value and remedy; behind the door rows
are trusted.  A Dataset's rows stay in Arrow and are read when a step needs them; a stream's are checked as they come.

To copy: this file, inputs/agreement.py, core/anatomy.py, core/batches.py and tasks/.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from ..core.anatomy import max_positions
from ..core.batches import Row, short
from ..tasks.classification import plain, text_of
from ..tasks.task import TASKS, given_names, names_of, tasks_of
from . import agreement
from .agreement import inputs_of

FIRST = "of text, a table or a file, make rows first: data = ftlib.tokenize(data, tokenizer)"
CHUNK = 1_000  # rows of a Dataset read at a time, one after the other


@dataclass(frozen=True)
class Door:
    """What a model takes, and `row`, which checks one row.  tasks: {task, "" for a single one: (kind, labels)}."""

    tasks: dict[str, tuple[str, int]]
    name: str = "dataset"
    vocab_size: int | None = None
    max_positions: int | None = None
    labels_needed: bool = True  # False: they are not read
    inputs: frozenset[str] = frozenset({"token_type_ids"})  # further columns that the model's forward takes
    under: str = ""  # the task whose labels plain ones are
    sizes: dict[str, int] = field(default_factory=dict)  # of further inputs: numbers below which values must be
    end: int | None = None  # the end token that the head reads a row at
    pad: int | None = None
    names: dict[str, list[str]] = field(default_factory=dict)  # of classes: the model's, else the first data's
    first: dict = field(default_factory=dict)  # what all rows must have alike: columns, their forms, end tokens
    known: dict = field(default_factory=dict)  # {task: which of `names` each of the data's classes is}
    longest: int | None = None  # label of a decoder beside an encoder, in tokens

    @classmethod
    def of(cls, model: nn.Module, name: str, labels_needed=True, under: str = "", names: dict | None = None) -> "Door":
        """names: {task: names of its classes} that stand for those of a model without; further ones are added."""
        tasks, names = tasks_of(model), {} if names is None else names
        names |= {task: given for task in tasks if (given := given_names(names_of(model, task)))}
        return cls(
            tasks, name, agreement.vocabulary(model), max_positions(model.config), labels_needed,
            inputs_of(model), under, agreement.sizes_of(model), agreement.end_id(model),
            getattr(model.config, "pad_token_id", None), names,
            longest=getattr(model.config, "max_decoder_position_embeddings", max_positions(model.config)),
        )  # fmt: skip

    def row(self, row: Any, i: int) -> Row:
        """The row as a dict of its own, without padding at its ends; an `attention_mask` with zeros between stays."""
        where = f"{self.name} row {i}"
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise ValueError(f"{where}: expected a dict with 'input_ids', got {short(row)}; {FIRST}")
        where_ids = f"{where}, column 'input_ids'"
        ids = agreement.token_ids(row["input_ids"], self.vocab_size, where_ids)
        further = {name: row[name] for name in sorted(self.inputs & row.keys()) if row[name] is not None}
        out, kept = agreement.trimmed({"input_ids": ids, **further}, row.get("attention_mask"), self.pad, where)
        real, most = kept.stop - kept.start, self.max_positions
        longest = agreement.longest_text(out.get("text_lengths"), real, where) if real else 0
        if real == 0 or (most is not None and longest > most):
            why = f"{longest} tokens, the model takes {most}; tokenize with max_length={most}"
            raise ValueError(f"{where_ids}: {why if real else 'no tokens; drop the row'}")
        forms = {n: agreement.checked_input(n, out[n], real, self.sizes.get(n), where) for n in further}
        if not self.first:
            agreement.warn_of_unread(row, self.inputs, self.name)
        agreement.check_alike(self.first, out["input_ids"], forms, self.end, where)
        labels = plain(row.get("labels")) if self.labels_needed else None
        if isinstance(labels, dict):  # Arrow fills tasks that a row does not have with None
            labels = {task: label for task, label in labels.items() if label is not None}
        if labels is not None and labels != {}:
            out["labels"] = self._labels(labels, len(ids), kept, f"{where}, column 'labels'")
        elif self.labels_needed:
            hint = "; rename the column 'label' to 'labels'" if "label" in row else ""
            hint += ", or answers to its questions" * any(TASKS[kind].windows for kind, _ in self.tasks.values())
            raise ValueError(f"{where}: no 'labels'; tokenize a dataset that has a label column: label=...{hint}")
        for name, cut in (("word_starts", slice(None)), ("masking", slice(None)), ("begins", kept)):
            if row.get(name) is not None:
                out[name] = row[name][cut]
        return out

    def learn(self, dataset: Any) -> "Door":
        """Compare the names of a Dataset's classes with the model's; where that has none, they are the names."""
        for task, names in agreement.class_names(getattr(dataset, "features", None), self.under).items():
            if self.labels_needed and task in self.tasks:
                (kind, count), own = self.tasks[task], self.names.setdefault(task, names)
                numbers = TASKS[kind].probabilities is None
                places = [] if numbers else agreement.matched(own, names, self.name)
                if numbers or len(names) > count:
                    need = "needs numbers" if numbers else f"has {count} classes in the model"
                    raise ValueError(f"{self.name}: labels are the classes {short(names)}, but {kind} {need}")
                if places != list(range(len(names))):
                    self.known[task] = places
                    said = f"labels are matched by name: the data has {', '.join(names)}, the model {', '.join(own)}"
                    warnings.warn(f"{self.name}: {said}", stacklevel=5)
        return self

    def _labels(self, labels: Any, length: int, kept: slice, where: str) -> Any:
        clean = {}
        for task, label in (labels if isinstance(labels, dict) else {self.under: labels}).items():
            if task not in self.tasks:
                has = "one task" if "" in self.tasks else ", ".join(map(repr, self.tasks))
                why = f"a plain label, but the model has the tasks {', '.join(self.tasks)}: {{task: label}}"
                raise ValueError(f"{where}: {f'labels for a task {task!r}; the model has {has}' if task else why}")
            (kind, num_labels), at, label = self.tasks[task], where + (f" ({task})" if task else ""), plain(label)
            length = self.longest if TASKS[kind].encoder_decoder else length
            label, places = TASKS[kind].check(label, num_labels, length, at), self.known.get(task)
            if places and TASKS[kind].multi_hot:
                label = [value for _, value in sorted(zip(places, label, strict=True))]
            elif places:
                number = dict(enumerate(places))  # what is ignored stays
                label = [number.get(i, i) for i in label] if TASKS[kind].a_token else number.get(label, label)
            clean[task] = label[kept] if TASKS[kind].a_token else TASKS[kind].trim(label, kept, at)
        return clean[""] if "" in self.tasks else clean


class Rows(Sequence):
    """Rows that passed a door; those of a Dataset are read when asked for.  lengths: tokens of each, int32 (rows,)."""

    def __init__(self, source: Any, door: Door):
        self.door, self.table, self.kept = door, None, []
        if hasattr(source, "column_names"):
            lists = [name for name, kind in source.features.items() if hasattr(kind, "feature")]  # no pictures, say
            for row in source.select_columns(lists).take(1) if len(source) else ():
                agreement.warn_of_unread(row, door.inputs, door.name)
            wanted = {"input_ids", "attention_mask", "label", "labels", "masking", "begins", *door.inputs}
            self.table = source.select_columns([c for c in source.column_names if c in wanted]).with_format("arrow")
        else:
            self.kept = [door.row(row, i) for i, row in enumerate(source)]
        self.lengths = np.fromiter((len(row["input_ids"]) for row in self), dtype=np.int32)
        if not len(self):
            raise ValueError(f"{door.name} has zero examples")

    def __len__(self) -> int:
        return len(self.kept if self.table is None else self.table)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), CHUNK):
            yield from self[start : start + CHUNK]

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
    lists = hasattr(column, "offsets") and pyarrow.types.is_integer(column.type.value_type)
    if not lists or column.null_count or column.values.null_count:
        return column.to_pylist()
    flat = column.values.to_numpy()
    return [flat[begin:end] for begin, end in pairwise(column.offsets.to_numpy())]


@dataclass
class Stream:
    """Rows that come one after the other, checked as they come; read again from the start for every epoch."""

    source: Iterable
    door: Door

    def __iter__(self) -> Iterator[Row]:
        return (self.door.row(row, i) for i, row in enumerate(self.source))


def take(parts: Mapping[str, Rows | Stream], places: Sequence[tuple[Any, Any]]) -> list[Row]:
    """The rows at [(part, number)], in this order, read part by part; a stream's place is the row itself."""
    wanted: dict[Any, list] = {}
    for name, number in places:
        wanted.setdefault(name, []).append(number)
    streams = {name for name in wanted if isinstance(parts[name], Stream)}
    read = {name: iter(own if name in streams else parts[name].take(own)) for name, own in wanted.items()}
    return [next(read[name]) for name, _ in places]


def is_stream(data: Any) -> bool:
    """Whether data is read one row after the other: an IterableDataset, a generator; all but what has a length."""
    return isinstance(data, Iterable) and not hasattr(data, "__len__")


def listed(data: Any) -> Any:
    """The rows of PyTorch's datasets, which have a length and numbers but nothing else, as a list; else as it is."""
    of_torch = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "__iter__")
    return [data[i] for i in range(len(data))] if of_torch else data


def transforms(dataset: Any) -> bool:
    """Whether a Dataset's rows are made when they are asked for, by a function of the user's (with_transform)."""
    form = getattr(dataset, "format", None)
    return isinstance(form, dict) and form.get("type") == "custom"


def checked(dataset: Any, door: Door) -> Rows:
    """The rows of a Dataset, or of any collection of dicts; TypeError or ValueError for what is none."""
    columns, got = getattr(dataset, "column_names", None), type(dataset).__name__
    dataset = listed(dataset)
    rows = isinstance(dataset, Iterable) and not isinstance(dataset, (str, bytes, dict))
    rows = rows and (columns is not None or not hasattr(dataset, "columns"))
    for wrong, kind, why in (
        (isinstance(columns, dict), TypeError, f" is a DatasetDict; pass one split, e.g. {door.name}['train']"),
        (columns is not None and "input_ids" not in columns and not is_stream(dataset), ValueError,
         f" has no column 'input_ids' (it has {', '.join(columns or ()) or 'none'}); call ftlib.tokenize first"),
        (transforms(dataset), ValueError,
         " has a transform (with_transform), which would not be applied: apply it with map first"),
        (not rows, TypeError, f" must be a Dataset or a list of rows, got {got}; {FIRST}"),
    ):  # fmt: skip
        if wrong:
            raise kind(door.name + why)
    return Rows(list(dataset) if is_stream(dataset) else dataset, door.learn(dataset))


def rows_for(dataset: Any, model: nn.Module, *, name: str, names: dict | None = None) -> list[Rows]:
    """Checked rows from a dataset, or from {task or mixture name: dataset} for a MultiTaskModel: a part each."""
    return list(parts_for(dataset, model, name=name, names=names, whole=True).values())


def parts_for(
    dataset: Any, model: nn.Module, *, name: str, stream: bool = False, names: dict | None = None, whole: bool = False
) -> dict[str, Rows | Stream]:
    """{name: checked rows} from {name: dataset}; plain labels under a task's name become {task: label}.

    stream: what has no length stays a `Stream`; else it is read to its end, a datasets.IterableDataset if `whole`.
    """
    names = {} if names is None else names
    if not isinstance(dataset, dict) or hasattr(dataset, "column_names"):
        door = Door.of(model, name, names=names)
        if is_stream(dataset) and hasattr(dataset, "take") and not stream and not whole:  # it may have no end
            raise ValueError(f"{name} is a {type(dataset).__name__}, of unknown length; say how far: max_steps")
        return {"": Stream(dataset, door.learn(dataset)) if stream and is_stream(dataset) else checked(dataset, door)}
    tasks = tasks_of(model)
    if not dataset:
        raise ValueError(f"{name} is empty; pass {{task name: dataset}}")
    if "" in tasks:
        raise ValueError(f"{name} has {', '.join(map(repr, dataset))}, but the model has one task; pass one dataset")
    parts = {}
    for key, part in dataset.items():
        if is_stream(part) and hasattr(part, "take"):
            raise ValueError(f"{name}[{key!r}] is a stream; several datasets are mixed by size, so load it whole")
        parts[key] = checked(part, Door.of(model, f"{name}[{key!r}]", under=key, names=names))
    return parts


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


def checked_text(value: Any, row: int, column: str) -> Any:
    """The text, or list of words, as it is; ValueError or TypeError naming row and column for one that is none."""
    where = f"row {row}, column {column!r}"
    if not isinstance(value, (list, tuple)):
        return text_of(value, where)
    if not value:
        raise ValueError(f"{where}: the list of words is empty; drop the row or give it words")
    return [text_of(word, f"row {row}, column '{column}[{i}]'") for i, word in enumerate(value)]
