"""Run a Transformers encoder or decoder on real tokens only: same numbers, no work on padding.

`unpad(model)` hooks the model: its layers see one long row of real tokens, (1, N_tokens, hidden), and are told where
an example ends through Transformers' `AttentionInterface`; after it, padded positions are put back as zeros.

To copy: this file, methods/packing.py, methods/speedups.py, core/anatomy.py, torch and transformers.
Source: Portes et al. 2023 (MosaicBERT, arXiv:2312.17482); Warner et al. 2024 (ModernBERT, arXiv:2412.13663).
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..core import anatomy
from . import packing as packed
from .packing import Packing, Packings, attend_packed, capped_attention, host_of, pack, pad_input, padded
from .packing import unpad_input as unpad_input

PREFIX = "unpadded_by_"
NAME = PREFIX + __name__.replace(".", "_")  # another for every copy of this file in a process

# Model types whose encoder takes (hidden states, mask) and whose layers pass the mask on.
_ENCODER = (
    "albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "mobilebert", "roberta",
    "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
# With rotary positions, which the base model computes: its inputs are packed; other keywords go on to the attention.
_ROTARY = ("eurobert", "gte", "jina_embeddings_v3", "modernbert", "nomic_bert")
# Decoders whose layers pass keywords on to the attention.
_DECODER = (
    "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox",
    "granite", "llama", "ministral3", "mistral", "modernbert-decoder", "nanochat", "olmo", "olmo2", "olmo3",
    "opt", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
# Encoders with a decoder whose layers do so; both sides have a table of positions.
_BOTH = ("bart", "marian", "mbart", "pegasus", "plbart")
# With biases of relative positions, added to the scores; each stack packs for itself.
_RELATIVE = ("mt5", "t5", "umt5")
_KNOWN = (*_ENCODER, *_ROTARY, *_DECODER, *_BOTH, *_RELATIVE)
_WHY_NOT = dict.fromkeys(_RELATIVE, "this Transformers gives its attention no function from outside; upgrade it") | {
    "bloom": "ALiBi biases the scores by position",
    "falcon": "its attention takes no function from outside",
    "longt5": "its encoder looks at blocks of tokens",
    "gemma3": "images see each other both ways; load the text model alone, of type gemma3_text",
    "mpt": "ALiBi biases the scores by position",
    "stablelm": "its layers keep from the attention where an example ends",
}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Packing | Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    packing: Packing | Packings | None = None, softcap: float | None = None, is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query is (1, heads, N_tokens, head_dim), or (batch, heads, tokens, head_dim) where the model runs as it came."""
    mask, packing = attention_mask, attention_mask if isinstance(attention_mask, Packing) else packing
    if packing is not None:
        packing, keys = packing.of(module) if isinstance(packing, Packings) else (packing, None)
        return attend_packed(query, key, value, packing, dropout, scaling, sliding_window, softcap, keys), None
    if softcap is not None:
        out = capped_attention(query, key, value, mask, dropout, scaling, softcap)
        return out.transpose(1, 2).contiguous(), None  # (batch, tokens, heads, head_dim)
    if mask is not None and mask.ndim == 2:  # of an encoder that only shares the config of an unpadded one
        mask = mask[:, None, None]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    bias = {"position_bias": kwargs["position_bias"]} if "position_bias" in kwargs else {}  # T5's
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=causal, **bias)


