"""Questions and answers: windows as Transformers' example makes them, its loss, and what is refused."""

import collections
import re
import string
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from test_answering import KIND, SPECIALS, TYPES, batch_of, build, config_of, make, quick, table, windows
from torch.testing import assert_close

import ftlib
from ftlib.core.loop import logits_of, summed
from ftlib.tasks import answers
from ftlib.tasks.metrics import compute_metrics, squad
from ftlib.tasks.task import count_labelled, kind_of, task_loss, tasks_of


def example_features(rows, tokenizer, max_length, stride):
    """Transformers' examples/pytorch/question-answering/run_qa.py, `prepare_train_features`, question in front."""
    tokenized = tokenizer(
        [row["question"].lstrip() for row in rows], [row["context"] for row in rows], truncation="only_second",
        max_length=max_length, stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    starts, ends = [], []
    for i, offsets in enumerate(tokenized["offset_mapping"]):
        input_ids = tokenized["input_ids"][i]
        if tokenizer.cls_token_id in input_ids:
            cls_index = input_ids.index(tokenizer.cls_token_id)
        elif tokenizer.bos_token_id in input_ids:
            cls_index = input_ids.index(tokenizer.bos_token_id)
        else:
            cls_index = 0
        sequence_ids = tokenized.sequence_ids(i)
        answers = rows[tokenized["overflow_to_sample_mapping"][i]]["answers"]
        start, end = cls_index, cls_index
        if len(answers["answer_start"]):
            start_char = answers["answer_start"][0]
            end_char = start_char + len(answers["text"][0])
            first = 0
            while sequence_ids[first] != 1:
                first += 1
            last = len(input_ids) - 1
            while sequence_ids[last] != 1:
                last -= 1
            if offsets[first][0] <= start_char and offsets[last][1] >= end_char:
                while first < len(offsets) and offsets[first][0] <= start_char:
                    first += 1
                start = first - 1
                while offsets[last][1] >= end_char:
                    last -= 1
                end = last + 1
        starts.append(start)
        ends.append(end)
    return tokenized["input_ids"], [[start, end] for start, end in zip(starts, ends, strict=True)]


# --------------------------------------------------------------------------------------------------- windows


def test_windows_by_hand():
    row = {"question": "k1", "context": "w1 w2 w3 k1 v2 w4 w5", "answers": {"text": ["v2"], "answer_start": [12]}}
    done = ftlib.tokenize([row], make(), task=KIND, max_length=8, stride=1)
    assert done.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    shown = [" ".join(make().convert_ids_to_tokens(ids)) for ids in done["input_ids"]]
    assert shown == ["[CLS] k1 [SEP] w1 w2 w3 k1 [SEP]", "[CLS] k1 [SEP] k1 v2 w4 w5 [SEP]"]
    assert done["labels"][:] == [[0, 0], [4, 4]]
    assert done["token_type_ids"][0] == [0, 0, 0, 1, 1, 1, 1, 1] and set(done["attention_mask"][1]) == {1}


def test_an_answer_in_two_windows_and_one_cut_off():
    row = {"question": "k1", "context": "w1 w2 v1 v2 w4 w5", "answers": {"text": ["v1 v2"], "answer_start": [6]}}
    both = ftlib.tokenize([row], make(), task=KIND, max_length=8, stride=2)
    assert both["labels"][:] == [[5, 6], [3, 4]]
    row["answers"] = {"text": ["w2 v1 v2"], "answer_start": [3]}
    cut = ftlib.tokenize([row], make(), task=KIND, max_length=8, stride=2)
    assert cut["labels"][:] == [[4, 6], [0, 0]]  # the second window has its last two words alone
    with pytest.raises(ValueError, match="row 0, column 'answers': no window holds the whole answer: raise stride"):
        row["answers"] = {"text": ["w2 v1 v2 w4"], "answer_start": [3]}
        ftlib.tokenize([row], make(), task=KIND, max_length=7, stride=0)


def test_any_part_of_a_token_is_its_answer():
    tokenizer = make()
    row = {"question": "k1", "context": "w1 v11. w2", "answers": {"text": ["1"], "answer_start": [5]}}
    assert ftlib.tokenize([row], tokenizer, task=KIND)["labels"][0] == [4, 4]
    row["answers"] = {"text": [" v11. w"], "answer_start": [2]}  # white space around it, and a piece of a word
    assert ftlib.tokenize([row], tokenizer, task=KIND)["labels"][0] == [4, 6]


@pytest.mark.parametrize("style", SPECIALS)
@pytest.mark.parametrize(("max_length", "stride"), [(40, 13), (64, 20), (30, 4)])
def test_windows_are_those_of_transformers_example(style, max_length, stride):
    rows, tokenizer = table(24), make(style)
    ids, places = example_features(rows, tokenizer, max_length, stride)
    done = ftlib.tokenize(rows, tokenizer, task=KIND, max_length=max_length, stride=stride)
    assert list(done["input_ids"]) == ids and list(done["labels"]) == places
    assert (len(ids) > 24 or max_length == 64) and any(start for start, _ in places)
    nowhere = {"xlnet": [len(row) - 1 for row in ids]}.get(style, [0] * len(ids))
    held = [pair != [n, n] for pair, n in zip(places, nowhere, strict=True)]
    assert 0 < sum(held) < len(ids)
    for row, pair, own in zip(ids, places, held, strict=True):
        said = tokenizer.decode(row[pair[0] : pair[1] + 1]).strip(" ▁")
        assert not own or re.fullmatch(r"v\d+", said.replace(" ", "")), said


def test_other_signs_than_ascii():
    context = "é😀 w1 北京 v2 ﬁn"
    row = {"question": "k1 é", "context": context, "answers": {"text": ["北京 v2"], "answer_start": [6]}}
    for style in ("bert", "roberta", "none"):
        encoded = answers.windows(make(style), [row["question"]], [context], ["row 0"])
        done = ftlib.tokenize([row], make(style), task=KIND)
        start, end = done["labels"][0]
        begin, stop = encoded["offset_mapping"][0][start][0], encoded["offset_mapping"][0][end][1]
        assert context[begin:stop].strip() == "北京 v2"


def test_defaults():
    long = {"question": "k1", "context": " ".join(["w1"] * 700)}
    done = ftlib.tokenize([long], make(limit=512), task=KIND)
    assert max(map(len, done["input_ids"])) == 384 and "labels" not in done.column_names
    assert ftlib.tokenize([long], make(limit=512), task=KIND, stride=128)["input_ids"][:] == done["input_ids"][:]
    short = ftlib.tokenize([long], make(limit=50), task=KIND)
    assert max(map(len, short["input_ids"])) == 50
    assert short["input_ids"][:] == ftlib.tokenize([long], make(), task=KIND, max_length=50, stride=16)["input_ids"][:]


def test_every_split_a_stream_and_a_file(tmp_path):
    rows, tokenizer = table(8), make()
    both = ftlib.tokenize({"train": rows, "test": [{k: r[k] for k in ("question", "context")} for r in rows]},
                          tokenizer, task=KIND, max_length=30, stride=8)  # fmt: skip
    assert "labels" in both["train"].column_names and "labels" not in both["test"].column_names
    assert both["train"]["input_ids"][:] == both["test"]["input_ids"][:]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    read = list(ftlib.tokenize(stream, tokenizer, task=KIND, max_length=30, stride=8))
    assert [row["labels"] for row in read] == list(both["train"]["labels"])
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    there = ftlib.tokenize(str(tmp_path / "rows.jsonl"), tokenizer, task=KIND, max_length=30, stride=8)
    assert there["labels"][:] == both["train"]["labels"][:]


def bad(answers=None, context="w1 v2 w3", question="k1", **more):
    good = {"question": "k1", "context": "w1 v2 w3", "answers": {"text": ["v2"], "answer_start": [3]}}
    said = good["answers"] if answers is None else answers
    return [good, {"question": question, "context": context, "answers": said, **more}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (bad({"text": ["v2"], "answer_start": [4]}), "'v2' is not at character 4 of the context, but at 3: .* by 1;"),
        (bad({"text": ["v2"], "answer_start": [2]}), "character 2 of the context, but at 3: answer_start is off by 1"),
        (bad({"text": ["v2"], "answer_start": [0]}, "w1 v2 w3 v2"), "but at 3: answer_start is off by 3"),
        (bad({"text": ["v9"], "answer_start": [3]}), "'v9' is not at character 3 of the context, nor anywhere in it"),
        (bad({"text": ["V2"], "answer_start": [3]}), "nor anywhere in it; mend it .* or drop the row"),
        (bad({"text": ["v2", "v1"], "answer_start": [3, 3]}), "'v1' is not at character 3"),  # not the first alone
        (bad({"text": ["w3"], "answer_start": [-2]}), "'w3' is not at character -2 of the context, but at 6"),
        (bad({"text": ["v2"], "answer_start": [30]}), "not at character 30 .* off by 27"),
        (bad({"text": ["v2"], "answer_start": []}), r"\['v2'\], 'answer_start': \[\]}; need as many texts as starts"),
        (bad({"text": [], "answer_start": [3]}), "need as many texts as starts"),
        (bad({"text": [" "], "answer_start": [2]}), "' ' at 2; need a text and a whole number, or no entry"),
        (bad({"text": [""], "answer_start": [2]}), "'' at 2; need a text"),
        (bad({"text": ["v2"], "answer_start": [None]}), "'v2' at None; need a text and a whole number"),
        (bad({"text": [None], "answer_start": [3]}), "None at 3; need a text"),
        (bad({"text": None, "answer_start": None}), "need as many texts as starts"),
    ],
)  # fmt: skip
def test_answers_that_are_none(rows, message):
    with pytest.raises(ValueError, match=f"row 1, column 'answers': .*{message}"):
        ftlib.tokenize(rows, make(), task=KIND)


