"""Vectors of texts: losses, gradients and folders equal to sentence-transformers', rows by hand, all that tasks do."""

import json
import math

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import tiny_config
from datasets import Dataset
from scipy import stats
from test_fit import quick, same, steps, weights
from torch.testing import assert_close

import ftlib
from ftlib.core.batches import collate
from ftlib.engine import fit as training
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate, predict
from ftlib.engine.saving import load, save
from ftlib.inputs.pretrained import load_model
from ftlib.inputs.sentence_folders import recipe_of
from ftlib.inputs.tokenizing import tokenize
from ftlib.methods.features import extract_features
from ftlib.methods.multitask import Head
from ftlib.methods.tuning import merge, tune
from ftlib.methods.unpadding import is_unpadded, unpad
from ftlib.tasks import embedding
from ftlib.tasks.embedding import cosine, in_batch, matryoshka, triplet
from ftlib.tasks.task import TASKS, auto_class, class_named, kind_of, tasks_of

KIND = "sentence-embedding"
ANCHORS = ["the film is good", "we book a flight", "dull plot", "a film and the plot to book from boston"]
POSITIVES = ["a great film", "flight to denver", "the plot is not very fun and not good", "boston"]
NEGATIVES = ["bad", "you is a fun film", "good", "the flight"]
SCORES = [0.9, 0.25, -1.0, 0.0]
TRIPLETS = {"anchor": ANCHORS, "positive": POSITIVES, "negative": NEGATIVES}
PAIRS = {"anchor": ANCHORS, "positive": POSITIVES}
SCORED = {"text": ANCHORS, "text_pair": POSITIVES, "label": SCORES}


def build(model_type="bert", seed=0, pooling="mean", normalize=True, **options):
    config = tiny_config(model_type, **options)
    config.pooling, config.normalize = pooling, normalize
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto_class(KIND).from_config(config).eval()


def rows_of(table, tokenizer, **options):
    return tokenize(Dataset.from_dict(table), tokenizer, task=KIND, **options)


def batch_of(rows, side="right"):
    keep = ("input_ids", "token_type_ids", "text_lengths", "labels")
    return collate([{k: row[k] for k in keep if k in row} for row in rows], padding_side=side)


# ------------------------------------------------------------------------------------------------------------ rows


