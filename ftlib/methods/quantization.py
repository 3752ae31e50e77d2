"""Quantization by hand: weights as whole numbers of 8 or 4 bits and a scale, in the place of floats.

Weights alone are rounded, and made floats again as a layer computes (less memory); or, dynamic, each token's inputs
too, so that the product is one of whole numbers.  `rounding` trains a model for it.

To copy: this file, methods/adapters.py, core/anatomy.py, core/batches.py and torch.
Source: Jacob et al. 2018 (arXiv:1712.05877); Dettmers et al. 2022 (blocks, arXiv:2110.02861); Bengio et al. 2013
(straight through, arXiv:1308.3432).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import anatomy
from ..core.batches import one_of, refuse
from .adapters import adapters_of, linears, replace, turned

BLOCK = 64  # weights that share a scale, in 4 bits


def affine(x: Tensor, bits: int = 8, dim: int | tuple = (), symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero): x ≈ scale * (codes - zero), codes int8 of so many bits, zero whole, 0 if symmetric.

    dim: the dimensions over which a scale is shared, kept with size 1; (): all of them.  Symmetric, the largest |x| is
    at half the range, (2^bits - 1) / 2; else the range begins at the smallest x (or 0) and ends at the largest (or 0).

    >>> codes, scale, zero = affine(torch.tensor([-1.0, 0.0, 4.1]), symmetric=False)
    >>> codes.tolist(), round(scale.item(), 3), zero.item()
    ([-128, -78, 127], 0.02, -78.0)
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    smallest, largest = x.amin(dim, keepdim=True).clamp(max=0), x.amax(dim, keepdim=True).clamp(min=0)
    span = 2 * torch.maximum(-smallest, largest) if symmetric else largest - smallest
    scale = (span / (high - low)).clamp(min=torch.finfo(torch.float32).eps)
    zero = torch.zeros_like(scale) if symmetric else (low - (smallest / scale).round()).clamp(low, high)
    return ((x * (1 / scale)).round() + zero).clamp(low, high).to(torch.int8), scale, zero


def _coded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight (out, in), a scale a row; in 4 bits (blocks, 64), zeros at the end, a scale each."""
    if bits == 4:
        weight = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    return affine(weight, bits, dim=1)[:2]


def rounded(weight: Tensor, bits: int = 8) -> Tensor:
    """The weight (out, in) as it is after coding: what a quantized layer computes with."""
    codes, scale = _coded(weight.float(), bits)
    return (codes * scale).flatten()[: weight.numel()].view_as(weight).to(weight.dtype)


def whole_product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of int8 (rows, k) and (out, k), as float32 (rows, out), by PyTorch's product of int8 where it has one."""
    try:
        return torch._int_mm(a, b.T).float()
    except (AttributeError, RuntimeError, NotImplementedError):  # none for this device, or these sizes
        return a.float() @ b.float().T


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is codes and scales, in 4 bits two codes a byte; dynamic: so are inputs, by token."""

    def __init__(self, linear: nn.Module, bits: int = 8, dynamic: bool = False):
        super().__init__()
        weight = linear.weight.detach().T if turned(linear) else linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.bits, self.dynamic, self.dtype = bits, dynamic, weight.dtype
        codes, scale = _coded(weight.float(), bits)
        if bits == 4:
            pairs = (codes + 8).to(torch.uint8).view(-1, 2)
            codes = pairs[:, 0] | pairs[:, 1] << 4
        self.register_buffer("codes", codes)  # int8 (out, in); uint8 (out * in / 2,)
        self.register_buffer("scale", scale)  # float32 (out, 1); (blocks, 1)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        codes = self.codes
        if self.bits == 4:
            codes = (torch.stack((codes & 15, codes >> 4), 1).view(-1, BLOCK).to(torch.int8)) - 8
        flat = (codes * self.scale).flatten()[: self.out_features * self.in_features]
        return flat.view(self.out_features, self.in_features).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not self.dynamic:
            return F.linear(x, self.weight.to(x.dtype), bias)
        codes, scale, _ = affine(x.flatten(0, -2).float(), dim=1)  # (tokens, in), (tokens, 1)
        out = whole_product(codes, self.codes).mul_(scale).mul_(self.scale.T).to(x.dtype)  # (tokens, out)
        out = out if bias is None else out.add_(bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, dynamic={self.dynamic}"


class QuantizedEmbedding(nn.Module):
    """A table of words in 8 bits, a scale a row."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.padding_idx, self.dtype = table.padding_idx, table.weight.dtype
        for name, value in zip(("codes", "scale"), _coded(table.weight.detach().float(), 8), strict=True):
            self.register_buffer(name, value)  # int8 (words, width), float32 (words, 1)

    weight = property(lambda self: (self.codes * self.scale).to(self.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.codes[ids] * self.scale[ids]).to(self.dtype)


def quantize(model: nn.Module, bits: int = 8, *, dynamic: bool = False, words: bool = False) -> nn.Module:
    """Put whole numbers in the place of the weights of the linear layers inside the Transformer layers; in place.

    bits: 8, a scale a row of the weight; or 4, a scale a block of 64, two numbers a byte.  dynamic: the inputs are
    rounded too, to 8 bits, a scale a token, and whole numbers multiplied.  words: the table of words in 8 bits as well.
    The head stays.  For predicting: what is quantized does not train, and `save` refuses it; save the model before.
    Its state_dict is small and goes back into another model that was quantized the same way.
    Raises ValueError for adapters, other bits, dynamic in 4 bits, and where there are no such layers (any more).
    """
    one_of("bits", bits, (8,) if dynamic else (8, 4))
    found, base = linears(model), anatomy.base_of(model)
    table, out = base.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()
    refuse(
        (adapters_of(model), "the model has adapters; ftlib.merge(model) folds them in first"),
        (not found, f"no linear layers are left inside the layers of {anatomy.kind_of(model)}"),
        (words and out is not None and out.weight is table.weight, "the output layer shares the table; words=False"),
    )
    replace(model, {name: QuantizedLinear(linear, bits, dynamic) for name, linear in found.items()})
    if words:
        base.set_input_embeddings(QuantizedEmbedding(table).train(table.training))
    return model


def straight_through(x: Tensor, to: Tensor) -> Tensor:
    """The value of `to` with the gradient of x."""
    return to.detach() + (x - x.detach())


@contextmanager
def rounding(model: nn.Module, bits: int = 8, *, dynamic: bool = False) -> Iterator[None]:
    """Inside, the model computes as `quantize` will make it and its weights train: quantization-aware training.

    Gradients go straight through the rounding, to weights (and inputs) that are floats; `fit` goes inside.
    """
    one_of("bits", bits, (8,) if dynamic else (8, 4))
    refuse((adapters_of(model), "the model has adapters; ftlib.merge(model) folds them in first"))

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        weight = module.weight.T if turned(module) else module.weight
        if dynamic:
            codes, scale, _ = affine(x.detach().float(), dim=-1)
            x = straight_through(x, (codes * scale).to(x.dtype))
        return F.linear(x, straight_through(weight, rounded(weight.detach(), bits)), module.bias)

    with anatomy.forwards(dict.fromkeys(linears(model).values(), forward)):
        yield
