"""From text to batches: tokenize once, check every row, pad as late as possible.

A *row* is a plain dict: `input_ids` (list of int, no padding), optional `token_type_ids`, and `labels`: an int
(class), a float (regression), a list of floats (multi-label), a list of ints as long as `input_ids` (one per
token, -100 where there is none), or a dict {task name: one of these} for multi-task rows.

To copy this module you need: batching.py and torch (the datasets library only where you tokenize a Dataset).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

IGNORE = -100  # the label PyTorch's and our losses skip

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------- tokenizing


def tokenize(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation: bool = True,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | dict[str, str] | None = None,
) -> Any:
    """Turn a Dataset (or DatasetDict) of text into one of token ids, for any task.

    Args:
        dataset: `datasets.Dataset` or `DatasetDict`.
        tokenizer: a fast Transformers tokenizer.
        max_length: longest row in tokens, special tokens included; default: what the tokenizer's model takes.
        truncation: cut longer texts; with False a longer text is an error that names its row.
        text, text_pair: columns to read; default: `text` (or `tokens`, a list of words) and `text_pair` if there.
        label: column with the labels, default `label` if there; or {task name: column} for multi-task rows, where
            `labels` becomes a dict.  Labels of lists of words (tags) are put on the first piece of each word, -100
            elsewhere.

    Returns a dataset with `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, and
    `labels` if there were any.

    Raises ValueError or TypeError naming row, column and value for None, empty text, and text with no valid
    Unicode form; and, with truncation=False, for text that is too long.
    """
    if hasattr(dataset, "values") and not hasattr(dataset, "column_names"):
        raise TypeError("tokenize takes a datasets.Dataset or DatasetDict; build one with Dataset.from_dict({...})")
    if isinstance(getattr(dataset, "column_names", None), dict):  # DatasetDict
        options = dict(max_length=max_length, truncation=truncation, text=text, text_pair=text_pair, label=label)
        return type(dataset)({name: tokenize(part, tokenizer, **options) for name, part in dataset.items()})
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        raise TypeError(f"tokenize takes a datasets.Dataset or DatasetDict, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError("the dataset has zero examples; nothing to tokenize")

    if text is None:
        wants_words = "tokens" in columns and ("text" not in columns or label is not None and label != "label")
        text = "tokens" if wants_words else "text"
    if text_pair is None and "text_pair" in columns and text == "text":
        text_pair = "text_pair"
    if label is None:
        label = "label" if "label" in columns else None
    sources = {None: label} if isinstance(label, str) else dict(label or {})
    for column in [text, *([text_pair] if text_pair else []), *sources.values()]:
        if column not in columns:
            raise ValueError(f"no column {column!r}: the dataset has {', '.join(columns)}")

    def work(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        first = [_checked_text(value, row, text) for value, row in zip(batch[text], indices, strict=True)]
        second = None
        if text_pair:
            second = [_checked_text(v, row, text_pair) for v, row in zip(batch[text_pair], indices, strict=True)]
        encoded = _encode(first, second, tokenizer, max_length, truncation, indices)
        if not sources:
            return dict(encoded)
        labels = {
            task: [
                _aligned_label(value, encoded.word_ids(i), row, column)
                for i, (value, row) in enumerate(zip(batch[column], indices, strict=True))
            ]
            for task, column in sources.items()
        }
        if None in labels:  # one task: a plain column
            return {**encoded, "labels": labels[None]}
        return {**encoded, "labels": [dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)]}

    return dataset.map(work, batched=True, with_indices=True, remove_columns=columns, load_from_cache_file=False,
                       desc=None)  # fmt: skip


def encode_texts(
    texts: Sequence[Any], tokenizer: Any, *, max_length: int | None = None, truncation: bool = True, offset: int = 0
) -> list[Row]:
    """Token rows for a list of strings, of (text, text_pair) tuples, or of lists of words.

    >>> encode_texts(["", "b"], None)
    Traceback (most recent call last):
    ...
    ValueError: row 0, column 'text': the text is empty; drop the row or give it text
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string; pass a list: [text]")
    indices = list(range(offset, offset + len(texts)))
    pairs = len(texts) > 0 and isinstance(texts[0], tuple)
    if pairs:
        for row, value in zip(indices, texts, strict=True):
            if not isinstance(value, tuple) or len(value) != 2:
                raise ValueError(f"row {row}: expected a (text, text_pair) tuple like row {indices[0]}, got {value!r}")
    first = [_checked_text(t[0] if pairs else t, row, "text") for t, row in zip(texts, indices, strict=True)]
    second = [_checked_text(t[1], row, "text_pair") for t, row in zip(texts, indices, strict=True)] if pairs else None
    if not first:
        return []
    encoded = _encode(first, second, tokenizer, max_length, truncation, indices)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    rows: list[Row] = [{key: encoded[key][i] for key in keys} for i in range(len(first))]
    if not isinstance(first[0], str):  # where each word begins; None for words that were cut off
        for i, row in enumerate(rows):
            starts: dict[int, int] = {}
            for place, word in enumerate(encoded.word_ids(i)):
                if word is not None:
                    starts.setdefault(word, place)
            row["word_starts"] = [starts.get(word) for word in range(len(first[i]))]
    return rows


def _checked_text(value: Any, row: int, column: str) -> Any:
    where = f"row {row}, column {column!r}"
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{where}: the list of words is empty; drop the row or give it words")
        return [_checked_text(word, row, f"{column}[{i}]") for i, word in enumerate(value)]
    if not isinstance(value, str):
        raise TypeError(f"{where}: expected text, got {value!r} ({type(value).__name__}); drop the row or fill it in")
    if not value.strip():
        raise ValueError(f"{where}: the text is empty; drop the row or give it text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode at character {error.start}; decode the file again") from None
    return value


def _encode(first: list, second: list | None, tokenizer: Any, max_length: int | None, truncation: bool, indices: list):
    limit = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    if limit is not None and limit > 1_000_000:  # the library's "no limit known"
        limit = None
    specials = tokenizer.num_special_tokens_to_add(pair=second is not None)
    if max_length is not None and (not isinstance(max_length, int) or max_length <= specials):
        raise ValueError(f"max_length={max_length!r}: need a whole number above {specials}, the special tokens alone")
    if first and isinstance(first[0], str) != all(isinstance(item, str) for item in first):
        raise TypeError("texts mixes strings and lists of words; use one kind")
    encoded = tokenizer(
        first, second, truncation=bool(truncation and limit), max_length=limit if truncation else None, padding=False,
        is_split_into_words=not isinstance(first[0], str), verbose=False,
    )  # fmt: skip
    if not truncation and limit is not None:
        for row, ids in zip(indices, encoded["input_ids"], strict=True):
            if len(ids) > limit:
                raise ValueError(f"row {row}: {len(ids)} tokens, the limit is {limit}; shorten it or set truncation=True")
    return encoded


def _aligned_label(value: Any, word_ids: list[int | None], row: int, column: str) -> Any:
    where = f"row {row}, column {column!r}"
    if value is None:
        raise ValueError(f"{where}: the label is None; drop the row or label it")
    if isinstance(value, str):
        raise TypeError(f"{where}: the label {value!r} is text; number it: dataset.class_encode_column({column!r})")
    if not isinstance(value, (list, tuple)):
        return value
    if value and isinstance(value[0], float):  # multi-label: one 0/1 per class, not per token
        return list(value)
    words = [word for word in word_ids if word is not None]
    seen = max(words, default=-1) + 1
    if len(value) < seen:
        raise ValueError(f"{where}: {len(value)} tags for at least {seen} words; tags and words must be as many")
    aligned, previous = [], None
    for word in word_ids:
        aligned.append(IGNORE if word is None or word == previous else int(value[word]))
        previous = word
    return aligned


# --------------------------------------------------------------------------------------------------- checking


def to_rows(dataset: Any, name: str = "dataset") -> list[Row]:
    """A list of rows from a Dataset, or from any sequence of dicts; says what is missing."""
    if hasattr(dataset, "column_names"):
        if isinstance(dataset.column_names, dict):
            raise TypeError(f"{name} is a DatasetDict; pass one split, e.g. {name}['train']")
        if "input_ids" not in dataset.column_names:
            raise ValueError(
                f"{name} has no column 'input_ids' (it has {', '.join(dataset.column_names)}); "
                "call ftlib.tokenize(dataset, tokenizer) first"
            )
        keep = [c for c in ("input_ids", "token_type_ids", "labels") if c in dataset.column_names]
        rows = dataset.select_columns(keep).with_format(None).to_list()
    elif isinstance(dataset, Iterable) and not isinstance(dataset, (str, bytes, dict)):
        rows = list(dataset)
    else:
        raise TypeError(f"{name} must be a Dataset or a list of rows, got {type(dataset).__name__}")
    if not rows:
        raise ValueError(f"{name} has zero examples")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or "input_ids" not in row:
            raise ValueError(f"{name} row {i}: expected a dict with 'input_ids', got {_short(row)}; use ftlib.tokenize")
        if isinstance(row.get("labels"), dict):  # Arrow fills tasks a row does not have with None
            row["labels"] = {task: value for task, value in row["labels"].items() if value is not None}
    return rows


def checked_rows(
    rows: list[Row],
    tasks: dict[str, tuple[str, int]],
    *,
    name: str = "dataset",
    vocab_size: int | None = None,
    max_positions: int | None = None,
    labels_needed: bool = True,
) -> list[Row]:
    """Find the first bad row before any training: ids, lengths and labels against the model.

    `tasks` maps a task name ("" for a model with one task) to (kind, number of labels).  Returns the rows with the
    labels of regression and multi-label tasks as floats.

    >>> checked_rows([{"input_ids": [1], "labels": 7}], {"": ("sequence-classification", 2)})
    Traceback (most recent call last):
    ...
    ValueError: dataset row 0, column 'labels': label 7 is outside 0..1; give the model num_labels=8 or mend the label
    """
    out = []
    for i, row in enumerate(rows):
        where = f"{name} row {i}"
        ids = row["input_ids"]
        if len(ids) == 0:
            raise ValueError(f"{where}, column 'input_ids': no tokens; drop the row")
        if max_positions is not None and len(ids) > max_positions:
            raise ValueError(
                f"{where}, column 'input_ids': {len(ids)} tokens, the model takes {max_positions}; "
                f"tokenize with max_length={max_positions}"
            )
        if vocab_size is not None and not 0 <= min(ids) <= max(ids) < vocab_size:
            bad = max(ids) if max(ids) >= vocab_size else min(ids)
            raise ValueError(f"{where}, column 'input_ids': id {bad} is outside 0..{vocab_size - 1}; tokenizer and model differ")
        if "token_type_ids" in row and len(row["token_type_ids"]) != len(ids):
            raise ValueError(f"{where}: {len(row['token_type_ids'])} token_type_ids for {len(ids)} input_ids; must be equal")
        labels = row.get("labels")
        if labels is None:
            if labels_needed:
                raise ValueError(f"{where}: no 'labels'; tokenize a dataset that has a label column, or name it: label=...")
            out.append(row)
            continue
        clean = {}
        for task, label in (labels.items() if isinstance(labels, dict) else [(_only(tasks, where), labels)]):
            if task not in tasks:
                raise ValueError(f"{where}: unknown task {task!r}; the model has {', '.join(map(repr, tasks))}")
            kind, num_labels = tasks[task]
            clean[task] = _checked_label(
                label, kind, num_labels, len(ids), f"{where}, column 'labels'" + (f" ({task})" if task else "")
            )
        out.append({**row, "labels": clean if "" not in tasks else clean[""]})
    return out


def _only(tasks: dict, where: str) -> str:
    if list(tasks) != [""]:
        raise ValueError(f"{where}: a plain label, but the model has the tasks {', '.join(tasks)}; pass {{task: dataset}}")
    return ""


def _checked_label(label: Any, kind: str, num_labels: int, length: int, where: str) -> Any:
    many = isinstance(label, (list, tuple))
    if kind == "regression":
        values = label if many else [label]
        if len(values) != num_labels:
            raise ValueError(f"{where}: {len(values)} values for {num_labels} outputs")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{where}: {value!r} is no number; regression needs a float")
            if value != value or abs(value) == float("inf"):
                raise ValueError(f"{where}: the value is {value}; drop the row or fill it in")
        return [float(value) for value in label] if many and num_labels > 1 else float(values[0])
    if kind == "multi-label-classification":
        if not many or len(label) != num_labels:
            raise ValueError(f"{where}: {_short(label)}; multi-label needs a list of {num_labels} values, each 0.0 or 1.0")
        for value in label:
            if value not in (0, 1, IGNORE):
                raise ValueError(f"{where}: {value!r} is neither 0, 1 nor {IGNORE} (ignored)")
        return [float(value) for value in label]
    if kind == "token-classification":
        if not many or len(label) != length:
            got = f"{len(label)} labels" if many else repr(label)
            raise ValueError(f"{where}: {got} for {length} tokens; one label per token, {IGNORE} to ignore")
    elif many:
        raise ValueError(f"{where}: a list of {len(label)} labels, but the model gives one label per text")
    for value in label if many else [label]:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{where}: {_short(value)} is no class number; cross-entropy needs whole numbers (int)")
        if value != IGNORE and not 0 <= value < num_labels:
            remedy = f"give the model num_labels={value + 1}" if value >= num_labels else "count labels from 0"
            raise ValueError(f"{where}: label {value} is outside 0..{num_labels - 1}; {remedy} or mend the label")
    return label


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --------------------------------------------------------------------------------------------------- batching


def collate(rows: list[Row], *, pad_token_id: int = 0, padding_side: str = "right") -> dict[str, Any]:
    """Pad rows to the longest among them.

    Returns `input_ids`, `attention_mask` (and `token_type_ids`): int64 (batch, tokens); `labels`: int64 (batch,) for
    classes, (batch, tokens) for tags, float32 (batch,) or (batch, k) for numbers.  For multi-task rows `labels` is
    {task: tensor (rows of the task, ...)} and `rows` is {task: int64 (rows of the task,)}: where in the batch they are.

    >>> collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])["attention_mask"]
    tensor([[1, 1, 1],
            [1, 0, 0]])
    """
    lengths = [len(row["input_ids"]) for row in rows]
    longest = max(lengths)

    def padded(values: Iterable[list[int]], fill: int) -> torch.Tensor:
        out = []
        for value in values:
            fillers = [fill] * (longest - len(value))
            out.append(fillers + list(value) if padding_side == "left" else list(value) + fillers)
        return torch.tensor(out)  # (batch, tokens)

    batch: dict[str, Any] = {
        "input_ids": padded((row["input_ids"] for row in rows), pad_token_id),
        "attention_mask": padded(([1] * length for length in lengths), 0),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded((row["token_type_ids"] for row in rows), 0)

    def stacked(values: list[Any], own_lengths: list[int]) -> torch.Tensor:
        sample = values[0]
        if isinstance(sample, (list, tuple)):
            per_token = not isinstance(sample[0], float) and all(
                len(v) == n for v, n in zip(values, own_lengths, strict=True)
            )
            return padded(values, IGNORE) if per_token else torch.tensor(values, dtype=torch.float32)
        return torch.tensor(values, dtype=torch.float32 if isinstance(sample, float) else torch.int64)

    if isinstance(rows[0].get("labels"), dict):
        batch["labels"], batch["rows"] = {}, {}
        for task in sorted({task for row in rows for task in row["labels"]}):
            own = [i for i, row in enumerate(rows) if task in row["labels"]]
            batch["labels"][task] = stacked([rows[i]["labels"][task] for i in own], [lengths[i] for i in own])
            batch["rows"][task] = torch.tensor(own)
    elif rows[0].get("labels") is not None:
        batch["labels"] = stacked([row["labels"] for row in rows], lengths)
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch (tensors in nested dicts) to a device, without waiting where memory is pinned."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


def split_by_size(
    indices: Sequence[int], lengths: Sequence[int], *, batch_size: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Cut indices into batches of at most `batch_size` rows and at most `max_tokens` padded tokens, longest first.

    Sorting by length keeps padding low, and longest first means that memory trouble shows in the first batch.

    >>> split_by_size([0, 1, 2, 3], [5, 2, 4, 3], max_tokens=10)
    [[0, 2], [3, 1]]
    """
    for value, what in ((batch_size, "batch_size"), (max_tokens, "max_tokens")):
        if value is not None and value < 1:
            raise ValueError(f"{what}={value}: must be at least 1")
    ordered = sorted(indices, key=lambda i: -lengths[i])  # stable: equal lengths keep their order
    out: list[list[int]] = []
    width = 0  # tokens of the longest row in the batch being filled
    for i in ordered:
        if max_tokens is not None and lengths[i] > max_tokens:
            raise ValueError(f"row {i} has {lengths[i]} tokens, more than max_tokens={max_tokens}; raise it or cut the text")
        full = not out or (batch_size is not None and len(out[-1]) >= batch_size)
        if full or (max_tokens is not None and width * (len(out[-1]) + 1) > max_tokens):
            out.append([])
            width = lengths[i]
        out[-1].append(i)
    return out
