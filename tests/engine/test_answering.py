"""Answers to questions: predictions against the rules of Transformers' example, and all that other tasks do."""

import json
import math

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import tiny_config
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.testing import assert_close

import ftlib
from ftlib.__main__ import main
from ftlib.core.batches import collate
from ftlib.core.loop import steps, summed
from ftlib.engine.answering import _best
from ftlib.methods.tuning import STRATEGIES
from ftlib.tasks.metrics import squad
from ftlib.tasks.task import TASKS, kind_of, task_loss

KIND = "question-answering"
WORDS = [f"{sign}{i}" for sign in "kvw" for i in range(12)]
SPECIALS = {
    "bert": ("[PAD] [UNK] [CLS] [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("<pad> <unk> <s> </s>", "<s> $A </s> </s> $B </s>"),
    "metaspace": ("<pad> <unk> <s> </s>", "<s> $A </s> </s> $B </s>"),
    "xlnet": ("<pad> <unk> <cls> <sep>", "$A <sep> $B:1 <sep>:1 <cls>:2"),
    "begins": ("<pad> <unk> <s> </s>", "<s> $A $B"),
    "none": ("<pad> <unk> <s> </s>", "$A $B"),
}


def make(style="bert", limit=64):
    """A tokenizer of one of the ways in which pairs are written: words, bytes, or pieces with their space."""
    pad, unk, cls, sep = SPECIALS[style][0].split()
    if style in ("roberta", "none", "begins"):
        signs = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = [pad, unk, cls, sep, *signs]
        core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=style == "roberta", trim_offsets=True)
        core.decoder = decoders.ByteLevel()
    elif style == "metaspace":
        pieces = [pad, unk, cls, sep, "▁", *(f"▁{word}" for word in WORDS), *"kvw0123456789.,"]
        core = Tokenizer(models.Unigram([(piece, -1.0 - 10 * (len(piece) == 1)) for piece in pieces], unk_id=1))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        pieces = [pad, unk, cls, sep, *WORDS, ".", ","]
        core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=unk))
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, core.token_to_id(token)) for token in (cls, sep)]
    single = SPECIALS[style][1].split(" $B")[0]
    core.post_processor = processors.TemplateProcessing(single=single, pair=SPECIALS[style][1], special_tokens=ids)
    if style in ("roberta", "none", "begins"):
        core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), core.post_processor])
    named = {"bos_token": cls} if style == "begins" else {} if style == "none" else {"cls_token": cls}
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=limit, pad_token=pad, unk_token=unk, sep_token=sep, **named,
        padding_side="left" if style == "xlnet" else "right",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"] if style in ("bert", "xlnet") else inputs,
    )  # fmt: skip


def table(count=12, seed=0, words=30, unanswerable=4):
    """Contexts of words; what a question asks for stands behind its k; every fourth has no answer."""
    draw, found = np.random.default_rng(seed), []
    for i in range(count):
        context = [*draw.choice(WORDS[24:], draw.integers(4, words))]
        key, value, place = draw.integers(12), draw.integers(12), draw.integers(len(context))
        there = not unanswerable or i % unanswerable
        context[place:place] = [f"k{key}", f"v{value}"] if there else []
        marks = ["" if draw.random() < 0.8 else ["., "][0][draw.integers(2)] for _ in context]
        text = " ".join(word + mark for word, mark in zip(context, marks, strict=True))
        start = text.index(f"v{value}") if there else -1
        said = {"text": [f"v{value}"] * bool(there), "answer_start": [start] * bool(there)}
        found.append({"id": str(i), "question": f"k{key} , w1", "context": text, "answers": said})
    return found


