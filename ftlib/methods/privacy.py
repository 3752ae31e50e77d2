"""Training with differential privacy, DP-SGD: every row's gradient is cut, noise hides it, the budget is counted.

A step draws each training row with probability batch_size / rows, cuts the gradient of every row's own mean loss to
`max_grad_norm`, adds them up, adds to each number noise of standard deviation noise_multiplier * max_grad_norm, and
divides by batch_size.

To copy: this file, methods/{ghost_norms,adapters,packing,regularization,speedups,unpadding}.py, core/, tasks/, torch,
transformers, and opacus, which counts the budget.
Source: Abadi et al. 2016 (arXiv:1607.00133); Mironov et al. 2019, for the budget (arXiv:1908.10530).
"""

import hashlib
import math
import secrets
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import Row, number, one_of, refuse, whole
from ..core.loop import Batch, Gradient, Step
from ..core.sampling import Place
from ..tasks.masked import PAIRS
from ..tasks.task import TASKS, kind_of
from .ghost_norms import GhostNorms, Rows, role_of
from .regularization import dropout_places, dropout_rate, mixing


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """How little a run may tell of any training row: it is (epsilon, delta)-private, one row more or less.

    Say noise_multiplier, and `Run.epsilon` is what was spent; or epsilon, and the noise follows from rows and steps.
    """

    delta: float  # the probability that epsilon does not hold: well below 1 / training rows
    noise_multiplier: float | None = None  # standard deviation of the noise, in lengths of max_grad_norm
    epsilon: float | None = None  # what all steps together may spend
    max_grad_norm: float = 1.0  # longer gradients of a row are cut to this length
    accountant: str = "rdp"  # Opacus': rdp, or prv, whose bound is tighter
    ghost: bool = True  # False: a row at a time, slow, for layers without a ghost norm
    seed: int | None = None  # None: by the system; whoever knows the seed can take the noise away

    def __post_init__(self) -> None:
        number("delta", self.delta, 1e-30, 1, below=True)
        number("max_grad_norm", self.max_grad_norm, 1e-30)
        one_of("accountant", self.accountant, ("rdp", "prv"))
        one_of("ghost", self.ghost, (True, False))
        refuse(((self.noise_multiplier is None) == (self.epsilon is None),
                "privacy: say noise_multiplier or epsilon, one of the two"))  # fmt: skip
        number("noise_multiplier", self.noise_multiplier or 0.0, 0)
        number("epsilon", 1.0 if self.epsilon is None else self.epsilon, 1e-6)
        whole("seed", self.seed or 0, 0)

    def noise(self, rate: float, steps: int) -> float:
        """The noise_multiplier of so many steps, each row drawn with probability `rate`; by Opacus where epsilon is."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        target = dict(target_epsilon=self.epsilon, target_delta=self.delta, accountant=self.accountant)
        return _accountants().utils.get_noise_multiplier(**target, sample_rate=rate, steps=steps)

    def spent(self, noise_multiplier: float, rate: float, steps: int) -> float:
        """The epsilon that so many steps have spent, by Opacus' accountant; inf without noise."""
        if not steps or not noise_multiplier:
            return math.inf if steps else 0.0
        accountant = _accountants().create_accountant(self.accountant)
        accountant.history = [(noise_multiplier, rate, steps)]
        return float(accountant.get_epsilon(self.delta))


def _accountants() -> Any:
    try:
        import opacus.accountants.utils
    except ImportError as error:
        raise ImportError(f"privacy: Opacus counts the budget ({error}); pip install opacus") from error
    return opacus.accountants


