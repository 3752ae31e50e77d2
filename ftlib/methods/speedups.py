"""What a training step on a CPU need not pay for: shortcuts with the same mathematics.

- `linear`: matrix products by oneDNN, which PyTorch brings along but does not use for float32 layers.  On AMD's CPUs
  with AVX-512 it is about twice as fast as MKL, which `torch.nn.functional.linear` calls.
- `dropout`: the same distribution as `torch.nn.functional.dropout`, from 16 random bits an element.
- `attend`: attention over packed rows, one example at a time: no scores of padding, and quick with dropout too.

To copy: this file, core/anatomy.py and torch.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core import anatomy

# oneDNN's linear layer, the one torch.compile calls.  A choice by processor, not by stopwatch: the same every time.
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
ONEDNN = _product is not None and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


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


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, p):
        count = len(query) * sum(rows * n * n for rows, n, _ in layout.groups)
        ctx.wide = torch.promote_types(query.dtype, torch.float32)  # the softmax is never half precision
        mask = keep_mask(query.new_empty(count, dtype=ctx.wide), p).div_(1 - p) if p else None
        ctx.layout, ctx.shape = layout, query.shape
        query, key, value = (layout.out(x) for x in (query, key, value))
        outs, saved = [], []
        for hidden, q, k, v in layout.split(query, key, value):
            weights = _weights(q, k, hidden)  # (heads * rows, n, n)
            kept = None
            if p:
                kept, mask = mask[: weights.numel()].view_as(weights), mask[weights.numel() :]
            saved += [weights, kept, (weights * kept if p else weights).to(q.dtype)]
            outs.append(torch.bmm(saved[-1], v))
        ctx.save_for_backward(query, key, value, *saved)
        return layout.back(outs, ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, *saved = ctx.saved_tensors
        layout, saved, found = ctx.layout, iter(saved), []
        for _, q, k, v, g in layout.split(query, key, value, layout.out(gradient, zeros=True)):
            weights, kept, dropped = next(saved), next(saved), next(saved)
            d_weights = torch.bmm(g, v.transpose(1, 2)).to(ctx.wide)
            if kept is not None:
                d_weights.mul_(kept)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).to(q.dtype)
            d_query, d_key = torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q)
            found.append((d_query, d_key, torch.bmm(dropped.transpose(1, 2), g)))
        return *(layout.back(parts, ctx.shape) for parts in zip(*found, strict=True)), None, None


def _weights(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """softmax(QKᵀ) of (heads * rows, n, width), at least float32; `hidden` (rows, n): keys that are padding."""
    scores = torch.bmm(q, k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
    if hidden is not None:
        scores.unflatten(0, (-1, len(hidden))).masked_fill_(hidden[:, None], -torch.inf)
    return scores.softmax(-1)


class Layout:
    """How packed rows are laid out for attention: in groups of about one length, each a batch of a few paddings.

    Rows of up to 128 tokens are padded to a multiple of 8, in which many small products become few.
    """

    def __init__(self, lengths: tuple[int, ...]):
        sizes = torch.tensor([n if n > 128 else -(-n // 8) * 8 for n in lengths], dtype=torch.int64)
        sizes, order = sizes.sort(stable=True)
        own = torch.tensor(lengths, dtype=torch.int64)
        begin, own = (own.cumsum(0) - own)[order], own[order]
        row = torch.arange(len(sizes)).repeat_interleave(sizes)
        place = torch.arange(len(row)) - (sizes.cumsum(0) - sizes)[row]
        padding, self.source = place >= own[row], begin[row] + torch.minimum(place, own[row] - 1)
        self.home = torch.empty(int(own.sum()), dtype=torch.int64)  # where each token went
        self.home[self.source[~padding]] = (~padding).nonzero().flatten()
        self.groups, start = [], 0  # (rows, n, which keys are padding)
        for n, rows in zip(*(x.tolist() for x in sizes.unique_consecutive(return_counts=True)), strict=True):
            hidden = padding[start : start + rows * n].view(rows, n)
            self.groups.append((rows, n, hidden if hidden.any() else None))
            start += rows * n

    def out(self, x: Tensor, zeros: bool = False) -> Tensor:
        """Packed (heads, N_tokens, width) laid out; at padding a token once more, or zeros."""
        if not zeros:
            return x.index_select(1, self.source)
        laid = x.new_zeros(len(x), len(self.source), x.shape[2])
        return laid.index_copy_(1, self.home, x[:, : len(self.home)])

    def split(self, *laid: Tensor) -> Iterator[list]:
        """Group by group: its padded keys, and every (heads, N, width) as (heads * rows, n, width)."""
        threads, begin = torch.get_num_threads(), 0
        try:
            for rows, n, hidden in self.groups:
                own = slice(begin, begin + rows * n)
                begin = own.stop
                # where waking a second thread costs more than it computes, one works
                torch.set_num_threads(1 if len(laid[0]) * rows * n**2 < 65536 else threads)
                yield [hidden, *(x[:, own].reshape(-1, n, x.shape[2]) for x in laid)]
        finally:
            torch.set_num_threads(threads)

    def back(self, parts: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The groups as packed tokens again, `shape` (heads, N_tokens, width); zeros for tokens of no row."""
        laid = torch.cat([part.view(shape[0], -1, shape[2]) for part in parts], dim=1)
        return F.pad(laid.index_select(1, self.home), (0, 0, 0, shape[1] - len(self.home)))


