"""Tokenizer, config, embeddings, columns and class names agree, or it is said: each row has the logits it has alone.

The right value is always the stock model on the row alone, in a batch of one, without padding.
"""

import copy
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.testing import assert_close

import ftlib
from ftlib.inputs.agreement import Padding, agree, matched, name_classes, vocabulary
from ftlib.inputs.rows import rows_for
from ftlib.methods.multitask import Head, MultiTaskModel

LAYERS = dict(vocab_size=64, num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32)
BERT = LAYERS | dict(max_position_embeddings=40, pad_token_id=0, hidden_dropout_prob=0.0, initializer_range=0.3,
                     attention_probs_dropout_prob=0.0)  # fmt: skip
LLAMA = LAYERS | dict(max_position_embeddings=40, num_key_value_heads=2, initializer_range=0.3)
GPT2 = dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.3, embd_pdrop=0.0,
            attn_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
XLNET = dict(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32, dropout=0.0, summary_last_dropout=0.0,
             pad_token_id=5, initializer_range=0.3)  # fmt: skip
XLM = dict(vocab_size=64, emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=40, pad_token_id=2, dropout=0.0,
           attention_dropout=0.0, init_std=0.3, embed_init_std=0.3)  # fmt: skip
BART = dict(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, dropout=0.0,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40,
            pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, init_std=0.3)  # fmt: skip
T5 = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
          eos_token_id=2, decoder_start_token_id=0, initializer_factor=5.0)  # fmt: skip
OPT = dict(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.0,
           max_position_embeddings=40, pad_token_id=1, word_embed_proj_dim=16, init_std=0.3)  # fmt: skip