def test_rows_hold_the_texts_one_after_the_other(tiny_tokenizer):
    done = rows_of(TRIPLETS, tiny_tokenizer)
    assert set(done.column_names) == {"input_ids", "token_type_ids", "text_lengths", "labels"}
    for i, row in enumerate(done):
        parts = [tiny_tokenizer(texts[i])["input_ids"] for texts in TRIPLETS.values()]
        assert row["input_ids"] == [*parts[0], *parts[1], *parts[2]] and row["labels"] == 1
        assert row["text_lengths"] == [len(part) for part in parts]
    assert done.features["labels"].dtype == "int64"
    scored = rows_of(SCORED, tiny_tokenizer)
    assert list(scored["labels"]) == SCORES and scored[0]["text_lengths"] == [6, 5]
    assert list(rows_of({**SCORED, "label": [1, 0, -1, 1]}, tiny_tokenizer)["labels"]) == [1.0, 0.0, -1.0, 1.0]
    named = {"text": ANCHORS, "text_pair": POSITIVES, "similarity": SCORES}
    assert list(rows_of(named, tiny_tokenizer, label="similarity")["labels"]) == SCORES
    assert [row["text_lengths"] for row in rows_of(PAIRS, tiny_tokenizer, max_length=4)] == [[4, 4]] * 3 + [[4, 3]]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"anchor": ["a", ""], "positive": ["b", "b"]}, ValueError, "row 1, column 'anchor': the text is empty"),
        ({"anchor": ["a", "b"], "positive": ["b", None]}, TypeError, "row 1, column 'positive': expected text"),
        ({**PAIRS, "negative": ["a", "b", " ", "a"]}, ValueError, "row 2, column 'negative': the text is empty"),
        ({**SCORED, "label": [0.5, 4.2, 0.0, 0.0]}, ValueError, "row 1, column 'label': the score is 4.2; .* divide"),
        ({**SCORED, "label": [0.5, math.nan, 0.0, 0.0]}, ValueError, "row 1, column 'label': the score is nan"),
        ({**SCORED, "label": [0.5, None, 0.0, 0.0]}, TypeError, "row 1, column 'label': None is no score"),
        ({**SCORED, "label": ["a", "b", "a", "a"]}, TypeError, "row 0, column 'label': 'a' is no score"),
        ({"text": ANCHORS}, ValueError, "needs anchor and positive and negative or anchor and positive or text and"),
    ],
)
def test_bad_rows_are_refused_by_row(tiny_tokenizer, table, error, message):
    with pytest.raises(error, match=message):
        rows_of(table, tiny_tokenizer)
    if "label" not in table and "anchor" in table:
        return
    with pytest.raises(ValueError, match="tokens, the limit is 4; cut it or set truncation=True"):
        rows_of(SCORED, tiny_tokenizer, max_length=4, truncation=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_lengths": [3, 3]}, r"rows row 1, column 'text_lengths': \[3, 3\]; .* 5 together"),
        ({"text_lengths": [5, 0]}, "rows row 1, column 'text_lengths'.*one at least a text"),
        ({"text_lengths": [2.0, 3.0]}, "rows row 1, column 'text_lengths'"),
        ({"text_lengths": [2, 2, 1]}, "row 1.*'text_lengths'.* one shape in all rows"),
        ({"labels": 0}, "rows row 1, column 'labels': 0 is a whole number; write a score as 0.0"),
        ({"labels": 1.5}, "the score is 1.5; a cosine lies from -1 to 1"),
        ({"labels": True}, "True is no score"),
        ({"input_ids": [2, 5, 3, 2, 99]}, "id 99 is outside"),
    ],
)
def test_the_door_refuses_rows_that_are_no_texts(change, message):
    good = {"input_ids": [2, 5, 3, 2, 3], "text_lengths": [3, 2], "labels": 1}
    with pytest.raises((ValueError, TypeError), match=message.replace("rows row", "train_dataset row")):
        fit(build(), [good, good | change], config=quick())


def test_the_longest_text_counts_not_all_of_them():
    model = build(max_position_embeddings=12)
    row = {"input_ids": [2, *[5] * 8, 3] * 3, "text_lengths": [10, 10, 10], "labels": 1}
    assert predict(model, [row]).shape == (1, 3, 16)
    with pytest.raises(ValueError, match="20 tokens, the model takes 12; tokenize with max_length=12"):
        predict(model, [row | {"text_lengths": [10, 20]}])


# ------------------------------------------------------------------------------------------------------- the model

LLAMA = dict(num_key_value_heads=2)
GPT2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=40)
TYPES = [("bert", {}), ("modernbert", {}), ("roberta", {}), ("distilbert", {}), ("gpt2", GPT2), ("llama", LLAMA)]


@pytest.mark.parametrize("pooling", embedding.POOLINGS)
@pytest.mark.parametrize(("model_type", "options"), TYPES)
def test_a_vector_is_that_of_its_text_alone(tiny_tokenizer, model_type, options, pooling):
    model = build(model_type, pooling=pooling, **options)
    rows = rows_of(TRIPLETS, tiny_tokenizer)
    rows = rows.remove_columns("token_type_ids")  # which some models embed, and their own tokenizers don't make
    with torch.no_grad():
        expected = []
        for texts in zip(*TRIPLETS.values(), strict=True):
            for text in texts:
                ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
                hidden = model.base_model(ids).last_hidden_state
                expected.append(embedding.pool(hidden, torch.ones_like(ids), pooling)[0])
        expected = torch.nn.functional.normalize(torch.stack(expected), dim=-1).view(4, 3, -1)
    for side in ("right", "left"):
        inputs = {k: v for k, v in batch_of(rows, side).items() if k != "labels"}
        with torch.no_grad():
            assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert_close(torch.from_numpy(predict(model, rows)), expected, atol=1e-5, rtol=0)
    unpad(model)
    assert is_unpadded(model)
    assert_close(torch.from_numpy(predict(model, rows)), expected, atol=1e-5, rtol=0)
    assert isinstance(model, transformers.PreTrainedModel) and kind_of(model) == KIND
    assert tasks_of(model) == {"": (KIND, 16)}


