"""Small trainable modules inside a frozen encoder: LoRA and bottleneck adapters.

An adapter takes the place of a linear layer and holds it: y = W x + b + (something small and trainable).  Both kinds
start as exactly the pretrained model.

To copy: this file, core/anatomy.py, core/batches.py and torch (bitsandbytes for base_bits=4).
Source: Hu et al. 2021 (LoRA, arXiv:2106.09685); Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732); Houlsby et al. 2019
(arXiv:1902.00751); Pfeiffer et al. 2020 (arXiv:2005.00052).
"""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core import anatomy
from ..core.batches import number, one_of, whole

_QUERY_VALUE = (
    "query", "value", "query_proj", "value_proj", "q_lin", "v_lin", "q_proj", "v_proj", "q", "v", "Wqkv", "qkv_proj",
    "c_attn", "query_key_value", "in_proj", "q_head", "v_head",
)  # fmt: skip


def turned(linear: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, Conv1D, whose weight is (in, out)."""
    return type(linear).__name__ == "Conv1D"


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """(in, out) features."""
    return tuple(linear.weight.shape) if turned(linear) else (linear.in_features, linear.out_features)


class _Adapter(nn.Module):
    """What both kinds share: the layer they hold, its look from outside, and their own layers."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.base_layer = linear
        self.in_features, self.out_features = _sizes(linear)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def own(self) -> dict[str, torch.Tensor]:
        """The adapter's own weights by name, without those of the layer it holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base_layer.")}

    def _new(self, wide: int, narrow: int, bias: bool) -> nn.Linear:
        """A layer on the held one's device, in its dtype, or in float32 where that is not a float (quantized)."""
        dtype = self.weight.dtype if self.weight.is_floating_point() else torch.float32
        return nn.Linear(wide, narrow, bias, self.weight.device, dtype)


class LoRA(_Adapter):
    """y = W x + b + s B A dropout(x): A (rank, in) drawn at random, B (out, rank) zero at the start.

    s = alpha / rank, or alpha / √rank (rsLoRA), with which the update does not shrink as the rank grows.
    """

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool):
        super().__init__(linear)
        self.lora_A = self._new(self.in_features, rank, bias=False)
        self.lora_B = self._new(rank, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x)) * self.scale)

    def merged(self) -> nn.Module:
        """One linear layer that computes the same (without dropout)."""
        linear = self.base_layer.whole() if isinstance(self.base_layer, Int8Linear) else self.base_layer
        if not linear.weight.is_floating_point():  # any float one, FalconLinear too
            raise ValueError(f"can't merge into a {type(linear).__name__}; load the base unquantized, and the adapter")
        with torch.no_grad():
            update = self.scale * self.lora_B.weight @ self.lora_A.weight  # (out, in)
            linear.weight += update.T if turned(linear) else update
        return linear


class Bottleneck(_Adapter):
    """y = h + U gelu(D h), where h = W x + b: D (size, out) small and random, U (out, size) zero at the start."""

    def __init__(self, linear: nn.Module, size: int):
        super().__init__(linear)
        self.down = self._new(self.out_features, size, bias=True)
        self.up = self._new(size, self.out_features, bias=True)
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        return (hidden := self.base_layer(x)) + self.up(F.gelu(self.down(hidden)))


class Int8Linear(nn.Module):
    """A frozen linear layer in 8 bits: W ≈ scale * Q, one scale a row, the largest weight of the row at 127."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.in_features, self.out_features = _sizes(linear)
        self.dtype, self.kind = linear.weight.dtype, type(linear)
        weight = linear.weight.detach().float()  # in half precision scales would round, and codes go above 127
        weight = weight.T if turned(linear) else weight  # (out, in)
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return (self.codes * self.scale).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def whole(self) -> nn.Module:
        """A layer of the kind it was made of, with the rounded weights."""
        sizes = (self.in_features, self.out_features, self.bias is not None)
        linear = self.kind(*(sizes if issubclass(self.kind, nn.Linear) else sizes[1::-1]))  # Conv1D takes (out, in)
        linear.weight.data = self.weight.T.contiguous() if turned(linear) else self.weight
        if self.bias is not None:
            linear.bias.data = self.bias.data
        return linear


def _four_bits(linear: nn.Module) -> nn.Module:
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("base_bits=4 needs bitsandbytes (pip install bitsandbytes); base_bits=8 does not") from None
    new = bitsandbytes.nn.Linear4bit(*_sizes(linear), linear.bias is not None, linear.weight.dtype, quant_type="nf4")
    new.support_avx512bf16_for_cpu = False  # its layout for this, once made by evaluating, has no gradients
    new.load_state_dict({n: p.detach().T if turned(linear) else p.detach() for n, p in linear.named_parameters()})
    return new.requires_grad_(False).to(linear.weight.device)  # quantizes on the way to the device


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside the Transformer layers of a model, by name: what adapters can be put on."""
    inside = {module for stack in anatomy.stacks(model) for layer in stack for module in layer.modules()}
    return {n: m for n, m in model.named_modules() if m in inside and (isinstance(m, nn.Linear) or turned(m))}