_layout = lru_cache(maxsize=4)(Layout)  # all layers of a model ask for the same


def computed_in(x: Tensor) -> torch.dtype | None:
    """What the shortcuts compute in: float32; bfloat16 for such a tensor and under autocast; None: they don't serve."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if dtype in (torch.float32, torch.bfloat16) else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, (..., in) -> (..., out), by the quicker of two libraries."""
    plain = computed_in(x) == weight.dtype == torch.float32  # bfloat16 is multiplied by oneDNN anyway
    if not (ONEDNN and plain and x.numel() >= 16 * x.shape[-1]):
        return F.linear(x, weight, bias)
    # on rows, so that what comes out is no view that PyTorch would forbid to change in place
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`torch.nn.functional.dropout` with the same distribution and other random numbers."""
    if not training or p == 0:
        return x
    return x * keep_mask(x, p).mul_(1 / (1 - p)) if computed_in(x) and p != 1 else F.dropout(x, p)


def layer_norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    """The module's output, (..., width); bfloat16 where that is computed in, so that what follows need not be cast."""
    return type(module).forward(module, x).to(computed_in(x) or x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], p: float = 0.0, scale: float = 1.0) -> Tensor:
    """Attention of packed rows (heads, N_tokens, head_dim): each of `lengths` tokens sees its own example alone.

    softmax(scale * QKᵀ) V with dropout p on the softmax; returns (heads, N_tokens, head_dim), zeros for tokens after
    the last example.  Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.1.

    >>> q = torch.randn(2, 5, 8)
    >>> out = attend(q, q, q, [3, 2], scale=8**-0.5)
    >>> torch.allclose(out[:, 3:], F.scaled_dot_product_attention(*[q[:, 3:]] * 3), atol=1e-6)
    True
    """
    layout = _layout(tuple(lengths))
    with torch.autocast("cpu", enabled=False):
        query = query * scale
        if torch.is_grad_enabled() or p:
            return _Attend.apply(query, key, value, layout, p)
        outs = []
        for hidden, q, k, v in layout.split(*(layout.out(x) for x in (query, key, value))):
            if q.shape[1] > 128:  # without gradients nothing asks for the scores, so they need not be kept
                outs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0)[0])
            else:
                outs.append(torch.bmm(_weights(q, k, hidden).to(q.dtype), v))
        return layout.back(outs, query.shape)


@contextmanager
def shortcuts(model: nn.Module) -> Iterator[None]:
    """Inside, the model's nn.Linear and nn.Dropout modules run by `linear` and `dropout` where these serve.

    Without gradients a BERT layer's GELU is computed inside the product before it.
    """
    ours = {
        nn.Linear: lambda module, input: linear(input, module.weight, module.bias),
        nn.Dropout: lambda module, input: dropout(input, module.p, module.training),
        nn.LayerNorm: lambda module, input: layer_norm(input, module),
    }
    free = [module for module in model.modules() if anatomy.taken_by(module) is None]
    functions = {module: ours[type(module)] for module in free if type(module) in ours}
    with anatomy.forwards(functions | {module: _gelu_forward for module in free if _makes_gelu(module)}):
        yield


def _makes_gelu(module: nn.Module) -> bool:
    """Whether this is the first half of a stock BERT-like feed-forward block: a linear layer, then GELU."""
    activation = getattr(module, "intermediate_act_fn", None)
    alone = [name for name, _ in module.named_children()] == ["dense", "intermediate_act_fn"]  # no norm before them
    return alone and type(activation).__name__ == "GELUActivation" and type(getattr(module, "dense", None)) is nn.Linear


def _gelu_forward(module: nn.Module, hidden: Tensor) -> Tensor:
    weight, bias = module.dense.weight, module.dense.bias
    if torch.is_grad_enabled() or not (ONEDNN and computed_in(hidden) == hidden.dtype == weight.dtype):
        return type(module).forward(module, hidden)
    return _product(hidden, weight, bias, "gelu", [], "none")  # "none": not the tanh approximation
