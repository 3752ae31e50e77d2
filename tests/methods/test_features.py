"""Texts to vectors: pooling by hand, the right layer, the right order, the same numbers as sentence-transformers.

Chunks, slices and batches of any size, generators and files give what one text at a time gives.
"""

import inspect
import itertools
import json
import os
import resource
import shutil
import signal
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_multitask import structured
from torch.testing import assert_close

from ftlib.methods import features
from ftlib.methods.features import extract_features, pool
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.unpadding import unpad

TEXTS = ["the film is good and fun", "bad", "a great plot we book to boston", "dull film", "not fun"]


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, -5.0], [3.0, -1.0], [99.0, 99.0]], [[99.0, 99.0], [-2.0, 4.0], [-4.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padding on the right, and on the left
    assert pool(hidden, mask, "mean").tolist() == [[2.0, -3.0], [-3.0, 2.0]]
    assert pool(hidden, mask, "max").tolist() == [[3.0, -1.0], [-2.0, 4.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, -5.0], [-2.0, 4.0]]
    assert pool(hidden, mask, "lasttoken").tolist() == [[3.0, -1.0], [-4.0, 0.0]]
    assert_close(pool(hidden, mask, "weightedmean"), torch.tensor([[7.0, -7.0], [-10.0, 4.0]]) / 3)  # (1 a + 2 b) / 3
    assert_close(pool(hidden, mask, "mean_sqrt_len_tokens"), torch.tensor([[4.0, -6.0], [-6.0, 4.0]]) / 2**0.5)


def test_pooling_of_a_row_without_tokens_is_finite():
    for pooling in features.POOLINGS:
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
        (["good"], {"pooling": ""}, ValueError, "pooling='': choose one of mean, cls, max"),
        (["good"], {"pooling": "sum"}, ValueError, "pooling='sum': choose one of mean, cls, max"),
        (["good"], {"batch_size": 0}, ValueError, "batch_size=0"),
        (["good"], {"max_length": 1}, ValueError, "max_length=1"),
        (["good"], {"max_length": "5"}, ValueError, "max_length='5'"),
        (["good"], {"layer": "last"}, ValueError, "layer='last': choose 0"),
        (["good"], {"layer": 1.0}, ValueError, "layer=1.0"),
        (["good"], {"layer": []}, ValueError, r"layer=\[\]: choose 0"),
        (["good"], {"layer": [0, 3]}, ValueError, "layer=3: choose 0"),
        ([], {"max_tokens": 0}, ValueError, "max_tokens=0"),
        (["good"], {"precision": "half"}, ValueError, "precision='half': choose one of auto, fp32, bf16, fp16"),
        (["good"], {"precision": "fp16"}, ValueError, "precision='fp16' needs a GPU"),
        (["good bad"], {"max_length": 3, "truncation": False}, ValueError, "row 0: 4 tokens, the limit is 3"),
        (["good"], {"out": 3}, TypeError, "out is a int; pass the path"),
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
    stock = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules as parts

    model = tiny_model("encoder")
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    modules = [parts.Transformer(str(tmp_path)), parts.Pooling(16, pooling), parts.Normalize()]
    encoder = stock.SentenceTransformer(modules=modules, device="cpu")
    found = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, pooling=pooling, normalize=True)
    np.testing.assert_allclose(found, encoder.encode(TEXTS), atol=1e-6)


def test_what_is_no_model(tiny_tokenizer):
    for model in (None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"pass a Transformers model, or its name"):
            extract_features(model, ["good"], tokenizer=tiny_tokenizer)


def small(monkeypatch, chunk, part, ahead=2):
    """Chunks and slices so small that a few texts fill many."""
    monkeypatch.setattr(features, "CHUNK", chunk)
    monkeypatch.setattr(features, "SLICE", part)
    monkeypatch.setattr(features, "AHEAD", ahead)


def own_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ftlib")]


@pytest.mark.parametrize("layer", [-1, 0, [0, 2, -2], [-1]])
def test_equal_to_one_text_at_a_time(tiny_model, tiny_tokenizer, layer, monkeypatch):
    small(monkeypatch, 3, 2)
    model = tiny_model("encoder")
    found = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, layer=layer, normalize=True)
    assert found.shape == ((5, 16) if isinstance(layer, int) else (5, len(layer), 16))
    for text, vectors in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = model(**tiny_tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        for one, vector in zip(np.atleast_1d(layer), vectors.reshape(-1, 16), strict=True):
            mean = states[one][0].mean(dim=0)
            assert_close(torch.from_numpy(vector), mean / mean.norm(), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 38), max_size=12),
    chunk=st.integers(1, 13),
    part=st.integers(1, 13),
    ahead=st.integers(1, 5),
    batch_size=st.none() | st.integers(1, 13),
    max_tokens=st.none() | st.integers(1, 200),
    as_generator=st.booleans(),
)
def test_cuts_of_any_size_give_the_same(
    tiny_model, tiny_tokenizer, lengths, chunk, part, ahead, batch_size, max_tokens, as_generator
):
    model = tiny_model("encoder")
    texts = [" ".join(itertools.islice(itertools.cycle(("good", "bad", "the", "film")[i % 3 :]), n))
             for i, n in enumerate(lengths)]  # fmt: skip
    expected = [extract_features(model, [text], tokenizer=tiny_tokenizer)[0] for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        small(patch, chunk, part, ahead)
        given_texts = (text for text in texts) if as_generator else texts
        found = extract_features(
            model, given_texts, tokenizer=tiny_tokenizer, batch_size=batch_size, max_tokens=max_tokens
        )
    assert found.dtype == np.float32 and found.flags.writeable
    np.testing.assert_allclose(found, np.reshape(expected, (len(texts), 16)), atol=1e-6)


def test_batches_keep_to_the_budget_and_come_longest_first(tiny_model, tiny_tokenizer):
    model, shapes = tiny_model("encoder"), []
    model.register_forward_pre_hook(lambda m, a, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    texts = ["good " * n for n in (1, 30, 2, 3, 9, 4, 1, 1)]  # and two special tokens each
    extract_features(model, texts, tokenizer=tiny_tokenizer, max_tokens=12)
    assert [tuple(shape) for shape in shapes] == [(1, 32), (1, 11), (2, 6), (3, 4), (1, 3)]
    shapes.clear()
    extract_features(model, texts, tokenizer=tiny_tokenizer, max_tokens=12, batch_size=2)
    assert [tuple(shape) for shape in shapes] == [(1, 32), (1, 11), (2, 6), (2, 4), (2, 3)]


@pytest.mark.parametrize("as_generator", [False, True])
@pytest.mark.parametrize("layer", [-1, [0, -1]])
def test_a_file_holds_what_memory_would(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, as_generator, layer):
    small(monkeypatch, 2, 1)
    model, path = tiny_model("encoder"), tmp_path / "v.npy"
    expected = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, layer=layer)
    texts = iter(TEXTS) if as_generator else TEXTS
    found = extract_features(model, texts, tokenizer=tiny_tokenizer, layer=layer, out=path)
    assert isinstance(found, np.memmap) and not found.flags.writeable and found.dtype == np.float32
    assert np.array_equal(found, expected) and np.array_equal(np.load(path), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]
    with pytest.raises(FileExistsError, match="out exists already; delete it"):
        extract_features(model, TEXTS, tokenizer=tiny_tokenizer, out=str(path))
    assert extract_features(model, [], tokenizer=tiny_tokenizer, out=tmp_path / "none.npy").shape == (0, 16)


def test_files_that_can_not_be_written(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    model = tiny_model("encoder")
    with pytest.raises(FileNotFoundError, match="none"):
        extract_features(model, TEXTS, tokenizer=tiny_tokenizer, out=tmp_path / "none" / "v.npy")
    (tmp_path / "v.npy.part").touch()
    with pytest.raises(FileExistsError, match=r"v\.npy\.part"):  # a run writes it, or was killed
        extract_features(model, TEXTS, tokenizer=tiny_tokenizer, out=tmp_path / "v.npy")
    (tmp_path / "v.npy.part").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))  # the header fits, the vectors do not
    try:
        with pytest.raises(OSError, match=r"File too large \(after 0 vectors\): .*v\.npy"):
            extract_features(model, TEXTS, tokenizer=tiny_tokenizer, out=tmp_path / "v.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    usage = shutil.disk_usage(tmp_path)._replace(free=319)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"5 vectors need 0.0 GB, the disk has 0.0 GB free"):  # 320 bytes
        extract_features(model, TEXTS, tokenizer=tiny_tokenizer, out=tmp_path / "v.npy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["empty", "generator", "interrupt", "nan"])
def test_errors_name_the_row_and_leave_nothing_behind(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, bad):
    small(monkeypatch, 4, 2)
    model = tiny_model("encoder").train()
    closed = []

    def texts():
        try:
            for i in itertools.count():
                if bad == "generator" and i == 9:
                    raise RuntimeError("the file broke off")
                yield "" if bad == "empty" and i == 9 else f"{'good ' * (i % 4)} bad"
        finally:
            closed.append(True)

    calls = itertools.count()

    def hook(module, args, output):
        call = next(calls)
        if bad == "interrupt" and call == 3:
            raise KeyboardInterrupt
        if bad == "nan" and call == 0:
            output.last_hidden_state[1] = torch.nan  # the second longest of four: row 2

    model.register_forward_hook(hook)
    kind, message = {
        "empty": (ValueError, "row 9, column 'text': the text is empty"),
        "generator": (RuntimeError, "the file broke off"),
        "interrupt": (KeyboardInterrupt, None),
        "nan": (ValueError, "row 2: the vector is not finite"),
    }[bad]
    with pytest.raises(kind, match=message):
        extract_features(model, texts(), tokenizer=tiny_tokenizer, out=tmp_path / "v.npy")
    assert model.training and own_threads() == [] and closed and list(tmp_path.iterdir()) == []


def test_texts_are_read_as_they_are_needed(tiny_model, tiny_tokenizer, monkeypatch):
    """While a batch is computed no more than the batches ahead, and the chunk they lie in, have been read."""
    small(monkeypatch, 4, 2, ahead=1)
    model, read, most = tiny_model("encoder"), itertools.count(1), []
    done = itertools.count(2, 2)  # two texts a batch
    last = [0]

    def texts():
        for _ in range(40):
            last[0] = next(read)
            yield "good film"

    model.register_forward_pre_hook(lambda module, args: most.append(last[0] - next(done)))
    extract_features(model, texts(), tokenizer=tiny_tokenizer)
    assert len(most) == 20 and max(most) <= 4


def test_texts_are_read_while_a_batch_is_computed(tiny_model, tiny_tokenizer, monkeypatch):
    small(monkeypatch, 2, 2)
    model, moved_on = tiny_model("encoder"), threading.Event()

    def texts():
        yield from ("good", "bad")
        moved_on.set()
        yield "film"

    def hook(module, args):
        assert moved_on.wait(60)  # in a loop that reads between batches it would never come

    model.register_forward_pre_hook(hook)
    assert extract_features(model, texts(), tokenizer=tiny_tokenizer).shape == (3, 16)


def test_linear_layers_are_as_before_afterwards(tiny_model, tiny_tokenizer):
    model, inside = tiny_model("encoder"), []
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    model.register_forward_hook(lambda *args: inside.append(sum("forward" in vars(module) for module in linears)))
    extract_features(model, TEXTS, tokenizer=tiny_tokenizer)
    assert inside == [len(linears)]
    assert not any("forward" in vars(module) for module in linears)


def test_columns_and_arrays_of_texts(tiny_model, tiny_tokenizer):
    datasets = pytest.importorskip("datasets")
    model = tiny_model("encoder")
    expected = extract_features(model, TEXTS, tokenizer=tiny_tokenizer)
    data = datasets.Dataset.from_dict({"text": TEXTS})
    for texts in (data["text"], data.to_iterable_dataset()["text"], np.array(TEXTS), tuple(TEXTS)):
        np.testing.assert_allclose(extract_features(model, texts, tokenizer=tiny_tokenizer), expected, atol=1e-6)


def test_precision_is_that_of_a_copy(tiny_model, tiny_tokenizer):
    model = tiny_model("encoder")
    options = dict(tokenizer=tiny_tokenizer)
    expected = extract_features(model, TEXTS, **options)
    for precision in ("fp32", "auto"):
        assert np.array_equal(extract_features(model, TEXTS, precision=precision, **options), expected)
    half = extract_features(model, TEXTS, precision="bf16", **options)
    assert half.dtype == np.float32 and 0 < np.abs(half - expected).max() < 0.05
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    unpad(model)
    np.testing.assert_allclose(extract_features(model, TEXTS, precision="bf16", **options), half, atol=0.05)
    model.to(torch.bfloat16)
    assert np.abs(extract_features(model, TEXTS, **options) - expected).max() < 0.05
    np.testing.assert_allclose(extract_features(model, TEXTS, precision="fp32", **options), expected, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", [None, "auto", "bf16", "fp16"])
def test_the_same_on_a_gpu(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, precision):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bf16 units")
    model = tiny_model("encoder")
    expected = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, layer=[0, -1])
    small(monkeypatch, 3, 2)
    options = dict(tokenizer=tiny_tokenizer, layer=[0, -1], precision=precision, out=tmp_path / "v.npy")
    found = extract_features(model.cuda(), TEXTS, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision is None else 0.05)


# --------------------------------------------------------------------------------- sentence-transformers folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """make(name, steps, tf={...}, **options): a folder that sentence-transformers saved, over a tiny BERT."""
    pytest.importorskip("sentence_transformers")
    from conftest import make_tiny_model, make_tiny_tokenizer
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    root = tmp_path_factory.mktemp("folders")

    def make(name, steps, tf=None, encoder=None, **options):
        plain = root / f"{name}-encoder"
        (encoder or make_tiny_model("encoder", layer_norm_eps=1e-5)).save_pretrained(plain)
        make_tiny_tokenizer().save_pretrained(plain)
        modules = [parts.Transformer(str(plain), **(tf or {})), *steps(parts)]
        SentenceTransformer(modules=modules, device="cpu", **options).save(str(root / name))
        return root / name

    return make


FOLDERS = {
    "cls": dict(steps=lambda m: [m.Pooling(16, "cls")]),
    "max": dict(steps=lambda m: [m.Pooling(16, "max")]),
    "last": dict(steps=lambda m: [m.Pooling(16, "lasttoken"), m.Normalize()]),
    "weighted": dict(steps=lambda m: [m.Pooling(16, "weightedmean")]),
    "root": dict(steps=lambda m: [m.Pooling(16, "mean_sqrt_len_tokens")]),
    "dense": dict(steps=lambda m: [m.Pooling(16), m.Dense(16, 7), m.Normalize()]),
    "linear": dict(
        steps=lambda m: [m.Pooling(16), m.Dense(16, 24, bias=False, activation_function=torch.nn.Identity())]
    ),
    "short": dict(steps=lambda m: [m.Pooling(16)], tf=dict(max_seq_length=5)),
    "prompt": dict(steps=lambda m: [m.Pooling(16)], prompts={"q": "not good "}, default_prompt_name="q"),
}


def encoded(folder, texts):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_gives_sentence_transformers_vectors(made, name):
    texts = [*TEXTS, "good bad " * 30]
    folder = made(name, **FOLDERS[name])
    expected = encoded(folder, texts)
    found = extract_features(folder, texts, batch_size=3)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def rewrite(path, change):
    said = json.loads(path.read_text())
    path.write_text(json.dumps(change(said) or said))


def test_an_older_folder_with_the_encoder_inside(made):
    texts = ["THE Film is GOOD " * 5, "bad"]
    folder = made("older", lambda m: [m.Pooling(16, "max"), m.Normalize()])
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(inner / path.name)
    flags = {f"pooling_mode_{key}": key == "max_tokens" for key in ("cls_token", "max_tokens", "mean_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | flags))
    (inner / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6, "do_lower_case": True}))

    def older(step):
        kind = f"sentence_transformers.models.{step['type'].rsplit('.', 1)[-1]}"
        return step | {"type": kind, "path": step["path"] or "0_Transformer"}

    rewrite(folder / "modules.json", lambda said: list(map(older, said)))
    np.testing.assert_allclose(extract_features(folder, texts), encoded(folder, texts), atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "roberta", "distilbert", "xlnet", "modernbert"])
def test_folders_of_other_encoders(made, model_type):
    folder = made(
        f"of-{model_type}", lambda m: [m.Pooling(32, "lasttoken"), m.Dense(32, 5)], encoder=structured(model_type)
    )
    np.testing.assert_allclose(extract_features(folder, TEXTS), encoded(folder, TEXTS), atol=1e-5)


def test_what_is_asked_for_goes_before_the_folder(made, tiny_tokenizer):
    folder = made("asked", **FOLDERS["dense"])
    model = transformers.AutoModel.from_pretrained(folder)
    plain = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, pooling="cls")
    np.testing.assert_allclose(extract_features(folder, TEXTS, pooling="cls"), plain, atol=1e-6)
    layers = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, pooling="mean", layer=[0, 1])
    np.testing.assert_allclose(extract_features(folder, TEXTS, layer=[0, 1]), layers, atol=1e-6)
    free = extract_features(folder, TEXTS, normalize=False)
    assert free.shape == (5, 7) and np.abs(np.linalg.norm(free, axis=1) - 1).max() > 0.01
    np.testing.assert_allclose(free / np.linalg.norm(free, axis=1, keepdims=True), encoded(folder, TEXTS), atol=1e-5)
    short = made("asked-short", **FOLDERS["short"])
    long = extract_features(short, ["good bad " * 9], max_length=20)
    assert not np.allclose(long, extract_features(short, ["good bad " * 9]))
    with pytest.warns(UserWarning, match="modules.json says pooling mean, Dense 1 times; a model passed as an object"):
        extract_features(model, TEXTS)
    with pytest.raises(TypeError, match="wants a prompt or small letters: pass strings"):
        extract_features(made("asked-prompt", **FOLDERS["prompt"]), [["good", "film"]])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "modules.json",
            lambda said: said[0].update(type="mine.Encoder"),
            r"modules\.json: mine\.Encoder is not done here",
        ),
        ("modules.json", lambda said: said[1].update(type="sentence_transformers.models.CNN"), "CNN is not done here"),
        (
            "modules.json",
            lambda said: said[2].update(type="sentence_transformers.models.LSTM"),
            "LSTM is not done here",
        ),
        (
            "modules.json",
            lambda said: said[2].update(type="sentence_transformers.models.LayerNorm"),
            "LayerNorm is not",
        ),
        ("modules.json", lambda said: said[:1], "no Pooling is not done here"),
        ("modules.json", lambda said: [1], r"modules\.json: expected sentence-transformers' settings in JSON"),
        ("modules.json", lambda said: {"a": 1}, r"modules\.json: expected sentence-transformers' settings in JSON"),
        ("2_Dense/config.json", lambda said: said.update(use_residual=True), r"Dense \(use_residual: True\)"),
        ("2_Dense/config.json", lambda said: said.update(activation_function="os.system"), r"function: os\.system\)"),
        ("2_Dense/config.json", lambda said: said.update(module_input_name="token_embeddings"), "token_embeddings"),
        ("sentence_bert_config.json", lambda said: said.update(processing_kwargs={"text": {}}), "processing_kwargs"),
        ("sentence_bert_config.json", lambda said: said.update(transformer_task="fill-mask"), "transformer_task"),
        ("config_sentence_transformers.json", lambda said: said.update(model_type="SparseEncoder"), "SparseEncoder"),
        ("1_Pooling/config.json", lambda said: said.update(include_prompt=False), r"Pooling \(include_prompt\)"),
        ("1_Pooling/config.json", lambda said: said.update(pooling_mode=["cls", "max"]), r"mode: \['cls', 'max'\]\)"),
        ("1_Pooling/config.json", lambda said: said.update(pooling_mode="attention"), r"pooling_mode: attention\)"),
    ],
)
def test_what_a_folder_asks_and_is_not_done_here_is_refused_by_name(made, file, change, message):
    folder = made("odd", lambda m: [m.Pooling(16), m.Dense(16, 7)], prompts={"q": "x "}, default_prompt_name="q")
    rewrite(folder / file, change)
    with pytest.raises(ValueError, match=message):
        extract_features(folder, TEXTS)
    model = transformers.AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        extract_features(model, TEXTS)
    assert extract_features(model, TEXTS, pooling="mean").shape == (5, 16)
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------ other structures


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2", "xlnet", "falcon", "deberta-v2", "mpnet"])
@pytest.mark.parametrize("auto", [None, "AutoModelForSequenceClassification"])
def test_vectors_of_any_structure_are_the_stock_models(model_type, auto, tiny_tokenizer):
    """Of an encoder-decoder those of its encoder; each text alone in the stock model."""
    model = structured(model_type, auto)
    base = getattr(model, "base_model", model)
    base = base.get_encoder() if model.config.is_encoder_decoder else base
    found = extract_features(model, TEXTS, tokenizer=tiny_tokenizer, pooling="lasttoken", layer=[1, -1])
    for text, vectors in zip(TEXTS, found, strict=True):
        inputs = tiny_tokenizer(text, return_tensors="pt")
        if "token_type_ids" not in inspect.signature(base.forward).parameters:
            inputs.pop("token_type_ids")
        with torch.no_grad():
            output = base(**inputs, output_hidden_states=True)
        expected = torch.stack([output.hidden_states[1][0, -1], output.last_hidden_state[0, -1]])
        assert_close(torch.from_numpy(vectors), expected, atol=1e-5, rtol=0)


