"""Tokenizing, by hand on a vocabulary of a few words."""

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Sequence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
        ({"text": ["a"], "label": ["pos"]}, {}, TypeError, r"row 0, column 'label': the label 'pos' is text"),
        ({"text": ["a", None], "label": [0, 1]}, {}, TypeError, r"row 1, column 'text'.*None"),
        ({"text": ["a"], "text_pair": [""]}, {}, ValueError, r"row 0, column 'text_pair': the text is empty"),
        ({"sentence": ["a"]}, {}, ValueError, r"no column 'text': the dataset has sentence"),
        ({"text": ["a"]}, {"label": "stars"}, ValueError, r"no column 'stars': the dataset has text"),
        ({"text": ["a"]}, {"text_pair": "b"}, ValueError, r"no column 'b'"),
        ({"text": ["a"]}, {"label": {"x": "stars"}}, ValueError, r"no column 'stars'"),
        ({"tokens": [["a", "b"]], "tags": [[1]]}, {"label": "tags"}, ValueError, r"column 'tags': 1 tags for 2 words"),
        ({"tokens": [["a"]], "tags": [[1, 2]]}, {"label": "tags"}, ValueError, r"2 tags for 1 words"),
        ({"tokens": [["a"]], "tags": [["O"]]}, {"label": "tags"}, TypeError, r"column 'tags': 'O' among the labels"),
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


@pytest.mark.parametrize("data", [["good"], {"text": ["good"]}, "good", None])
def test_what_is_no_dataset(tiny_tokenizer, data):
    with pytest.raises(TypeError, match=r"takes a datasets.Dataset .*Dataset.from_dict"):
        tokenize(data, tiny_tokenizer)


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


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(-100),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "a"]), inner, max_size=2),
    max_leaves=5,
)
ROWS = st.lists(
    JUNK | st.fixed_dictionaries({"input_ids": JUNK}, optional={"labels": JUNK, "token_type_ids": JUNK}), max_size=3
)
