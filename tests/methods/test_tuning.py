"""Which parameters move, and how fast."""

import copy
import itertools
import math

import pytest
import torch
import transformers
from test_fit import make_rows, quick, raising
from torch import nn
from torch.testing import assert_close

from ftlib.engine.fit import fit
from ftlib.inputs.tokenizing import collate
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.optimizing import SCHEDULES, parameter_groups, schedule_factor, trainer_options
from ftlib.methods.tuning import STRATEGIES, base_model_of, encoder_layers, report, tune


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
        (dict(strategy="lora", targets=["q_proj"]), r"targets=\['q_proj'\] match no linear layer; .* dense, key"),
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


# ----------------------------------------------------------------------------------- what moves, counted by hand

KINDS = ("bert", "roberta", "electra", "distilbert", "modernbert", "albert")
# 2 layers of width 16 and 32 inside, 64 words, 40 positions; ALBERT's and ELECTRA's embeddings are narrower or wider
HEAD = {"bert": 306, "roberta": 306, "electra": 306, "distilbert": 306, "modernbert": 306, "albert": 306}
BIASES = {  # a layer: query, key, value, output: 4 * 16; inside 32, out 16; two norms 2 * 16; one norm of embeddings
    "bert": 2 * (64 + 48 + 32) + 16, "roberta": 2 * (64 + 48 + 32) + 16, "distilbert": 2 * (64 + 48 + 32) + 16,
    "electra": 2 * (64 + 48 + 32) + 128 + 16, "modernbert": 0, "albert": (64 + 48 + 32) + 8 + 16,
}  # fmt: skip
NORMS = {  # gains and biases: two norms a layer, one of the embeddings; ModernBERT's have no bias, its first layer one
    "bert": 5 * 32, "roberta": 5 * 32, "distilbert": 5 * 32, "electra": 4 * 32 + 2 * 128, "modernbert": 5 * 16,
    "albert": 2 * 32 + 2 * 8,
}  # fmt: skip
EMBEDDINGS = {  # words, positions, token types, norm; ELECTRA's and ALBERT's projection belongs to them too
    "bert": 16 * (64 + 40 + 2 + 2), "roberta": 16 * (64 + 40 + 2 + 2), "distilbert": 16 * (64 + 40 + 2),
    "electra": 128 * (64 + 40 + 2 + 2) + 129 * 16, "modernbert": 16 * 64 + 16, "albert": 8 * (64 + 40 + 2 + 2),
}  # fmt: skip


@pytest.mark.parametrize("model_type", KINDS)
def test_counted_by_hand(tiny_model, model_type):
    model = tiny_model(model_type=model_type)
    total = sum(p.numel() for p in model.parameters())
    assert tune(model, "head-only").trainable == HEAD[model_type]
    assert tune(model, "bitfit").trainable == HEAD[model_type] + BIASES[model_type]
    assert {name.split(".")[-1] for name in trainable(model) if name.split(".")[-1] != "weight"} <= {"bias"}
    assert tune(model, "layer-norm").trainable == HEAD[model_type] + NORMS[model_type]
    assert tune(model, "frozen-embeddings").trainable == total - EMBEDDINGS[model_type]
    for name in ("full", "l2-sp", "mixout"):
        assert tune(model, name).trainable == tune(model, name).total == total


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_norms_are_those_of_peft(tiny_model, model_type):
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_model(model_type=model_type), tiny_model(model_type=model_type)
    tune(ours, "layer-norm")
    found = tune(theirs, peft.LNTuningConfig())
    inside = {name for name in trainable(ours) if "norm" in name.lower() and not name.startswith("head.")}
    assert {n.replace(".ln_tuning_layers.default", "") for n in trainable(theirs) if "ln_tuning" in n} == inside
    assert found.trainable == report(ours).trainable


def test_the_total_counts_a_head_once(tiny_model):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    found = tune(model, peft.LoraConfig(r=2, target_modules=["query"]))
    assert found.groups["adapters"] == (2 * 2 * 32,) * 2  # layers x (A and B) of rank 2 and width 16
    assert found.total == total + 128 and found.groups["head"] == (34, 34) and found.groups["pooler"] == (272, 272)


# -------------------------------------------------------------------------------- unfreezing and layer-wise rates


def parts_free(model):
    """embeddings, layer 0, layer 1, and the rest: what has requires_grad."""
    names = trainable(model)
    parts = {"embeddings": "embeddings.", "0": "layer.0.", "1": "layer.1."}
    out = "".join(short[0] for short, part in parts.items() if any(part in name for name in names))
    return out + ("h" if any("classifier" in name for name in names) else "")


