"""One encoder, several heads: computed once, equal to the stock models, summed as promised."""

import copy

import pytest
import torch
import transformers
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.unpadding import is_unpadded, unpad

HEADS = {
    "topic": Head("sequence-classification", 3, ("a", "b", "c")),
    "flags": Head("multi-label-classification", 4),
    "stars": Head("regression", 1),
    "tags": Head("token-classification", 5),
}
ROWS = [
    {"input_ids": [2, 9, 10, 3], "labels": {"topic": 2, "stars": 0.5}},
    {"input_ids": [2, 11, 3], "labels": {"flags": [1.0, 0.0, 0.0, 1.0]}},
    {"input_ids": [2, 12, 13, 14, 15, 3], "labels": {"tags": [-100, 1, 2, -100, 4, -100]}},
    {"input_ids": [2, 16, 3], "labels": {"topic": 0, "tags": [-100, 0, -100]}},
    {"input_ids": [2, 17, 18, 3], "labels": {"stars": -1.0, "flags": [0.0, 0.0, 1.0, 0.0]}},
]


@pytest.fixture
def build(tiny_model):
    return lambda model_type="bert", heads=None, seed=0, **options: MultiTaskModel(
        tiny_model("encoder", model_type=model_type, **options), heads or HEADS, seed=seed
    ).eval()


TYPES = ["bert", "distilbert", "roberta", "electra", "albert"]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("unpadded", [False, True])
def test_a_mixed_batch_gives_what_each_task_gives_and_runs_the_trunk_once(build, model_type, unpadded):
    model = build(model_type)
    if unpadded:
        unpad(model)
        assert is_unpadded(model)
    calls = []
    model.encoder.register_forward_hook(lambda *args: calls.append(1))
    batch = collate(ROWS)
    labels, rows = batch.pop("labels"), batch.pop("rows")
    mixed = model(**batch, rows=rows)
    assert len(calls) == 1
    assert set(mixed) == set(HEADS)
    assert {task: tuple(logits.shape) for task, logits in mixed.items()} == {
        "topic": (2, 3), "flags": (2, 4), "stars": (2, 1), "tags": (2, 6, 5),
    }  # fmt: skip
    for task in HEADS:
        alone = model(**batch, task=task)[rows[task]]
        if task == "tags":
            real = batch["attention_mask"][rows[task]].bool()
            assert_close(mixed[task][real], alone[real], atol=1e-6, rtol=0)
        else:
            assert_close(mixed[task], alone, atol=1e-6, rtol=0)
    assert labels["stars"].tolist() == [0.5, -1.0]


@pytest.mark.parametrize("model_type", TYPES)
def test_an_exported_task_is_a_stock_model(build, model_type, tmp_path):
    model = build(model_type)
    batch = {key: collate(ROWS)[key] for key in ("input_ids", "attention_mask")}
    for name, head in HEADS.items():
        exported = model.export(name)
        kind = "Token" if name == "tags" else "Sequence"
        assert type(exported).__name__.endswith(f"For{kind}Classification")
        expected = model(**batch, task=name)
        assert_close(exported(**batch).logits, expected, atol=1e-6, rtol=0)
        assert exported.config.num_labels == head.num_labels and exported.config.num_hidden_layers == 2
        exported.save_pretrained(tmp_path / name)
        auto = getattr(transformers, f"AutoModelFor{kind}Classification")
        stock, info = auto.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_close(stock(**batch).logits, expected, atol=1e-6, rtol=0)
        assert set(stock.state_dict()) == set(exported.state_dict())
    assert model.export("topic").config.id2label == {0: "a", 1: "b", 2: "c"}


def test_an_exported_task_has_weights_of_its_own(build):
    model = build()
    exported = model.export("topic")
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert model.encoder.embeddings.word_embeddings.weight.abs().sum() > 0
    assert not any(a is b for a in exported.parameters() for b in model.parameters())


def test_export_of_an_unpadded_model_stays_unpadded(build):
    model = unpad(build())
    batch = {key: collate(ROWS)[key] for key in ("input_ids", "attention_mask")}
    exported = model.export("topic")
    assert is_unpadded(exported)
    seen = []
    exported.bert.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    assert_close(exported(**batch).logits, model(**batch, task="topic"), atol=1e-6, rtol=0)
    assert seen == [1]
    assert not is_unpadded(build().export("topic"))


def test_token_types_reach_the_encoder(build):
    model = build()
    ids, types = torch.tensor([[2, 9, 3, 10, 3]]), torch.tensor([[0, 0, 0, 1, 1]])
    plain, typed = model(ids, task="topic"), model(ids, token_type_ids=types, task="topic")
    assert not torch.allclose(plain, typed)
    exported = model.export("topic")
    assert_close(exported(input_ids=ids, token_type_ids=types).logits, typed, atol=1e-6, rtol=0)