TYPES = {
    "bert": {}, "roberta": {"pad_token_id": 0, "max_position_embeddings": 66}, "distilbert": {}, "electra": {},
    "albert": {}, "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "modernbert": {"global_attn_every_n_layers": 1, "embedding_dropout": 0.0, "mlp_dropout": 0.0,
                   "attention_dropout": 0.0,
                   "cls_token_id": 2, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    "mpnet": {"pad_token_id": 0, "max_position_embeddings": 66},
    "xlm-roberta": {"pad_token_id": 0, "max_position_embeddings": 66},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "dropout": 0.0},
    "llama": {"num_key_value_heads": 2}, "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "dropout": 0.0,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "activation_dropout": 0.0,
             "decoder_start_token_id": 2, "bos_token_id": 2, "eos_token_id": 3, "attention_dropout": 0.0},
}  # fmt: skip


def config_of(model_type, sizes):
    if model_type == "xlnet":  # knows no limit of positions
        return transformers.XLNetConfig(vocab_size=80, pad_token_id=0, **TYPES["xlnet"])
    return tiny_config(model_type, **sizes)


def build(model_type="bert", seed=0, **options):
    sizes = {"vocab_size": 80, "max_position_embeddings": 64, "num_labels": 2, **TYPES[model_type], **options}
    if model_type == "distilbert":
        sizes |= {"qa_dropout": 0.0}
    config = config_of(model_type, sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForQuestionAnswering.from_config(config).eval()


def windows(count=8, style="bert", **options):
    own = {"max_length": 30, "stride": 8} | options
    return ftlib.tokenize(table(count), make(style), task=KIND, **own)


def batch_of(rows, **options):
    return collate(list(rows), stack={"": TASKS[KIND].stack}, **options)


def quick(**options):
    usual = dict(batch_size=4, epochs=1, learning_rate=1e-2, warmup_fraction=0.0, shuffle=False, progress=False)
    return ftlib.TrainConfig(**usual | options)


# ------------------------------------------------------------------------------------------------ predictions


def example_answers(examples, features, logits, threshold, n_best, max_answer):
    """Transformers' examples/pytorch/question-answering/utils_qa.py, `postprocess_qa_predictions` with version_2.

    features: (row, offsets of the context's tokens, None elsewhere, place of [CLS]) of each window.  The script takes
    [CLS] to be token 0, and here it is where the tokenizer puts it.  Returns (text, start, score difference) of each.
    """
    found = []
    for number, example in enumerate(examples):
        prelim, minimum = [], None
        for (row, offsets, cls), values in zip(features, logits, strict=True):
            if row != number:
                continue
            start_logits, end_logits = values.T
            null = start_logits[cls] + end_logits[cls]
            minimum = null if minimum is None or minimum > null else minimum
            start_indexes = np.argsort(start_logits)[-1 : -n_best - 1 : -1].tolist()
            end_indexes = np.argsort(end_logits)[-1 : -n_best - 1 : -1].tolist()
            for start_index in start_indexes:
                for end_index in end_indexes:
                    if (
                        start_index >= len(offsets)
                        or end_index >= len(offsets)
                        or offsets[start_index] is None
                        or len(offsets[start_index]) < 2
                        or offsets[end_index] is None
                        or len(offsets[end_index]) < 2
                    ):
                        continue
                    if end_index < start_index or end_index - start_index + 1 > max_answer:
                        continue
                    place = offsets[start_index][0], offsets[end_index][1]
                    prelim.append((start_logits[start_index] + end_logits[end_index], place))
        scores = np.array([score for score, _ in prelim] + [minimum])
        chances = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        best = max(range(len(prelim)), key=lambda i: prelim[i][0])
        begin, stop = prelim[best][1]
        text = example["context"][begin:stop]
        none = minimum - prelim[best][0] > threshold
        found.append(("" if none else text, None if none else begin, chances[best], chances[-1]))
    return found


def featured(rows, tokenizer, max_length, stride):
    encoded = tokenizer(
        [row["question"] for row in rows], [row["context"] for row in rows], truncation="only_second", stride=stride,
        max_length=max_length, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    found = []
    for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
        texts, ids = encoded.sequence_ids(i), encoded["input_ids"][i]
        offsets = [pair if text == 1 else None for pair, text in zip(encoded["offset_mapping"][i], texts, strict=True)]
        said = [pair and rows[row]["context"][slice(*pair)].strip() for pair in offsets]
        offsets = [pair if text else None for pair, text in zip(offsets, said, strict=True)]  # no white space alone
        marks = [token for token in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token in ids]
        found.append((row, offsets, ids.index(marks[0]) if marks else 0))
    return encoded, found


STYLES = [("bert", "bert"), ("roberta", "roberta"), ("xlm-roberta", "metaspace"), ("xlnet", "xlnet"),
          ("llama", "begins"), ("gpt2", "none"), ("distilbert", "bert")]  # fmt: skip


@pytest.mark.parametrize(("model_type", "style"), STYLES)
@pytest.mark.parametrize("threshold", [0.0, None, math.inf])
def test_answers_are_those_of_transformers_example(model_type, style, threshold):
    rows, tokenizer = table(10), make(style)
    vocabulary = {"vocab_size": 300} if style in ("roberta", "begins", "none") else {}
    model = build(model_type, **vocabulary)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that logits differ
    encoded, features = featured(rows, tokenizer, 40, 10)
    logits = []
    for i in range(len(features)):  # each window alone
        names = {"input_ids", "token_type_ids"} & encoded.keys() & {"input_ids", *ftlib.inputs.rows.inputs_of(model)}
        with torch.no_grad():
            out = model(**{name: torch.tensor([encoded[name][i]]) for name in names})
        logits.append(torch.stack([out.start_logits[0], out.end_logits[0]], -1).double().numpy())
    if threshold is None:  # one that half of the questions pass
        every = example_answers(rows, features, logits, math.inf, 100, 8)
        threshold = float(np.median([math.log(none) - math.log(score) for _, _, score, none in every]))
    expected = example_answers(rows, features, logits, threshold, 100, 8)
    found = ftlib.predict(
        model, rows, tokenizer=tokenizer, max_length=40, stride=10, max_answer=8, no_answer=threshold, batch_size=4
    )
    given = 0
    for row, own, (text, begin, score, none) in zip(rows, found, expected, strict=True):
        assert own["answer"] == text.strip()
        assert own["start"] == (None if begin is None else begin + len(text) - len(text.lstrip()))
        assert (own["answer"] == "") == (own["end"] is None)
        assert text == "" or row["context"][own["start"] : own["end"]] == own["answer"]
        assert (own["score"], own["no_answer_score"]) == pytest.approx((score, none), abs=1e-5)
        given += own["answer"] != ""
    assert given == {math.inf: 10, 0.0: given}.get(threshold, 5)


def test_all_probabilities_sum_to_one_by_enumeration():
    rows, tokenizer, model = table(3), make(), build()
    with torch.no_grad():
        model.qa_outputs.weight.mul_(20)
    encoded, features = featured(rows, tokenizer, 30, 8)
    own = encoded["input_ids"], encoded["token_type_ids"]
    windows = [{"input_ids": i, "token_type_ids": t} for i, t in zip(*own, strict=True)]
    logits = ftlib.predict(model, windows, output="logits")
    for number, own in enumerate(ftlib.predict(model, rows, tokenizer=tokenizer, max_length=30, stride=8)):
        every, nothing = [], []
        for (row, offsets, cls), values in zip(features, logits, strict=True):
            places = [i for i, pair in enumerate(offsets) if row == number and pair]
            every += [float(values[s, 0]) + float(values[e, 1]) for s in places for e in places if s <= e < s + 30]
            nothing += [float(values[cls].sum())] * (row == number)
        total = sum(map(math.exp, [*every, min(nothing)]))
        assert own["score"] == pytest.approx(math.exp(max(every)) / total, rel=1e-4)
        assert own["no_answer_score"] == pytest.approx(math.exp(min(nothing)) / total, rel=1e-4)
        assert (own["answer"] == "") == (min(nothing) > max(every))


def test_a_threshold_may_be_chosen_afterwards():
    rows, tokenizer, model = table(12), make(), build()
    with torch.no_grad():
        model.qa_outputs.weight.mul_(20)
    options = dict(tokenizer=tokenizer, max_length=30, stride=8)
    every = ftlib.predict(model, rows, no_answer=math.inf, **options)
    for threshold in (-3.0, 0.0, 3.0):
        some = ftlib.predict(model, rows, no_answer=threshold, **options)
        for one, two in zip(every, some, strict=True):
            none = math.log(one["no_answer_score"]) - math.log(one["score"]) > threshold
            empty = {"answer": "", "start": None, "end": None}
            assert two == (one | empty if none else one)


def test_white_space_alone_is_no_answer():
    context = "w1  w2"
    offsets = np.array([[0, 2], [2, 3], [3, 4], [4, 6]])  # as tokenizers do that keep spaces
    logits = np.array([[0, 0], [9, 9], [8, 8], [1, 1]], dtype=float)
    assert _best(logits, offsets, context, 30)[:3] == (2.0, 4, 6)
    assert _best(logits[1:3], offsets[1:3], context, 30)[0] == -math.inf


def test_a_space_of_a_token_is_no_part_of_its_answer():
    model, tokenizer = build("gpt2", vocab_size=300), make("none")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for own in ftlib.predict(model, table(6), tokenizer=tokenizer, no_answer=math.inf, max_length=50):
        assert own["answer"] == own["answer"].strip() != ""


def test_answers_of_every_form_of_table(tmp_path):
    rows, tokenizer, model = table(5), make(), build()
    expected = ftlib.predict(model, rows, tokenizer=tokenizer)
    plain = [{name: row[name] for name in ("question", "context")} | {"text": "w1"} for row in rows]
    Dataset.from_list(plain).to_json(tmp_path / "rows.jsonl")
    for data in (plain, Dataset.from_list(plain), Dataset.from_list(plain).to_pandas(), str(tmp_path / "rows.jsonl"),
                 {"question": [r["question"] for r in rows], "context": [r["context"] for r in rows]}):  # fmt: skip
        assert ftlib.predict(model, data, tokenizer=tokenizer) == expected
    assert len(ftlib.predict(model, rows[:1], tokenizer=tokenizer)) == 1 and ftlib.predict(model, []) == []


def test_many_pairs_are_read_in_parts(monkeypatch):
    rows, tokenizer, model = table(11), make(), build()
    options = dict(tokenizer=tokenizer, max_length=30, stride=8, batch_size=1)
    expected = ftlib.predict(model, rows, **options)
    monkeypatch.setattr("ftlib.engine.answering.CHUNK", 4)
    assert ftlib.predict(model, rows, **options) == expected
    rows[9]["context"] = " "
    with pytest.raises(ValueError, match="row 9, column 'context'"):
        ftlib.predict(model, rows, **options)


ONE = [{"question": "k1", "context": "w1"}]


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        ([{"question": "k1", "context": ""}], {}, ValueError, "row 0, column 'context': the text is empty"),
        ([{"question": None, "context": "w1"}], {}, TypeError, "row 0, column 'question': expected text, got None"),
        ([{"question": "k1", "text": "w1"}], {}, ValueError, "no column 'input_ids'"),
        (["k1"], {}, TypeError, "data holds texts alone; pass a table with question and context"),
        ([("k1", "w1")], {}, TypeError, "pass a table with question and context"),
        (ONE, {"output": "probabilities"}, ValueError, "to questions there are answers"),
        (ONE, {"max_answer": 0}, ValueError, "max_answer=0: need a whole number"),
        (ONE, {"stride": 62}, ValueError, "row 0: the question .* more than stride=62"),
        ([{"input_ids": [2, 4, 3]}], {"stride": 3}, ValueError, "stride: only for a table of questions and contexts"),
    ],
)  # fmt: skip
def test_what_is_refused(data, options, kind, message):
    with pytest.raises(kind, match=message):
        ftlib.predict(build(), data, tokenizer=make(), **options)


