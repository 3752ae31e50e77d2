"""The parts of every architecture, written by hand from its configuration; who answers a module's calls."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from torch import nn

from ftlib.core import anatomy

# Three layers of width 16 (three and two in an encoder-decoder), 64 words, 40 positions, padding id 1.
SIZES = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=40, pad_token_id=1,
)  # fmt: skip
SHARED = SIZES | dict(num_key_value_heads=1, head_dim=8)  # both heads read one key and value
PAIR = dict(
    vocab_size=64, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40, pad_token_id=1,
)  # fmt: skip
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}


def norm(name, parts=("weight", "bias")):
    return {f"{name}.{part}" for part in parts}


# model type -> (configuration, layers of each stack, longest row, head's modules, what is no embedding, layer or head)
TABLE = {
    "bert": (SIZES, [3], 40, ["bert.pooler", "classifier"], POOLER),
    "roberta": (SIZES, [3], 38, ["classifier"], set()),  # positions are counted from the padding id on
    "camembert": (SIZES, [3], 38, ["classifier"], set()),
    "xlm-roberta": (SIZES, [3], 38, ["classifier"], set()),
    "longformer": (SIZES, [3], 38, ["classifier"], set()),
    "mpnet": (SIZES, [3], 38, ["classifier"], {"encoder.relative_attention_bias.weight"}),
    "distilbert": (
        dict(vocab_size=64, dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=40),
        [3], 40, ["pre_classifier", "classifier"], set(),
    ),
    "electra": (SIZES, [3], 40, ["classifier"], set()),
    "convbert": (SIZES, [3], 40, ["classifier"], set()),
    "deberta-v2": (SIZES, [3], 40, ["pooler", "classifier"], set()),
    "modernbert": (SIZES, [3], 40, ["head", "classifier"], {"final_norm.weight"}),
    "nomic_bert": (SIZES, [3], 40, ["nomic_bert.pooler", "classifier"], POOLER),
    "eurobert": (SIZES, [3], 40, ["dense", "classifier"], {"norm.weight"}),
    "mobilebert": (
        SIZES | dict(embedding_size=8, true_hidden_size=8, intra_bottleneck_size=8),
        [3], 40, ["mobilebert.pooler", "classifier"], POOLER,
    ),  # a list of feed-forward networks inside each layer
    "albert": (SIZES, [1], 40, ["albert.pooler", "classifier"], norm("pooler")),  # one set of weights
    "funnel": (
        dict(vocab_size=64, block_sizes=[1, 2], num_decoder_layers=2, d_model=16, n_head=2, d_head=8, d_inner=32),
        [3], None, ["classifier"], set(),
    ),  # a list of lists
    "xlnet": (
        dict(vocab_size=64, d_model=16, n_layer=3, n_head=2, d_inner=32),
        [3], None, ["sequence_summary", "logits_proj"], set(),
    ),  # it says -1: no limit
    "gpt2": (
        dict(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=40), [3], 40, ["score"], norm("ln_f"),
    ),
    "llama": (SIZES, [3], 40, ["score"], {"norm.weight"}),
    "mistral": (SHARED, [3], 40, ["score"], {"norm.weight"}),
    "qwen2": (SHARED, [3], 40, ["score"], {"norm.weight"}),
    "qwen3": (SHARED, [3], 40, ["score"], {"norm.weight"}),
    "gemma": (SHARED, [3], 40, ["score"], {"norm.weight"}),
    "gemma2": (SHARED, [3], 40, ["score"], {"norm.weight"}),
    "phi": (SIZES, [3], 40, ["score"], norm("final_layernorm")),
    "olmo": (SIZES, [3], 40, ["score"], set()),  # its norms have no weights
    "gpt_neox": (SIZES, [3], 40, ["score"], norm("final_layer_norm")),
    "falcon": (SIZES, [3], 40, ["score"], norm("ln_f")),
    "bloom": (dict(vocab_size=64, hidden_size=16, n_layer=3, n_head=2), [3], None, ["score"], norm("ln_f")),
    "opt": (
        SIZES | dict(ffn_dim=32, word_embed_proj_dim=16), [3], 40, ["score"], norm("decoder.final_layer_norm"),
    ),
    "t5": (
        dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2),
        [3, 2], None, ["classification_head"],
        {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"},
    ),
    "bart": (PAIR, [3, 2], 40, ["classification_head"], set()),
    "mbart": (
        PAIR, [3, 2], 40, ["classification_head"], norm("encoder.layer_norm") | norm("decoder.layer_norm"),
    ),
    "pegasus": (PAIR, [3, 2], 40, [], norm("encoder.layer_norm") | norm("decoder.layer_norm")),
    "marian": (PAIR, [3, 2], 40, [], set()),
    "led": (
        {k: v for k, v in PAIR.items() if k != "max_position_embeddings"}
        | dict(max_encoder_position_embeddings=40, max_decoder_position_embeddings=30, attention_window=4),
        [3, 2], 40, [], set(),
    ),
}  # fmt: skip
ALL = [
    pytest.param(
        name, marks=pytest.mark.skipif(name not in transformers.CONFIG_MAPPING, reason=f"transformers has no {name}")
    )
    for name in TABLE
]


def build(name):
    """The classifier of texts where there is one, else the base model."""
    config = transformers.CONFIG_MAPPING[name](**TABLE[name][0])
    has_head = type(config) in transformers.AutoModelForSequenceClassification._model_mapping
    auto = transformers.AutoModelForSequenceClassification if has_head else transformers.AutoModel
    return auto.from_config(config).eval()


def test_the_table_is_long_enough():
    assert len(TABLE) >= 25


@pytest.mark.parametrize("name", ALL)
def test_the_parts(name):
    _, counts, longest, head, rest = TABLE[name]
    model = build(name)
    base = anatomy.base_of(model)
    assert (base is model) == (not head) and anatomy.base_of(base) is base and anatomy.kind_of(model) == name
    found = anatomy.stacks(model)
    assert [len(stack) for stack in found] == counts
    assert all(len({type(layer) for layer in stack}) == 1 for stack in found)
    assert anatomy.max_positions(model.config) == longest
    assert anatomy.head_modules(model) == head
    parts = {
        "layers": [p for stack in found for layer in stack for p in layer.parameters()],
        "embeddings": anatomy.embeddings(model),
        "head": [p for p in model.parameters() if not any(p is q for q in base.parameters())],
        "rest": [p for n, p in base.named_parameters() if n in rest],
    }
    assert len(parts["rest"]) == len(rest) and bool(parts["head"]) == bool(head)
    ids = [id(p) for part in parts.values() for p in part]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    words = model.get_input_embeddings().weight
    assert any(p is words for p in parts["embeddings"])


@pytest.mark.parametrize("name", ALL)
def test_the_stack_next_to_the_head(name):
    """The layer that runs last, by hooks, is the last of `layers`, and the first of all is the first stack's first."""
    model, order = build(name), []
    if name == "albert":
        with pytest.raises(ValueError, match="ALBERT's layers share one set of weights"):
            anatomy.layers(model)
        return
    layers, first = anatomy.layers(model), anatomy.stacks(model)[0][0]
    for stack in anatomy.stacks(model):
        for layer in stack:
            layer.register_forward_pre_hook(lambda module, args, order=order: order.append(module))
    ids = torch.tensor([[5, 6, 7, 8]])
    extra = {"decoder_input_ids": ids} if len(TABLE[name][1]) == 2 else {}
    with torch.no_grad():
        anatomy.base_of(model)(input_ids=ids, **extra)
    assert order[0] is first and order[-len(layers) :] == layers and len(order) == sum(TABLE[name][1])