def built(model_type, auto="SequenceClassification", **options):
    config = transformers.AutoConfig.for_model(model_type, **{"num_labels": 2, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"AutoModelFor{auto}").from_config(config).eval()


def known(pad, side="right", **more):
    return SimpleNamespace(pad_token_id=pad, padding_side=side, **more)


def rows_of(count=9, end=None, low=6, seed=0):
    draw = random.Random(seed)
    lengths = [4 + 5 * i % 9 for i in range(count)]
    tail = [] if end is None else [end]
    return [{"input_ids": [draw.randrange(low, 64) for _ in range(n)] + tail, "labels": i % 2}
            for i, n in enumerate(lengths)]  # fmt: skip


def alone(model, rows):
    with torch.no_grad():
        found = [model(**{k: torch.tensor([v]) for k, v in row.items() if k != "labels"}).logits[0] for row in rows]
    return torch.stack(found)


def logits(model, rows, **options):
    return torch.from_numpy(ftlib.predict(model, rows, output="logits", **options))


def first_loss(model, rows, **options):
    config = ftlib.TrainConfig(max_steps=1, batch_size=len(rows), progress=False)
    return ftlib.fit(model, rows, config=config, **options).history[0]["loss"]


# ---------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("model_type", "options", "end"),
    [
        ("bert", BERT, None), ("roberta", BERT | {"pad_token_id": 1}, None),
        ("llama", LLAMA | {"pad_token_id": 0}, None), ("roberta-prelayernorm", BERT | {"pad_token_id": 1}, None),
        ("gpt2", GPT2 | {"pad_token_id": 3}, None), ("opt", OPT, None),
        ("bloom", dict(vocab_size=64, hidden_size=16, n_layer=2, n_head=2, pad_token_id=3), None), ("bart", BART, 2),
        ("t5", T5, 2), ("xlnet", XLNET, None), ("xlnet", XLNET | {"summary_type": "mean"}, None),
        ("xlnet", XLNET | {"summary_type": "first"}, None), ("xlm", XLM, None),
        ("xlm", XLM | {"summary_type": "last"}, None),
        ("fnet", BERT | {"tpu_short_seq_length": 40}, None), ("convbert", BERT | {"embedding_size": 16}, None),
        ("nystromformer", BERT, None), ("yoso", BERT, None),
    ],
)  # fmt: skip
def test_a_row_has_the_logits_it_has_alone_whatever_side_the_tokenizer_pads(model_type, options, end, side):
    model, rows = built(model_type, **options), rows_of(end=end)
    expected = alone(model, rows)
    tokenizer = known(model.config.pad_token_id, side)
    assert_close(logits(model, rows, tokenizer=tokenizer), expected, atol=2e-5, rtol=0)
    loss = torch.nn.functional.cross_entropy(expected, torch.tensor([row["labels"] for row in rows])).item()
    assert ftlib.evaluate(model, rows, tokenizer=tokenizer, batch_size=4)["loss"] == pytest.approx(loss, abs=1e-5)
    if model_type in ("xlnet", "llama", "fnet"):
        assert first_loss(model, rows, tokenizer=tokenizer) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("way", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_rows_behind_a_tuned_prompt(way):
    """PEFT passes vectors on, so a decoder's head can't see padding; PEFT on the row alone is right."""
    peft = pytest.importorskip("peft")
    model, rows = built("llama", **LLAMA | {"pad_token_id": 0}), rows_of()
    model = peft.get_peft_model(model, getattr(peft, way)(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    masked = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    assert_close(logits(model, rows), alone(model, masked), atol=1e-5, rtol=0)


def test_how_rows_are_padded():
    assert agree(built("xlnet", **XLNET)) == Padding(5, "left", False)
    assert agree(built("xlnet", "TokenClassification", **XLNET)) == Padding(5, "right", False)
    assert agree(built("xlm", **XLM | {"summary_type": "cls_index"})) == Padding(2, "right", True)
    assert agree(built("bert", **BERT)) == Padding(0, "right", False)
    assert agree(built("fnet", **BERT)) == Padding(0, "right", True)


@pytest.mark.parametrize("door", [logits, first_loss])
def test_a_padding_id_that_only_the_tokenizer_knows_goes_into_the_config(door):
    model, twin, rows = built("gpt2", **GPT2), built("gpt2", **GPT2, pad_token_id=3), rows_of()
    with pytest.warns(UserWarning, match=r"model.config.pad_token_id is 3 from now on .* not None"):
        found = door(model, rows, tokenizer=known(3))
    assert model.config.pad_token_id == 3 and torch.equal(torch.as_tensor(found), torch.as_tensor(door(twin, rows)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        agree(model, known(3))


@pytest.mark.parametrize("wrong", [-1, 64, 32000])
def test_a_padding_id_outside_the_embeddings_gives_way_to_the_tokenizers(wrong):
    model, rows = built("llama", **LLAMA, pad_token_id=3), rows_of()
    expected = alone(model, rows)
    model.config.pad_token_id = wrong
    with pytest.warns(UserWarning, match=f"pad_token_id is 3 from now on .* not {wrong}"):
        assert_close(logits(model, rows, tokenizer=known(3)), expected, atol=1e-5, rtol=0)
    model.config.pad_token_id = wrong
    for tokenizer in (None, known(None), known(64)):
        with pytest.raises(ValueError, match=r"llama needs a padding id below 64: .*tokenizer.eos_token.*resize_token"):
            logits(model, rows, tokenizer=tokenizer)


@pytest.mark.parametrize(("model_type", "options"), [("llama", LLAMA), ("gpt2", GPT2), ("roberta", BERT)])
def test_of_two_padding_ids_the_models_is_taken_and_it_is_said(model_type, options):
    model, rows = built(model_type, **options | {"pad_token_id": 1}), rows_of()
    with pytest.warns(UserWarning, match="the tokenizer pads with 3, the model with 1"):
        assert_close(logits(model, rows, tokenizer=known(3)), alone(model, rows), atol=1e-5, rtol=0)
    assert model.config.pad_token_id == 1


def test_a_head_that_needs_a_padding_id_is_refused_without_one_before_any_step():
    model, rows = built("gpt2", **GPT2), rows_of()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for door in (logits, first_loss, ftlib.evaluate):
        with pytest.raises(ValueError, match=r"model.config.pad_token_id is None.*tokenizer.pad_token = tokenizer.eos"):
            door(model, rows)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert_close(logits(model, rows, batch_size=1), alone(model, rows), atol=1e-6, rtol=0)  # it needs none
    assert agree(built("bert", **BERT | {"pad_token_id": None})) == Padding(0, "right", False)  # nor does this


def test_what_is_no_tokenizer():
    for door in (logits, first_loss, ftlib.evaluate):
        with pytest.raises(TypeError, match=r"tokenizer is 'minilm'; pass one, e.g. ftlib.load_tokenizer\('minilm'\)"):
            door(built("bert", **BERT), rows_of(), tokenizer="minilm")


def test_heads_of_a_model_with_several_tasks_read_their_own_configs():
    encoder = transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)).eval()
    model = MultiTaskModel(encoder, {"a": Head(), "b": Head(num_labels=3)}).eval()
    with pytest.warns(UserWarning, match="pad_token_id is 3 from now on"):
        found = logits(model, rows := rows_of(), tokenizer=known(3), task="b")
    assert {head.config.pad_token_id for head in model.heads.values()} == {3}
    assert_close(found, alone(model.export("b").eval(), rows), atol=1e-5, rtol=0)


def test_an_end_token_that_pads_too_changes_nothing():
    model, rows = built("bart", **BART | {"pad_token_id": 2}), rows_of(end=2)
    assert_close(logits(model, rows, tokenizer=known(2)), alone(model, rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "options"), [("bart", BART), ("t5", T5)])
@pytest.mark.parametrize("ids", [[7, 8, 9], [7, 2, 8, 2], [7, 8, 3]])  # cut by hand; one more; another's end token
def test_rows_without_the_end_token_that_the_head_reads(model_type, options, ids):
    model, rows = built(model_type, **options), [*rows_of(end=2), {"input_ids": ids, "labels": 0}]
    with pytest.raises(ValueError, match=rf"row 9, column 'input_ids': {ids.count(2)} end tokens \(id 2\)"):
        logits(model, rows)
    with pytest.raises(ValueError, match=r"train_dataset row 9.*model.config.eos_token_id"):
        first_loss(model, rows)


def test_ids_are_compared_with_the_embedding_table(tiny_model, tiny_tokenizer):
    model = tiny_model(vocab_size=27)  # config and table are too small for the tokenizer's last words
    assert len(tiny_tokenizer) > 27
    logits(model, ["good film"], tokenizer=tiny_tokenizer)  # unused words do no harm
    with pytest.raises(ValueError, match=r"row 1, .* outside 0..26.*model.resize_token_embeddings\(len\(tokenizer\)\)"):
        logits(model, ["good", "film."], tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match=r"row 1: id 30 is outside 0..26; .*resize_token_embeddings"):
        ftlib.extract_features(model, ["good", "film."], tokenizer=tiny_tokenizer)
    model.resize_token_embeddings(len(tiny_tokenizer))
    logits(model, ["good", "film."], tokenizer=tiny_tokenizer)
    model.config.vocab_size = 99  # the table decides
    assert vocabulary(model) == len(tiny_tokenizer)


# ---------------------------------------------------------------------------------------------------- columns


def boxes(row):
    return [[(7 * i) % 30, i, 60 + i, 90] for i in range(len(row["input_ids"]))]


@pytest.mark.parametrize(
    ("model_type", "options", "name", "value"),
    [
        ("layoutlm", BERT | {"max_2d_position_embeddings": 128}, "bbox", boxes),
        ("longformer", BERT | {"attention_window": [4, 4], "pad_token_id": 1}, "global_attention_mask",
         lambda row: [i % 2 for i in range(len(row["input_ids"]))]),
        ("bert", BERT, "position_ids", lambda row: [*range(1, 1 + len(row["input_ids"]))][::-1]),
        ("bert", BERT, "token_type_ids", lambda row: [i % 2 for i in range(len(row["input_ids"]))]),
        ("ernie", BERT | {"use_task_id": True, "task_type_vocab_size": 3}, "task_type_ids",
         lambda row: [2] * len(row["input_ids"])),
        ("gpt2", GPT2 | {"pad_token_id": 3}, "position_ids", lambda row: [*range(1, 1 + len(row["input_ids"]))]),
        ("modernbert", LAYERS | {"pad_token_id": 0, "initializer_range": 0.3, "max_position_embeddings": 40},
         "position_ids", lambda row: [*range(2, 2 + 2 * len(row["input_ids"]), 2)]),
    ],
)  # fmt: skip
def test_every_column_that_the_forward_takes_reaches_it(model_type, options, name, value):
    model, rows = built(model_type, **options), [row | {name: value(row)} for row in rows_of()]
    expected = alone(model, rows)
    assert (expected - alone(model, rows_of())).abs().max() > 1e-3  # it matters
    for data in (rows, Dataset.from_list(rows)):
        assert_close(logits(model, data), expected, atol=2e-5, rtol=0)
    loss = torch.nn.functional.cross_entropy(expected, torch.tensor([row["labels"] for row in rows])).item()
    assert ftlib.evaluate(model, rows)["loss"] == pytest.approx(loss, abs=1e-5)
    if model_type in ("bert", "ernie", "modernbert"):
        assert_close(logits(ftlib.unpad(model), rows), expected, atol=2e-5, rtol=0)
        ftlib.repad(model)
    if model_type in ("layoutlm", "bert", "longformer"):
        assert first_loss(model, rows) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"position_ids": [0]}, r"1 position_ids values for 2 input_ids"),
        ({"position_ids": [0, 40]}, r"'position_ids': id 40 is outside 0..39"),
        ({"position_ids": [0, 0.5]}, r"'position_ids': expected numbers"),
        ({"position_ids": [0, None]}, r"'position_ids': expected numbers"),
        ({"position_ids": ["0", "1"]}, r"'position_ids': expected numbers"),
        ({"bbox": [[0, 0, 1, 1]]}, r"1 bbox values for 2 input_ids"),
        ({"bbox": [[0, 0, 1, 1], [0, 0, 1]]}, r"'bbox': expected numbers"),
        ({"bbox": [[0, 0, 1, 1], [0, 0, 128, 1]]}, r"'bbox': value 128 is outside 0..127"),
        ({"attention_mask": [0.5, 1]}, r"'attention_mask': expected 0 \(hidden\) or 1"),
        ({"attention_mask": [1, 2]}, r"'attention_mask': expected 0"), ({"attention_mask": "ab"}, "expected 0"),
        ({"attention_mask": [0.0, 0.0]}, "no tokens; drop the row"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit(columns, message):
    model = built("layoutlm", **BERT | {"max_2d_position_embeddings": 128})
    with pytest.raises(ValueError, match=rf"data row 0.*{message}"):
        logits(model, [{"input_ids": [5, 6], **columns}])


def test_columns_of_no_common_form_are_refused_at_the_door():
    model = built("luke", **BERT | {"entity_vocab_size": 9, "entity_emb_size": 16})
    rows = [{"input_ids": [5, 6, 7], "entity_ids": [1, 2]}, {"input_ids": [5, 6], "entity_ids": [1, 2]}]
    with pytest.raises(ValueError, match=r"row 2, column 'entity_ids': neither a value a token nor of one shape"):
        logits(model, [*rows, {"input_ids": [5, 6], "entity_ids": [1]}])


def test_numbers_a_token_that_the_model_does_not_take_are_not_dropped_silently():
    model, plain = built("bert", **BERT), rows_of()
    rows = [row | {"bbox": boxes(row), "text": "x", "idx": 3, "special_tokens_mask": row["input_ids"]} for row in plain]
    for data in (rows, Dataset.from_list(rows)):
        with pytest.warns(UserWarning, match="data: the model takes no 'bbox', so that column is not read") as said:
            assert_close(logits(model, data), logits(model, plain))
        assert len([one for one in said if "takes no" in str(one.message)]) == 1


# ------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "mask", [[1, 0, 0, 1, 1], [1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [True, False, True, True, True], [1.0, 0.0, 1, 1, 1]]
)
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("bert", BERT), ("distilbert", dict(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32, pad_token_id=0,
                                           max_position_embeddings=40, initializer_range=0.3)),
        ("roberta", BERT | {"pad_token_id": 1}), ("gpt2", GPT2 | {"pad_token_id": 3}), ("bart", BART), ("xlnet", XLNET),
        ("modernbert", LAYERS | dict(pad_token_id=0, initializer_range=0.3, max_position_embeddings=40,
                                     local_attention=4, global_attn_every_n_layers=2)),
    ],
)  # fmt: skip
def test_tokens_behind_a_hole_in_the_mask_stay_in_their_places(model_type, options, mask):
    model, end = built(model_type, **options), 2 if model_type == "bart" else None
    row = {"input_ids": [7, 8, 9, end or 10, 11], "attention_mask": mask}
    with torch.no_grad():
        given = {"input_ids": torch.tensor([row["input_ids"]]), "attention_mask": torch.tensor([mask])}
        expected = model(**given | {"attention_mask": given["attention_mask"].long()}).logits
    rows = [row, *rows_of(4, end=end)]
    rows = [{key: value for key, value in one.items() if key != "labels"} for one in rows]
    assert_close(logits(model, rows)[:1], expected, atol=2e-5, rtol=0)
    if model_type in ("bert", "distilbert", "roberta", "modernbert"):
        assert_close(logits(ftlib.unpad(model), rows)[:1], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("unpadded", [False, True])
def test_tags_keep_to_their_tokens_around_a_hole(unpadded):
    model = built("bert", "TokenClassification", **BERT)
    row = {"input_ids": [0, 7, 8, 9, 10, 0], "attention_mask": [0, 1, 0, 1, 1, 0], "labels": [1, 0, 1, 1, 0, 1]}
    ids, mask, labels = (torch.tensor([row[name][1:5]]) for name in row)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, labels=labels)
    ftlib.unpad(model) if unpadded else None
    rows = [row, {"input_ids": [7] * 9, "labels": [-100] * 9}]
    found = torch.from_numpy(ftlib.predict(model, rows, output="logits")[0])
    seen = mask[0].bool()  # unpadded, a hidden token has no output
    assert found.shape == (4, 2)
    assert_close(found[seen], expected.logits[0][seen], atol=1e-5, rtol=0)
    if not unpadded:
        assert ftlib.evaluate(model, rows)["loss"] == pytest.approx(expected.loss.item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------- names of classes


def named(names, labels, ids=None, tags=False):
    label = List(ClassLabel(names=names)) if tags else ClassLabel(names=names)
    rows = {"input_ids": ids or [[5 + i, 9] for i in range(len(labels))], "labels": labels}
    return Dataset.from_dict(rows, features=Features({"input_ids": List(Value("int64")), "labels": label}))


def with_names(model, names):
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    return model


@pytest.mark.parametrize("names", [["b", "a"], ["B", "A"], ["a", "b"], ["b"]])
def test_labels_are_matched_with_the_models_classes_by_name(names):
    model = with_names(built("bert", **BERT), ["a", "b"])
    texts = [name.lower() for name in names] * 3  # by name
    expected = [{"input_ids": [5 + i, 9], "labels": "ab".index(name)} for i, name in enumerate(texts)]
    data = named(names, [*range(len(names))] * 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert ftlib.evaluate(model, data) == ftlib.evaluate(model, expected)
    assert any("matched by name" in str(one.message) for one in said) == (names[0].lower() != "a")
    assert first_loss(model, data) == pytest.approx(first_loss(built("bert", **BERT), expected), abs=1e-6)


def test_tags_are_matched_too_and_what_is_ignored_stays():
    model = with_names(built("bert", "TokenClassification", **BERT), ["O", "X"])
    data = named(["X", "O"], [[0, 1, -100]], [[5, 6, 7]], tags=True)
    with pytest.warns(UserWarning, match="matched by name: the data has X, O, the model O, X"):
        found = ftlib.evaluate(model, data)
    assert found == ftlib.evaluate(model, [{"input_ids": [5, 6, 7], "labels": [1, 0, -100]}])


def test_several_labels_a_text_are_put_into_the_models_order():
    model = with_names(built("bert", **BERT, problem_type="multi_label_classification"), ["a", "b"])
    features = Features({"input_ids": List(Value("int64")), "labels": List(ClassLabel(names=["b", "a"]), length=2)})
    data = Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "labels": [[1, 0], [1, 1]]}, features=features)
    rows = [{"input_ids": [5, 6], "labels": [0, 1]}, {"input_ids": [7, 8], "labels": [1, 1]}]
    with pytest.warns(UserWarning, match="matched by name"):
        assert ftlib.evaluate(model, data) == ftlib.evaluate(model, rows)
    model = with_names(model, ["a", "c"])
    with pytest.raises(ValueError, match=r"dataset: .*\['b', 'a'\], the model has \['a', 'c'\]; load the model"):
        ftlib.evaluate(model, data)


