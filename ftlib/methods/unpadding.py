"""Run a Transformers encoder or decoder on real tokens only: same numbers, no work on padding.

`unpad(model)` hooks the model: its layers see one long row of real tokens, (1, N_tokens, hidden), and are told where
an example ends through Transformers' `AttentionInterface`; after it, padded positions are put back as zeros.

Attention runs on the packed tokens (for an encoder with padding on the right): on a CPU by `speedups.attend`, on a CUDA
GPU of capability 8.0 or more, in half precision and without attention dropout, by `torch.nn.attention.varlen`.
Otherwise, as for soft-capped scores and a CPU's sliding windows, the heads are padded again for it.

In a decoder a token sees its own example up to itself, and positions start at 0 in every example.  Asked for a cache
(`past_key_values`, `use_cache=True`: what `generate` does), the model runs as it came.

To copy: this file, methods/speedups.py, core/anatomy.py, torch and transformers.
Source: Portes et al. 2023 (MosaicBERT, arXiv:2312.17482); Warner et al. 2024 (ModernBERT, arXiv:2412.13663).
"""

import inspect
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..core import anatomy
from . import speedups

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
    "granite", "llama", "ministral3", "mistral", "modernbert-decoder", "nanochat", "olmo", "olmo2", "olmo3", "opt",
    "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
_KNOWN = (*_ENCODER, *_ROTARY, *_DECODER)
_WHY_NOT = {
    "bloom": "ALiBi biases the scores by position",
    "falcon": "its attention takes no function from outside (Falcon 3 is a llama, and works)",
    "gemma3": "images see each other both ways; load the text model alone, of type gemma3_text",
    "mpt": "ALiBi biases the scores by position",
    "stablelm": "its layers keep from the attention where an example ends",
}


class Packing(NamedTuple):
    """Where the kept tokens of a padded batch come from; made once a forward pass, with one wait for the GPU."""

    indices: Tensor  # (N_tokens,) int64, positions in the flattened (batch * tokens)
    mask: Tensor  # (batch, tokens) bool, True at real tokens
    cu_seqlens: Tensor | None  # (batch + 1,) int32, where examples begin; None for an encoder with padding elsewhere
    longest: int  # kept tokens of the longest row
    lengths: list[int] | None = None  # kept tokens of every row; None where cu_seqlens is
    spare: int = 0  # rows added to the packed tokens: oneDNN prepares a product for every new shape, so have few
    gapless: bool = True  # no padding between a row's tokens: packed, they are as far from each other
    causal: bool = False

    @classmethod
    def of(cls, mask: Tensor, host: Tensor | None = None, causal: bool | None = None) -> "Packing":
        """From a bool mask (batch, tokens), True at real tokens; `host`: the same on the CPU, or a GPU is asked.

        causal: None for an encoder, which keeps position 0 of every row, unattended if it is padding: stock heads read
        it.  A decoder's row without tokens keeps it, to have one.
        """
        kept, seen = mask.clone(), mask if host is None else host.bool()
        kept[:, 0] |= True if causal is None else ~mask.any(1)
        rises = (seen[:, 1:] > seen[:, :-1]).sum(1)
        if causal is None:
            added, gapless = ~seen[:, 0], seen[:, 0] & (rises == 0)
        else:
            added, gapless = ~seen.any(1), rises + seen[:, 0] <= 1
        *lengths, gapless = torch.cat((seen.sum(1) + added, gapless.all().long()[None])).tolist()
        total, on_cpu = sum(lengths), mask.device.type == "cpu"
        indices = kept.flatten().nonzero_static(size=total).flatten()
        known = bool(gapless) or causal is not None
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) if known else None
        ends = None if ends is None else ends.to(mask.device, non_blocking=True)
        spare = -total % 16 if on_cpu and speedups.ONEDNN and len(mask) > 1 and 256 < total < mask.numel() else 0
        mask, lengths, longest = mask if causal is None else kept, lengths if known else None, max(lengths)
        return cls(indices, mask, ends, longest, lengths, spare, bool(gapless), bool(causal))


def _pack(padded: Tensor, packing: Packing, spare: int = 0) -> Tensor:
    """(batch, tokens, ...) to (1, N_tokens + spare, ...); the spare rows repeat the first and are never read."""
    flat = padded.flatten(0, 1)
    if len(flat) != len(packing.indices):
        flat = flat[F.pad(packing.indices, (0, spare))]
    return flat.unsqueeze(0)