@pytest.mark.parametrize("name", "bert roberta longformer mpnet distilbert gpt2 electra camembert".split())
def test_a_longest_row_fits_and_one_more_does_not(name):
    model = build(name)
    longest = TABLE[name][2]
    with torch.no_grad():
        model(torch.full((1, longest), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, longest + 8), 5))


@pytest.mark.parametrize("name", ["esm", "ibert", "lilt", "luke", "xmod"])
def test_positions_after_the_padding_id(name):
    options = {"luke": dict(entity_vocab_size=8), "xmod": dict(default_language="en_XX"), "esm": dict(mask_token_id=2)}
    config = transformers.CONFIG_MAPPING[name](**SIZES | dict(hidden_size=24) | options.get(name, {}))
    model = transformers.AutoModel.from_config(config).eval()
    assert anatomy.max_positions(config) == 38
    with torch.no_grad():
        model(torch.full((1, 38), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 39), 5))


def test_other_heads_and_wrappers(tiny_model):
    from ftlib.methods.multitask import Head, MultiTaskModel

    encoder = tiny_model("encoder")
    several = MultiTaskModel(encoder, {"a": Head()})
    assert anatomy.base_of(several) is encoder and len(anatomy.layers(several)) == 2
    assert anatomy.head_modules(several) == ["encoder.pooler", "heads"]
    peft = pytest.importorskip("peft")
    task = tiny_model()
    bert, layers = task.bert, anatomy.layers(task)
    wrapped = peft.get_peft_model(task, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert anatomy.unwrapped(wrapped) is task and anatomy.base_of(wrapped) is bert
    assert anatomy.layers(wrapped) == layers and anatomy.kind_of(wrapped) == "bert"
    several.encoder = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["query"]))
    assert anatomy.base_of(several) is encoder


