"""How to train and what came of it: `TrainConfig`, checked once; `Run`; the device and precision, with the reason.

To copy this module you need: settings.py, optimizing.py, regularization.py, speedups.py, balancing.py, multitask.py and
torch.
"""

import math
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods.balancing import GRADIENTS, Combine, Weighting
from ..methods.multitask import SAMPLERS
from ..methods.optimizing import SCHEDULES

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "sgd")
DISTRIBUTED = ("ddp", "fsdp")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.  Flat on purpose: every field is a number or a word, and is checked once, here."""

    epochs: int = 3  # passes over the training rows
    max_steps: int | None = None  # stop after so many optimizer steps; the schedule ends there too
    batch_size: int = 32  # examples an optimizer step, over all processes
    micro_batch_size: int | None = None  # examples a forward pass; None: the whole step, halved if memory runs out
    max_tokens: int | None = None  # padded tokens a forward pass, instead of a number of examples
    learning_rate: float = 5e-5
    schedule: str = "linear"  # constant, linear, cosine, exponential, or range (rising: `find_learning_rate`)
    warmup_fraction: float = 0.1  # share of the steps over which the learning rate rises from 0
    optimizer: str = "adamw"  # adamw or sgd (momentum 0.9)
    weight_decay: float = 0.01
    decay_groups: bool = True  # spare biases and normalization from weight decay
    label_smoothing: float = 0.0
    l1: float = 0.0  # every step moves weights (not biases or norms) by learning rate * l1 towards zero
    r_drop: float = 0.0  # weight of R-Drop, how far two passes with other dropout disagree; twice the time a step
    dropout: float | None = None  # all dropout rates of the model while it trains; None: its own
    max_grad_norm: float | None = 1.0  # clip the gradient to this length; None: do not
    max_bad_steps: int = 5  # skip steps whose loss or gradient is not finite, stop after so many in a row; 1: at once
    precision: str = "auto"  # auto, fp32, tf32, bf16 or fp16
    compile: bool | str = False  # True: torch.compile each layer; "reduce-overhead": CUDA graphs, for small batches
    gradient_checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    shortcuts: bool = True  # a CPU's quicker products and dropout, and no work on words that never occur: `speedups`
    distributed: str = "ddp"  # several processes: ddp, a whole model each, or fsdp, a share of the weights each
    shuffle: bool = True  # a new order every epoch, from the seed
    eval_every: int | None = None  # steps between evaluations; None: after every epoch
    patience: int | None = None  # stop after so many evaluations without a better `metric`, keep the best weights
    metric: str = "loss"  # what "better" means; any name that evaluate returns
    checkpoint_dir: str | None = None
    checkpoint_every: int | None = None  # steps between checkpoints; None: after every epoch
    keep_last: int = 2  # checkpoints to keep, and with `patience` the best one
    resume: str | None = None  # "auto": from the newest whole checkpoint in checkpoint_dir, if there is one
    task_sampler: str = "temperature"  # how several datasets are mixed: temperature, uniform, annealed or remaining
    temperature: float = 1.0  # of the task sampler: 1 in proportion to the tasks' sizes, large towards uniform
    task_weighting: str | Weighting = "fixed"  # fixed, uncertainty, gradnorm, dwa, random or famo: balancing.Weighting
    task_gradients: str | Combine | None = None  # pcgrad, cagrad, mgda, or a function: jacobian -> gradient
    task_cosines: int | None = None  # steps between records of the cosines between the tasks' gradients
    seed: int = 0  # of the order, of dropout and of the task sampler
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "keep_last", "max_bad_steps"):
            _whole(name, getattr(self, name))
        for name in ("max_steps", "micro_batch_size", "max_tokens", "eval_every", "patience", "checkpoint_every",
                     "task_cosines"):  # fmt: skip
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
        for name, low, high in (
            ("learning_rate", 0, math.inf), ("weight_decay", 0, math.inf), ("label_smoothing", 0, 1),
            ("l1", 0, math.inf), ("r_drop", 0, math.inf),
            ("warmup_fraction", 0, 1), ("temperature", 1e-6, math.inf),
        ):  # fmt: skip
            _number(name, getattr(self, name), low, high)
        if self.dropout is not None:
            _number("dropout", self.dropout, 0, 0.99)
        if self.max_grad_norm is not None:
            _number("max_grad_norm", self.max_grad_norm, 1e-30, math.inf)
        for name, choices in (
            ("schedule", (*SCHEDULES, "range")), ("precision", PRECISIONS), ("optimizer", OPTIMIZERS),
            ("resume", (None, "auto")), ("distributed", DISTRIBUTED), ("task_sampler", SAMPLERS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, choices))}")
        for name in ("decay_groups", "gradient_checkpointing", "shortcuts", "shuffle", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: need True or False")
        if not isinstance(self.compile, bool) and self.compile != "reduce-overhead":
            raise ValueError(f"compile={self.compile!r}: need True, False or 'reduce-overhead'")
        if self.compile == "reduce-overhead" and self.max_tokens:
            raise ValueError("compile='reduce-overhead' needs batches of few shapes: micro_batch_size, not max_tokens")
        if self.task_sampler != "temperature" and self.temperature != 1:
            raise ValueError(f"temperature={self.temperature} has no meaning for task_sampler={self.task_sampler!r}")
        if not isinstance(self.task_weighting, Weighting):
            Weighting(self.task_weighting)  # checks the word
        if not (self.task_gradients is None or callable(self.task_gradients) or self.task_gradients in list(GRADIENTS)):
            choices = f"{', '.join(GRADIENTS)}, None or a function: jacobian (tasks, parameters) -> (parameters,)"
            raise ValueError(f"task_gradients={self.task_gradients!r}: choose one of {choices}")
        if not isinstance(self.metric, str):
            raise ValueError(f"metric={self.metric!r}: need the name of a metric, e.g. 'loss' or 'accuracy'")
        if type(self.seed) is not int or abs(self.seed) >= 2**40:
            raise ValueError(f"seed={self.seed!r}: need a whole number below 2**40")
        if self.checkpoint_dir is not None and (
            not isinstance(self.checkpoint_dir, (str, os.PathLike)) or not os.fspath(self.checkpoint_dir)
        ):
            raise ValueError(f"checkpoint_dir={self.checkpoint_dir!r}: need the path of a folder, or None")
        if self.micro_batch_size and self.max_tokens:
            raise ValueError("set micro_batch_size or max_tokens, not both")
        if self.compile == "reduce-overhead" and self.r_drop:
            raise ValueError("r_drop makes two forward passes, compile='reduce-overhead' keeps one; use compile=True")
        if self.compile and self.distributed == "fsdp":
            raise ValueError("compile=True with distributed='fsdp' is not supported; drop one of them")
        if self.resume and not self.checkpoint_dir:
            raise ValueError("resume='auto' needs checkpoint_dir")
        if self.checkpoint_every and not self.checkpoint_dir:
            raise ValueError("checkpoint_every needs checkpoint_dir")


def _number(name: str, value: Any, low: float, high: float) -> None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (right and low <= value <= high and value <= sys.float_info.max):  # an int may be larger than any float
        above = f" to {high}" if high < math.inf else ", finite"
        raise ValueError(f"{name}={value!r}: need a number from {low:g}{above}")


def _whole(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: need a whole number of at least 1")
    if value >= 2**31:
        raise ValueError(f"{name} has {value.bit_length()} bits: need a whole number below 2**31")


@dataclass
class Run:
    """What `fit` did: `history` has a record a step and one an evaluation, `metrics` the last (or best) evaluation."""

    config: TrainConfig
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0  # training alone, evaluation included
    stopped: str = "finished"  # or "early stopping", "interrupted"
    precision: str = "fp32"
    reason: str = ""  # why this precision
    micro_batch_size: int | None = None  # in use at the end: smaller than asked for where memory ran out
    max_tokens: int | None = None
    peak_memory_mb: float | None = None  # of tensors on the GPU, without one of the whole process; 1 MB = 2**20 bytes

    def plot(self, **options: Any) -> Any:
        """Draw loss and evaluation metrics against steps; returns the matplotlib Axes."""
        from ..show.plots import learning_curves

        return learning_curves(self, **options)


def choose_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """The precision to compute in, and the reason: ("fp32" | "tf32" | "bf16" | "fp16", reason).

    Weights and optimizer state stay float32 in every case; only matrix products and the like run in half precision.
    tf32 is float32 whose matrix products round their inputs to 10 bits after the point, on GPUs from Ampere on.
    Raises ValueError for fp16 on a CPU, for bf16 on a GPU without it, and for tf32 elsewhere than on such a GPU.
    """
    if requested not in PRECISIONS:
        raise ValueError(f"precision={requested!r}: choose one of {', '.join(PRECISIONS)}")
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if requested == "tf32" and not has_bf16:  # both came with compute capability 8.0
        raise ValueError("precision='tf32' needs an NVIDIA GPU of compute capability 8.0 or more; use fp32")
    if requested == "fp16" and device.type == "cpu":
        raise ValueError("precision='fp16' needs a GPU (a CPU gains nothing and overflows); use fp32")
    if requested == "bf16" and device.type == "cuda" and not has_bf16:
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16 units; use precision='fp16' or 'auto'")
    if requested != "auto":
        return requested, "as asked"
    if device.type == "cuda":
        if has_bf16:
            return "bf16", "this GPU multiplies bfloat16 fast, and its range equals float32's, so no loss scaling"
        return "fp16", "this GPU has no bfloat16 units; float16 with loss scaling"
    return "fp32", "on this device half precision brings no gain we rely on"
