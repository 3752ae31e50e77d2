"""From text to batches: tokenize once, pad as late as possible.

A *row* is a plain dict: `input_ids` (list of int, no padding), optional `token_type_ids`, and `labels`: an int
(class), a float (regression), a list of floats (multi-label), a list of ints as long as `input_ids` (one per
token, -100 where there is none), or a dict {task name: one of these} for multi-task rows.  `rows.checked_rows`
says which row does not fit a model.

To copy this module you need: batching.py, rows.py and torch (the datasets library only where you tokenize a Dataset).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .rows import IGNORE, Row, checked_rows, checked_text, checked_texts, short, text_iterator, to_rows

__all__ = ["IGNORE", "Row", "checked_rows", "checked_texts", "collate", "encode_texts", "evaluating", "restore_modes",
           "split_by_size", "text_iterator", "to_device", "to_rows", "tokenize"]  # fmt: skip


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
        text, text_pair: columns to read; default: `text` (or `tokens`, a list of words), and `text_pair` if there.
        label: column with the labels, default `label` if there; or {task name: column} for multi-task rows, where
            `labels` becomes a dict.  A list of whole numbers beside a list of words is tags, one a word: each is
            put on the first piece of its word, -100 elsewhere.  Any other list is kept: multi-label.

    Returns a dataset with `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, and
    `labels` if there were any.

    Raises ValueError or TypeError naming row, column and value for None, empty text, text with no valid Unicode
    form, labels that are None or text, and tags that are not as many as the words; and, with truncation=False,
    for text that is too long.
    """
    columns = getattr(dataset, "column_names", None)
    options = dict(max_length=max_length, truncation=truncation, text=text, text_pair=text_pair, label=label)
    if isinstance(columns, dict):  # DatasetDict
        return type(dataset)({n: _named(f"split {n!r}", tokenize, p, tokenizer, **options) for n, p in dataset.items()})
    if columns is None or not hasattr(dataset, "__len__"):
        hint = "stream it into a Dataset" if hasattr(dataset, "take") else "build one with Dataset.from_dict({...})"
        raise TypeError(f"tokenize takes a datasets.Dataset or DatasetDict, got {type(dataset).__name__}; {hint}")
    if len(dataset) == 0:
        raise ValueError("the dataset has zero examples; nothing to tokenize")

    if text is None:
        wants_words = "tokens" in columns and ("text" not in columns or label not in (None, "label"))
        text = "tokens" if wants_words else "text"
    if text_pair is None and "text_pair" in columns and text == "text":
        text_pair = "text_pair"
    if label is None:
        label = "label" if "label" in columns else None
    sources = {None: label} if isinstance(label, str) else dict(label or {})
    for column in [text, *([text_pair] if text_pair else []), *sources.values()]:
        if column not in columns:
            raise ValueError(f"no column {column!r}: the dataset has {', '.join(columns)}; name it: text=, label=")

    def work(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        first = [checked_text(value, row, text) for value, row in zip(batch[text], indices, strict=True)]
        second = None
        if text_pair:
            second = [checked_text(v, row, text_pair) for v, row in zip(batch[text_pair], indices, strict=True)]
        encoded = _encode(first, second, tokenizer, max_length, truncation, indices)
        if not sources:
            return dict(encoded)
        labels = {
            task: [
                _aligned_label(value, first[i], encoded, i, f"row {row}, column {column!r}")
                for i, (value, row) in enumerate(zip(batch[column], indices, strict=True))
            ]
            for task, column in sources.items()
        }
        if None in labels:  # one task: a plain column
            return {**encoded, "labels": labels[None]}
        mixed = [dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)]
        return {**encoded, "labels": mixed}

    plain = dataset.with_format(None)
    with _bar_if(len(plain) > 20_000):
        return plain.map(work, batched=True, with_indices=True, remove_columns=columns, load_from_cache_file=False)


