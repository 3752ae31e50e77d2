"""Rows of source and target: what is trained, what languages do, and what is refused by row."""

import datasets
import pytest
import torch
from text_to_text import ROWS, TOKENIZER, WORDS, byte_tokenizer, tiny
from transformers import BartConfig, DataCollatorForSeq2Seq, MBart50Tokenizer, MBartTokenizer

import ftlib
from ftlib.inputs.rows import rows_for
from ftlib.tasks import seq2seq
from ftlib.tasks.task import TASKS, kind_of, tasks_of

TASK = "seq2seq-lm"


def made(data, tokenizer=TOKENIZER, **options):
    return ftlib.tokenize(data, tokenizer, task=TASK, **options)


def test_a_row_is_source_and_target_with_an_end():
    [row] = made([{"source": "ab", "target": "c"}])
    assert row == {"input_ids": [2, *TOKENIZER.encode("ab")[1:-1], 1], "attention_mask": [1] * 4,
                   "labels": [2, *TOKENIZER.encode("c")[1:-1], 1]}  # fmt: skip
    assert seq2seq.pair(row) == (row["input_ids"], row["labels"])


def test_a_row_is_shown_as_source_and_target():
    [row] = made([{"source": "ab", "target": "c"}])
    assert ftlib.show_tokens(row, TOKENIZER) == "<s>ab</s> ⟦<s>c</s>⟧"
    alike = {"input_ids": [2, 5, 1], "labels": [2, 6, 1]}  # as long, and another text
    shown = [TOKENIZER.decode(ids) for ids in alike.values()]
    assert ftlib.show_tokens(alike, TOKENIZER) == f"{shown[0]} ⟦{shown[1]}⟧"


def test_an_end_is_put_where_the_tokenizer_puts_none():
    plain = byte_tokenizer()
    plain.backend_tokenizer.post_processor = None
    [row] = made([{"source": "ab", "target": "c"}], plain)
    assert len(row["input_ids"]) == 2 and row["labels"][1:] == [1] and len(row["labels"]) == 2


def test_any_two_columns_and_a_prefix():
    data = [{"abstract": "ab", "title": "c", "source": "x", "target": "y"}]
    [row] = made(data, text="abstract", label="title", prefix="do: ")
    assert TOKENIZER.decode(row["input_ids"], skip_special_tokens=True) == "do: ab"
    assert TOKENIZER.decode(row["labels"], skip_special_tokens=True) == "c"
    [row] = made(data, text="abstract")  # the target is found by its name
    assert TOKENIZER.decode(row["labels"], skip_special_tokens=True) == "y"
    [row] = made([{"source": "x"}])
    assert "labels" not in row


def test_what_sources_are_cut_is_said_and_only_where_it_is_asked_for():
    data = [{"source": "x" * n, "target": "y"} for n in (3, 30, 60, 50)]
    with pytest.raises(ValueError, match=r"row 2, source: 62 tokens, the limit is 40; shorten it, or ask for a cut"):
        made(data)
    with pytest.raises(ValueError, match=r"row 1, source: 32 tokens, the limit is 10"):
        made(data, max_length=10, truncation=False)
    with pytest.warns(UserWarning, match=r"3 of 4 rows \(row 1 is the first\) were longer and are cut to max_length"):
        rows = made(data, max_length=10)
    assert [len(row["input_ids"]) for row in rows] == [5, 10, 10, 10]
    assert all(row["input_ids"][-1] == 1 for row in rows)  # the end token stays
    assert "cut" not in rows.column_names
    stream = datasets.IterableDataset.from_generator(lambda: iter(data))
    with pytest.warns(UserWarning, match="row 1: cut to max_length=10"):
        assert [len(row["input_ids"]) for row in made(stream, max_length=10)] == [5, 10, 10, 10]


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_nothing_is_cut():
    assert len(made(ROWS, max_length=40)) == len(ROWS)


@pytest.mark.parametrize(
    "row, options, said",
    [
        ({"source": "a", "target": "abcde"}, {"max_target_length": 6},
         r"row 1, target: 7 tokens with the end token, the limit is 6; raise max_target_length"),
        ({"source": "a", "target": "b" * 60}, {}, "row 1, target: 62 tokens with the end token, the limit is 40"),
        ({"source": "a", "target": "  "}, {}, "row 1, target: the text is empty; fill it in or drop the row"),
        ({"source": "", "target": "b"}, {}, "row 1, source: the text is empty"),
        ({"source": None, "target": "b"}, {}, "row 1, source: expected text, got None"),
        ({"source": "a", "target": None}, {}, "row 1, target: expected text, got None"),
        ({"source": "a", "target": "b"}, {"max_target_length": 0}, "max_target_length=0: need a whole number"),
        ({"source": "a", "target": "b"}, {"stride": 3}, "stride=3: only for task=question-answering"),
        ({"source": "a", "target": "b"}, {"text_pair": "source"}, "reads no text_pair="),
        ({"source": "a", "target": "b"}, {"label": "title"},
         "the dataset has source, target; it needs source and title; name a column of texts: text=, and of targets"),
        ({"source": "a", "target": "b"}, {"text": "abstract"}, "it needs abstract and target or abstract; name"),
    ],
)  # fmt: skip
def test_what_is_refused_by_row_or_name(row, options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        made([{"source": "a", "target": "b"}, row], **options)


def test_options_of_text_to_text_are_not_for_other_tasks():
    for task in (None, "causal-lm", "sequence-classification"):
        with pytest.raises(ValueError, match="prefix='x': only for task=seq2seq-lm"):
            ftlib.tokenize([{"text": "a"}], TOKENIZER, task=task, prefix="x")
    with pytest.raises(ValueError, match="causal-lm reads no text_pair= and no label="):
        ftlib.tokenize([{"text": "a"}], TOKENIZER, task="causal-lm", label="text")


def test_a_tokenizer_without_an_end_and_a_model_without_padding_are_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token is None; set it"):
        made(ROWS, byte_tokenizer(eos_token=None))
    model = tiny("bart")
    model.config.pad_token_id = model.model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"bart needs a padding id below 264: model\.config\.pad_token_id is None"):
        ftlib.evaluate(model, made(ROWS), tokenizer=byte_tokenizer(pad_token=None))


