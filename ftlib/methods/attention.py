"""Attention by hand: the formula, the multi-head layer, and the maps of a pretrained encoder, rolled out.

A mask is boolean and True means "may attend" (masking.py makes them); `nn.MultiheadAttention` means the opposite.
To copy: this file alone (scipy for `attention_flow`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False,
    scale: float | None = None, dropout: float = 0.0, generator: torch.Generator | None = None,
    return_weights: bool = False,
):  # fmt: skip
    """softmax(Q Kᵀ / √head_dim) V: each query takes a mean of the values, weighted by how well keys match.

    query: float (…, queries, head_dim), key: (…, keys, head_dim), value: (…, keys, value_dim); mostly … is batch,
    heads. mask: bool, True = may attend, (queries, keys) or as many dimensions as the scores (…, queries, keys) with 1
    where shared. `causal` lets query i see keys 0 … i and combines with `mask`. `dropout`, the chance that a weight is
    zeroed, acts whenever it is above 0, as in F.scaled_dot_product_attention, drawn from `generator`.
    Returns (…, queries, value_dim), and with `return_weights` also the weights (…, queries, keys). A query that may
    attend to nothing gets zeros and zero gradients, as in F.scaled_dot_product_attention.
    Raises TypeError for a mask that is not bool, ValueError for shapes that don't fit.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.

    >>> query, key, value = torch.zeros(1, 2), torch.ones(2, 2), torch.tensor([[1.0], [3.0]])
    >>> scaled_dot_product_attention(query, key, value).item()  # equal scores: the plain mean of 1 and 3
    2.0
    """
    _check(query, key, value, mask, dropout)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale  # (…, queries, keys)
    if causal:
        mask = _past(query, key) if mask is None else mask & _past(query, key)
    if mask is None:
        weights = scores.softmax(dim=-1)  # (…, queries, keys), rows sum to 1
    else:
        # Nothing but -inf in a row would make its softmax 0/0 = NaN. The lowest finite number also gives a
        # forbidden key the weight 0, except in such a row: evenly spread there, until the second masked_fill.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)  # (…, queries, keys)
    if dropout > 0.0:
        kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout
        weights = weights * kept / (1 - dropout)  # same mean as without dropout
    output = weights @ value  # (…, queries, value_dim)
    return (output, weights) if return_weights else output


class MultiHeadAttention(nn.Module):
    """Several attentions side by side, each on its own slice of the features, then a linear layer mixes them.

    hidden_size: features per token, a multiple of num_heads. `dropout` zeroes weights in training mode only.
    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        if num_heads < 1 or hidden_size < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads} >= 1")
        _check_dropout(dropout)
        self.hidden_size, self.num_heads, self.dropout = hidden_size, num_heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(hidden_size, hidden_size, bias) for _ in range(4))

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, mask: Tensor | None = None, *,
        causal: bool = False, return_weights: bool = False,
    ):  # fmt: skip
        """Self-attention with `query` alone; cross-attention with `key` (and `value`, by default `key`).

        query: float (batch, queries, hidden), key and value: (batch, keys, hidden). mask: bool, True = may attend,
        (queries, keys) or (batch or 1, heads or 1, queries or 1, keys): `padding_mask` makes it of (batch, keys).
        Returns (batch, queries, hidden), and with `return_weights` also (batch, heads, queries, keys).
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.hidden_size:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; need (batch, tokens, {self.hidden_size})")
        q = self._split(self.query(query))  # (batch, heads, queries, head_dim)
        k = self._split(self.key(key))  # (batch, heads, keys, head_dim)
        v = self._split(self.value(value))  # (batch, heads, keys, head_dim)
        dropout = self.dropout if self.training else 0.0
        if return_weights:  # the formula, step by step
            options = {"causal": causal, "dropout": dropout, "return_weights": True}
            mixed, weights = scaled_dot_product_attention(q, k, v, mask, **options)
        else:  # the same numbers from the fused kernel, which never stores the (queries, keys) weights
            _check(q, k, v, mask, dropout)
            if causal and mask is not None:  # documented as an error in F.scaled_dot_product_attention
                mask, causal = mask & _past(q, k), False
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal)
        output = self.output(mixed.transpose(1, 2).flatten(2))  # (batch, queries, hidden)
        return (output, weights) if return_weights else output

    def _split(self, features: Tensor) -> Tensor:
        """(batch, tokens, hidden) -> (batch, heads, tokens, head_dim): head h owns the h-th slice."""
        return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> "MultiHeadAttention":
        """A copy of an `nn.MultiheadAttention`; always batch first, and True in its masks is "may attend"."""
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise ValueError("kdim, vdim, add_bias_kv, add_zero_attn have no counterpart here; build it without")
        bias = module.in_proj_bias is not None
        ours = cls(module.embed_dim, module.num_heads, dropout=module.dropout, bias=bias)
        weights = [*module.in_proj_weight.chunk(3), module.out_proj.weight]  # in one matrix; four of (hidden, hidden)
        biases = [*module.in_proj_bias.chunk(3), module.out_proj.bias] if bias else [None] * 4  # (hidden,)
        return ours._copy(weights, biases, module.training)

    @classmethod
    def from_bert(cls, attention: nn.Module) -> "MultiHeadAttention":
        """A copy of a Transformers `BertAttention` (RobertaAttention …), which gives output.LayerNorm(x + ours(x))."""
        if not hasattr(attention, "self") or not hasattr(getattr(attention, "output", None), "dense"):
            raise TypeError(f"{type(attention).__name__} has no .self and .output.dense; pass layer[0].attention")
        inner = attention.self
        layers = (inner.query, inner.key, inner.value, attention.output.dense)
        ours = cls(inner.query.in_features, inner.num_attention_heads, dropout=inner.dropout.p)
        return ours._copy([layer.weight for layer in layers], [layer.bias for layer in layers], attention.training)

    def _copy(self, weights: list, biases: list, training: bool) -> "MultiHeadAttention":
        self.to(weights[0])  # same device and dtype
        with torch.no_grad():
            for layer, weight, bias in zip(self.children(), weights, biases, strict=True):
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(bias)
        return self.train(training)


def attention_maps(model: nn.Module, **inputs) -> Tensor:
    """All attention weights of a Transformers encoder for a batch: who looked at whom, per layer and head.

    inputs: what the model takes, for example `**tokenizer(texts, return_tensors="pt", padding=True)`.
    Returns float32 (layers, batch, heads, queries, keys); each row of keys sums to 1, and those of padded queries mean
    nothing. The model runs in eval mode, with "eager" attention, and is put back.
    Raises TypeError for a model that is not from Transformers, ValueError when it gives no full maps.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"{type(model).__name__} has no set_attn_implementation; pass the Transformers model inside it")
    kept = [(module, "training", module.training) for module in model.modules()]
    # Outer modules come first, so inner configs, restored last, keep their own setting.
    configs, name = [getattr(module, "config", None) for module in model.modules()], "_attn_implementation"
    kept += [(config, name, getattr(config, name)) for config in configs if hasattr(config, name)]
    try:
        model.set_attn_implementation("eager")
        model.eval()
        with torch.no_grad():
            layers = model(**inputs, output_attentions=True, return_dict=True).get("attentions")
    finally:
        for before in kept:
            setattr(*before)
    if not layers or any(layer is None for layer in layers):
        raise ValueError(f"{type(model).__name__} returned no attention weights; has it an eager attention?")
    ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    batch, tokens = ids.shape[:2]
    for number, layer in enumerate(layers):
        if layer.dim() != 4 or layer.shape[0] != batch or layer.shape[2:] != (tokens, tokens):
            found = f"layer {number} gave weights of shape {tuple(layer.shape)} for {batch} rows of {tokens} tokens"
            raise ValueError(f"{found}; an unpadded model shows its maps after ftlib.repad(model)")
    return torch.stack([layer.float() for layer in layers])  # (layers, batch, heads, queries, keys)