def test_normalize_is_a_setting(tiny_tokenizer):
    plain, unit = build(normalize=False), build()
    free = predict(plain, ANCHORS, tokenizer=tiny_tokenizer)
    assert free.shape == (4, 16) and np.abs(np.linalg.norm(free, axis=1) - 1).max() > 0.01
    found = predict(unit, ANCHORS, tokenizer=tiny_tokenizer)
    np.testing.assert_allclose(found, free / np.linalg.norm(free, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ValueError, match="pooling='sum': choose one of mean, cls"):
        build(pooling="sum")


def test_texts_alone_give_vectors_and_pairs_are_refused(tiny_tokenizer):
    model = build(pooling="cls")
    found = predict(model, ANCHORS, tokenizer=tiny_tokenizer)
    np.testing.assert_allclose(found, predict(model, rows_of(PAIRS, tiny_tokenizer))[:, 0], atol=1e-6)
    np.testing.assert_allclose(found, extract_features(model, ANCHORS, tokenizer=tiny_tokenizer), atol=1e-6)
    with pytest.raises(TypeError, match="data holds pairs, but each text is a vector"):
        predict(model, [*zip(ANCHORS, POSITIVES, strict=True)], tokenizer=tiny_tokenizer)
    assert predict(model, [], tokenizer=tiny_tokenizer).shape == (0, 16)


def test_what_can_not_be():
    with pytest.raises(ValueError, match="vectors of texts are read off an encoder or a decoder; t5 is both"):
        auto_class(KIND).from_config(transformers.T5Config())
    with pytest.raises(ValueError, match="task='sentence-embedding': choose one of"):
        Head(KIND, 1)
    rows = [{"input_ids": [2, 5, 3, 2, 3], "text_lengths": [3, 2], "labels": 1}] * 2
    with pytest.raises(ValueError, match="fnet reads padding, so a row's texts"):
        fit(build("fnet"), rows, config=quick())
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        tune(build(), peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="rows of 1 texts, the loss needs 2: anchor and positive"):
        fit(build(), [{"input_ids": [2, 5, 3], "labels": 1}] * 2, config=quick())
    with pytest.raises(ValueError, match="rows of 2 texts, the loss needs 3: anchor and positive and negative"):
        fit(build(), rows, config=quick(), loss=triplet)
    with pytest.raises(ValueError, match="the cosine loss needs scores, floats"):
        fit(build(), rows, config=quick(), loss=cosine)
    assert class_named("BertForSentenceEmbedding", {"model_type": "bert"}) is type(build())
    assert set(TASKS[KIND].vectors) == {"pooling", "normalize"}


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(training.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="compares vectors of all rows, and a process has its own alone"):
        training._check(build(), {"": (KIND, 16)}, quick(), None, [], [])


# ------------------------------------------------------------------------- losses, as sentence-transformers has them


def stock(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


LOSSES = {  # name -> (ours, theirs by the module of their losses, columns)
    "in-batch, pairs": (in_batch, lambda m, losses: losses.MultipleNegativesRankingLoss(m), PAIRS),
    "in-batch, triplets": (in_batch, lambda m, losses: losses.MultipleNegativesRankingLoss(m), TRIPLETS),
    "cosine": (cosine, lambda m, losses: losses.CosineSimilarityLoss(m), SCORED),
    "triplet": (triplet, lambda m, losses: losses.TripletLoss(m), TRIPLETS),
    "matryoshka": (
        matryoshka(in_batch, [16, 8, 4], [1.0, 0.5, 2.0]),
        lambda m, losses: losses.MatryoshkaLoss(m, losses.MultipleNegativesRankingLoss(m), [16, 8, 4], [1, 0.5, 2]),
        TRIPLETS,
    ),
    "matryoshka, triplet": (
        matryoshka(triplet, [16, 4]), lambda m, losses: losses.MatryoshkaLoss(m, losses.TripletLoss(m), [16, 4]),
        TRIPLETS,
    ),
    "matryoshka, cosine": (
        matryoshka(cosine, [8]), lambda m, losses: losses.MatryoshkaLoss(m, losses.CosineSimilarityLoss(m), [8]), SCORED
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("mean", False), ("max", True)])
def test_loss_and_gradients_are_sentence_transformers(tiny_tokenizer, tmp_path, name, pooling, normalize):
    ours, theirs, table = LOSSES[name]
    model, rows = build(pooling=pooling, normalize=normalize), rows_of(table, tiny_tokenizer)
    twin = stock(save(model, tmp_path / "m", tiny_tokenizer)).eval()
    from sentence_transformers.sentence_transformer import losses

    labels = torch.tensor(rows["labels"])
    columns = [twin.preprocess(texts) for key, texts in table.items() if key != "label"]
    expected = theirs(twin, losses)(columns, labels)
    expected.backward()
    batch = batch_of(rows)
    vectors = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    found = ours(vectors, batch["labels"]) / len(rows)
    found.backward()
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wanted = {n: p.grad for n, p in twin[0].auto_model.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in model.base_model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and len(got) > 20
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3
    for key, gradient in wanted.items():
        assert_close(got[key], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max())), rtol=1e-5, msg=key)


def test_losses_by_hand():
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 3.0]]])  # cosines: 0 0 in row 0, 1 1 in row 1
    expected = -math.log(1 / 2) - math.log(1 / 2)
    assert in_batch(vectors, scale=2.0).item() == pytest.approx(expected)
    third = torch.cat([vectors, torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])], dim=1)
    row0 = -math.log(1 / (2 + math.exp(2) + math.exp(2 / math.sqrt(2))))
    row1 = -math.log(math.exp(2) / (2 * math.exp(2) + 1 + math.exp(2 / math.sqrt(2))))
    assert in_batch(third, scale=2.0).item() == pytest.approx(row0 + row1, abs=1e-5)
    assert cosine(vectors, torch.tensor([0.5, 0.5])).item() == pytest.approx(0.5)
    near = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 7.0]], [[0.0, 0.0], [3.0, 4.0], [0.0, 70.0]]])
    assert triplet(near).item() == pytest.approx(5 - 7 + 5, abs=1e-4)
    assert triplet(near, margin=1.0).item() == 0
    for widths, shares, message in (([], None, "0 weights for 0 widths"), ([0], None, "widths=0"), ([2], [], "0 wei")):
        with pytest.raises(ValueError, match=message):
            matryoshka(in_batch, widths, shares)
    with pytest.raises(ValueError, match="widths=3: the vectors have 2 numbers"):
        matryoshka(in_batch, [3])(vectors, None)


