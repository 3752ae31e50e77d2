"""Attention against three twins (torch's function and module, Transformers' BERT), by hand, and bad input."""

import importlib.util
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ftlib.methods.attention
from ftlib.methods.attention import (
    MultiHeadAttention,
    attention_flow,
    attention_maps,
    rollout,
    scaled_dot_product_attention,
)  # fmt: skip
from ftlib.methods.masking import causal_mask, combine_masks, padding_mask


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def random_tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


# ---- the function ----


def test_two_keys_by_hand():
    query = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # (queries, head_dim), √head_dim = 2
    key = torch.tensor([[2 * math.log(3), 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]])  # scores ln 3 and 0
    value = torch.tensor([[4.0], [8.0]])
    output, weights = scaled_dot_product_attention(query, key, value, return_weights=True)
    close(weights, torch.tensor([[0.75, 0.25]]))  # e^ln3 : e^0 = 3 : 1
    close(output, torch.tensor([[5.0]]))
    masked, weights = scaled_dot_product_attention(
        query, key, value, torch.tensor([[False, True]]), return_weights=True
    )
    assert weights.tolist() == [[0.0, 1.0]] and masked.tolist() == [[8.0]]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 5),
    keys=st.integers(1, 5),
    mask_kind=st.sampled_from(["none", "keys", "full", "queries-keys"]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 999),
)
def test_same_as_torch_with_gradients(batch, heads, queries, keys, mask_kind, causal, scale, seed):
    q, k, v = random_tensors(
        (batch, heads, queries, 4), (batch, heads, keys, 4), (batch, heads, keys, 3), seed=seed
    )
    shape = {
        "keys": (batch, 1, 1, keys),
        "full": (batch, heads, queries, keys),
        "queries-keys": (queries, keys),
    }
    mask = None
    if mask_kind != "none":
        mask = torch.rand(shape[mask_kind], generator=torch.Generator().manual_seed(seed)) > 0.3
    ours, weights = scaled_dot_product_attention(
        q, k, v, mask, causal=causal, scale=scale, return_weights=True
    )
    past = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    allowed = combine_masks(mask, past)
    theirs = F.scaled_dot_product_attention(q, k, v, allowed, scale=scale)
    some = torch.ones(queries, keys, dtype=torch.bool) if allowed is None else allowed
    some = some.expand(batch, heads, queries, keys).any(-1)  # (batch, heads, queries)
    close(ours[some], theirs[some])
    close(weights.sum(-1), some.float())  # a row sums to 1, or to 0 where nothing may be attended
    assert torch.all(ours[~some] == 0)
    our_gradients = torch.autograd.grad(ours[some].square().sum(), (q, k, v))
    their_gradients = torch.autograd.grad(theirs[some].square().sum(), (q, k, v))
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        close(our_gradient, their_gradient)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_query_with_nothing_to_attend_gives_zeros_and_finite_gradients():
    q, k, v = random_tensors((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    with (
        torch.autograd.detect_anomaly()
    ):  # raises when any step of backward makes a NaN, even one that is masked
        output, weights = scaled_dot_product_attention(q, k, v, mask, return_weights=True)
        output.sum().backward()
    assert torch.all(output[:, :, 1] == 0) and torch.all(weights[:, :, 1] == 0)
    for tensor in (q, k, v):
        assert torch.isfinite(tensor.grad).all()
    assert torch.all(q.grad[:, :, 1] == 0) and v.grad[:, :, 0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_stay_in_their_type(dtype):
    q, k, v = (tensor.to(dtype) for tensor in random_tensors((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)))
    ours = scaled_dot_product_attention(q, k, v, torch.ones(3, 5, dtype=torch.bool).tril())
    theirs = F.scaled_dot_product_attention(q, k, v, torch.ones(3, 5, dtype=torch.bool).tril())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_dropout_follows_its_generator_and_keeps_the_mean():
    q, k, v = random_tensors((1, 1, 200, 4), (1, 1, 50, 4), (1, 1, 50, 1))

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return scaled_dot_product_attention(q, k, v, dropout=0.4, generator=generator, return_weights=True)

    (first, weights), (again, _), (other, _) = run(1), run(1), run(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (weights == 0).float().mean() == pytest.approx(0.4, abs=0.02)  # 10,000 draws: 4 standard errors
    assert weights.sum(-1).mean().item() == pytest.approx(1.0, abs=0.03)
    plain = scaled_dot_product_attention(q, k, v, return_weights=True)[1]
    close(weights, torch.where(weights == 0, 0.0, plain / 0.6))


# ---- the layer ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_layer_same_as_nn_multihead_attention(bias, causal):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)  # its biases start at zero, which would hide a forgotten one
    ours = MultiHeadAttention.from_torch(theirs)
    x = torch.randn(2, 5, 12, requires_grad=True)
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected, expected_weights = theirs(
        x,
        x,
        x,
        key_padding_mask=~attention_mask.bool(),  # the opposite convention: True = ignore
        attn_mask=~causal_mask(5) if causal else None,
        average_attn_weights=False,
    )
    output, weights = ours(x, mask=padding_mask(attention_mask), causal=causal, return_weights=True)
    close(output, expected)
    close(weights, expected_weights)
    close(ours(x, mask=padding_mask(attention_mask), causal=causal), expected)  # the fused path
    (gradient,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    close(gradient, expected_gradient)


def test_layer_cross_attention_same_as_nn_multihead_attention():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    ours = MultiHeadAttention.from_torch(theirs)
    x, memory, other = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    close(ours(x, memory), theirs(x, memory, memory)[0])
    close(ours(x, memory, other), theirs(x, memory, other)[0])
    for return_weights in (True, False):
        causal = ours(x, memory, causal=True, return_weights=return_weights)
        expected = theirs(x, memory, memory, attn_mask=~torch.ones(3, 5, dtype=torch.bool).tril())[0]
        close(causal[0] if return_weights else causal, expected)


def bert_config(**changes):
    from transformers import BertConfig

    tiny = dict(
        vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16
    )
    return BertConfig(**{**tiny, **changes})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_layer_same_as_transformers_bert(implementation):
    from transformers import BertModel

    torch.manual_seed(0)
    bert = BertModel(bert_config(initializer_range=0.5, attn_implementation=implementation)).eval()
    attention = bert.encoder.layer[1].attention
    for layer in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense):
        nn.init.normal_(layer.bias)
    ours = MultiHeadAttention.from_bert(attention)
    x = torch.randn(2, 5, 12)
    mask = padding_mask(torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = attention(x, attention_mask=additive)[0]
    close(attention.output.LayerNorm(x + ours(x, mask=mask)), expected)
    if implementation == "eager":
        weights = attention.self(x, attention_mask=additive)[1]
        close(ours(x, mask=mask, return_weights=True)[1], weights)


def test_layer_takes_over_dropout_dtype_and_mode():
    from transformers import BertModel

    attention = (
        BertModel(bert_config(attention_probs_dropout_prob=0.25)).double().eval().encoder.layer[0].attention
    )
    ours = MultiHeadAttention.from_bert(attention)
    assert ours.dropout == 0.25 and ours.query.weight.dtype == torch.float64 and not ours.training
    assert MultiHeadAttention.from_torch(nn.MultiheadAttention(4, 2, dropout=0.5)).training
    ours.query.weight.data.zero_()
    assert attention.self.query.weight.abs().sum() > 0  # a copy, not a view


def test_layer_drops_weights_in_training_only():
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.randn(2, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    assert (layer(x, return_weights=True)[1] == 0).any()
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert (layer(x, return_weights=True)[1] > 0).all()


@pytest.mark.parametrize("return_weights", [True, False])
def test_layer_with_a_fully_padded_row(return_weights):
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2)
    x = torch.randn(2, 3, 8, requires_grad=True)
    output = layer(x, mask=padding_mask(torch.tensor([[1, 1, 0], [0, 0, 0]])), return_weights=return_weights)
    output = output[0] if return_weights else output
    close(output[1], layer.output.bias.expand(3, 8))  # the output layer of zeros
    output.square().sum().backward()
    assert torch.isfinite(x.grad).all() and all(torch.isfinite(p.grad).all() for p in layer.parameters())


# ---- attention maps ----


def tiny_encoder(kind, **options):
    import transformers as tf

    torch.manual_seed(0)
    if kind == "bert":
        return tf.BertModel(bert_config(**options))
    if kind == "bert-classifier":
        return tf.BertForSequenceClassification(bert_config(**options))
    if kind == "distilbert":
        sizes = dict(vocab_size=30, dim=12, n_layers=2, n_heads=3, hidden_dim=16)
        return tf.DistilBertModel(tf.DistilBertConfig(**sizes, **options))
    sizes = dict(
        vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16
    )
    return tf.RobertaModel(tf.RobertaConfig(**sizes, **options))


BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


@pytest.mark.parametrize("kind", ["bert", "bert-classifier", "distilbert", "roberta"])
def test_maps_of_encoders(kind):
    model = tiny_encoder(kind)
    before = model.config._attn_implementation
    maps = attention_maps(model, **BATCH)
    assert before == "sdpa" == model.config._attn_implementation and model.training
    assert maps.shape == (2, 2, 3, 4, 4) and maps.dtype == torch.float32 and not maps.requires_grad
    close(maps.sum(-1), torch.ones(2, 2, 3, 4))
    assert torch.all(maps[:, 1, :, :, 2:] == 0) and torch.all(maps[:, :, :, :, :2] > 0)
    eager = tiny_encoder(kind, attn_implementation="eager").eval()
    expected = torch.stack(eager(**BATCH, output_attentions=True).attentions)
    close(maps, expected)


def test_maps_are_what_the_layer_computes():
    model = tiny_encoder("bert").eval()
    maps = attention_maps(model, **BATCH)
    ours = MultiHeadAttention.from_bert(model.encoder.layer[0].attention)
    x = model.embeddings(BATCH["input_ids"])
    close(maps[0], ours(x, mask=padding_mask(BATCH["attention_mask"]), return_weights=True)[1])


def test_maps_put_everything_back_when_the_model_raises():
    model = tiny_encoder("bert-classifier").train()
    model.bert.encoder.layer[0].eval()  # a frozen layer kept in eval mode, as head-only tuning does
    modes = [module.training for module in model.modules()]
    with pytest.raises(IndexError):
        attention_maps(model, input_ids=torch.tensor([[5, 99]]))  # 99 is outside the vocabulary of 30
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa" == model.bert.config._attn_implementation
    attention_maps(model, **BATCH)
    assert [module.training for module in model.modules()] == modes


def test_maps_of_a_half_precision_model_and_of_embeddings():
    model = tiny_encoder("bert").to(torch.bfloat16)
    assert attention_maps(model, **BATCH).dtype == torch.float32
    embeds = torch.randn(2, 4, 12, dtype=torch.bfloat16)
    assert attention_maps(model, inputs_embeds=embeds).shape == (2, 2, 3, 4, 4)


def test_maps_refuse_what_has_none():
    with pytest.raises(TypeError, match="Linear has no set_attn_implementation"):
        attention_maps(nn.Linear(2, 2))

    class Flat(nn.Module):  # what an unpadded encoder returns: one row of all real tokens
        def set_attn_implementation(self, name):
            pass

        def forward(self, input_ids, output_attentions, return_dict):
            return {"attentions": None if input_ids is None else (torch.ones(1, 3, 6, 6),)}

    with pytest.raises(ValueError, match=r"shape \(1, 3, 6, 6\) for 2 rows of 4 tokens.*repad"):
        attention_maps(Flat(), input_ids=BATCH["input_ids"])
    with pytest.raises(ValueError, match="Flat returned no attention weights"):
        attention_maps(Flat(), input_ids=None)


# ---- errors ----


def test_errors_say_what_to_do():
    x = torch.randn(2, 2, 3, 4)
    with pytest.raises(TypeError, match=r"mask is torch.int64.*padding_mask\(attention_mask\)"):
        scaled_dot_product_attention(x, x, x, torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"mask of shape \(2, 3, 3\) does not fit scores of shape \(2, 2, 3, 3\)"
    ):
        scaled_dot_product_attention(x, x, x, torch.ones(2, 3, 3, dtype=torch.bool))  # batch or heads?
    with pytest.raises(ValueError, match=r"query \(2, 2, 3, 4\), key \(2, 2, 3, 5\)"):
        scaled_dot_product_attention(x, torch.randn(2, 2, 3, 5), x)
    with pytest.raises(
        TypeError, match=r"torch.float32, torch.float64 and torch.float32; .*\.to\(query.dtype\)"
    ):
        scaled_dot_product_attention(x, x.double(), x)
    with pytest.raises(ValueError, match=r"dropout is 1.0"):
        scaled_dot_product_attention(x, x, x, dropout=1.0)
    with pytest.raises(ValueError, match="hidden_size 10 is not a multiple of num_heads 3"):
        MultiHeadAttention(10, 3)
    with pytest.raises(ValueError, match=r"dropout is -0.1"):
        MultiHeadAttention(4, 2, dropout=-0.1)
    layer = MultiHeadAttention(4, 2)
    with pytest.raises(ValueError, match=r"key has shape \(2, 3, 6\); need \(batch, tokens, 4\)"):
        layer(torch.randn(2, 3, 4), torch.randn(2, 3, 6))
    with pytest.raises(ValueError, match=r"mask of shape \(2, 5\) does not fit"):
        layer(torch.randn(2, 3, 4), mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="add_bias_kv"):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(4, 2, add_bias_kv=True))
    with pytest.raises(ValueError, match="kdim"):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(4, 2, kdim=3))
    with pytest.raises(TypeError, match=r"Linear has no .self and .output.dense"):
        MultiHeadAttention.from_bert(nn.Linear(2, 2))


@settings(max_examples=80, deadline=None)
@given(
    query=st.lists(st.integers(0, 3), max_size=4),
    key=st.lists(st.integers(0, 3), max_size=4),
    mask=st.none() | st.lists(st.integers(0, 3), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    mask_dtype=st.sampled_from([torch.bool, torch.bool, torch.float32]),
    same=st.booleans(),
    causal=st.booleans(),
)
def test_bad_input_gives_value_or_type_errors_only(query, key, mask, dtype, mask_dtype, same, causal):
    q = torch.ones(query).to(dtype)
    k = q if same else torch.ones(key).to(dtype)
    m = None if mask is None else torch.zeros(mask, dtype=mask_dtype)
    try:
        output, weights = scaled_dot_product_attention(q, k, k, m, causal=causal, return_weights=True)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 30
    else:
        assert output.shape == q.shape and weights.shape == (*q.shape[:-1], k.shape[-2])
        assert torch.isfinite(output).all()


def test_layer_errors_are_the_same_on_both_paths():
    layer = MultiHeadAttention(4, 2)
    for return_weights in (True, False):
        with pytest.raises(TypeError, match=r"mask is torch\.float32"):
            layer(torch.randn(2, 3, 4), mask=torch.zeros(3, 3), return_weights=return_weights)


def test_runs_alone_in_an_empty_folder(tmp_path, monkeypatch):
    """What the docstring promises to someone who copies the file: it needs torch and nothing of ours."""
    copy = shutil.copy(ftlib.methods.attention.__file__, tmp_path / "copied_attention.py")
    for name in ("ftlib", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would now raise
    spec = importlib.util.spec_from_file_location("copied_attention", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MultiHeadAttention(4, 2)(torch.randn(1, 3, 4)).shape == (1, 3, 4)


# ---- maps through the layers ----


def test_rollout_by_hand():
    first, second = torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    maps = torch.stack(
        [torch.stack([first, 2 * torch.eye(2) - first]), torch.stack([second, second])]
    )  # (2, 2 heads, …)
    # (mean of heads + I) / 2: layer 1 the identity; layer 2 [[1, 0], [.25, .75]]
    close(rollout(maps[:, None]), torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]))
    maps[0, 1] = first  # layer 1 [[.75, .25], [0, 1]]
    close(rollout(maps[:, None]), torch.tensor([[[0.75, 0.25], [0.1875, 0.0625 + 0.75]]]))


def random_maps(layers=3, batch=2, heads=2, tokens=5):
    return (
        torch.randn(layers, batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    )


def test_rollouts_rows_sum_to_one():
    close(rollout(random_maps()).sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("output", [0, -1])
def test_attention_flow_is_networkxs_maximum_flow(output):
    networkx = pytest.importorskip("networkx")
    maps = random_maps()
    found = attention_flow(maps, output)
    mixed = (maps.mean(2) + torch.eye(5)) / 2
    for row in range(2):
        graph = networkx.DiGraph()
        for layer, query, key in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(5)).tolist():
            graph.add_edge((layer + 1, query), (layer, key), capacity=mixed[layer, row, query, key].item())
        expected = [networkx.maximum_flow_value(graph, (3, output % 5), (0, key)) for key in range(5)]
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=0, atol=1e-5)


def test_flow_through_one_layer_is_the_map_itself():
    maps = random_maps(layers=1)
    close(attention_flow(maps, 2), rollout(maps)[:, 2])


@pytest.mark.parametrize("function", [rollout, attention_flow])
def test_maps_of_another_shape_are_refused(function):
    with pytest.raises(ValueError, match=r"attentions of shape \(2, 3, 3\); need \(layers, batch, heads"):
        function(torch.ones(2, 3, 3))
