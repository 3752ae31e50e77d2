"""Rows of the corpora made of documents: abstracts with mentions or titles, articles, sentences that translate others.

Every character of a text with offsets stays as the source has it, white space included. Beside its columns a row has
`document`, what a split holds whole or not at all, and `label`, what copies of it must agree on.
To copy: this file alone; datasets for `features`.
"""

import gzip
import json
import re
import xml.etree.ElementTree as ET
import zipfile
import zlib
from functools import partial
from pathlib import Path
from struct import error as StructError

# What a changed file raises beside ValueError and the like; RuntimeError: a zip file that says it is encrypted.
DAMAGED = (ET.ParseError, EOFError, zlib.error, zipfile.BadZipFile, StructError, RuntimeError)
_BLOCK = 200  # sentences: the file of oanc-pos does not say where an article ends


def read_cdr(path: Path) -> list[dict]:
    """An abstract a row, of a BioC file of the BioCreative V chemical-disease corpus."""
    return [_abstract(document) for document in ET.fromstring(_xml(path)).iter("document")]


def _xml(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        text = stream.read()
    if "<!ENTITY" in text:  # these are what can make a small XML file large; nothing outside the file is ever read
        raise ValueError("the XML defines entities")
    return text


def _abstract(document: ET.Element) -> dict:
    text = " ".join(passage.findtext("text") for passage in document.iter("passage"))
    entities, mentions = [], []
    for node in document.iter("annotation"):
        places = [(int(place.get("offset")), int(place.get("length"))) for place in node.iter("location")]
        mentions.append((places[0][0], sum(places[-1]), node.findtext("text"), _infons(node)))
    mentions.sort(key=lambda mention: (mention[0] - mention[1], text[slice(*mention[:2])] != mention[2]))
    for start, end, said, about in mentions:  # the longest first, and of equal ones those in one piece
        if any(start < other["end"] and other["start"] < end for other in entities):
            continue
        if text[start:end] != said:
            raise ValueError(f"{said!r} is not at character {start}")
        entities.append({"start": start, "end": end, "label": about["type"], "identifier": about["MESH"]})
    entities.sort(key=lambda entity: entity["start"])
    words = [*re.finditer(r"\w+|[^\w\s]", text)]
    tags = ["O"] * len(words)
    for entity in entities:
        inside = [i for i, word in enumerate(words) if word.start() < entity["end"] and entity["start"] < word.end()]
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{entity['label']}"
    pairs = [_infons(node) for node in document.iter("relation")]
    return {
        "text": text, "tokens": [word.group() for word in words], "starts": [word.start() for word in words],
        "tags": tags, "entities": entities, "document": document.findtext("id"), "label": "",
        "relations": [{"chemical": pair["Chemical"], "disease": pair["Disease"]} for pair in pairs],
    }  # fmt: skip


def _infons(node: ET.Element) -> dict[str, str]:
    return {infon.get("key"): infon.text for infon in node.iter("infon")}


def read_oanc(path: Path) -> list[dict]:
    """A sentence a row, of a file of word/tag words; text is empty, which drops the row, where a word has two tags."""
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
        tokens, tags = zip(*(word.rsplit("/", 1) for word in line.split(" ")), strict=True)
        text = "" if any("|" in tag for tag in tags) else " ".join(tokens)
        rows.append({"text": text, "tokens": list(tokens), "tags": list(tags), "document": i // _BLOCK, "label": ""})
    return rows


def read_squad(path: Path) -> list[dict]:
    """A question a row, of a file in the form of SQuAD 2.0; copies must agree on whether there is an answer."""
    rows = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = {key: [one[key] for one in asked["answers"]] for key in ("text", "answer_start")}
                for said, start in zip(*answers.values(), strict=True):
                    if paragraph["context"][start : start + len(said)] != said:
                        raise ValueError(f"{said!r} is not at character {start}")
                row = {"question": asked["question"], "context": paragraph["context"], "answers": answers}
                row |= {"title": article["title"], "id": asked["id"]}
                rows.append(row | {"document": article["title"], "label": bool(answers["text"])})
    return rows


def read_pubmed(path: Path) -> list[dict]:
    """An abstract and its title a row, of a PubMed file, without translated titles, [..]; one title, one document."""
    rows = []
    for entry in _xml(path).split("<PubmedArticle>")[1:]:  # a tree of the whole takes 2 GB, and seven times as long
        article = ET.fromstring(re.search(r"<Article\b.*?</Article>", entry, re.DOTALL)[0])
        title, abstract = (
            " ".join(" ".join("".join(node.itertext()) for node in article.iterfind(part)).split())
            for part in ("ArticleTitle", "Abstract/AbstractText")
        )
        if title and abstract and not re.fullmatch(r"\[.*\]\.?", title):
            rows.append({"abstract": abstract, "title": title, "document": title.casefold(), "label": ""})
    return rows


def read_pairs(language: str, path: Path) -> list[dict]:
    """A sentence and a translation a row, of Tatoeba's lines, plain or in a zip; pairs that share one: a document."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            content = archive.read("fra.txt")
    else:
        content = path.read_bytes()
    rows, above = [], {}

    def top(sentence: tuple[str, str]) -> tuple[str, str]:
        while (upper := above.setdefault(sentence, sentence)) != sentence:
            above[sentence] = above[upper]  # halves the way for the next one
            sentence = upper
        return sentence

    *lines, rest = content.decode("utf-8").split("\n")
    if rest:
        raise ValueError("cut short")
    for line in lines:
        english, other, _ = (" ".join(text.split()) for text in line.split("\t"))
        rows.append({"en": english, language: other, "label": ""})
        above[top(("en", english.casefold()))] = top((language, other.casefold()))
    return [row | {"document": top(("en", row["en"].casefold()))} for row in rows]


def read_wikitext(path: Path) -> list[dict]:
    """An article a row, of a file of WikiText: its paragraphs, a line each, without the headings between them."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        _, *parts = re.split(r" \n = ([^=\n]+) = \n \n", stream.read())
    rows = [{"title": title, "document": title, "label": ""} for title in parts[::2]]
    for row, body in zip(rows, parts[1::2], strict=True):
        row["text"] = "\n".join(re.findall(r"(?m)^ (?!= )(.*\S)", body))
    return rows


READERS = {
    "bc5cdr": read_cdr, "oanc-pos": read_oanc, "squad-v2": read_squad, "pubmed-titles": read_pubmed,
    "tatoeba-en-es": partial(read_pairs, "es"), "tatoeba-en-fr": partial(read_pairs, "fr"),
    "wikitext-2": read_wikitext,
}  # fmt: skip


def features(name: str, rows: list[dict]) -> dict:
    """Columns of such a corpus and their types, for datasets.Features; the parts of speech are those of the rows."""
    from datasets import ClassLabel, List, Value

    text, whole = Value("string"), Value("int32")
    if name in ("pubmed-titles", "tatoeba-en-es", "tatoeba-en-fr", "wikitext-2"):
        return {column: text for column in rows[0] if column not in ("document", "label")}
    if name == "squad-v2":
        answers = {"text": List(text), "answer_start": List(whole)}
        return {"question": text, "context": text, "answers": answers, "title": text, "id": text}
    if name == "oanc-pos":
        tags = ClassLabel(names=sorted({tag for row in rows for tag in row["tags"]}))
        return {"text": text, "tokens": List(text), "tags": List(tags)}
    tags = ClassLabel(names=["O", *(f"{side}-{kind}" for kind in ("Chemical", "Disease") for side in "BI")])
    entity = {"start": whole, "end": whole, "label": text, "identifier": text}
    return {
        "text": text, "tokens": List(text), "starts": List(whole), "tags": List(tags), "entities": List(entity),
        "relations": List({"chemical": text, "disease": text}), "document": text,
    }  # fmt: skip