def test_in_half_precision_the_cosines_are_still_whole():
    torch.manual_seed(0)
    vectors = torch.randn(8, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert in_batch(vectors).item() == pytest.approx(in_batch(vectors).item())
        found = in_batch(vectors)
    assert_close(found, in_batch(vectors))


# ------------------------------------------------------------------------------------------------ training, scoring


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("table", [PAIRS, SCORED, TRIPLETS])
def test_it_is_learnt(tiny_tokenizer, unpadded, table):
    train = rows_of(table, tiny_tokenizer)
    model = unpad(build()) if unpadded else build()
    before = evaluate(model, train)
    run = fit(model, train, eval_dataset=train, tokenizer=tiny_tokenizer, config=quick(epochs=30, learning_rate=5e-3))
    assert run.metrics["loss"] < before["loss"] / 3
    best = "spearman" if table is SCORED else "accuracy_at_1"
    assert run.metrics[best] == pytest.approx(1.0) and evaluate(model, train) == pytest.approx(run.metrics, abs=1e-5)


def test_scores_by_hand(tiny_tokenizer):
    model = build()
    found, vectors = evaluate(model, rows_of(SCORED, tiny_tokenizer)), predict(model, rows_of(SCORED, tiny_tokenizer))
    cosines = (vectors[:, 0] * vectors[:, 1]).sum(-1)
    assert found["spearman"] == pytest.approx(stats.spearmanr(cosines, SCORES).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(cosines, SCORES).statistic, abs=1e-6)
    assert found["loss"] == pytest.approx(np.square(cosines - SCORES).mean(), abs=1e-6)
    triplets = rows_of(TRIPLETS, tiny_tokenizer)
    found, vectors = evaluate(model, triplets), predict(model, triplets)
    nearest = (vectors[:, 0] @ np.concatenate([vectors[:, 1], vectors[:, 2]]).T).argmax(1)
    assert found["accuracy_at_1"] == np.mean(nearest == np.arange(4)) and set(found) == {"loss", "accuracy_at_1"}
    assert embedding.score([[[1, 0], [2, 0]], [[0, 1], [1, 1]]], [1, 1]) == {"accuracy_at_1": 1.0}
    assert embedding.score([[[1, 0], [0, 2]], [[1, 0], [1, 0]]], [1, 1]) == {"accuracy_at_1": 0.5}
    assert embedding.score([[[1, 0], [1, 0]], [[1, 0], [2, 0]]], [1, 1]) == {"accuracy_at_1": 1.0}  # a tie counts


def test_patience_knows_the_metric(tiny_tokenizer):
    for table, metric in ((PAIRS, "accuracy_at_1"), (SCORED, "spearman")):
        train = rows_of(table, tiny_tokenizer)
        run = fit(build(), train, eval_dataset=train, config=quick(patience=2, metric=metric))
        assert metric in run.metrics
        with pytest.raises(ValueError, match=f"metric='accuracy': evaluation gives loss, {metric}"):
            fit(build(), train, eval_dataset=train, config=quick(patience=2, metric="accuracy"))


@pytest.mark.parametrize("table", [PAIRS, SCORED, TRIPLETS])
@pytest.mark.parametrize("sizing", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"max_tokens": 30}])
def test_micro_batches_are_as_the_whole_step(tiny_tokenizer, table, sizing):
    train = rows_of(table, tiny_tokenizer)
    whole, cut = build(), build()
    config = dict(optimizer="sgd", learning_rate=0.1, max_grad_norm=None)
    one = fit(whole, train, tokenizer=tiny_tokenizer, config=quick(**config))
    other = fit(cut, train, tokenizer=tiny_tokenizer, config=quick(**config, **sizing))
    assert steps(other, "micro_batches")[0] > 1 == steps(one, "micro_batches")[0]
    assert steps(other) == pytest.approx(steps(one), abs=1e-5)
    for name, expected in weights(whole).items():
        assert_close(weights(cut)[name], expected, atol=1e-5, rtol=0, msg=name)
    assert not same(weights(build()), weights(whole))


