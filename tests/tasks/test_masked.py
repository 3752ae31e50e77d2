"""Masks: drawn anew by a key, as Transformers' collator draws them; whole words; what is refused."""

import copy
import warnings

import numpy as np
import pytest
from conftest import tiny_config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

import ftlib
from ftlib.tasks import masked

TEXT = "the film is good unfun films and not very great bookings"  # tokens, and words of two and three


def tokenized(tokenizer, texts=(TEXT,), **options):
    return ftlib.tokenize([{"text": text} for text in texts], tokenizer, task="masked-lm", **options)


def counts(ids, labels, original, mask):
    """How often each token was chosen; of the chosen ones: masked, changed, kept."""
    chosen = labels != -100
    assert (labels[chosen] == original[chosen]).all() and (ids[~chosen] == original[~chosen]).all()
    kinds = (ids == mask) & chosen, (ids != mask) & (ids != original) & chosen, (ids == original) & chosen
    return chosen.mean(0), np.array([kind.sum() for kind in kinds]) / chosen.sum()


def test_masks_are_distributed_as_transformers_collator_draws_them(tiny_tokenizer):
    (row,) = tokenized(tiny_tokenizer)
    times, original = 20_000, np.array(row["input_ids"])
    rows = masked.draw([row] * times, [(7, 0, i) for i in range(times)])
    same = original[None].repeat(times, 0)
    ours = counts(*(np.array([r[n] for r in rows]) for n in ("input_ids", "labels")), same, 4)
    twin = DataCollatorForLanguageModeling(tiny_tokenizer, seed=3)([{"input_ids": row["input_ids"]}] * times)
    theirs = counts(twin["input_ids"].numpy(), twin["labels"].numpy(), same, 4)
    inside = np.array(row["labels"]) != -100
    assert (ours[0][~inside] == 0).all() and (theirs[0][~inside] == 0).all()
    # five standard deviations of a share of 0.15 in 20,000 draws; of the three kinds, in about 40,000 chosen tokens
    assert abs(ours[0][inside] - 0.15).max() < 0.0127 and abs(theirs[0][inside] - 0.15).max() < 0.0127
    right = np.array([0.8 + 0.1 / 31, 0.1 * 29 / 31, 0.1 + 0.1 / 31])  # any of 31 tokens, the mask or itself among them
    assert abs(ours[1] - right).max() < 0.01 and abs(theirs[1] - right).max() < 0.01


def test_a_mask_is_a_function_of_its_key(tiny_tokenizer):
    rows = tokenized(tiny_tokenizer, [TEXT, "a dull plot"], mask_probability=0.5)
    keys = [(0, 0, 0), (0, 0, 1)]
    first, again = masked.draw(rows, keys), masked.draw(list(rows)[::-1], keys[::-1])[::-1]
    for a, b in zip(first, again, strict=True):
        assert a.keys() == {"input_ids", "attention_mask", "token_type_ids", "labels"}
        assert a["labels"] == b["labels"] and (a["input_ids"] == b["input_ids"]).all()
    others = [masked.mask(rows[0], key)["labels"] for key in ((1, 0, 0), (0, 1, 0), (0, 0, 2))]
    assert all(other != first[0]["labels"] for other in others)
    assert rows[0]["input_ids"] == tokenized(tiny_tokenizer)[0]["input_ids"]  # the row keeps its text


