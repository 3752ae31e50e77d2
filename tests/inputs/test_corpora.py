"""Splits, labels and counts of the real corpora, cleaning rules by hand, the hub by a stand-in."""

import functools
import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.inputs import assets, corpora

NAMES = [
    "rotten-tomatoes",
    "imdb",
    "sms-spam",
    "banking77",
    "clinc150",
    "20newsgroups",
    "atis",
    "stsb",
    "mrpc",
    "qnli",
    "qqp",
    "mnli",
    "cola",
    "ctrip-zh",
]
PAIRS = ["stsb", "mrpc", "qnli", "qqp", "mnli"]
DOCUMENTS = ["bc5cdr", "oanc-pos", "squad-v2"]  # more in test_corpora_documents.py
SEQUENCES = ["pubmed-titles", "tatoeba-en-es", "tatoeba-en-fr", "wikitext-2"]  # more in test_corpora_sequences.py

load = functools.cache(corpora.load_corpus)


@functools.cache
def summary(name):
    """Rows dropped by reason, and words of the texts, split at white space: 5, 50, 95 %, longest."""
    splits, dropped = corpora._prepare(name)
    rows = [row for own in splits.values() for row in own]
    texts = ("text", "text_pair", "question", "context", "abstract", "en", "es", "fr")
    parts = list if name == "ctrip-zh" else str.split  # no spaces there: characters
    words = [sum(len(parts(row.get(column, ""))) for column in texts) for row in rows]
    return {"dropped": dropped, "words": [*np.percentile(words, [5, 50, 95], method="nearest"), max(words)]}


@functools.cache
def columns(name):
    """Plain lists by split and column: quicker to walk through than a Dataset."""
    return {split: rows[:] for split, rows in load(name).items()}


def key(text):
    return " ".join(text.lower().split())


# ---- the real corpora ----


def test_names():
    assert corpora.corpus_names() == NAMES + DOCUMENTS + SEQUENCES


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_text_and_repeat_none(name):
    data = columns(name)
    assert list(data) == ["train", "validation", "test"]
    seen: set[str] = set()
    for split in data.values():
        if name in PAIRS:
            rows = [frozenset((key(a), key(b))) for a, b in zip(split["text"], split["text_pair"], strict=True)]
            texts = {text for row in rows for text in row}
        else:
            rows = texts = [key(text) for text in split["text"]]
        if name not in ("qnli", "mnli"):  # there (a, b) and (b, a) differ
            assert len(set(rows)) == len(rows)
        assert not seen & set(texts)
        assert all(texts)
        seen |= set(texts)


@pytest.mark.parametrize("name", NAMES)
def test_columns_and_features(name):
    from datasets import ClassLabel, List, Value

    for split in load(name).values():
        features = split.features
        if name == "atis":
            assert list(features) == ["text", "tokens", "tags", "intent"]
            assert isinstance(features["tags"], List) and isinstance(features["tags"].feature, ClassLabel)
            assert isinstance(features["intent"], ClassLabel)
        else:
            assert list(features) == ["text", *(["text_pair"] if name in PAIRS else []), "label"]
            assert isinstance(features["label"], ClassLabel) != (name == "stsb")
        assert features["text"] == Value("string")
        assert features == load(name)["train"].features
        assert split.cache_files == []  # in memory: nothing is written anywhere


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("rotten-tomatoes", ["neg", "pos"]),
        ("imdb", ["neg", "pos"]),
        ("sms-spam", ["ham", "spam"]),
        ("mrpc", ["not_equivalent", "equivalent"]),
        ("qnli", ["entailment", "not_entailment"]),
        ("qqp", ["not_duplicate", "duplicate"]),
        ("mnli", ["entailment", "neutral", "contradiction"]),
        ("cola", ["unacceptable", "acceptable"]),
        ("ctrip-zh", ["neg", "pos"]),
    ],
)
def test_label_names_are_those_of_the_original(name, names):
    assert load(name)["train"].features["label"].names == names
    for split in columns(name).values():
        assert set(split["label"]) == set(range(len(names)))


