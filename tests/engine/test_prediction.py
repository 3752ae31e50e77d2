"""Predictions come back in order, in every form, and evaluation gives scikit-learn's numbers."""

import numpy as np
import pytest
import sklearn.metrics
import torch
from datasets import Dataset, DatasetDict
from torch.testing import assert_close

from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate, logits_of, predict
from ftlib.engine.settings import TrainConfig
from ftlib.inputs.rows import parts_for, rows_for
from ftlib.inputs.tokenizing import tokenize
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.unpadding import unpad
from ftlib.tasks.task import tasks_of

TEXTS = ["the film is good and fun", "bad", "a great plot we book to boston", "dull film", "not fun"]


@pytest.fixture
def one_by_one(tiny_tokenizer):
    """Logits of every text, each alone in its batch."""

    def work(model, texts=TEXTS):
        out = []
        with torch.no_grad():
            for text in texts:
                out.append(model(**tiny_tokenizer(text, return_tensors="pt")).logits[0])
        return out

    return work


# ------------------------------------------------------------------------------------------------------- kinds


def test_kinds_of_models(tiny_model):
    for task in ("sequence-classification", "multi-label-classification", "token-classification"):
        assert tasks_of(tiny_model(task, 3)) == {"": (task, 3)}
    assert tasks_of(tiny_model("regression", 1)) == {"": ("regression", 1)}
    assert tasks_of(tiny_model("sequence-classification", 1)) == {"": ("regression", 1)}  # what Transformers trains
    several = MultiTaskModel(tiny_model("encoder"), {"a": Head(num_labels=3), "b": Head("regression", 1)})
    assert tasks_of(several) == {"a": ("sequence-classification", 3), "b": ("regression", 1)}
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(tiny_model("token-classification", 3), peft.LoraConfig(target_modules=["query"]))
    assert tasks_of(lora) == {"": ("token-classification", 3)}


@pytest.mark.parametrize("build", [lambda tiny: tiny("encoder"), lambda tiny: torch.nn.Linear(2, 2)])
def test_models_without_a_head(tiny_model, build):
    with pytest.raises(ValueError, match=r"has no classification head; load the model with task="):
        tasks_of(build(tiny_model))


# ------------------------------------------------------------------------------------------------------ predict


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_order_is_kept_and_batches_do_not_matter(tiny_model, tiny_tokenizer, one_by_one, batch_size):
    model = tiny_model(num_labels=3)
    found = predict(model, TEXTS, tokenizer=tiny_tokenizer, output="logits", batch_size=batch_size)
    assert found.dtype == np.float32
    assert_close(torch.from_numpy(found), torch.stack(one_by_one(model)), atol=1e-6, rtol=0)
    assert_close(
        predict(unpad(model), TEXTS, tokenizer=tiny_tokenizer, output="logits", batch_size=batch_size), found,
        atol=1e-6, rtol=0,
    )  # fmt: skip


def test_forms_of_a_class(tiny_model, tiny_tokenizer, one_by_one):
    model = tiny_model(num_labels=3)
    model.config.id2label = {0: "no", 1: "perhaps", 2: "yes"}
    logits = torch.stack(one_by_one(model))
    labels = predict(model, TEXTS, tokenizer=tiny_tokenizer)
    assert labels.dtype == np.int64 and labels.tolist() == logits.argmax(-1).tolist()
    assert predict(model, TEXTS, tokenizer=tiny_tokenizer, output="names") == [
        model.config.id2label[i] for i in labels.tolist()
    ]
    probabilities = predict(model, TEXTS, tokenizer=tiny_tokenizer, output="probabilities")
    assert probabilities.dtype == np.float32
    assert_close(torch.from_numpy(probabilities), logits.softmax(-1), atol=1e-6, rtol=0)