def test_gradual_unfreezing_by_hand(tiny_model):
    """until=0.6 of 10 steps: 3 stages in 6 steps, so the top layer at step 2, the next at 4, the embeddings at 6."""
    model, seen = tiny_model(), []
    tune(model, "gradual-unfreezing", until=0.6)
    assert parts_free(model) == "e01h"
    model.register_forward_pre_hook(lambda *args: seen.append(parts_free(model)))
    fit(model, make_rows(20), config=quick(batch_size=2, epochs=1, shortcuts=False))
    assert seen == ["h", "h", "1h", "1h", "01h", "01h", "e01h", "e01h", "e01h", "e01h"]
    assert parts_free(model) == "e01h"
    seen.clear()
    tune(model, "gradual-unfreezing", until=0)
    fit(model, make_rows(4), config=quick(batch_size=2, epochs=1))
    assert seen == ["e01h"] * 2


def test_gradual_unfreezing_in_the_trainer(tiny_model, tmp_path):
    model, seen = tiny_model(), []
    tune(model, "gradual-unfreezing", until=0.6)
    model.register_forward_pre_hook(lambda *args: seen.append(parts_free(model)))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=2, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    options = trainer_options(model, learning_rate=1e-3)
    transformers.Trainer(model, arguments, train_dataset=make_rows(20), data_collator=collate, **options).train()
    assert seen == ["h", "h", "1h", "1h", "01h", "01h", "e01h", "e01h", "e01h", "e01h"]
    assert parts_free(model) == "e01h"


@pytest.mark.parametrize("error", [True, False])
def test_nothing_stays_frozen_after_an_error(tiny_model, error):
    model = tiny_model()
    tune(model, "gradual-unfreezing", until=1.0)
    if error:
        with pytest.raises(RuntimeError, match="mine"):
            fit(model, make_rows(4), config=quick(), loss=raising(RuntimeError("mine")))
    else:
        fit(model, make_rows(4), config=quick())
    assert parts_free(model) == "e01h"


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "modernbert"])
def test_layer_rates_by_hand(tiny_model, model_type):
    model = tiny_model(model_type=model_type)
    tune(model, "layer-decay", decay=0.5)
    rates = {}
    for group in parameter_groups(model, learning_rate=1.0, weight_decay=0.1):
        rates |= dict.fromkeys(group["params"], group["lr"])
        assert group["lr"] == group["scale"]
    assert len(rates) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        if "embed" in name:  # words, positions, and ELECTRA's projection
            expected = 0.25
        else:
            expected = 0.5 if any(part in name for part in ("layer.0.", "layers.0.")) else 1.0
        assert rates[p] == expected, name


def test_layer_rates_in_fit(tiny_model):
    """SGD's first step is rate x gradient: half as far one layer down."""
    rows, found = make_rows(4), []
    for decay in (1.0, 0.5):
        model = tiny_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        tune(model, "layer-decay", decay=decay)
        config = quick(max_steps=1, optimizer="sgd", weight_decay=0.0, warmup_fraction=0.0, shortcuts=False)
        fit(model, rows, config=config)
        found.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, share in (("classifier.weight", 1), ("bert.encoder.layer.1.output.dense.weight", 1),
                        ("bert.encoder.layer.0.output.dense.weight", 0.5),
                        ("bert.embeddings.word_embeddings.weight", 0.25)):  # fmt: skip
        assert float(found[0][name].abs().max()) > 0
        assert_close(found[1][name], found[0][name] * share, atol=1e-8, rtol=1e-3)


# --------------------------------------------------------------------------------------------- adapters: refusals


@pytest.mark.parametrize("first", ["lora", "houlsby", "peft", "prompt"])
def test_adapters_are_not_stacked(tiny_model, first):
    peft = pytest.importorskip("peft")
    known = {"peft": peft.LoraConfig(r=2), "prompt": peft.PromptTuningConfig(num_virtual_tokens=2)}
    model = tiny_model()
    tune(model, known.get(first, first))
    before = trainable(model)
    for second in ("lora", "full", "pfeiffer", peft.LoraConfig(r=2)):
        with pytest.raises(ValueError, match=r"has adapters already; ftlib.merge\(model\) folds them in"):
            tune(model, second)
    assert trainable(model) == before