def test_options_of_answers_are_for_answers(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="no_answer: only for a table of questions and contexts, to a model for these"):
        ftlib.predict(tiny_model(), ["a film"], tokenizer=tiny_tokenizer, no_answer=0.0)


def test_windows_have_places_and_probabilities():
    model, rows = build(), windows()
    logits = ftlib.predict(model, rows, output="logits")
    found, chances = ftlib.predict(model, rows), ftlib.predict(model, rows, output="probabilities")
    for row, values, places, own in zip(rows, logits, found, chances, strict=True):
        assert values.shape == own.shape == (len(row["input_ids"]), 2)
        assert_close(own.sum(0), np.ones(2, dtype=np.float32), atol=1e-5, rtol=0)
        assert places[0] <= places[1] < len(row["input_ids"]) and places.dtype == np.int64
    assert ftlib.predict(model, rows, output="names") == [places.tolist() for places in found]


# ------------------------------------------------------------------------------------- all that other tasks do


def losses(run):
    return [record["loss"] for record in run.history if "loss" in record]


def test_answers_are_learnt():
    """Also by a stock model that the user made; patience, and the metrics of windows and of questions."""
    train, tokenizer = table(32, words=10), make()
    rows = ftlib.tokenize(train, tokenizer, task=KIND, max_length=30, stride=8)
    model = ftlib.unpad(build(hidden_size=32, intermediate_size=64))
    before = ftlib.evaluate(model, rows)
    assert before.keys() == {"loss", "span_exact", "span_f1"}
    config = quick(epochs=60, batch_size=16, learning_rate=5e-3, metric="span_f1", patience=30)
    run = ftlib.fit(model, rows, eval_dataset=rows, tokenizer=tokenizer, config=config)
    assert run.metrics["span_exact"] > 0.9 > 0.2 > before["span_exact"] and run.metrics["loss"] < before["loss"] / 3
    assert ftlib.evaluate(model, rows) == pytest.approx(run.metrics, abs=1e-5)
    found = ftlib.predict(model, train, tokenizer=tokenizer, max_length=30, stride=8)
    scores = squad(found, [row["answers"] for row in train])
    assert scores["exact_match"] > 0.85 and scores["no_answer_exact_match"] > 0.6


