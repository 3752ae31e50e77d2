"""The real tokens of padded rows in one long row, (1, N_tokens, hidden), and attention that keeps examples apart in it.

On a CPU by `speedups.attend`, on a CUDA GPU of capability 8.0 or more, in half precision and without attention dropout,
by `torch.nn.attention.varlen`.  Otherwise, as for soft-capped scores, a GPU's biases of positions and a CPU's sliding
windows, the heads are padded.

To copy: this file, methods/speedups.py, core/anatomy.py and torch.
Source: Portes et al. 2023 (MosaicBERT, arXiv:2312.17482); Warner et al. 2024 (ModernBERT, arXiv:2412.13663).
"""

from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..core import anatomy
from . import speedups


class Packing(NamedTuple):
    """Where the kept tokens of a padded batch come from; made once a forward pass, with one wait for the GPU."""

    indices: Tensor  # (N_tokens,) int64, positions in the flattened (batch * tokens)
    mask: Tensor  # (batch, tokens) bool, True at real tokens
    cu_seqlens: Tensor | None  # (batch + 1,) int32, where examples begin; None for an encoder with padding elsewhere
    longest: int  # kept tokens of the longest row
    lengths: list[int] | None = None  # kept tokens of every row; None where cu_seqlens is
    spare: int = 0  # rows added to the packed tokens: oneDNN prepares a product for every new shape, so have few
    gapless: bool = True  # no padding between the tokens of a row: packed, they are as far from each other
    causal: bool = False

    @classmethod
    def of(cls, mask: Tensor, host: Tensor | None = None, causal: bool | None = None) -> "Packing":
        """From a bool mask (batch, tokens), True at real tokens; `host`: the same on the CPU, or a GPU is asked.

        causal: None for an encoder, which keeps position 0 of every row, unattended if it is padding: stock heads read
        it.  A decoder keeps it in a row without tokens, for a token to have.
        """

        def keep(real: Tensor) -> Tensor:
            first = real[:, :1] | True if causal is None else real[:, :1] | ~real.any(1, keepdim=True)
            return torch.cat((first, real[:, 1:]), 1)

        kept, seen = keep(mask), mask if host is None else host.bool()
        there = kept if host is None else keep(seen)
        gapless = ((there[:, 1:] > there[:, :-1]).sum(1) + there[:, 0] <= 1).all()
        gapless = gapless & seen[:, 0].all() if causal is None else gapless
        *lengths, gapless = torch.cat((there.sum(1), gapless.long()[None])).tolist()
        total, longest, gapless = sum(lengths), max(lengths), bool(gapless)
        spared = mask.device.type == "cpu" and speedups.ONEDNN and len(mask) > 1 and 256 < total < mask.numel()
        indices, ends = kept.flatten().nonzero_static(size=total).flatten(), None
        if causal is None and not gapless:
            lengths = None
        else:
            ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(mask.device, non_blocking=True)
        mask = mask if causal is None else kept
        return cls(indices, mask, ends, longest, lengths, -total % 16 if spared else 0, gapless, bool(causal))


class Packings(NamedTuple):
    """Those of an encoder's rows and of a decoder's beside it, which reads the encoder's."""

    source: Packing
    target: Packing

    def of(self, attention: Any) -> tuple[Packing, Packing]:
        """Whose queries an attention has, and whose keys: a decoder's that is not causal looks into the encoder."""
        own = self.target if attention.is_decoder else self.source
        return (own._replace(causal=False), self.source) if own.causal and not attention.is_causal else (own, own)


def pack(padded: Tensor, packing: Packing, spare: int = 0) -> Tensor:
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
    return pack(hidden, packing), packing


