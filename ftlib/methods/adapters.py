"""Small trainable modules inside a frozen encoder: LoRA and bottleneck adapters; PEFT's methods through PEFT.

An adapter takes the place of an `nn.Linear` and holds it: y = W x + b + (something small and trainable).  Both kinds
start as exactly the pretrained model.  `saving` writes them to disk in PEFT's format, with the task head.

To copy this module you need: adapters.py, rows.py and torch (peft for its methods, bitsandbytes for base_bits=4).
Source: Hu et al. 2021 (LoRA, arXiv:2106.09685); Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732); Houlsby et al. 2019
(arXiv:1902.00751); Pfeiffer et al. 2020 (arXiv:2005.00052).
"""

import copy
import inspect
import math
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..inputs.rows import IGNORE, max_positions

_QUERY_VALUE = (
    "query", "value", "query_proj", "value_proj", "q_lin", "v_lin", "q_proj", "v_proj", "q", "v", "Wqkv", "qkv_proj",
)  # fmt: skip


class _Adapter(nn.Module):
    """What both kinds share: the layer they hold, and its look from outside."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.base_layer = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def own(self) -> dict[str, torch.Tensor]:
        """The adapter's own weights by name, without those of the layer it holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base_layer.")}


class LoRA(_Adapter):
    """y = W x + b + s B A dropout(x): A (rank, in) drawn at random, B (out, rank) zero at the start.

    s = alpha / rank, or alpha / √rank (rsLoRA), with which the update does not shrink as the rank grows.
    """

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool):
        super().__init__(linear)
        place = {"device": linear.weight.device, "dtype": _float_of(linear)}
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scale

    def merged(self) -> nn.Linear:
        """One linear layer that computes the same (without dropout)."""
        linear = self.base_layer.whole() if isinstance(self.base_layer, Int8Linear) else self.base_layer
        if type(linear) is not nn.Linear:
            raise ValueError(f"can't merge into a {type(linear).__name__}; load the base unquantized, and the adapter")
        with torch.no_grad():
            linear.weight += self.scale * self.lora_B.weight @ self.lora_A.weight
        return linear


class Bottleneck(_Adapter):
    """y = h + U gelu(D h), where h = W x + b: D (size, out) small and random, U (out, size) zero at the start."""

    def __init__(self, linear: nn.Module, size: int):
        super().__init__(linear)
        place = {"device": linear.weight.device, "dtype": _float_of(linear)}
        self.down = nn.Linear(linear.out_features, size, **place)
        self.up = nn.Linear(size, linear.out_features, **place)
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        hidden = self.base_layer(x)
        return hidden + self.up(F.gelu(self.down(hidden)))


class Int8Linear(nn.Module):
    """A frozen linear layer in 8 bits: W ≈ scale * Q, one scale a row, the largest weight of the row at 127."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        weight = linear.weight.detach().float()  # in half precision scales would round, and codes go above 127
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return (self.codes * self.scale).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def whole(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.scale.device)
        linear.weight.data = self.weight
        if self.bias is not None:
            linear.bias.data = self.bias.data
        return linear


def _float_of(linear: nn.Module) -> torch.dtype:
    """The dtype for an adapter of this layer: the layer's, float32 where that is not a float (quantized)."""
    return linear.weight.dtype if linear.weight.is_floating_point() else torch.float32


def _four_bits(linear: nn.Linear) -> nn.Module:
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("base_bits=4 needs bitsandbytes (pip install bitsandbytes); base_bits=8 does not") from None
    new = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        compute_dtype=linear.weight.dtype, quant_type="nf4",
    )  # fmt: skip
    new.support_avx512bf16_for_cpu = False  # its layout for this, once made by evaluating, has no gradients
    new.load_state_dict({name: p.detach() for name, p in linear.named_parameters()})
    return new.requires_grad_(False).to(linear.weight.device)  # quantizes on the way to the device


# ------------------------------------------------------------------------------------- putting them in, and out


def linears(base: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside the Transformer layers of an encoder, by name: what adapters can be put on."""
    lists = [name for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    inside = tuple(f"{name}." for name in outer)
    return {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)}


def add_lora(
    base: nn.Module, *, rank: int = 8, alpha: float = 16, targets: Any = None, dropout: float = 0.0,
    rslora: bool = False, base_bits: int | None = None,
) -> None:  # fmt: skip
    """Put a LoRA on each target inside an encoder, in place.  See `tuning.tune` for the options."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank={rank!r}: need a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha!r}: need a number above 0 (rank or twice the rank is usual)")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: need a number from 0 to below 1")
    if base_bits not in (None, 4, 8):
        raise ValueError(f"base_bits={base_bits!r}: choose None (as it is), 8 or 4")
    found = linears(base)
    chosen = _matching(found, targets)
    if base_bits:
        _replace(base, {n: Int8Linear(m) if base_bits == 8 else _four_bits(m) for n, m in found.items()})
    _replace(base, {name: LoRA(base.get_submodule(name), rank, alpha, dropout, rslora) for name in chosen})


