"""Tokenizing, by hand on a vocabulary of a few words."""

import gc
import os
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, List, Sequence, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ftlib.engine.fit import fit
from ftlib.engine.prediction import predict
from ftlib.engine.settings import TrainConfig
from ftlib.inputs.tokenizing import encode_texts, tokenize
from ftlib.methods.features import extract_features

LOOSE = settings(
    deadline=None, max_examples=200, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
CLS, SEP, UNK = 2, 3, 1


@pytest.fixture
def ids(tiny_tokenizer):
    """Ids of the words and pieces of a string."""
    return lambda words: [tiny_tokenizer.convert_tokens_to_ids(word) for word in words.split()]


# ------------------------------------------------------------------------------------------------- tokenizing


def test_single_texts(tiny_tokenizer, ids):
    data = Dataset.from_dict({"text": ["the film is good", "bad"], "label": [1, 0], "note": ["x", "y"]})
    done = tokenize(data, tiny_tokenizer)
    assert set(done.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert done["input_ids"][0] == [CLS, *ids("the film is good"), SEP]
    assert done["input_ids"][1] == [CLS, *ids("bad"), SEP]
    assert list(done["labels"]) == [1, 0]
    assert done["attention_mask"][1] == [1, 1, 1]


def test_words_fall_into_pieces(tiny_tokenizer, ids):
    done = tokenize(Dataset.from_dict({"text": ["films unfun xyz"]}), tiny_tokenizer)
    assert done["input_ids"][0] == [CLS, *ids("film ##s un ##fun"), UNK, SEP]
    assert "labels" not in done.column_names


def test_pairs(tiny_tokenizer, ids):
    data = Dataset.from_dict({"text": ["good film"], "text_pair": ["bad"], "label": [2.5]})
    done = tokenize(data, tiny_tokenizer)
    assert done["input_ids"][0] == [CLS, *ids("good film"), SEP, *ids("bad"), SEP]
    assert done["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert done["labels"][0] == 2.5
    named = tokenize(data.rename_columns({"text": "a", "text_pair": "b"}), tiny_tokenizer, text="a", text_pair="b")
    assert named["input_ids"] == done["input_ids"]


@pytest.mark.parametrize("labels", [[[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], [[0, 1, 1], [1, 0, 0]]])
def test_multi_label_lists_are_kept(tiny_tokenizer, labels):
    """A list of whole numbers beside a plain string is multi-label too, whatever the number of words."""
    data = Dataset.from_dict({"text": ["good bad film", "fun"], "label": labels})
    assert list(tokenize(data, tiny_tokenizer)["labels"]) == labels


def test_tags_stand_on_the_first_piece_of_each_word(tiny_tokenizer, ids):
    data = Dataset.from_dict({"tokens": [["films", "is", "unfun"], ["fun"]], "tags": [[4, 0, 3], [1]]})
    done = tokenize(data, tiny_tokenizer, label="tags")
    assert done["input_ids"][0] == [CLS, *ids("film ##s is un ##fun"), SEP]
    assert done["labels"][0] == [-100, 4, -100, 0, 3, -100, -100]
    assert done["labels"][1] == [-100, 1, -100]


def test_tags_of_words_that_are_cut_off_go_with_them(tiny_tokenizer):
    data = Dataset.from_dict({"tokens": [["films", "is", "fun"]], "tags": [[4, 2, 3]]})
    done = tokenize(data, tiny_tokenizer, label="tags", max_length=4)
    assert done["labels"][0] == [-100, 4, -100, -100]  # [CLS] film ##s [SEP]


def test_a_word_without_pieces_shifts_no_tag(tiny_tokenizer, ids):
    """The tokenizer makes nothing of a control character."""
    data = Dataset.from_dict({"tokens": [["good", "\u200b", "fun"]], "tags": [[1, 2, 3]]})
    done = tokenize(data, tiny_tokenizer, label="tags")
    good, fun = (done["input_ids"][0].index(ids(word)[0]) for word in ("good", "fun"))
    assert done["labels"][0][good] == 1 and done["labels"][0][fun] == 3


def test_tags_of_the_first_text_of_a_pair(tiny_tokenizer):
    data = Dataset.from_dict({"tokens": [["good", "fun"]], "more": [["bad", "film"]], "tags": [[1, 2]]})
    done = tokenize(data, tiny_tokenizer, text="tokens", text_pair="more", label="tags")
    assert done["labels"][0] == [-100, 1, 2, -100, -100, -100, -100]


def test_several_tasks_a_row(tiny_tokenizer):
    data = Dataset.from_dict({
        "text": ["book flight", "good"], "tokens": [["book", "flight"], ["good"]], "tags": [[1, 2], [0]],
        "intent": [3, 1],
    })  # fmt: skip
    done = tokenize(data, tiny_tokenizer, label={"slots": "tags", "intent": "intent"})
    assert done["labels"][0] == {"slots": [-100, 1, 2, -100], "intent": 3}
    assert done["labels"][1] == {"slots": [-100, 0, -100], "intent": 1}
    assert "labels" not in tokenize(data, tiny_tokenizer, label={}).column_names


def test_dataset_dict_and_class_labels(tiny_tokenizer):
    part = Dataset.from_dict({"text": ["good", "bad"], "label": ["no", "yes"]}).cast_column(
        "label", ClassLabel(names=["no", "yes"])
    )
    tags = Dataset.from_dict({"tokens": [["good"]], "tags": [[1]]}).cast_column(
        "tags", Sequence(ClassLabel(names=["O", "B-x"]))
    )
    done = tokenize(DatasetDict(train=part, test=part), tiny_tokenizer)
    assert isinstance(done, DatasetDict) and list(done["test"]["labels"]) == [0, 1]
    assert tokenize(tags, tiny_tokenizer, label="tags")["labels"][0] == [-100, 1, -100]


def test_a_formatted_dataset_is_read_like_a_plain_one(tiny_tokenizer):
    data = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]})
    plain = tokenize(data, tiny_tokenizer)[:]
    assert tokenize(data.with_format("numpy"), tiny_tokenizer)[:] == plain
    assert tokenize(data.with_format("torch"), tiny_tokenizer)[:] == plain


def test_truncation(tiny_tokenizer, ids):
    data = Dataset.from_dict({"text": ["good", "the film is good and fun"]})
    assert tokenize(data, tiny_tokenizer, max_length=5)["input_ids"][1] == [CLS, *ids("the film is"), SEP]
    with pytest.raises(ValueError, match=r"row 1: 8 tokens, the limit is 5; .*truncation=True"):
        tokenize(data, tiny_tokenizer, max_length=5, truncation=False)
    assert len(tokenize(data, tiny_tokenizer, max_length=8, truncation=False)["input_ids"][1]) == 8
    long = Dataset.from_dict({"text": ["good " * 60]})
    assert len(tokenize(long, tiny_tokenizer)["input_ids"][0]) == tiny_tokenizer.model_max_length == 40
    with pytest.raises(ValueError, match=r"row 0: 62 tokens, the limit is 40"):
        tokenize(long, tiny_tokenizer, truncation=False)


def test_a_text_of_50000_tokens_is_cut_or_refused_as_asked(tiny_model, tiny_tokenizer):
    """Nowhere does it reach a model that takes 40."""
    text = "film " * 49_998  # [CLS] and [SEP] make 50,000
    data = Dataset.from_dict({"text": ["good", text]})
    assert len(tokenize(data, tiny_tokenizer)["input_ids"][1]) == 40
    assert len(tokenize(data, tiny_tokenizer, max_length=17)["input_ids"][1]) == 17
    whole = tokenize(data, tiny_tokenizer, max_length=50_000)
    assert len(whole["input_ids"][1]) == 50_000
    model = tiny_model()
    for call in (
        lambda: tokenize(data, tiny_tokenizer, truncation=False),
        lambda: extract_features(model, ["good", text], tokenizer=tiny_tokenizer, truncation=False),
    ):
        with pytest.raises(ValueError, match=r"row 1: 50000 tokens, the limit is 40"):
            call()
    for call in (
        lambda: predict(model, whole),
        lambda: fit(model, whole.add_column("labels", [0, 1]), config=TrainConfig(progress=False)),
    ):
        with pytest.raises(ValueError, match=r"row 1, column 'input_ids': 50000 tokens, the model takes 40"):
            call()
    cut = ["good", " ".join(["film"] * 38)]
    for call in (extract_features, predict):
        long, short = (call(model, texts, tokenizer=tiny_tokenizer) for texts in (["good", text], cut))
        assert (long == short).all()


@pytest.mark.parametrize("max_length", [0, 2, -1, 3.5, "5", True])
def test_max_length_must_leave_room(tiny_tokenizer, max_length):
    with pytest.raises(ValueError, match=r"max_length=.*at least 3"):
        tokenize(Dataset.from_dict({"text": ["good"]}), tiny_tokenizer, max_length=max_length)


def test_max_length_of_a_pair_counts_three_special_tokens(tiny_tokenizer):
    with pytest.raises(ValueError, match="at least 4"):
        encode_texts([("good", "bad")], tiny_tokenizer, max_length=3)
    assert len(encode_texts([("good", "bad")], tiny_tokenizer, max_length=5)[0]["input_ids"]) == 5


@pytest.mark.parametrize(
    ("texts", "kind", "message"),
    [
        (["good", None], TypeError, r"row 1, column 'text': expected text, got None \(NoneType\)"),
        (["good", ""], ValueError, r"row 1, column 'text': the text is empty"),
        ([" \n\t"], ValueError, r"row 0, column 'text': the text is empty"),
        ([3], TypeError, r"row 0, column 'text': expected text, got 3 \(int\)"),
        ([["good"], []], ValueError, r"row 1, column 'text': the list of words is empty"),
        ([["good", None]], TypeError, r"row 0, column 'text\[1\]': expected text, got None"),
        ([["good", ["bad"]]], TypeError, r"row 0, column 'text\[1\]': expected text, got \['bad'\]"),
        ([["good", " "]], ValueError, r"row 0, column 'text\[1\]': the text is empty"),
        (["good", ["bad"]], TypeError, r"row 1: \['bad'\]; either all texts are strings, or all are lists"),
        ([["bad"], "good"], TypeError, r"row 1: 'good'; either all texts are strings, or all are lists"),
        (["ok \udcff"], ValueError, r"row 0, column 'text': not valid Unicode at character 3"),
        ([("a", "b"), "c"], ValueError, r"row 1: 'c'; either all texts are \(text, text_pair\) tuples"),
        (["c", ("a", "b")], ValueError, r"row 1: \('a', 'b'\); either all texts are"),
        ([("a", "b", "c")], ValueError, r"row 0: \('a', 'b', 'c'\); either all texts are"),
        ([("good", None)], TypeError, r"row 0, column 'text_pair': expected text, got None"),
        ([("good", ["bad"])], TypeError, r"row 0: \['bad'\]; either all texts are strings"),
        ("good", TypeError, r"texts is 'good'; pass a list"),
        (b"good", TypeError, "pass a list"),
        (None, TypeError, "pass a list"),
        ({"text": ["good"]}, TypeError, "pass a list"),
    ],
)
def test_texts_that_are_none(tiny_tokenizer, texts, kind, message):
    with pytest.raises(kind, match=message):
        encode_texts(texts, tiny_tokenizer)


def test_texts_without_a_tokenizer():
    with pytest.raises(TypeError, match="tokenizer is None; pass one"):
        encode_texts(["good"], None)


def test_encode_texts_names_rows_as_told(tiny_tokenizer):
    with pytest.raises(ValueError, match="row 101"):
        encode_texts(["good", ""], tiny_tokenizer, indices=[7, 101])


def test_encode_texts_says_where_words_begin(tiny_tokenizer):
    rows = encode_texts([["films", "is", "fun"], ["fun"]], tiny_tokenizer, max_length=5)
    assert rows[0]["word_starts"] == [1, 3, None]  # [CLS] film ##s is [SEP]
    assert rows[1]["word_starts"] == [1]
    pair = encode_texts([(["good"], ["bad", "film"])], tiny_tokenizer)
    assert pair[0]["word_starts"] == [1]
    assert encode_texts([], tiny_tokenizer) == []
    assert encode_texts(iter(["fun"]), tiny_tokenizer) == encode_texts(["fun"], tiny_tokenizer)


@pytest.mark.parametrize(
    ("columns", "options", "kind", "message"),
    [
        ({"text": ["a"], "label": [None]}, {}, ValueError, r"row 0, column 'label': the label is None"),
        ({"text": ["a", "b"], "label": ["pos", None]}, {}, ValueError, r"row 1, column 'label': the label is None"),
        ({"text": ["a", "b"], "label": ["pos", " "]}, {}, TypeError, r"row 1, column 'label': the label is ' '; drop"),
        ({"text": ["a"], "label": [b"pos"]}, {}, TypeError, r"row 0, column 'label': the label is b'pos'"),
        ({"text": ["a"], "label": [Decimal("1.5")]}, {}, TypeError, r"row 0, column 'label': the label is Decimal"),
        ({"text": ["a"], "label": [0], "labels": [1]}, {}, ValueError, r"'label' and 'labels': say which is meant"),
        ({"input_ids": [[1]], "label": [0]}, {}, ValueError, r"already tokenized: it has 'input_ids'; pass it to fit"),
        ({"text": ["a"], "label": [["x", "y"]]}, {}, ValueError, r"say that it has several: task='multi-label-class"),
        ({"text": ["a", None], "label": [0, 1]}, {}, TypeError, r"row 1, column 'text'.*None"),
        ({"text": ["a"], "text_pair": [""]}, {}, ValueError, r"row 0, column 'text_pair': the text is empty"),
        ({"sentence": ["a"]}, {}, ValueError, r"no column 'text': the dataset has sentence"),
        ({"text": ["a"]}, {"label": "stars"}, ValueError, r"no column 'stars': the dataset has text"),
        ({"text": ["a"]}, {"text_pair": "b"}, ValueError, r"no column 'b'"),
        ({"text": ["a"]}, {"label": {"x": "stars"}}, ValueError, r"no column 'stars'"),
        ({"tokens": [["a", "b"]], "tags": [[1]]}, {"label": "tags"}, ValueError, r"column 'tags': 1 tags for 2 words"),
        ({"tokens": [["a"]], "tags": [[1, 2]]}, {"label": "tags"}, ValueError, r"2 tags for 1 words"),
        ({"tokens": [["a"]], "tags": [[""]]}, {"label": "tags"}, TypeError, r"column 'tags': '' among the labels"),
        ({"tokens": [["a"]], "tags": [[None]]}, {"label": "tags"}, TypeError, r"column 'tags': None among the labels"),
        ({"text": []}, {}, ValueError, "the dataset has zero examples"),
    ],
)  # fmt: skip
def test_datasets_that_do_not_tokenize(tiny_tokenizer, columns, options, kind, message):
    with pytest.raises(kind, match=message):
        tokenize(Dataset.from_dict(columns), tiny_tokenizer, **options)


def test_the_bad_split_is_named(tiny_tokenizer):
    good = Dataset.from_dict({"text": ["good"]})
    with pytest.raises(ValueError, match=r"split 'test': row 0, column 'text': the text is empty"):
        tokenize(DatasetDict(train=good, test=Dataset.from_dict({"text": [""]})), tiny_tokenizer)
    with pytest.raises(ValueError, match=r"split 'test': the dataset has zero examples"):
        tokenize(DatasetDict(train=good, test=Dataset.from_dict({"text": []})), tiny_tokenizer)


@pytest.mark.parametrize("data", ["good", None, 3, {"text": "good"}])
def test_what_is_no_dataset(tiny_tokenizer, data):
    with pytest.raises(TypeError, match=r"takes a datasets.Dataset .*Dataset.from_dict"):
        tokenize(data, tiny_tokenizer)


# ------------------------------------------------------------------------------------------------- first inputs

TEXTS_ = ["the film is good", "bad", "not very fun", "great plot"]


def rows_of(data):
    return [{name: list(value) if name != "labels" else value for name, value in row.items()} for row in data]


def test_every_kind_of_table_gives_the_same_rows(tiny_tokenizer, tmp_path):
    columns = {"text": TEXTS_, "label": [1, 0, 2, 1], "note": ["x"] * 4}
    frame = pd.DataFrame(columns, index=[3, 5, 7, 9])
    frame.to_csv(tmp_path / "a.csv", index=False)
    right = rows_of(tokenize(Dataset.from_dict(columns), tiny_tokenizer))
    for data in (frame, frame.to_dict("records"), columns, tmp_path / "a.csv", iter(frame.to_dict("records"))):
        assert rows_of(tokenize(data, tiny_tokenizer)) == right
    with pytest.raises(TypeError, match="row 1, column 'text': expected text, got None"):
        tokenize(pd.DataFrame({"text": ["a", float("nan")]}, index=[8, 9]), tiny_tokenizer)
    with pytest.raises(ValueError, match="row 1, column 'label': the label is None"):
        tokenize(pd.DataFrame({"text": ["a", "b"], "label": [0, np.nan]}), tiny_tokenizer)


@pytest.mark.parametrize("values", [[0.5, 1.0, 2.0, 0.0], [2, 0, 1, 1], [[0, 1], [1, 1], [0, 0], [1, 0]]])
def test_a_column_called_labels_is_read(tiny_tokenizer, values):
    done = tokenize({"text": TEXTS_, "labels": values}, tiny_tokenizer)
    assert list(done["labels"]) == values
    both = tokenize({"text": TEXTS_, "labels": values, "label": [1, 1, 1, 1]}, tiny_tokenizer, label="label")
    assert list(both["labels"]) == [1, 1, 1, 1]


def test_truth_values_are_0_and_1(tiny_tokenizer, tiny_model):
    done = tokenize({"text": TEXTS_, "label": [True, False, True, True]}, tiny_tokenizer)
    assert list(done["labels"]) == [1, 0, 1, 1] and done.features["labels"] == Value("int64")
    fit(tiny_model(), done, tokenizer=tiny_tokenizer, config=TrainConfig(max_steps=1, progress=False))
    several = tokenize({"text": TEXTS_, "label": [[True, False]] * 4}, tiny_tokenizer)
    assert list(several["labels"]) == [[1, 0]] * 4


def test_fractions_for_classes_are_refused_with_the_remedy(tiny_tokenizer, tiny_model):
    done = tokenize({"text": TEXTS_, "label": [0.0, 1.0, 1.0, 0.0]}, tiny_tokenizer)
    with pytest.raises(TypeError, match=r"row 0, column 'labels': 0.0 is no class number.*cast the column"):
        fit(tiny_model(), done, tokenizer=tiny_tokenizer, config=TrainConfig(max_steps=1, progress=False))


def test_labels_that_are_text_are_numbered_in_sorted_order(tiny_tokenizer):
    with pytest.warns(UserWarning, match="column 'label': .* 0 'neg', 1 'odd', 2 'pos'; .*label_names") as said:
        done = tokenize({"text": TEXTS_, "label": ["pos", "neg", "odd", "pos"]}, tiny_tokenizer)
    assert len(said) == 1 and said[0].filename == __file__
    assert list(done["labels"]) == [2, 0, 1, 2] and done.features["labels"].names == ["neg", "odd", "pos"]


def test_names_that_are_numbers_are_in_the_order_of_numbers(tiny_tokenizer):
    with pytest.warns(UserWarning, match="0 '2', 1 '5', 2 '10'"):
        done = tokenize({"text": TEXTS_, "label": ["10", "2", "5", "10"]}, tiny_tokenizer)
    assert list(done["labels"]) == [2, 0, 1, 2]
    with pytest.warns(UserWarning, match="0 '-2', 1 '-1', 2 '1'"):
        tokenize({"text": TEXTS_, "label": ["1", "-1", "-2", "1"]}, tiny_tokenizer)


def test_names_are_those_of_all_splits_together(tiny_tokenizer):
    parts = {"train": {"text": TEXTS_, "label": list("cbca")}, "test": {"text": TEXTS_[:2], "label": ["d", "b"]}}
    with pytest.warns(UserWarning, match="0 'a', 1 'b', 2 'c', 3 'd'; .*all splits together"):
        done = tokenize(parts, tiny_tokenizer)
    assert {split: list(part["labels"]) for split, part in done.items()} == {"train": [2, 1, 2, 0], "test": [3, 1]}
    assert done["test"].features["labels"].names == done["train"].features["labels"].names == list("abcd")


def test_text_in_one_split_follows_the_classes_of_another(tiny_tokenizer):
    named = Dataset.from_dict({"text": TEXTS_[:2], "label": [1, 0]}).cast_column("label", ClassLabel(names=["y", "n"]))
    done = tokenize({"train": named, "test": {"text": ["bad"], "label": ["n"]}}, tiny_tokenizer)
    assert list(done["train"]["labels"]) == [1, 0] and list(done["test"]["labels"]) == [1]
    with pytest.raises(TypeError, match="split 'test': row 0, column 'label': the label is 'z'"):
        tokenize({"train": named, "test": {"text": ["bad"], "label": ["z"]}}, tiny_tokenizer)
    with pytest.raises(ValueError, match="column 'label' holds text in test, numbers elsewhere"):
        parts = {"train": {"text": ["bad"], "label": [0]}, "test": {"text": ["bad"], "label": ["z"]}}
        tokenize(parts, tiny_tokenizer)


NAMES = ["good", "bad", "odd"]  # not sorted


def with_features(columns, **features):
    data = Dataset.from_dict(columns)
    for name, feature in features.items():
        data = data.cast_column(name, feature)
    return data


@pytest.mark.parametrize("stream", [False, True])
def test_names_of_a_class_label_stay(tiny_tokenizer, stream):
    one, tags = ClassLabel(names=NAMES), List(ClassLabel(names=["O", "B"]))
    words = {
        "text": ["films fun", "bad"],
        "tokens": [["films", "fun"], ["bad"]],
        "label": [2, 0],
        "tags": [[1, 0], [1]],
    }
    data = with_features(words, label=one, tags=tags)
    data = data.to_iterable_dataset() if stream else data
    for options, feature, labels in (
        ({}, one, [2, 0]),
        ({"text": "tokens", "label": "tags"}, tags, [[-100, 1, -100, 0, -100], [-100, 1, -100]]),
        (
            {"text": "tokens", "label": {"a": "label", "b": "tags"}}, {"a": one, "b": tags},
            [{"a": 2, "b": [-100, 1, -100, 0, -100]}, {"a": 0, "b": [-100, 1, -100]}],
        ),
    ):  # fmt: skip
        done = tokenize(data, tiny_tokenizer, **options)
        assert done.features["labels"] == feature
        assert [row["labels"] for row in done] == labels
    if not stream:  # the features are those of the file, too
        assert done.select([1]).flatten_indices().features["labels"]["a"].names == NAMES


def test_tags_that_are_text(tiny_tokenizer):
    with pytest.warns(UserWarning, match="0 'O', 1 'B-x'"):
        done = tokenize(
            {"tokens": [["films", "fun"], ["bad"]], "tags": [["O", "B-x"], ["O"]]}, tiny_tokenizer, label="tags"
        )
    assert list(done["labels"]) == [[-100, 0, -100, 1, -100], [-100, 0, -100]]
    assert done.features["labels"].feature.names == ["O", "B-x"]


def test_lists_of_classes_become_0_and_1(tiny_tokenizer, tiny_model):
    """As scikit-learn's MultiLabelBinarizer has them, names sorted; class numbers keep their feature's order."""
    from sklearn.preprocessing import MultiLabelBinarizer

    given, task = [["sad", "dark"], [], ["fun"], ["dark"]], "multi-label-classification"
    right = MultiLabelBinarizer()
    want = right.fit_transform(given).tolist()
    with pytest.warns(UserWarning, match="0 'dark', 1 'fun', 2 'sad'"):
        done = tokenize({"text": TEXTS_, "label": given}, tiny_tokenizer, task=task)
    assert list(done["labels"]) == want and done.features["labels"].feature.names == list(right.classes_)
    assert done.features["labels"].length == 3
    numbers = with_features({"text": TEXTS_, "label": [[2, 0], [], [1], [2]]}, label=List(ClassLabel(names=NAMES)))
    done = tokenize(numbers, tiny_tokenizer, task=task)
    assert list(done["labels"]) == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    run = fit(tiny_model(task, 3), done, tokenizer=tiny_tokenizer, config=TrainConfig(max_steps=1, progress=False))
    assert run.steps == 1
    ready = tokenize({"text": TEXTS_, "label": [[0, 1, 1]] * 4}, tiny_tokenizer, task=task)
    assert list(ready["labels"]) == [[0, 1, 1]] * 4


def test_a_streams_text_labels_are_refused(tiny_tokenizer):
    stream = Dataset.from_dict({"text": TEXTS_, "label": list("abab")}).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"row 0, column 'label': the label is 'a'; .*a name of a class that is known"):
        next(iter(tokenize(stream, tiny_tokenizer)))


