"""Character spans to BIO tags of words and back; seqeval reads the same entities out of any tags."""

import re
import warnings
from itertools import pairwise, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from ftlib.tasks.tagging import bio_errors, may_follow, spans_to_tags, tag_groups, tags_to_spans

TEXT = "Ann's café (New York), 2 days"


def span(start, end, label="x"):
    return {"start": start, "end": end, "label": label}


def test_words_end_at_white_space_punctuation_and_spans():
    words, starts, tags = spans_to_tags(TEXT, [span(12, 20, "place"), span(0, 3, "person"), span(23, 25, "n")][:2])
    assert words == ["Ann", "'", "s", "café", "(", "New", "York", ")", ",", "2", "days"]
    assert [TEXT[a : a + len(word)] for a, word in zip(starts, words, strict=True)] == words
    assert tags == ["B-person", "O", "O", "O", "O", "B-place", "I-place", "O", "O", "O", "O"]
    words, _, tags = spans_to_tags("non-toxic", [span(4, 6), span(6, 9)])
    assert (words, tags) == (["non", "-", "to", "xic"], ["O", "O", "B-x", "B-x"])
    assert spans_to_tags("  ", []) == spans_to_tags("", []) == ([], [], [])


def test_words_are_those_of_berts_own_splitting():
    """Chinese signs aside, which BERT takes one by one."""
    from tokenizers.pre_tokenizers import BertPreTokenizer

    for text in (TEXT, "a_b $5 x=1 «ja» … naïve e\u0301te\u0301 हिन्दी 👍🏽hi 🎉 don’t -- C++"):
        expected = [(word, start) for word, (start, _) in BertPreTokenizer().pre_tokenize_str(text)]
        words, starts, _ = spans_to_tags(text, [])
        assert list(zip(words, starts, strict=True)) == expected


@pytest.mark.parametrize(
    "spans, said",
    [
        ([span(0, 3), span(2, 5)], r"span .*'start': 2.* overlaps .*'start': 0.*keep one"),
        ([span(2, 5), span(0, 3)], r"span .*'start': 0.* overlaps .*'start': 2"),
        ([span(0, 3), span(0, 3)], "overlaps"),
        ([span(0, 30)], "outside the text, 0 to 29"),
        ([span(-1, 3)], "outside the text"),
        ([span(3, 3)], "empty"),
        ([span(5, 3)], "empty"),
        ([span(12, 16)], r"'New ' begins or ends with white space; move its borders"),
        ([span(15, 16)], r"' ' begins or ends with white space"),
        ([span(0, 3, "")], r"need \{'start': 0"),
        ([span(0, 3, 5)], r"need \{'start': 0"),
        ([span(0.0, 3)], r"need \{'start': 0"),
        ([span(True, 3)], r"need \{'start': 0"),
        ([(0, 3, "x")], r"span \(0, 3, 'x'\): need"),
        ([{"start": 0, "end": 3}], "need"),
    ],
)
def test_wrong_spans_are_refused_by_name(spans, said):
    with pytest.raises(ValueError, match=said):
        spans_to_tags(TEXT, spans)


@st.composite
def texts_with_spans(draw):
    """A text, and spans that do not overlap and neither begin nor end with white space."""
    text = draw(st.text(st.one_of(st.sampled_from("ab .,-é\n"), st.characters(exclude_categories=["Cs"])), max_size=30))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
    spans = []
    for start, end in pairwise(cuts):
        held = text[start:end]
        start, end = start + len(held) - len(held.lstrip()), end - len(held) + len(held.rstrip())
        if start < end and draw(st.booleans()):
            spans.append(span(start, end, draw(st.sampled_from(["x", "I-y", "z z"]))))
    return text, spans


@given(texts_with_spans(), st.randoms())
@example(("abab", [span(0, 2), span(2, 4)]), None)
def test_spans_to_tags_to_spans_is_the_identity(drawn, random):
    text, spans = drawn
    mixed = list(spans)
    if random:
        random.shuffle(mixed)
    words, starts, tags = spans_to_tags(text, mixed)
    assert tags_to_spans(words, starts, tags, strict=True) == spans
    assert bio_errors(tags) == []
    assert all(word and not re.search(r"\s", word) for word in words)
    assert "".join(words) == "".join(text.split())  # nothing but white space is lost
    assert len(tag_groups(tags)) == len(spans)


TAGS = ["O", "B-x", "I-x", "E-x", "S-x", "B-y", "I-y"]


def test_every_row_of_tags_up_to_four_is_read_as_seqeval_does():
    """BIO with its errors, IOB1 and BIOES."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in range(5):
            for tags in product(TAGS, repeat=length):
                expected = [(label, first, last + 1) for label, first, last in get_entities(list(tags))]
                assert sorted(map(tuple, tag_groups(tags))) == sorted(expected), tags


def test_iob1_and_bioes():
    words, starts = ["a", "b", "c", "d"], [0, 2, 4, 6]
    assert tags_to_spans(words, starts, ["I-x", "I-x", "B-x", "O"]) == [span(0, 3), span(4, 5)]
    assert tags_to_spans(words, starts, ["B-x", "E-x", "S-x", "O"], strict=True) == [span(0, 3), span(4, 5)]


def test_errors_are_counted_begin_an_entity_or_are_refused():
    words, starts, tags = ["a", "b", "c", "d"], [0, 2, 4, 6], ["O", "I-x", "B-y", "I-x"]
    assert bio_errors(tags) == [1, 3]
    assert tags_to_spans(words, starts, tags) == [span(2, 3), span(4, 5, "y"), span(6, 7)]
    with pytest.raises(ValueError, match=r"tags \[1, 3\] of .* break BIO; mend them, or strict=False"):
        tags_to_spans(words, starts, tags, strict=True)
    assert bio_errors([]) == bio_errors(["B-x", "I-x", "B-x", "I-x", "O"]) == []
    assert bio_errors(["B-x", "I-x", "O", "S-x"]) == [2]  # BIOES: nothing ended it
    assert bio_errors(["S-x", "B-x"]) == [1] and bio_errors(["E-x"]) == [0]


def test_a_word_that_was_cut_off_is_no_entity():
    assert tags_to_spans(["a", "b"], [0, 2], ["B-x", None]) == [span(0, 1)]


def test_other_tags_and_lengths_are_refused():
    for tag in ("NOUN", "B-", "b-x", "", 3):
        with pytest.raises(ValueError, match=r"tag 1 is .*: expected 'O', or 'B-city', 'I-city'"):
            tags_to_spans(["a", "b"], [0, 2], ["O", tag])
    with pytest.raises(ValueError, match="2 words, 2 starts, 1 tags"):
        tags_to_spans(["a", "b"], [0, 2], ["O"])


def test_seqevals_strict_mode_agrees_about_what_breaks_bio():
    """In strict IOB2 seqeval drops entities that do not begin with B-; without errors it finds the same ones."""
    from seqeval.scheme import IOB2, Entities

    for tags in product(["O", "B-x", "I-x", "I-y"], repeat=4):
        found = [(e.tag, e.start, e.end) for e in Entities([list(tags)], IOB2).entities[0]]
        same = found == [tuple(group) for group in tag_groups(tags)]
        assert same == (bio_errors(tags) == []), tags


def test_what_may_follow_what():
    assert may_follow("B-x", "I-x") and may_follow("I-x", "I-x") and may_follow("I-x", "B-x") and may_follow("I-x", "O")
    assert not any(may_follow(before, "I-x") for before in ("O", "B-y", "I-y", "E-x", "S-x"))
    assert not may_follow("B-x", "O", closed=True) and may_follow("E-x", "O", closed=True)
