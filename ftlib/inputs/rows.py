"""Check texts, and rows of token ids and labels against a model before it sees them, and name the first bad one.

A label outside the model's classes is an index error inside a GPU kernel, a float label trains the wrong loss, and a
row padded by hand feeds padding to the model as if it were text.  All of it is found here, before any training.

To copy this module you need: rows.py alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

IGNORE = -100  # the label PyTorch's and our losses skip
_LARGEST = 3.4e38  # what fits into a float32

Row = dict[str, Any]


def to_rows(dataset: Any, name: str = "dataset") -> list[Row]:
    """A list of rows from a tokenized Dataset, or from any sequence of dicts; says what is missing.

    >>> to_rows([{"input_ids": [2, 3]}])
    [{'input_ids': [2, 3]}]
    """
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, dict):
        raise TypeError(f"{name} is a DatasetDict; pass one split, e.g. {name}['train']")
    if columns is not None and hasattr(dataset, "to_list"):
        if "input_ids" not in columns:
            has = ", ".join(columns) or "none"
            raise ValueError(f"{name} has no column 'input_ids' (it has {has}); call ftlib.tokenize first")
        keep = [c for c in ("input_ids", "attention_mask", "token_type_ids", "labels") if c in columns]
        rows = dataset.select_columns(keep).with_format(None).to_list()
    elif isinstance(dataset, Iterable) and not isinstance(dataset, (str, bytes, dict)):
        rows = list(dataset)
    else:
        raise TypeError(f"{name} must be a Dataset or a list of rows, got {type(dataset).__name__}")
    if not rows:
        raise ValueError(f"{name} has zero examples")
    out = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or "input_ids" not in row:
            raise ValueError(f"{name} row {i}: expected a dict with 'input_ids', got {short(row)}; use ftlib.tokenize")
        if isinstance(row.get("labels"), dict):  # Arrow fills tasks a row does not have with None
            row = {**row, "labels": {task: value for task, value in row["labels"].items() if value is not None}}
        out.append(row)
    return out


_AFTER_PAD = (  # model types whose position numbers start after the padding id
    "camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl",
)  # fmt: skip


def max_positions(config: Any) -> int | None:
    """Longest row a model takes, in tokens; None where it does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and getattr(config, "model_type", None) in _AFTER_PAD:
        return limit - (config.pad_token_id or 0) - 1
    return limit or None


def token_limit(max_length: Any, tokenizer: Any, config: Any) -> Any:
    """Tokens a text may have: as asked for, or as the tokenizer knows, but no more than the model takes."""
    limit = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    most = max_positions(config)
    if type(limit) is int and most is not None:  # what is no number is for the tokenizing to refuse
        return min(limit, most)
    return most if limit is None else limit


def checked_rows(
    rows: Iterable[Row],
    tasks: dict[str, tuple[str, int]],
    *,
    name: str = "dataset",
    vocab_size: int | None = None,
    max_positions: int | None = None,
    type_vocab_size: int | None = None,
    labels_needed: bool = True,
) -> list[Row]:
    """Find the first bad row before any training: ids, lengths and labels against the model.

    `tasks` maps a task name ("" for a model with one task) to (kind, number of labels).  Returns rows with
    `input_ids` (and `token_type_ids`, `labels`) as plain lists and numbers, labels of regression and multi-label tasks
    as floats, and without the padding that an `attention_mask` of zeros marks.

    >>> checked_rows([{"input_ids": [1], "labels": 7}], {"": ("sequence-classification", 2)})
    Traceback (most recent call last):
    ...
    ValueError: dataset row 0, column 'labels': label 7 is outside 0..1; give the model num_labels=8 or mend the label
    """
    out: list[Row] = []
    for i, row in enumerate(rows):
        where = f"{name} row {i}"
        if not isinstance(row, dict) or "input_ids" not in row:
            raise ValueError(f"{where}: expected a dict with 'input_ids', got {short(row)}; use ftlib.tokenize")
        row = {key: _plain(value) for key, value in row.items()}
        ids = row["input_ids"] = _numbers(row["input_ids"], vocab_size, f"{where}, column 'input_ids'")
        if row.get("token_type_ids") is not None:
            types = _numbers(row["token_type_ids"], type_vocab_size, f"{where}, column 'token_type_ids'")
            if len(types) != len(ids):
                raise ValueError(f"{where}: {len(types)} token_type_ids for {len(ids)} input_ids; must be equal")
            row["token_type_ids"] = types
        if out and ("token_type_ids" in row) != ("token_type_ids" in out[0]):
            raise ValueError(f"{where}: token_type_ids in some rows and not in others; tokenize all rows alike")
        length = len(ids)
        mask = row.pop("attention_mask", None)
        if mask is not None:
            mask = _numbers(mask, 2, f"{where}, column 'attention_mask'")
            if len(mask) != length:
                raise ValueError(f"{where}: {len(mask)} attention_mask values for {length} input_ids; must be equal")
            mask = None if all(mask) else mask
        if mask:
            row |= {key: _kept(row[key], mask) for key in ("input_ids", "token_type_ids") if key in row}
        real = len(row["input_ids"])
        if real == 0:
            raise ValueError(f"{where}, column 'input_ids': no tokens; drop the row")
        if max_positions is not None and real > max_positions:
            raise ValueError(
                f"{where}, column 'input_ids': {real} tokens, the model takes {max_positions}; "
                f"tokenize with max_length={max_positions}"
            )
        labels = row.get("labels")
        if labels is None or labels == {}:
            if labels_needed:
                raise ValueError(f"{where}: no 'labels'; tokenize a dataset that has a label column: label=...")
        else:
            row["labels"] = _checked_labels(labels, tasks, length, mask, where)
        out.append(row)
    return out