@pytest.mark.parametrize("value", [None, "v2", 3, ["v2"], [{"text": "v2", "answer_start": 3}], {"text": ["v2"]}])
def test_answers_of_another_form(value):
    stream = IterableDataset.from_generator(lambda: iter([*bad()[:1], bad(value or 0)[1] | {"answers": value}]))
    with pytest.raises(ValueError, match=r"row 1, column 'answers': .*need as many texts as starts, \{'text': "):
        list(ftlib.tokenize(stream, make(), task=KIND))


@pytest.mark.parametrize(
    ("rows", "options", "kind", "message"),
    [
        (bad(context=" "), {}, ValueError, "row 1, column 'context': the text is empty; fill it in or drop the row"),
        (bad(context=None), {}, TypeError, "row 1, column 'context': expected text, got None"),
        (bad(question=""), {}, ValueError, "row 1, column 'question': the text is empty"),
        (bad(question=None), {}, TypeError, "row 1, column 'question'"),
        (bad(question="k1 " * 70), {}, ValueError, "row 1: the question of 70 tokens leaves 0 of max_length=64"),
        (bad(question="k1 " * 45), {}, ValueError, "leaves 16 of .* the context, which must be more than stride=21"),
        (bad(context="w1 " * 70, answers={"text": [], "answer_start": []}), {"truncation": False}, ValueError,
         "row 1: 2 windows of max_length=64; raise it or set truncation=True"),
        (bad(), {"stride": 62}, ValueError, "row 0: the question of 1 tokens leaves 60 .* more than stride=62"),
        (bad(), {"stride": -1}, ValueError, "stride=-1: need a whole number"),
        (bad(), {"max_length": 4}, ValueError, "row 0: the question of 1 tokens leaves 0 of max_length=4"),
        (bad(), {"text": "context"}, ValueError, "text='context': name the columns question and context and answers"),
        (bad(), {"label": "answers"}, ValueError, "reads no text_pair= and no label="),
        ([{"question": "k1", "text": "w1"}], {}, ValueError, "the dataset has question, text; it needs question and "),
    ],
)  # fmt: skip
def test_what_is_refused(rows, options, kind, message):
    with pytest.raises(kind, match=message):
        ftlib.tokenize(rows, make(), task=KIND, **options)


