"""The corpora whose rows come out of documents: every offset, documents in one split only, the numbers of the cards."""

import functools
import gzip
import json
import re
import shutil
import xml.dom.minidom
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, List, Value

from ftlib.inputs import assets, corpora, documents

NAMES = ["bc5cdr", "oanc-pos", "squad-v2"]
TEXT, WHOLE = Value("string"), Value("int32")


@functools.cache
def load(name):
    return corpora.load_corpus(name)


@functools.cache
def rows(name, split=None):
    """Rows of a split, or of all, as dicts, the tags by name."""
    if split is None:
        return [row for split in load(name) for row in rows(name, split)]
    data = load(name)[split]
    names = data.features["tags"].feature.names if "tags" in data.features else []
    return [row | {"tags": [names[tag] for tag in row.get("tags", [])]} for row in data]


@functools.cache
def prepared(name):
    """Rows as `load_corpus` has them before it makes a Dataset of them: with their document."""
    return corpora._prepare(name)[0]


def card(name):
    """The card's words with one space between them."""
    text = (Path(assets.__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
    (own,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z|^\"\(m\)\")", text, re.MULTILINE | re.DOTALL)
    return text, " ".join(own.split())


def table(name):
    return re.findall(rf"^\| `{name}` \| (.*?) \|", card(name)[0], re.MULTILINE)[1]  # of the second table


# ---- all three ----


def test_columns_and_features():
    tags = ["O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease"]
    wanted = {
        "bc5cdr": {
            "text": TEXT, "tokens": List(TEXT), "starts": List(WHOLE), "tags": List(ClassLabel(names=tags)),
            "entities": List({"start": WHOLE, "end": WHOLE, "label": TEXT, "identifier": TEXT}),
            "relations": List({"chemical": TEXT, "disease": TEXT}), "document": TEXT,
        },
        "oanc-pos": {"text": TEXT, "tokens": List(TEXT), "tags": load("oanc-pos")["train"].features["tags"]},
        "squad-v2": {
            "question": TEXT, "context": TEXT, "answers": {"text": List(TEXT), "answer_start": List(WHOLE)},
            "title": TEXT, "id": TEXT,
        },
    }  # fmt: skip
    for name in NAMES:
        assert list(load(name)) == ["train", "validation", "test"]
        for split in load(name).values():
            assert dict(split.features) == wanted[name] and list(split.features) == list(wanted[name])
            assert split.cache_files == []


@pytest.mark.parametrize(
    ("name", "sizes"), [("bc5cdr", [400, 100, 500]), ("oanc-pos", [80, 10, 10]), ("squad-v2", [20, 5, 10])]
)
def test_a_document_and_a_text_are_in_one_split_only(name, sizes):
    columns = {"bc5cdr": ["text", "document"], "oanc-pos": ["text"], "squad-v2": ["context", "title"]}[name]
    for column in [*columns, "document"]:
        found = [{" ".join(str(row[column]).lower().split()) for row in own} for own in prepared(name).values()]
        assert sum(map(len, found)) == len(set.union(*found)) and all(found), column
    assert [len({row["document"] for row in own}) for own in prepared(name).values()] == sizes


@pytest.mark.parametrize("name", NAMES)
def test_the_order_is_fixed_and_mixes_the_documents(name):
    first = {
        "bc5cdr": "Direct inhibition of cardiac hyperpolarization-activated",
        "oanc-pos": "You can do your washing .",
        "squad-v2": "In South Africa, along with privately governed schools, what schools",
    }[name]
    assert load(name)["train"][0]["question" if name == "squad-v2" else "text"].startswith(first)
    own = prepared(name)["train"]
    assert len({row["document"] for row in own[:100]}) >= min(15, len({row["document"] for row in own}))


def test_documents_held_out_are_whole_and_too_few_are_an_error():
    made = [{"document": i % 7, "row": i} for i in range(21)]
    splits = corpora._hold_out_documents({"train": made, "validation": [], "test": []}, {"validation": 2, "test": 3})
    assert [len(splits[split]) for split in corpora.SPLITS] == [6, 6, 9]
    assert sorted(row["row"] for own in splits.values() for row in own) == [*range(21)]
    drawn = [*np.random.RandomState(0).permutation(7)]
    assert {row["document"] for row in splits["validation"]} == {*drawn[:2]}
    assert {row["document"] for row in splits["test"]} == {*drawn[2:5]}
    with pytest.raises(ValueError, match="cannot hold out 7 of 7 documents"):
        corpora._hold_out_documents({"train": made}, {"validation": 3, "test": 4})


@pytest.mark.parametrize(
    ("name", "what"),
    [(name, what) for name in ("bc5cdr", "squad-v2", "pubmed-titles", "tatoeba-en-es", "tatoeba-en-fr")
     for what in ("cut", "flipped", "text", "entities", "empty")]
    + [("oanc-pos", "text"), ("oanc-pos", "empty")],  # plain lines: half of them are as good
)
def test_files_changed_in_the_cache_are_named_with_the_remedy(name, what, tmp_path, monkeypatch):
    """Ordinary loading compares sizes only, so the contents may be anything."""
    folder = shutil.copytree(assets.path(name), tmp_path / name)
    for file in [path for path in folder.iterdir() if path.name != ".ftlib.json"]:
        content = bytearray(file.read_bytes())
        made = {"cut": content[:5000], "flipped": content[:5000] + bytes(5000) + content[10000:], "text": b"x y z\n"}
        bomb = b'<!DOCTYPE a [<!ENTITY b "cc">]><collection>&b;</collection>'
        new = {"entities": bomb, "empty": b""}.get(what) or bytes(made.get(what, b""))
        file.write_bytes(gzip.compress(new) if file.suffix == ".gz" and what in ("text", "entities", "empty") else new)
    monkeypatch.setattr(assets, "path", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match=f"does not read as '{name}' .*python -m ftlib data fetch {name}") as error:
        corpora.load_corpus(name)
    assert ("entities" in str(error.value)) == (name in ("bc5cdr", "pubmed-titles") and what == "entities")


# ---- bc5cdr ----


@functools.cache
def source():
    """Every abstract of the files, read by another XML parser: number -> (title, abstract, mentions, relations)."""
    found = {}
    for side in ("Train", "Test"):
        with gzip.open(assets.path("bc5cdr") / f"CDR_{side}Set.BioC.xml.gz", "rb") as stream:
            tree = xml.dom.minidom.parse(stream)

        def child(node, name):
            return "".join(text.data for text in node.getElementsByTagName(name)[0].childNodes)

        def infons(node):
            return {i.getAttribute("key"): i.firstChild.data for i in node.getElementsByTagName("infon")}

        for document in tree.getElementsByTagName("document"):
            mentions = []
            for node in document.getElementsByTagName("annotation"):
                places = node.getElementsByTagName("location")
                places = [(int(at.getAttribute("offset")), int(at.getAttribute("length"))) for at in places]
                mentions.append((places, child(node, "text"), infons(node)))
            relations = [infons(node) for node in document.getElementsByTagName("relation")]
            title, abstract = (child(part, "text") for part in document.getElementsByTagName("passage"))
            found[child(document, "id")] = title, abstract, mentions, relations
    return found


def test_bc5cdr_texts_and_relations_are_those_of_the_source():
    assert sorted(row["document"] for row in rows("bc5cdr")) == sorted(source())
    for row in rows("bc5cdr"):
        title, abstract, _, relations = source()[row["document"]]
        assert row["text"] == f"{title} {abstract}"
        assert [(pair["chemical"], pair["disease"]) for pair in row["relations"]] == [
            (about["Chemical"], about["Disease"]) for about in relations if about["relation"] == "CID"
        ]


def test_bc5cdr_mentions_are_marked_where_they_are_said():
    for row in rows("bc5cdr"):
        marked = source()[row["document"]][2]
        said = [(places[0][0], sum(places[0]), text, about) for places, text, about in marked if len(places) == 1]
        end = 0
        for entity in row["entities"]:
            at = entity["start"], entity["end"]
            text, about = next(mark[2:] for mark in said if mark[:2] == at)  # the first of those marked twice
            assert row["text"][slice(*at)] == text
            assert (entity["label"], entity["identifier"]) == (about["type"], about["MESH"])
            assert end <= entity["start"] < entity["end"]  # in order, and none overlaps
            end = entity["end"]


def test_bc5cdr_mentions_that_are_gone_overlap_a_longer_or_equal_one_that_stays():
    gone, pieces, off = 0, 0, []
    for row in rows("bc5cdr"):
        left = [(entity["start"], entity["end"]) for entity in row["entities"]]
        kept = [*left]
        for places, text, _ in source()[row["document"]][2]:
            start, end = places[0][0], sum(places[-1])
            if len(places) == 1 and (start, end) in left:
                left.remove((start, end))
                continue
            gone, pieces = gone + 1, pieces + (len(places) > 1)
            off += [row["document"]] * (len(places) == 1 and row["text"][start:end] != text)
            assert any(a < end and start < b and b - a >= end - start for a, b in kept), text
        assert not left
    own, marked = card("bc5cdr")[1], [places for *_, mentions, _ in source().values() for places, *_ in mentions]
    assert f"{len(marked):,} mentions are marked" in own and f"and {gone} go" in own
    assert f"all {pieces} in several pieces" in own and pieces == sum(len(places) > 1 for places in marked)
    assert f"the one that is two characters off in the source (in {', '.join(off)})" in own


def test_bc5cdr_tokens_cover_the_text_and_tags_are_the_entities():
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="seqeval reads tags").get_entities
    inside_a_word = []
    for row in rows("bc5cdr"):
        ends = [start + len(token) for start, token in zip(row["starts"], row["tokens"], strict=True)]
        assert [row["text"][a:b] for a, b in zip(row["starts"], ends, strict=True)] == row["tokens"]
        gaps = zip([0, *ends], [*row["starts"], len(row["text"])], strict=True)
        assert not "".join(row["text"][a:b] for a, b in gaps).strip()
        found = [(label, row["starts"][first], ends[last]) for label, first, last in get_entities(row["tags"])]
        for (label, start, end), entity in zip(found, row["entities"], strict=True):
            assert (label, start) == (entity["label"], entity["start"])
            if end != entity["end"]:
                assert end == entity["end"] + 1
                inside_a_word.append(row["text"][start:end])
    assert sorted(inside_a_word) == [*["Ca2"] * 4, "gamma-aminobutyric acidA"]
    assert "five mentions in test end inside a word" in card("bc5cdr")[1]


def test_bc5cdr_relations_join_identifiers_of_the_abstract():
    for row in rows("bc5cdr"):
        known = {(entity["label"], one) for entity in row["entities"] for one in entity["identifier"].split("|")}
        pairs = [(pair["chemical"], pair["disease"]) for pair in row["relations"]]
        assert len(set(pairs)) == len(pairs) > 0 and "-1" not in {one for pair in pairs for one in pair}
        for chemical, disease in pairs:
            assert {("Chemical", chemical), ("Disease", disease)} <= known


def test_bc5cdr_card_is_true():
    own = card("bc5cdr")[1]
    counts = [sum(len(row["relations"]) for row in rows("bc5cdr", split)) for split in corpora.SPLITS]
    assert f"{counts[0]:,}, {counts[1]:,} and {counts[2]:,} relations in train, validation and test" in own
    tags = Counter(tag for row in rows("bc5cdr", "train") for tag in row["tags"])
    assert f"{tags['O']:,} of {tags.total():,} tokens of train are `O`" in own
    identifiers = Counter(entity["identifier"] for row in rows("bc5cdr") for entity in row["entities"])
    several = sum(count for identifier, count in identifiers.items() if "|" in identifier)
    assert f"between them ({several} mentions)" in own and f"has none ({identifiers['-1']})" in own
    labels = Counter(entity["label"] for row in rows("bc5cdr") for entity in row["entities"])
    assert table("bc5cdr") == f"mentions: Chemical {labels['Chemical']:,}, Disease {labels['Disease']:,}"


def bioc(text, annotations, **more):
    marks = "".join(
        f"<annotation><infon key='type'>Disease</infon><infon key='MESH'>{i}</infon>"
        + "".join(f"<location offset='{a}' length='{n}'/>" for a, n in places)
        + f"<text>{said}</text></annotation>"
        for i, (places, said) in enumerate(annotations)
    )
    return f"<collection><document><id>1</id><passage><text>{text}</text>{marks}</passage></document></collection>"


def test_bc5cdr_rules_by_hand(tmp_path):
    path, text = tmp_path / "x.gz", "renal  and liver pain, pain_2, pain"
    marks = [([(0, 5), (17, 4)], "renal pain"), ([(11, 10)], "liver pain"), ([(0, 21)], text[:21]), ([(31, 4)], "pain")]
    path.write_bytes(gzip.compress(bioc(text, marks).encode()))
    (row,) = documents.read_cdr(path)
    assert row["text"] == text and row["tokens"] == "renal and liver pain , pain_2 , pain".split()
    assert row["starts"] == [0, 7, 11, 17, 21, 23, 29, 31]
    assert [(e["start"], e["end"], e["identifier"]) for e in row["entities"]] == [(0, 21, "2"), (31, 35, "3")]
    assert row["tags"] == ["B-Disease", *["I-Disease"] * 3, "O", "O", "O", "B-Disease"] and row["relations"] == []
    path.write_bytes(gzip.compress(bioc(text, [([(0, 5)], "heart")]).encode()))
    with pytest.raises(ValueError, match="'heart' is not at character 0"):
        documents.read_cdr(path)


# ---- oanc-pos ----


def test_oanc_sentences_are_lines_of_the_file_and_blocks_are_whole():
    lines = (assets.path("oanc-pos") / "tagged-en-oanc.txt").read_text(encoding="utf-8").split("\n")
    where = defaultdict(set)
    for i, line in enumerate(lines):
        where[line].add(i // 200)
    assert len(lines) == 20_000 and {len(row["tokens"]) == len(row["tags"]) for row in rows("oanc-pos")} == {True}
    for own in prepared("oanc-pos").values():
        for row in own:
            assert row["text"] == " ".join(row["tokens"]) and row["text"].split() == row["tokens"]
            pairs = zip(row["tokens"], row["tags"], strict=True)
            assert row["document"] in where[" ".join(f"{word}/{tag}" for word, tag in pairs)]


def test_oanc_card_is_true():
    own, found = card("oanc-pos")[1], Counter(tag for row in rows("oanc-pos") for tag in row["tags"])
    names = load("oanc-pos")["train"].features["tags"].feature.names
    assert names == sorted(found) and not any("|" in name for name in names)
    assert table("oanc-pos") == f"{len(found)} tags, {min(found.values())} to {max(found.values()):,} words each"
    assert {tag for row in rows("oanc-pos", "train") for tag in row["tags"]} == {*found}
    usual = defaultdict(Counter)
    for row in rows("oanc-pos", "train"):
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            usual[word][tag] += 1
    test = [pair for row in rows("oanc-pos", "test") for pair in zip(row["tokens"], row["tags"], strict=True)]
    right = sum(tag == (max(usual[word], key=usual[word].get) if word in usual else "NNP") for word, tag in test)
    unknown = sum(word not in usual for word, _ in test)
    unknown, right = unknown / len(test) * 100, right / len(test) * 100
    assert f"lacks ({unknown:.1f} %), gets {right:.1f} % of the test words right" in own
    lines = (assets.path("oanc-pos") / "tagged-en-oanc.txt").read_text(encoding="utf-8").split("\n")
    assert f'("." alone {lines.count("./.")} times in the file)' in own


def test_a_word_with_a_slash_keeps_it_and_two_tags_make_a_sentence_unreadable(tmp_path):
    (tmp_path / "x.txt").write_text("1/2/CD ./.\nas/IN is/VBZ|NN", encoding="utf-8")
    first, second = documents.read_oanc(tmp_path / "x.txt")
    assert first["tokens"] == ["1/2", "."] and first["tags"] == ["CD", "."] and second["text"] == ""
    (tmp_path / "x.txt").write_text("as/IN is", encoding="utf-8")
    with pytest.raises(ValueError):
        documents.read_oanc(tmp_path / "x.txt")


# ---- squad-v2 ----


def test_squad_answers_stand_in_the_context():
    for row in rows("squad-v2"):
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        assert [row["context"][a : a + len(text)] for a, text in zip(starts, texts, strict=True)] == texts
        assert all(texts) and row["question"].strip()


def test_squad_rows_are_those_of_the_source():
    articles = json.loads((assets.path("squad-v2") / "squad.json").read_text(encoding="utf-8"))["data"]
    asked = {
        one["id"]: (one["question"], part["context"], [answer["text"] for answer in one["answers"]], article["title"])
        for article in articles for part in article["paragraphs"] for one in part["qas"]
    }  # fmt: skip
    assert len(asked) == 11_873 and len({row["id"] for row in rows("squad-v2")}) == len(rows("squad-v2"))
    for row in rows("squad-v2"):
        assert asked[row["id"]] == (row["question"], row["context"], row["answers"]["text"], row["title"])
    missing = asked.keys() - {row["id"] for row in rows("squad-v2")}
    kept = {(" ".join(row["question"].lower().split()), row["context"]): row for row in rows("squad-v2")}
    gone = defaultdict(list)
    for name in missing:
        gone[" ".join(asked[name][0].lower().split()), asked[name][1]].append(bool(asked[name][2]))
    assert sorted(sorted(had) for had in gone.values() if len(had) == 2) == [[False, True]] * 7
    alike = {key: had[0] for key, had in gone.items() if len(had) == 1}
    assert len(alike) == 7 and all(bool(kept[key]["answers"]["text"]) == had for key, had in alike.items())


def test_squad_card_is_true():
    own, answered = card("squad-v2")[1], Counter(bool(row["answers"]["text"]) for row in rows("squad-v2"))
    assert table("squad-v2") == f"unanswerable {answered[False]:,}, answerable {answered[True]:,}"
    test = [bool(row["answers"]["text"]) for row in rows("squad-v2", "test")]
    assert f"{test.count(False):,} of the {len(test):,} test questions have no answer" in own
    assert f"gets {test.count(False) / len(test) * 100:.1f} % of them right" in own
    contexts = [len({row["context"] for row in rows("squad-v2", split)}) for split in corpora.SPLITS]
    titles = [len({row["title"] for row in rows("squad-v2", split)}) for split in corpora.SPLITS]
    assert "{}, {} and {}, with {}, {} and {} contexts".format(*titles, *contexts) in own
    many = {len(row["answers"]["text"]) for row in rows("squad-v2")} - {0}
    assert f"the answers of {min(many)} to {max(many)} people" in own and sum(contexts) == 1204
