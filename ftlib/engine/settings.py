"""How to train and what came of it: `TrainConfig`, checked once, and `Run`."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from ..core.batches import number, one_of, refuse, whole
from ..core.device import PRECISIONS
from ..core.loop import SCHEDULES
from ..methods.balancing import GRADIENTS, Combine, Weighting
from ..methods.distillation import Distillation
from ..methods.multitask import SAMPLERS
from ..methods.privacy import Privacy
from ..show.plots import learning_curves

_RANGES = {  # of the numbers that may not be just any from 0
    "label_smoothing": (0, 1), "warmup_fraction": (0, 1), "temperature": (1e-6, math.inf), "dropout": (0, 0.99),
    "max_grad_norm": (1e-30, math.inf),
}  # fmt: skip
_CHOICES = {
    "schedule": (*SCHEDULES, "range"), "precision": PRECISIONS, "optimizer": ("adamw", "sgd"), "resume": (None, "auto"),
    "distributed": ("ddp", "fsdp"), "task_sampler": SAMPLERS,
}  # fmt: skip
_NOT_PRIVATE = "task_weighting task_gradients task_cosines r_drop compile gradient_checkpointing".split()


@dataclass(frozen=True)
class TrainConfig:
    """How to train.  Flat on purpose: every field is a number or a word, and is checked once, here."""

    epochs: int = 3  # passes over the training rows
    max_steps: int | None = None  # stop after so many optimizer steps; the schedule ends there too
    batch_size: int = 32  # examples an optimizer step, over all processes
    micro_batch_size: int | None = None  # examples a forward pass; None: the whole step, halved if memory runs out
    max_tokens: int | None = None  # tokens a forward pass, padding counted unless the model is unpadded
    learning_rate: float = 5e-5  # the largest one of the schedule
    schedule: str = "linear"  # constant, linear, cosine, exponential, or range (rising: `find_learning_rate`)
    warmup_fraction: float = 0.1  # share of the steps over which the learning rate rises from 0
    optimizer: str = "adamw"  # adamw or sgd (momentum 0.9)
    weight_decay: float = 0.01  # share of a weight, times the learning rate, that a step takes away
    decay_groups: bool = True  # spare biases and normalization from weight decay
    label_smoothing: float = 0.0  # share of the label given to all classes
    l1: float = 0.0  # every step moves weights (not biases or norms) by learning rate * l1 towards zero
    r_drop: float = 0.0  # weight of R-Drop, how far two passes with other dropout disagree; twice the time a step
    dropout: float | None = None  # all dropout rates of the model while it trains; None: its own
    max_grad_norm: float | None = 1.0  # clip the gradient to this length; None: do not
    max_bad_steps: int = 5  # skip steps whose loss or gradient is not finite, stop after so many in a row; 1: at once
    precision: str = "auto"  # auto, fp32, tf32, bf16 or fp16
    compile: bool = False  # torch.compile each layer
    gradient_checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    shortcuts: bool = True  # a CPU's quicker products and dropout: `speedups`
    distributed: str = "ddp"  # several processes: ddp, a whole model each, or fsdp, a share of the weights each
    shuffle: bool = True  # a new order every epoch, from the seed
    shuffle_buffer: int = 1_000  # rows of a stream that are held, each drawn from them at random
    eval_every: int | None = None  # steps between evaluations; None: after every epoch
    patience: int | None = None  # stop after so many evaluations without a better `metric`, keep the best weights
    metric: str = "loss"  # what "better" means; any name that evaluate returns
    checkpoint_dir: str | None = None  # folder of the checkpoints; None: none are written
    checkpoint_every: int | None = None  # steps between checkpoints; None: after every epoch
    keep_last: int = 2  # checkpoints to keep, and with `patience` the best one
    resume: str | None = None  # "auto": from the newest whole checkpoint in checkpoint_dir, if there is one
    task_sampler: str = "temperature"  # how several datasets are mixed: temperature, uniform, annealed or remaining
    temperature: float = 1.0  # of the task sampler: 1 in proportion to the tasks' sizes, large towards uniform
    task_weighting: str | Weighting = "fixed"  # fixed, uncertainty, gradnorm, dwa, random or famo: balancing.Weighting
    task_gradients: str | Combine | None = None  # pcgrad, cagrad, mgda, or a function: jacobian -> gradient
    task_cosines: int | None = None  # steps between records of the cosines between the tasks' gradients
    distill: Distillation | None = None  # a teacher's part in the loss: distillation.Distillation
    privacy: Privacy | None = None  # DP-SGD: ftlib.Privacy(delta=1e-5, epsilon=3), or a table of its fields
    seed: int = 0  # of the order, of dropout and of the task sampler
    progress: bool = True  # a bar while it runs

    def __post_init__(self) -> None:
        if isinstance(self.privacy, dict):  # of a run.toml
            object.__setattr__(self, "privacy", Privacy(**self.privacy))
        for name, kind, value in ((one.name, one.type, getattr(self, one.name)) for one in fields(self)):
            if kind in (int, int | None) and name != "seed" and (value is not None or kind is int):
                whole(name, value)
            elif kind in (float, float | None) and (value is not None or kind is float):
                number(name, value, *_RANGES.get(name, (0, math.inf)))
            elif kind is bool:
                one_of(name, value, (True, False))
        for name, choices in _CHOICES.items():
            one_of(name, getattr(self, name), choices)
        if not isinstance(self.task_weighting, Weighting):
            Weighting(self.task_weighting)  # checks the word
        if not callable(self.task_gradients):
            one_of("task_gradients", self.task_gradients, (None, *GRADIENTS, "a function: jacobian -> gradient"))
        folder = self.checkpoint_dir
        named = folder is None or (isinstance(folder, (str, os.PathLike)) and os.fspath(folder))
        refuse(
            (not isinstance(self.metric, str), f"metric={self.metric!r}: need the name of a metric, 'loss' say"),
            (type(self.seed) is not int or abs(self.seed) >= 2**40,
             f"seed={self.seed!r}: need a whole number below 2**40"),
            (not named, f"checkpoint_dir={folder!r}: need the path of a folder, or None"),
            (self.task_sampler != "temperature" and self.temperature != 1,
             f"temperature={self.temperature} has no meaning for task_sampler={self.task_sampler!r}"),
            (self.micro_batch_size and self.max_tokens, "set micro_batch_size or max_tokens, not both"),
            (self.compile and self.distributed == "fsdp",
             "compile=True with distributed='fsdp' is not supported; drop one of them"),
            (self.distill is not None and not isinstance(self.distill, Distillation),
             f"distill={self.distill!r:.60}: need None or ftlib.Distillation(teacher)"),
            (self.distill and self.r_drop, "r_drop and distill both weigh a second distribution; set one of them"),
            (self.r_drop and self.dropout == 0, "r_drop compares two passes with other dropout: dropout=0 leaves none"),
            (self.resume and not folder, "resume='auto' needs checkpoint_dir"),
            (self.checkpoint_every and not folder, "checkpoint_every needs checkpoint_dir"),
            (not isinstance(self.privacy, Privacy | None), f"privacy={self.privacy!r}: pass ftlib.Privacy(...)"),
            *((self.privacy and getattr(self, one.name) != one.default,
               f"privacy with {one.name}={getattr(self, one.name)!r}; leave it at {one.default!r}")
              for one in fields(self) if one.name in _NOT_PRIVATE),
            (self.privacy and self.precision == "fp16", "privacy: fp16 scales gradients; take precision='bf16'"),
        )  # fmt: skip


@dataclass
class Run:
    """What `fit` did: `history` has a record a step and one an evaluation, `metrics` the last (or best) evaluation."""

    config: TrainConfig
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0  # training alone, evaluation included
    stopped: str = "finished"  # or "early stopping", "interrupted", and of a stream "no more rows"
    precision: str = "fp32"
    reason: str = ""  # why this precision
    micro_batch_size: int | None = None  # in use at the end: smaller than asked for where memory ran out
    max_tokens: int | None = None
    peak_memory_mb: float | None = None  # of tensors on the GPU, without one of the whole process; 1 MB = 2**20 bytes
    epsilon: float | None = None  # with `privacy`: what all steps have spent, resumed ones too, at its delta

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({name: state[name] for name in _KEPT})

    def plot(self, **options: Any) -> Any:
        """Draw loss and evaluation metrics against steps; returns the matplotlib Axes."""
        return learning_curves(self, **options)


_KEPT = ("steps", "history", "metrics", "seconds", "micro_batch_size", "max_tokens", "epsilon")