def test_stride_is_for_windows(tiny_tokenizer):
    for task in (None, "sequence-classification", "causal-lm"):
        with pytest.raises(ValueError, match="stride=3: only for task=question-answering"):
            ftlib.tokenize([{"text": "a b", "label": 1}], tiny_tokenizer, task=task, stride=3)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

        def __call__(self, *args, **options):
            raise AssertionError

    with pytest.raises(TypeError, match="a Slow does not say which characters a token is; use a fast tokenizer"):
        ftlib.tokenize(bad(), Slow(), task=KIND)


# -------------------------------------------------------------------------------------- losses and decisions

UNPADDED = ("bert", "roberta", "distilbert", "electra", "albert", "modernbert", "xlm-roberta", "llama")


def stock(model, row):
    """Transformers' own loss and logits of a row alone."""
    inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids") if name in takes(model, row)}
    start, end = torch.tensor([row["labels"]]).T
    with torch.no_grad():
        out = model(**inputs, start_positions=start, end_positions=end)
    return float(out.loss), torch.stack([out.start_logits[0], out.end_logits[0]], -1)


def takes(model, row):
    return {*row} & {"input_ids", *ftlib.inputs.rows.inputs_of(model)}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_transformers_own_and_that_of_each_row_alone(model_type):
    model, rows = build(model_type), [*windows()]
    alike = [row for row in rows if len(row["input_ids"]) == 30]
    batch = {
        k: v for k, v in batch_of(alike).items() if k in ("labels", "attention_mask") or k in takes(model, rows[0])
    }
    start, end = batch["labels"].T
    with torch.no_grad():
        own = model(**{k: v for k, v in batch.items() if k != "labels"}, start_positions=start, end_positions=end)
    loss = task_loss(KIND)(logits_of(own, batch), batch["labels"])
    assert_close(loss / len(alike), own.loss, atol=1e-5, rtol=0)
    assert int(count_labelled(batch["labels"], KIND)) == len(alike) > 3

    assert len({len(row["input_ids"]) for row in rows}) > 3  # so that there is padding
    alone = [stock(model, row)[0] for row in rows]
    found = ftlib.evaluate(model, rows, batch_size=4)
    assert abs(found["loss"] - np.mean(alone)) < 1e-5
    logits = ftlib.predict(model, rows, output="logits", batch_size=4)
    for row, values in zip(rows, logits, strict=True):
        assert_close(torch.from_numpy(values), stock(model, row)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", UNPADDED)
def test_an_unpadded_model_gives_the_same(model_type):
    rows, plain, less = [*windows()], build(model_type), ftlib.unpad(build(model_type))
    one, two = (ftlib.predict(m, rows, output="logits", batch_size=4) for m in (plain, less))
    for first, second in zip(one, two, strict=True):
        assert_close(first, second, atol=1e-5, rtol=1e-5)
    runs = [ftlib.fit(m, rows, config=quick(max_steps=3)) for m in (plain, less)]
    assert_close(*(torch.tensor([r["loss"] for r in run.history]) for run in runs), atol=1e-5, rtol=0)
    batch, gradients = batch_of(rows), []
    batch = {k: v for k, v in batch.items() if k in ("labels", "attention_mask") or k in takes(plain, rows[0])}
    for model in (build(model_type), ftlib.unpad(build(model_type))):
        summed(task_loss(KIND), partial(count_labelled, task=KIND))(model, [batch])
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(*gradients, atol=1e-5, rtol=0)


def test_padding_has_no_share_of_the_loss():
    model, rows = build(), [*windows()]
    batch = batch_of(rows)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        own = model(**inputs, start_positions=batch["labels"][:, 0], end_positions=batch["labels"][:, 1])
        logits = logits_of(own, batch)
    assert bool((logits[batch["attention_mask"] == 0] == -torch.inf).all())
    alone = sum(stock(model, row)[0] for row in rows)
    assert abs(float(task_loss(KIND)(logits, batch["labels"])) - alone) < 1e-4
    assert abs(float(own.loss) * len(rows) - alone) > 0.1  # the stock loss counts padding as tokens


def test_padding_in_front_moves_the_labels():
    rows = [{"input_ids": [5, 6, 7], "labels": [1, 2]}, {"input_ids": [5], "labels": [0, 0]}]
    rows += [{"input_ids": [5, 6], "labels": [-100, -100]}]
    assert batch_of(rows)["labels"].tolist() == [[1, 2], [0, 0], [-100, -100]]
    assert batch_of(rows, padding_side="left")["labels"].tolist() == [[1, 2], [2, 2], [-100, -100]]
    assert batch_of(rows)["labels"].dtype == torch.int64


def test_rows_that_come_padded():
    model, rows = build(), [*windows(style="bert")]
    padded = []
    for i, row in enumerate(rows):
        n = 4 * (i % 3)
        own = {name: [0] * n + list(row[name]) for name in ("input_ids", "token_type_ids", "attention_mask")}
        padded.append(own | {"labels": [place + n for place in row["labels"]]})
    assert ftlib.evaluate(model, rows) == pytest.approx(ftlib.evaluate(model, padded), abs=1e-9)
    padded[1]["labels"] = [0, 5]
    with pytest.raises(ValueError, match=r"row 1, column 'labels': \[0, 5\] is padding"):
        ftlib.evaluate(model, padded)


@pytest.mark.parametrize(
    "label", [[3], [1, 2, 3], 4, [2, 1], [0, 5], [-1, 2], [-100, 2], [1.0, 2.0], ["1", "2"], [True, True], [None, 1]]
)
def test_labels_that_are_none(label):
    rows = [{"input_ids": [2, 5, 6, 7, 3], "labels": [0, 0]}, {"input_ids": [2, 5, 6, 7, 3], "labels": label}]
    with pytest.raises(
        ValueError, match=r"dataset row 1, column 'labels': .*need \[start, end\], two of the row's 5 tokens"
    ):
        ftlib.evaluate(build(), rows)


def test_rows_that_are_ignored_count_nowhere():
    rows = [*windows()]
    hidden = [*rows, rows[0] | {"labels": [-100, -100]}]
    assert ftlib.evaluate(build(), rows) == pytest.approx(ftlib.evaluate(build(), hidden), abs=1e-9)
    first, second = (ftlib.fit(build(), own, config=quick(batch_size=40)).history for own in (rows, hidden))
    assert abs(first[0]["loss"] - second[0]["loss"]) < 1e-6
    with pytest.raises(ValueError, match="every label is -100"):
        ftlib.evaluate(build(), hidden[-1:])


def test_questions_without_answers_are_not_trained():
    rows = ftlib.tokenize([{"question": "k1", "context": "w1"}], make(), task=KIND)
    with pytest.raises(ValueError, match=r"no 'labels'; .* a label column: label=\.\.\., or answers to its questions"):
        ftlib.fit(build(), rows, config=quick())


def test_the_best_pair_against_all_pairs():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 9, 2, generator=draw)
    logits[:, 7:] = -torch.inf
    for values, found in zip(logits, answers.decide(logits).tolist(), strict=True):
        pairs = {(s, e): float(values[s, 0] + values[e, 1]) for s in range(7) for e in range(s, 7)}
        assert tuple(found) == max(pairs, key=pairs.get)
    assert answers.decide(logits[0]).shape == (2,)