class Private:
    """A run's privacy: which rows each step draws, its noise, what is spent; resumed, it goes on behind all of that.

    Every row is drawn for itself (Poisson sampling): batch_size of `rows` on the average, none now and then.
    """

    def __init__(self, settings: Privacy, rows: int, batch_size: int, steps: int, device: torch.device):
        refuse(
            (batch_size > rows, f"privacy: batch_size={batch_size} of {rows} training rows; make it smaller"),
            (settings.delta * rows >= 1, f"privacy: delta={settings.delta:g} may give away a row of {rows}; lower it"),
        )
        self.settings, self.rows, self.batch_size, self.rate = settings, rows, batch_size, batch_size / rows
        self.noise_multiplier = settings.noise(self.rate, steps)
        seed = settings.seed
        own = (secrets.randbits(62), secrets.randbits(62)) if seed is None else (seed, seed + 2**31)
        self.sampler, self.generator = own[0], torch.Generator(device).manual_seed(own[1])
        self.take(0)

    def places(self) -> Iterator[list[Place]]:
        """The rows of every step, [("", number)], without end."""
        generator = torch.Generator().manual_seed(self.sampler)
        while True:
            drawn = torch.rand(self.rows, generator=generator, dtype=torch.float64) < self.rate
            yield [("", i) for i in drawn.nonzero().flatten().tolist()]

    def gradient(self, rows: Rows) -> Gradient:
        return private_gradient(rows, self.settings, self.noise_multiplier, self.batch_size, self.generator)

    def take(self, steps: int) -> None:
        """So many steps are done; the noise goes on from where it is now."""
        self.steps, self.now = steps, self.generator.get_state()

    def spent(self) -> float:
        return self.settings.spent(self.noise_multiplier, self.rate, self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sampler": self.sampler, "noise": self.now}  # Run has the epsilon

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler = state["sampler"]
        self.generator.set_state(state["noise"])
        self.take(state["steps"])


def private_gradient(
    rows: Rows, settings: Privacy, noise_multiplier: float, batch_size: float, generator: torch.Generator
) -> Gradient:
    """A gradient function for `steps` (with its max_grad_norm=None): (Σ cut gradients + noise) / batch_size.

    rows: (model, batch) -> every row's own loss, float (rows,), of that row alone; batch_size: the expected number of
    rows of a step, of which there may be none.  Returns the rows' mean loss, in which there is no noise.
    ValueError where a row's gradient is another in its batch than alone: looked at once, on the first batch of two.
    """
    looked = not settings.ghost

    def gradient(model: nn.Module, step: Step) -> Tensor:
        nonlocal looked
        parameters = [p for p in model.parameters() if p.requires_grad]
        losses = [torch.zeros(0, device=parameters[0].device)]
        for batch in step:
            if not looked and len(batch["input_ids"]) > 1:
                _look(model, rows, batch)
                looked = True
            losses.append(add_cut(model, rows, batch, settings.max_grad_norm, ghost=settings.ghost)[0])
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator, device=p.device)
            noise *= noise_multiplier * settings.max_grad_norm
            p.grad = ((noise if p.grad is None else noise + p.grad) / batch_size).to(p.dtype)
        found = torch.cat(losses)
        good = found.isfinite()  # a step is never left out: that would tell something of its rows
        return torch.where(good, found, 0.0).sum() / good.sum().clamp(min=1)

    return gradient


def add_cut(
    model: nn.Module, rows: Rows, batch: Batch, max_grad_norm: float, *, ghost: bool = True
) -> tuple[Tensor, Tensor]:
    """Add the rows' gradients, each cut to max_grad_norm, to `.grad`; returns losses and lengths before, (rows,) each.

    A gradient that is not finite counts as 0.  ghost: False for a row at a time, by autograd.
    """
    if ghost:
        taken = GhostNorms(model, rows, batch)
        taken.add(_factors(taken.norms, max_grad_norm))
        return taken.losses, taken.norms
    found = []
    for i in range(len(batch["input_ids"])):
        loss, norm, gradients = _alone(model, rows, batch, i)
        found.append(torch.stack((loss, norm)))
        if (factor := float(_factors(norm, max_grad_norm))) > 0:
            for p, gradient in gradients.items():
                p.grad = factor * gradient if p.grad is None else p.grad.add_(gradient, alpha=factor)
    losses, norms = torch.stack(found, 1)
    return losses, norms


def _factors(norms: Tensor, most: float) -> Tensor:
    return torch.where(norms.isfinite(), most / norms.clamp(min=most), 0.0)


