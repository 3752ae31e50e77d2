"""Which parameters move, and how fast."""

import copy

import pytest
import torch
import transformers
from test_fit import make_rows, quick, raising
from test_multitask import STRUCTURES, structured
from torch import nn
from torch.testing import assert_close

from ftlib.core import anatomy
from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.optimizing import optimizer, parameter_groups, trainer_options
from ftlib.methods.tuning import STRATEGIES, merge, report, tune


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
        (dict(strategy="lara"), "strategy='lara': choose one of full, head-only, last-layers, .* pfeiffer"),
        (dict(strategy="bitfit", layers=2), "unknown option 'layers': strategy 'bitfit' takes no options"),
        (dict(strategy="lora", r=2), "unknown option 'r': strategy 'lora' takes rank, alpha, targets"),
        (dict(strategy="lora", rank=0), "rank=0: need a whole number of at least 1"),
        (dict(strategy="lora", alpha=0), "alpha=0: need a number from 1e-06"),
        (dict(strategy="lora", dropout=1), "dropout=1: need a number from 0 to below 1"),
        (dict(strategy="lora", base_bits=2), "base_bits=2: choose one of None, 8, 4"),
        (dict(strategy="lora", seed=0.5), "seed=0.5: need a whole number"),
        (dict(strategy="lora", targets=["q_proj"]), r"targets=\['q_proj'\] match no linear layer; .* dense, key"),
        (dict(strategy="lora", targets=["query", "q"]), r"targets=\['q'\] match no linear layer"),
        (dict(strategy="lora", targets="query"), "targets='query': pass 'all-linear' or a list of names"),
        (dict(strategy="houlsby", reduction=0.5), "reduction=0.5: need a number from 1, finite"),
        (dict(strategy="mixout", p=1), "p=1: need a number from 0 to below 1"),
        (dict(strategy="layer-decay", decay=1.5), "decay=1.5: need a number from 0 to 1"),
        (dict(strategy="gradual-unfreezing", until=-0.1), "until=-0.1: need a number from 0 to 1"),
        (dict(strategy="l2-sp", strength=float("inf")), "strength=inf: need a number from 0, finite"),
        (dict(strategy="last-layers", layers=3), "layers=3: choose one of 1, 2"),
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
        anatomy.layers(nn.Linear(2, 2))


def pair(name, **options):
    """An encoder-decoder that classifies texts: 3 layers and 2, width 16."""
    if name == "t5":
        sizes = dict(d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2)
    else:
        sizes = dict(
            encoder_layers=3, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40,
        )  # fmt: skip
    ids = dict(pad_token_id=0, eos_token_id=3, bos_token_id=2, decoder_start_token_id=2)
    config = transformers.CONFIG_MAPPING[name](vocab_size=64, d_model=16, num_labels=2, **sizes, **ids, **options)
    return transformers.AutoModelForSequenceClassification.from_config(config)


PAIRS = {"t5": "transformer.{}.block.{}.", "bart": "model.{}.layers.{}."}


@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_decoder_starts_at_its_decoder(name):
    model, layer = pair(name), PAIRS[name].format
    tune(model, "last-layers", layers=1)
    inside = {n for n in trainable(model) if not n.startswith("classification_head.")}
    assert inside == {n for n, _ in model.named_parameters() if n.startswith(layer("decoder", 1))} != set()
    with pytest.raises(ValueError, match="layers=3: choose one of 1, 2"):
        tune(model, "last-layers", layers=3)
    tune(model, "gradual-unfreezing")
    order = [layer("decoder", 1), layer("decoder", 0), *(layer("encoder", i) for i in (2, 1, 0))]
    top = (order[2], layer("encoder", 0).split("encoder")[0] + "encoder.final_layer_norm")
    order[2] = top  # T5's, with its last layer
    *stages, last = model.tuning.stages
    for stage, start in zip(stages, order, strict=True):
        assert set(stage) == {n for n, _ in model.named_parameters() if n.startswith(start)}
    assert any("shared" in n for n in last) and not any("norm" in n and "embedding" not in n for n in last)
    tune(model, "layer-decay", decay=0.5)
    shares = [model.tuning.scales[stage[0]] for stage in (*stages, last)]
    assert shares == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]


