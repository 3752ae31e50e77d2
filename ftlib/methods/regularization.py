"""What keeps a fine-tuned model simple, or near its pretrained self: L2-SP, mixout, R-Drop, L1, dropout rates.

To copy: this file, methods/speedups.py, core/anatomy.py and torch (tasks/task.py and what it names for `r_drop`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ..core import anatomy
from .speedups import dropout


@torch.no_grad()
def pull_(parameter: nn.Parameter, start: torch.Tensor, amount: float) -> None:
    """L2-SP: weight decay towards the pretrained weights, θ ← θ - amount (θ - θ₀), amount = learning rate * strength.

    Beside SGD this is the gradient of strength/2 |θ - θ₀|²; beside Adam it is decoupled from the gradient's scale, as
    AdamW decouples weight decay.  Source: Li et al. 2018 (arXiv:1802.01483).

    >>> p = nn.Parameter(torch.tensor([3.0])); pull_(p, torch.tensor([1.0]), 0.5); p.item()
    2.0
    """
    parameter.lerp_(start.to(parameter.device, parameter.dtype), amount)


@torch.no_grad()
def shrink_(parameter: nn.Parameter, amount: float) -> None:
    """L1: every weight moves by `amount` towards zero and stays there, θ ← sign(θ) max(|θ| - amount, 0).

    The proximal step of amount * |θ|₁, amount = learning rate * strength; unlike the subgradient sign(θ) it makes
    exact zeros.  Source: Tibshirani 1996; Parikh and Boyd 2014, Proximal Algorithms, 6.5.2.

    >>> p = nn.Parameter(torch.tensor([3.0, -0.25])); shrink_(p, 0.5); p.tolist()
    [2.5, 0.0]
    """
    parameter.sub_(parameter.clamp(-amount, amount))  # zeros are +0.0, which softshrink does not promise


def r_drop(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    """R-Drop's penalty: how far two forward passes with other dropout disagree, summed over the labeled items.

    (KL(p‖q) + KL(q‖p)) / 2 of the two predicted distributions, in nats.  first, second: logits, (items, classes), or
    (batch, tokens, classes) for tags; labels: int64 (items,) or (batch, tokens), -100 ignored; 0/1 (items, classes) for
    several labels an item.  Source: Liang et al. 2021 (arXiv:2106.14448), equation 2, factors as in the authors' code.
    Raises ValueError for another kind: a predicted number has no distribution.
    """
    from ..tasks.task import TASKS

    divergence = TASKS[kind].divergence
    if divergence is None:
        raise ValueError(f"r_drop compares predicted distributions; {kind} predicts numbers: leave r_drop at 0")
    return divergence(first, second, labels)


def add_mixout(linears: Iterable[nn.Module], p: float) -> None:
    """Train layers with W₀ + dropout(W - W₀, p), mean W, for W; W₀: W as it is (Lee et al. 2020, arXiv:1909.11299)."""
    for linear in linears:
        anatomy.put_forward(linear, _mixed, linear.weight.detach().clone(), p)


def _mixed(linear: nn.Module, start: torch.Tensor, p: float, x: torch.Tensor) -> torch.Tensor:
    weight = linear.weight
    if linear.training:
        start = start.to(weight.device)
        weight = start + dropout(weight - start, p)
    return F.linear(x, weight if isinstance(linear, nn.Linear) else weight.T, linear.bias)  # GPT-2's Conv1D


def mixing(model: nn.Module) -> dict[nn.Module, torch.Tensor]:
    """{layer: the pretrained weights that `add_mixout` keeps beside it}, in the order of the modules."""
    taken = {module: anatomy.taken_by(module) for module in model.modules()}
    return {module: own.args[1] for module, own in taken.items() if getattr(own, "func", None) is _mixed}


def remove_mixout(model: nn.Module) -> None:
    for module in mixing(model):
        anatomy.take_forward(module)


def dropout_places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of every dropout rate, also of those that are handed to functions, as in BART."""
    places = [(module, "p") for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in model.modules():
        places += [(module, n) for n, v in vars(module).items() if n.endswith("dropout") and isinstance(v, float)]
    return places


@contextmanager
def dropout_rate(model: nn.Module, p: float | None) -> Iterator[None]:
    """Inside, all of a model's dropout, the attention's too, has probability p (None: its own); ValueError for none."""
    places = [] if p is None else dropout_places(model)
    if p is not None and not places:
        raise ValueError(f"dropout={p}: {type(model).__name__} has no dropout to set; leave dropout at None")
    before = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for place in places:
            setattr(*place, p)
        yield
    finally:
        for place in before:
            setattr(*place)
