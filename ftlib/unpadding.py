"""Run a Transformers encoder on real tokens only: same numbers, no work on padding.

A batch of texts is padded to its longest row, and a stock encoder computes every layer for the padding too.
`unpad(model)` puts two hooks on the encoder: before it, padded positions are dropped, so that each layer sees
one long row of real tokens, (1, N_tokens, hidden); after it, they are put back as zeros.  Only attention must
know where an example ends; it is told through Transformers' own `AttentionInterface`.  The model stays the same
object with the same weights, and runs in the stock `Trainer`, in PEFT and in sentence-transformers.

To copy this module you need: unpadding.py, torch and transformers.
Source of the idea: Portes et al. 2023 (MosaicBERT, arXiv:2312.17482); Warner et al. 2024 (ModernBERT,
arXiv:2412.13663).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "ftlib_unpadded"

# Model types whose encoder takes (hidden states, mask) and whose layers pass the mask on: type -> attribute.
_ENCODER = {
    "albert": "encoder", "bert": "encoder", "camembert": "encoder", "distilbert": "transformer",
    "electra": "encoder", "roberta": "encoder", "xlm-roberta": "encoder",
}  # fmt: skip


class Packing(NamedTuple):
    """Where the kept tokens of a padded batch come from."""

    indices: torch.Tensor  # (N_tokens,) int64, positions in the flattened (batch * tokens)
    mask: torch.Tensor  # (batch, tokens) bool, True at real tokens
    batch: int
    tokens: int


def unpad_input(hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Packing]:
    """Keep the real tokens of (batch, tokens, hidden): returns (1, N_tokens, hidden) and where they came from.

    mask: bool (batch, tokens), True at real tokens.  Position 0 is always kept, because the stock heads read it,
    even where it is padding (left padding, or a row without real tokens).

    >>> hidden = torch.arange(4.0).view(2, 2, 1)
    >>> packed, packing = unpad_input(hidden, torch.tensor([[True, True], [True, False]]))
    >>> packed.flatten().tolist(), packing.indices.tolist()
    ([0.0, 1.0, 2.0], [0, 1, 2])
    """
    batch, tokens = mask.shape
    kept = mask.clone()
    kept[:, 0] = True
    indices = kept.flatten().nonzero().flatten()  # (N_tokens,)
    return hidden.flatten(0, 1)[indices].unsqueeze(0), Packing(indices, mask, batch, tokens)


def pad_input(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Put (1, N_tokens, ...) back into (batch, tokens, ...); zeros where there was padding.

    >>> packed, packing = unpad_input(torch.ones(1, 2, 3), torch.tensor([[True, False]]))
    >>> pad_input(packed, packing)[0, :, 0].tolist()
    [1.0, 0.0]
    """
    flat = packed.new_zeros(packing.batch * packing.tokens, *packed.shape[2:])
    flat = flat.index_copy(0, packing.indices, packed[0])
    return flat.view(packing.batch, packing.tokens, *packed.shape[2:])


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # (1, heads, N_tokens, head_dim) when packed
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Packing | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if isinstance(attention_mask, Packing):
        packing = attention_mask
        query, key, value = (
            pad_input(x.transpose(1, 2), packing).transpose(1, 2) for x in (query, key, value)
        )  # (batch, heads, tokens, head_dim)
        keys = packing.mask[:, None, None, :]  # (batch, 1, 1, tokens)
        out = F.scaled_dot_product_attention(query, key, value, keys, dropout_p=dropout, scale=scaling)
        out = out.transpose(1, 2).flatten(0, 1)[packing.indices].unsqueeze(0)  # (1, N_tokens, heads, head_dim)
        return out, None
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None  # (batch, tokens, heads, head_dim)


def _keep_padding_mask(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """What Transformers calls to build the (batch, 1, tokens, tokens) mask; we hand the (batch, tokens) one on."""
    return attention_mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _keep_padding_mask)


