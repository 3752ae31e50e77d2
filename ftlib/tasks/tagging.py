"""Tags: one answer a token.  Labels of words go to the first piece of each word; BIO tags of words stand for spans.

To copy: this file, core/batches.py and tasks/classification.py.
"""

import string
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ..core.batches import IGNORE, refuse, short
from .classification import check_classes


def word_ids(encoded: Any, i: int) -> list[int | None]:
    """The word of the first text that each token of row i is part of; None for special tokens and the second text."""
    both = zip(encoded.word_ids(i), encoded.sequence_ids(i), strict=True)
    return [word if text == 0 else None for word, text in both]


def text_words(encoding: Any, i: int) -> list[tuple[int, int] | None]:
    """(text of a pair, word) of each token of row i, padding left out; None for special tokens."""
    every = zip(encoding.sequence_ids(i), encoding.word_ids(i), encoding["attention_mask"][i], strict=True)
    return [None if word is None else (text, word) for text, word, real in every if real]


def words_of(scores: Sequence, encoding: Any, texts: Sequence) -> list[list[dict]]:
    """Scores of tokens added up to words': [{"text", "start", "end", "score"}, …] for every text, in its characters.

    encoding: what the tokenizer made of the texts, strings or (text, text_pair), whose words come after the others.
    """
    found: list[list[dict]] = []
    for i, (values, text) in enumerate(zip(scores, texts, strict=True)):
        sums: dict = {}
        for word, value in zip(text_words(encoding, i), values, strict=True):
            sums[word] = sums.get(word, 0.0) + float(value)
        found.append([])
        for part, word in [key for key in sums if key]:
            (a, b), own = encoding.word_to_chars(i, word, part), text if isinstance(text, str) else text[part]
            found[i].append({"text": own[a:b], "start": a, "end": b, "score": sums[part, word]})
    return found


def align(value: Any, text: Any, encoded: Any, i: int, where: str) -> list[int]:
    """Tags of words as tags of tokens: each on the first piece of its word, -100 elsewhere."""
    words = "one string" if isinstance(text, str) else f"{len(text)} words"
    if words == "one string" or len(value) != len(text):
        raise ValueError(f"{where}: {len(value)} tags for {words}; mend the row, one tag a word in a list of words")
    places = word_ids(encoded, i)
    pairs = zip([None, *places], places, strict=False)  # (word of the token before, word)
    return [IGNORE if word in (None, before) else value[word] for before, word in pairs]


def check_tags(label: Any, num_labels: int, length: int, where: str) -> list[int]:
    """A class number, or -100, for every token."""
    if not isinstance(label, (list, tuple)) or len(label) != length:
        got = f"{len(label)} labels" if isinstance(label, (list, tuple)) else short(label)
        raise ValueError(f"{where}: {got} for {length} tokens; one label per token, {IGNORE} to ignore")
    return check_classes(list(label), num_labels, where)


def named_tags(decided: np.ndarray, names: dict[int, str]) -> list[str | None]:
    return [names[int(i)] if i != IGNORE else None for i in decided]


def spans_to_tags(text: str, spans: Sequence[Mapping]) -> tuple[list[str], list[int], list[str]]:
    """The words of a text, the character at which each starts, and its BIO tag.

    A word ends at white space and where a span begins or ends; each punctuation sign is a word.
    spans: [{"start", "end", "label"}, ...] in characters, end excluded, in any order.
    Raises ValueError naming a span that is none, lies outside the text, is empty, begins or ends with white space, or
    overlaps another.

    >>> spans_to_tags("Fly to New York.", [{"start": 7, "end": 15, "label": "city"}])
    (['Fly', 'to', 'New', 'York', '.'], [0, 4, 7, 11, 15], ['O', 'O', 'B-city', 'I-city', 'O'])
    """
    owner = [-1] * len(text)  # the number of the span that holds each character
    for number, span in enumerate(spans):
        where, keys = f"span {short(span)}: ", ("start", "end", "label") if isinstance(span, Mapping) else ()
        start, end, label = [span.get(key) for key in keys] or [None] * 3
        if not (type(start) is type(end) is int and isinstance(label, str) and label):
            raise ValueError(f"{where}need {{'start': 0, 'end': 4, 'label': 'city'}}, say, in characters")
        held, other = text[start:end], max(owner[start:end], default=-1)
        refuse(
            (not 0 <= start < end <= len(text), f"empty, or outside the text, 0 to {len(text)}; mend it or drop it"),
            (held != held.strip(), f"{held!r} begins or ends with white space; move its borders to its words"),
            (other >= 0, f"overlaps {short(spans[other])}; keep one of them, a word has one tag"),
            what=where,
        )
        owner[start:end] = [number] * (end - start)
    # punctuation, as BERT's tokenizer splits it off: Unicode's category P, and ASCII's other signs
    signs = [char in string.punctuation or unicodedata.category(char)[0] == "P" for char in text]
    kinds = [None if char.isspace() else i if signs[i] else -1 for i, char in enumerate(text)]
    words, starts, tags = [], [], []
    for (kind, number), run in groupby(range(len(text)), key=lambda i: (kinds[i], owner[i])):
        first, *rest = run
        if kind is not None:
            words.append(text[first : first + 1 + len(rest)])
            starts.append(first)
            begins = "B" if number >= 0 and spans[number]["start"] == first else "I"
            tags.append(f"{begins}-{spans[number]['label']}" if number >= 0 else "O")
    return words, starts, tags


