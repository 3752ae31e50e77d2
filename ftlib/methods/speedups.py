"""What a training step on a CPU need not pay for: shortcuts with the same mathematics.

- `linear`: matrix products by oneDNN, which PyTorch brings along but does not use for float32 layers.  On AMD's CPUs
  with AVX-512 it is about twice as fast as MKL, which `torch.nn.functional.linear` calls.
- `dropout`: the same distribution as `torch.nn.functional.dropout`, from 16 random bits an element.
- `attend`: attention over packed rows, one example at a time: no scores of padding, and quick with dropout too.

To copy: this file, core/anatomy.py and torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

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
    def forward(ctx, query, key, value, lengths, p):
        mask = keep_mask(query.new_empty(len(query) * sum(n * n for n in lengths)), p).div_(1 - p) if p else None
        outs, saved = [], []
        for q, k, v in _groups(lengths, query, key, value):
            weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)  # (heads * rows, n, n)
            kept = None
            if p:
                kept, mask = mask[: weights.numel()].view_as(weights), mask[weights.numel() :]
            saved += [weights, kept, weights * kept if p else weights]
            outs.append(torch.bmm(saved[-1], v))
        ctx.save_for_backward(query, key, value, *saved)
        ctx.lengths = lengths
        return _joined(outs, query)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, *saved = ctx.saved_tensors
        saved, d_query, d_key, d_value = iter(saved), [], [], []
        for q, k, v, g in _groups(ctx.lengths, query, key, value, gradient):
            weights, kept, dropped = next(saved), next(saved), next(saved)
            d_value.append(torch.bmm(dropped.transpose(1, 2), g))
            d_weights = torch.bmm(g, v.transpose(1, 2))
            if kept is not None:
                d_weights.mul_(kept)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query.append(torch.bmm(d_scores, k))
            d_key.append(torch.bmm(d_scores.transpose(1, 2), q))
        return *(_joined(parts, query) for parts in (d_query, d_key, d_value)), None, None


def _groups(lengths: list[int], *packed: Tensor) -> Iterator[list[Tensor]]:
    """Neighbouring examples of one length together: every (heads, N_tokens, width) as (heads * rows, n, width)."""
    threads, begin = torch.get_num_threads(), 0
    try:
        for length, group in groupby(lengths):
            count = len(list(group))
            own = slice(begin, begin + count * length)
            begin = own.stop
            # where waking a second thread costs more than it computes, one works
            torch.set_num_threads(1 if len(packed[0]) * count * length**2 < 65536 else threads)
            yield [x[:, own].reshape(-1, length, x.shape[2]) for x in packed]
    finally:
        torch.set_num_threads(threads)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """The groups side by side, (heads, N_tokens, width), with zeros up to the number of tokens there are."""
    parts = [part.view(len(like), -1, like.shape[2]) for part in parts]
    spare = like.shape[1] - sum(part.shape[1] for part in parts)
    return torch.cat([*parts, like.new_zeros(len(like), spare, like.shape[2])] if spare else parts, dim=1)


def usable(x: Tensor) -> bool:
    """Whether the shortcuts serve this tensor: float32 on a CPU, run eagerly and without autocast."""
    plain = not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return plain and x.device.type == "cpu" and x.dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, (..., in) -> (..., out), by the quicker of two libraries."""
    if not (ONEDNN and usable(x) and weight.dtype == torch.float32 and x.numel() >= 16 * x.shape[-1]):
        return F.linear(x, weight, bias)
    # on rows, so that what comes out is no view that PyTorch would forbid to change in place
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`torch.nn.functional.dropout` with the same distribution and other random numbers."""
    if not training or p == 0:
        return x
    return x * keep_mask(x, p).mul_(1 / (1 - p)) if usable(x) and p != 1 else F.dropout(x, p)


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], p: float = 0.0, scale: float = 1.0) -> Tensor:
    """Attention of packed rows (heads, N_tokens, head_dim): each of `lengths` tokens sees its own example alone.

    softmax(scale * QKᵀ) V with dropout p on the softmax; returns (heads, N_tokens, head_dim), zeros for tokens after
    the last example.  Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.1.

    >>> q = torch.randn(2, 5, 8)
    >>> out = attend(q, q, q, [3, 2], scale=8**-0.5)
    >>> torch.allclose(out[:, 3:], F.scaled_dot_product_attention(*[q[:, 3:]] * 3), atol=1e-6)
    True
    """
    query = query * scale
    if torch.is_grad_enabled() or p:
        return _Attend.apply(query, key, value, lengths, p)
    outs = []
    for q, k, v in _groups(lengths, query, key, value):
        if q.shape[1] > 128:  # without gradients nothing asks for the scores, so they need not be kept
            outs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0)[0])
        else:
            outs.append(torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v))
    return _joined(outs, query)


@contextmanager
def shortcuts(model: nn.Module) -> Iterator[None]:
    """Inside, the model's nn.Linear and nn.Dropout modules run by `linear` and `dropout` where these serve.

    Without gradients a BERT layer's GELU is computed inside the product before it.
    """
    ours = {
        nn.Linear: lambda module, input: linear(input, module.weight, module.bias),
        nn.Dropout: lambda module, input: dropout(input, module.p, module.training),
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
    if torch.is_grad_enabled() or not (ONEDNN and usable(hidden) and weight.dtype == torch.float32):
        return type(module).forward(module, hidden)
    return _product(hidden, weight, bias, "gelu", [], "none")  # "none": not the tanh approximation