def _mask(config: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """What Transformers calls for a (batch, 1, tokens, tokens) mask; most encoders pack by the (batch, tokens) one."""
    if config.model_type in _ENCODER:
        return attention_mask
    if getattr(config, "attn_logit_softcapping", None) is not None:
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(attention_mask=attention_mask, **kwargs)  # of a model that runs as it came


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _forward(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of an unpadded base model: no hook, because sentence-transformers calls `forward` past the hooks."""
    for module in _hooked(base):
        vars(module).pop("_packing", None)  # left over when the last forward pass failed half-way
    if base.config._attn_implementation != NAME:  # switched back by hand
        return type(base).forward(base, *args, **kwargs)
    if args:
        kwargs |= zip(inspect.signature(base.forward).parameters, args, strict=False)
    kind, asked = base.config.model_type, kwargs.get("output_attentions")
    if asked or (asked is None and base.config.output_attentions):
        remedy = 'call repad(model) and model.set_attn_implementation("eager") first'
        raise ValueError(f"output_attentions=True: an unpadded {kind} keeps no attention weights; {remedy}")
    if kind in (*_BOTH, *_RELATIVE):
        return (packed.forward_both if kind in _BOTH else packed.forward_stack)(base, kwargs)
    output = type(base).forward(base, **_checked(base, kwargs))
    packing = vars(_encoder_of(base)).pop("_packing", None)
    return output if packing is None else padded(output, packing)


def _checked(base: nn.Module, kwargs: dict) -> dict:
    """The inputs of the base model; packed for a decoder and if it has rotary positions."""
    kind = base.config.model_type
    inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if inputs is None:
        return kwargs  # the model itself says what is wrong
    shape, mask = inputs.shape[:2], kwargs.get("attention_mask")
    causal = _sees_back_only(base.config, kwargs) if kind in _DECODER else None
    if causal is not None and _as_it_came(kwargs, shape):
        return kwargs
    if mask is not None and getattr(mask, "shape", None) != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        needed = f"an unpadded {kind} needs an attention_mask of shape (batch, tokens) = {tuple(shape)}, got {got}"
        raise ValueError(f"{needed}; for a mask of your own, a cache or prefix tuning call repad(model) first")
    host = host_of(mask)
    if kind in _ENCODER:
        _encoder_of(base)._host = host
        return kwargs
    mask = (torch.ones(shape, device=inputs.device) if mask is None else mask).to(inputs.device, torch.bool)
    packing = Packing.of(mask, host, causal)
    for module in _hooked(base):
        module._packing = packing
    # a mask of four dimensions is handed on as it is; empty, it fits no attention but ours
    kwargs = {**kwargs, "attention_mask": packing.mask[:1, None, None, :0], "packing": packing}
    if kwargs.get("position_ids") is None:
        begin = 0 if causal is None else mask.int().argmax(1, keepdim=True)  # of a row: a hole counts as a place
        places = mask.cumsum(1) - 1 if kind == "opt" else torch.arange(shape[1], device=inputs.device)[None] - begin
        kwargs["position_ids"] = places.clamp(min=0)
    for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
        if kwargs.get(name) is not None:
            kwargs[name] = pack(kwargs[name].expand(*shape, *kwargs[name].shape[2:]), packing, packing.spare)
    return kwargs


def _as_it_came(kwargs: dict, shape: tuple) -> bool:
    """Whether a decoder is asked for what packed tokens can't give: a cache, or a mask or packing of one's own."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        return True
    kwargs["use_cache"] = False  # else Transformers, which tells packed examples by their positions, would not look
    return kwargs.get("position_ids") is not None if mask is None else getattr(mask, "shape", None) != shape


def _sees_back_only(config: Any, kwargs: dict) -> bool:
    """Whether a decoder's attention is causal: Transformers can switch that off, and EmbeddingGemma does."""
    asked = kwargs.get("is_causal", getattr(config, "is_causal", None))
    return asked is not False and not (config.model_type == "gemma3_text" and config.use_bidirectional_attention)


def _before_pooler(pooler: nn.Module, args: tuple) -> tuple | None:
    packing = vars(pooler).pop("_packing", None)
    return None if packing is None else (pad_input(args[0], packing), *args[1:])


def _before_encoder(encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    hidden = args[0] if args else kwargs.pop("hidden_states")  # (batch, tokens, hidden)
    mask = args[1] if len(args) > 1 else kwargs.pop("attention_mask", None)
    if mask is not None and mask.ndim == 2:  # no mask, or a model switched back to eager attention: as it is
        packing = Packing.of(mask, vars(encoder).pop("_host", None))
        full = packing.lengths is not None and mask.device.type != "cpu" and len(packing.indices) == mask.numel()
        hidden, mask = (hidden, None) if full else (pack(hidden, packing, packing.spare), packing)
    return (hidden, mask, *args[2:]), kwargs


def _after_encoder(encoder: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(args[1], Packing):
        output.last_hidden_state = pad_input(output.last_hidden_state, args[1])
        encoder._packing = args[1]  # for the hidden states of the layers, which the base model returns
    return output


def _encoder_of(base: nn.Module) -> nn.Module:
    """The module around which tokens are packed."""
    kind = base.config.model_type
    return base.transformer if kind == "distilbert" else base.encoder if kind in _ENCODER else base


def _base_of(model: nn.Module) -> nn.Module:
    """The base model; of OPT its decoder, which the language model calls past it."""
    base = anatomy.base_of(model)
    return base.decoder if anatomy.kind_of(base) == "opt" and hasattr(base, "decoder") else base


def _hooked(base: nn.Module) -> list[nn.Module]:
    """The modules inside the base model that `unpad` puts hooks on."""
    pooler = getattr(base, "pooler", None) if base.config.model_type in _ROTARY else None
    return [_encoder_of(base)] if pooler is None else [_encoder_of(base), pooler]


def unpad(model: nn.Module) -> nn.Module:
    """Make a Transformers encoder, decoder, or both skip padding, in place; returns the model.

    Same logits and gradients at real tokens, in training and inference, with left or right padding.  At padded
    positions the hidden states are zero; a stock question-answering head reads them, so its loss differs, and so does
    a language model's where padding has labels.  A decoder's row gives what it gives alone, unless `position_ids` say
    otherwise (a stock model counts padding on the left); of an encoder with a decoder both sides are packed.  With a
    cache (`generate`), a mask that isn't (batch, tokens), or packed examples told apart by `position_ids`, a decoder
    runs as it came: exact, and padded.

    Raises ValueError naming the model type for what can't be unpadded: a decoder alone that has cross-attention,
    ALiBi; unpadded, for `output_attentions`, and an encoder's mask that isn't (batch, tokens).
    """
    base = _base_of(model)
    if why := _obstacle(base):
        raise ValueError(why)
    if is_unpadded(model):
        return model
    encoder, *poolers = _hooked(base)
    before = base.config._attn_implementation
    encoder._before_unpad = "sdpa" if before == NAME else before
    base.set_attn_implementation(NAME)
    _remove_hooks(base)  # left over in a copy whose attention was switched back
    for module, function in _answered(base).items():
        anatomy.put_forward(module, function, signature=function is _forward)
    if encoder is not base:
        encoder.register_forward_pre_hook(_before_encoder, with_kwargs=True)
        encoder.register_forward_hook(_after_encoder)
    for pooler in poolers:
        pooler.register_forward_pre_hook(_before_pooler)
    return model


def _obstacle(base: nn.Module) -> str | None:
    """Why this model can't be unpadded, if so."""
    config, kind = getattr(base, "config", None), anatomy.kind_of(base)
    if (by := str(getattr(config, "_attn_implementation", ""))).startswith(PREFIX) and by != NAME:
        return f"another copy of unpad is on ({by.removeprefix(PREFIX)}); call its repad(model) first"
    if kind not in _KNOWN or (kind in _RELATIVE and not base._supports_sdpa):
        why = f" ({_WHY_NOT[kind]})" if kind in _WHY_NOT else ""
        need = "models with Transformers' own attention"
        return f"unpad can't handle model type {kind!r}{why}; it handles {need}: {', '.join(sorted(_KNOWN))}"
    crossed, decoder = getattr(config, "add_cross_attention", False), getattr(config, "is_decoder", False)
    if crossed or (decoder and kind not in _DECODER):
        return f"unpad handles no cross-attention, and no {kind} as a decoder (is_decoder or add_cross_attention)"
    return None


def repad(model: nn.Module) -> nn.Module:
    """Undo `unpad`, in place; returns the model."""
    if is_unpadded(model):
        base = _base_of(model)
        _remove_hooks(base)
        base.set_attn_implementation(vars(_encoder_of(base)).pop("_before_unpad", "sdpa"))
    return model


def _answered(base: nn.Module) -> dict[nn.Module, Any]:
    """Whose forward is ours, and which: the base model's, or those of T5's stacks and of their attention."""
    if base.config.model_type not in _RELATIVE:
        return {base: _forward}
    stacks = {module: _forward for module in base.modules() if type(module).__name__.endswith("Stack")}
    return stacks | {module: packed.attend_relative for module in base.modules() if hasattr(module, "compute_bias")}


def _remove_hooks(base: nn.Module) -> None:
    for module in _answered(base):
        anatomy.take_forward(module)
    ours = (_before_encoder, _before_pooler, _after_encoder)
    for module in _hooked(base):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]


def packing_of(model: nn.Module, mask: Tensor) -> Packing | None:
    """How an unpadded model packs a batch of this mask, (batch, tokens); None for a model as it came."""
    if not is_unpadded(model):
        return None
    config = _base_of(model).config
    return Packing.of(mask.bool(), None, _sees_back_only(config, {}) if config.model_type in _DECODER else None)


def is_unpadded(model: nn.Module) -> bool:
    base = _base_of(model)
    config = getattr(base, "config", None)  # which may be that of several models
    on = getattr(config, "_attn_implementation", None) == NAME and config.model_type in _KNOWN
    return on and getattr(anatomy.taken_by(next(iter(_answered(base)))), "func", None) is _forward