def rollout(attentions: Tensor) -> Tensor:
    """How much of each input token is in each output, if maps were all there is: (batch, outputs, inputs).

    attentions: (layers, batch, heads, tokens, tokens), of `attention_maps`; the result's rows sum to 1, too.  A layer
    counts with the mean of its heads and, for the residual connection, the identity, (W + I) / 2; the layers are
    multiplied.  What values and feed-forward blocks do is left out.  Padding takes a share: rows of one length only.
    Source: Abnar and Zuidema 2020 (arXiv:2005.00928).

    >>> rollout(torch.tensor([[[[[0.0, 1.0], [0.0, 1.0]]]]]))
    tensor([[[0.5000, 0.5000],
             [0.0000, 1.0000]]])
    """
    reach = torch.eye(attentions.shape[-1], dtype=attentions.dtype, device=attentions.device)
    for weights in _with_residual(attentions):
        reach = weights @ reach  # (batch, outputs, inputs)
    return reach


def attention_flow(attentions: Tensor, output: int = 0) -> Tensor:
    """The most that can flow from one output to each input token, if maps were pipes: float32 (batch, tokens).

    The graph has a node for every token of every layer and `rollout`'s (W + I) / 2 as capacities; a maximum flow for
    each input.  Source: Abnar and Zuidema 2020 (arXiv:2005.00928).
    """
    from scipy.sparse import coo_array, csr_matrix
    from scipy.sparse.csgraph import maximum_flow

    mixed, unit = _with_residual(attentions).double().cpu(), 2**28  # capacities are whole numbers
    layers, batch, tokens, _ = mixed.shape
    above, query, key = torch.meshgrid(*map(torch.arange, (layers, tokens, tokens)), indexing="ij")
    ends = ((above + 1) * tokens + query).flatten().numpy(), (above * tokens + key).flatten().numpy()
    flows, source = torch.empty(batch, tokens), layers * tokens + range(tokens)[output]
    for row in range(batch):
        capacity = (mixed[:, row] * unit).round().int().flatten().numpy()
        graph = csr_matrix(coo_array((capacity, ends), shape=[(layers + 1) * tokens] * 2))
        flows[row] = torch.tensor([maximum_flow(graph, source, sink).flow_value / unit for sink in range(tokens)])
    return flows