def tags_to_spans(words: Sequence[str], starts: Sequence[int], tags: Sequence, *, strict: bool = False) -> list[dict]:
    """The spans that tags of words stand for, as `spans_to_tags` takes them: [{"start", "end", "label"}, ...].

    A tag that breaks BIO begins an entity, as conlleval and seqeval have it, so that IOB1 is read right as well, and so
    is BIOES; with strict=True it is refused (`bio_errors` counts them).  None, for a word cut off, is no entity.
    Raises ValueError for lists of different length and for a tag of another form.

    >>> tags_to_spans(["Fly", "New", "York"], [0, 4, 8], ["O", "B-city", "I-city"])
    [{'start': 4, 'end': 12, 'label': 'city'}]
    """
    tags = ["O" if tag is None else tag for tag in tags]
    wrong = bio_errors(tags)
    refuse(
        (not len(words) == len(starts) == len(tags), f"{len(words)} words, {len(starts)} starts, {len(tags)} tags"),
        (strict and wrong, f"tags {short(wrong)} of {short(tags)} break BIO; mend them, or strict=False"),
    )
    ends = [start + len(word) for start, word in zip(starts, words, strict=True)]
    return [{"start": starts[a], "end": ends[b - 1], "label": label} for label, a, b in tag_groups(tags)]


def bio_errors(tags: Sequence[str]) -> list[int]:
    """The places of tags that break BIO: an I- that goes on with nothing; in BIOES a B- or I- that nothing ends, too.

    Tags are BIOES where one of them has E- or S-.  Raises ValueError for a tag of another form.

    >>> bio_errors(["O", "I-city", "B-city", "I-day"])
    [1, 3]
    """
    closed, pairs = closes(tags), zip(["O", *tags], [*tags, "O"], strict=True)
    return sorted({min(i, len(tags) - 1) for i, pair in enumerate(pairs) if not may_follow(*pair, closed)})


def is_bio(tag: Any) -> bool:
    return isinstance(tag, str) and (tag == "O" or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2))


def closes(tags: Sequence[str]) -> bool:
    """Whether tags are BIOES, where the last word of an entity says so; ValueError for a tag that is neither's."""
    if wrong := [f"tag {i} is {tag!r}" for i, tag in enumerate(tags) if not is_bio(tag)]:
        raise ValueError(f"{wrong[0]}: expected 'O', or 'B-city', 'I-city' (also 'E-', 'S-') and such")
    return any(tag[:2] in ("E-", "S-") for tag in tags)


def _goes_on(before: str, tag: str) -> bool:
    return tag[:2] in ("I-", "E-") and before[:2] in ("B-", "I-") and tag[2:] == before[2:]


def may_follow(before: str, tag: str, closed: bool = False) -> bool:
    """Whether BIO, or with `closed` BIOES, lets a tag stand after another; "O" is before the first, after the last."""
    return _goes_on(before, tag) or (tag[:2] not in ("I-", "E-") and not (closed and before[:2] in ("B-", "I-")))


def tag_groups(tags: Sequence[str]) -> list[list]:
    """[label, first word, last word + 1] of every entity."""
    found: list[list] = []
    for i, (before, tag) in enumerate(zip(["O", *tags], tags, strict=False)):
        if _goes_on(before, tag):
            found[-1][2] = i + 1
        elif tag != "O":
            found.append([tag[2:], i, i + 1])
    return found