def test_other_names_are_refused_with_both_lists():
    model = with_names(built("bert", **BERT), ["a", "b"])
    for door in (ftlib.evaluate, first_loss):
        for names in (["a", "c"], ["a", "b", "c"], ["a", "A"]):
            has = str(names).replace("[", r"\[")
            with pytest.raises(ValueError, match=rf"dataset: the data has the classes {has}, the model has \['a', 'b'"):
                door(model, named(names, [0, 1]))
    ftlib.evaluate(model, named(["0", "1"], [0, 1]))  # numbers are no names
    assert matched(["us", "US"], ["US", "us"], "data") == [1, 0]  # capitals count where they tell two apart


def test_fit_names_the_classes_of_a_model_that_nobody_named():
    model = built("bert", **BERT)
    config = ftlib.TrainConfig(epochs=1, progress=False)
    train, other = named(["b", "a"], [0, 1, 1]), named(["a", "b"], [1, 0, 0])  # the same labels
    with pytest.warns(UserWarning, match="eval_dataset: labels are matched by name"):
        run = ftlib.fit(model, train, eval_dataset=other, config=config)
    assert model.config.id2label == {0: "b", 1: "a"} and model.config.label2id == {"b": 0, "a": 1}
    assert run.metrics["loss"] == pytest.approx(ftlib.evaluate(model, train)["loss"], abs=1e-6)
    with pytest.raises(ValueError, match=r"eval_dataset: .*\['c', 'd'\], the model has \['b', 'a'\]"):
        ftlib.fit(model, train, eval_dataset=named(["c", "d"], [0]), config=config)