def test_divergence_is_that_of_classes_without_the_padding():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 6, 2, generator=draw)
    labels = torch.tensor([[0, 1], [2, 2], [-100, -100]])
    expected = 0.0
    for row in range(2):
        for side in range(2):
            p, q = a[row, :, side].log_softmax(0), b[row, :, side].log_softmax(0)
            expected += float(((p.exp() - q.exp()) * (p - q)).sum()) / 4
    assert abs(float(answers.divergence(a, b, labels)) - expected) < 1e-5
    pad = torch.full((3, 2, 2), -torch.inf)
    wide = [torch.cat([x, pad], 1).requires_grad_() for x in (a, b)]
    value = answers.divergence(*wide, labels)
    value.backward()
    assert abs(float(value.detach()) - expected) < 1e-5
    assert bool(wide[0].grad.isfinite().all()) and not wide[0].grad[:, 6:].any()


def test_models_that_search_in_beams_are_refused():
    model = transformers.XLNetForQuestionAnswering(config_of("xlnet", {}))
    assert kind_of(model) is None
    with pytest.raises(ValueError, match="XLNetForQuestionAnswering has no classification head"):
        ftlib.evaluate(model, windows())
    assert tasks_of(build("xlnet")) == {"": (KIND, 2)}


# --------------------------------------------------------------------------------------------------- metrics