def _matching(found: dict[str, nn.Module], targets: Any) -> list[str]:
    """The names that `targets` picks: None for query and value, "all-linear", or a list of name endings."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in found})
    if targets == "all-linear":
        targets = endings
    wanted = _QUERY_VALUE if targets is None else targets
    if not isinstance(wanted, (list, tuple, set)) or not all(isinstance(t, str) and t for t in wanted):
        raise ValueError(f"targets={targets!r}: pass 'all-linear' or a list of names; here are {', '.join(endings)}")
    chosen = [name for name in found if any(name == t or name.endswith(f".{t}") for t in wanted)]
    idle = [t for t in wanted if not any(name == t or name.endswith(f".{t}") for name in found)]
    if not chosen or (targets is not None and idle):
        what = "the default targets (query and value)" if targets is None else f"targets={idle!r}"
        raise ValueError(f"{what} match no linear layer; the layers have {', '.join(endings)}; or use 'all-linear'")
    return chosen


def add_bottlenecks(base: nn.Module, *, reduction: float = 16, attention: bool = True) -> None:
    """Put a bottleneck of width out / reduction after every feed-forward block, and (Houlsby) after attention."""
    if isinstance(reduction, bool) or not isinstance(reduction, (int, float)) or not 1 <= reduction < math.inf:
        raise ValueError(f"reduction={reduction!r}: need a number of at least 1; 16 makes the bottleneck hidden / 16")
    last: dict[tuple[str, bool], str] = {}  # (layer, in attention?) -> the linear layer that ends the block
    lists = {name for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    hidden = base.config.hidden_size
    for name, linear in linears(base).items():
        parts = name.split(".")
        layer = next(".".join(parts[: i + 1]) for i in range(1, len(parts)) if ".".join(parts[:i]) in lists)
        if linear.out_features == hidden:
            last[layer, "att" in name.removeprefix(layer).lower()] = name
    places = [name for (_, in_attention), name in last.items() if attention or not in_attention]
    if not any(not in_attention for _, in_attention in last) or not places:
        kind = getattr(base.config, "model_type", type(base).__name__)
        raise ValueError(f"no feed-forward block that ends in a linear layer of width {hidden} found in {kind}")
    size = max(1, round(hidden / reduction))
    _replace(base, {name: Bottleneck(base.get_submodule(name), size) for name in places})


def _replace(base: nn.Module, new: dict[str, nn.Module]) -> None:
    for name, module in new.items():
        parent, _, child = name.rpartition(".")
        old = base.get_submodule(name)
        setattr(base.get_submodule(parent), child, module.train(old.training))


def adapters_of(model: nn.Module) -> dict[str, _Adapter]:
    """Our adapters in a model, by the name of the module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Adapter)}


def merge_own(model: nn.Module) -> None:
    """Fold every LoRA into the layer it holds, in place; 8-bit layers become whole ones.

    Raises ValueError for bottlenecks, which are not linear.
    """
    for name, module in adapters_of(model).items():
        if isinstance(module, Bottleneck):
            raise ValueError(f"{name}: a bottleneck adapter is not linear and can't be merged; save it as it is")
    _replace(model, {name: module.merged() for name, module in adapters_of(model).items()})
    _replace(model, {name: m.whole() for name, m in model.named_modules() if isinstance(m, Int8Linear)})


# ------------------------------------------------------------------------------------------------ through PEFT


_CACHED = ("PREFIX_TUNING", "CARTRIDGE")  # prompts as keys and values of every layer, not as words


def add_peft(model: nn.Module, config: Any, head: list[str]) -> Any:
    """Apply any PEFT configuration to a task model, in place, with its head's modules trainable and saved.

    Returns the PeftModel.  It holds a shallow copy of the model, which has the same modules; so the model itself stays
    what it was.  Prompts come before the tokens, so for them the model's forward goes through PEFT.
    """
    import peft

    if not isinstance(config, peft.PeftConfig):
        raise TypeError(f"{config!r} is no strategy and no PEFT configuration; pass e.g. peft.LoraConfig(r=8)")
    config = copy.deepcopy(config)
    config.inference_mode = False
    if config.task_type is None:
        config.task_type = "TOKEN_CLS" if "TokenClassification" in type(model).__name__ else "SEQ_CLS"
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *head]))
    longest = max_positions(model.config) or math.inf
    prompt = (getattr(config, "num_virtual_tokens", 0) or 0) if config.is_prompt_learning else 0
    if config.is_prompt_learning and not 0 < prompt < longest:
        raise ValueError(f"num_virtual_tokens={prompt}: need 1 to {longest - 1}, the model takes {longest} positions")
    if config.peft_type in _CACHED and "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(
            f"{config.peft_type.value} goes into past_key_values, which {model.config.model_type} models do not take; "
            "use peft.PromptTuningConfig, or a BERT, RoBERTa or ELECTRA model"
        )
    _fill(model, config, head)
    inner = copy.copy(model)  # called inside the model's own call: hooks run once, out there
    vars(inner).update({name: OrderedDict() for name in vars(model) if name.startswith(("_forward_", "_backward_"))})
    try:
        wrapper = peft.get_peft_model(inner, config)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name in linears(model)})
        raise ValueError(f"{error} (linear layers here: {', '.join(names)})") from error
    if config.is_prompt_learning:
        model.prompt_encoder = wrapper.prompt_encoder
        model.forward = partial(_with_prompt, wrapper, prompt, longest)
        model.forward.__signature__ = inspect.signature(type(model).forward.__get__(model))
    return wrapper