def test_each_part_below_the_top_has_a_share():
    """What keeps the full rate stands above all layers: head, pooler, a decoder's (or only) last normalization."""
    for model_type, top in (("t5", "decoder.final_layer_norm"), ("mbart", "decoder.layer_norm"), ("deberta-v2", "-"),
                            ("llama", "model.norm"), ("gpt2", "ln_f")):  # fmt: skip
        model = structured(model_type, "AutoModelForSequenceClassification")
        tune(model, "layer-decay", decay=0.5)
        full = {name for name, _ in model.named_parameters() if model.tuning.scales.get(name, 1.0) == 1}
        inside = {name for name in full if name.startswith(f"{model.base_model_prefix}.")}
        last = [id(p) for p in anatomy.layers(model)[-1].parameters()]
        assert all(top in name or id(model.get_parameter(name)) in last for name in inside)
    model = structured("deberta-v2", "AutoModelForSequenceClassification")
    tune(model, "layer-decay", decay=0.5)
    scales = model.tuning.scales
    assert scales["deberta.encoder.LayerNorm.weight"] == scales["deberta.embeddings.word_embeddings.weight"] == 0.25


def test_computed_positions_never_train():
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.MarianConfig(vocab_size=64, d_model=16, pad_token_id=1, max_position_embeddings=40, **sizes)
    model = nn.Module()
    model.base_model, model.head = transformers.MarianModel(config), nn.Linear(16, 2)
    names = {"base_model.encoder.embed_positions.weight", "base_model.decoder.embed_positions.weight"}
    for strategy in ("full", "gradual-unfreezing"):
        tune(model, strategy)
        assert {n for n, _ in model.named_parameters()} - trainable(model) == names
        assert not names & {n for stage in model.tuning.stages for n in stage}
    merge(model)
    assert {n for n, _ in model.named_parameters()} - trainable(model) == names


def test_what_selects_nothing_is_refused(tiny_model):
    tuned = tiny_model(model_type="modernbert")  # ModernBERT's linear layers and norms have no bias
    with pytest.raises(ValueError, match="no biases found in ModernBertModel; choose another strategy"):
        tune(tuned, "bitfit")
    bare = nn.Module()
    bare.base_model, bare.head = nn.Linear(2, 2), nn.Linear(2, 2)
    for strategy, what in (("frozen-embeddings", "embeddings"), ("layer-norm", "normalization layers")):
        with pytest.raises(ValueError, match=f"no {what} found in Linear"):
            tune(bare, strategy)


# --------------------------------------------------------------------------------------- strategies on any structure

CHOICES = {
    "last-layers": dict(layers=1), "frozen-embeddings": {}, "bitfit": {}, "layer-norm": {}, "lora": {}, "houlsby": {},
    "pfeiffer": {}, "gradual-unfreezing": dict(until=0.0), "layer-decay": {},
}  # fmt: skip
SHAPES = ("gpt2", "llama", "xlnet", "t5", "bart", "deberta", "falcon", "modernbert", "qwen3_moe", "funnel", "albert")
NOTHING = {  # what these structures do not have
    "bitfit": ("llama", "t5", "modernbert", "qwen3_moe"), "lora": ("xlnet",), "houlsby": ("xlnet", "qwen3_moe"),
    "pfeiffer": ("qwen3_moe",), "last-layers": ("albert",), "gradual-unfreezing": ("albert",),
    "layer-decay": ("albert",),
}  # fmt: skip


def is_bias(name):
    return name.split(".")[-1] in ("bias", "q_bias", "v_bias", "r_w_bias", "r_r_bias", "r_s_bias")


PICKED = {  # strategy -> whether a parameter of the stock model, by its name, trains
    "bitfit": is_bias,
    "layer-norm": lambda name: any(part in name.lower() for part in ("norm", ".ln_")),
    "frozen-embeddings": lambda name: (
        "seg_embed" in name
        or not any(  # of each layer
            part in name for part in ("embed", "shared", "wte", "wpe", "word_embedding", "mask_emb")
        )
    ),
}