def test_what_peft_configurations_are_refused(tiny_model):
    peft = pytest.importorskip("peft")
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head()})
    with pytest.raises(ValueError, match="PEFT configurations are for models with one head"):
        tune(model, peft.LoraConfig())
    with pytest.raises(ValueError, match="needs a task head"):
        tune(tiny_model("encoder"), peft.LoraConfig())
    with pytest.raises(ValueError, match="unknown option 'rank'"):
        tune(tiny_model(), peft.LoraConfig(), rank=2)
    with pytest.raises(TypeError, match="7 is no strategy and no PEFT configuration"):
        tune(tiny_model(), 7)


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("distilbert", lambda p: p.IA3Config(), r"target_modules.*linear layers here: k_lin, lin1, lin2, out_lin"),
        ("bert", lambda p: p.LoraConfig(target_modules=["q_proj"]), r"linear layers here: dense, key, query, value"),
        ("bert", lambda p: p.PromptTuningConfig(num_virtual_tokens=40), "num_virtual_tokens=40: need 1 to 39"),
        ("bert", lambda p: p.PromptTuningConfig(num_virtual_tokens=0), "num_virtual_tokens=0: need 1 to 39"),
        ("bert", lambda p: p.PromptTuningConfig(), "num_virtual_tokens=0: need 1 to 39"),
        ("roberta", lambda p: p.PrefixTuningConfig(num_virtual_tokens=39), "num_virtual_tokens=39: need 1 to 38"),
        ("distilbert", lambda p: p.PrefixTuningConfig(num_virtual_tokens=2), "which distilbert models do not take"),
        ("modernbert", lambda p: p.PrefixTuningConfig(num_virtual_tokens=2), "which modernbert models do not take"),
        ("albert", lambda p: p.PrefixTuningConfig(num_virtual_tokens=2), "which albert models do not take"),
    ],
)
def test_a_refused_peft_configuration_leaves_the_model(tiny_model, model_type, config, message):
    peft = pytest.importorskip("peft")
    model = tiny_model(model_type=model_type)
    before, modules = trainable(model), [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        tune(model, config(peft))
    assert trainable(model) == before and [(n, type(m)) for n, m in model.named_modules()] == modules
    assert "tuning" not in vars(model) and "forward" not in vars(model)
    tune(model, "lora")


@pytest.mark.parametrize(("model_type", "room"), [("bert", 36), ("roberta", 35), ("electra", 36)])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_text_and_its_prompt_fit(tiny_model, model_type, room, kind):
    """40 positions, the first of RoBERTa's not in use, and 4 of the prompt."""
    peft = pytest.importorskip("peft")
    model = tiny_model(model_type=model_type)
    tune(model, getattr(peft, kind)(num_virtual_tokens=4))
    ids = torch.full((1, room), 7)
    mask = torch.ones_like(ids)
    assert model(input_ids=ids, attention_mask=mask).logits.shape == (1, 2)
    assert torch.equal(model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits)
    longer = torch.full((1, room + 1), 7)
    with pytest.raises(ValueError, match=rf"{room + 1} tokens and 4 of the prompt .* tokenize with max_length={room}"):
        model(input_ids=longer, attention_mask=torch.ones_like(longer))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_tagger_with_a_prompt_tags_the_text(tiny_model, kind):
    peft = pytest.importorskip("peft")
    model = tiny_model("token-classification", 3)
    tune(model, getattr(peft, kind)(num_virtual_tokens=4))
    batch = collate(make_rows(4, "token-classification"))
    found = model(**batch)
    assert found.logits.shape == (*batch["input_ids"].shape, 3)
    expected = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), batch["labels"].flatten())
    assert_close(found.loss, expected)


def test_hooks_of_a_model_with_a_prompt_run_once(tiny_model):
    """PEFT calls a copy of the model inside the model's own call, with the prompt; FSDP's hooks must not see that."""
    peft = pytest.importorskip("peft")
    model, seen = tiny_model(), []
    model.register_forward_hook(lambda *args: seen.append("before"))
    tune(model, peft.PromptTuningConfig(num_virtual_tokens=4))
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    model(input_ids=torch.tensor([[5, 6]]))
    assert seen == [["input_ids"], "before"]


# ------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", [*STRATEGIES, "dora", "prompt"])
def test_a_copy_is_whole_and_on_its_own(tiny_model, name):
    peft = pytest.importorskip("peft")
    known = {"dora": peft.LoraConfig(r=2, use_dora=True), "prompt": peft.PromptTuningConfig(num_virtual_tokens=2)}
    model, twin = tiny_model(), tiny_model()
    for each in (model, twin):
        tune(each, known.get(name, name))
    copied = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows, config = make_rows(8), quick(epochs=1)
    run = fit(copied, rows, config=config)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())  # the first stays as it was
    assert any(not torch.equal(before[n], p) for n, p in copied.named_parameters())
    again = fit(twin, rows, config=config)
    assert [r["loss"] for r in run.history] == [r["loss"] for r in again.history]
    assert_close(dict(copied.named_parameters()), dict(twin.named_parameters()), atol=0, rtol=0)


def test_a_printed_report(tiny_model):
    text = str(tune(tiny_model(), "lora", rank=2))
    assert text.splitlines() == [
        "part             trainable         total",
        "embeddings               0         1,728",
        "layers                   0         4,448",
        "adapters               256           256",
        "pooler                 272           272",
        "head                    34            34",
        "all                    562         6,738  (8.34 % trainable)",
        "strategy lora (rank=2); AdamW keeps 0.0 MiB of moments",
    ]