def _fill(model: nn.Module, config: Any, head: list[str]) -> None:
    """What PEFT would ask for, because it does not know the model type or reads one name in its config only."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    if config.is_prompt_learning and config.token_dim is None:
        words = config.peft_type in ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
        wide = model.get_input_embeddings().weight.shape[1]  # ELECTRA's and ALBERT's are narrower than their layers
        config.token_dim = wide if words else model.config.hidden_size
        config.num_layers = config.num_layers or model.config.num_hidden_layers
        config.num_attention_heads = config.num_attention_heads or model.config.num_attention_heads
    if getattr(config, "target_modules", None) == "all-linear":  # PEFT would take a linear layer of the head too
        config.target_modules = _matching(linears(model), "all-linear")
    unset = hasattr(config, "target_modules") and not config.target_modules
    if unset and config.peft_type == "LN_TUNING":
        norms = [n for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
        config.target_modules = [n for n in norms if not n.startswith(tuple(f"{name}." for name in head))]
    elif unset and config.peft_type != "IA3" and model.config.model_type not in known:
        config.target_modules = _matching(linears(model), None)


def _with_prompt(wrapper: Any, prompt: int, longest: float, *args: Any, **kwargs: Any) -> Any:
    kwargs |= zip(inspect.signature(wrapper.get_base_model().forward).parameters, args, strict=False)
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if inputs is not None and inputs.shape[1] + prompt > longest:
        raise ValueError(
            f"{inputs.shape[1]} tokens and {prompt} of the prompt exceed the model's {longest} positions; "
            f"tokenize with max_length={longest - prompt}"
        )
    a_label_a_token = wrapper.active_peft_config.task_type == "TOKEN_CLS"
    if wrapper.active_peft_config.peft_type in _CACHED or not a_label_a_token:
        return wrapper(**kwargs)
    if kwargs.get("labels") is not None:
        kwargs["labels"] = F.pad(kwargs["labels"], (prompt, 0), value=IGNORE)
    output = wrapper(**kwargs)
    output.logits = output.logits[:, prompt:]  # (batch, tokens, labels): those of the text
    return output


def merge_peft(wrapper: Any) -> None:
    """Fold PEFT's adapter into the layers and take it out, in place.  Raises ValueError for what has no such form."""
    if wrapper.active_peft_config.is_prompt_learning or not hasattr(wrapper.base_model, "merge_and_unload"):
        raise ValueError(f"{wrapper.active_peft_config.peft_type.value} can't be merged into weights; save it as it is")
    from peft.utils import ModulesToSaveWrapper

    inner = wrapper.get_base_model()  # its heads are taken out here: PEFT can't for a pooler, nor after LN tuning
    heads = {name: m for name, m in inner.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    _replace(inner, {name: head.modules_to_save[wrapper.active_adapter] for name, head in heads.items()})
    try:
        wrapper.merge_and_unload()
    except NotImplementedError as error:
        _replace(inner, heads)
        raise ValueError(f"PEFT can't merge {wrapper.active_peft_config.peft_type.value}: {error}") from error


def peft_marks(wrapper: Any) -> tuple[str, ...]:
    """What stands in the names of PEFT's own parameters."""
    if wrapper is None:
        return ()
    return ("prompt_encoder.",) if wrapper.active_peft_config.is_prompt_learning else (f".{wrapper.base_model.prefix}",)


def peft_config(model: nn.Module, head: list[str]) -> dict[str, Any]:
    """The adapter_config.json of our own adapters, as PEFT writes it; it does not know the type BOTTLENECK."""
    own = adapters_of(model)
    first = next(iter(own.values()))
    kind = "TOKEN_CLS" if "TokenClassification" in type(model).__name__ else "SEQ_CLS"
    config = {"inference_mode": True, "modules_to_save": head or None, "target_modules": sorted(own)}
    config["task_type"] = kind if head else "FEATURE_EXTRACTION"
    if isinstance(first, Bottleneck):
        return config | {"peft_type": "BOTTLENECK", "size": first.down.out_features}
    return config | {
        "peft_type": "LORA", "r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora,
        "lora_dropout": first.dropout.p, "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