@pytest.mark.parametrize("strategy", CHOICES)
@pytest.mark.parametrize("model_type", SHAPES)
def test_a_strategy_selects_on_any_structure_and_a_step_moves_just_that(model_type, strategy):
    model = structured(model_type, "AutoModelForSequenceClassification")
    inside = f"{model.base_model_prefix}."
    stock = {name for name, _ in model.named_parameters() if name.startswith(inside)}
    if model_type in NOTHING.get(strategy, ()):
        with pytest.raises(ValueError, match=r"no biases|no last layers|match no linear layer|no .* block that ends"):
            tune(model, strategy, **CHOICES[strategy])
        return
    tune(model, strategy, **CHOICES[strategy])
    names = trainable(model)
    assert any(name.startswith(inside) and "pooler" not in name for name in names)  # not the head alone
    if strategy in PICKED:
        assert {n for n in names if n.startswith(inside) and "pooler" not in n} == {
            n for n in stock if PICKED[strategy](n) and "pooler" not in n
        }
    moving = optimizer(model, quick(optimizer="sgd", learning_rate=1.0, weight_decay=0.0))
    assert {id(p) for g in moving.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.tensor([[5, 6, 7, 8, 9, 3]]), labels=torch.tensor([1])).loss.backward()
    moving.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    pushed = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
    assert pushed <= moved <= names and any(name.startswith(inside) for name in moved)


def test_the_message_lists_what_could_be_named():
    with pytest.raises(
        ValueError, match=r"match no linear layer; the layers have layer_1, layer_2; or use 'all-linear'"
    ):
        tune(structured("xlnet", "AutoModelForSequenceClassification"), "lora")
    with pytest.raises(ValueError, match="gate_up_proj holds experts in one parameter, which is no linear layer"):
        tune(structured("mixtral", "AutoModelForSequenceClassification"), "lora", targets="all-linear")


