"""What a model computes inside, by putting something else there: logit lens, activation patching, shuffled weights.

To copy: this file, methods/interpretation.py, inputs/{agreement,rows}.py, core/{anatomy,batches,loop}.py, tasks/.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import anatomy
from ..core.batches import refuse
from ..inputs.rows import Door, checked
from .interpretation import Explained, explained


def logit_lens(model: nn.Module, row: dict) -> Tensor:
    """What a language model would say if it ended after a layer: logits (layers, tokens, vocabulary), the last its own.

    Each layer's output is put in the place of the last one's, before the final norm and the head; tokens are read at
    the places where they are predicted from.  Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    stack, kept = anatomy.layers(model), []  # a copy of the row for every layer, of which the k-th is kept at layer k
    with anatomy.evaluating(model):
        (own,) = checked([row], Door.of(model, "rows", labels_needed=False))
        one = Explained(model, own, [*range(len(own["input_ids"]))], target=(0, 0))
        keep = {layer: lambda hidden: kept.append(hidden[len(kept)].clone()) or hidden for layer in stack[:-1]}
        last = {stack[-1]: lambda hidden: torch.stack([*kept, hidden[-1]])}
        return one.logits(one.x.expand(len(stack), -1, -1), keep | last).float()


def activation_patching(
    model: nn.Module, clean: dict, corrupted: dict, target: Any, *, task: str | None = None, batch_size: int = 32
) -> np.ndarray:
    """Where a difference between two rows is: float32 (1 + layers, tokens), by one hidden state of the clean row each.

    The corrupted row runs with the clean one's state in the place of its own after a layer (0: the embedding table)
    at a token; 0: f is as without, 1: as of the clean row.  target: as of `attribute`; for language models mostly a
    function, the difference of two tokens' logits at the last position say.
    Raises ValueError for rows of other lengths, and where f is the same of both.
    Source: Meng et al. 2022 (arXiv:2202.05262), section 2; Zhang and Nanda 2024 (arXiv:2309.16042) on what to measure.
    """
    stack, found = anatomy.layers(model), []
    with anatomy.evaluating(model):
        right, wrong = explained(model, [clean, corrupted], False, target, task, None, batch_size)
        same = len(right.x) == len(wrong.x)
        refuse((not same, f"the clean row has {len(right.x)} tokens, the other {len(wrong.x)}; make them equal"))
        states = [right.x]  # of the clean row, (tokens, hidden) each
        keep = {layer: lambda hidden: states.append(hidden[0].clone()) or hidden for layer in stack}
        best = right.choose(right.logits(right.x[None], keep))
        worst = right.choose(wrong.logits(wrong.x[None]))
        refuse((bool(best == worst), f"f is {float(best):.4g} of both rows; there is nothing to bring back"))
        for number, state in enumerate(states):
            for places in torch.eye(len(state), dtype=torch.bool, device=state.device).split(batch_size):
                put = partial(torch.where, places[..., None], state.to(right.x))  # (variants, tokens, hidden)
                vectors = wrong.x.expand(len(places), -1, -1)
                logits = wrong.logits(vectors, {stack[number - 1]: put}) if number else wrong.logits(put(vectors))
                found.append(right.choose(logits).float())
    return ((torch.cat(found).view(len(states), -1) - worst) / (best - worst)).cpu().numpy()


def shuffled(model: nn.Module, parts: Sequence[str], seed: int = 0) -> nn.Module:
    """A copy in which the weights whose names begin with one of `parts` are permuted, each tensor in itself.

    An explanation that stays the same is none of what was learned.  Source: Adebayo et al. 2018 (arXiv:1810.03292).
    Raises ValueError for a part that begins no name.
    """
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    weights = {name: weight for name, weight in other.named_parameters() if name.startswith(tuple(parts))}
    for part in parts:
        refuse((not any(name.startswith(part) for name in weights), f"parts: no weight's name begins with {part!r}"))
    for weight in weights.values():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.data = weight.data.flatten()[order].view_as(weight)
    return other