def normalize_answer(s):  # from here to compute_f1: SQuAD 2.0's evaluate-v2.0.py, word for word
    def remove_articles(text):
        regex = re.compile(r"\b(a|an|the)\b", re.UNICODE)
        return re.sub(regex, " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text):
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def get_tokens(s):
    if not s:
        return []
    return normalize_answer(s).split()


def compute_exact(a_gold, a_pred):
    return int(normalize_answer(a_gold) == normalize_answer(a_pred))


def compute_f1(a_gold, a_pred):
    gold_toks = get_tokens(a_gold)
    pred_toks = get_tokens(a_pred)
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    f1 = (2 * precision * recall) / (precision + recall)
    return f1


CASES = [
    ("the Normans", ["Normans", "The normans!"]), ("in 1066", ["1066"]), ("", []), ("a", []), ("Bob", []),
    ("", ["Bob"]), ("Ann-Marie's cat", ["ann maries cat", "annmaries cat"]), ("red blue red", ["red red green"]),
    ("A b  c", ["b c d", "x", "c"]), ("10,000", ["10000"]), ("é", ["É"]), ("the", ["an", "the"]), ("x y", ["z"]),
]  # fmt: skip


def script(cases):
    exact, f1 = [], []
    for found, own in cases:
        golds = [gold for gold in own if normalize_answer(gold)] or [""]
        exact.append(max(compute_exact(gold, found) for gold in golds))
        f1.append(max(compute_f1(gold, found) for gold in golds))
    return np.mean(exact), np.mean(f1)


def test_squad_is_the_script():
    found, golds = zip(*CASES, strict=True)
    scores = squad(found, golds)
    parts = {
        "": CASES,
        "has_answer_": [case for case in CASES if any(map(normalize_answer, case[1]))],
        "no_answer_": [case for case in CASES if not any(map(normalize_answer, case[1]))],
    }
    assert scores.keys() == {prefix + name for prefix in parts for name in ("exact_match", "f1")}
    for prefix, own in parts.items():
        exact, f1 = script(own)
        assert abs(scores[prefix + "exact_match"] - exact) < 1e-12 and abs(scores[prefix + "f1"] - f1) < 1e-12
        assert 0 < scores[prefix + "exact_match"] < 1
    for case in CASES:
        one = squad([case[0]], [case[1]])
        assert one.keys() == {"exact_match", "f1"}  # all have an answer, or none
        assert (one["exact_match"], one["f1"]) == pytest.approx(script([case]), abs=1e-12)


def test_squad_by_hand():
    rows = [{"answer": "the red car", "start": 3, "end": 14, "score": 0.9, "no_answer_score": 0.1}, {"answer": ""}]
    golds = [{"text": ["red car", "car"], "answer_start": [7, 11]}, {"text": [], "answer_start": []}]
    assert squad(rows, golds) == {
        "exact_match": 1.0, "f1": 1.0, "has_answer_exact_match": 1.0, "has_answer_f1": 1.0,
        "no_answer_exact_match": 1.0, "no_answer_f1": 1.0,
    }  # fmt: skip
    assert squad(["blue car"], [["red car", "blue"]]) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize(("found", "golds"), [(["a"], []), (["a"], [["a"], ["b"]]), ([], []), (["a"], ["a"])])
def test_squad_needs_answers_for_each(found, golds):
    with pytest.raises(ValueError, match="need a list of right answers for each prediction"):
        squad(found, golds)


def test_span_metrics_by_hand():
    found = [[3, 5], [0, 0], [2, 4], [7, 7]]
    wanted = [[3, 5], [4, 6], [4, 5], [-100, -100]]
    scores = compute_metrics(KIND, found, wanted)
    assert scores == {"span_exact": pytest.approx(1 / 3), "span_f1": pytest.approx((1 + 0 + 2 / 5) / 3)}
    with pytest.raises(ValueError, match="nothing to score"):
        compute_metrics(KIND, found[:1], wanted[-1:])
    with pytest.raises(ValueError, match="shape"):
        compute_metrics(KIND, found[:1], wanted)