def test_patience_works_on_windows():
    rows = windows()
    config = quick(epochs=20, learning_rate=0.0, metric="span_exact", patience=2)
    run = ftlib.fit(build(), rows, eval_dataset=rows, config=config)
    assert run.stopped != "finished" and len({r["epoch"] for r in run.history if "epoch" in r} or [1]) < 20


def test_transformers_model_as_the_user_loads_it(tmp_path):
    build().save_pretrained(tmp_path)
    model = transformers.BertForQuestionAnswering.from_pretrained(tmp_path)
    assert ftlib.evaluate(model, windows()) == ftlib.evaluate(build(), windows())
    run = ftlib.fit(model, windows(), config=quick(max_steps=2))
    assert run.steps == 2 and kind_of(model) == KIND


def test_loading_gives_a_head_of_two(tmp_path):
    transformers.BertModel(tiny_config()).save_pretrained(tmp_path / "base")
    model = ftlib.load_model(tmp_path / "base", task=KIND)
    assert type(model) is transformers.BertForQuestionAnswering and model.qa_outputs.out_features == 2
    assert torch.equal(ftlib.load_model(tmp_path / "base", task=KIND).qa_outputs.weight, model.qa_outputs.weight)
    assert ftlib.load_model(tmp_path / "base", task=KIND, num_labels=2).config.num_labels == 2
    for options in ({"num_labels": 3}, {"label_names": ["a", "b"]}):
        with pytest.raises(ValueError, match="has 2 outputs: leave out num_labels and label_names"):
            ftlib.load_model(tmp_path / "base", task=KIND, **options)
    build(num_labels=2).save_pretrained(tmp_path / "own")
    own = ftlib.load_model(tmp_path / "own", task=KIND)
    assert torch.equal(own.qa_outputs.weight, build().qa_outputs.weight)
    with pytest.raises(ValueError, match="question-answering has num_labels=2"):
        ftlib.Head(KIND, 3)