def test_both_passes_have_the_same_dropout(tiny_tokenizer):
    model, seen = build(hidden_dropout_prob=0.2), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    fit(model, rows_of(PAIRS, tiny_tokenizer), config=quick(epochs=1, micro_batch_size=2))
    assert len(seen) == 4  # two micro-batches, twice
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    model.train()
    assert not torch.equal(model(**batch_of(rows_of(PAIRS, tiny_tokenizer))).logits, torch.cat(seen[:2]))


def test_own_losses_and_what_they_see(tiny_tokenizer):
    train, shapes = rows_of(TRIPLETS, tiny_tokenizer), []

    def own(vectors, labels):
        shapes.append((tuple(vectors.shape), labels.dtype))
        return matryoshka(in_batch, [16, 4])(vectors, labels)

    model = build()
    run = fit(model, train, eval_dataset=train, config=quick(micro_batch_size=2), loss=own)
    assert {shape for shape, _ in shapes} == {(4, 3, 16), (8, 3, 16)}  # the whole step, and twice, to see if it sums
    assert run.metrics["loss"] != pytest.approx(evaluate(model, train)["loss"])
    with pytest.raises(ValueError, match="a mean; fit needs the sum over items"):
        fit(build(), train, config=quick(), loss=lambda v, y: triplet(v) / len(v))


def test_the_stock_trainer_takes_it_too(tiny_tokenizer, tmp_path):
    model, rows = build(), rows_of(PAIRS, tiny_tokenizer)
    before = weights(model)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=0.01, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=batch_of)
    trainer.train()
    expected = evaluate(build(), rows)["loss"]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)
    assert not same(before, weights(model))


# ------------------------------------------------------------------------------------------------ saving, loading