def _alone(model: nn.Module, rows: Rows, batch: Batch, i: int) -> tuple[Tensor, Tensor, dict[nn.Parameter, Tensor]]:
    """Loss, length and gradients of row i, by autograd."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = rows(model, {name: value[i : i + 1] for name, value in batch.items()}).sum()
    found = zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)
    gradients = {p: gradient for p, gradient in found if gradient is not None}
    return loss.detach().float(), nn.utils.get_total_norm([g.float() for g in gradients.values()]), gradients


def _look(model: nn.Module, rows: Rows, batch: Batch) -> None:
    """ValueError where the first or last row has another gradient in the batch than alone, without dropout."""
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads, where = [p.grad for p in moving.values()], batch["input_ids"].device
    still = dropout_rate(model, 0.0 if dropout_places(model) else None)
    with torch.random.fork_rng([where] if where.type == "cuda" else []), still:
        taken = GhostNorms(model, rows, batch)
        for i in (0, len(taken.norms) - 1):
            model.zero_grad(set_to_none=True)
            taken.add(torch.eye(len(taken.norms), device=where)[i])
            _, length, own = _alone(model, rows, batch, i)
            for name, p in moving.items():
                found, wanted = (torch.zeros_like(p) if g is None else g for g in (p.grad, own.get(p)))
                if (found - wanted).norm() > (0.3 if taken.half else 0.01) * (wanted.norm() + 0.01 * length):
                    what = f"a row's gradient of {name} has length {found.norm():.4g}, and {wanted.norm():.4g} alone"
                    why = "rows see each other (mixup, a loss across rows), or the weight is used past its layer"
                    raise ValueError(f"privacy: {what}: {why}; leave that out, freeze it, or set ghost=False")
    for p, grad in zip(moving.values(), grads, strict=True):
        p.grad = grad


def begin(model: nn.Module, config: Any, parts: dict, held_out: list, steps: int, device: torch.device) -> Any:
    """The `Private` of a run, None for one without privacy.  ValueError, in words, for what breaks the guarantee.

    Warns where early stopping looks at training rows.
    """
    if (settings := config.privacy) is None:
        return None
    record, rows = None if hasattr(model, "tasks") else TASKS[kind_of(model)], next(iter(parts.values()))
    moving = {n: m for n, m in model.named_modules() if any(p.requires_grad for p in m.parameters(False))}
    refuse(
        (record is None, "a MultiTaskModel's rows are not counted; train a model of one task"),
        (not hasattr(rows, "lengths"), "a stream has no number of rows to draw from, and packed rows hold several "
         "texts; pass a list, a text each"),
        (record and record.windows, "windows of a text are rows, each private, the text is not; train another task"),
        (record and record.encoder_decoder and settings.ghost, "no ghost norms for an encoder with a decoder; set "
         "ghost=False"),
        *((isinstance(m, nn.modules.batchnorm._BatchNorm), f"{n}, a {type(m).__name__}, mixes rows; use a LayerNorm")
          for n, m in model.named_modules()),
        *((settings.ghost and role_of(m) is None, f"{n}, a {type(m).__name__}, has no ghost norm; freeze it, or set "
           "ghost=False") for n, m in moving.items()),
        (settings.ghost and mixing(model), "mixout has no ghost norms; take another strategy, or set ghost=False"),
        what="privacy: ",
    )  # fmt: skip
    seen: dict[bytes, int] = {}
    for i, row in enumerate(rows):
        if (first := seen.setdefault(_print(row), i)) != i:
            raise ValueError(f"privacy: rows {first} and {i} of train_dataset are the same, and tell twice; drop one")
        if any(name in row for name in PAIRS):
            raise ValueError(f"privacy: row {i} is a pair of sentences, which other rows share; pass texts")
    if config.patience and any(_print(row) in seen for part in held_out for row in part):
        warnings.warn("privacy: early stopping looks at training rows, past the noise; hold others out", stacklevel=4)
    return Private(settings, len(rows), config.batch_size, steps, device)


def _print(row: Row) -> bytes:
    what = repr((list(map(int, row["input_ids"])), row["labels"]))
    return hashlib.sha256(what.encode()).digest()
