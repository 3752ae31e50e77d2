"""From text to token rows, once, for any task: padding comes as late as possible, in core/batches.py.

To copy: this file, inputs/{rows,agreement}.py, core/{anatomy,batches}.py and tasks/ (`tokenize`: inputs/reading.py).
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

from ..core.batches import Row, one_of, refuse, short, whole
from ..tasks.tagging import align, word_ids
from ..tasks.task import TASKS, encode_plain, keep_label
from .agreement import A_TOKEN
from .rows import checked_column, checked_texts, is_stream, text_iterator, transforms

# columns that models take beside texts: made of tokens, so that they do not survive tokenizing
INPUTS = A_TOKEN | {"attention_mask", "decoder_input_ids", "input_ids", "pixel_values"}


def tokenize(
    dataset: Any, tokenizer: Any, *, max_length: int | None = None, truncation: bool = True, text: str | None = None,
    text_pair: str | None = None, label: str | dict[str, str] | None = None, task: str | None = None,
    stride: int | None = None, max_target_length: int | None = None, prefix: str | None = None,
    mask_probability: float | None = None, whole_words: bool | None = None,
) -> Any:  # fmt: skip
    """Turn a table of texts into a Dataset of token ids, for any task; a DatasetDict where there are several splits.

    Args:
        dataset: what `reading.as_dataset` takes: a Dataset, DatasetDict or IterableDataset (tokenized as it is read), a
            DataFrame, a list of dicts, {column: list}, a file's path, {split: any of these}; nothing is written there.
        tokenizer: a fast Transformers tokenizer.
        max_length: longest row in tokens, special tokens included; default: what the tokenizer's model takes.
        truncation: cut longer texts; with False a longer text is an error that names its row.
        text, text_pair: columns to read; default: `text` (or `tokens`, a list of words), and `text_pair` if there.
            Words become the pieces that they are in the text, joined by spaces.
        label: column with the labels, default `label` or `labels` if there; or {task name: column} for multi-task rows,
            where `labels` becomes a dict.  A list of whole numbers or names beside a list of words is tags, one a word:
            each is put on the first piece of its word, -100 elsewhere.  Any other list is kept: multi-label.
        task: the kind of task, where lists of class names are to be a 0 or 1 for each class ("multi-label-
            classification"), or other columns are read: `spans` ("relation-classification"); `messages` (and `tools`),
            or `prompt` and `completion`, or `text` ("causal-lm"); `question`, `context` and, if there, `answers`, of
            which every window is a row ("question-answering"); `source` and `target`, or those that text= and label=
            name ("seq2seq-lm"); `text` ("masked-lm").  tasks/ says more of each.
        stride: tokens of a context that its next window has again; default 128, at most a third of max_length.
        max_target_length, prefix: of text to text: longest target, its end token included, default what the tokenizer
            takes, a longer one is an error; and what stands before every source.  There a source is cut only where
            max_length is given, and how many were is said.
        mask_probability, whole_words: share of tokens (0.15), or of words, that "masked-lm" chooses.

    Returns a dataset with `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, and `labels`.
    Labels that are text are numbered, over all splits together, in the order of their names (the tag O first, whole
    numbers by size), with a warning; the names, or a ClassLabel's, stay in the features: `ClassLabel`, or a List of it.

    Raises ValueError or TypeError naming row, column and value for None, empty text or none in Unicode, labels that are
    None or a stream's text, tags not as many as the words, and, with truncation=False, for text that is too long.
    """
    from .reading import as_dataset

    data = as_dataset(dataset)
    parts = data if isinstance(data, dict) else {"": data}
    record = TASKS[one_of("task", task, TASKS)] if task is not None else None
    further = {"stride": stride, "max_target_length": max_target_length, "prefix": prefix}
    further |= {"mask_probability": mask_probability, "whole_words": whole_words}
    further, found, done, split = {name: value for name, value in further.items() if value is not None}, {}, {}, ""
    for name in [name for name in further if not (record and name in record.options)]:
        takes = ", ".join(kind for kind, one in TASKS.items() if name in one.options)
        raise ValueError(f"{name}={further[name]!r}: only for task={takes}")
    try:
        if record and record.rows:
            named, columns = {"text": text, "label": label}, label is not None and not isinstance(label, str)
            to_none = text_pair is not None or (label is not None and "label" not in record.reads)
            refuse(
                (to_none, f"{task} reads no text_pair= and no label="),
                (columns, f"label={short(label)}: name one column, of the targets"),
            )
            for split, part in parts.items():
                done[split] = _made(part, tokenizer, record, named, max_length, truncation, further)
            return type(data)(done) if isinstance(data, dict) else done[""]
        for split, part in parts.items():
            found[split] = _columns(part, text, text_pair, label, record)
        names = _class_names(parts, found)
        if record and record.probabilities is None and (own := [own for own in names[split].values() if own]):
            raise ValueError(f"{task} needs numbers, and its labels are {short([*own[0]])}; convert the column")
        for split, part in parts.items():
            encode = partial(_encode, tokenizer=tokenizer, max_length=max_length, truncation=truncation, record=record)
            done[split] = _tokenized(part, encode, record, names[split], found[split])
    except (ValueError, TypeError) as error:
        if not split:
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"split {split!r}: {error}") from error
    return type(data)(done) if isinstance(data, dict) else done[""]


def _tokenized(part: Any, encode: Callable, record: Any, names: dict[str, dict[str, int]], found: tuple) -> Any:
    """One split.  names: {label column: {name: number}}; found: what `_columns` gives."""
    import datasets

    text, text_pair, sources, columns = found

    def work(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        first = checked_column(batch[text], indices, text)
        second = checked_column(batch[text_pair], indices, text_pair) if text_pair else None
        encoded, inputs = encode(first, second, indices=indices, beside=batch)
        labels = {}
        for task, column in sources.items():
            labels[task] = [
                _label(value, first[i], encoded, i, f"row {indices[i]}, column {column!r}", record, names[column])
                for i, value in enumerate(batch[column])
            ]
        if labels:  # one task: a plain column
            mixed = [dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)]
            inputs = {**inputs, "labels": labels.get(None, mixed)}
        return {**encoded, **inputs}

    part, features = part if is_stream(part) else part.with_format(None), None
    if any(names.values()) and (first := next(iter(part), None)):  # labels with the names of their classes
        features = datasets.Dataset.from_dict(work({name: [value] for name, value in first.items()}, [0])).features
        for task, column in sources.items():
            where, key = (features, "labels") if task is None else (features["labels"], task)
            if names[column]:
                kind, several = datasets.ClassLabel(names=list(names[column])), isinstance(where[key], datasets.List)
                size = len(names[column]) if record and record.multi_hot else -1
                where[key] = datasets.List(kind, length=size) if several else kind
    return _mapped(part, work, columns, features)


def _made(
    part: Any, tokenizer: Any, record: Any, named: dict[str, Any], max_length: Any, truncation: bool, further: dict
) -> Any:
    """One split for a task whose record makes the rows itself, of the first of its forms that is there."""
    columns, text = _names(part), named["text"]
    other = {form: named[key] for key, form in record.reads.items() if named[key]}  # {column of a form: of the data}
    fitting = [form for form in record.forms if {*other} <= {*form}]
    forms = [form for form in fitting if {other.get(name, name) for name in form} <= {*columns}]
    hint = "; name a column of texts: text=" if "text" in record.reads else ""
    hint += ", and of targets: label=" * ("label" in record.reads)
    wanted = " or ".join(" and ".join(other.get(name, name) for name in form) for form in fitting or record.forms)
    refuse(
        (not callable(tokenizer), f"tokenizer is {short(tokenizer)}; pass one, e.g. ftlib.load_tokenizer('smollm2')"),
        (text and not record.reads, f"text={text!r}: name the columns {' and '.join(record.forms[0])} instead"),
        (not forms, f"the dataset has {', '.join(columns)}; it needs {wanted}{hint}"),
        *_unfit(part),
    )
    if max_length is not None:
        whole("max_length", max_length, 2)
    read = {name: own for name in (*forms[0], "tools") if (own := other.get(name, name)) in columns}
    cut, streams = [], is_stream(part)

    def work(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        wheres = [f"row {i}" for i in indices]
        own = {name: batch[column] for name, column in read.items()}
        made = record.rows(tokenizer, own, wheres, max_length, truncation, **further)
        before = len(cut)
        cut.extend(i for i, long in zip(indices, made.pop("cut", ()), strict=False) if long)
        if streams and cut and not before:
            warnings.warn(f"row {cut[0]}: cut to max_length={max_length} tokens, and maybe later ones", stacklevel=2)
        return made

    done = _mapped(part if streams else part.with_format(None), work, columns)
    if cut and not streams:
        count = f"{len(cut)} of {len(part)} rows (row {cut[0]} is the first)"
        warnings.warn(f"{count} were longer and are cut to max_length={max_length} tokens", stacklevel=3)
    return done


def _mapped(part: Any, work: Callable, columns: list[str], features: Any = None) -> Any:
    """`part.map` by batches, quietly where it is quick, without a file beside the data."""
    import datasets

    how = dict(batched=True, with_indices=True, remove_columns=columns, **({"features": features} if features else {}))
    if is_stream(part):
        return part.map(work, **how)
    with ExitStack() as after:
        if datasets.is_caching_enabled():  # its file would lie beside the data; else it is a temporary one
            datasets.disable_caching()
            after.callback(datasets.enable_caching)
        if len(part) <= 20_000 and not datasets.are_progress_bars_disabled():  # a second of work needs no bar
            datasets.disable_progress_bars()
            after.callback(datasets.enable_progress_bars)
        return part.map(work, **how, load_from_cache_file=False)


def _columns(part: Any, text: Any, text_pair: Any, label: Any, record: Any) -> tuple[str, Any, dict, list[str]]:
    """The columns of the texts, {task: column} of the labels, where they are not named looked for; and all columns."""
    columns = _names(part)
    usual = [column for column in ("label", "labels") if column in columns]
    of_words = "text" not in columns or (record and record.a_token) or label not in (None, *usual)
    text = text or ("tokens" if "tokens" in columns and of_words else "text")
    text_pair = text_pair or ("text_pair" if text == "text" and "text_pair" in columns else None)
    chosen = (usual or [{}])[0] if label is None else label
    sources = {None: chosen} if isinstance(chosen, str) else dict(chosen)
    read = [text, *([text_pair] if text_pair else []), *sources.values(), *(record.columns if record else ())]
    has = f"the dataset has {', '.join(columns)}; name it: text=, label= (a file's first line names its columns)"
    refuse(
        *_unfit(part),
        (label is None and len(usual) > 1, "columns 'label' and 'labels': say which is meant, label="),
        (text not in columns and "input_ids" in columns, "already tokenized: it has 'input_ids'; pass it to fit"),
        *((column not in columns, f"no column {column!r}: {has}") for column in read),
    )
    if lost := sorted(INPUTS.intersection(columns).difference(read)):
        warnings.warn(f"columns left out: {', '.join(lost)}: they go with tokens; add them to the result", stacklevel=3)
    return text, text_pair, sources, columns


def _names(part: Any) -> list[str]:
    """The columns, which a stream may not know."""
    return part.column_names or list(next(iter(part.take(1)), {}))


def _unfit(part: Any) -> list[tuple]:
    return [
        (not is_stream(part) and len(part) == 0, "the dataset has zero examples; nothing to tokenize"),
        (transforms(part), "a transform (with_transform) would not be applied: apply it with map first"),
    ]


def _class_names(parts: dict, found: dict) -> dict[str, dict[str, dict[str, int]]]:
    """{split: {label column: {name: number}}} of a ClassLabel's names, or, for text, of names made here; {} else."""
    names: dict[str, dict[str, dict]] = {split: {} for split in parts}
    texts: dict[str, dict[str, set]] = {}  # {column: {split: the names that occur}}
    for split, (_, _, sources, _) in found.items():
        for column in sources.values():
            feature = (parts[split].features or {}).get(column)
            while hasattr(feature, "feature"):
                feature = feature.feature
            if "string" in str(getattr(feature, "dtype", None)) and not is_stream(parts[split]):
                values = parts[split].select_columns([column]).with_format("arrow")[:][column].combine_chunks()
                while hasattr(values, "flatten"):
                    values = values.flatten()
                texts.setdefault(column, {})[split] = {v for v in values.unique().to_pylist() if v and v.strip()}
            else:
                names[split][column] = {name: number for number, name in enumerate(getattr(feature, "names", ()))}
    for column, held in texts.items():
        known = [own[column] for own in names.values() if column in own]
        if {} in known:
            raise ValueError(f"column {column!r} holds text in {', '.join(held)}, numbers elsewhere; make them alike")
        every = set().union(*held.values())
        whole = all(name.removeprefix("-").isdecimal() for name in every)
        every = sorted(every, key=lambda name, whole=whole: (name != "O", int(name) if whole else 0, name))
        made = known[0] if known else {name: number for number, name in enumerate(every)}
        for split in held:
            names[split][column] = made
        order = ", ".join(f"{number} {name!r}" for name, number in list(made.items())[:20]) + ", ..." * (len(made) > 20)
        warnings.warn(
            f"column {column!r}: labels that are text are numbered {order}; tokenize all splits together, "
            "{split: data}, and give the model these label_names (in dataset.features['labels'])",
            stacklevel=3,
        )
    return names


def encode_texts(
    texts: Iterable[Any], tokenizer: Any, *, max_length: int | None = None, truncation: bool = True,
    indices: Sequence[int] | None = None,
) -> list[Row]:  # fmt: skip
    """Token rows for strings, (text, text_pair) tuples, or lists of words.

    Lists of words also give `word_starts`: the position of each word's first piece, None for a word that was cut off.
    Raises ValueError or TypeError naming the row (its number in `indices`, else its place), as `tokenize` does.
    """
    texts = list(text_iterator(texts))
    indices = range(len(texts)) if indices is None else indices
    first, second = checked_texts(texts, indices)
    if not first:
        return []
    encoded, _ = _encode(first, second, tokenizer, max_length, truncation, indices, mask=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    rows: list[Row] = [{key: encoded[key][i] for key in keys} for i in range(len(first))]
    for i, row in enumerate(rows if not isinstance(first[0], str) else ()):
        starts = {word: place for place, word in reversed([*enumerate(word_ids(encoded, i))])}
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
    if max_length is not None:  # the special tokens, and one more
        whole("max_length", max_length, tokenizer.num_special_tokens_to_add(pair=second is not None) + 1)
    limit = max_length or getattr(tokenizer, "model_max_length", None) or float("inf")
    cut = truncation and limit <= 1_000_000  # more is the library's "no limit known"
    if words:
        first, second = _spaced(first, tokenizer), second and _spaced(second, tokenizer)
    tokenized = partial(
        tokenizer, truncation=cut, max_length=limit if cut else None, padding=False, is_split_into_words=words,
        return_attention_mask=mask, verbose=False,
    )  # fmt: skip
    encode = record.encode if record else encode_plain
    encoded, inputs = encode(tokenized, first, second, beside, [f"row {row}" for row in indices])
    for row, ids in zip(indices, encoded["input_ids"], strict=True):
        if len(ids) > limit:
            raise ValueError(f"row {row}: {len(ids)} tokens, the limit is {limit}; cut it or set truncation=True")
    return encoded, inputs


def _spaced(rows: list[list[str]], tokenizer: Any) -> list[list[str]]:
    """Words with a space before each but the first, where the pieces of a text hold it: byte-level BPE."""
    words = [word for row in rows[:32] for word in row[:8]]
    pairs = list(pairwise([*words, words[0]]))
    right, plain, spaced = (
        tokenizer(form, is_split_into_words=i > 0, add_special_tokens=False, verbose=False)["input_ids"]
        for i, form in enumerate(([" ".join(p) for p in pairs], pairs, [(a, f" {b}") for a, b in pairs]))
    )
    same = [sum(map(list.__eq__, right, own)) for own in (plain, spaced)]
    if not any(same) and any(tokenizer.unk_token_id not in ids for ids in right):
        what = f"words: {short(pairs[0])} have other pieces than the text, unknown to the model"
        raise ValueError(f"{what}; load the tokenizer with add_prefix_space=True, or join the words")
    return rows if same[0] >= same[1] else [[row[0], *(f" {word}" for word in row[1:])] for row in rows]


def _label(value: Any, text: Any, encoded: Any, i: int, where: str, record: Any, names: dict[str, int]) -> Any:
    """A label, ready for a row: names as numbers, tags on the first pieces of their words, anything else as it is."""
    listed = isinstance(value, (list, tuple))
    items = [names.get(item, item) if isinstance(item, str) else item for item in (value if listed else [value])]
    items = [int(item) if isinstance(item, bool) else item for item in items]
    for item in items:
        if not isinstance(item, (int, float) if listed else (int, float, dict)):
            said = f"{short(item)} among the labels" if listed else f"the label is {short(item)}"
            remedy = "drop the row or label it, with a number" + " or a name of a class that is known" * (item != "")
            raise (ValueError if not listed and item in (None, "") else TypeError)(f"{where}: {said}; {remedy}")
    if names and listed and (record.multi_hot if record else isinstance(text, str)):
        if record is None:
            hot = next(kind for kind, task in TASKS.items() if task.multi_hot)
            raise ValueError(f"{where}: a list of classes for one text; say that it has several: task={hot!r}")
        return [int(number in items) for number in range(len(names))]
    tags = listed and not isinstance(text, str) and not any(isinstance(item, float) for item in items)
    arrange = record.align if record else align if tags else keep_label
    return arrange(items if listed else items[0], text, encoded, i, where)