def _plain(value: Any) -> Any:
    """Tensors and numpy values as Python's lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _kept(values: list, mask: list[int]) -> list:
    return [value for value, keep in zip(values, mask, strict=True) if keep]


def _numbers(values: Any, size: int | None, where: str) -> list[int]:
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


def _checked_labels(labels: Any, tasks: dict, length: int, mask: list[int] | None, where: str) -> Any:
    where += ", column 'labels'"
    named = isinstance(labels, dict)
    if not named and "" not in tasks:
        raise ValueError(f"{where}: a plain label, but the model has the tasks {', '.join(tasks)}: {{task: label}}")
    clean = {}
    for task, label in labels.items() if named else [("", labels)]:
        if task not in tasks:
            has = "one task" if "" in tasks else ", ".join(map(repr, tasks))
            raise ValueError(f"{where}: labels for a task {task!r}; the model has {has}")
        kind, num_labels = tasks[task]
        place = where + (f" ({task})" if task else "")
        clean[task] = _checked_label(_plain(label), kind, num_labels, length, place)
        if mask and kind == "token-classification":
            clean[task] = _kept(clean[task], mask)
    return clean[""] if "" in tasks else clean


def _checked_label(label: Any, kind: str, num_labels: int, length: int, where: str) -> Any:
    many = isinstance(label, (list, tuple))
    values = [_plain(value) for value in label] if many else [label]
    if kind == "regression":
        if len(values) != num_labels:
            raise ValueError(f"{where}: {len(values)} values for {num_labels} outputs")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{where}: {short(value)} is no number; regression needs a float")
            if not abs(value) < _LARGEST:
                raise ValueError(f"{where}: the value is {short(value)}; drop the row or fill it in")
        return [float(value) for value in values] if num_labels > 1 else float(values[0])
    if kind == "multi-label-classification":
        if not many or len(values) != num_labels:
            got = f"{short(label)}; multi-label needs a list of {num_labels} values, each 0.0 or 1.0"
            raise ValueError(f"{where}: {got}")
        for value in values:
            if value not in (0, 1, IGNORE):
                raise ValueError(f"{where}: {short(value)} is neither 0, 1 nor {IGNORE} (ignored)")
        return [float(value) for value in values]
    if kind == "token-classification":
        if not many or len(values) != length:
            got = f"{len(values)} labels" if many else short(label)
            raise ValueError(f"{where}: {got} for {length} tokens; one label per token, {IGNORE} to ignore")
    elif many:
        raise ValueError(f"{where}: a list of {len(values)} labels, but the model gives one label per text")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{where}: {short(value)} is no class number; cross-entropy needs whole numbers (int)")
        if value != IGNORE and not 0 <= value < num_labels:
            remedy = f"give the model num_labels={value + 1}" if value >= num_labels else "count labels from 0"
            raise ValueError(f"{where}: label {value} is outside 0..{num_labels - 1}; {remedy} or mend the label")
    return [int(value) for value in values] if many else int(label)


# ------------------------------------------------------------------------------------------------------- texts


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
    first = [checked_text(t[0] if pairs else t, row, "text") for t, row in zip(texts, indices, strict=True)]
    second = None
    if pairs:
        second = [checked_text(t[1], row, "text_pair") for t, row in zip(texts, indices, strict=True)]
    return first, second


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


def short(value: Any) -> str:
    """How a message shows a value: at most 60 signs of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