def card_table(first_column_title):
    """Rows of the table of data/README.md whose second column has this title, by corpus."""
    lines = (Path(assets.__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| corpus | {first_column_title}"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0].strip("`")] = cells[1:]
    return rows


def number(cell):
    return int(cell.replace(",", ""))


@pytest.mark.parametrize("name", NAMES + DOCUMENTS + SEQUENCES)
def test_card_counts_are_true(name):
    data, found = load(name), summary(name)
    reasons = ["copy in the same split", "copy in another split", "conflicting labels"]
    reasons += ["sentence shared with a held-out pair", "unreadable"]
    *sizes, same, other, conflict, shared, unreadable = map(number, card_table("train")[name])
    assert sizes == [len(data[split]) for split in ("train", "validation", "test")]
    assert [same, other, conflict, shared, unreadable] == [found["dropped"].get(reason, 0) for reason in reasons]


@pytest.mark.parametrize("name", NAMES + DOCUMENTS + SEQUENCES)
def test_card_lengths_are_true(name):
    assert [number(cell) for cell in card_table("labels")[name][1:]] == summary(name)["words"]


@pytest.mark.parametrize("name", NAMES)
def test_card_labels_are_true(name):
    labels = card_table("labels")[name][0]
    found = Counter()
    column = "intent" if name == "atis" else "label"
    for split in columns(name).values():
        if name != "stsb":
            found.update(split[column])
    if name != "stsb":
        found = Counter({load(name)["train"].features[column].names[label]: n for label, n in found.items()})
    if match := re.fullmatch(r"(\d+) labels, ([\d,]+) to ([\d,]+) rows each", labels):
        assert [*map(number, match.groups())] == [len(found), min(found.values()), max(found.values())]
    elif name == "stsb":
        assert labels == "score from 0 to 5"
    else:
        assert {k: number(v) for k, v in re.findall(r"(\w+) ([\d,]+\d)", labels)} == found


def test_every_asset_has_a_card_with_source_license_and_examples():
    text = (Path(assets.__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
    cards = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    for name, entry in assets.manifest().items():
        assert "License:" in cards[name] and "Cite:" in cards[name], name
        assert f"{entry['package']}=={entry['version']}" in text
        if entry["kind"] == "corpus":
            assert "Examples, described:" in cards[name], name


@pytest.mark.parametrize("name", ["rotten-tomatoes", "banking77", "stsb"])
def test_loading_twice_gives_the_same_rows_in_the_same_order(name):
    again = corpora.load_corpus(name)
    for split, rows in load(name).items():
        assert rows[:50] == again[split][:50]


def test_splits_stay_what_they_were():
    # First rows as of the first release: a change here changes every number measured on these corpora.
    data = load("rotten-tomatoes")
    assert data["train"][0]["text"].startswith("once folks started hanging out at the barbershop")
    assert load("banking77")["train"][4]["text"] == "I lost my card. Can you help me?"
    assert load("atis")["train"][0]["text"] == "list all flights on continental leaving denver"


@pytest.mark.parametrize("name", ["rotten-tomatoes", "imdb", "sms-spam", "qnli", "mnli"])
def test_drawn_splits_are_stratified_and_first_rows_are_a_fair_sample(name):
    train, validation, test = (split["label"] for split in columns(name).values())
    whole = Counter(train)
    for labels in (validation, test, train[:500]):
        for label, count in Counter(labels).items():
            assert abs(count / len(labels) - whole[label] / len(train)) < 0.07


def test_atis_tags_fit_the_tokens_and_follow_bio():
    data = load("atis")
    names = data["train"].features["tags"].feature.names
    assert names[0] == "O" and len(names) == len(set(names)) == 127
    for split in columns("atis").values():
        for text, tokens, ids in zip(split["text"], split["tokens"], split["tags"], strict=True):
            tags = [names[tag] for tag in ids]
            assert len(tags) == len(tokens) and text == " ".join(tokens)
            for before, tag in zip(["O", *tags], tags, strict=False):
                assert not tag.startswith("I-") or before[1:] == tag[1:], text


def test_atis_labels_that_only_test_has_are_the_documented_ones():
    data, features = columns("atis"), load("atis")["train"].features
    intents, tags = features["intent"], features["tags"].feature
    known = set(data["train"]["intent"])
    unseen = Counter(intents.int2str(label) for label in data["test"]["intent"] if label not in known)
    assert unseen == {"day_name": 2, "airline+flight": 1} and len(intents.names) == 24
    assert set(data["validation"]["intent"]) <= known
    known = {tag for row in data["train"]["tags"] for tag in row}
    unseen = Counter(tags.int2str(tag) for row in data["test"]["tags"] for tag in row if tag not in known)
    documented = "B-booking_class B-compartment B-flight I-flight_number I-state_name B-stoploc.airport_code"
    assert unseen == dict.fromkeys(documented.split(), 1)
    assert {tag for row in data["validation"]["tags"] for tag in row} <= known


def test_stsb_scores_and_quotation_marks():
    data = columns("stsb")
    for split in data.values():
        assert min(split["label"]) == 0 and max(split["label"]) == 5
    assert any(text.count('"') == 1 for text in data["train"]["text"])  # not eaten by a CSV reader


def test_sms_encoding_is_repaired():
    text = " ".join(text for split in columns("sms-spam").values() for text in split["text"])
    assert text.count("£") > 250 and "å£" not in text and "ü" in text and "’" in text and "‰Û" not in text


def test_banking_records_of_several_lines_are_whole():
    texts = [text for split in columns("banking77").values() for text in split["text"]]
    assert not any("\t" in text or "\n" in text or text.startswith('"') for text in texts)


def test_hotel_reviews_are_as_their_card_says():
    import pyarrow

    raw = (assets.path("ctrip-zh") / "携程酒店评论.ft").read_bytes()
    whole = pyarrow.ipc.open_file(raw).read_all().to_pylist()
    texts = [row for split in columns("ctrip-zh").values() for row in zip(split["text"], split["label"], strict=True)]
    assert sorted(texts) == sorted((" ".join(row["review"].split()), row["label"]) for row in whole)
    for words, count in (("补充点评", 470), ("宾馆反馈", 412), ("免费注册", 49)):
        assert sum(words in text for text, _ in texts) == count
    assert all(text == text.encode("gb2312").decode("gb2312") for text, _ in texts)  # no Traditional ones
    rated = {word: np.mean([label for text, label in texts if word in text]) for word in ("不错", "太差")}
    assert rated["不错"] > 0.8 and rated["太差"] < 0.4  # not bad, too bad: the labels are the right way round


def test_the_table_of_characters_is_as_its_card_says():
    text = (assets.path("opencc") / "STCharacters.txt").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines() if line and line[0] != "#"]
    several = sum(" " in traditional for _, traditional in lines)
    other = sum(simple != traditional.split(" ")[0] for simple, traditional in lines)
    assert (len(lines), several, other) == (4012, 276, 3881)
    assert dict(lines)["发"] == "發 髮" and dict(lines)["国"] == "國"


def test_posts_begin_with_the_name_of_their_group():
    data = load("20newsgroups")
    names, firsts = data["train"].features["label"].names, []
    for split in columns("20newsgroups").values():
        pairs = zip(split["text"], split["label"], strict=True)
        firsts += [text.startswith((f"Newsgroup:{names[i]}", f"Newsgroup: {names[i]}")) for text, i in pairs]
    assert len(names) == 20 and firsts.count(False) == 1  # that one has lost its line


@pytest.mark.parametrize(("name", "more"), [("mrpc", "equivalent"), ("qqp", "duplicate"), ("qnli", "entailment")])
def test_positive_pairs_share_more_words(name, more):
    """A coarse check that the labels are the right way round."""
    data, overlap = load(name)["train"], {}
    for row in data:
        first, second = ({*re.findall(r"\w+", row[c].lower())} for c in ("text", "text_pair"))
        overlap.setdefault(row["label"], []).append(len(first & second) / max(1, min(len(first), len(second))))
    means = {data.features["label"].int2str(label): sum(v) / len(v) for label, v in overlap.items()}
    assert max(means, key=means.get) == more and max(means.values()) - min(means.values()) > 0.08


# ---- cleaning rules, on rows written by hand ----


def row(text, label="a", **more):
    return {"text": text, "label": label} | more


def test_duplicates_keep_the_test_copy_and_conflicts_keep_none():
    splits = {
        "train": [row("One"), row("one "), row("two"), row("three"), row("four", "a")],
        "validation": [row("two"), row("five")],
        "test": [row("TWO"), row("four", "b")],
    }
    dropped = Counter()
    kept = corpora._drop_duplicates(splits, False, dropped)
    assert {split: [r["text"] for r in rows] for split, rows in kept.items()} == {
        "train": ["One", "three"], "validation": ["five"], "test": ["TWO"],
    }  # fmt: skip
    assert dropped == {"copy in the same split": 1, "copy in another split": 2, "conflicting labels": 2}


def test_mirrored_pairs_are_copies_only_where_order_means_nothing():
    splits = {"train": [row("a", text_pair="b"), row("b", text_pair="a")], "validation": [], "test": []}
    assert len(corpora._drop_duplicates(splits, True, Counter())["train"]) == 1
    assert len(corpora._drop_duplicates(splits, False, Counter())["train"]) == 2


def test_pairs_that_share_a_sentence_leave_the_lower_split():
    splits = {
        "train": [row("a", text_pair="b"), row("c", text_pair="d"), row("e", text_pair="f")],
        "validation": [row("c", text_pair="g"), row("h", text_pair="Z ")],
        "test": [row("z", text_pair="b")],
    }
    dropped = Counter()
    kept = corpora._drop_shared_sentences(splits, dropped)
    assert [r["text"] for r in kept["train"]] == ["e"]
    assert [r["text"] for r in kept["validation"]] == ["c"] and len(kept["test"]) == 1
    assert dropped["sentence shared with a held-out pair"] == 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.data())
def test_hold_out_has_the_size_asked_for_and_empties_no_label(counts, data):
    rows = [row(f"{label} {i}", label) for label, count in enumerate(counts) for i in range(count)]
    size = data.draw(st.integers(0, len(rows) - len(counts)))
    splits = corpora._hold_out({"train": rows, "validation": [], "test": []}, {"test": size})
    assert len(splits["test"]) == size and len(splits["train"]) == len(rows) - size
    assert {r["text"] for r in splits["train"] + splits["test"]} == {r["text"] for r in rows}
    assert {r["label"] for r in splits["train"]} == set(range(len(counts)))


def test_hold_out_where_rare_labels_leave_the_seats_to_one():
    rows = [row("a", 0), row("b", 1), *(row(f"c{i}", 2) for i in range(5))]
    splits = corpora._hold_out({"train": rows, "validation": [], "test": []}, {"test": 4})
    assert [r["label"] for r in splits["test"]] == [2] * 4 and len(splits["train"]) == 3


def test_hold_out_by_hand_is_proportional():
    rows = [row(str(i), "a" if i < 60 else "b") for i in range(80)]
    held = corpora._hold_out({"train": rows, "test": []}, {"test": 20})["test"]
    assert Counter(r["label"] for r in held) == {"a": 15, "b": 5}


def test_too_large_a_hold_out_is_refused():
    with pytest.raises(ValueError, match="cannot hold out 3 of 3 rows"):
        corpora._hold_out({"train": [row("a"), row("b"), row("c")], "test": []}, {"test": 3})


def test_a_bar_inside_a_sentence_makes_the_row_unreadable(tmp_path):
    import pyarrow

    table = 'prompt,prompt_len,target\n"a | b",1,0\n"a | b | c",1,1\n"d|e | f",1,1\n'
    with pyarrow.output_stream(str(tmp_path / "x.zst"), compression="zstd") as stream:
        stream.write(table.encode())
    rows = corpora._read_glue("qqp", ["not_duplicate", "duplicate"], tmp_path / "x.zst")
    assert [(r["text"], r["text_pair"]) for r in rows] == [("a", "b"), ("", ""), ("d|e", "f")]


# ---- names, folders and the hub ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotten_tomatoes", "did you mean rotten-tomatoes"),
        ("imbd", "did you mean imdb"),
        ("minilm", r"is a model; load it with load_model\('minilm'\)"),
        ("opencc", r"is a table; see ftlib.assets.path\('opencc'\)"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(ValueError, match=message):
        corpora.load_corpus(name)


def test_folder_saved_by_datasets_is_loaded_as_it_is(tmp_path):
    data = load("cola")
    data.save_to_disk(str(tmp_path / "saved"))
    again = corpora.load_corpus(tmp_path / "saved")
    assert again["test"][:] == data["test"][:] and again["test"].features == data["test"].features


# ---- own folders and files ----


def lay(folder, **files):
    """Files named like train_csv, a row each with the name as its text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        stem, kind = name.rsplit("_", 1)
        text = {"csv": f"text,label\n{name},1\n", "tsv": f"text\tlabel\n{name}\t1\n"}
        text |= dict.fromkeys(("json", "jsonl"), json.dumps({"text": name, "label": 1}) + "\n")
        (folder / f"{stem}.{kind}").write_text(text[kind])
    return folder


def texts(name):
    return {split: part["text"][:] for split, part in corpora.load_corpus(str(name)).items()}


@pytest.mark.parametrize("name", ["json", "csv", "text", "parquet", "arrow", "imagefolder", "pandas"])
def test_a_folder_called_like_a_reader_is_read_alone(tmp_path, monkeypatch, name):
    """Right: what `datasets` reads when it is given the file."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    lay(tmp_path / name, train_jsonl=1), lay(tmp_path / "old", train_jsonl=1, test_jsonl=1)
    right = datasets.load_dataset("json", data_files=str(tmp_path / name / "train.jsonl"))["train"]
    for way in (name, f"./{name}", tmp_path / name, f"{name}/train.jsonl"):
        found = corpora.load_corpus(str(way))
        assert list(found) == ["train"] and found["train"][:] == right[:]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train_csv", "dev_csv", "test_csv"], {"train": "train", "validation": "dev", "test": "test"}),
        (["training_jsonl", "val_json", "testing_json"], {"train": "training", "validation": "val", "test": "testing"}),
        (["imdb-train_tsv", "imdb-valid_csv"], {"train": "imdb-train", "validation": "imdb-valid"}),
        (["train_csv", "validation_matched_csv", "validation_mismatched_csv"],
         dict.fromkeys(("train", "validation_matched", "validation_mismatched"))),
        (["train_csv", "test_csv", "test_labels_csv"], dict.fromkeys(("train", "test", "test_labels"))),
        (["reviews_csv"], {"train": "reviews"}), (["train_csv", "label_map_json"], {"train": "train"}),
        (["constraint_csv"], {"train": "constraint"}),
        (["Train_csv", "TEST_jsonl"], {"train": "Train", "test": "TEST"}),
    ],
)  # fmt: skip
def test_files_are_splits_by_their_names(tmp_path, files, expected):
    lay(tmp_path / "own", **dict.fromkeys(files))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = texts(tmp_path / "own")
    assert {s: [v[0].rsplit("_", 1)[0]] for s, v in found.items()} == {s: [v or s] for s, v in expected.items()}
    assert all(len(rows) == 1 for rows in found.values())
    assert any("label_map.json is no split and not read" in str(one.message) for one in said) == (
        "label_map_json" in files
    )


def test_parts_of_a_split_are_joined_and_columns_may_differ_between_splits(tmp_path):
    folder = lay(tmp_path / "own")
    for i in (0, 1):
        (folder / f"train-0000{i}-of-00002.csv").write_text(f"text,label\npart {i},{i}\n")
    (folder / "test.csv").write_text("id,text\n7,hidden\n")  # as Kaggle's
    data = corpora.load_corpus(folder)
    assert data["train"]["text"][:] == ["part 0", "part 1"] and data["test"].column_names == ["id", "text"]
    lay(tmp_path / "two", a_csv=1, b_csv=1)
    assert texts(tmp_path / "two") == {"train": ["a_csv", "b_csv"]}


def test_kinds_are_not_mixed(tmp_path):
    lay(tmp_path / "own", train_csv=1, train_jsonl=1)
    with pytest.raises(ValueError, match=r"own holds .*train.csv and train.jsonl are one split in several kinds"):
        corpora.load_corpus(tmp_path / "own")


def test_a_file_that_changed_is_read_again_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    folder = lay(tmp_path / "own", train_csv=1)
    assert texts(folder) == {"train": ["train_csv"]}
    stat = (folder / "train.csv").stat()
    (folder / "train.csv").write_text("text,label\ntrain_CSV,1\n")  # of the same size, and of the same time:
    os.utime(folder / "train.csv", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert texts(folder) == texts(folder / "train.csv") == {"train": ["train_CSV"]}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["train.csv"]


def test_one_dataset_on_disk_is_its_train_split(tmp_path):
    load("cola")["test"].save_to_disk(str(tmp_path / "saved"))
    assert corpora.load_corpus(tmp_path / "saved")["train"][:] == load("cola")["test"][:]


def test_folders_below_are_for_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    lay(tmp_path / "own" / "train", a_csv=1), lay(tmp_path / "own" / "test", a_csv=1)
    assert texts(tmp_path / "own") == {"train": ["a_csv"], "test": ["a_csv"]}


def test_a_name_of_ours_wins_over_a_folder_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay(tmp_path / "cola", train_csv=1)
    with pytest.warns(UserWarning, match="'cola' is a corpus of ftlib; .*'./cola'"):
        assert len(corpora.load_corpus("cola")["train"]) > 1
    assert texts("./cola") == {"train": ["train_csv"]}
    for name in ("./cole", "own.csv", "/nowhere/at/all", "~/no-such-folder/x.jsonl"):
        with pytest.raises(ValueError, match="there is no file or folder"):
            corpora.load_corpus(name)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for datasets.load_dataset: put {split: {column: values}} in hub.data, read hub.calls."""
    import datasets

    class Hub:
        data, features, calls = None, None, []

    def load_dataset(*args, **kwargs):
        hub.calls.append((args, kwargs))
        return datasets.DatasetDict(
            {s: datasets.Dataset.from_dict(c, features=hub.features) for s, c in hub.data.items()}
        )

    hub = Hub()
    hub.calls = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def test_other_hub_ids_are_passed_through(hub):
    hub.data = {"train": {"x": [1]}}
    assert corpora.load_corpus("someone/some-corpus")["train"][0] == {"x": 1}
    assert hub.calls == [(("someone/some-corpus",), {})]