def pad_input(packed: Tensor, packing: Packing) -> Tensor:
    """Put (1, N_tokens, ...) back into (batch, tokens, ...); zeros where there was padding."""
    flat, positions = packed[0, : len(packing.indices)], packing.mask.numel()
    if len(flat) != positions:
        flat = flat.new_zeros(positions, *flat.shape[1:]).index_copy(0, packing.indices, flat)
    return flat.unflatten(0, packing.mask.shape)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float, scaling: float | None,
    sliding_window: int | None = None, softcap: float | None = None, keys: Packing | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of (1, heads, N_tokens, head_dim), every token in its own example; (1, N_tokens, heads, head_dim).

    key and value may have fewer heads, each for as many of query's in turn.  sliding_window: how far a token sees, in
    tokens, itself included.  keys: the packing of key and value where they are other rows', of an encoder.  bias: as in
    `speedups.attend`, for the places in the padded row.
    """
    device = query.device.type  # rotary positions leave float32 under autocast
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    local = sliding_window is not None and sliding_window < packing.mask.shape[1]  # one that holds every row is none
    window = sliding_window - 1 if local else None
    keys = packing if keys is None else keys
    quick = softcap is None and not local and keys is packing and packing.lengths is not None
    quick = quick and (bias is None or packing.gapless)
    if quick and speedups.computed_in(query):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = speedups.attend(query[0], key[0], value[0], packing.lengths, dropout, scale, packing.causal, bias)
        return out.transpose(0, 1).unsqueeze(0)
    if bias is None and softcap is None and (packing.gapless or not local) and can_varlen(query, packing, dropout):
        return attend_varlen(query, key, value, packing, keys, scaling, window)
    return attend_padded(query, key, value, packing, keys, dropout, scaling, window, softcap, bias)


def can_varlen(query: Tensor, packing: Packing, dropout: float) -> bool:
    """What `varlen_attn`, which is FlashAttention 2, asks for."""
    if packing.cu_seqlens is None or dropout or query.shape[-1] % 8 or query.shape[-1] > 256:
        return False
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, keys: Packing, scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """As `attend_packed`; window: how far a token sees to each side, without itself."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}
    if not grouped:
        key, value = _repeated(query, key, value)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N_tokens, heads, head_dim)
    left = -1 if window is None else window  # -1: without end
    options = {"scale": scaling, "window_size": (left, 0 if packing.causal else left), **grouped}
    sizes = packing.cu_seqlens, keys.cu_seqlens, packing.longest, keys.longest
    out = varlen_attn(query, key, value, *sizes, **options)
    return out.unsqueeze(0)


def attend_padded(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, keys: Packing, dropout: float,
    scaling: float | None, window: int | None, softcap: float | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `attend_packed`; window: how far a token sees to each side, without itself."""
    # (batch, heads, tokens, head_dim) each
    query, key, value = (
        pad_input(x.transpose(1, 2), own).transpose(1, 2) for x, own in ((query, packing), (key, keys), (value, keys))
    )
    seen = keys.mask[:, None, None, :]  # (batch, 1, 1, tokens)
    if packing.causal or window is not None:
        position = torch.arange(packing.mask.shape[1], device=query.device)
        back = position[:, None] - position  # (tokens, tokens), how far back the key is from the query
        seen = seen & (back >= 0) if packing.causal else seen  # (batch, 1, tokens, tokens)
        seen = seen & (back.abs() <= window) if window is not None else seen
    if bias is not None:
        bias = bias[:, : packing.mask.shape[1], : packing.mask.shape[1]].to(query.dtype)
        seen = torch.where(seen, bias, torch.finfo(query.dtype).min)  # (batch, heads, tokens, tokens)
    out = capped_attention(query, key, value, seen, dropout, scaling, softcap)
    return pack(out.transpose(1, 2), packing, packing.spare)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, dropout: float, scaling: float | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """softmax(cap * tanh(scale * QKᵀ / cap)) V over the keys `seen` (bool, or what is added); softcap None: no cap.

    Source: Gemma Team 2024 (Gemma 2, arXiv:2408.00118), section 2.
    """
    key, value = _repeated(query, key, value)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, seen, dropout_p=dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores.float() / softcap)
    if seen is not None and seen.dtype == torch.bool:  # not -inf, as padding that asks has no key at all
        scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    elif seen is not None:
        scores = scores + seen
    return F.dropout(scores.softmax(-1).to(value.dtype), dropout) @ value


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value with as many heads as query, dimension 1."""
    times = query.shape[1] // key.shape[1]
    return (key, value) if times == 1 else (key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))


def padded(output: Any, packing: Packing) -> Any:
    """The output with every (1, N_tokens, hidden) in it put back."""
    shape, back = packing.mask.shape, partial(pad_input, packing=packing)
    return tree_map_only(lambda x: isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] != shape, back, output)


def forward_both(base: nn.Module, kwargs: dict) -> Any:
    """An encoder with a decoder, both packed; without both as it came."""
    names = {"": ("input_ids", "inputs_embeds"), "decoder_": ("decoder_input_ids", "decoder_inputs_embeds")}
    if (found := _packed(names, kwargs, "decoder_", base.config.pad_token_id)) is None:
        return type(base).forward(base, **kwargs)
    places = {}
    for side, packing in found.items():
        place = torch.arange(packing.mask.shape[1], device=packing.mask.device).expand(packing.mask.shape)
        table = (base.decoder if side else base.encoder).embed_positions
        places[table] = partial(_placed, places=pack(place, packing, packing.spare)[0])
    packings = Packings(*found.values())
    with anatomy.forwards(places):
        output = type(base).forward(base, **kwargs | {"packing": packings, "use_cache": False, "return_dict": True})
    for name in output:
        output[name] = padded(output[name], packings.source if name.startswith("encoder_") else packings.target)
    return output if kwargs.get("return_dict") is not False else output.to_tuple()