def experts(model: nn.Module) -> list[str]:
    """The names of parameters that hold all experts of a layer, (experts, out, in), where linear layers could be."""
    return [name for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]


def add_lora(base: nn.Module, *, rank=8, alpha=16, targets=None, dropout=0.0, rslora=False, base_bits=None) -> None:
    """Put a LoRA on each target inside an encoder, in place.  See `tuning.tune` for the options."""
    whole("rank", rank)
    number("alpha", alpha, 1e-6)
    number("dropout", dropout, 0, 1, below=True)
    one_of("base_bits", base_bits, (None, 8, 4))
    found = linears(base)
    if targets == "all-linear" and (fused := experts(base)):
        whole_way = "name targets, or pass peft.LoraConfig(target_modules='all-linear')"
        raise ValueError(f"{fused[0]} holds experts in one parameter, which is no linear layer; {whole_way}")
    chosen = matching(found, targets)
    if base_bits:
        replace(base, {n: Int8Linear(m) if base_bits == 8 else _four_bits(m) for n, m in found.items()})
    replace(base, {name: LoRA(base.get_submodule(name), rank, alpha, dropout, rslora) for name in chosen})


def matching(found: dict[str, nn.Module], targets: Any) -> list[str]:
    """The names that `targets` picks: None for query and value, "all-linear", or a list of name endings."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in found})
    wanted = _QUERY_VALUE if targets is None else endings if targets == "all-linear" else targets
    if not isinstance(wanted, (list, tuple, set)) or not all(isinstance(t, str) and t for t in wanted):
        raise ValueError(f"targets={targets!r}: pass 'all-linear' or a list of names; here are {', '.join(endings)}")
    hits = {t: [name for name in found if name == t or name.endswith(f".{t}")] for t in wanted}
    chosen = {name for names in hits.values() for name in names}
    idle = [] if targets is None and chosen else [t for t, names in hits.items() if not names]
    if idle or not chosen:
        what = "the default targets (query and value)" if targets is None else f"targets={idle!r}"
        here = f"{', '.join(endings)}; or use 'all-linear'" if found else "none: choose another strategy"
        raise ValueError(f"{what} match no linear layer; the layers have {here}")
    return [name for name in found if name in chosen]


def add_bottlenecks(base: nn.Module, *, reduction: float = 16, attention: bool = True) -> None:
    """Put a bottleneck of width out / reduction after every feed-forward block, and (Houlsby) after each attention."""
    number("reduction", reduction, 1)
    last: dict[tuple[nn.Module, str], str] = {}  # (layer, its attention or "") -> the linear layer that ends the block
    hidden, names = base.config.hidden_size, {module: name for name, module in linears(base).items()}
    for layer in (layer for stack in anatomy.stacks(base) for layer in stack):
        for linear in layer.modules():
            if linear in names and _sizes(linear)[1] == hidden:
                block = re.match(r".*?att[^.]*", names[linear].lower())  # a decoder's layer may have two attentions
                last[layer, block[0] if block else ""] = names[linear]
    fused = experts(base)
    has = {"feed-forward": any(not att for _, att in last) and not fused, "attention": any(att for _, att in last)}
    if lacking := [block for block in has if not has[block] and (attention or block != "attention")]:
        what = f"no {lacking[0]} block that ends in a linear layer of width {hidden}"
        why = f"; its experts are one parameter, {fused[0]}" if fused else ""
        raise ValueError(f"{what} found in {anatomy.kind_of(base)}{why}; use 'lora' or another strategy")
    size, places = max(1, round(hidden / reduction)), [last[key] for key in last if attention or not key[1]]
    replace(base, {name: Bottleneck(base.get_submodule(name), size) for name in places})


def replace(base: nn.Module, new: dict[str, nn.Module]) -> None:
    """Put modules in the place of those with these names, in their mode."""
    for name, module in new.items():
        base.set_submodule(name, module.train(base.get_submodule(name).training))


def adapters_of(model: nn.Module) -> dict[str, _Adapter]:
    """Our adapters in a model, by the name of the module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Adapter)}


def merge_own(model: nn.Module) -> None:
    """Fold every LoRA into its layer, in place, 8-bit layers made whole; ValueError for bottlenecks: not linear."""
    own = adapters_of(model)
    if fixed := [name for name, module in own.items() if isinstance(module, Bottleneck)]:
        raise ValueError(f"{fixed[0]}: a bottleneck adapter is not linear and can't be merged; save it as it is")
    replace(model, {name: module.merged() for name, module in own.items()})
    replace(model, {name: m.whole() for name, m in model.named_modules() if isinstance(m, Int8Linear)})