def test_forms_of_several_labels(tiny_model, tiny_tokenizer, one_by_one):
    model = tiny_model("multi-label-classification", 3)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    logits = torch.stack(one_by_one(model))
    labels = predict(model, TEXTS, tokenizer=tiny_tokenizer)
    assert labels.dtype == np.int64 and labels.tolist() == (logits.sigmoid() > 0.5).long().tolist()
    names = predict(model, TEXTS, tokenizer=tiny_tokenizer, output="names")
    assert names == [[f"LABEL_{i}" for i in range(3) if row[i]] for row in labels]
    probabilities = predict(model, TEXTS, tokenizer=tiny_tokenizer, output="probabilities")
    assert_close(torch.from_numpy(probabilities), logits.sigmoid(), atol=1e-6, rtol=0)


def test_forms_of_a_number(tiny_model, tiny_tokenizer, one_by_one):
    model = tiny_model("regression", 1)
    logits = torch.stack(one_by_one(model))
    numbers = predict(model, TEXTS, tokenizer=tiny_tokenizer)
    assert numbers.dtype == np.float32
    assert_close(torch.from_numpy(numbers), logits[:, 0], atol=1e-6, rtol=0)
    for output in ("logits", "names", "probabilities"):
        assert_close(
            torch.from_numpy(predict(model, TEXTS, tokenizer=tiny_tokenizer, output=output)), logits, atol=1e-6, rtol=0
        )
    assert predict(tiny_model("regression", 2), TEXTS, tokenizer=tiny_tokenizer).shape == (5, 2)


def test_tags_one_a_word(tiny_model, tiny_tokenizer, one_by_one):
    model = tiny_model("token-classification", 4)
    model.config.id2label = dict(enumerate("wxyz"))
    text = "films is unfun"  # [CLS] film ##s is un ##fun [SEP]
    first_pieces = one_by_one(model, [text])[0][[1, 3, 4]]
    for given in (text, text.split(), "  films \n is  unfun"):
        (labels,) = predict(model, [given], tokenizer=tiny_tokenizer)
        assert labels.tolist() == first_pieces.argmax(-1).tolist()
    (names,) = predict(model, [text], tokenizer=tiny_tokenizer, output="names")
    assert names == ["wxyz"[i] for i in labels]
    (logits,) = predict(model, [text], tokenizer=tiny_tokenizer, output="logits")
    assert_close(torch.from_numpy(logits), first_pieces, atol=1e-6, rtol=0)
    (probabilities,) = predict(model, [text], tokenizer=tiny_tokenizer, output="probabilities")
    assert_close(torch.from_numpy(probabilities), first_pieces.softmax(-1), atol=1e-6, rtol=0)


def test_tags_of_words_that_are_cut_off(tiny_model, tiny_tokenizer):
    model = tiny_model("token-classification", 4)
    both = [["good"] * 3, ["films", "is", "fun"]]
    short, long = predict(model, both, tokenizer=tiny_tokenizer, max_length=4)
    assert len(short) == len(long) == 3
    assert short[:2].min() >= 0 and short[2] == -100  # [CLS] good good [SEP]
    assert long[0] >= 0 and long[1:].tolist() == [-100, -100]
    assert predict(model, both, tokenizer=tiny_tokenizer, max_length=4, output="names")[1][1:] == [None, None]
    for output in ("logits", "probabilities"):
        values = predict(model, both, tokenizer=tiny_tokenizer, max_length=4, output=output)[1]
        assert np.isfinite(values[0]).all() and np.isnan(values[1:]).all()


def test_a_tokenized_dataset_gives_the_same(tiny_model, tiny_tokenizer):
    model = tiny_model(num_labels=3)
    data = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 0, 99]})  # labels play no part here
    done = tokenize(data, tiny_tokenizer)
    expected = predict(model, TEXTS, tokenizer=tiny_tokenizer, output="logits")
    for given in (done, done.to_list(), done.with_format("torch"), done.remove_columns("labels")):
        assert_close(predict(model, given, output="logits"), expected, atol=1e-6, rtol=0)
    padded = data.map(lambda b: dict(tiny_tokenizer(b["text"], padding="max_length")), batched=True)
    assert_close(predict(model, padded, output="logits"), expected, atol=1e-6, rtol=0)
    tagger = tiny_model("token-classification", 3)
    assert [len(row) for row in predict(tagger, done)] == [len(ids) for ids in done["input_ids"]]