def test_both_stacks_of_funnel_and_of_a_generator():
    options, *_ = TABLE["funnel"]
    tagger = transformers.AutoModelForTokenClassification.from_config(transformers.FunnelConfig(**options))
    assert [len(stack) for stack in anatomy.stacks(tagger)] == [3, 2]
    generator = transformers.T5ForConditionalGeneration(transformers.T5Config(**TABLE["t5"][0]))
    assert [len(stack) for stack in anatomy.stacks(generator)] == [3, 2]
    encoder = transformers.T5EncoderModel(transformers.T5Config(**TABLE["t5"][0]))
    assert [len(stack) for stack in anatomy.stacks(encoder)] == [3]


def test_what_has_no_list_of_layers():
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        anatomy.layers(nn.Linear(2, 2))
    config = transformers.XLMConfig(vocab_size=64, n_words=64, emb_dim=16, n_layers=3, n_heads=2)
    model = transformers.XLMModel(config)  # attention and feed-forward networks are in lists of their own
    assert [len(stack) for stack in anatomy.stacks(model)] == [3, 3]
    with pytest.raises(ValueError, match="XLMModel has no list of layers"):
        anatomy.layers(model)
    plain = nn.Module()
    plain.layers, plain.gates = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]), nn.ModuleList([nn.Linear(2, 2)] * 3)
    assert anatomy.stacks(plain) == [list(plain.layers)]


def test_normalizes():
    found = [anatomy.normalizes(m) for m in (nn.LayerNorm(2), nn.RMSNorm(2), nn.Linear(2, 2), nn.BatchNorm1d(2))]
    assert found == [True, True, False, True]
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert anatomy.normalizes(LlamaRMSNorm(2))


# -------------------------------------------------------------------------------------------- around a forward pass


def test_evaluating_puts_every_module_back(tiny_model):
    model = tiny_model().train()
    model.bert.pooler.eval()
    with pytest.raises(KeyError), anatomy.evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and model.bert.training and not model.bert.pooler.training and torch.is_grad_enabled()


def times(module, factor, x):
    return type(module).forward(module, x) * factor


def test_a_forward_that_was_put_there():
    linear = nn.Linear(2, 2)
    x, own = torch.ones(1, 2), linear(torch.ones(1, 2))
    assert anatomy.taken_by(linear) is None
    anatomy.put_forward(linear, times, 3, signature=True)
    assert torch.equal(linear(x), own * 3) and list(inspect.signature(linear.forward).parameters) == ["input"]
    assert anatomy.taken_by(linear).func is times and anatomy.taken_by(linear).args == (linear, 3)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        with torch.no_grad():
            other.weight.zero_(), other.bias.fill_(1)
        assert other(x).tolist() == [[3.0, 3.0]] and torch.equal(linear(x), own * 3)  # each by its own weights
    anatomy.take_forward(linear)
    anatomy.take_forward(linear)
    assert torch.equal(linear(x), own) and "forward" not in vars(linear)


def test_forwards_put_back_exactly_what_was_there():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    mine = second.forward = second.forward
    with pytest.raises(KeyError), anatomy.forwards({m: lambda module, x: x for m in (first, second)}):
        assert first("x") == second("x") == "x"
        with anatomy.forwards({first: lambda module, x: 2 * x}):
            assert first("x") == "xx"
        assert first("x") == "x"
        raise KeyError
    assert "forward" not in vars(first) and vars(second)["forward"] is mine
