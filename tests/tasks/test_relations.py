"""Relations between two spans: markers by hand, the head on exactly their tokens, and all that other tasks do."""

import ast
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import tiny_config
from datasets import Dataset, IterableDataset
from test_fit import quick, steps, weights
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close

import ftlib
from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate, predict
from ftlib.engine.saving import load, save
from ftlib.inputs.rows import inputs_of
from ftlib.inputs.tokenizing import tokenize
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import is_unpadded, unpad
from ftlib.tasks.relations import AutoModelForRelationClassification, mark
from ftlib.tasks.task import TASKS, auto_class, class_named, kind_of, tasks_of

KIND = "relation-classification"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] @ # ann bob met saw the a in rome oslo and then".split()
AT, HASH = WORDS.index("@"), WORDS.index("#")


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=40, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def build(model_type="bert", num_labels=3, seed=0, **options):
    config = tiny_config(model_type, num_labels=num_labels, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto_class(KIND).from_config(config).eval()


def spans_of(text, first, second):
    return [[text.index(word), text.index(word) + len(word)] for word in (first, second)]


TEXTS = [("ann met bob", "ann", "bob"), ("in rome ann saw the bob and then", "bob", "rome"), ("ann bob", "ann", "bob"),
         ("the bob met a ann in oslo", "ann", "bob"), ("oslo", "os", "lo")]  # fmt: skip


def data(texts=TEXTS[:4], labels=(0, 1, 2, 0)):
    columns = {"text": [t for t, _, _ in texts], "spans": [spans_of(*t) for t in texts], "label": list(labels)}
    return Dataset.from_dict(columns)


def toy(count=48):
    """Class 1 where the second span comes first."""
    names, found = ["ann", "bob", "rome", "oslo"], []
    for i in range(count):
        a, b = names[i % 4], names[(i // 4 + 1 + i) % 4]
        b = b if a != b else names[(i + 2) % 4]
        found.append(((f"{a} met {b}", a, b), 0) if (i * 7 // 3) % 2 else ((f"the {b} saw {a}", a, b), 1))
    return data([text for text, _ in found], [label for _, label in found])


# ------------------------------------------------------------------------------------------------------- markers


@pytest.mark.parametrize(
    ("text", "spans", "marked", "places"),
    [
        ("Ann met Bob", [[0, 3], [8, 11]], "@ Ann @ met # Bob #", [0, 12]),
        ("Ann met Bob", [[8, 11], [0, 3]], "# Ann # met @ Bob @", [12, 0]),
        ("so Ann met Bob here", [[3, 6], [11, 14]], "so @ Ann @ met # Bob # here", [3, 15]),
        ("AnnBob", [[0, 3], [3, 6]], "@ Ann @# Bob #", [0, 7]),
        ("AnnBob", [[3, 6], [0, 3]], "# Ann #@ Bob @", [7, 0]),
        ("ab", [[0, 1], [1, 2]], "@ a @# b #", [0, 5]),
        ("é😀 met 北京", [[0, 2], [7, 9]], "@ é😀 @ met # 北京 #", [0, 11]),
        ("Ann met Bob", ((0, 3), (8, 11)), "@ Ann @ met # Bob #", [0, 12]),
    ],
)
def test_markers_by_hand(text, spans, marked, places):
    assert mark(text, spans) == (marked, places)
    assert [marked[place] for place in places] == ["@", "#"]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 3]], r"need two, \[\[start, end\], \[start, end\]\] in characters"),
        ([[0, 3], [4, 5], [6, 7]], "need two"),
        (None, "spans is None; need two"),
        ("Ann", "need two"),
        ([[0, 3], [2, 5]], "not overlap"),
        ([[0, 3], [0, 3]], "not overlap"),
        ([[0, 3], [3, 3]], "hold a sign"),
        ([[5, 4], [6, 8]], "hold a sign"),
        ([[-1, 3], [6, 8]], r"lie in the text \(0 to 11\)"),
        ([[0, 3], [8, 12]], r"lie in the text \(0 to 11\)"),
        ([[0, 3], [8]], "spans"),
        ([[0, 3], None], "spans"),
        ([[0, 3], 8], "spans"),
        ([[0, 3], [8, None]], "spans"),
        ([["0", "3"], [8, 11]], "spans"),
    ],
)
def test_spans_that_are_none(tokenizer, spans, message):
    with pytest.raises(ValueError, match=message):
        mark("Ann met Bob", spans)
    rows = IterableDataset.from_generator(
        lambda: iter([
            {"text": "ann met bob", "spans": [[0, 3], [8, 11]], "label": 0},
            {"text": "ann met bob", "spans": spans, "label": 1},
        ])
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"row 1.*{message}"):
        list(tokenize(rows, tokenizer, task=KIND))