@contextmanager
def _bar_if(wanted: bool) -> Iterator[None]:
    """The datasets library shows a bar for every map; for a second of work that only litters a notebook."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not wanted and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def encode_texts(
    texts: Iterable[Any], tokenizer: Any, *, max_length: int | None = None, truncation: bool = True,
    indices: Sequence[int] | None = None,
) -> list[Row]:  # fmt: skip
    """Token rows for strings, (text, text_pair) tuples, or lists of words.

    Lists of words also give `word_starts`: the position of each word's first piece, None for a word that was cut off.
    Raises ValueError or TypeError naming the row (its number in `indices`, else its place), as `tokenize` does.

    >>> encode_texts(["", "b"], None)
    Traceback (most recent call last):
    ...
    ValueError: row 0, column 'text': the text is empty; drop the row or give it text
    """
    texts = list(text_iterator(texts))
    indices = range(len(texts)) if indices is None else indices
    first, second = checked_texts(texts, indices)
    if not first:
        return []
    encoded = _encode(first, second, tokenizer, max_length, truncation, indices, mask=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    rows: list[Row] = [{key: encoded[key][i] for key in keys} for i in range(len(first))]
    if not isinstance(first[0], str):
        for i, row in enumerate(rows):
            starts: dict[int, int] = {}
            for place, word in enumerate(_word_ids(encoded, i)):
                if word is not None:
                    starts.setdefault(word, place)
            row["word_starts"] = [starts.get(word) for word in range(len(first[i]))]
    return rows


def _named(where: str, work: Any, *args: Any, **options: Any) -> Any:
    """Call `work`; errors about the data say where."""
    try:
        return work(*args, **options)
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{where}: {error}") from error


def _encode(
    first: list, second: list | None, tokenizer: Any, max_length: int | None, truncation: bool, indices: Sequence[int],
    mask: bool = True,
) -> Any:  # fmt: skip
    if not callable(tokenizer):
        raise TypeError(f"tokenizer is {short(tokenizer)}; pass one, e.g. ftlib.load_tokenizer('minilm')")
    words = not isinstance(first[0], str)
    for row, *texts in zip(indices, first, *([second] if second else []), strict=True):
        if any(isinstance(text, str) == words for text in texts):
            raise TypeError(f"row {row}: {short(texts[-1])}; either all texts are strings, or all are lists of words")
    specials = tokenizer.num_special_tokens_to_add(pair=second is not None)
    if max_length is not None and (type(max_length) is not int or max_length <= specials):
        raise ValueError(f"max_length={max_length!r}: need a whole number above {specials}, the special tokens alone")
    limit = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    if limit is not None and limit > 1_000_000:  # the library's "no limit known"
        limit = None
    encoded = tokenizer(
        first, second, truncation=bool(truncation and limit), max_length=limit if truncation else None, padding=False,
        is_split_into_words=words, return_attention_mask=mask, verbose=False,
    )  # fmt: skip
    if not truncation and limit is not None:
        for row, ids in zip(indices, encoded["input_ids"], strict=True):
            if len(ids) > limit:
                raise ValueError(f"row {row}: {len(ids)} tokens, the limit is {limit}; cut it or set truncation=True")
    return encoded


def _word_ids(encoded: Any, i: int) -> list[int | None]:
    """The word of the first text that each token of row i is part of; None for special tokens and the second text."""
    both = zip(encoded.word_ids(i), encoded.sequence_ids(i), strict=True)
    return [word if text == 0 else None for word, text in both]


def _aligned_label(value: Any, text: Any, encoded: Any, i: int, where: str) -> Any:
    if value is None:
        raise ValueError(f"{where}: the label is None; drop the row or label it")
    if isinstance(value, str):
        raise TypeError(f"{where}: the label {value!r} is text; number it: dataset.class_encode_column(column)")
    if not isinstance(value, (list, tuple)):
        return value
    for item in value:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise TypeError(f"{where}: {short(item)} among the labels; number them, e.g. with datasets.ClassLabel")
    if isinstance(text, str) or any(isinstance(item, float) for item in value):  # multi-label: a value per class
        return list(value)
    if len(value) != len(text):
        raise ValueError(f"{where}: {len(value)} tags for {len(text)} words; mend the row, one tag a word")
    aligned, previous = [], None
    for word in _word_ids(encoded, i):
        aligned.append(IGNORE if word is None or word == previous else value[word])
        previous = word
    return aligned


# --------------------------------------------------------------------------------------------------- batching


def collate(
    rows: Sequence[Row], *, pad_token_id: int = 0, padding_side: str = "right", width: int | None = None
) -> dict[str, Any]:
    """Pad rows to the longest among them, or to `width` tokens if that is more.

    Returns `input_ids`, `attention_mask` (and `token_type_ids`): int64 (batch, tokens); `labels`: int64 (batch,) for
    classes, (batch, tokens) for tags, float32 (batch,) or (batch, k) for numbers.  For multi-task rows `labels` is
    {task: tensor (rows of the task, ...)} and `rows` is {task: int64 (rows of the task,)}: where in the batch they are.
    Raises ValueError for no rows, and for rows that do not go together (`rows.checked_rows` says which and why).

    >>> collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])["attention_mask"]
    tensor([[1, 1, 1],
            [1, 0, 0]])
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}: choose left or right")
    if not rows:
        raise ValueError("no rows to collate")
    try:
        return _collate(rows, pad_token_id, padding_side, width or 0)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"rows that do not go together ({reason}); checked_rows(rows, ...) tells more") from error