def test_a_decoders_first_token_is_said(tiny_tokenizer):
    with pytest.warns(UserWarning, match="a decoder's first token sees no other; pooling='lasttoken'"):
        extract_features(structured("llama"), TEXTS, tokenizer=tiny_tokenizer, pooling="cls")


def test_prompts_are_refused(tiny_model, tiny_tokenizer):
    peft = pytest.importorskip("peft")
    from ftlib.methods.tuning import tune

    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig):
        tuned, plain = tiny_model(), tiny_model()
        tune(tuned, config(task_type="SEQ_CLS", num_virtual_tokens=3))
        wrapped = peft.get_peft_model(plain, config(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=16)
                                      if config is peft.PromptEncoderConfig else
                                      config(task_type="SEQ_CLS", num_virtual_tokens=3))  # fmt: skip
        for model in (tuned, wrapped):
            with pytest.raises(ValueError, match="prompts live around the encoder"):
                extract_features(model, TEXTS, tokenizer=tiny_tokenizer)


# -------------------------------------------------------------------------------------------- who reads the texts


def test_texts_are_read_in_the_callers_thread(tiny_model, tiny_tokenizer, monkeypatch):
    small(monkeypatch, 4, 2)
    model, readers = tiny_model("encoder"), set()
    connection = sqlite3.connect(":memory:")  # its cursors work in one thread only
    connection.execute("create table t(x)")
    connection.executemany("insert into t values (?)", [(text,) for text in TEXTS * 3])

    def texts():
        for (text,) in connection.execute("select x from t"):
            readers.add(threading.get_ident())
            yield text

    expected = extract_features(model, TEXTS * 3, tokenizer=tiny_tokenizer)
    np.testing.assert_allclose(extract_features(model, texts(), tokenizer=tiny_tokenizer), expected, atol=1e-6)
    assert readers == {threading.get_ident()}