def test_the_loop_alone_takes_it():
    model, rows = build(), [*windows()]
    batches = [[batch_of(rows[:4])], [batch_of(rows[4:])]]
    count = TASKS[KIND].items
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    gradient = summed(task_loss(KIND), lambda labels: int(count(labels)))
    found = [r["loss"] for r in steps(model, batches, sgd, total=2, gradient=gradient, schedule=lambda s, t: 1.0)]
    twin = build()
    config = quick(batch_size=4, max_steps=2, optimizer="sgd", learning_rate=0.1, schedule="constant", shortcuts=False)
    run = ftlib.fit(twin, rows[:4] + rows[4:8], config=config)
    assert found[0] == pytest.approx(losses(run)[0], abs=1e-6)


OPTIONS = {"last-layers": {"layers": 1}, "lora": {"rank": 2}, "houlsby": {"reduction": 4}, "pfeiffer": {"reduction": 4}}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_a_step_and_the_head(strategy):
    model = build()
    ftlib.tune(model, strategy, **OPTIONS.get(strategy, {}))
    assert all(p.requires_grad for p in model.qa_outputs.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = ftlib.fit(model, windows(), config=quick(batch_size=32, max_steps=1, optimizer="sgd", learning_rate=1.0))
    assert math.isfinite(losses(run)[0]) and run.steps == 1
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "qa_outputs.weight" in moved
    assert (
        moved <= {name for name, p in model.named_parameters() if p.requires_grad} or strategy == "gradual-unfreezing"
    )
    if strategy == "head-only":
        assert all(name.startswith("qa_outputs") for name in moved)


PEFT = {
    "lora": lambda: peft.LoraConfig(r=2), "dora": lambda: peft.LoraConfig(r=2, use_dora=True),
    "ia3": lambda: peft.IA3Config(), "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT)
def test_peft(name, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "base")
    model = ftlib.load_model(tmp_path / "base", task=KIND)
    ftlib.tune(model, PEFT[name]())
    assert model.tuning.peft.peft_config["default"].task_type == "QUESTION_ANS"
    rows = ftlib.tokenize(table(6), make(), task=KIND, max_length=30, stride=8)
    before = ftlib.evaluate(model, rows)["loss"]
    run = ftlib.fit(model, rows, config=quick(epochs=4))
    assert math.isfinite(losses(run)[0]) and ftlib.evaluate(model, rows)["loss"] < before
    ftlib.save(model, tmp_path / "saved", make())
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["task_type"] == "QUESTION_ANS"
    back = ftlib.load(tmp_path / "saved")
    for one, two in zip(*(ftlib.predict(m, rows, output="logits") for m in (model, back)), strict=True):
        assert_close(one, two, atol=1e-6, rtol=0)
    if name in ("lora", "dora"):
        rows = rows.remove_columns("token_type_ids")  # which PEFT 0.21's own forward of this kind drops
        own = peft.PeftModel.from_pretrained(build(), tmp_path / "saved").eval()
        assert ftlib.evaluate(own, rows) == pytest.approx(ftlib.evaluate(model, rows), abs=1e-5)


def test_a_prompt_is_no_part_of_the_logits():
    """With a prompt in front, those of the text alone come, as Transformers gives them behind the prompt's."""
    model = build()
    ftlib.tune(model, peft.PromptTuningConfig(num_virtual_tokens=3))
    row = windows()[0]
    (found,) = ftlib.predict(model, [row], output="logits")
    words = model.get_input_embeddings()(torch.tensor([row["input_ids"]]))
    prompt = model.tuning.peft.get_prompt(1)
    types = torch.tensor([[0] * 3 + row["token_type_ids"]])
    with torch.no_grad():
        out = type(model).forward(model, inputs_embeds=torch.cat([prompt, words], 1), token_type_ids=types)
    assert_close(torch.from_numpy(found), torch.stack([out.start_logits[0], out.end_logits[0]], -1)[3:])


@pytest.mark.parametrize("strategy", [None, "lora", "merged", "houlsby", "bitfit"])
def test_saved_and_loaded_it_is_the_same(tmp_path, strategy):
    build().save_pretrained(tmp_path / "base")
    model, tokenizer = ftlib.load_model(tmp_path / "base", task=KIND), make()
    if strategy:
        ftlib.tune(model, strategy.replace("merged", "lora"), **OPTIONS.get(strategy, {}))
    ftlib.fit(model, windows(), config=quick())
    before = ftlib.predict(model, table(5), tokenizer=tokenizer, no_answer=math.inf)
    if strategy == "merged":
        ftlib.merge(model)
    ftlib.save(model, tmp_path / "saved", tokenizer)
    back = ftlib.load(tmp_path / "saved")
    after = ftlib.predict(back, table(5), tokenizer=ftlib.load_tokenizer(tmp_path / "saved"), no_answer=math.inf)
    for one, two in zip(before, after, strict=True):
        assert one | {"score": 0, "no_answer_score": 0} == two | {"score": 0, "no_answer_score": 0}
        assert one["score"] == pytest.approx(two["score"], abs=1e-5)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert 'pipeline_tag: "question-answering"' in card and "- task: question-answering" in card
    if strategy in (None, "merged", "bitfit"):
        stock = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "saved")
        assert ftlib.evaluate(stock, windows()) == pytest.approx(ftlib.evaluate(model, windows()), abs=1e-5)


def test_two_micro_batches_are_one_batch():
    rows = [*windows(12)]
    runs = {size: ftlib.fit(build(), rows, config=quick(batch_size=12, micro_batch_size=size)) for size in (12, 5, 1)}
    for run in runs.values():
        assert_close(torch.tensor(losses(run)), torch.tensor(losses(runs[12])), atol=1e-5, rtol=0)


def test_bf16_and_r_drop():
    rows = windows(12)
    plain = ftlib.fit(build(), rows, config=quick(batch_size=8))
    half = ftlib.fit(ftlib.unpad(build()), rows, config=quick(batch_size=8, precision="bf16"))
    assert_close(torch.tensor(losses(half)), torch.tensor(losses(plain)), atol=0.05, rtol=0)
    dropped = [ftlib.fit(build(hidden_dropout_prob=0.1), rows, config=quick(r_drop=r, shortcuts=False)) for r in (0, 1)]
    first, second = map(losses, dropped)
    assert all(map(math.isfinite, second)) and first != second
    same = ftlib.fit(build(), rows, config=quick(r_drop=1.0))  # without dropout both passes agree
    assert_close(
        torch.tensor(losses(same)), torch.tensor(losses(ftlib.fit(build(), rows, config=quick()))), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="label_smoothing"):
        ftlib.fit(build(), rows, config=quick(label_smoothing=0.1))


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_resuming_is_exact(tmp_path, strategy):
    rows, options = windows(12), dict(epochs=2, checkpoint_dir=str(tmp_path / "c"), checkpoint_every=2, shuffle=True)

    def begun():
        model = ftlib.unpad(build(hidden_dropout_prob=0.1))
        ftlib.tune(model, strategy)
        return model

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    whole = begun()
    expected = ftlib.fit(whole, rows, config=quick(**options | {"checkpoint_dir": None, "checkpoint_every": None}))
    assert ftlib.fit(begun(), rows, config=quick(**options), on_record=stop).stopped == "interrupted"
    model = begun()
    run = ftlib.fit(model, rows, config=quick(resume="auto", **options))
    assert losses(run) == losses(expected) and run.steps > 4
    assert_close(model.state_dict(), whole.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("unpadded", [False, True])
def test_names_intents_and_answers_on_one_encoder(tmp_path, unpadded):
    tokenizer = make()
    encoder = transformers.BertModel(tiny_config(max_position_embeddings=64))
    tags = ("O", "B-v", "I-v")
    heads = {
        "ner": ftlib.Head("token-classification", 3, tags),
        "intent": ftlib.Head(num_labels=2),
        "answers": ftlib.Head(KIND),
    }
    model = ftlib.MultiTaskModel(encoder, heads)
    model = ftlib.unpad(model) if unpadded else model
    words = [row["context"].split() for row in table(12, seed=1)]
    named = [{"tokens": own, "tags": [int("v" in word) for word in own]} for own in words]
    intents = [{"text": row["question"], "label": i % 2} for i, row in enumerate(table(12, seed=2))]
    parts = {
        "ner": ftlib.tokenize(named, tokenizer, label="tags"), "intent": ftlib.tokenize(intents, tokenizer),
        "answers": windows(12),
    }  # fmt: skip
    before = ftlib.evaluate(model, parts)
    config = quick(epochs=4, batch_size=8, metric="answers/span_f1", shuffle=True)
    run = ftlib.fit(model, parts, eval_dataset=parts, tokenizer=tokenizer, config=config)
    assert {"ner/f1", "intent/accuracy", "answers/loss", "answers/span_exact", "answers/span_f1"} <= run.metrics.keys()
    assert all(run.metrics[f"{task}/loss"] < before[f"{task}/loss"] for task in ("ner", "answers"))
    alone = model.export("answers")
    assert kind_of(alone) == KIND and type(alone) is transformers.BertForQuestionAnswering
    found = ftlib.predict(model, table(6), tokenizer=tokenizer, task="answers", max_length=30, stride=8)
    same = ftlib.predict(alone, table(6), tokenizer=tokenizer, max_length=30, stride=8)
    for one, two in zip(found, same, strict=True):
        assert (one["answer"], one["start"]) == (two["answer"], two["start"])
        assert one["score"] == pytest.approx(two["score"], abs=1e-5)
    assert ftlib.evaluate(alone, parts["answers"])["loss"] == pytest.approx(run.metrics["answers/loss"], abs=1e-5)
    assert len(ftlib.predict(model, ["k1 w2"], tokenizer=tokenizer, task="ner")[0]) == 2
    assert ftlib.predict(model, ["k1 w2"], tokenizer=tokenizer, task="intent").shape == (1,)
    ftlib.save(ftlib.repad(model), tmp_path / "saved", tokenizer)
    back = ftlib.load(tmp_path / "saved")
    assert ftlib.evaluate(back, parts) == pytest.approx(run.metrics, abs=1e-5)


@pytest.mark.parametrize(
    "options", [{"task_gradients": "pcgrad"}, {"task_weighting": "uncertainty"}, {"max_tokens": 90}]
)
def test_tasks_are_weighed_and_joined(options):
    heads = {"intent": ftlib.Head(num_labels=2), "answers": ftlib.Head(KIND)}
    model = ftlib.MultiTaskModel(transformers.BertModel(tiny_config(max_position_embeddings=64)), heads)
    intents = [{"text": row["question"], "label": i % 2} for i, row in enumerate(table(12, seed=2))]
    parts = {"intent": ftlib.tokenize(intents, make()), "answers": windows(12)}
    run = ftlib.fit(model, parts, config=quick(batch_size=8, **options))
    assert all(math.isfinite(loss) for loss in losses(run)) and run.steps > 3


def test_a_run_file(tmp_path, capsys):
    tokenizer = make()
    build(hidden_size=16).bert.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split, seed in (("train", 0), ("validation", 1), ("test", 2)):
        Dataset.from_list(table(8, seed)).to_json(tmp_path / "corpus" / f"{split}.jsonl")
    (tmp_path / "run.toml").write_text(
        f'model = "{tmp_path / "model"}"\ntask = "{KIND}"\ncorpus = "{tmp_path / "corpus"}"\nstride = 8\n'
        f'max_length = 30\noutput = "{tmp_path / "out"}"\n[train]\nepochs = 2\nbatch_size = 8\nprogress = false\n'
    )
    try:
        assert main(["train", str(tmp_path / "run.toml")]) == 0, capsys.readouterr().err
    finally:
        datasets.enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert numbers["test"].keys() == {"loss", "span_exact", "span_f1"}
    model = ftlib.load(tmp_path / "out" / "model")
    rows = ftlib.tokenize(table(8, 2), tokenizer, task=KIND, max_length=30, stride=8)
    assert ftlib.evaluate(model, rows) == pytest.approx(numbers["test"], abs=1e-5)
    assert len(ftlib.predict(model, table(3), tokenizer=tokenizer)) == 3
