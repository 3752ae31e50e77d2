"""Texts to vectors: pooling by hand, the right layer, the right order, the same numbers as sentence-transformers."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ftlib.features import extract_features, pool
from ftlib.multitask import Head, MultiTaskModel
from ftlib.unpadding import unpad

TEXTS = ["the film is good and fun", "bad", "a great plot we book to boston", "dull film", "not fun"]


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, -5.0], [3.0, -1.0], [99.0, 99.0]], [[99.0, 99.0], [-2.0, 4.0], [-4.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padding on the right, and on the left
    assert pool(hidden, mask, "mean").tolist() == [[2.0, -3.0], [-3.0, 2.0]]
    assert pool(hidden, mask, "max").tolist() == [[3.0, -1.0], [-2.0, 4.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, -5.0], [-2.0, 4.0]]


def test_pooling_of_a_row_without_tokens_is_finite():
    for pooling in ("mean", "max", "cls"):
        assert pool(torch.ones(1, 2, 3), torch.zeros(1, 2), pooling).isfinite().all()


def test_gradients_flow_to_real_tokens_only():
    hidden = torch.ones(1, 3, 2, requires_grad=True)
    pool(hidden, torch.tensor([[1, 1, 0]]), "mean").sum().backward()
    assert hidden.grad[0, :, 0].tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "albert", "electra"])
@pytest.mark.parametrize("layer", [-1, 0, 1, 2, -2, -3])
def test_layers_are_those_of_hidden_states(tiny_model, tiny_tokenizer, model_type, layer):
    model = tiny_model("encoder", model_type=model_type)
    found = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, layer=layer, pooling="cls")
    assert found.dtype == np.float32 and found.shape == (5, 16)
    for text, vector in zip(TEXTS, found, strict=True):
        inputs = tiny_tokenizer(text, return_tensors="pt")
        if model_type == "distilbert":
            inputs.pop("token_type_ids")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        assert_close(torch.from_numpy(vector), states[layer][0, 0], atol=1e-5, rtol=0)


def test_a_layer_that_is_not_there(tiny_model, tiny_tokenizer):
    for layer in (3, -4):
        with pytest.raises(
            ValueError, match=rf"layer={layer}: choose 0 \(embeddings\) to 2, or from the end, -1 to -3"
        ):
            extract_features(tiny_model("encoder"), TEXTS, tokenizer=tiny_tokenizer, layer=layer)


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
@pytest.mark.parametrize("unpadded", [False, True])
def test_a_vector_does_not_depend_on_its_neighbours(tiny_model, tiny_tokenizer, pooling, unpadded):
    model = tiny_model("encoder")
    alone = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, batch_size=1, pooling=pooling)
    if unpadded:
        unpad(model)
    for batch_size in (2, 3, 64):
        together = extract_features(
            model, TEXTS, tokenizer=tiny_tokenizer, batch_size=batch_size, pooling=pooling, layer=-1
        )
        np.testing.assert_allclose(together, alone, atol=1e-6)
    turned = extract_features(model, TEXTS[::-1], tokenizer=tiny_tokenizer, batch_size=2, pooling=pooling)
    np.testing.assert_allclose(turned[::-1], alone, atol=1e-6)


def test_every_kind_of_model_gives_its_encoders_vectors(tiny_model, tiny_tokenizer):
    peft = pytest.importorskip("peft")
    encoder = tiny_model("encoder")
    expected = extract_features(encoder, TEXTS, tokenizer=tiny_tokenizer)
    task = tiny_model()
    task.bert.load_state_dict(encoder.state_dict())
    adapted = peft.get_peft_model(task, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    several = MultiTaskModel(encoder, {"a": Head()})
    for model in (task, adapted, several):
        np.testing.assert_allclose(extract_features(model, TEXTS, tokenizer=tiny_tokenizer), expected, atol=1e-6)


def test_modes_and_gradients_are_as_before(tiny_model, tiny_tokenizer):
    model = tiny_model("encoder", hidden_dropout_prob=0.5).train()
    model.pooler.eval()
    first = extract_features(model, TEXTS, tokenizer=tiny_tokenizer)
    assert np.array_equal(first, extract_features(model, TEXTS, tokenizer=tiny_tokenizer))  # dropout is off
    assert model.training and model.encoder.training and not model.pooler.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="row 1"):
        extract_features(model, ["good", ""], tokenizer=tiny_tokenizer)
    assert model.training


def test_normalize_pairs_words_and_nothing(tiny_model, tiny_tokenizer):
    model = tiny_model("encoder")
    found = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, normalize=True, progress=True)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    assert extract_features(model, [("good", "bad")], tokenizer=tiny_tokenizer).shape == (1, 16)
    words = extract_features(model, [["the", "film"]], tokenizer=tiny_tokenizer)
    np.testing.assert_allclose(words, extract_features(model, ["the film"], tokenizer=tiny_tokenizer), atol=1e-6)
    assert extract_features(model, [], tokenizer=tiny_tokenizer).shape == (0, 16)


def test_long_texts_are_cut_to_what_the_model_takes(tiny_model, tiny_tokenizer):
    model = tiny_model("encoder", max_position_embeddings=8)  # the tokenizer believes in 40
    long, cut = "good bad " * 20, "good bad good bad good bad"
    expected = extract_features(model, [cut], tokenizer=tiny_tokenizer)
    np.testing.assert_allclose(extract_features(model, [long], tokenizer=tiny_tokenizer), expected, atol=1e-6)
    np.testing.assert_allclose(
        extract_features(model, [long], tokenizer=tiny_tokenizer, max_length=30), expected, atol=1e-6
    )
    shorter = extract_features(model, [long], tokenizer=tiny_tokenizer, max_length=4)
    np.testing.assert_allclose(shorter, extract_features(model, ["good bad"], tokenizer=tiny_tokenizer), atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "options", "kind", "message"),
    [
        ("good film", {}, TypeError, "texts is 'good film'; pass a list"),
        (["good", None], {}, TypeError, "row 1, column 'text': expected text, got None"),
        (["good"], {"pooling": "sum"}, ValueError, "unknown pooling 'sum'; choose one of mean, cls, max"),
        (["good"], {"batch_size": 0}, ValueError, "batch_size=0"),
        (["good"], {"max_length": 1}, ValueError, "max_length=1"),
        (["good"], {"max_length": "5"}, ValueError, "max_length='5'"),
        (["good"], {"layer": "last"}, ValueError, "layer='last': choose 0"),
        (["good"], {"layer": 1.0}, ValueError, "layer=1.0"),
    ],
)
def test_bad_arguments(tiny_model, tiny_tokenizer, texts, options, kind, message):
    with pytest.raises(kind, match=message):
        extract_features(tiny_model("encoder"), texts, tokenizer=tiny_tokenizer, **options)


def test_a_model_without_a_name_needs_its_tokenizer(tiny_model):
    with pytest.raises(ValueError, match="pass tokenizer="):
        extract_features(tiny_model("encoder"), ["good"])


def test_a_name_loads_model_and_tokenizer(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("encoder")
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    expected = extract_features(model, TEXTS, tokenizer=tiny_tokenizer)
    np.testing.assert_allclose(extract_features(str(tmp_path), TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(extract_features(tmp_path, TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
def test_equal_to_sentence_transformers(tiny_model, tiny_tokenizer, tmp_path, pooling):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as parts

    model = tiny_model("encoder")
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    modules = [parts.Transformer(str(tmp_path)), parts.Pooling(16, pooling), parts.Normalize()]
    encoder = st.SentenceTransformer(modules=modules, device="cpu")
    found = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, pooling=pooling, normalize=True)
    np.testing.assert_allclose(found, encoder.encode(TEXTS), atol=1e-6)


def test_what_is_no_model(tiny_tokenizer):
    for model in (None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"pass a Transformers model, or its name"):
            extract_features(model, ["good"], tokenizer=tiny_tokenizer)