def test_an_error_of_the_texts_comes_as_it_is(tiny_model, tiny_tokenizer, monkeypatch):
    small(monkeypatch, 2, 2)
    closed = []

    def texts():
        try:
            yield from ("good", "bad", "film")
            raise LookupError("line 4 of the file")
        finally:
            closed.append(True)

    with pytest.raises(LookupError, match="line 4 of the file") as caught:
        extract_features(tiny_model("encoder"), texts(), tokenizer=tiny_tokenizer)
    assert caught.traceback[-1].name == "texts" and caught.value.__cause__ is None and closed == [True]
    assert own_threads() == []


def test_one_interrupt_ends_the_wait_for_a_text(tiny_model, tiny_tokenizer, monkeypatch):
    small(monkeypatch, 2, 2)
    waits = threading.Event()

    def texts():
        yield from ("good", "bad", "film")
        waits.wait(30)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            extract_features(tiny_model("encoder"), texts(), tokenizer=tiny_tokenizer)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 10 and own_threads() == []


def test_long_texts_are_tokenized_a_few_at_a_time(tiny_model, tiny_tokenizer, monkeypatch):
    """So that an interrupt, which waits for the slice at work, comes soon, and memory stays small."""
    seen, real = [], features.encode_texts
    monkeypatch.setattr(
        features, "encode_texts", lambda texts, *a, **k: (seen.append(len(texts)), real(texts, *a, **k))[1]
    )
    monkeypatch.setattr(features, "CHARACTERS", 100)
    extract_features(
        tiny_model("encoder"), ["good " * 100, *(["good " * 10] * 4), *(["bad"] * 9)], tokenizer=tiny_tokenizer
    )
    assert seen == [1, 2, 2, 9]


def test_an_encoder_saved_alone_and_an_output_narrower_than_the_layers(tmp_path, tiny_tokenizer):
    """What sentence-transformers saves of a T5; the small OPT, whose last output is projected."""
    sizes = dict(vocab_size=len(tiny_tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    encoder.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    opt = dict(vocab_size=len(tiny_tokenizer), hidden_size=32, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    narrow = transformers.OPTModel(
        transformers.OPTConfig(**opt, word_embed_proj_dim=16, max_position_embeddings=40)
    ).eval()
    texts = ["good film", "bad"]
    for named, model in ((str(tmp_path), encoder), (narrow, narrow)):
        found = extract_features(named, texts, tokenizer=tiny_tokenizer)
        for text, vector in zip(texts, found, strict=True):
            ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
            with torch.no_grad():
                expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0)
            assert_close(torch.tensor(vector), expected, atol=1e-5, rtol=0)