def test_columns_that_models_read_are_not_dropped_in_silence(tiny_tokenizer):
    boxes = {"tokens": [["good", "film"]], "bbox": [[[0, 0, 1, 1]] * 2], "position_ids": [[0, 1]], "id": [7]}
    with pytest.warns(UserWarning, match="columns left out: bbox, position_ids: "):
        done = tokenize(boxes, tiny_tokenizer)
    assert "bbox" not in done.column_names


@pytest.mark.parametrize("caching", [True, False])
def test_nothing_is_written_beside_the_data(tiny_tokenizer, tmp_path, caching):
    """And what is written is mapped, not read into memory; the user's own setting of the library stays."""
    Dataset.from_dict({"text": TEXTS_ * 50, "label": list("abab") * 50}).save_to_disk(tmp_path / "data")
    data, before = datasets.load_from_disk(tmp_path / "data"), sorted(os.listdir(tmp_path / "data"))
    right = [row["labels"] for row in rows_of(data.class_encode_column("label").rename_column("label", "labels"))]
    for extra in set(os.listdir(tmp_path / "data")) - set(before):
        (tmp_path / "data" / extra).unlink()
    (datasets.enable_caching if caching else datasets.disable_caching)()
    try:
        with pytest.warns(UserWarning, match="0 'a', 1 'b'"):
            done = tokenize(data, tiny_tokenizer)
        assert datasets.is_caching_enabled() is caching
    finally:
        datasets.enable_caching()
    assert sorted(os.listdir(tmp_path / "data")) == before
    files = [Path(file["filename"]) for file in done.cache_files]
    assert files and not any(tmp_path in file.parents for file in files)
    part = done.select(range(120, 200))
    del done, data
    gc.collect()
    assert part["labels"][:] == right[120:200] and all(file.exists() for file in files)