def _placed(table: nn.Module, *args: Any, places: Tensor, **kwargs: Any) -> Tensor:
    """What a table of positions gives for those of packed tokens."""
    return type(table).forward(table, None, position_ids=places)


def _packed(names: dict[str, tuple[str, ...]], kwargs: dict, causal: str | None, pad: int | None) -> Any:
    """Put packed tokens into kwargs, return {side: its packing}; None for a side without tokens, a cache, other masks.

    names: {side: what its tokens may be called}; <side>attention_mask has its mask.  Where the causal side has none,
    its last padding ids don't count.
    """
    cached = kwargs.get("use_cache") or any(kwargs.get(n) is not None for n in ("encoder_outputs", "past_key_values"))
    given = {side: [kwargs[name] for name in own if kwargs.get(name) is not None] for side, own in names.items()}
    masks = {side: kwargs.get(f"{side}attention_mask") for side in names}
    if cached or any(len(own) != 1 for own in given.values()) or any(
        mask is not None and getattr(mask, "shape", None) != given[side][0].shape[:2] for side, mask in masks.items()
    ):  # fmt: skip
        return None
    found = {}
    for side, (ids,) in given.items():
        mask = masks[side]
        if mask is None:
            mask = torch.ones(ids.shape[:2], device=ids.device, dtype=torch.bool)
            if side == causal and ids.ndim == 2:
                mask = (ids != pad).flip(1).cummax(1).values.flip(1)
        packing = Packing.of(mask.to(ids.device, torch.bool), host_of(masks[side]), side == causal)
        kwargs |= {name: pack(ids, packing, packing.spare) for name in names[side] if kwargs.get(name) is not None}
        kwargs[f"{side}attention_mask"] = packing.mask[:1, None, None, :0]  # handed on as it is: see `unpadding`
        found[side] = packing
    return found


def forward_stack(stack: nn.Module, kwargs: dict) -> Any:
    """T5's encoder, or its decoder, for which the encoder's output is packed too; else as it came."""
    names: dict[str, tuple[str, ...]] = {"": ("input_ids", "inputs_embeds")}
    if stack.is_decoder:
        names["encoder_"] = ("encoder_hidden_states",)
    found = _packed(names, kwargs, "" if stack.is_decoder else None, stack.config.pad_token_id)
    if found is None:
        return type(stack).forward(stack, **kwargs)
    kwargs |= {"packing": Packings(found.get("encoder_", found[""]), found[""]), "use_cache": False}
    return padded(type(stack).forward(stack, **kwargs), found[""])


def attend_relative(
    attention: nn.Module, hidden: Tensor, *args: Any, packing: Packings | None = None, **kwargs: Any
) -> tuple:
    """T5's attention of packed tokens; the first layer's bias goes on to the others, in UMT5 each has its own."""
    if packing is None:
        return type(attention).forward(attention, hidden, *args, **kwargs)
    source = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
    layers = zip((attention.q, attention.k, attention.v), (hidden, source, source), strict=True)
    # (1, heads, N_tokens, head_dim) each
    query, key, value = (
        layer(hidden if x is None else x).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for layer, x in layers
    )
    (own, keys), bias = packing.of(attention), kwargs.get("position_bias")
    if bias is None and attention.has_relative_attention_bias:
        width = -(-own.mask.shape[1] // 8) * 8
        bias = attention.compute_bias(width, width)[0]  # (heads, width, width)
    dropout = attention.dropout if attention.training else 0.0
    out = attend_packed(query, key, value, own, dropout, attention.scaling, keys=keys, bias=bias)
    out = attention.o(out.flatten(2))  # (1, N_tokens, hidden)
    return (out, bias, None) if "position_bias" in kwargs else (out, None)


def host_of(mask: Tensor | None) -> Tensor | None:
    """The same mask on the CPU, where it was sent from and not changed since: see core.batches.to_device."""
    as_sent = mask is not None and (mask.is_inference() or mask._version == 0)
    return getattr(mask, "host", None) if as_sent else None
