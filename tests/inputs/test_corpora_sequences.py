"""Abstracts with titles, sentences with translations: rows of the source, splits, rules by hand, damage."""

import csv
import functools
import gzip
import io
import re
import zipfile
from collections import Counter
from pathlib import Path
from xml.parsers import expat

import pytest
from datasets import Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftlib.inputs import assets, corpora, documents

PAIRS = {"tatoeba-en-es": "es", "tatoeba-en-fr": "fr"}
COLUMNS = {"pubmed-titles": ["abstract", "title"]} | {name: ["en", other] for name, other in PAIRS.items()}

load = functools.cache(corpora.load_corpus)


@functools.cache
def rows(name, split=None):
    """Tuples of the columns, of a split or of all."""
    splits = load(name).values() if split is None else [load(name)[split]]
    return [row for data in splits for row in zip(*(data[:][column] for column in COLUMNS[name]), strict=True)]


def plain(text):
    return " ".join(text.split())


def card(name):
    text = (Path(assets.__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
    (own,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z|^\"\(m\)\")", text, re.MULTILINE | re.DOTALL)
    labels = re.findall(rf"^\| `{name}` \| (.*?) \|", text, re.MULTILINE)[1]
    return plain(own), labels


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_and_features(name):
    assert list(load(name)) == ["train", "validation", "test"]
    for split in load(name).values():
        assert dict(split.features) == dict.fromkeys(COLUMNS[name], Value("string")) and split.cache_files == []
        assert list(split.features) == COLUMNS[name]


@pytest.mark.parametrize("name", COLUMNS)
def test_no_text_stands_in_two_splits_and_no_row_twice(name):
    for column in range(2):
        own = [{plain(row[column]).casefold() for row in rows(name, split)} for split in corpora.SPLITS]
        assert sum(map(len, own)) == len(set.union(*own)) and all(map(all, own))
    folded = [tuple(map(str.casefold, row)) for row in rows(name)]
    assert len(set(folded)) == len(folded)
    assert all(text == plain(text) for row in rows(name) for text in row)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("pubmed-titles", "Electrophoretic and serologic characterization of extracellular proteinases"),
        ("tatoeba-en-es", "I have heartburn."),
        ("tatoeba-en-fr", "What do you think of his new novel?"),
    ],
)
def test_the_order_is_fixed(name, first):
    assert rows(name, "train")[0][0].startswith(first)


# ---- abstracts ----


@functools.cache
def entries():
    """(title, abstract) of every entry of the file, read by another XML parser; the parts of an abstract joined."""
    found, path, texts = [], [], {}

    def start(tag, _):
        path.append(tag)
        if tag == "PubmedArticle":
            texts.clear()
        elif tag in ("ArticleTitle", "AbstractText"):
            texts.setdefault("/".join(path[-3:]), []).append("")

    def end(tag):
        if tag == "PubmedArticle":
            kinds = ("MedlineCitation/Article/ArticleTitle", "Article/Abstract/AbstractText")
            found.append(tuple(plain(" ".join(texts.get(kind, ()))) for kind in kinds))
        path.pop()

    def data(said):
        if path[-1] in ("ArticleTitle", "AbstractText"):
            texts["/".join(path[-3:])][-1] += said

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, data
    parser.buffer_text = True
    with gzip.open(assets.path("pubmed-titles") / "pubmed20n0014.xml.gz", "rb") as stream:
        parser.ParseFile(stream)
    return found


def test_pubmed_rows_are_the_entries_with_an_abstract_whose_title_is_not_in_brackets():
    kept = [(abstract, title) for title, abstract in entries() if abstract and not re.fullmatch(r"\[.*\]\.?", title)]
    assert sorted(kept) == sorted(rows("pubmed-titles"))


def test_pubmed_card_is_true():
    own, labels = card("pubmed-titles")
    bare = sum(not abstract for _, abstract in entries())
    assert f"{len(entries()):,} entries" in own and f"{bare:,} entries without an abstract" in own
    assert f"of the others {len(entries()) - bare - len(rows('pubmed-titles')):,} whose title is in brackets" in own
    assert sum(title.startswith("[") for _, title in rows("pubmed-titles")) == 7 and "Seven that begin" in own
    twice = Counter(title.casefold() for _, title in rows("pubmed-titles"))
    assert Counter(twice.values())[2] == 3 and max(twice.values()) == 2 and "three titles occur twice" in own
    copied = sum(title.rstrip(".").casefold() in abstract.casefold() for abstract, title in rows("pubmed-titles"))
    assert f"word for word in {copied} of {len(rows('pubmed-titles')):,}" in own
    ends = Counter(title[-1] for _, title in rows("pubmed-titles"))
    assert f"All but {len(rows('pubmed-titles')) - ends['.']} titles end with a full stop, {ends['?']} with a" in own
    assert sum("ABSTRACT TRUNCATED" in abstract for abstract, _ in rows("pubmed-titles")) == 5
    words = sorted(len(title.split()) for _, title in rows("pubmed-titles"))
    assert labels == f"titles of {words[0]} to {words[-1]} words, median {words[len(words) // 2]}"


def article(title, *parts, abstract="Abstract"):
    texts = "".join(f"<AbstractText>{part}</AbstractText>" for part in parts)
    inner = f"<Article PubModel='Print'><ArticleTitle>{title}</ArticleTitle><{abstract}>{texts}</{abstract}></Article>"
    return f"<PubmedArticle><MedlineCitation>{inner}</MedlineCitation></PubmedArticle>"


