"""Looking for a learning rate before the first real run."""

import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import nn

from ..core.batches import whole
from ..show.plots import axes_of
from .fit import fit
from .settings import TrainConfig


@dataclass(frozen=True)
class RangeTest:
    """The loss at each learning rate tried, smallest rate first."""

    rates: list[float]
    losses: list[float]  # of the step's own batch
    smoothed: list[float]  # running mean of them
    suggestion: float  # a tenth of the rate at which the smoothed loss is smallest

    def plot(self, ax: Any = None) -> Any:
        """Draw loss against learning rate, and the suggestion; returns the matplotlib Axes."""
        ax = axes_of(ax, 7, 3.4)
        ax.plot(self.rates, self.losses, color="0.8", label="loss of the step's batch")
        ax.plot(self.rates, self.smoothed, label="running mean")
        ax.axvline(self.suggestion, color="0.4", linestyle="--", label=f"suggestion {self.suggestion:.1e}")
        low, high = min(self.losses), max(self.losses[: len(self.losses) // 2])
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(0.9 * low, 1.5 * high))
        ax.legend(frameon=False)
        return ax


def find_learning_rate(
    model: nn.Module, train_dataset: Any, *, tokenizer: Any = None, highest: float = 0.03, steps: int = 100,
    config: TrainConfig | None = None,
) -> RangeTest:  # fmt: skip
    """A learning-rate range test: a short run on a copy of the model, the rate rising 100,000-fold to `highest`.

    A tenth of the rate at which the loss is lowest is a first guess for a run with warm-up and decay, no substitute for
    trying a few.  Batches, clipping and optimizer are those of `config`, its schedule and length are not.
    Raises ValueError for fewer than 10 steps, and as `fit` does.
    Source: Smith 2017 (arXiv:1506.01186), section 3.3; smoothing as in fastai's lr_find.
    """
    whole("steps", steps, 10)  # fewer show no curve
    config = replace(
        config or TrainConfig(), learning_rate=highest, schedule="range", warmup_fraction=0.0, max_steps=steps,
        patience=None, metric="loss", eval_every=None, max_bad_steps=1, checkpoint_dir=None, checkpoint_every=None,
        resume=None,
    )  # fmt: skip
    run = fit(copy.deepcopy(model), train_dataset, tokenizer=tokenizer, config=config)
    rates, losses = ([record[key] for record in run.history] for key in ("learning_rate", "loss"))
    means = accumulate(losses, lambda mean, loss: 0.9 * mean + 0.1 * loss, initial=0.0)
    smoothed = [mean / (1 - 0.9**count) for count, mean in enumerate(means) if count]  # as if it had not begun at 0
    return RangeTest(rates, losses, smoothed, suggestion=min(zip(smoothed, rates, strict=True))[1] / 10)