def _drop_padding(encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    vars(encoder).pop("_packing", None)  # left over when the last forward pass failed half-way
    hidden = args[0] if args else kwargs["hidden_states"]  # (batch, tokens, hidden)
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is None or mask.ndim != 2:  # no mask, or a model switched back to eager attention
        return None
    kwargs = dict(kwargs)
    if mask.all():
        packing = None  # nothing to drop
    else:
        hidden, packing = unpad_input(hidden, mask)
    if args:
        args = (hidden, *args[1:])
    else:
        kwargs["hidden_states"] = hidden
    if len(args) > 1:
        args = (args[0], packing, *args[2:])
    else:
        kwargs["attention_mask"] = packing
    return args, kwargs


def _restore_padding(encoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    packing = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if isinstance(packing, Packing):
        output.last_hidden_state = pad_input(output.last_hidden_state, packing)
        encoder._packing = packing  # for the hidden states of the layers, which the base model returns
    return output


def _restore_hidden_states(base: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    packing = vars(_encoder_of(base)).pop("_packing", None)
    if packing is None:
        return output

    def padded(states: Any) -> Any:
        if not isinstance(states, tuple):
            return states
        shape = (packing.batch, packing.tokens)
        return tuple(s if s is None or s.shape[:2] == shape else pad_input(s, packing) for s in states)

    if isinstance(output, tuple):  # return_dict=False: the hidden states are the one tuple inside
        return tuple(padded(part) for part in output)
    if output.get("hidden_states") is not None:
        output.hidden_states = padded(output.hidden_states)
    return output


def _encoder_of(base: nn.Module) -> nn.Module:
    return getattr(base, _ENCODER[base.config.model_type])


def _base_of(model: nn.Module) -> nn.Module:
    """The base Transformers model inside a task model, a PEFT model, or a MultiTaskModel."""
    if hasattr(model, "heads") and hasattr(model, "encoder"):  # MultiTaskModel
        model = model.encoder
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    return getattr(model, "base_model", model)


def unpad(model: nn.Module) -> nn.Module:
    """Make a Transformers encoder skip padding, in place; returns the model.

    Same logits and gradients at real tokens, in training and inference, with left or right padding.  At padded
    positions the hidden states are zero, where the stock model leaves numbers that nothing should read.
    `output_attentions` needs eager attention, so it needs `repad(model)` first.

    Raises ValueError naming the model type for what can't be unpadded: decoders, cross-attention, and encoders with
    relative position biases or rotary positions.
    """
    base = _base_of(model)
    config = getattr(base, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in _ENCODER:
        raise ValueError(f"unpad can't handle model type {kind!r}; it handles {', '.join(sorted(_ENCODER))}")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"unpad handles encoders; this {kind} is a decoder (is_decoder or add_cross_attention)")
    if is_unpadded(model):
        return model
    encoder = _encoder_of(base)
    encoder._before_unpad = config._attn_implementation
    base.set_attn_implementation(NAME)
    _remove_hooks(base)  # left over in a copy whose attention was switched back
    encoder.register_forward_pre_hook(_drop_padding, with_kwargs=True)
    encoder.register_forward_hook(_restore_padding, with_kwargs=True)
    base.register_forward_hook(_restore_hidden_states, with_kwargs=True)
    return model


def repad(model: nn.Module) -> nn.Module:
    """Undo `unpad`, in place; returns the model."""
    if is_unpadded(model):
        base = _base_of(model)
        _remove_hooks(base)
        base.set_attn_implementation(vars(_encoder_of(base)).pop("_before_unpad", "sdpa"))
    return model


def _remove_hooks(base: nn.Module) -> None:
    ours = (_drop_padding, _restore_padding, _restore_hidden_states)
    for module in (base, _encoder_of(base)):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]


def is_unpadded(model: nn.Module) -> bool:
    """Whether `unpad` is on."""
    config = getattr(_base_of(model), "config", None)
    return getattr(config, "model_type", None) in _ENCODER and config._attn_implementation == NAME