def test_pairs_iterators_arrays_and_nothing(tiny_model, tiny_tokenizer):
    model = tiny_model(num_labels=3)
    expected = predict(model, TEXTS, tokenizer=tiny_tokenizer)
    assert np.array_equal(predict(model, iter(TEXTS), tokenizer=tiny_tokenizer), expected)
    assert np.array_equal(predict(model, np.array(TEXTS), tokenizer=tiny_tokenizer), expected)
    assert np.array_equal(predict(model, tuple(TEXTS), tokenizer=tiny_tokenizer), expected)
    pandas = pytest.importorskip("pandas")
    series = pandas.Series(TEXTS, index=[7, 8, 9, 10, 11])
    assert np.array_equal(predict(model, series, tokenizer=tiny_tokenizer), expected)
    assert predict(model, [("good", "bad")], tokenizer=tiny_tokenizer).shape == (1,)
    empty = predict(model, [], tokenizer=tiny_tokenizer)
    assert empty.shape == (0,) and empty.dtype == np.int64
    assert predict(model, [], tokenizer=tiny_tokenizer, output="probabilities").shape == (0, 3)
    assert predict(model, [], tokenizer=tiny_tokenizer, output="names") == []
    assert predict(tiny_model("token-classification", 3), [], tokenizer=tiny_tokenizer) == []


def test_long_texts_are_cut_to_what_the_model_takes(tiny_model, tiny_tokenizer):
    model = tiny_model(max_position_embeddings=8)
    cut = predict(model, ["good bad good bad good bad"], tokenizer=tiny_tokenizer, output="logits")
    for options in ({}, {"max_length": 30}):
        long = predict(model, ["good bad " * 30], tokenizer=tiny_tokenizer, output="logits", **options)
        assert_close(long, cut, atol=1e-6, rtol=0)


def test_modes_come_back_and_dropout_is_off(tiny_model, tiny_tokenizer):
    model = tiny_model(hidden_dropout_prob=0.5).train()
    model.bert.embeddings.eval()
    first = predict(model, TEXTS, tokenizer=tiny_tokenizer, output="logits")
    assert np.array_equal(first, predict(model, TEXTS, tokenizer=tiny_tokenizer, output="logits"))
    assert model.training and not model.bert.embeddings.training
    with pytest.raises(ValueError, match="row 0"):
        predict(model, [""], tokenizer=tiny_tokenizer)
    assert model.training


def test_one_task_of_several(tiny_model, tiny_tokenizer):
    heads = {"a": Head(num_labels=3, label_names=("x", "y", "z")), "b": Head("token-classification", 2)}
    model = MultiTaskModel(tiny_model("encoder"), heads).eval()
    labels = predict(model, TEXTS, tokenizer=tiny_tokenizer, task="a")
    assert np.array_equal(labels, predict(model.export("a"), TEXTS, tokenizer=tiny_tokenizer))
    assert predict(model, TEXTS, tokenizer=tiny_tokenizer, task="a", output="names") == ["xyz"[i] for i in labels]
    assert [len(row) for row in predict(model, TEXTS, tokenizer=tiny_tokenizer, task="b")] == [6, 1, 7, 2, 2]
    with pytest.raises(ValueError, match=r"say which task: task=\.\.\., one of a, b"):
        predict(model, TEXTS, tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="unknown task 'c'; the model has 'a', 'b'"):
        predict(model, TEXTS, tokenizer=tiny_tokenizer, task="c")
    with pytest.raises(ValueError, match="unknown task 'a'; the model has one task; leave task out"):
        predict(tiny_model(), TEXTS, tokenizer=tiny_tokenizer, task="a")


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        ("good film", {}, TypeError, r"data is a str; pass a list of texts, even for one: \[text\]"),
        ({"words": ["good"]}, {}, ValueError, r"data has no column 'input_ids' \(it has words\)"),
        ("no/such/file.csv", {}, FileNotFoundError, "no/such/file.csv"),
        (None, {}, TypeError, "data is a NoneType; pass a list"),
        (5, {}, TypeError, "data is a int"),
        (["good", None], {}, TypeError, "row 1, column 'text': expected text, got None"),
        (["good", " "], {}, ValueError, "row 1, column 'text': the text is empty"),
        (["good"], {"output": "label"}, ValueError, "output='label': choose one of labels, names"),
        (["good"], {"max_length": 0}, ValueError, "max_length=0"),
        (["good"], {"max_length": "5"}, ValueError, "max_length='5'"),
        (["good"], {"max_length": 5.5}, ValueError, "max_length=5.5"),
        (["good"], {"batch_size": 0}, ValueError, "batch_size=0"),
        ([{"words": "good"}], {}, ValueError, "data has no column 'input_ids'"),
        ([{"text": "good"}, {"text": None}], {}, TypeError, "row 1, column 'text': expected text, got None"),
        ([{"input_ids": [99]}], {}, ValueError, r"data row 0, column 'input_ids': id 99 is outside 0..63"),
        (Dataset.from_dict({"words": ["good"]}), {}, ValueError, "data has no column 'input_ids'"),
        (DatasetDict(test=Dataset.from_dict({"input_ids": [[1]]})), {}, TypeError, "data is a DatasetDict"),
    ],
)
def test_bad_data(tiny_model, tiny_tokenizer, data, options, kind, message):
    with pytest.raises(kind, match=message):
        predict(tiny_model(), data, tokenizer=tiny_tokenizer, **options)


