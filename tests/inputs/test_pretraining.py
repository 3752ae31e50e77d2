"""Text for pretraining: a stream cut into rows of one length, pairs of sentences, T5's spans."""

import copy
import itertools
from collections import Counter

import datasets
import numpy as np
import pytest
from conftest import tiny_config
from text_to_text import tiny
from transformers import BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import ftlib
from ftlib.core.batches import IGNORE
from ftlib.engine.fit import fit

TEXTS = ["the film is good", "a dull plot and unfun films", " ", "we book a flight from boston to denver", ""]


@pytest.fixture
def ended(tiny_tokenizer):
    """A tokenizer whose texts end with a token."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "[SEP]"
    return tokenizer


class Source:
    """Texts that can be read again, and how many were."""

    def __init__(self, count):
        self.count, self.read = count, 0

    def __iter__(self):
        for i in range(self.count):
            self.read += 1
            yield {"text": TEXTS[i % 5], "number": i}


# -------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_rows_are_the_text_cut_anywhere_as_transformers_examples_group_it(task, ended):
    rows = list(ftlib.PackedText([{"text": t} for t in TEXTS * 40], ended, 16, task=task))
    made = ftlib.tokenize([{"text": t} for t in TEXTS * 40 if t.strip()], ended, task=task)
    flat = list(itertools.chain(*made["input_ids"]))  # run_clm's and run_mlm's group_texts: joined, the rest dropped
    assert [row["input_ids"] for row in rows] == [flat[i : i + 16] for i in range(0, len(flat) - 15, 16)]
    labels = list(itertools.chain(*made["labels"]))
    assert [row["labels"] for row in rows] == [labels[i : i + 16] for i in range(0, len(labels) - 15, 16)]
    assert all(row.keys() - {"input_ids", "labels"} == ({"masking"} if task == "masked-lm" else set()) for row in rows)
    assert flat.count(3) == 3 * 40  # an end a text


def test_texts_come_from_any_iterable_and_are_read_when_they_are_needed(ended):
    source = Source(10_000)
    packed = ftlib.PackedText(source, ended, 16, task="causal-lm")
    assert source.read == 0
    first = list(itertools.islice(packed, 3))
    assert source.read == 64 and first == list(itertools.islice(packed, 3))  # again from the start
    table = datasets.Dataset.from_list([{"text": t} for t in TEXTS * 20])
    streams = table, table.to_iterable_dataset(), list(TEXTS * 20), (t for t in TEXTS * 20)
    every = [list(ftlib.PackedText(texts, ended, 16, task="causal-lm"))[:3] for texts in streams]
    assert all(rows == first for rows in every)


def test_whole_words_of_packed_rows(ended):
    (row, *_) = ftlib.PackedText(TEXTS, ended, 16, task="masked-lm", whole_words=True, mask_probability=0.3)
    assert row["masking"] == [4.0, 31.0, 0.3]
    assert row["begins"] == [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("stop", [0, 1, 5, 40])
@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_a_stream_goes_on_where_its_state_was_taken(task, stop, ended):
    def new():
        return ftlib.PackedText(Source(300), ended, 16, task=task)

    every, packed, again = list(new()), new(), new()
    assert list(itertools.islice(packed, stop)) == every[:stop]
    again.load_state_dict(packed.state_dict())
    assert again.state_dict() == packed.state_dict()
    assert list(again) == every[stop:]
    assert list(again) == every  # and the next time from the start


def test_200_000_tokens_stream_through_fit_a_few_at_a_time(ended, monkeypatch):
    """More than 30,000 texts are there; what is read is what the steps and the buffer need."""
    source, length, steps = Source(60_000), 512, 6
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         max_position_embeddings=length, pad_token_id=0)  # fmt: skip
    packed = ftlib.PackedText(source, ended, length, task="causal-lm")
    assert sum(len(row["input_ids"]) for row in packed) > 200_000
    source.read = 0
    options = dict(max_steps=steps, batch_size=2, shuffle_buffer=5, progress=False)
    run = fit(LlamaForCausalLM(config), packed, config=ftlib.TrainConfig(**options))
    assert run.steps == steps and [r["tokens"] for r in run.history] == [2 * length] * steps
    needed = (steps * 2 + 5) * length  # tokens; a text has at least two fifths of five, that is four tokens on average
    assert needed / 9 < source.read < needed / 3 + 128 < 60_000 / 10


@pytest.mark.parametrize(
    "texts, options, error, said",
    [
        ("one text", {}, TypeError, "texts is 'one text'; pass a list of texts"),
        (["a", 3], {}, TypeError, "text 1, column 'text': expected text, got 3"),
        (["a"], {"length": 1}, ValueError, "length=1: need a whole number of at least 2"),
        (["a"], {"task": "regression"}, ValueError, "task='regression': choose one of causal-lm, masked-lm"),
        (["a"], {"whole_words": True}, ValueError, "whole_words: causal-lm takes no options"),
        (["a"], {"task": "masked-lm", "mask_probability": 2}, ValueError, "mask_probability=2: need a number"),
    ],
)
def test_what_can_not_be_packed(ended, texts, options, error, said):
    with pytest.raises(error, match=said):
        list(ftlib.PackedText(texts, ended, **{"length": 8, "task": "causal-lm"} | options))


def test_a_tokenizer_without_a_mask_token_is_refused_before_a_text_is_read(ended):
    ended.mask_token, source = None, Source(5)
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        ftlib.PackedText(source, ended, 8, task="masked-lm")
    assert source.read == 0


# --------------------------------------------------------------------------------------------------------- pairs

DOCUMENTS = [[f"the film is {word} {number}" for number in ("good", "bad", "great", "dull") * 3] for word in
             ("a", "and", "not", "very", "fun")]  # fmt: skip


def parts(row):
    return [[f"the film is {s}".strip() for s in row[name].split("the film is ")[1:]] for name in ("text", "text_pair")]


def test_pairs_for_next_sentences(tiny_tokenizer):
    options = dict(label="next_sentence_label", max_length=32)
    rows = [row for seed in range(20) for row in ftlib.sentence_pairs(DOCUMENTS, tiny_tokenizer, **options, seed=seed)]
    labels = Counter(row["next_sentence_label"] for row in rows)
    assert labels[1] / len(rows) == pytest.approx(0.5, abs=0.1)
    for row in rows:
        first, second = parts(row)
        document = next(d for d in DOCUMENTS if first[0] in d)
        assert "|".join(first) in "|".join(document)
        other = next(d for d in DOCUMENTS if second[0] in d)
        assert "|".join(second) in "|".join(other)
        assert (other is not document) == row["next_sentence_label"]
        if not row["next_sentence_label"]:
            assert "|".join([*first, *second]) in "|".join(document)
    made = ftlib.tokenize(rows[:50], tiny_tokenizer, task="masked-lm", max_length=40)
    assert {len(ids) for ids in made["input_ids"]} <= set(range(10, 34))
    assert made["next_sentence_label"][:] == [row["next_sentence_label"] for row in rows[:50]]
    (row, *_) = made
    assert row["token_type_ids"] == sorted(row["token_type_ids"]) and row["token_type_ids"][-1] == 1


def test_pairs_for_the_order_of_sentences(tiny_tokenizer):
    options = dict(label="sentence_order_label", max_length=32)
    rows = [row for seed in range(20) for row in ftlib.sentence_pairs(DOCUMENTS, tiny_tokenizer, **options, seed=seed)]
    assert sum(row["sentence_order_label"] for row in rows) / len(rows) == pytest.approx(0.5, abs=0.1)
    for row in rows:
        first, second = parts(row)
        ordered = [*second, *first] if row["sentence_order_label"] else [*first, *second]
        assert any("|".join(ordered) in "|".join(document) for document in DOCUMENTS)
    again = ftlib.sentence_pairs(DOCUMENTS, tiny_tokenizer, **options, seed=3)
    assert again == ftlib.sentence_pairs(DOCUMENTS, tiny_tokenizer, **options, seed=3)
    assert again != ftlib.sentence_pairs(DOCUMENTS, tiny_tokenizer, **options, seed=4)
    single = [["the film"], ["a film"]]
    assert ftlib.sentence_pairs(single, tiny_tokenizer, label="sentence_order_label") == []
    both = ftlib.sentence_pairs(single, tiny_tokenizer, label="next_sentence_label")
    assert [row["next_sentence_label"] for row in both] == [1, 1]


@pytest.mark.parametrize(
    "documents, options, said",
    [
        ([["a"]], {}, "1 documents; another one is needed"),
        ([["a"], "b c"], {}, "document 1: 'b c'; a list of sentences"),
        ([["a"], []], {}, r"document 1: \[\]; a list of sentences, at least one"),
        ([["a"], ["b", " "]], {}, "document 1, sentence 1: ' ' is no text"),
        ([["a"], ["b"]], {"label": "label"}, "label='label': choose one of next_sentence_label, sentence_order_label"),
        ([["a"], ["b"]], {"max_length": 3}, "max_length=3"),
    ],
)
def test_what_makes_no_pairs(tiny_tokenizer, documents, options, said):
    with pytest.raises(ValueError, match=said):
        ftlib.sentence_pairs(documents, tiny_tokenizer, **{"label": "next_sentence_label"} | options)


# --------------------------------------------------------------------------------------------------------- spans


class Marks:
    """A tokenizer as far as `corrupt_spans` asks: <extra_id_0> is 99, the next 98, …; end 1."""

    eos_token_id, unk_token_id = 1, 2

    def convert_tokens_to_ids(self, names):
        numbers = [int(name[10:-1]) for name in names]
        return [99 - n if n < 5 else 2 for n in numbers]


def lengths(row):
    """((kept, left out), ...) of a row made of 100, 101, ...: how many tokens stand before each mark, and behind it."""
    cut = [i for i, t in enumerate(row["labels"]) if t < 100]
    gone = [b - a - 1 for a, b in itertools.pairwise(cut)]
    cut = [-1, *(i for i, t in enumerate(row["input_ids"]) if t < 100)]
    return tuple(zip((b - a - 1 for a, b in itertools.pairwise(cut)), gone, strict=False))


def test_spans_are_put_back_and_are_distributed_as_t5_cuts_them():
    """Every way to cut 4 tokens that are left out into 2 spans, and the 8 between into 2 parts: 3 x 7, as likely."""
    ids, found = list(range(100, 112)), Counter()
    for i in range(6_300):
        row = ftlib.corrupt_spans(ids, Marks(), (0, 0, i), share=1 / 3, mean_length=2.0)
        source, target = row["input_ids"], row["labels"]
        assert source[-1] == target[-1] == 1 and target[0] == 99
        filled, spans = [], dict(zip((99, 98), np.split(target[:-1], [target.index(98)]), strict=True))
        for token in source[:-1]:
            filled += spans[token].tolist()[1:] if token in spans else [token]
        assert filled == ids
        found[lengths(row)] += 1
    assert len(found) == 21 and min(found.values()) > 300 - 5 * 17.3 and max(found.values()) < 300 + 5 * 17.3
    assert all(sum(a for a, _ in cut) == 8 and sum(b for _, b in cut) == 4 for cut in found)


@pytest.mark.parametrize("size, noise, spans", [(2, 1, 1), (10, 2, 1), (40, 6, 2), (50, 8, 3), (70, 10, 3)])
def test_as_many_tokens_are_left_out_as_t5_says(size, noise, spans):
    """round(0.15 size) tokens, at least one and not all, in round(that / 3) spans, to even as T5's code rounds."""
    row = ftlib.corrupt_spans(list(range(100, 100 + size)), Marks(), (0,))
    assert sum(t >= 100 for t in row["labels"]) == noise and sum(1 < t < 100 for t in row["labels"]) == spans
    assert row == ftlib.corrupt_spans(list(range(100, 100 + size)), Marks(), (0,))


def test_spans_train_t5():
    rows = [ftlib.corrupt_spans(list(range(100, 140)), Marks(), (0, 0, i)) for i in range(8)]
    assert fit(tiny("t5"), rows, config=ftlib.TrainConfig(epochs=1, batch_size=4, progress=False)).steps == 2


def test_what_has_no_spans():
    for ids, options, said in (
        ([100], {}, "1 tokens; at least two"),
        (list(range(100, 200)), {"share": 0.5}, "the tokenizer has no <extra_id_5>; load T5's"),
        ([100, 101], {"share": 1.0}, "share=1.0"),
        ([100, 101], {"mean_length": 0.5}, "mean_length=0.5"),
    ):
        with pytest.raises(ValueError, match=said):
            ftlib.corrupt_spans(ids, Marks(), (0,), **options)


def test_masked_rows_of_a_stream_train(tiny_tokenizer):
    packed = ftlib.PackedText(Source(500), tiny_tokenizer, 24, task="masked-lm")
    config = ftlib.TrainConfig(max_steps=4, batch_size=4, progress=False)
    run = fit(BertForMaskedLM(tiny_config()), packed, config=config)
    assert run.steps == 4 and all(IGNORE < record["loss"] < 5 for record in run.history)