def _collate(rows: Sequence[Row], pad_token_id: int, padding_side: str, width: int) -> dict[str, Any]:
    lengths = [len(row["input_ids"]) for row in rows]
    longest = max(*lengths, width)

    def padded(values: Iterable[list[int]], fill: int) -> torch.Tensor:
        out = []
        for value in values:
            fillers = [fill] * (longest - len(value))
            out.append(fillers + list(value) if padding_side == "left" else list(value) + fillers)
        tensor = torch.tensor(out, dtype=torch.int64)  # (batch, tokens)
        if tensor.dim() != 2:
            raise ValueError(f"lists inside lists, of shape {tuple(tensor.shape)}")
        return tensor

    def stacked(values: list[Any], own_lengths: list[int]) -> torch.Tensor:
        sample = values[0]
        if isinstance(sample, (list, tuple)):
            tags = not any(isinstance(item, float) for item in sample)
            if tags and [len(v) for v in values] == own_lengths:
                return padded(values, IGNORE)  # (rows, tokens)
            return torch.tensor(values, dtype=torch.float32)  # (rows, k)
        return torch.tensor(values, dtype=torch.float32 if isinstance(sample, float) else torch.int64)  # (rows,)

    batch: dict[str, Any] = {
        "input_ids": padded((row["input_ids"] for row in rows), pad_token_id),
        "attention_mask": padded(([1] * length for length in lengths), 0),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded((row["token_type_ids"] for row in rows), 0)
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
    """Move a batch (tensors in nested dicts) to a device; to CUDA from pinned memory, so that nobody waits."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if not isinstance(batch, torch.Tensor):
        return batch
    if device.type == "cuda" and batch.device.type == "cpu":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


def split_by_size(
    indices: Iterable[int], lengths: Sequence[int], *, batch_size: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Cut indices into batches of at most `batch_size` rows and at most `max_tokens` padded tokens, longest first.

    Sorting by length keeps padding low, and longest first means that memory trouble shows in the first batch.
    Raises ValueError for a size that is no whole number of at least 1, and for a row longer than `max_tokens`.

    >>> split_by_size([0, 1, 2, 3], [5, 2, 4, 3], max_tokens=10)
    [[0, 2], [3, 1]]
    """
    for value, what in ((batch_size, "batch_size"), (max_tokens, "max_tokens")):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{what}={value!r}: need a whole number of at least 1")
    ordered = sorted(indices, key=lambda i: -lengths[i])  # stable: equal lengths keep their order
    out: list[list[int]] = []
    width = 0  # tokens of the longest row in the batch being filled
    for i in ordered:
        if max_tokens is not None and lengths[i] > max_tokens:
            raise ValueError(f"row {i} has {lengths[i]} tokens, more than max_tokens={max_tokens}; raise it or cut it")
        full = not out or (batch_size is not None and len(out[-1]) >= batch_size)
        if full or (max_tokens is not None and width * (len(out[-1]) + 1) > max_tokens):
            out.append([])
            width = lengths[i]
        out[-1].append(i)
    return out


# ------------------------------------------------------------------------------------------- around a forward pass


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; afterwards every module is in the mode (train or eval) it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        restore_modes(modes)


def restore_modes(modes: dict[nn.Module, bool]) -> None:
    """Put {module: training} back."""
    for module, training in modes.items():
        module.training = training
