"""Which parameters move, and how fast."""

import itertools
import math

import pytest
import torch
import transformers
from torch import nn

from ftlib.multitask import Head, MultiTaskModel
from ftlib.optimizing import SCHEDULES, parameter_groups, schedule_factor
from ftlib.tuning import base_model_of, encoder_layers, report, tune


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_full_moves_everything(tiny_model):
    model = tiny_model()
    tune(model, "head-only")
    found = tune(model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert found.strategy == "full" and found.trainable == found.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("bert", {f"{part}.{kind}" for part in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")}),
        ("albert", {f"{part}.{kind}" for part in ("classifier", "albert.pooler") for kind in ("weight", "bias")}),
        (
            "distilbert",
            {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"},
        ),
        (
            "roberta",
            {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
        ),
    ],
)
def test_head_only(tiny_model, model_type, head):
    model = tiny_model(model_type=model_type)
    found = tune(model, "head-only")
    assert trainable(model) == head
    assert found.trainable == sum(found.groups[part][1] for part in ("head", "pooler") if part in found.groups)
    assert found.groups["embeddings"][0] == found.groups["layers"][0] == 0


def test_last_layers(tiny_model):
    model = tiny_model(num_hidden_layers=3)
    found = tune(model, "last-layers", layers=1)
    parts = {name.split(".layer.")[1][0] if ".layer." in name else name.split(".")[-2] for name in trainable(model)}
    assert parts == {"2", "dense", "classifier"}  # the last layer, the pooler's dense, the head
    assert any("pooler" in name for name in trainable(model))
    assert found.strategy == "last-layers (layers=1)" and found.groups["embeddings"][0] == 0
    tune(model, "last-layers", layers=3)
    assert not any("embeddings" in name for name in trainable(model))


def test_calling_it_again_starts_anew(tiny_model):
    model = tiny_model()
    tune(model, "last-layers", layers=2)
    tune(model, "head-only")
    assert not any("layer" in name or "embeddings" in name for name in trainable(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strategy="lara"), "unknown strategy 'lara'; choose one of full, head-only, last-layers, .* pfeiffer"),
        (dict(strategy="bitfit", layers=2), "unknown option 'layers': strategy 'bitfit' takes no options"),
        (dict(strategy="lora", r=2), "unknown option 'r': strategy 'lora' takes rank, alpha, targets"),
        (dict(strategy="lora", rank=0), "rank=0: need a whole number of at least 1"),
        (dict(strategy="lora", alpha=0), "alpha=0: need a number above 0"),
        (dict(strategy="lora", dropout=1), "dropout=1: need a number from 0 to below 1"),
        (dict(strategy="lora", base_bits=2), "base_bits=2: choose None"),
        (dict(strategy="lora", seed=0.5), "seed=0.5: need a whole number"),
        (dict(strategy="lora", targets=["q_proj"]), r"targets=\['q_proj'\] match no linear layer; the layers have dense, key"),
        (dict(strategy="lora", targets=["query", "q"]), r"targets=\['q'\] match no linear layer"),
        (dict(strategy="lora", targets="query"), "targets='query': pass 'all-linear' or a list of names"),
        (dict(strategy="houlsby", reduction=0.5), "reduction=0.5: need a number of at least 1"),
        (dict(strategy="mixout", p=1), "p=1: need a number from 0 to below 1"),
        (dict(strategy="layer-decay", decay=1.5), "decay=1.5: need a number from 0 to 1"),
        (dict(strategy="gradual-unfreezing", until=-0.1), "until=-0.1: need a number from 0 to 1"),
        (dict(strategy="l2-sp", strength=float("inf")), "strength=inf: need a number of at least 0"),
        (dict(strategy="last-layers", layers=3), r"layers=3: the encoder has 2; choose 1 to 2"),
        (dict(strategy="last-layers", layers=0), r"layers=0"),
        (dict(strategy="last-layers", layers="1"), r"layers='1'"),
        (dict(strategy="last-layers", layers=True), r"layers=True"),
    ],
)
def test_refusals_leave_the_model_as_it_was(tiny_model, options, message):
    model = tiny_model()
    tune(model, "head-only")
    before = trainable(model)
    with pytest.raises(ValueError, match=message):
        tune(model, **options)
    assert trainable(model) == before


def test_albert_and_bare_encoders_are_refused(tiny_model):
    with pytest.raises(ValueError, match="ALBERT's layers share one set of weights"):
        tune(tiny_model(model_type="albert"), "last-layers")
    with pytest.raises(ValueError, match="'head-only' needs a task head"):
        tune(tiny_model("encoder"), "head-only")
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        encoder_layers(nn.Linear(2, 2))


def test_several_heads(tiny_model):
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head("token-classification", 3)})
    found = tune(model, "head-only")
    parts = ("heads.a.classifier", "heads.b.classifier", "encoder.pooler.dense")
    assert trainable(model) == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert found.groups["head"] == (16 * 2 + 2 + 16 * 3 + 3,) * 2
    assert base_model_of(model) is model.encoder
    assert len(encoder_layers(model)) == 2