# ---------------------------------------------------------------------------------------------------- tokenizing


def test_tokenizing_says_where_the_markers_stand(tokenizer):
    done = tokenize(data(), tokenizer, task=KIND)
    assert set(done.column_names) == {"input_ids", "attention_mask", "token_type_ids", "marker_positions", "labels"}
    for row in done:
        ids = row["input_ids"]
        assert row["marker_positions"] == [ids.index(AT), ids.index(HASH)]
        assert ids.count(AT) == ids.count(HASH) == 2
    first = [WORDS[i] for i in done[0]["input_ids"]]
    assert first == "[CLS] @ ann @ met # bob # [SEP]".split()
    assert done[1]["marker_positions"] == [8, 2] and list(done["labels"]) == [0, 1, 2, 0]


def test_signs_of_the_text_itself_are_no_markers(tokenizer):
    text = "@ # ann met # bob @"
    rows = Dataset.from_dict({"text": [text], "spans": [[[4, 7], [14, 17]]]})
    (row,) = tokenize(rows, tokenizer, task=KIND)
    assert [WORDS[i] for i in row["input_ids"]] == "[CLS] @ # @ ann @ met # # bob # @ [SEP]".split()
    assert row["marker_positions"] == [3, 8]


def test_a_vocabulary_without_the_markers_has_them_in_their_places_too(tiny_tokenizer):
    text = "good film is bad"
    rows = Dataset.from_dict({"text": [text], "spans": [spans_of(text, "film", "bad")]})
    (row,) = tokenize(rows, tiny_tokenizer, task=KIND)
    assert row["marker_positions"] == [2, 6]  # [CLS] good [UNK] film [UNK] is [UNK] bad [UNK] [SEP]
    assert [row["input_ids"][i] for i in row["marker_positions"]] == [tiny_tokenizer.unk_token_id] * 2


@pytest.mark.parametrize(("longest", "good"), [(9, True), (8, True), (7, False), (6, False), (5, False)])
def test_a_span_that_is_cut_off_is_refused_by_row(tokenizer, longest, good):
    rows = data([("ann", "a", "n"), ("ann met bob", "ann", "bob")], [0, 1])
    if good:  # of [CLS] @ ann @ met # bob # [SEP], the second span is the 7th
        assert tokenize(rows, tokenizer, task=KIND, max_length=longest)[1]["marker_positions"] == [1, 5]
    else:
        with pytest.raises(ValueError, match=r"row [01]: a span lies beyond max_length; raise it"):
            tokenize(rows, tokenizer, task=KIND, max_length=longest)


def test_columns_that_are_missing(tokenizer):
    with pytest.raises(ValueError, match="no column 'spans': the dataset has text, label"):
        tokenize(data().remove_columns("spans"), tokenizer, task=KIND)
    with pytest.raises(ValueError, match=r"task='relation': choose one of .*relation-classification"):
        tokenize(data(), tokenizer, task="relation")


# ------------------------------------------------------------------------------------------------------ the head


LLAMA = dict(num_key_value_heads=2)
GPT2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=40)
TYPES = [("bert", {}), ("modernbert", {}), ("roberta", {}), ("distilbert", {}), ("gpt2", GPT2), ("llama", LLAMA)]


def rows_of(tokenizer, **options):
    keep = ("input_ids", "marker_positions", "labels")
    return [{k: row[k] for k in keep} for row in tokenize(data(**options), tokenizer, task=KIND)]


@pytest.mark.parametrize(("model_type", "options"), TYPES)
def test_the_head_reads_the_two_markers(tokenizer, model_type, options):
    model = build(model_type, **options)
    rows = rows_of(tokenizer)
    batch = collate(rows)
    with torch.no_grad():
        output = model(**batch)
        hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        read = [torch.cat([h[p] for p in row["marker_positions"]]) for h, row in zip(hidden, rows, strict=True)]
        expected = model.classifier(torch.stack(read))
    assert output.logits.shape == (4, 3)
    assert_close(output.logits, expected, atol=1e-6, rtol=0)
    assert_close(output.loss, torch.nn.functional.cross_entropy(expected, batch["labels"]))
    swapped = batch | {"marker_positions": batch["marker_positions"].flip(1)}
    assert not torch.allclose(model(**swapped).logits, output.logits, atol=1e-3)
    assert isinstance(model, transformers.PreTrainedModel) and kind_of(model) == KIND
    assert tasks_of(model) == {"": (KIND, 3)} and getattr(model.base_model, "pooler", None) is None