def unpad_input(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Packing]:
    """Keep the real tokens of (batch, tokens, hidden): returns (1, N_tokens, hidden) and where they came from.

    mask: bool (batch, tokens), True at real tokens.  Position 0 is always kept: stock heads read it, padding or not.

    >>> hidden = torch.arange(4.0).view(2, 2, 1)
    >>> packed, packing = unpad_input(hidden, torch.tensor([[True, True], [True, False]]))
    >>> packed.flatten().tolist(), packing.indices.tolist()
    ([0.0, 1.0, 2.0], [0, 1, 2])
    """
    packing = Packing.of(mask)
    return _pack(hidden, packing), packing


def pad_input(packed: Tensor, packing: Packing) -> Tensor:
    """Put (1, N_tokens, ...) back into (batch, tokens, ...); zeros where there was padding."""
    flat, positions = packed[0, : len(packing.indices)], packing.mask.numel()
    if len(flat) != positions:
        flat = flat.new_zeros(positions, *flat.shape[1:]).index_copy(0, packing.indices, flat)
    return flat.unflatten(0, packing.mask.shape)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, dropout: float, scaling: float | None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(mask(cap * tanh(scale * QKᵀ / cap))) V, (batch, heads, tokens, head_dim); seen: bool, True at keys."""
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, seen, dropout_p=dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores.float() / softcap)
    lowest = torch.finfo(torch.float32).min  # not -inf: a padded query has no key at all
    scores = scores.masked_fill(~seen, lowest) if seen.dtype == torch.bool else scores + seen
    return F.dropout(scores.softmax(-1).to(value.dtype), dropout) @ value


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float, scaling: float | None,
    window: int | None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """(1, heads, N_tokens, head_dim) to (1, N_tokens, heads, head_dim); window: how far a token sees to each side."""
    # (batch, heads, tokens, head_dim) each
    query, key, value = (pad_input(x.transpose(1, 2), packing).transpose(1, 2) for x in (query, key, value))
    position = torch.arange(packing.mask.shape[1], device=query.device)
    back = position[:, None] - position  # (tokens, tokens), how far back the key is from the query
    seen = packing.mask[:, None, None, :]  # (batch, 1, 1, tokens)
    if packing.causal:
        seen = seen & (back >= 0)  # (batch, 1, tokens, tokens)
    if window is not None:
        seen = seen & (back.abs() <= window)
    out = _attend(query, key, value, seen, dropout, scaling, softcap)
    return _pack(out.transpose(1, 2), packing, packing.spare)  # (1, N_tokens, heads, head_dim)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}
    if not grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N_tokens, heads, head_dim)
    ends, longest = packing.cu_seqlens, packing.longest
    left = -1 if window is None else window
    sides = (left, 0 if packing.causal else left)  # how far a token sees, -1: to the end of its example
    out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=sides, **grouped)
    return out.unsqueeze(0)


def _can_varlen(query: Tensor, packing: Packing, dropout: float) -> bool:
    """What `varlen_attn`, which is FlashAttention 2, asks for."""
    if packing.cu_seqlens is None or dropout or query.shape[-1] % 8 or query.shape[-1] > 256:
        return False
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Packing | Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    packing: Packing | None = None, softcap: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Packed, query is (1, heads, N_tokens, head_dim); key and value may have fewer heads."""
    if isinstance(attention_mask, Packing):
        packing = attention_mask
    if packing is None:
        return _attention_as_it_came(module, query, key, value, attention_mask, dropout, scaling, softcap, is_causal)
    device = query.device.type  # rotary positions leave float32 under autocast
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    local = sliding_window is not None and sliding_window < packing.mask.shape[1]  # one that holds every row is none
    window = sliding_window - 1 if local else None
    if softcap is not None or (local and not packing.gapless):
        return _attend_packed(query, key, value, packing, dropout, scaling, window, softcap), None
    if window is None and speedups.computed_in(query) and packing.lengths is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = speedups.attend(query[0], key[0], value[0], packing.lengths, dropout, scale, packing.causal)
        return out.transpose(0, 1).unsqueeze(0), None  # (1, N_tokens, heads, head_dim)
    if _can_varlen(query, packing, dropout):
        return _attend_varlen(query, key, value, packing, scaling, window), None
    return _attend_packed(query, key, value, packing, dropout, scaling, window), None