def test_pubmed_rules_by_hand(tmp_path):
    made = [
        article("A  title.", "One\n two.", "Three &lt; 4."), article("<i>In</i> vivo", "x"), article("Bare."),
        article("[Translated].", "x"), article("[Too]", "x"), article("[3H]X binds.", "y"), article("", "z"),
        article("Elsewhere.", "x", abstract="OtherAbstract"), article("a TITLE.", "Other."),
    ]  # fmt: skip
    (tmp_path / "x.gz").write_bytes(gzip.compress(f"<Set>{''.join(made)}</Set>".encode()))
    found = documents.read_pubmed(tmp_path / "x.gz")
    assert [(row["abstract"], row["title"]) for row in found] == [
        ("One two. Three < 4.", "A title."), ("x", "In vivo"), ("y", "[3H]X binds."), ("Other.", "a TITLE.")
    ]  # fmt: skip
    assert found[0]["document"] == found[3]["document"] != found[1]["document"]
    (tmp_path / "x.gz").write_bytes(gzip.compress(f"<Set>{made[0][:-60]}".encode()))  # cut, then compressed
    with pytest.raises((TypeError, documents.ET.ParseError)):
        documents.read_pubmed(tmp_path / "x.gz")


# ---- articles ----


def test_wikitext_is_the_original_without_its_headings():
    own, labels = card("wikitext-2")
    files = dict(zip(corpora.SPLITS, ("train", "valid", "test"), strict=True))
    kept = words = 0
    for split, file in files.items():
        lines = gzip.decompress((assets.path("wikitext-2") / f"{file}.raw.gz").read_bytes()).decode().split("\n")
        plain_lines = sorted(line.strip() for line in lines if line.strip() and not line.startswith(" = "))
        found = [line for text in load("wikitext-2")[split]["text"] for line in text.split("\n")]
        assert sorted(found) == plain_lines
        titles = load("wikitext-2")[split]["title"]
        assert {f" = {title} = " for title in titles} <= {*lines} and len({*titles}) == len(titles)
        kept, words = kept + len(found), sum(len(line.split()) for line in found)
        assert f"{words:,}" in own
    assert labels == f"{kept:,} paragraphs"


def test_wikitext_rules_by_hand(tmp_path):
    made = " \n = A b = \n \n One , two . \n \n = = Head = = \n \n = 2 = \n Three . \n \n = C = \n \n Four . \n \n"
    (tmp_path / "x.gz").write_bytes(gzip.compress(made.encode()))
    found = documents.read_wikitext(tmp_path / "x.gz")
    assert [(row["title"], row["text"]) for row in found] == [("A b", "One , two .\nThree ."), ("C", "Four .")]
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"no title"))
    assert documents.read_wikitext(tmp_path / "x.gz") == []


# ---- translations ----


@functools.cache
def lines(name):
    """(English, the other, licence) of every line of the source."""
    if name == "tatoeba-en-es":
        text = (assets.path(name) / "spa.tsv").read_text(encoding="utf-8")
    else:
        with zipfile.ZipFile(assets.path(name) / "fra-eng.zip") as archive:
            text = archive.read("fra.txt").decode()
    return [*csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_those_of_the_source_each_once(name):
    source = {(plain(english).casefold(), plain(other).casefold()) for english, other, _ in lines(name)}
    assert source == {tuple(map(str.casefold, row)) for row in rows(name)} and len(source) == len(rows(name))
    assert all("CC-BY 2.0 (France)" in licence for *_, licence in lines(name))


@pytest.mark.parametrize("name", PAIRS)
def test_translation_cards_are_true(name):
    (own, labels), language = card(name), {"es": "Spanish", "fr": "French"}[PAIRS[name]]
    assert f"{len(lines(name)):,} lines" in own
    english, other = (Counter(row[side].casefold() for row in rows(name)) for side in range(2))
    assert labels == f"{len(english):,} English and {len(other):,} {language} sentences"
    several = sum(count for count in english.values() if count > 1)
    assert f"{several:,} of the pairs have an English sentence that has other" in own
    splits = corpora._prepare(name)[0]
    sizes = [len({row["document"] for row in splits[split]}) for split in corpora.SPLITS]
    assert sizes[1:] == [1000, 2000] and f"{sum(sizes):,}" in own


def test_pairs_joined_through_others_are_one_document(tmp_path):
    said = ["a\tx\tL", "b\ty\tL", "A\tz\tL", "c\tZ \tL", "d\ty\tL", "x\tb\tL"]  # English x is not Spanish x
    (tmp_path / "x.tsv").write_text("\n".join(said) + "\n", encoding="utf-8")
    found = documents.read_pairs("es", tmp_path / "x.tsv")
    assert [(row["en"], row["es"]) for row in found[:4]] == [("a", "x"), ("b", "y"), ("A", "z"), ("c", "Z")]
    groups = {}
    for i, row in enumerate(found):
        groups.setdefault(row["document"], []).append(i)
    assert [*groups.values()] == [[0, 2, 3], [1, 4], [5]]
    for text, told in (("a\tx\n", "not enough values"), ("a\tx\tL\nb\ty\tL", "cut short"), ("", "")):
        (tmp_path / "x.tsv").write_text(text, encoding="utf-8")
        if told:
            with pytest.raises(ValueError, match=told):
                documents.read_pairs("es", tmp_path / "x.tsv")
    assert documents.read_pairs("es", tmp_path / "x.tsv") == []


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_to_a_zip_is_read_or_an_error_that_is_named(tmp_path, data):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fra.txt", "Go.\tVa !\tL\nStop.\tArrête.\tL\n" * 9)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.zip").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert documents.read_pairs("fr", tmp_path / "x.zip")
    except (LookupError, ValueError, TypeError, AttributeError, OSError, *documents.DAMAGED):  # as `_read` names them
        pass
