"""Attention masks: who may look at whom.

A mask is boolean and True means "may attend", as in `F.scaled_dot_product_attention`; `nn.MultiheadAttention` means
the opposite, so negate a mask before handing it over. All masks broadcast to (batch, heads, queries, keys).
To copy: this file alone.
"""

import torch
from torch import Tensor


def padding_mask(attention_mask: Tensor) -> Tensor:
    """The tokenizer's attention mask, made ready for attention scores: nobody looks at padding.

    attention_mask: int or bool (batch, keys), 1 for a real token. Returns bool (batch, 1, 1, keys).
    Raises TypeError for a float mask, ValueError for a wrong shape or, on a CPU only, for entries other than 0 and 1.

    >>> padding_mask(torch.tensor([[1, 1, 0]])).shape
    torch.Size([1, 1, 1, 3])
    """
    if attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}; whole numbers or bool (batch, keys) are needed")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask is {attention_mask.dtype}; whole numbers or bool are needed, 1 a real token")
    readable = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()  # on a GPU it would wait
    if readable and len(bad := ((attention_mask != 0) & (attention_mask != 1)).nonzero()):
        place, value = bad[0].tolist(), int(attention_mask[tuple(bad[0])])
        raise ValueError(f"attention_mask{place} is {value}; only 0 and 1 are masks")
    return attention_mask.bool()[:, None, None, :]  # (batch, 1, 1, keys)


def causal_mask(length: int, *, device=None) -> Tensor:
    """Token i may look at tokens 0 … i, as in a decoder: bool (length, length), rows are queries and columns keys.

    >>> causal_mask(3).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()  # (queries, keys)


def combine_masks(*masks: Tensor | None) -> Tensor | None:
    """A key is seen only where every mask allows it: logical and, with broadcasting; None means "no limit".

    Raises TypeError for a mask that is not bool, ValueError when shapes don't broadcast.

    >>> combine_masks(padding_mask(torch.tensor([[1, 1, 0]])), causal_mask(3))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    """
    combined = None
    for number, mask in ((number, mask) for number, mask in enumerate(masks) if mask is not None):
        if mask.dtype != torch.bool:
            raise TypeError(f"mask {number} is {mask.dtype}; torch.bool is needed: padding_mask makes it of 0 and 1")
        try:
            combined = mask if combined is None else combined & mask
        except RuntimeError:
            shapes = f"shape {tuple(mask.shape)}, which does not broadcast with {tuple(combined.shape)} before it"
            raise ValueError(f"mask {number} has {shapes}; (batch, heads, queries, keys), 1 where shared") from None
    return combined