def _attention_as_it_came(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
    scaling: float | None, softcap: float | None, is_causal: bool | None,
) -> tuple[Tensor, None]:  # fmt: skip
    """Not packed, (batch, heads, tokens, head_dim): Transformers' own with the mask it made, and with soft-capping."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if mask is not None and mask.ndim == 2:  # of an encoder that only shares the config of an unpadded one
        mask = mask[:, None, None].bool()
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=causal)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril() if causal and len(mask) > 1 else mask
    return _attend(query, key, value, mask, dropout, scaling, softcap).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)


def _mask(config: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """What Transformers calls for a (batch, 1, tokens, tokens) mask; most encoders pack by the (batch, tokens) one."""
    if config.model_type in _ENCODER:
        return attention_mask
    return sdpa_mask(attention_mask=attention_mask, **kwargs)  # the others ask only where they run as they came


AttentionMaskInterface.register(NAME, _mask)


def _forward(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of an unpadded base model: no hook, because sentence-transformers calls `forward` past the hooks."""
    for module in _hooked(base):
        vars(module).pop("_packing", None)  # left over when the last forward pass failed half-way
    if base.config._attn_implementation != NAME:  # switched back by hand
        return type(base).forward(base, *args, **kwargs)
    if args:
        kwargs |= zip(inspect.signature(base.forward).parameters, args, strict=False)
    output = type(base).forward(base, **_checked(base, kwargs))
    packing = vars(_encoder_of(base)).pop("_packing", None)
    if packing is None:
        return output
    shape, back = packing.mask.shape, partial(pad_input, packing=packing)  # every (1, N_tokens, hidden) in it
    return tree_map_only(lambda x: isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] != shape, back, output)


def _checked(base: nn.Module, kwargs: dict) -> dict:
    """The inputs of the base model; packed for a decoder and if it has rotary positions."""
    kind, asked = base.config.model_type, kwargs.get("output_attentions")
    if asked or (asked is None and base.config.output_attentions):
        remedy = 'call repad(model) and model.set_attn_implementation("eager") first'
        raise ValueError(f"output_attentions=True: an unpadded {kind} keeps no attention weights; {remedy}")
    inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if inputs is None:
        return kwargs  # the model itself says what is wrong
    shape, mask = inputs.shape[:2], kwargs.get("attention_mask")
    if kind in _DECODER and _as_it_came(kwargs, shape):
        return kwargs
    if mask is not None and getattr(mask, "shape", None) != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        needed = f"an unpadded {kind} needs an attention_mask of shape (batch, tokens) = {tuple(shape)}, got {got}"
        raise ValueError(f"{needed}; for a mask of your own, a cache or prefix tuning call repad(model) first")
    as_sent = mask is not None and (mask.is_inference() or mask._version == 0)  # not changed since on this device
    host = getattr(mask, "host", None) if as_sent else None  # see core.batches.to_device
    if kind in _ENCODER:
        _encoder_of(base)._host = host
        return kwargs
    mask = (torch.ones(shape, device=inputs.device) if mask is None else mask).to(inputs.device, torch.bool)
    packing = Packing.of(mask, host, _sees_back_only(base.config, kwargs) if kind in _DECODER else None)
    for module in _hooked(base):
        module._packing = packing
    # a mask of four dimensions is handed on as it is; empty, it fits no attention but ours
    kwargs = {**kwargs, "attention_mask": packing.mask[:1, None, None, :0], "packing": packing}
    places = torch.arange(shape[1], device=inputs.device)[None]
    if kind in _DECODER:
        places = mask.cumsum(1) - 1 if kind == "opt" else places - mask.int().argmax(1, keepdim=True)
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = places.clamp(min=0)
    for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
        if kwargs.get(name) is not None:
            kwargs[name] = _pack(kwargs[name].expand(*shape, *kwargs[name].shape[2:]), packing, packing.spare)
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
        hidden, mask = (hidden, None) if full else (_pack(hidden, packing, packing.spare), packing)
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
    """Make a Transformers encoder or decoder skip padding, in place; returns the model.

    Same logits and gradients at real tokens, in training and inference, with left or right padding.  At padded
    positions the hidden states are zero; a stock question-answering head reads them, so its loss differs, and so does
    a language model's where padding has labels.  A decoder's row gives what it gives alone, unless `position_ids` say
    otherwise (a stock model counts padding on the left).  With a cache, a mask that isn't (batch, tokens), or packed
    examples told apart by `position_ids`, a decoder runs as it came: exact, and padded.

    Raises ValueError naming the model type for what can't be unpadded: cross-attention, relative position biases.
    The unpadded model raises it for `output_attentions`, and an encoder for an attention_mask that isn't
    (batch, tokens).
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
    anatomy.put_forward(base, _forward, signature=True)
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
    if kind not in _KNOWN:
        why = f" ({_WHY_NOT[kind]})" if kind in _WHY_NOT else ""
        need = "models with Transformers' own attention, without relative positions"
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


def _remove_hooks(base: nn.Module) -> None:
    anatomy.take_forward(base)
    ours = (_before_encoder, _before_pooler, _after_encoder)
    for module in _hooked(base):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]


def is_unpadded(model: nn.Module) -> bool:
    """Whether `unpad` is on."""
    base = _base_of(model)
    config, forward = getattr(base, "config", None), anatomy.taken_by(base)  # a config may be that of several models
    on = getattr(config, "_attn_implementation", None) == NAME and config.model_type in _KNOWN
    return on and getattr(forward, "func", None) is _forward