class OfTorch(torch.utils.data.Dataset):
    """A length and numbers, as in PyTorch's tutorials; no iterator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_tables_of_texts_are_predicted_like_lists_of_them(tiny_model, tiny_tokenizer, tmp_path):
    pandas = pytest.importorskip("pandas")
    model = tiny_model(num_labels=3)
    table = {"text": TEXTS, "text_pair": TEXTS[::-1], "label": [0] * 5}
    frame = pandas.DataFrame(table, index=[7, 8, 9, 10, 11])
    frame.to_csv(tmp_path / "texts.csv", index=False)
    expected = predict(model, list(zip(TEXTS, TEXTS[::-1], strict=True)), tokenizer=tiny_tokenizer, output="logits")
    tables = (table, frame, Dataset.from_dict(table), frame.to_dict("records"), OfTorch(frame.to_dict("records")),
              tmp_path / "texts.csv", str(tmp_path / "texts.csv"))  # fmt: skip
    for data in tables:
        assert_close(predict(model, data, tokenizer=tiny_tokenizer, output="logits"), expected)
    words = [text.split() for text in TEXTS]
    tagger = tiny_model("token-classification", 3)
    tags = predict(tagger, Dataset.from_dict({"text": TEXTS, "tokens": words}), tokenizer=tiny_tokenizer)
    assert [found.tolist() for found in tags] == [t.tolist() for t in predict(tagger, words, tokenizer=tiny_tokenizer)]


def test_rows_of_a_torch_dataset_are_taken_by_every_door(tiny_model, tiny_tokenizer):
    labels = [0, 1, 2, 1, 0]
    rows = tokenize(Dataset.from_dict({"text": TEXTS, "label": labels}), tiny_tokenizer).to_list()
    encoded = tiny_tokenizer(TEXTS, padding=True, return_tensors="pt")  # padded tensors, a row each
    padded = [{k: v[i] for k, v in encoded.items()} | {"labels": torch.tensor(labels[i])} for i in range(5)]
    for data in (OfTorch(rows), OfTorch(padded), padded, torch.utils.data.Subset(OfTorch(padded), range(5))):
        model = tiny_model(num_labels=3)
        assert evaluate(model, data) == pytest.approx(evaluate(model, rows), abs=1e-6)
        assert_close(predict(model, data, output="logits"), predict(model, rows, output="logits"), atol=1e-6, rtol=0)
        config = TrainConfig(max_steps=1, batch_size=5, progress=False)
        assert fit(model, data, config=config).history[0]["loss"] == pytest.approx(
            evaluate(tiny_model(num_labels=3), rows)["loss"], abs=1e-6
        )


def test_texts_are_not_trained_on_and_it_is_said_what_to_call(tiny_model, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": TEXTS, "label": [0, 1, 0, 1, 0]})
    for data in (frame, frame.to_dict("records"), OfTorch(frame.to_dict("records")), str(tmp_path / "texts.csv"), TEXTS,
                 Dataset.from_pandas(frame), tmp_path / "texts.csv"):  # fmt: skip
        for door in (fit, evaluate):
            with pytest.raises((ValueError, TypeError), match=r"ftlib\.tokenize"):
                door(tiny_model(), data)
    unlabeled = Dataset.from_dict({"input_ids": [[5]], "label": [1]})
    with pytest.raises(ValueError, match=r"no 'labels'.*rename the column 'label' to 'labels'"):
        evaluate(tiny_model(), unlabeled)


def test_empty_tag_texts_and_missing_tokenizers(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="row 1, column 'text': the text is empty"):
        predict(tiny_model("token-classification", 3), ["good", "  "], tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="pass tokenizer="):
        predict(tiny_model(), ["good"])


# ----------------------------------------------------------------------------------------------------- evaluate


def test_classes_equal_scikit_learn(tiny_model, tiny_tokenizer, one_by_one):
    model = tiny_model(num_labels=3)
    labels = [0, 1, 2, 1, 0]
    found = evaluate(model, tokenize(Dataset.from_dict({"text": TEXTS, "label": labels}), tiny_tokenizer))
    logits = torch.stack(one_by_one(model))
    guesses = logits.argmax(-1).numpy()
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, guesses))
    assert found["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(labels, guesses, average="macro"))
    assert found["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))), abs=1e-6
    )
    ignoring = tokenize(Dataset.from_dict({"text": TEXTS, "label": [0, 1, -100, 1, -100]}), tiny_tokenizer)
    kept = [0, 1, 3]
    part = evaluate(model, ignoring, batch_size=2)
    assert part["accuracy"] == pytest.approx(np.mean(guesses[kept] == np.array(labels)[kept]))
    expected = torch.nn.functional.cross_entropy(logits[kept], torch.tensor([0, 1, 1]))
    assert part["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_several_labels_equal_scikit_learn(tiny_model, tiny_tokenizer, one_by_one):
    model = tiny_model("multi-label-classification", 3)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    labels = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 1, 0]], dtype=float)
    found = evaluate(model, tokenize(Dataset.from_dict({"text": TEXTS, "label": labels.tolist()}), tiny_tokenizer))
    logits = torch.stack(one_by_one(model))
    guesses = (logits > 0).long().numpy()
    assert found["f1_micro"] == pytest.approx(sklearn.metrics.f1_score(labels, guesses, average="micro"))
    assert found["accuracy"] == pytest.approx((labels == guesses).all(1).mean())
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(labels).float())
    assert found["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_numbers_equal_scikit_learn(tiny_model, tiny_tokenizer, one_by_one):
    # weights this large spread the predictions; BERT's 0.02 leaves them 0.3 % apart, and a correlation sees only that
    model = tiny_model("regression", 1, initializer_range=0.5)
    labels = [0.5, 1.0, -100.0, 2.0, 0.25]  # in regression -100 is a number like any other
    found = evaluate(model, tokenize(Dataset.from_dict({"text": TEXTS, "label": labels}), tiny_tokenizer))
    guesses = torch.stack(one_by_one(model))[:, 0].numpy()
    expected = sklearn.metrics.mean_squared_error(labels, guesses)
    assert found["mse"] == pytest.approx(expected, rel=1e-5) and found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["pearson"] == pytest.approx(np.corrcoef(labels, guesses)[0, 1], abs=1e-5)


def test_several_numbers_a_row_have_an_error_but_no_correlation(tiny_model, tiny_tokenizer):
    model = tiny_model("regression", 2)
    labels = [[0.5, 1.0]] * 5
    found = evaluate(model, tokenize(Dataset.from_dict({"text": TEXTS, "label": labels}), tiny_tokenizer))
    assert set(found) == {"loss", "mse"}
    assert found["mse"] == pytest.approx(found["loss"], rel=1e-5)


def test_tags_are_scored_by_the_entity(tiny_model, tiny_tokenizer):
    model = tiny_model("token-classification", 3)
    model.config.id2label = {0: "O", 1: "B-x", 2: "I-x"}
    with torch.no_grad():  # the tag is what the bias says, whatever the text
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    data = Dataset.from_dict({"tokens": [["films", "is"], ["bad"], ["fun"]], "tags": [[1, 0], [1], [-100]]})
    found = evaluate(model, tokenize(data, tiny_tokenizer, label="tags"))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["precision"] == pytest.approx(2 / 3) and found["recall"] == 1.0
    logits = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, 3)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0, 1]))
    assert found["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_several_tasks_are_named(tiny_model, tiny_tokenizer):
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head(num_labels=2), "b": Head("regression", 1)})
    a = tokenize(Dataset.from_dict({"text": TEXTS, "label": [0, 1, 1, 0, 1]}), tiny_tokenizer)
    b = tokenize(Dataset.from_dict({"text": TEXTS, "label": [0.0, 1.0, 2.0, 3.0, 4.0]}), tiny_tokenizer)
    found = evaluate(model, {"a": a, "b": b})
    assert {name.split("/")[0] for name in found} == {"a", "b"}
    alone = evaluate(model.export("a"), a)
    assert {f"a/{name}": value for name, value in alone.items()} == pytest.approx(
        {name: value for name, value in found.items() if name.startswith("a/")}, abs=1e-6
    )
    rows = [{**row, "labels": {"a": row["labels"]}} for row in a.to_list()]
    assert set(evaluate(model, rows)) == {name for name in found if name.startswith("a/")}
    mixture = {"any name": rows}
    assert evaluate(model, mixture) == pytest.approx(evaluate(model, rows))


def test_modes_come_back_after_evaluation(tiny_model, tiny_tokenizer):
    model = tiny_model().train()
    data = tokenize(Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1, 0]}), tiny_tokenizer)
    assert evaluate(model, data) == evaluate(model, data, progress=True, tokenizer=tiny_tokenizer)
    assert model.training and model.bert.training


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([{"input_ids": [1], "labels": 5}], ValueError, "dataset row 0, column 'labels': label 5 is outside 0..1"),
        ([{"input_ids": [1]}], ValueError, "dataset row 0: no 'labels'"),
        ([{"input_ids": [1], "labels": -100}], ValueError, r"every label is -100 \(ignored\)"),
        ([{"input_ids": [5] * 41, "labels": 0}], ValueError, "41 tokens, the model takes 40"),
        ([{"input_ids": [5], "token_type_ids": [2], "labels": 0}], ValueError, "id 2 is outside 0..1"),
        ({"a": [{"input_ids": [1], "labels": 1}]}, ValueError, "dataset has 'a', but the model has one task; pass one"),
        ({}, ValueError, "dataset is empty"),
        ([], ValueError, "dataset has zero examples"),
    ],
)
def test_what_can_not_be_evaluated(tiny_model, data, kind, message):
    with pytest.raises(kind, match=message):
        evaluate(tiny_model(), data)


def test_parts_of_several_tasks(tiny_model):
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head("regression", 1)})
    row = {"input_ids": [5], "labels": 1}
    [[name, rows]] = parts_for({"a": [row]}, model, name="data").items()
    assert name == "a" and list(rows) == [{"input_ids": [5], "labels": {"a": 1}}]
    with pytest.raises(ValueError, match=r"data\['c'\] row 0, .*labels for a task 'c'; the model has 'a', 'b'"):
        parts_for({"c": [row]}, model, name="data")
    with pytest.raises(ValueError, match=r"data\['b'\] row 0, column 'labels' \(b\)|data\['b'\] row 0: no 'labels'"):
        parts_for({"b": [{"input_ids": [5], "labels": None}]}, model, name="data")
    with pytest.raises(
        ValueError, match="data row 0, column 'labels': a plain label, but the model has the tasks a, b"
    ):
        rows_for([row], model, name="data")


def test_logits_of_nothing(tiny_model):
    assert logits_of(tiny_model(), []) == []