@pytest.mark.parametrize(("model_type", "options"), [*TYPES[:4], TYPES[5]])
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("lasttoken", True)])
def test_it_opens_in_sentence_transformers(tiny_tokenizer, tmp_path, model_type, options, pooling, normalize):
    model = build(model_type, pooling=pooling, normalize=normalize, **options)
    expected = predict(model, ANCHORS, tokenizer=tiny_tokenizer)
    folder = save(model, tmp_path / "m", tiny_tokenizer)
    np.testing.assert_allclose(stock(folder).encode(ANCHORS), expected, atol=1e-5)
    np.testing.assert_allclose(extract_features(folder, ANCHORS), expected, atol=1e-5)
    recipe = recipe_of(str(folder))
    assert (recipe.pooling, recipe.normalize) == (pooling, normalize)
    for back in (load(folder), load_model(folder, task=KIND)):
        assert type(back) is type(model) and same(weights(back), weights(model))
        np.testing.assert_allclose(predict(back, ANCHORS, tokenizer=tiny_tokenizer), expected, atol=1e-6)


@pytest.mark.parametrize("how", ["lora", "peft"])
def test_adapters_keep_how_vectors_are_made(tiny_tokenizer, tmp_path, how):
    base = build(pooling="cls", normalize=False).base_model
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", task=KIND, pooling="max", normalize=True)
    assert (model.config.pooling, model.config.normalize) == ("max", True)
    tune(model, *(["lora"] if how == "lora" else [peft.LoraConfig(r=2, target_modules=["query", "value"])]))
    before = weights(model)
    fit(model, rows_of(PAIRS, tiny_tokenizer), config=quick(micro_batch_size=2))
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved and all("lora" in name for name in moved)
    expected = predict(model, ANCHORS, tokenizer=tiny_tokenizer)
    back = load(save(model, tmp_path / "adapter", tiny_tokenizer))
    np.testing.assert_allclose(predict(back, ANCHORS, tokenizer=tiny_tokenizer), expected, atol=1e-6)
    whole = save(merge(model), tmp_path / "whole", tiny_tokenizer)
    np.testing.assert_allclose(stock(whole).encode(ANCHORS), expected, atol=1e-5)


def test_another_model_takes_its_place(tiny_model, tiny_tokenizer, tmp_path):
    folder = save(build(), tmp_path / "m", tiny_tokenizer)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"q": "x "}}))
    (folder / "notes.txt").write_text("mine")
    assert {"modules.json", "1_Pooling", "sentence_bert_config.json"} <= {path.name for path in folder.iterdir()}
    save(tiny_model(), folder)
    left = {path.name for path in folder.iterdir()}
    assert not left & {"modules.json", "1_Pooling", "sentence_bert_config.json", "config_sentence_transformers.json"}
    assert {"notes.txt", "tokenizer.json", "model.safetensors"} <= left
    save(build(normalize=False), folder, tiny_tokenizer)
    assert recipe_of(str(folder)).normalize is False


def test_folders_with_more_than_pooling_are_refused(tiny_model, tiny_tokenizer, tmp_path):
    stock_modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    tiny_model("encoder").save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    parts = [stock_modules.Transformer(str(tmp_path / "plain")), stock_modules.Pooling(16, "cls")]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "good"))
    model = load_model(tmp_path / "good", task=KIND)
    assert (model.config.pooling, model.config.normalize) == ("cls", False)
    np.testing.assert_allclose(
        predict(model, ANCHORS, tokenizer=tiny_tokenizer), stock(tmp_path / "good").encode(ANCHORS), atol=1e-5
    )
    more = SentenceTransformer(modules=[*parts, stock_modules.Dense(16, 4)], device="cpu")
    more.save(str(tmp_path / "more"))
    with pytest.raises(ValueError, match=r"modules\.json asks for Dense, which this task has not"):
        load_model(tmp_path / "more", task=KIND)


def test_the_front_door(tiny_tokenizer, tmp_path):
    build().base_model.save_pretrained(tmp_path)
    model = ftlib.load_model(tmp_path, task=KIND)
    assert (model.config.pooling, model.config.normalize) == ("mean", True) and ftlib.embedding is embedding
    assert same(weights(model.base_model), weights(build().base_model))
    with pytest.raises(ValueError, match="this task has 1 outputs: leave out num_labels"):
        ftlib.load_model(tmp_path, task=KIND, num_labels=3)