def test_gradients_reach_trunk_and_own_head_only(build):
    model = build().train()
    model(**{k: v for k, v in collate(ROWS).items() if k not in ("labels", "rows")}, task="stars").sum().backward()
    touched = {
        name.split(".")[1] for name, p in model.named_parameters() if name.startswith("heads.") and p.grad is not None
    }
    assert touched == {"stars"}
    assert model.encoder.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_heads_are_drawn_from_the_seed_and_leave_the_global_state(build, tiny_model):
    state = torch.get_rng_state()
    same, other = [build(seed=1), build(seed=1)], build(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.heads["topic"].classifier.weight for m in (*same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(same[0].heads["topic"].classifier.weight[:1], same[0].heads["stars"].classifier.weight)


def test_the_heads_hold_no_encoder(build):
    model = build()
    assert {name.split(".", 2)[2] for name, _ in model.heads.named_parameters(prefix="heads")} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert model.tasks == {"topic": ("sequence-classification", 3), "flags": ("multi-label-classification", 4),
                           "stars": ("regression", 1), "tags": ("token-classification", 5)}  # fmt: skip


def test_heads_follow_the_encoders_dtype(tiny_model):
    model = MultiTaskModel(tiny_model("encoder").to(torch.bfloat16), {"a": Head()})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[2, 9, 3]]), task="a").dtype == torch.bfloat16


def test_a_deep_copy_is_independent(build):
    model = build()
    twin = copy.deepcopy(model)
    ids = torch.tensor([[2, 9, 3]])
    assert torch.equal(twin(ids, task="topic"), model(ids, task="topic"))
    with torch.no_grad():
        twin.encoder.embeddings.word_embeddings.weight.zero_()
    assert not torch.equal(twin(ids, task="topic"), model(ids, task="topic"))


@pytest.mark.parametrize(
    ("heads", "kind", "message"),
    [
        ({}, ValueError, "heads is {}"),
        ([Head()], ValueError, "pass {task name: ftlib.Head"),
        (None, ValueError, "heads is None"),
        ({"a": "regression"}, TypeError, r"heads\['a'\] is 'regression'; use ftlib.Head"),
        ({"a.b": Head()}, ValueError, "task name 'a.b': use letters"),
        ({"": Head()}, ValueError, "task name ''"),
        ({3: Head()}, ValueError, "task name 3"),
        ({"type": Head()}, ValueError, "task name 'type': use letters.*taken by PyTorch"),
        ({"keys": Head()}, ValueError, "task name 'keys': use letters.*taken by PyTorch"),
    ],
)
def test_heads_that_are_none(tiny_model, heads, kind, message):
    with pytest.raises(kind, match=message):
        MultiTaskModel(tiny_model("encoder"), heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(task="ner"), "task='ner': choose one of sequence-classification"),
        (dict(num_labels=0), "num_labels=0: need a whole number of at least 1"),
        (dict(num_labels=2.0), "num_labels=2.0"),
        (dict(num_labels=True), "num_labels=True"),
        (dict(num_labels=2, label_names=("a",)), "1 label_names for num_labels=2"),
        (dict(weight=-1.0), "weight=-1.0: need a number from 0"),
        (dict(weight=float("nan")), "weight=nan"),
    ],
)
def test_a_head_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        Head(**options)


def test_encoders_that_do_not_fit(tiny_model):
    with pytest.raises(ValueError, match="BertForSequenceClassification has a head already"):
        MultiTaskModel(tiny_model(), HEADS)
    encoder = tiny_model("encoder")
    encoder.pooler = None
    with pytest.raises(ValueError, match="task 'topic' needs the encoder's pooler"):
        MultiTaskModel(encoder, HEADS)
    MultiTaskModel(encoder, {"tags": HEADS["tags"]})  # a tagger needs none


def test_forward_says_what_is_missing(build):
    model, ids = build(), torch.tensor([[2, 9, 3]])
    with pytest.raises(ValueError, match="pass either task=name"):
        model(ids)
    with pytest.raises(ValueError, match="pass either task=name"):
        model(ids, task="topic", rows={"topic": torch.tensor([0])})
    with pytest.raises(ValueError, match="unknown task 'x'; this model has topic, flags, stars, tags"):
        model(ids, task="x")
    with pytest.raises(ValueError, match="unknown task 'x'"):
        model(ids, rows={"x": torch.tensor([0])})
    with pytest.raises(ValueError, match="unknown task 'x'"):
        model.export("x")