@pytest.mark.parametrize(("model_type", "options"), TYPES[:4])
def test_padding_changes_nothing_and_neither_does_unpadding(tokenizer, model_type, options):
    model, rows = build(model_type, **options), rows_of(tokenizer)
    alone = torch.cat([model(**collate([row])).logits for row in rows])
    assert_close(model(**collate(rows)).logits, alone, atol=1e-5, rtol=0)
    unpad(model)
    assert is_unpadded(model)
    assert_close(model(**collate(rows)).logits, alone, atol=1e-5, rtol=0)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="relations are read off an encoder or a decoder; t5 is both"):
        AutoModelForRelationClassification.from_config(transformers.T5Config())


def test_the_class_is_named_after_its_model():
    kind = type(build())
    assert kind.__name__ == "BertForRelationClassification" and type(build()) is kind
    assert class_named(kind.__name__, {"model_type": "bert"}) is kind
    assert class_named(kind.__name__, {"model_type": "gpt2"}) is None
    assert TASKS[KIND].columns == ("spans",)


def test_pretrained_weights_are_loaded_by_the_front_door(tmp_path, tiny_model):
    encoder = tiny_model("encoder")
    encoder.save_pretrained(tmp_path)
    model = ftlib.load_model(tmp_path, task=KIND, label_names=["none", "works for"])
    for (name, expected), found in zip(
        ((n, p) for n, p in encoder.named_parameters() if "pooler" not in n), model.bert.parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
    assert model.config.id2label == {0: "none", 1: "works for"} and model.classifier.weight.shape == (2, 32)
    again = ftlib.load_model(tmp_path, task=KIND, num_labels=2)
    assert torch.equal(again.classifier.weight, model.classifier.weight)  # from the seed


# ------------------------------------------------------------------------------------- all that other tasks do


@pytest.mark.parametrize("unpadded", [False, True])
def test_a_relation_is_learnt(tokenizer, unpadded):
    train = tokenize(toy(), tokenizer, task=KIND)
    model = build(num_labels=2)
    if unpadded:
        unpad(model)
    run = fit(model, train, eval_dataset=train, tokenizer=tokenizer, config=quick(epochs=12, batch_size=8))
    assert steps(run)[0] > 0.5 and run.metrics["accuracy"] == 1.0
    found = evaluate(model, train, tokenizer=tokenizer)
    assert found == pytest.approx(run.metrics, abs=1e-5)
    assert predict(model, train, tokenizer=tokenizer).tolist() == list(train["labels"])
    assert predict(model, train, output="probabilities").shape == (48, 2)
    assert predict(model, train.select([0]), output="names") == [f"LABEL_{train['labels'][0]}"]


def test_a_decoder_learns_it_too(tokenizer):
    train = tokenize(toy(), tokenizer, task=KIND)
    model = build("llama", 2, **LLAMA)
    run = fit(model, train, eval_dataset=train, tokenizer=tokenizer, config=quick(epochs=12, batch_size=8))
    assert run.metrics["accuracy"] == 1.0


def test_texts_alone_are_not_enough(tokenizer):
    with pytest.raises(TypeError, match=r"data holds texts alone; pass a dataset from tokenize\(..., task=...\)"):
        predict(build(), ["ann met bob"], tokenizer=tokenizer)


def test_rows_without_positions_are_refused(tokenizer):
    rows = [{k: v for k, v in row.items() if k != "marker_positions"} for row in rows_of(tokenizer)]
    for bad in (rows, [rows_of(tokenizer)[0], *rows[1:]]):
        with pytest.raises((ValueError, TypeError), match="marker_positions"):
            fit(build(), bad, config=quick())


@pytest.mark.parametrize("strategy", ["lora", "head-only", "bitfit"])
def test_it_is_tuned(tokenizer, strategy):
    model = build()
    tune(model, strategy, **({"rank": 2} if strategy == "lora" else {}))
    before = weights(model)
    fit(model, tokenize(data(), tokenizer, task=KIND), config=quick())
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert "classifier.weight" in moved or any("classifier" in name for name in moved)
    assert all("lora" in n or "classifier" in n or n.endswith("bias") for n in moved)


def test_it_is_tuned_by_peft(tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    before = weights(model)
    fit(model, tokenize(data(), tokenizer, task=KIND), config=quick())
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "classifier" in name for name in moved)


@pytest.mark.parametrize("strategy", [None, "lora"])
@pytest.mark.parametrize(("model_type", "options"), [("bert", {}), ("llama", LLAMA)])
def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path, strategy, model_type, options):
    model = build(model_type, **options)
    if strategy:
        build(model_type, **options).save_pretrained(tmp_path / "base")
        model = ftlib.load_model(tmp_path / "base", task=KIND, num_labels=3)
        tune(model, strategy, rank=2)
    rows = tokenize(data(), tokenizer, task=KIND)
    fit(model, rows, config=quick())
    model.config.id2label = {0: "none", 1: "met", 2: "saw"}
    save(model, tmp_path / "saved", tokenizer=tokenizer)
    back = load(tmp_path / "saved")
    assert back.config.id2label == model.config.id2label
    assert_close(
        torch.from_numpy(predict(back, rows, output="logits")), torch.from_numpy(predict(model, rows, output="logits")),
        atol=1e-6, rtol=0,
    )  # fmt: skip
    if not strategy:
        assert type(back) is type(model)
        again = AutoModelForRelationClassification.from_pretrained(tmp_path / "saved")
        assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_beside_another_task(tokenizer):
    encoder = transformers.AutoModel.from_config(tiny_config())
    model = MultiTaskModel(encoder, {"relation": Head(KIND, 3), "topic": Head("sequence-classification", 2)})
    plain = Dataset.from_dict({"text": ["ann met", "the bob saw a ann", "in rome"] * 8, "label": [0, 1, 1] * 8})
    parts = {"relation": tokenize(toy(), tokenizer, task=KIND), "topic": tokenize(plain, tokenizer)}
    run = fit(model, parts, eval_dataset=parts, tokenizer=tokenizer, config=quick(epochs=12, batch_size=9))
    assert {"relation/accuracy", "topic/accuracy"} <= set(run.metrics)
    assert run.metrics["relation/accuracy"] == run.metrics["topic/accuracy"] == 1.0
    alone = model.export("relation")
    assert kind_of(alone) == KIND
    batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in parts["relation"]])
    with torch.no_grad():
        assert_close(alone(**batch).logits, model(**batch, task="relation"), atol=1e-6, rtol=0)


