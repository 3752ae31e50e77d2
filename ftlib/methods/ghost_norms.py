"""How long each row's gradient is, and sums of them weighted row by row, from one forward and one backward pass.

A linear layer that took a_t and was asked b_t back at token t has the gradient Σ_t b_t a_tᵀ, whose squared length is
Σ_st (a_s·a_t)(b_s·b_t): no gradient of a row is held, and no weight's gradient computed before its rows are weighted.

To copy: this file, methods/{adapters,packing,speedups,unpadding}.py, core/{anatomy,batches,loop}.py, torch and
transformers.
Source: Goodfellow 2015 (arXiv:1510.01799); Li et al. 2022 (arXiv:2110.05679), section 4, for the tokens of a language
model; Bu et al. 2023 (arXiv:2210.00038) for the weighted sum without a second backward pass.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import anatomy
from ..core.loop import Batch
from .adapters import turned
from .packing import pad_input
from .unpadding import packing_of

Rows = Callable[[nn.Module, Batch], Tensor]  # every row's own loss, (rows,)


def role_of(module: nn.Module) -> str | None:
    """What kind of layer this is, "linear", "table" or "scale"; None for one without ghost norms here."""
    if getattr(type(module), "forward", None) is nn.Embedding.forward:  # not Gemma's, which is scaled
        return None if module.max_norm or module.sparse or module.scale_grad_by_freq else "table"
    if getattr(type(module), "forward", None) is nn.Linear.forward or turned(module):
        return "linear"
    flat = {p.dim() for p in module.parameters(recurse=False)} == {1} and not isinstance(module, nn.GroupNorm)
    return "scale" if flat and anatomy.normalizes(module) else None


class GhostNorms:
    """A forward and a backward pass of a batch, padded or unpadded: every row's `losses` and `norms`, float32 (rows,).

    rows: (model, batch) -> every row's own loss.  `add(factors)` adds Σ factor * gradient of a row to the `.grad` of
    all parameters that train.  They must belong to layers that `role_of` knows; one that is used twice, or by a table
    and a linear layer (tied), has the gradient of all its uses.
    Raises ValueError for a layer whose input has no row to each row of the batch.
    """

    def __init__(self, model: nn.Module, rows: Rows, batch: Batch):
        self.rows, self.tokens = batch["input_ids"].shape
        self.packing, self.half = packing_of(model, batch["attention_mask"]), False
        self.uses: dict[nn.Parameter, dict[str, list]] = {}  # {role: [(what was taken, what was asked back)]}
        found: list[tuple] = []
        self.losses = self._pass(model, rows, batch, found)
        with torch.no_grad():
            for own, role, module, took, asked in found:
                for back in asked:
                    self._keep(own, role, module, took, back)
            squares = sum((self._squares(p, uses) for p, uses in self.uses.items()), torch.zeros_like(self.losses))
        self.norms = squares.clamp(min=0).sqrt()

    def _pass(self, model: nn.Module, rows: Rows, batch: Batch, found: list[tuple]) -> Tensor:
        zero = torch.zeros((), device=batch["input_ids"].device, requires_grad=True)  # what is below needs no gradients

        def a_row_each(table: nn.Module, args: tuple) -> tuple | None:
            """Positions are looked up once for all rows; then nobody could say what each of them asks back."""
            once = args[0].dim() > 1 and len(args[0]) == 1 < self.rows and not self._packed(args[0].numel())
            return (args[0].expand(self.rows, *args[0].shape[1:]),) if once else None

        def watch(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return out
            own = {name: p for name, p in module.named_parameters(recurse=False) if p in moving}
            role, took, asked = role_of(module), args[0].detach() if "weight" in own else None, []
            out = out if out.requires_grad else out + zero.to(out.dtype)
            out.register_hook(asked.append)
            if role == "scale" and took is not None:
                took = _unscaled(module, took)
            found.append((own, role, module, took, asked))
            return out

        moving, hooks = {p for p in model.parameters() if p.requires_grad}, []
        for module in model.modules():
            if moving.intersection(module.parameters(recurse=False)):
                hooks.append(module.register_forward_hook(watch))
                if role_of(module) == "table":
                    hooks.append(module.register_forward_pre_hook(a_row_each))
        try:
            for p in moving:
                p.requires_grad_(False)
            losses = rows(model, batch)
            losses.sum().backward()
        finally:
            for p in moving:
                p.requires_grad_(True)
            for hook in hooks:
                hook.remove()
        return losses.detach().float()

    def _packed(self, count: int) -> bool:
        return self.packing is not None and count - len(self.packing.indices) in (0, self.packing.spare)

    def _apart(self, x: Tensor, module: nn.Module) -> Tensor:
        """A layer's (…, width) as (rows, tokens, width), floats as float32, zeros where there was padding."""
        x = x.float() if x.is_floating_point() else x
        if len(x) != self.rows:
            flat = x[0] if x.dim() > 2 and len(x) == 1 else x  # (n, …)
            if self._packed(len(flat)):
                x = pad_input(flat[None], self.packing)
            elif x.dim() == 2 and len(x) == self.rows * self.tokens:
                x = x.unflatten(0, (self.rows, self.tokens))
            else:
                what = f"takes {tuple(x.shape)} for {self.rows} rows of {self.tokens} tokens: no row can be told apart"
                raise ValueError(f"ghost norms: a {type(module).__name__} {what}; freeze it, or take a row at a time")
        return x.reshape(self.rows, -1, x.shape[-1])

    def _keep(self, own: dict, role: str, module: nn.Module, took: Tensor | None, asked: Tensor) -> None:
        self.half |= asked.dtype in (torch.bfloat16, torch.float16)
        back = self._apart(asked, module)  # (rows, tokens, width)
        for name, p in own.items():
            kind, a, b = ("sum", None, back) if name == "bias" else (role, took, back)
            if kind == "table":
                a = self._apart(took[..., None], module)[..., 0]  # (rows, tokens)
                b = back if module.padding_idx is None else back.masked_fill((a == module.padding_idx)[..., None], 0)
            elif kind == "linear":
                a = self._apart(took, module)
                kind, a, b = (kind, b, a) if turned(module) else (kind, a, b)  # whose weight is (in, out)
            elif kind == "scale":
                kind, a, b = "sum", None, back * self._apart(took, module)
            self.uses.setdefault(p, {}).setdefault(kind, []).append((a, b))

    def _squares(self, p: nn.Parameter, uses: dict[str, list]) -> Tensor:
        """The squared length of each row's gradient of a parameter; a layer that is used twice has tokens twice."""
        total = torch.zeros_like(self.losses)
        if "sum" in uses:
            total = torch.stack([b.sum(1) for _, b in uses["sum"]]).sum(0).square().sum(1)
        both = {role: [torch.cat(x, 1) for x in zip(*uses[role], strict=True)] for role in uses.keys() - {"sum"}}
        if "linear" in both:
            total = total + _linear_squares(*both["linear"])
        if "table" in both:
            total = total + _table_squares(*both["table"], len(p))
        if len(both) == 2:  # tied: |T + L|² = |T|² + |L|² + 2 T·L, where T·L = Σ_st (L's b_s)[id_t] (a_s · T's b_t)
            (took, asked), (ids, back) = both["linear"], both["table"]
            picked = asked.gather(2, ids[:, None].expand(-1, asked.shape[1], -1))  # (rows, s, t)
            total = total + 2 * (picked * (took @ back.transpose(1, 2))).sum((1, 2))
        return total

    @torch.no_grad()
    def add(self, factors: Tensor) -> None:
        """factors: (rows,); rows whose factor is 0 are left out, whatever is in them."""
        kept: Any = slice(None) if bool((factors != 0).all()) else factors != 0
        for p, uses in self.uses.items():
            for role, a, b in ((role, a, b) for role, own in uses.items() for a, b in own):
                b = (b[kept] * factors[kept, None, None]).flatten(0, 1)  # (n, width)
                if role == "table":
                    found = torch.zeros_like(p, dtype=b.dtype).index_add_(0, a[kept].flatten(), b)
                else:
                    found = b.sum(0) if role == "sum" else b.T @ a[kept].flatten(0, 1)
                p.grad = found.to(p.dtype) if p.grad is None else p.grad.add_(found)