def test_the_encoder_inside_peft(tiny_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert type(base_model_of(model)).__name__ == "BertModel"
    found = report(model)
    assert found.groups["layers"][0] == 2 * 2 * (2 * 16)  # layers × (A and B) × (rank × hidden)
    assert found.groups["embeddings"][0] == 0


def test_report_by_hand_and_as_a_table(tiny_model):
    model = tiny_model(num_labels=3)
    found = tune(model, "head-only")
    assert found.trainable == (16 * 3 + 3) + (16 * 16 + 16) == 323 and found.optimizer_bytes == 8 * 323
    assert sum(total for _, total in found.groups.values()) == found.total
    assert set(found.groups) == {"embeddings", "layers", "pooler", "head"}
    text = str(found)
    assert "strategy head-only" in text and "323" in text and f"{found.total:,}" in text


# ------------------------------------------------------------------------------------------------- decay groups


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "albert", "gpt2", "modernbert"])
def test_decay_groups_are_the_trainers(tiny_model, model_type, tmp_path):
    options = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2}}.get(model_type, {})
    model = tiny_model(model_type=model_type, **options)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    decayed = set(transformers.Trainer(model, arguments).get_decay_parameter_names(model))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {names[id(p)] for p in groups[0]["params"]} == decayed
    assert {names[id(p)] for p in groups[1]["params"]} == set(names.values()) - decayed


def test_groups_hold_the_trainable_parameters_once(tiny_model):
    model = tiny_model()
    model.bert.requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1e-3)
    assert [len(group["params"]) for group in groups] == [1, 1]
    assert groups[0]["params"][0] is model.classifier.weight
    model.classifier.bias.requires_grad_(False)
    assert len(parameter_groups(model, learning_rate=1e-3)) == 1
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert sum(len(g["params"]) for g in parameter_groups(tied, learning_rate=1.0)) == 3


def test_nothing_to_train(tiny_model):
    with pytest.raises(ValueError, match="no parameter is trainable"):
        parameter_groups(tiny_model().requires_grad_(False), learning_rate=1.0)


# --------------------------------------------------------------------------------------------------- schedules

STOCK = {
    "constant": lambda optimizer, warmup, total: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("schedule", STOCK)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (1, 2), (5, 5)])
def test_schedules_are_the_stock_ones(schedule, warmup, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    stock = STOCK[schedule](optimizer, warmup, total)
    for step in range(total):
        expected = optimizer.param_groups[0]["lr"]
        assert schedule_factor(step, total, schedule=schedule, warmup=warmup) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        stock.step()


def test_exponential_falls_by_one_ratio_to_a_hundredth():
    factors = [schedule_factor(step, 10, schedule="exponential", warmup=2) for step in range(11)]
    assert factors[:3] == [0.0, 0.5, 1.0]
    ratios = [b / a for a, b in itertools.pairwise(factors[2:])]
    assert ratios == pytest.approx([0.01 ** (1 / 8)] * 8)
    assert factors[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_stay_between_0_and_1_even_past_the_end(schedule):
    factors = [schedule_factor(step, 5, schedule=schedule, warmup=2) for step in range(20)]
    assert all(0.0 <= factor <= 1.0 and math.isfinite(factor) for factor in factors)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'step'; choose one of constant"):
        schedule_factor(0, 1, schedule="step")