SETTINGS = {
    "layers": dict(layers_to_transform=[1]), "bias": dict(bias="all"), "lora_only": dict(bias="lora_only"),
    "without": dict(target_modules="all-linear", exclude_modules=r".*\.0\..*"), "dora": dict(use_dora=True),
    "ranks": dict(rank_pattern={"query": 4, "q_proj": 4, "q_lin": 4}), "saved": dict(modules_to_save=["LayerNorm"]),
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "modernbert", "mpnet", "gpt2", "t5", "qwen3_moe"])
def test_pefts_settings_are_kept(model_type, settings):
    peft = pytest.importorskip("peft")
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    ours, theirs = (structured(model_type, "AutoModelForSequenceClassification") for _ in range(2))
    tune(ours, peft.LoraConfig(r=2, **SETTINGS[settings]))
    config = peft.LoraConfig(r=2, **SETTINGS[settings], task_type="SEQ_CLS")
    if config.target_modules is None and model_type not in known:
        config.target_modules = ["query", "value", "q_lin", "v_lin", "Wqkv", "q_proj", "v_proj", "q", "v"]
    config.modules_to_save = [*(config.modules_to_save or []), *anatomy.head_modules(theirs)]
    theirs = peft.get_peft_model(theirs, config).get_base_model()
    expected = {name: p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in ours.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_all_linear_of_pefts_holds_the_experts(model_type):
    peft = pytest.importorskip("peft")
    found = []
    for apply in (lambda m, config: tune(m, config), peft.get_peft_model):
        model = structured(model_type, "AutoModelForSequenceClassification")
        apply(model, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"))
        found.append({name: p.shape for name, p in model.named_parameters() if "lora_" in name})
    assert found[0] == found[1] and any("experts" in name for name in found[0])
    model = structured(model_type, "AutoModelForSequenceClassification")
    tune(model, peft.LoraConfig(r=2))
    assert sum("lora_A" in name for name in trainable(model)) == 2 * 2  # query and value of two layers


def test_parameters_that_a_peft_configuration_names():
    peft = pytest.importorskip("peft")
    for modules in ([], None, ["q_proj"]):
        model = structured("qwen3_moe", "AutoModelForSequenceClassification")
        tune(model, peft.LoraConfig(r=2, target_modules=modules, target_parameters=["mlp.experts.gate_up_proj"]))
        parts = {name.split("layers.")[1].split(".lora_")[0][2:] for name in trainable(model) if "lora_" in name}
        assert parts == {"mlp.experts"} | ({"self_attn.q_proj"} if modules else set())


def test_a_head_with_the_words_weights():
    """A language model's head came trained, and is tied to the embeddings: adapters may go in, it alone can't train."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2))
    assert anatomy.head_modules(model) == []
    with pytest.raises(ValueError, match="'head-only' needs a task head"):
        tune(model, "head-only")
    assert tune(model, "lora", rank=2).trainable == 2 * 2 * (16 + 48)
    masked = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    assert anatomy.head_modules(masked) == []
    with pytest.raises(ValueError, match="'head-only' needs a task head"):
        tune(masked, "head-only")
    tune(masked, "lora", rank=2)
    assert not any(n.startswith("cls.") for n in trainable(masked))


@pytest.mark.parametrize("strategy", ["lora", "houlsby", "pfeiffer", "mixout"])
def test_gpt2s_layers_are_linear_too(tiny_model, strategy):
    """Conv1D holds its weight as (in, out): a layer has c_attn, 16 to 48, c_proj, 16 to 16, c_fc, 16 to 32, c_proj."""
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = tiny_model(model_type="gpt2", n_embd=16, n_layer=2, n_head=2, n_inner=32, **off)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    options = {"lora": dict(targets="all-linear", rank=2), "mixout": dict(p=0.5)}.get(strategy, dict(reduction=4))
    found = tune(model, strategy, **options)
    assert_close(model(ids).logits, before, atol=1e-6, rtol=0)
    if strategy == "mixout":
        assert_close(model.train()(ids).logits, before, atol=1e-6, rtol=0)  # W is still W0
        return
    bottleneck = 2 * 16 * 4 + 4 + 16
    each = {"lora": 2 * (16 + 48 + 16 + 16 + 16 + 32 + 32 + 16), "houlsby": 2 * bottleneck, "pfeiffer": bottleneck}
    assert found.groups["adapters"] == (2 * each[strategy],) * 2
    if strategy == "lora":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_()
            expected = model(ids).logits
            assert float((expected - before).abs().max()) > 1e-3
            assert_close(merge(model)(ids).logits, expected, atol=1e-5, rtol=0)
        assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_gpt2_in_eight_bits(tiny_model):
    model = tiny_model(model_type="gpt2", n_embd=16, n_layer=2, n_head=2)
    ids, shapes = torch.tensor([[5, 6, 7]]), {n: p.shape for n, p in model.named_parameters()}
    with torch.no_grad():
        before = model(ids).logits
        tune(model, "lora", base_bits=8)  # on c_attn, as PEFT does
        assert_close(model(ids).logits, before, atol=0.02, rtol=0)
        expected = model(ids).logits
        assert_close(merge(model)(ids).logits, expected, atol=1e-5, rtol=0)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes


def test_several_heads(tiny_model):
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head("token-classification", 3)})
    found = tune(model, "head-only")
    parts = ("heads.a.classifier", "heads.b.classifier", "encoder.pooler.dense")
    assert trainable(model) == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert found.groups["head"] == (16 * 2 + 2 + 16 * 3 + 3,) * 2
    assert anatomy.base_of(model) is model.encoder
    assert len(anatomy.layers(model)) == 2


def test_the_encoder_inside_peft(tiny_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert type(anatomy.base_of(model)).__name__ == "BertModel"
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


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_decay_groups_are_the_trainers_on_any_structure(model_type, tmp_path):
    """Biases of other names (DeBERTa's q_bias, XLNet's r_w_bias, T5's relative_attention_bias.weight) do not decay."""
    model = structured(model_type, "AutoModelForSequenceClassification")
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    decayed = set(transformers.Trainer(model, arguments).get_decay_parameter_names(model))
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    found = {id(p) for group in groups if group["decayed"] for p in group["params"]}
    named = dict(model.named_parameters())  # theirs has tied weights under both names
    assert {name for name, p in named.items() if id(p) in found} == decayed & named.keys()


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
    "electra": 128 * (64 + 40 + 2 + 2) + 129 * 16, "modernbert": 16 * 64 + 16, "albert": 8 * (64 + 40 + 2 + 2) + 9 * 16,
}  # fmt: skip


@pytest.mark.parametrize("model_type", KINDS)
def test_counted_by_hand(tiny_model, model_type):
    model = tiny_model(model_type=model_type)
    total = sum(p.numel() for p in model.parameters())
    assert tune(model, "head-only").trainable == HEAD[model_type]
    if BIASES[model_type]:
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


@pytest.mark.parametrize("prompts", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_of_encoder_decoders_are_refused(prompts):
    peft = pytest.importorskip("peft")
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForSequenceClassification(config)
    with pytest.raises(ValueError, match="_TUNING does not go into t5's head; use LoRA, say"):
        tune(model, getattr(peft, prompts)(num_virtual_tokens=2))
