"""When tasks pull one encoder in several directions: what each task's loss weighs, and how their gradients are joined.

Gradient balancing takes a Jacobian, float (tasks, parameters), and returns one gradient (parameters,), as TorchJD's
aggregators do: a weighted sum of the rows, by their inner products.  Loss weighting is one number a task.

To copy: this file alone.
Source, named as in TrainConfig: pcgrad: Yu et al. 2020 (arXiv:2001.06782), algorithm 1; cagrad: Liu et al. 2021
(arXiv:2110.14048), algorithm 1; mgda: Désidéri 2012 and Sener & Koltun 2018 (arXiv:1810.04650); uncertainty: Kendall
et al. 2018 (arXiv:1705.07115); gradnorm: Chen et al. 2018 (arXiv:1711.02257); dwa: Liu et al. 2019
(arXiv:1803.10704); random: Lin et al. 2022 (arXiv:2111.10603); famo: Liu et al. 2023 (arXiv:2306.03792).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Combine = Callable[[Tensor], Tensor]  # (tasks, parameters) -> (parameters,)


def pcgrad(jacobian: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """PCGrad: from each task's gradient take away what points against another task's; add up what is left.

    Row i meets the others in random order: a rest with a negative inner product with row j is projected onto the plane
    at right angles to it.  generator: of the order (on the CPU; default: the global one).

    >>> pcgrad(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    tensor([0.5000, 1.5000])
    """
    gramian = _gramian(jacobian)
    parts = np.eye(len(gramian))  # a row of weights for each task's projected gradient
    for i, weights in enumerate(parts):
        for j in torch.randperm(len(parts), generator=generator).tolist():
            against = gramian[j] @ weights
            if j != i and against < 0:
                weights[j] -= against / gramian[j, j]
    return _weighted(parts.sum(0), jacobian)


def mgda(jacobian: Tensor) -> Tensor:
    """MGDA: the shortest weighted mean of the rows; it is 0 where no step helps all.

    A small step against it lowers every loss: those of a weight above 0 at one rate, the others at least as fast.
    [[1, 0], [3, 0.5]] gives the first row, and inner products of 1 and 3.

    >>> mgda(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([0.4000, 0.8000])
    """
    gramian = _gramian(jacobian)
    return _weighted(_least(gramian, np.zeros(len(gramian)), 1.0), jacobian)


def cagrad(jacobian: Tensor, c: float = 0.5) -> Tensor:
    """CAGrad: near the mean gradient, the direction that does most for the task it does least for.

    The d with the largest min_i <row i, d> among those no farther than c * |mean| from the mean row, which is c=0; the
    larger c, the nearer to mgda's direction; c < 1 keeps the mean loss falling.

    >>> cagrad(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), c=0.0)
    tensor([1.0000, 0.5000])
    """
    if not 0 <= c < math.inf:
        raise ValueError(f"c={c}: need a number of at least 0, below 1 to keep the mean loss falling")
    gramian = _gramian(jacobian)
    mean = np.full(len(gramian), 1 / len(gramian))
    radius = c * math.sqrt(max(mean @ gramian @ mean, 0.0))
    worst = _least(gramian, gramian @ mean, radius)
    length = math.sqrt(worst @ gramian @ worst + _SMALL * np.trace(gramian))
    return _weighted(mean + radius / max(length, 1e-300) * worst, jacobian)


def cosines(jacobian: Tensor) -> Tensor:
    """The cosine between every two rows, float64 (tasks, tasks); nan for a row of zeros."""
    gramian = _gramian(jacobian)
    with np.errstate(invalid="ignore"):
        lengths = np.sqrt(np.diag(gramian))
        return torch.from_numpy(gramian / np.outer(lengths, lengths))


def _gramian(jacobian: Tensor) -> np.ndarray:
    """The rows' inner products, float64 (tasks, tasks)."""
    known = isinstance(jacobian, Tensor)
    if not known or jacobian.dim() != 2 or not len(jacobian) or not jacobian.is_floating_point():
        got = f"{jacobian.dtype} {tuple(jacobian.shape)}" if known else type(jacobian)
        raise ValueError(f"the jacobian is {got}; pass a float tensor (tasks, parameters), at least a row")
    if jacobian.device.type == "mps":  # has no float64
        jacobian = jacobian.cpu()
    parts = (part.double() for part in jacobian.detach().split(2**20, dim=1))  # float64, not all of it at a time
    return sum(part @ part.T for part in parts).cpu().numpy()


def _weighted(weights: np.ndarray, jacobian: Tensor) -> Tensor:
    return torch.from_numpy(weights).to(jacobian) @ jacobian


_SMALL = 1e-12  # of the squared lengths, under the root: where the weighted rows cancel, its slope has no direction


def _least(gramian: np.ndarray, linear: np.ndarray, c: float) -> np.ndarray:
    """The w >= 0 of sum 1 with the least linear·w + c |Σ w_i row_i|, by exchanges of two tasks (SMO, Platt 1998)."""
    w, trace = np.full(len(gramian), 1 / len(gramian)), np.trace(gramian)
    for _ in range(20_000):
        inner = gramian @ w
        square = w @ inner + _SMALL * trace
        if w @ inner <= 1e-20 * trace:
            break
        slope = linear + c * inner / math.sqrt(square)  # (tasks,)
        up, down = int(slope.argmin()), int(np.where(w > 0, slope, -math.inf).argmax())
        rounding = 1e-12 * np.abs(slope).max() + 1e-15 * c * trace / math.sqrt(square)
        if not slope[down] - slope[up] > rounding:
            break
        # along the exchange, |Σ w_i row_i|² is square + 2 t first + t² second, and the rest is t change
        first = inner[up] - inner[down]
        second = gramian[up, up] + gramian[down, down] - 2 * gramian[up, down]
        change = linear[up] - linear[down]
        step, steep = w[down], c * c * second - change * change
        if steep > 0:
            apart = max(square * second - first * first, 0.0)
            step = min((-math.copysign(math.sqrt(change * change * apart / steep), change) - first) / second, step)
        if not step > 1e-12:  # less moves nothing in float32
            break
        w[up], w[down] = w[up] + step, 0.0 if step == w[down] else w[down] - step
    return w


GRADIENTS: dict[str, Combine] = {"pcgrad": pcgrad, "cagrad": cagrad, "mgda": mgda}

WEIGHTINGS = ("fixed", "uncertainty", "gradnorm", "dwa", "random", "famo")


@dataclass(frozen=True)
class Weighting:
    """How the tasks' losses are weighted.  Except for "uncertainty" a weight of 1 is the average one.

    - "fixed": as `Head.weight` says.
    - "uncertainty": exp(-s) for classes and tags, exp(-s) / 2 for numbers, with s = log σ² of each task learned by the
      likelihood: the weighted loss plus s / 2 falls.
    - "gradnorm": learned, so that the gradients of the weighted losses on the last shared layer are equally long,
      longer for a task whose loss has fallen less than the others', by the power `alpha`.
    - "dwa": the softmax of (mean loss of the last epoch / of the one before) / `temperature`; 1 in the first two.
    - "random": the softmax of normal draws, new every step.
    - "famo": learned, so that all losses fall by equal factors.  One forward pass more a step, after the step.

    rate: of Adam on what is learned, apart from the model's learning rate (0.025 as in GradNorm's and FAMO's papers).
    decay: FAMO's, of what is learned towards equal weights.
    """

    how: str = "fixed"
    rate: float = 0.025
    alpha: float = 1.5
    temperature: float = 2.0
    decay: float = 1e-3

    def __post_init__(self) -> None:
        if self.how not in WEIGHTINGS:
            raise ValueError(f"task weighting {self.how!r}: choose one of {', '.join(WEIGHTINGS)}")
        for name, low in (("rate", 0.0), ("alpha", 0.0), ("temperature", 1e-6), ("decay", 0.0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: need a number from {low:g}, finite")


class TaskWeights:
    """The weights of a `Weighting` while they change, by `state` alone: float64 (tasks,) on the CPU.

    factors: 1 for a task of classes, 1/2 for one of numbers (Gaussian).  Ask for `weights` before a step, and tell
    `learn` what came of it; a loss of nan: the task was not in the step.
    """

    def __init__(self, weighting: Weighting, factors: Sequence[float], *, seed: int = 0):
        self.weighting, self.seed = weighting, seed
        self.half = torch.tensor(factors, dtype=torch.float64)
        zero, unknown = torch.zeros_like(self.half), torch.full_like(self.half, math.nan)
        self.state: dict[str, Tensor] = {}  # replaced, never changed in place
        if weighting.how in ("uncertainty", "gradnorm", "famo"):  # learned
            self.state = {"value": zero, "mean": zero, "square": zero, "steps": zero[:1]}
        if weighting.how == "gradnorm":
            self.state["first"] = unknown
        if weighting.how == "dwa":
            self.state = {"sum": zero, "count": zero, "before": unknown, "last": unknown}

    def weights(self, step: int, losses: Tensor | None = None) -> Tensor:
        """The weights in step `step` (0-based); "famo" needs the `losses` of the step."""
        how, count, state = self.weighting.how, len(self.half), self.state
        if how == "uncertainty":
            return self.half * torch.exp(-state["value"])
        if how == "gradnorm":
            return count * state["value"].softmax(0)
        if how == "dwa":
            ratio = (state["last"] / state["before"]).nan_to_num(1.0, posinf=1.0)
            return count * (ratio / self.weighting.temperature).softmax(0)
        if how == "random":
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
            return count * torch.randn(count, generator=generator, dtype=torch.float64).softmax(0)
        if how == "famo":
            if (losses < 0).any():
                raise ValueError(f"'famo' takes logarithms of losses, and one is {losses.nan_to_num(0.0).min():g}")
            share = state["value"].softmax(0) / (losses + 1e-8)  # nan where a task is not there
            return (share * (~share.isnan()).sum() / share.nansum()).nan_to_num(0.0)
        return torch.ones_like(self.half)

    def learn(self, losses: Tensor, *, lengths: Tensor | None = None, after: Tensor | None = None) -> None:
        """Go on from a step's losses.  lengths ("gradnorm"): of the last layer's gradients; after ("famo"): losses."""
        weighting, state, there = self.weighting, self.state, ~losses.isnan()
        if weighting.how == "uncertainty":
            self._adam(torch.where(there, 0.5 - self.weights(0) * losses, 0.0))
        elif weighting.how == "gradnorm":
            state["first"] = torch.where(state["first"].isnan(), losses, state["first"])
            rate, weights = losses / state["first"], self.weights(0)
            found = weights * lengths
            target = found[there].mean() * (rate / rate[there].mean()) ** weighting.alpha
            slope = weights * torch.where(there, (found - target).sign() * lengths, 0.0)
            self._adam(slope - weights * slope.sum() / len(slope))  # through the softmax
        elif weighting.how == "dwa":
            state["sum"] = state["sum"] + losses.nan_to_num(0.0)
            state["count"] = state["count"] + there
        elif weighting.how == "famo":
            fall = torch.where(there, torch.log(losses + 1e-8) - torch.log(after + 1e-8), 0.0)
            share = torch.where(there, state["value"], -math.inf).softmax(0)
            self._adam(share * (fall - share @ fall) + weighting.decay * state["value"])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.state = {name: state[name] for name in self.state}

    def end_epoch(self) -> None:
        """Tell that an epoch is over, for "dwa"."""
        if self.weighting.how == "dwa":
            last, zero = self.state["sum"] / self.state["count"], torch.zeros_like(self.half)  # nan: it never came
            self.state = {"sum": zero, "count": zero, "before": self.state["last"], "last": last}

    def _adam(self, slope: Tensor) -> None:
        """A step of Adam (Kingma & Ba 2015) on what is learned."""
        state = self.state
        state["steps"] = state["steps"] + 1
        state["mean"] = 0.9 * state["mean"] + 0.1 * slope
        state["square"] = 0.999 * state["square"] + 0.001 * slope**2
        mean = state["mean"] / (1 - 0.9 ** state["steps"])
        square = state["square"] / (1 - 0.999 ** state["steps"])
        state["value"] = state["value"] - self.weighting.rate * mean / (square.sqrt() + 1e-8)