def test_names_of_several_tasks():
    encoder = transformers.BertModel(transformers.BertConfig(**BERT)).eval()
    model = MultiTaskModel(encoder, {"a": Head(label_names=("x", "y")), "b": Head()}).eval()
    parts = {"a": named(["y", "x"], [0, 1, 1]), "b": named(["p", "q"], [0, 1, 1])}
    plain = {"a": [{"input_ids": [5 + i, 9], "labels": n} for i, n in enumerate([1, 0, 0])], "b": parts["b"]}
    with pytest.warns(UserWarning, match=r"\['a'\]: labels are matched by name"):
        assert ftlib.evaluate(model, parts) == ftlib.evaluate(model, plain)
    name_classes(model, {"a": ["n", "o"], "b": ["p", "q"]})
    assert model.heads["a"].config.id2label == {0: "x", 1: "y"}  # given ones stay
    assert model.heads["b"].config.label2id == {"p": 0, "q": 1} and model.specs["b"].label_names == ("p", "q")


def test_names_that_are_numbers_are_names_beside_numbers_alone():
    """Of "0", "1", … beside words only the number counts; beside other numbers each is a name."""
    rows = {"input_ids": [[7, 8], [9, 7]] * 2, "labels": [0, 1] * 2}
    for own, names, right in (
        (["0", "1", "2"], ["1", "2"], [1, 2]), (["1", "0"], ["0", "1"], [1, 0]), (["neg", "pos"], ["0", "1"], [0, 1]),
        (["0", "1"], ["neg", "pos"], [0, 1]),
    ):  # fmt: skip
        model = built("bert", **BERT | {"num_labels": len(own)})
        model.config.id2label = dict(enumerate(own))
        data = Dataset.from_dict(rows).cast_column("labels", ClassLabel(names=names))
        (part,) = rows_for(data, model, name="data")
        assert [row["labels"] for row in part] == right * 2