# ------------------------------------------------------------------------------------------------- words and texts

SPECIALS = ["<pad>", "<unk>", "<s>", "</s>"]
SENTENCE = "the flight from boston isn't great 12345 , it 's a newword ?"
LINES = ["the flight from boston to denver is great , isn't it ? 12345 km for $ 3.50"] * 20
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(model, pre, normalizer=None, then=None, post=None):
    """A tokenizer of a few pieces.  then: normalizer and pre-tokenizer that take the place of those of the training."""
    core, alphabet = Tokenizer(model), pre_tokenizers.ByteLevel.alphabet()
    core.pre_tokenizer = pre
    if normalizer:
        core.normalizer = normalizer
    options = dict(special_tokens=SPECIALS, show_progress=False)
    if isinstance(model, models.Unigram):
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **options)
    else:
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **options)
    core.train_from_iterator(LINES, trainer)
    if then:
        core.normalizer, core.pre_tokenizer = then
    if post:
        core.post_processor = post
    names = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def bytes_(**options):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def meta(scheme, **options):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, **options)


def several(*parts):
    return pre_tokenizers.Sequence(list(parts))


_replace, _pair = normalizers.Replace(" ", "▁"), [("</s>", 3), ("<s>", 2)]
_llama2 = normalizers.Sequence([normalizers.Prepend("▁"), _replace])
STYLES = {
    "GPT-2": lambda: trained(models.BPE(), bytes_()),
    "with add_prefix_space": lambda: trained(models.BPE(), bytes_(add_prefix_space=True)),
    "RoBERTa": lambda: trained(
        models.BPE(), bytes_(), post=processors.RobertaProcessing(*_pair, trim_offsets=True, add_prefix_space=False)
    ),
    "ModernBERT": lambda: trained(models.BPE(), bytes_(), normalizers.NFC(), post=processors.BertProcessing(*_pair)),
    "Llama 3, Qwen": lambda: trained(
        models.BPE(),
        several(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), bytes_(use_regex=False)), normalizers.NFC(),
    ),
    "Falcon": lambda: trained(models.BPE(), several(pre_tokenizers.Digits(individual_digits=True), bytes_())),
    "T5": lambda: trained(models.Unigram(), meta("always")),
    "XLM-R": lambda: trained(models.Unigram(), several(pre_tokenizers.WhitespaceSplit(), meta("always"))),
    "Metaspace first": lambda: trained(models.Unigram(), meta("first")),
    "Metaspace never": lambda: trained(models.Unigram(), meta("never")),
    "Llama 2": lambda: trained(models.BPE(), meta("always"), then=(_llama2, None)),
    "Mistral": lambda: trained(models.BPE(), meta("always"), then=(None, meta("first", split=False))),
    "Gemma": lambda: trained(models.BPE(), meta("always"), then=(_replace, None)),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_words_have_the_pieces_of_the_text(style):
    """The text's are the stock tokenizer's; a tag stands where the first piece of its word begins in the text."""
    tokenizer, words = STYLES[style](), SENTENCE.split()
    before = tokenizer.backend_tokenizer.to_str()
    done = tokenize({"tokens": [words], "tags": [list(range(len(words)))]}, tokenizer, label="tags")[0]
    stock = tokenizer(SENTENCE, return_offsets_mapping=True)
    assert done["input_ids"] == stock["input_ids"]
    tagged = [i for i, tag in enumerate(done["labels"]) if tag != -100]
    assert [done["labels"][i] for i in tagged] == list(range(len(words)))
    begins = [sum(len(word) + 1 for word in words[:i]) for i in range(len(words))]  # in the text
    for i, begin in zip(tagged, begins, strict=True):  # a space before a word may be part of its piece
        assert begin - 1 <= stock["offset_mapping"][i][0] <= begin
    row = encode_texts([words], tokenizer)[0]
    assert row["input_ids"] == stock["input_ids"] and row["word_starts"] == tagged
    pair = encode_texts([(words, words)], tokenizer)[0]
    assert pair["input_ids"] == tokenizer(SENTENCE, SENTENCE)["input_ids"]
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_that_takes_the_space_away_is_refused():
    tokenizer = trained(models.BPE(), bytes_(), then=(normalizers.Strip(), bytes_()))
    with pytest.raises(ValueError, match=r"words: \('the', 'flight'\) have other pieces .*add_prefix_space=True"):
        encode_texts([SENTENCE.split()], tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = bytes_(add_prefix_space=True)
    assert len(encode_texts([SENTENCE.split()], tokenizer)[0]["word_starts"]) == 13


def test_words_of_a_vocabulary_that_has_no_space_stay_as_they_are():
    """Without a pre-tokenizer a text of two words is one unknown word: there is nothing to compare with."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
    assert encode_texts([["a", "b", "a"]], tokenizer)[0]["input_ids"] == [1, 2, 1]


def test_strings_are_tagged_as_their_words_were(tiny_model):
    tokenizer = STYLES["GPT-2"]()
    model = tiny_model("token-classification", 3, vocab_size=len(tokenizer))
    got = predict(model, [SENTENCE], tokenizer=tokenizer, output="logits")[0]
    with torch.no_grad():  # the stock model on the stock text
        right = model(torch.tensor([tokenizer(SENTENCE)["input_ids"]])).logits[0]
    starts = encode_texts([SENTENCE.split()], tokenizer)[0]["word_starts"]
    assert np.allclose(got, right[starts].numpy(), atol=1e-5)


# ------------------------------------------------------------------------------------------------- bad input

TEXT = st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["good film", "\udcff", " ", "\x00", "\u200b"])
TEXTS = st.lists(TEXT | st.lists(TEXT, max_size=3) | st.tuples(TEXT, TEXT), max_size=4)


@LOOSE
@given(TEXTS, st.none() | st.integers(-1, 50))
def test_any_texts_end_in_rows_or_a_plain_error(tiny_tokenizer, texts, max_length):
    try:
        rows = encode_texts(texts, tiny_tokenizer, max_length=max_length)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert len(rows) == len(texts)
    assert all(0 < len(row["input_ids"]) <= (max_length or 40) for row in rows)


def test_regression_takes_no_text_and_tags_are_read_from_words(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"regression needs numbers, .* are .*'10.5'.*; convert the column"):
        tokenize({"text": ["good", "bad"], "label": ["10.5", "2.5"]}, tiny_tokenizer, task="regression")
    words = {"text": ["good film"], "tokens": [["good", "film"]], "label": [[0, 1]]}
    rows = tokenize(words, tiny_tokenizer, task="token-classification")
    assert rows[0]["labels"] == [-100, 0, 1, -100]
    data = Dataset.from_dict({"text": ["good"]}).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=r"a transform .* apply it with map first"):
        tokenize(data, tiny_tokenizer)
