"""From text to token rows, once, for any task: padding comes as late as possible, in core/batches.py.

To copy: this file, inputs/rows.py, core/anatomy.py, core/batches.py and tasks/ (datasets to tokenize a Dataset).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..core.batches import Row, one_of, short, whole
from ..tasks.tagging import align, word_ids
from ..tasks.task import TASKS, encode_plain
from .rows import checked_column, checked_texts, is_stream, text_iterator


def tokenize(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation: bool = True,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | dict[str, str] | None = None,
    task: str | None = None,
) -> Any:
    """Turn a Dataset (or DatasetDict, or IterableDataset) of text into one of token ids, for any task.

    Args:
        dataset: `datasets.Dataset`, `DatasetDict` or `IterableDataset`, which is tokenized as it is read.
        tokenizer: a fast Transformers tokenizer.
        max_length: longest row in tokens, special tokens included; default: what the tokenizer's model takes.
        truncation: cut longer texts; with False a longer text is an error that names its row.
        text, text_pair: columns to read; default: `text` (or `tokens`, a list of words), and `text_pair` if there.
        label: column with the labels, default `label` if there; or {task name: column} for multi-task rows, where
            `labels` becomes a dict.  A list of whole numbers beside a list of words is tags, one a word: each is
            put on the first piece of its word, -100 elsewhere.  Any other list is kept: multi-label.
        task: the kind of task, for those that read further columns: "relation-classification" reads `spans`.

    Returns a dataset with `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, and
    `labels` if there were any.

    Raises ValueError or TypeError naming row, column and value for None, empty text, text with no valid Unicode
    form, labels that are None or text, and tags that are not as many as the words; and, with truncation=False,
    for text that is too long.
    """
    columns = getattr(dataset, "column_names", None)
    options = dict(max_length=max_length, truncation=truncation, text=text, text_pair=text_pair, label=label, task=task)
    if isinstance(columns, dict):  # DatasetDict
        done = type(dataset)()
        for split, part in dataset.items():
            try:
                done[split] = tokenize(part, tokenizer, **options)
            except (ValueError, TypeError) as error:
                kind = ValueError if isinstance(error, ValueError) else TypeError
                raise kind(f"split {split!r}: {error}") from error
        return done
    if not hasattr(dataset, "map"):
        got = f"got {type(dataset).__name__}; build one with Dataset.from_dict({{...}})"
        raise TypeError(f"tokenize takes a datasets.Dataset or DatasetDict, {got}")
    streams = is_stream(dataset)
    if columns is None:  # a stream that does not know them
        columns = list(next(iter(dataset.take(1)), {}))
    if not streams and len(dataset) == 0:
        raise ValueError("the dataset has zero examples; nothing to tokenize")
    record = TASKS[one_of("task", task, TASKS)] if task is not None else None

    text, text_pair, sources = _columns(columns, text, text_pair, label, record.columns if record else ())

    def work(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        first = checked_column(batch[text], indices, text)
        second = checked_column(batch[text_pair], indices, text_pair) if text_pair else None
        beside = {name: batch[name] for name in record.columns} if record else None
        encoded, inputs = _encode(first, second, tokenizer, max_length, truncation, indices, record, beside)
        labels = {
            task: [
                _label(value, first[i], encoded, i, f"row {row}, column {column!r}", record)
                for i, (value, row) in enumerate(zip(batch[column], indices, strict=True))
            ]
            for task, column in sources.items()
        }
        if not labels:
            return {**encoded, **inputs}
        mixed = [dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)]
        return {**encoded, **inputs, "labels": labels.get(None, mixed)}  # one task: a plain column

    how = dict(batched=True, with_indices=True, remove_columns=columns)
    if streams:
        return dataset.map(work, **how)
    plain = dataset.with_format(None)
    with _bar_if(len(plain) > 20_000):
        return plain.map(work, **how, load_from_cache_file=False)


def _columns(columns: list[str], text: Any, text_pair: Any, label: Any, more: Sequence[str]) -> tuple[str, Any, dict]:
    """The columns of the texts, and {task: column} of the labels, where they are not named and so looked for."""
    if text is None:
        wants_words = "tokens" in columns and ("text" not in columns or label not in (None, "label"))
        text = "tokens" if wants_words else "text"
    if text_pair is None and "text_pair" in columns and text == "text":
        text_pair = "text_pair"
    if label is None:
        label = "label" if "label" in columns else {}
    sources = {None: label} if isinstance(label, str) else dict(label)
    for column in [text, *([text_pair] if text_pair else []), *sources.values(), *more]:
        if column not in columns:
            raise ValueError(f"no column {column!r}: the dataset has {', '.join(columns)}; name it: text=, label=")
    return text, text_pair, sources


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
    encoded, _ = _encode(first, second, tokenizer, max_length, truncation, indices, mask=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    rows: list[Row] = [{key: encoded[key][i] for key in keys} for i in range(len(first))]
    if not isinstance(first[0], str):
        for i, row in enumerate(rows):
            starts: dict[int, int] = {}
            for place, word in enumerate(word_ids(encoded, i)):
                if word is not None:
                    starts.setdefault(word, place)
            row["word_starts"] = [starts.get(word) for word in range(len(first[i]))]
    return rows


def _encode(
    first: list, second: list | None, tokenizer: Any, max_length: int | None, truncation: bool, indices: Sequence[int],
    record: Any = None, beside: dict | None = None, mask: bool = True,
) -> tuple[Any, dict[str, list]]:  # fmt: skip
    """The tokenizer's encoding, and further inputs of the model, a value a row."""
    if not callable(tokenizer):
        raise TypeError(f"tokenizer is {short(tokenizer)}; pass one, e.g. ftlib.load_tokenizer('minilm')")
    words = not isinstance(first[0], str)
    for row, *texts in zip(indices, first, *([second] if second else []), strict=True):
        if any(isinstance(text, str) == words for text in texts):
            raise TypeError(f"row {row}: {short(texts[-1])}; either all texts are strings, or all are lists of words")
    specials = tokenizer.num_special_tokens_to_add(pair=second is not None)
    if max_length is not None:
        whole("max_length", max_length, specials + 1)  # the special tokens, and one more
    limit = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    if limit is not None and limit > 1_000_000:  # the library's "no limit known"
        limit = None

    def tokenized(first: list, second: list | None) -> Any:
        return tokenizer(
            first, second, truncation=bool(truncation and limit), max_length=limit if truncation else None,
            padding=False, is_split_into_words=words, return_attention_mask=mask, verbose=False,
        )  # fmt: skip

    encode = record.encode if record else encode_plain
    encoded, inputs = encode(tokenized, first, second, beside, [f"row {row}" for row in indices])
    for row, ids in zip(indices, encoded["input_ids"], strict=True) if limit is not None and not truncation else ():
        if len(ids) > limit:
            raise ValueError(f"row {row}: {len(ids)} tokens, the limit is {limit}; cut it or set truncation=True")
    return encoded, inputs


def _label(value: Any, text: Any, encoded: Any, i: int, where: str, record: Any) -> Any:
    """A label, ready for a row: tags on the first pieces of their words, anything else as it is."""
    if value is None:
        raise ValueError(f"{where}: the label is None; drop the row or label it")
    if isinstance(value, str):
        raise TypeError(f"{where}: the label {value!r} is text; number it: dataset.class_encode_column(column)")
    for item in value if isinstance(value, (list, tuple)) else ():
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise TypeError(f"{where}: {short(item)} among the labels; number them, e.g. with datasets.ClassLabel")
    if record is not None:
        return record.align(value, text, encoded, i, where)
    whole = isinstance(value, (list, tuple)) and not any(isinstance(item, float) for item in value)
    return align(value, text, encoded, i, where) if whole and not isinstance(text, str) else value
