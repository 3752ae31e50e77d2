"""What a training step on a CPU need not pay for: shortcuts with the same mathematics.

Under autocast to bfloat16 all between two products stays bfloat16, but for softmax and means, which are float32.
To copy: this file, core/anatomy.py and torch.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core import anatomy

# oneDNN's linear layer, the one torch.compile calls.  A choice by processor, not by stopwatch: the same every time.
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
ONEDNN = _product is not None and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_RMS = "Exaone4 Gemma Gemma2 Gemma3 Glm Glm4 Granite Llama Ministral3 Mistral Olmo2 Olmo3 Phi3 Qwen2 Qwen3 SeedOss "
_RMS = tuple(f"{name}RMSNorm" for name in (_RMS + "SmolLM3").split())  # Transformers' classes that `rms_norm` knows
_RMS += ("MT5LayerNorm", "T5LayerNorm", "UMT5LayerNorm")
SHORT = 128  # tokens of a row up to which many small products are better made into few
LONG = 384  # tokens from which a causal row in bfloat16 is left to PyTorch's kernel, which keeps no scores


def keep_mask(like: Tensor, p: float) -> Tensor:
    """Random 0/1 of `like`'s shape and dtype, 0 with probability p (to 1/65536), from 16 bits of a 64-bit draw each."""
    count = like.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device).random_(-(2**63), None)
    bits = draws.view(torch.int16)[:count].view(like.shape)  # uniform in [-32768, 32767]
    threshold = min(round(p * 65536), 65535) - 32768
    return torch.ge(bits, threshold, out=torch.empty_like(like, memory_format=torch.contiguous_format))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        need_x, need_weight, _ = ctx.needs_input_grad  # a frozen layer keeps no input: that is what LoRA saves
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return _product(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (N, out)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        d_x = _product(rows, weight.T, None, "none", [], "").view(*gradient.shape[:-1], -1) if need_x else None
        d_weight = _product(rows.T, x.flatten(0, -2).T, None, "none", [], "") if need_weight else None
        return d_x, d_weight, rows.sum(0) if need_bias else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, eps, dtype):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        return (wide * inverse).mul_(gain).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, gain, inverse = ctx.saved_tensors
        normed = x * inverse
        both = normed * gradient
        d_gain = both.flatten(0, -2).sum(0).to(gain.dtype) if ctx.needs_input_grad[1] else None
        along = (both @ gain.to(both.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        d_x = (gain * gradient.to(both.dtype)).addcmul_(normed, along, value=-1).mul_(inverse)
        return d_x.to(x.dtype), d_gain, None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, p, bias):
        q, k, v = layout.lay(query), layout.keys.lay(key), layout.keys.lay(value)
        scores = q.new_empty(layout.squares)
        for rows, keys, square in layout.groups:
            torch.bmm(rows(q), keys(k).transpose(1, 2), out=square(scores))
        weights = scores.to(torch.promote_types(q.dtype, torch.float32))  # the softmax is never half precision
        layout.prepare(weights, bias)
        for _, _, square in layout.groups:
            torch.softmax(square(weights), -1, out=square(weights))
        kept = keep_mask(weights, p).div_(1 - p) if p else None
        dropped, out = (weights * kept if p else weights).to(q.dtype), layout.empty(q)
        for rows, keys, square in layout.groups:
            torch.bmm(square(dropped), keys(v), out=rows(out))
        ctx.save_for_backward(q, k, v, weights, kept, dropped)
        ctx.layout, ctx.shapes, ctx.bias = layout, (query.shape, key.shape), None if bias is None else bias.shape
        return layout.back(out, query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (q, k, v, weights, kept, dropped), layout = ctx.saved_tensors, ctx.layout
        g, d_dropped = layout.lay(gradient).index_fill_(0, layout.padding, 0), torch.empty_like(dropped)
        d_query, d_key, d_value = layout.empty(q), layout.keys.empty(k), layout.keys.empty(v)
        for rows, keys, square in layout.groups:
            torch.bmm(square(dropped).transpose(1, 2), rows(g), out=keys(d_value))
            torch.bmm(rows(g), keys(v).transpose(1, 2), out=square(d_dropped))
        d_weights = d_dropped.to(weights.dtype)
        d_bias = d_weights.new_zeros(ctx.bias) if ctx.needs_input_grad[5] else None
        if kept is not None:
            d_weights.mul_(kept)
        for _, _, square in layout.groups:
            own = square(d_weights)
            torch._softmax_backward_data(own, square(weights), -1, own.dtype, grad_input=own)
            if d_bias is not None:
                d_bias[:, : own.shape[1], : own.shape[1]] += own.unflatten(0, (-1, len(d_bias))).sum(0)
        d_scores = d_weights.to(q.dtype)
        for rows, keys, square in layout.groups:
            torch.bmm(square(d_scores), keys(k), out=rows(d_query))
            torch.bmm(square(d_scores).transpose(1, 2), rows(q), out=keys(d_key))
        of_query, of_key = ctx.shapes
        found = layout.back(d_query, of_query), layout.keys.back(d_key, of_key), layout.keys.back(d_value, of_key)
        return *found, None, None, d_bias


class Layout:
    """How packed rows of such lengths are laid out for attention: (row, head, token), row after row in groups.

    A group's rows are of one length, so that it is one batched product: short ones are padded to a multiple of 8, and
    come first.  The scores of all groups lie side by side.  Heads that share keys and values follow each other, and
    stand in the product as one head of more queries.  Rows longer than `longest` are left out.
    """

    def __init__(self, lengths: tuple[int, ...], tokens: int, heads: int, key_heads: int, causal: bool, longest: float):
        sizes = [0 if n > longest else n if n > SHORT else -(-n // 8) * 8 for n in lengths]
        sizes, order = torch.tensor(sizes, dtype=torch.int64).sort(stable=True)
        own = torch.tensor(lengths, dtype=torch.int64)
        begin, own = (own.cumsum(0) - own)[order], own[order]
        blocks = sizes * heads
        row = torch.arange(len(sizes)).repeat_interleave(blocks)
        place = torch.arange(len(row)) - (blocks.cumsum(0) - blocks)[row]
        head, token = place // sizes[row], place % sizes[row]
        padding = token >= own[row]
        self.padding = padding.nonzero().flatten()
        self.source = (begin[row] + torch.minimum(token, own[row] - 1)) * heads + head  # at padding a token once more
        self.home = torch.full((tokens * heads,), len(row))  # where each token's head went; of no row: to the zeros
        self.home[self.source[~padding]] = (~padding).nonzero().flatten()
        self.keys = self if heads == key_heads else Layout(lengths, tokens, key_heads, key_heads, causal, longest)
        self.groups, hidden, begin, self.squares, self.short = [], [self.padding[:0]], 0, 0, 0
        self.later = []  # of every group, (n, n), True at the keys after a query
        groups = sizes[sizes > 0].unique_consecutive(return_counts=True)
        for n, count in zip(*(x.tolist() for x in groups), strict=True):
            own, its_keys = (slice(begin * h, (begin + count * n) * h) for h in (heads, key_heads))
            square, queries = slice(self.squares, self.squares + count * heads * n * n), n * heads // key_heads
            parts = (own, queries, None), (its_keys, n, None), (square, queries, n)
            self.groups.append([partial(_part, own=own, n=n, width=width) for own, n, width in parts])
            self.later.append(torch.ones(n, n, dtype=torch.bool).triu(1) if causal else None)
            if n <= SHORT and not causal:  # padded keys come after every token
                keys = padding[own].view(-1, 1, n).expand(-1, n, n)
                hidden.append(keys.flatten().nonzero().flatten() + square.start)
                self.short = square.stop  # where the scores of short rows end
            begin, self.squares = begin + count * n, square.stop
        self.hidden = torch.cat(hidden)  # the scores of padded keys

    def prepare(self, scores: Tensor, bias: Tensor | None) -> None:
        """Add the bias of places, (heads, n, n), to every row's; -inf where a query must not look."""
        scores.index_fill_(0, self.hidden, -torch.inf)
        for (_, _, square), later in zip(self.groups, self.later, strict=True):
            if bias is not None:
                own = square(scores).unflatten(0, (-1, len(bias)))  # (rows, heads, tokens, tokens)
                own += bias[:, : own.shape[2], : own.shape[2]]
            if later is not None:
                square(scores).view(-1, *later.shape).masked_fill_(later, -torch.inf)

    def lay(self, x: Tensor) -> Tensor:
        """Packed (N_tokens, heads, width) laid out, (N, width)."""
        return x.reshape(-1, x.shape[2]).index_select(0, self.source)

    def empty(self, like: Tensor) -> Tensor:
        """Room for what is laid out, and a row of zeros."""
        room = like.new_empty(len(self.source) + 1, like.shape[1])
        room[-1] = 0
        return room

    def back(self, room: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Packed again, `shape` (N_tokens, heads, width); zeros for tokens of no row."""
        return room.index_select(0, self.home).view(shape)


def _part(x: Tensor, own: slice, n: int, width: int | None) -> Tensor:
    """A group's part of what is laid out, as (key heads * rows, n, width of x), or of the scores, with `width` keys."""
    return x[own].view(-1, n, width or x.shape[1])


_layout = lru_cache(maxsize=4)(Layout)  # all layers of a model ask for the same


def computed_in(x: Tensor) -> torch.dtype | None:
    """What the shortcuts compute in: float32; bfloat16 for such a tensor and under autocast; None: they don't serve."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if dtype in (torch.float32, torch.bfloat16) else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, (..., in) -> (..., out), in float32 by oneDNN: on AMD twice as fast as MKL."""
    plain = computed_in(x) == weight.dtype == torch.float32  # bfloat16 is multiplied by oneDNN anyway
    if not (ONEDNN and plain and x.numel() >= 16 * x.shape[-1]):
        return F.linear(x, weight, bias)
    # on rows, so that what comes out is no view that PyTorch would forbid to change in place
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`torch.nn.functional.dropout`, the same distribution from other numbers: 16 random bits an element."""
    if not training or p == 0:
        return x
    return x * keep_mask(x, p).mul_(1 / (1 - p)) if computed_in(x) and p != 1 else F.dropout(x, p)


def layer_norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    """The module's output, (..., width); bfloat16 where that is computed in, so that what follows need not be cast."""
    return type(module).forward(module, x).to(computed_in(x) or x.dtype)


def rms_norm(x: Tensor, module: nn.Module) -> Tensor:
    """x / sqrt(mean(x²) + eps) * gain, (..., width), in one pass; the gain is the weight, in Gemma one more.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467).
    """
    if (dtype := computed_in(x)) is None:
        return type(module).forward(module, x)
    plain = hasattr(module, "variance_epsilon")  # the name in all but Gemma
    gain, eps = (module.weight, module.variance_epsilon) if plain else (1.0 + module.weight.float(), module.eps)
    with torch.autocast("cpu", enabled=False):
        return _RMSNorm.apply(x, gain, eps, dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], p: float = 0.0, scale: float = 1.0,
    causal: bool = False, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of packed rows (heads, N_tokens, head_dim): each of `lengths` tokens sees its own example alone.

    softmax(scale * QKᵀ) V with dropout p on the softmax; returns (heads, N_tokens, head_dim), zeros for tokens after
    the last example.  key and value may have fewer heads, each for as many of query's in turn.  causal: a token sees
    those up to itself.  bias: (heads, n, n), n at least the longest row's tokens and a multiple of 8, added to the
    scores of every row, from its first token on.  Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.1.

    >>> q = torch.randn(2, 5, 8)
    >>> out = attend(q, q, q, [3, 2], scale=8**-0.5)
    >>> torch.allclose(out[:, 3:], F.scaled_dot_product_attention(*[q[:, 3:]] * 3), atol=1e-6)
    True
    """
    longest = torch.inf if p or not causal or bias is not None else SHORT if query.dtype == torch.float32 else LONG
    layout = _layout(tuple(lengths), query.shape[1], len(query), len(key), causal, longest)
    query, key, value = (x.transpose(0, 1) for x in (query * scale, key, value))  # (N_tokens, heads, head_dim)
    with torch.autocast("cpu", enabled=False):
        if causal or torch.is_grad_enabled() or p or bias is not None or layout.squares == layout.short:
            out = _Attend.apply(query, key, value, layout, p, bias).transpose(0, 1)
            return _with_long_rows(query, key, value, lengths, out, longest) if max(lengths) > longest else out
        q, k, v = layout.lay(query), layout.keys.lay(key), layout.keys.lay(value)
        seen, out = torch.ones(layout.short, dtype=torch.bool).index_fill_(0, layout.hidden, 0), layout.empty(q)
        for rows, keys, square in layout.groups:  # without gradients nothing asks for the scores: they are not kept
            mask = square(seen) if keys(k).shape[1] <= SHORT else None
            found = F.scaled_dot_product_attention(*(x[None] for x in (rows(q), keys(k), keys(v))), mask, scale=1.0)[0]
            rows(out).copy_(found)
        return layout.back(out, query.shape).transpose(0, 1)


def _with_long_rows(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], out: Tensor, longest: int) -> Tensor:
    """Causal attention of every row of more than `longest` tokens put into `out`, (heads, N_tokens, head_dim)."""
    sizes, options = [*lengths, len(query) - sum(lengths)], {"is_causal": True, "scale": 1.0, "enable_gqa": True}
    parts = zip(sizes, *(x.transpose(0, 1)[None].split(sizes, 2) for x in (query, key, value)), strict=True)
    found = [F.scaled_dot_product_attention(q, k, v, **options)[0] if n > longest else None for n, q, k, v in parts]
    found = [one if one is not None else short for one, short in zip(found, out.split(sizes, 1), strict=True)]
    return torch.cat(found, 1)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, the C library (glibc) keeps what is freed for the next step; afterwards the machine gets it back.

    Else large blocks go back at every step, and each page that comes anew costs a virtual machine a microsecond or two.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "malloc_trim"):
        yield
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes; 64 and 32 MB are the most glibc sets by itself
    try:
        library.mallopt(trim, 2**31 - 1), library.mallopt(mmap, 2**30)
        yield
    finally:
        library.mallopt(trim, 2**26), library.mallopt(mmap, 2**25)
        library.malloc_trim(0)


@contextmanager
def shortcuts(model: nn.Module) -> Iterator[None]:
    """Inside, nn.Linear, nn.Dropout, nn.LayerNorm and RMSNorm run by `linear`, `dropout`, `layer_norm` and `rms_norm`.

    GELU by its tanh formula is one function.  Without gradients a BERT layer's GELU is computed inside the product
    before it; freed memory is kept.
    """
    ours = {
        nn.Linear: lambda module, input: linear(input, module.weight, module.bias),
        nn.Dropout: lambda module, input: dropout(input, module.p, module.training),
        nn.LayerNorm: lambda module, input: layer_norm(input, module),
    }
    free = [module for module in model.modules() if anatomy.taken_by(module) is None]
    functions = {module: ours[type(module)] for module in free if type(module) in ours}
    functions |= {module: _gelu_forward for module in free if _makes_gelu(module)}
    functions |= {m: lambda module, x: rms_norm(x, module) for m in free if type(m).__name__ in _RMS}
    tanh = [module for module in free if type(module).__name__ == "NewGELUActivation"]
    functions |= dict.fromkeys(tanh, lambda module, x: F.gelu(x, approximate="tanh"))
    with anatomy.forwards(functions), memory_kept():
        yield


def _makes_gelu(module: nn.Module) -> bool:
    """Whether this is the first half of a stock BERT-like feed-forward block: a linear layer, then GELU."""
    activation = getattr(module, "intermediate_act_fn", None)
    alone = [name for name, _ in module.named_children()] == ["dense", "intermediate_act_fn"]  # no norm before them
    plain = type(getattr(module, "dense", None)) is nn.Linear and anatomy.taken_by(module.dense) is None
    return alone and type(activation).__name__ == "GELUActivation" and plain


def _gelu_forward(module: nn.Module, hidden: Tensor) -> Tensor:
    weight, bias = module.dense.weight, module.dense.bias
    if torch.is_grad_enabled() or not (ONEDNN and computed_in(hidden) == hidden.dtype == weight.dtype):
        return type(module).forward(module, hidden)
    return _product(hidden, weight, bias, "gelu", [], "none")  # "none": not the tanh approximation