@torch.no_grad()
def _unscaled(norm: nn.Module, x: Tensor) -> Tensor:
    """What a normalization layer makes of x before its weight: the difference that a weight of 1 makes."""
    twin, made = copy.copy(norm), []
    for value in (1.0, 0.0):  # Gemma's weight is one less than what it multiplies by
        own: dict[str, Any] = {name: p if p is None else torch.zeros_like(p) for name, p in norm._parameters.items()}
        vars(twin)["_parameters"] = own | {"weight": own["weight"] + value}
        made.append(type(norm).forward(twin, x))
    return made[0] - made[1]


def _linear_squares(a: Tensor, b: Tensor) -> Tensor:
    """|Σ_t b_t a_tᵀ|² a row, of (rows, tokens, width) each: by tokens, or by that sum where it is the lesser work."""
    tokens, wide, out = *a.shape[1:], b.shape[2]
    if tokens * (wide + out) <= wide * out:
        return ((a @ a.transpose(1, 2)) * (b @ b.transpose(1, 2))).sum((1, 2))
    return (b.transpose(1, 2) @ a).square().sum((1, 2))


def _table_squares(ids: Tensor, back: Tensor, size: int) -> Tensor:
    """What a row asks back for the same id adds up; ids (rows, tokens), back (rows, tokens, width)."""
    row = torch.arange(len(ids), device=ids.device)[:, None]
    found, place = (row * size + ids).flatten().unique(return_inverse=True)
    sums = back.new_zeros(len(found), back.shape[2]).index_add_(0, place, back.flatten(0, 1))
    return back.new_zeros(len(ids)).index_add_(0, found // size, sums.square().sum(1))