def mbart(kind, **languages):
    words = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁b", -2.0)]
    codes = [(code, 0.0) for code in ("en_XX", "de_DE", "ro_RO")]
    return kind(vocab=[*words, *codes, ("<mask>", 0.0)], **languages)


@pytest.mark.parametrize("kind, before", [(MBartTokenizer, False), (MBart50Tokenizer, True)])
def test_languages_go_into_source_and_target(kind, before):
    tokenizer = mbart(kind, src_lang="en_XX", tgt_lang="de_DE")
    english, german, end = tokenizer.convert_tokens_to_ids(["en_XX", "de_DE", "</s>"])
    [row] = made([{"source": "a b", "target": "b"}], tokenizer)
    text, wanted = row["input_ids"], row["labels"]
    assert [text[0], text[-1]] == ([english, end] if before else [text[0], english]) and german not in text
    assert [wanted[0], wanted[-1]] == ([german, end] if before else [wanted[0], german]) and english not in wanted
    assert wanted.count(end) == 1
    model = tiny("mbart" if not before else "m2m_100", vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=end)
    found = seq2seq.start_ids(model, tokenizer)
    wanted = {"forced_bos_token_id": german} if before else {"decoder_start_token_id": german}
    assert found.items() >= wanted.items()
    tokenizer.tgt_lang = "ro_RO"  # set later
    assert tokenizer.convert_tokens_to_ids("ro_RO") in made([{"source": "a b", "target": "b"}], tokenizer)[0]["labels"]


@pytest.mark.parametrize("kind", [MBartTokenizer, MBart50Tokenizer])
def test_languages_that_are_unknown_or_not_set_are_refused(kind):
    data = [{"source": "a", "target": "b"}]
    with pytest.raises(ValueError, match=r"tokenizer.tgt_lang=None is no language .*set tokenizer.tgt_lang to one of"):
        made(data, mbart(kind, src_lang="en_XX"))  # Transformers would write the source's
    tokenizer = mbart(kind, src_lang="en_XX", tgt_lang="german")
    with pytest.raises(ValueError, match=r"tokenizer.tgt_lang='german' is no language of the tokenizer"):
        made(data, tokenizer)
    assert "labels" not in made([{"source": "a"}], tokenizer)[0]  # nothing is written
    tokenizer.tgt_lang, tokenizer.src_lang = "de_DE", "english"
    with pytest.raises(ValueError, match=r"tokenizer.src_lang='english' is no language of the tokenizer"):
        made([{"source": "a"}], tokenizer)


def test_labels_are_padded_apart_from_sources():
    rows = list(made(ROWS))
    batch = ftlib.collate(rows, stack={"": TASKS[TASK].stack})
    theirs = DataCollatorForSeq2Seq(TOKENIZER)([dict(row) for row in rows])
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], theirs[name])
    left = ftlib.collate(rows, stack={"": TASKS[TASK].stack}, padding_side="left")
    assert torch.equal(left["labels"], batch["labels"])
    assert TASKS[TASK].items(batch["labels"]) == sum(len(row["labels"]) for row in rows)


@pytest.mark.parametrize(
    "labels, said",
    [
        ([4, 264], r"row 1, column 'labels': label 264 is outside 0\.\.263"),
        ([-100, -100], r"row 1, column 'labels': no token is trained; drop the row"),
        ([], r"row 1, column 'labels': no token is trained"),
        (3, r"row 1, column 'labels': 3; need the target's tokens, a list"),
        ([5] * 41, r"row 1, column 'labels': 41 tokens, the decoder takes 40; tokenize with max_target_length=40"),
        (None, r"row 1: no 'labels'"),
    ],
)
def test_labels_that_do_not_fit_the_model(labels, said):
    rows = [{"input_ids": [5], "labels": [6]}, {"input_ids": [5], "labels": labels}]
    with pytest.raises((ValueError, TypeError), match=said):
        rows_for(rows, tiny("bart"), name="dataset")


def test_a_target_may_be_longer_than_its_source_and_t5_has_no_limit():
    rows_for([{"input_ids": [5], "labels": [6] * 100}], tiny("t5"), name="dataset")
    with pytest.raises(ValueError, match=r"row 0.*50 tokens, the model takes 40"):
        rows_for([{"input_ids": [5] * 50, "labels": [6]}], tiny("bart"), name="dataset")


def test_which_models_are_of_this_kind():
    assert {kind_of(tiny(name)) for name in ("t5", "bart", "marian")} == {TASK}
    assert tasks_of(tiny("marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=50)) == {"": (TASK, 50)}
    whisper = type("WhisperForConditionalGeneration", (), {"main_input_name": "input_features", "config": BartConfig()})
    sees = type("LlavaForConditionalGeneration", (), {"main_input_name": "input_ids", "config": None})
    assert kind_of(whisper()) is kind_of(sees()) is None
    assert tasks_of(tiny("t5")) == {"": (TASK, WORDS)}
