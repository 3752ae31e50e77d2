"""Answers of encoder-decoder models: those of Transformers' `generate` to each source alone; and predict, evaluate."""

import pytest
import sacrebleu
import torch
from text_to_text import KINDS, ROWS, TOKENIZER, talkative
from transformers import GenerationConfig

import ftlib
from ftlib import evaluate, generate, predict
from ftlib.engine.generation import answered

SOURCES = ["a", "a long source, this one", "no", "four words are here", "b?", "x" * 30]


def by_transformers(model, source, tokenizer=TOKENIZER, **options):
    """The new tokens of one source by the model's own `generate`."""
    inputs = tokenizer(source, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, **dict(max_new_tokens=8, do_sample=False) | options)
    return out[0, 1:].tolist()


@pytest.mark.parametrize("name", KINDS)
def test_greedy_answers_are_those_to_each_source_alone(name):
    model = talkative(name)
    wanted = [by_transformers(model, source) for source in SOURCES]
    found = generate(model, SOURCES, tokenizer=TOKENIZER, max_new_tokens=8, batch_size=4, tokens=True)
    assert found == wanted and len({tuple(ids) for ids in wanted}) > 3
    texts = generate(model, SOURCES, tokenizer=TOKENIZER, max_new_tokens=8, batch_size=2)
    assert texts == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in wanted]


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_beams(name):
    model = talkative(name)
    wanted = [by_transformers(model, source, num_beams=3) for source in SOURCES]
    found = generate(model, SOURCES, tokenizer=TOKENIZER, max_new_tokens=8, num_beams=3, tokens=True)
    assert [_cut(ids) for ids in found] == [_cut(ids) for ids in wanted]
    assert found != generate(model, SOURCES, tokenizer=TOKENIZER, max_new_tokens=8, tokens=True)


def _cut(ids):
    return ids[: ids.index(1) + 1] if 1 in ids else ids


def test_samples_hang_on_seed_and_place_alone_and_come_as_often_as_they_should():
    model = talkative("bart")
    options = dict(tokenizer=TOKENIZER, max_new_tokens=4, temperature=0.7)
    one = generate(model, SOURCES, batch_size=1, tokens=True, **options)
    assert one == generate(model, SOURCES, batch_size=6, tokens=True, **options)
    assert one != generate(model, SOURCES, seed=1, tokens=True, **options)
    ids = TOKENIZER("a", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chance = (model(ids, decoder_input_ids=torch.tensor([[2]])).logits[0, -1] / 0.7).softmax(-1)
    first = [ids[0] for ids in generate(model, ["a"] * 400, tokens=True, **options | {"max_new_tokens": 2})]
    for token in chance.topk(2).indices.tolist():
        p = float(chance[token])
        assert abs(first.count(token) / 400 - p) < 4 * (p * (1 - p) / 400) ** 0.5


def test_what_an_answer_starts_with_is_the_models_own():
    model = talkative("bart")
    wanted = by_transformers(model, "ab", forced_bos_token_id=9, bad_words_ids=[[20], [30]])
    model.generation_config.forced_bos_token_id, model.generation_config.bad_words_ids = 9, [[20], [30]]
    model.generation_config.max_length, model.generation_config.num_beams = 3, 4  # of these nothing counts
    assert generate(model, ["ab"], tokenizer=TOKENIZER, max_new_tokens=8, tokens=True) == [wanted] and wanted[0] == 9
    other = talkative("bart", decoder_start_token_id=7)
    found = generate(other, ["ab"], tokenizer=TOKENIZER, max_new_tokens=8, tokens=True)
    assert found == [by_transformers(other, "ab")]
    assert found != generate(talkative("bart"), ["ab"], tokenizer=TOKENIZER, max_new_tokens=8, tokens=True)


def test_a_start_that_nobody_or_two_say_is_refused():
    model = talkative("bart")
    model.generation_config.decoder_start_token_id = 5
    with pytest.raises(ValueError, match=r"decoder_start_token_id is 2 and 5 in model.config and model.gen"):
        generate(model, ["a"], tokenizer=TOKENIZER, max_new_tokens=8)
    model.config.decoder_start_token_id, model.generation_config = None, GenerationConfig()
    with pytest.raises(ValueError, match=r"decoder_start_token_id is None in model.config; set it"):
        generate(model, ["a"], tokenizer=TOKENIZER, max_new_tokens=8)


@pytest.mark.parametrize(
    "prompts, options, said",
    [
        (["a", ""], {"max_new_tokens": 8}, "prompt 1: the text is empty"),
        (["a", [{"role": "user", "content": "b"}]], {"max_new_tokens": 8}, "prompt 1: expected text"),
        (["x" * 50], {"max_new_tokens": 8}, "prompt 0: 52 tokens and 8 more, but the model has 40 positions"),
        (["a"], {"max_new_tokens": 41}, "prompt 0: 3 tokens and 41 more, but the model has 40 positions"),
        ([[4, 264]], {"max_new_tokens": 8}, "prompt 0: id 264 is outside 0..263"),
        ("a", {}, "pass a list of prompts"),
        (["a"], {"num_beams": 2, "temperature": 1.0}, "leave temperature at 0"),
    ],
)
def test_bad_prompts(prompts, options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        generate(talkative("bart"), prompts, tokenizer=TOKENIZER, **options)


def test_stop_cuts_and_both_sides_have_all_positions():
    model = talkative("bart")
    [whole] = generate(model, ["abc"], tokenizer=TOKENIZER, max_new_tokens=40)
    [text] = generate(model, ["abc"], tokenizer=TOKENIZER, max_new_tokens=40, stop=whole[2])
    assert text == whole[: whole.index(whole[2])]
    assert len(generate(model, [[5] * 40], tokenizer=TOKENIZER, max_new_tokens=40, tokens=True)[0]) > 0


def test_predict_names_generate():
    with pytest.raises(ValueError, match=r"a language model goes on: ftlib\.generate"):
        predict(talkative("t5"), ["a"], tokenizer=TOKENIZER)


def test_evaluate_compares_answers_with_targets():
    model, rows = talkative("bart"), ftlib.tokenize(ROWS, TOKENIZER, task="seq2seq-lm")
    found = evaluate(model, rows, tokenizer=TOKENIZER, generate={"max_new_tokens": 6})
    answers = generate(model, [row["source"] for row in ROWS], tokenizer=TOKENIZER, max_new_tokens=6)
    wanted = [row["target"] for row in ROWS]
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, [wanted]).score
    assert {"loss", "perplexity", "bits_per_byte", "bleu", "rouge1", "rouge2", "rougeL"} < set(found)
    assert answered(model, rows, TOKENIZER, {"max_new_tokens": 6}).items() <= found.items()