def _with_residual(attentions: Tensor) -> Tensor:
    """(layers, batch, tokens, tokens)."""
    if attentions.dim() != 5 or attentions.shape[-1] != attentions.shape[-2]:
        found = tuple(attentions.shape)
        raise ValueError(f"attentions of shape {found}; need (layers, batch, heads, tokens, tokens): attention_maps")
    return (attentions.mean(2) + torch.eye(attentions.shape[-1]).to(attentions)) / 2


def _past(query: Tensor, key: Tensor) -> Tensor:
    """Query i sees keys 0 … i: bool (queries, keys)."""
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> None:
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    same = len({shape[:-2] for shape in shapes}) == 1 and min(map(len, shapes)) >= 2
    if not same or not query.shape[-1] == key.shape[-1] > 0 or key.shape[-2] != value.shape[-2]:
        found = "query {}, key {} and value {} don't fit".format(*shapes)
        raise ValueError(f"{found}: (…, queries, head_dim), (…, keys, head_dim), (…, keys, value_dim), the same …")
    if not (query.is_floating_point() and query.dtype == key.dtype == value.dtype):
        raise TypeError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; use .to(query.dtype)")
    _check_dropout(dropout)
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; torch.bool is needed: padding_mask(attention_mask) makes it of 0 and 1")
    scores = (*query.shape[:-1], key.shape[-2])  # (…, queries, keys)
    ends = zip(mask.shape[::-1], scores[::-1], strict=False)
    # three dimensions for four could be (batch, queries, keys) or (heads, queries, keys): ask
    if mask.dim() not in (2, len(scores)) or any(size not in (1, full) for size, full in ends):
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit scores of shape {scores}, 1 where shared")


def _check_dropout(dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it is the chance of zeroing a weight, in [0, 1)")