def test_whole_words_are_masked_together_as_transformers_knows_them(tiny_tokenizer):
    (row,) = tokenized(tiny_tokenizer, whole_words=True)
    assert tiny_tokenizer.convert_ids_to_tokens(row["input_ids"])[5:9] == ["un", "##fun", "film", "##s"]
    assert row["begins"] == [1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1]
    times, words = 4_000, np.cumsum(row["begins"])
    drawn = masked.draw([row] * times, [(0, 1, i) for i in range(times)])
    chosen = np.array([r["labels"] for r in drawn]) != -100
    for word in range(words[1], words[-1]):
        own = chosen[:, words == word]
        assert (own == own[:, :1]).all() and abs(own[:, 0].mean() - 0.15) < 0.029  # five standard deviations
    encoded = tiny_tokenizer(TEXT, return_offsets_mapping=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collate = DataCollatorForLanguageModeling(tiny_tokenizer, whole_word_mask=True, seed=0, mlm_probability=0.3)
    keep = {name: encoded[name] for name in ("input_ids", "offset_mapping")}
    theirs = np.concatenate([(collate([dict(keep)])["labels"] != -100).numpy() for _ in range(200)])
    for word in range(words[1], words[-1]):
        assert (theirs[:, words == word] == theirs[:, words == word][:, :1]).all()
    assert theirs.any(0)[1:-1].all()


def pieces_tokenizer(pre):
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<mask>", "▁un", "fun", "▁film", "s", "▁good", "▁"])}
    core = Tokenizer(models.Unigram([(t, 0.0 if i < 2 else -1.0) for t, i in vocabulary.items()], unk_id=0))
    core.pre_tokenizer = pre
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", mask_token="<mask>", model_max_length=40)


def test_words_of_sentencepiece_and_of_bytes():
    """Split by the tokenizer before it makes pieces, or only by the sign they begin with."""
    split = pieces_tokenizer(pre_tokenizers.Metaspace())
    whole = pieces_tokenizer(None)
    whole.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )  # as Llama's
    for tokenizer in (split, whole):
        (row,) = tokenized(tokenizer, ["unfun films good"], whole_words=True)
        assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["▁un", "fun", "▁film", "s", "▁good"]
        assert row["begins"] == [1, 0, 1, 0, 1]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(["<m>", "u", "n", "Ġ", "a", "b", "un", "Ġa"])},
                                [("u", "n"), ("Ġ", "a")]))  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_ = PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<m>", model_max_length=40)
    (row,) = tokenized(bytes_, ["unab ab"], whole_words=True)
    assert bytes_.convert_ids_to_tokens(row["input_ids"]) == ["un", "a", "b", "Ġa", "b"]
    assert row["begins"] == [1, 0, 0, 1, 0]


def test_special_and_unknown_tokens_are_never_masked(tiny_tokenizer):
    (row,) = tokenized(tiny_tokenizer, ["the zebra is [MASK] good"], mask_probability=1.0)
    assert [label != -100 for label in row["labels"]] == [False, True, False, True, False, True, False]
    drawn = masked.mask(row, (0, 0, 0))
    assert drawn["labels"] == row["labels"]


def test_rows_that_somebody_else_masked_stay():
    row = {"input_ids": [2, 4, 6, 3], "labels": [-100, 5, -100, -100]}
    assert masked.mask(row, (0, 0, 0)) == row


@pytest.mark.parametrize(
    "rows, options, error, said",
    [
        ([{"text": TEXT}, {"text": " "}], {}, ValueError, "row 1, column 'text': the text is empty"),
        ([{"text": TEXT}, {"text": None}], {}, TypeError, "row 1, column 'text': expected text, got None"),
        ([{"text": TEXT}], {"mask_probability": 0.0}, ValueError, "mask_probability=0.0: need a number from 1e"),
        ([{"text": TEXT}], {"mask_probability": 15}, ValueError, "mask_probability=15"),
        ([{"text": TEXT}], {"truncation": False, "max_length": 5}, ValueError, "row 0: 1. tokens, the limit is 5"),
        ([{"text": TEXT}], {"stride": 4}, ValueError, "stride=4: only for task=question-answering"),
        ([{"text": TEXT}], {"label": "text"}, ValueError, "masked-lm reads no text_pair= and no label="),
        ([{"text": "a", "text_pair": "b", "next_sentence_label": 2}], {}, ValueError,
         "row 0, column 'next_sentence_label': 2; 0 if the texts belong together, 1 if not"),
        ([{"sentence": TEXT}], {}, ValueError, "the dataset has sentence; it needs .* or text; name a column of texts"),
    ],
)  # fmt: skip
def test_what_is_refused(tiny_tokenizer, rows, options, error, said):
    with pytest.raises(error, match=said):
        ftlib.tokenize(rows, tiny_tokenizer, task="masked-lm", **options)


def test_a_tokenizer_without_a_mask_token(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.mask_token = None
    with pytest.raises(ValueError, match="the tokenizer has no mask token; load that of an encoder"):
        tokenized(other)
    with pytest.raises(ValueError, match=r"mask_probability=0\.2: only for task=masked-lm"):
        ftlib.tokenize([{"text": "a", "label": 0}], tiny_tokenizer, mask_probability=0.2)


def test_a_row_with_nothing_to_mask_is_refused_at_the_door_by_its_number(tiny_tokenizer):
    rows = tokenized(tiny_tokenizer, [TEXT, "zebra"])
    config = ftlib.TrainConfig(epochs=1, progress=False)
    model = BertForMaskedLM(tiny_config())
    with pytest.raises(ValueError, match="train_dataset row 1, column 'labels': no token can be masked"):
        ftlib.fit(model, rows, config=config)
