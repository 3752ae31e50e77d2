"""Pruning: which heads and feed-forward neurons count, taking them out for good, and single weights set to zero.

    scores = ftlib.pruning.importance(model, rows, "heads")  # a tensor a layer
    ftlib.prune(model, ftlib.pruning.weakest(scores, 0.25), "heads")  # smaller matrices

To copy: this file, methods/{adapters,packing,speedups,unpadding}.py, inputs/{agreement,rows}.py, core/, tasks/, torch
and transformers.
Source: Michel et al. 2019 (arXiv:1905.10650); Han et al. 2015 (arXiv:1506.02626).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import anatomy
from ..core.batches import collate, number, one_of, refuse, split_by_size, to_device
from ..core.loop import logits_of
from ..inputs.agreement import agree
from ..inputs.rows import Door, checked
from ..tasks.task import TASKS, tasks_of
from .adapters import adapters_of, linears, turned
from .unpadding import is_unpadded

WITH_HEADS = ("bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "roberta", "xlm-roberta")
_PROJECTIONS = ("query", "key", "value", "q_lin", "k_lin", "v_lin")
_WIDTHS = ("intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim")


class Block(NamedTuple):
    """Half a layer: `units`, heads or neurons, of `size` numbers each, between the linear layers that make them and the
    one that reads them."""

    makers: list[nn.Module]
    reader: nn.Module
    size: int

    @property
    def units(self) -> int:
        return _sizes(self.reader)[1] // self.size


def _sizes(linear: nn.Module) -> Sequence[int]:
    """(out, in)."""
    return linear.weight.T.shape if turned(linear) else linear.weight.shape


def blocks(model: nn.Module, of: str) -> list[Block]:
    """The "heads", or feed-forward "neurons", of every layer; ValueError naming the model for what has no such ones."""
    one_of("of", of, ("heads", "neurons"))
    config, kind, found = anatomy.base_of(model).config, anatomy.kind_of(model), []
    refuse(
        (adapters_of(model), "the model has adapters; ftlib.merge(model) folds them in first"),
        (of == "heads" and (kind not in WITH_HEADS or getattr(config, "is_decoder", False)),
         f"heads of {kind} can't be taken out, only of an encoder of type {', '.join(WITH_HEADS)}; take 'neurons'"),
    )  # fmt: skip
    inside = {*linears(model).values()}
    for layer in (layer for stack in anatomy.stacks(model) for layer in stack):
        names = {module: name for name, module in layer.named_modules() if module in inside}
        half = [module for module, name in names.items() if ("att" in name.lower()) == (of == "heads")]
        makers, reader, size = half[:-1], half[-1:], 1
        if of == "heads":
            makers = [module for module in makers if names[module].rpartition(".")[2] in _PROJECTIONS]
            size = layer.get_submodule(names[makers[0]].rpartition(".")[0]).attention_head_size
        else:
            width, (out, wide) = config.hidden_size, _sizes(reader[0]) if reader else (0, 1)
            fits = out == width and [(h // wide, h % wide, w) for h, w in map(_sizes, makers)]
            norms = [m for m in layer.modules() if anatomy.normalizes(m) and hasattr(m, "weight")]
            fits = fits in ([(1, 0, width)], [(2, 0, width)], [(1, 0, width)] * 2)  # one, two in one, or a gate beside
            fits = fits and (wide == width or not any(m.weight.numel() == wide for m in norms))
            refuse((not fits, f"{kind}: the feed-forward half of a layer is not linear, function, linear"))
        found.append(Block(makers, *reader, size))
    return found


def importance(model: nn.Module, rows: Any, of: str = "heads", *, batch_size: int = 32) -> list[Tensor]:
    """How much the loss hangs on each head, or neuron: float32 (units,) for every layer, by a first-order estimate.

    Mean over rows of |∂L/∂ξ|, ξ a mask of ones on what a unit gives, L the row's loss, summed over its labeled items:
    what is lost as the unit goes (Michel et al. 2019, equation 2; they divide a layer's by their length, as in
    `scores / scores.norm()`, before layers are compared).
    rows: a tokenized dataset with labels.  Raises ValueError as `blocks`, and for models of several heads or two sides.
    """
    parts = blocks(model, of)
    both = getattr(model.config, "is_encoder_decoder", False)
    refuse((hasattr(model, "heads") or both, "importance is for models with one head and one side; export one task"))
    record, pad = TASKS[tasks_of(model)[""][0]], agree(model)
    rows, device = checked(rows, Door.of(model, "rows")), next(model.parameters()).device
    sums = [torch.zeros(part.units) for part in parts]
    with anatomy.evaluating(model), torch.enable_grad():
        for places in split_by_size(range(len(rows)), rows.lengths, batch_size=batch_size, alike=pad.alike):
            own = rows.take(places)
            own = record.draw(own, [(0, 0, i) for i in places]) if record.draw else own
            batch = collate(own, pad_token_id=pad.id, padding_side=pad.side, stack={"": record.stack})
            batch = to_device(batch, device)
            real = batch["attention_mask"].nonzero()[:, 0] if is_unpadded(model) else None  # the row of every token
            masks = [torch.ones(len(own), part.units, device=device, requires_grad=True) for part in parts]
            hooks = [
                part.reader.register_forward_pre_hook(_masking(mask, part.size, real))
                for part, mask in zip(parts, masks, strict=True)
            ]
            try:
                labels = batch.pop("labels")
                loss = record.loss(logits_of(model(**batch), batch), labels)
            finally:
                for hook in hooks:
                    hook.remove()
            for total, gradient in zip(sums, torch.autograd.grad(loss, masks), strict=True):
                total += gradient.abs().sum(0).cpu()
    return [total / len(rows) for total in sums]


def _masking(mask: Tensor, size: int, real: Tensor | None) -> Callable:
    """A hook that multiplies what a linear layer reads, (rows, tokens, width) or packed, by its row's mask."""

    def hook(module: nn.Module, args: tuple) -> tuple:
        x = args[0].flatten(0, -2)  # (positions, width)
        if real is None:
            row = torch.arange(len(mask), device=x.device).repeat_interleave(len(x) // len(mask))
        else:
            row = torch.cat((real, real.new_zeros(len(x) - len(real))))  # the spare ones behind are never read
        return ((x * mask.repeat_interleave(size, 1)[row]).view_as(args[0]), *args[1:])

    return hook


def weakest(scores: Sequence[Tensor], share: float, *, uniform: bool = False) -> dict[int, list[int]]:
    """{layer: units to take out}: `share` of all, those with the lowest scores, but the best of every layer.

    uniform: that share of every layer, so that all keep as many.

    >>> weakest([torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.3, 0.8, 0.7])], 0.5)
    {0: [0, 1], 1: [0]}
    """
    number("share", share, 0, 1)
    ranked = [own.argsort(stable=True).tolist()[:-1] for own in scores]  # the best stays
    if uniform:
        return {i: sorted(own[: round(share * (len(own) + 1))]) for i, own in enumerate(ranked)}
    every = sorted((float(scores[i][unit]), i, unit) for i, own in enumerate(ranked) for unit in own)
    gone = every[: round(share * sum(map(len, scores)))]
    return {i: sorted(unit for _, layer, unit in gone if layer == i) for i in range(len(scores))}


def prune(model: nn.Module, units: Mapping[int, Sequence[int]], of: str = "heads") -> nn.Module:
    """Take heads, or feed-forward neurons, out for good: smaller matrices, less work; in place, returns the model.

    units: {layer: numbers, from 0, among the heads or neurons that it has now}, as `weakest` gives them.
    The model computes what it did with these masked.  Where all layers keep as many neurons the config says so, and
    `from_pretrained` opens it.  For heads, and neurons otherwise, it has no words: `ftlib.save` writes zeros in their
    place, with which `from_pretrained` opens a model that computes the same, at its old size; `ftlib.load` takes them
    out again.  Raises ValueError as `blocks`, for units that are not there, and where a layer would keep none.
    """
    parts, config = blocks(model, of), model.config
    for i, gone in units.items():
        there = {*range(parts[i].units)} if i in range(len(parts)) else {*()}
        refuse(
            (not there, f"layer {i!r}: the model has layers 0 to {len(parts) - 1}"),
            ({*gone} - there, f"layer {i}: no {of} {sorted({*gone} - there)[:3]}; it has 0 to {len(there) - 1}"),
            ({*gone} == there, f"layer {i} would keep none of its {len(there)} {of}; leave it one"),
        )
    before, notes = {part.units for part in parts}, getattr(config, "kept_units", {})
    own = dict(notes.get(of, {}))  # {layer, as JSON has it: [units it came with, those of them that are left]}
    for i, gone in ((i, {*gone}) for i, gone in units.items() if gone):
        count = parts[i].units
        full, known = own.get(str(i), (0, []))
        full, known = (full, known) if len(known) == count else (count, range(count))
        stay = [unit for unit in range(count) if unit not in gone]
        own[str(i)] = [full, [known[unit] for unit in stay]]
        _move(parts[i], stay)
    alike = of not in notes and len(before) == len({part.units for part in parts}) == 1
    if own and not (alike and of == "neurons" and _say(model, *before, parts[0].units)):
        config.kept_units = notes | {of: own}
    return model


def _say(model: nn.Module, old: int, new: int) -> bool:
    """Write a width of feed-forward halves into the configs; False where they have no name for it."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    names = [(one, name) for one in configs for name in _WIDTHS if getattr(one, name, None) == old]
    names += [(one, "n_inner") for one in configs if hasattr(one, "n_inner")]  # GPT-2's, which may be None
    for place in names:
        setattr(*place, new)
    return bool(names)


def _move(block: Block, units: Sequence[int], full: int | None = None) -> None:
    """Let a block keep these units alone; full: or put those it has at these places among so many, zeros elsewhere."""
    here, row = block.units * block.size, block.size * (full or block.units)
    places = [unit * block.size + i for unit in units for i in range(block.size)]
    for linear in (*block.makers, block.reader):
        dim = 1 if linear is block.reader else 0
        count = _sizes(linear)[dim] // here  # 2 where a gate lies in one matrix with what it lets through
        index, size = torch.tensor([k * row + place for k in range(count) for place in places]), full and count * row
        linear.weight = _moved(linear.weight, index, dim ^ turned(linear), size)
        if not dim and linear.bias is not None:
            linear.bias = _moved(linear.bias, index, 0, size)
        out, into = _sizes(linear)
        vars(linear).update({"nf": out, "nx": into} if turned(linear) else {"out_features": out, "in_features": into})


def _moved(p: nn.Parameter, index: Tensor, dim: int, size: int | None) -> nn.Parameter:
    data, index = p.detach(), index.to(p.device)
    if size is None:
        return nn.Parameter(data.index_select(dim, index), p.requires_grad)
    shape = [size if place == dim else length for place, length in enumerate(data.shape)]
    return nn.Parameter(data.new_zeros(shape).index_copy(dim, index, data), p.requires_grad)


def widened(model: nn.Module) -> nn.Module:
    """A copy of a pruned model, as large as its config says, with zeros for what was taken out; others as they are."""
    if not hasattr(model.config, "kept_units"):
        return model
    model = copy.deepcopy(model)
    for of, own in model.config.kept_units.items():
        parts = blocks(model, of)
        for i, (full, stay) in own.items():
            if parts[int(i)].units == len(stay):
                _move(parts[int(i)], stay, full)
    return model


def narrowed(model: nn.Module) -> nn.Module:
    """Take out again, in place, what the config of a model that `widened` made says; ValueError for nonsense."""
    for of, own in vars(model.config).pop("kept_units", {}).items():
        prune(model, {int(i): sorted({*range(full)} - {*stay}) for i, (full, stay) in own.items()}, of)
    return model


def smallest(weight: Tensor, share: float) -> Tensor:
    """A mask of the weight's shape: False at the `share` of weights next to zero.

    >>> smallest(torch.tensor([0.1, -3.0, 0.2, 1.0]), 0.5)
    tensor([False,  True, False,  True])
    """
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().flatten().topk(round(number("share", share, 0, 1) * len(mask)), largest=False).indices] = False
    return mask.view_as(weight)


def sparsify(model: nn.Module, share: float) -> dict[str, Tensor]:
    """Set the smallest weights of every linear layer inside the layers to zero; returns {layer's name: what is kept}.

    They stay zero in training: their gradient is zero from then on.  The matrices keep their size, and so their time.
    """
    masks = {name: smallest(linear.weight, share) for name, linear in linears(model).items()}
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.data.mul_(mask)
        if weight.requires_grad:
            weight.register_hook(mask.mul)
    return masks