def test_r_drop_compares_two_passes(tokenizer):
    rows = tokenize(data(), tokenizer, task=KIND)
    plain = fit(build(hidden_dropout_prob=0.1), rows, config=quick(epochs=3))
    twice = fit(build(hidden_dropout_prob=0.1), rows, config=quick(epochs=3, r_drop=1.0))
    assert twice.steps == plain.steps and steps(twice) != steps(plain)


# ------------------------------------------------------------------------------------------- the record is all


def test_the_kind_is_named_in_its_own_room_alone():
    """Outside tasks/ no line of code knows it: docstrings may."""
    for path in Path(ftlib.__file__).parent.rglob("*.py"):
        if path.parent.name == "tasks":
            continue
        tree = ast.parse(path.read_text("utf8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring
        for word in ("relation-classification", "RelationClassification", "marker_positions", "'spans'"):
            assert word not in ast.unparse(tree), (path, word)


def test_the_second_text_is_told_from_the_first():
    """The door passes on what the base takes, also where the model's own forward only hands it on."""
    model = auto_class("relation-classification").from_config(tiny_config("bert", num_labels=2)).eval()
    assert {"token_type_ids", "marker_positions", "position_ids"} <= inputs_of(model)
    row = {"input_ids": [2, 5, 6, 3, 7, 3], "token_type_ids": [0, 0, 0, 0, 1, 1], "marker_positions": [1, 2]}
    with torch.no_grad():
        expected = model(**{name: torch.tensor([value]) for name, value in row.items()}).logits
        without = model(**{n: torch.tensor([v]) for n, v in row.items() if n != "token_type_ids"}).logits
    torch.testing.assert_close(torch.from_numpy(predict(model, [row], output="logits")), expected)
    assert (expected - without).abs().max() > 1e-6


def test_positions_follow_tokens_that_a_mask_leaves_out():
    model = auto_class("relation-classification").from_config(tiny_config("bert", num_labels=2)).eval()
    row = {"input_ids": [2, 5, 6, 3], "marker_positions": [1, 2]}
    left = {"input_ids": [0, 0, 2, 5, 6, 3], "attention_mask": [0, 0, 1, 1, 1, 1], "marker_positions": [3, 4]}
    assert (predict(model, [row], output="logits") == predict(model, [left], output="logits")).all()
    for places in ([1, 4], [-1, 2]):
        with pytest.raises(ValueError, match="column 'marker_positions': expected positions of the row's tokens"):
            predict(model, [row | {"marker_positions": places}])


def test_prompts_are_refused():
    model = auto_class("relation-classification").from_config(tiny_config("bert", num_labels=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING moves the tokens whose positions the head reads; use LoRA"):
        tune(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