def test_more_names_than_classes_and_names_for_numbers_are_refused():
    data = Dataset.from_dict({"input_ids": [[7, 8]], "labels": [0]})
    data = data.cast_column("labels", ClassLabel(names=["a", "b", "c"]))
    for options, said in (({"num_labels": 2}, "has 2 classes in the model"), ({"num_labels": 1}, "needs numbers")):
        with pytest.raises(ValueError, match=rf"labels are the classes \['a', 'b', 'c'\], but .* {said}"):
            rows_for(data, built("bert", **BERT | options), name="data")


def test_a_transform_is_refused():
    data = Dataset.from_dict({"input_ids": [[7, 8]], "labels": [0]}).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=r"has a transform .* apply it with map first"):
        rows_for(data, built("bert", **BERT), name="data")


@pytest.mark.parametrize("model_type", ["funnel", "big_bird"])
def test_models_that_read_padding_get_rows_of_one_length(model_type):
    """BigBird, which a short row switches to full attention for good, answers the same the second time."""
    sizes = dict(vocab_size=64, pad_token_id=0, num_labels=2, hidden_dropout=0.0, initializer_range=0.5)
    sizes |= dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, block_size=2,
                  num_random_blocks=1, max_position_embeddings=64) if model_type == "big_bird" else dict(
        d_model=16, n_head=2, d_head=8, d_inner=16, block_sizes=[1, 1], num_decoder_layers=1)  # fmt: skip
    rows = [{"input_ids": list(range(5, 5 + n))} for n in (30, 29, 28, 7, 6)]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForTokenClassification.from_config(config).eval()
    found = [ftlib.predict(model, rows, output="logits", batch_size=size) for size in (5, 2)]
    for row, *values in zip(rows, *found, strict=True):
        with torch.no_grad():
            expected = copy.deepcopy(model)(torch.tensor([row["input_ids"]])).logits[0]
        for value in values:
            assert_close(torch.tensor(value), expected, atol=1e-5, rtol=0)
