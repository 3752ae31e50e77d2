"""The training loop: one function, `fit`, on any model with a task head.

A step: take the rows of the step, cut them into micro-batches, run each forward and backward with the loss *summed*
over labelled items and divided by the number of labelled items of the whole step (all micro-batches, all
processes), clip, AdamW, schedule.  So 1 batch of 32 and 4 of 8 give the same gradient, ragged lengths or not.

To copy this module you need: training.py, prediction.py, batching.py, losses.py, tuning.py, distributed.py,
checkpoints.py, torch and transformers (metrics.py with scikit-learn where you evaluate).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ftlib import checkpoints, distributed, losses
from ftlib.batching import collate, split_by_size, to_device
from ftlib.multitask import TaskSampler
from ftlib.prediction import evaluate, parts_for, predict, tasks_of
from ftlib.tuning import SCHEDULES, parameter_groups, schedule_factor

__all__ = ["Run", "TrainConfig", "choose_device", "choose_precision", "evaluate", "fit", "predict"]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.  Flat on purpose: every field is a number or a word, and is checked once, here."""

    epochs: int = 3  # passes over the training rows
    max_steps: int | None = None  # stop after so many optimizer steps; the schedule ends there too
    batch_size: int = 32  # examples an optimizer step, over all processes
    micro_batch_size: int | None = None  # examples a forward pass; None: the whole step at once
    max_tokens: int | None = None  # padded tokens a forward pass, instead of a number of examples
    learning_rate: float = 5e-5
    schedule: str = "linear"  # constant, linear, cosine or exponential
    warmup_fraction: float = 0.1  # share of the steps over which the learning rate rises from 0
    optimizer: str = "adamw"  # adamw or sgd (momentum 0.9)
    weight_decay: float = 0.01
    decay_groups: bool = True  # spare biases and normalization from weight decay
    label_smoothing: float = 0.0
    max_grad_norm: float | None = 1.0  # clip the gradient to this length; None: do not
    precision: str = "auto"  # auto, fp32, bf16 or fp16
    compile: bool = False  # torch.compile the forward pass
    shuffle: bool = True  # a new order every epoch, from the seed
    eval_every: int | None = None  # steps between evaluations; None: after every epoch
    patience: int | None = None  # stop after so many evaluations without a better `metric`, keep the best weights
    metric: str = "loss"  # what "better" means; any name that evaluate returns
    checkpoint_dir: str | None = None
    checkpoint_every: int | None = None  # steps between checkpoints; None: after every epoch
    keep_last: int = 2  # checkpoints to keep
    resume: str | None = None  # "auto": from the newest whole checkpoint in checkpoint_dir, if there is one
    temperature: float = 1.0  # of the task sampler, when several datasets are trained together
    seed: int = 0  # of the order, of dropout and of the task sampler
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "keep_last"):
            _whole(name, getattr(self, name))
        for name in ("max_steps", "micro_batch_size", "max_tokens", "eval_every", "patience", "checkpoint_every"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
        for name, low, high in (("learning_rate", 0, math.inf), ("weight_decay", 0, math.inf), ("label_smoothing", 0, 1),
                                ("warmup_fraction", 0, 1), ("temperature", 0, math.inf)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value == math.inf:
                raise ValueError(f"{name}={value!r}: need a number from {low} to {high}")
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("optimizer", OPTIMIZERS),
                              ("resume", (None, "auto"))):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, choices))}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r}: must be above 0, or None for no clipping")
        if self.micro_batch_size and self.max_tokens:
            raise ValueError("set micro_batch_size or max_tokens, not both")
        if self.resume and not self.checkpoint_dir:
            raise ValueError("resume='auto' needs checkpoint_dir")


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: need a whole number of at least 1")


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

    def plot(self, **options: Any) -> Any:
        """Draw loss and evaluation metrics against steps; returns the matplotlib Axes."""
        from ftlib.plots import learning_curves

        return learning_curves(self, **options)


def choose_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """The precision to compute in, and the reason: ("fp32" | "bf16" | "fp16", reason).

    Weights and optimizer state stay float32 in every case; only matrix products and the like run in half precision.
    Raises ValueError for fp16 on a CPU and for bf16 on a GPU without it.
    """
    if requested not in PRECISIONS:
        raise ValueError(f"precision={requested!r}: choose one of {', '.join(PRECISIONS)}")
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
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


def fit(
    model: nn.Module,
    train_dataset: Any,
    *,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    config: TrainConfig | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Run:
    """Train a model in place; returns the `Run`.

    Args:
        model: a Transformers model with a task head, or a MultiTaskModel.  Parameters with requires_grad move.
        train_dataset: from `tokenize`; or {task: dataset}, mixed by a TaskSampler at `config.temperature`.
        eval_dataset: the same, evaluated after every epoch (or every `eval_every` steps).
        tokenizer: for the padding id; default: the model's config knows it.
        loss: (logits, labels) -> scalar, *summed* over the labelled items; default: the task's own, `losses.task_loss`.

    The model ends in the mode (train or eval) it came in.  An interrupt (Ctrl-C) ends the run early with its history.
    The global random state is as before afterwards.
    Raises ValueError or TypeError naming row, column and value before training for data that does not fit the model;
    ValueError naming the step and rows when the loss is not finite, with the weights of the step before.
    """
    config = config or TrainConfig()
    distributed.start()
    parts = parts_for(train_dataset, model, name="train_dataset")
    if eval_dataset is not None:
        parts_for(eval_dataset, model, name="eval_dataset")
    elif config.patience:
        raise ValueError("patience needs eval_dataset")
    loop = _Loop(model, parts, eval_dataset, tokenizer, config, loss)
    was_training = model.training
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + distributed.rank())
        try:
            return loop.run()
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)


class _Loop:
    """The state of one call of `fit`."""

    def __init__(self, model: nn.Module, parts: dict, eval_dataset: Any, tokenizer: Any, config: TrainConfig, loss: Any):
        self.model, self.parts, self.config = model, parts, config
        self.eval_dataset, self.tokenizer = eval_dataset, tokenizer
        device = next(model.parameters()).device
        if device.type == "cpu" and choose_device().type == "cuda":
            device = choose_device()
            model.to(device)
        self.device = device
        precision, _ = choose_precision(device, config.precision)
        self.run_ = Run(config, precision=precision)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.autocast = (lambda: torch.autocast(device.type, dtype)) if dtype else nullcontext
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.optimizer = _optimizer(model, config)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.wrapped = distributed.wrap(model)
        self.forward = torch.compile(self.wrapped, dynamic=True) if config.compile else self.wrapped
        self.tasks = tasks_of(model)
        self.loss = {t: loss or losses.task_loss(kind, _smoothing(kind, config)) for t, (kind, _) in self.tasks.items()}
        self.weight = {task: model.specs[task].weight if task else 1.0 for task in self.tasks}
        self.pad = getattr(tokenizer, "pad_token_id", None)
        if self.pad is None:
            self.pad = getattr(model.config, "pad_token_id", None) or 0
        self.rows = sum(len(rows) for rows in parts.values())
        self.steps_per_epoch = math.ceil(self.rows / config.batch_size)
        self.total = config.max_steps or config.epochs * self.steps_per_epoch
        self.warmup = round(config.warmup_fraction * self.total)
        self.best: dict[str, Any] | None = None  # metrics, weights (early stopping)
        self.evaluations_since_best = 0

    def run(self) -> Run:
        run, config = self.run_, self.config
        first = 0
        if config.resume:
            first = checkpoints.resume_training(self) or 0
        plan = self.plan()
        for _ in range(first):  # the order is a function of the seed: walk to where the run stopped
            next(plan)
        begin = time.perf_counter() - run.seconds
        bar = self._progress(first)
        self.model.train()
        try:
            for step in range(first, self.total):
                self.step(step, next(plan))
                run.steps, run.seconds = step + 1, time.perf_counter() - begin
                bar.update()
                bar.set_postfix(loss=f"{run.history[-1]['loss']:.3f}", refresh=False)
                last = step + 1 == self.total
                if self.eval_dataset is not None and (self._due(config.eval_every, step) or last) and self.evaluate():
                    run.stopped = "early stopping"
                    break
                if config.checkpoint_dir and (self._due(config.checkpoint_every, step) or last):
                    checkpoints.save_training(self)
        except KeyboardInterrupt:
            run.stopped = "interrupted"
            if config.checkpoint_dir:
                checkpoints.save_training(self)
        finally:
            bar.close()
        if config.patience and self.best:  # early stopping keeps the best weights
            run.metrics = self.best["metrics"]
            with torch.no_grad():
                for parameter, best in zip(self.trainable, self.best["weights"], strict=True):
                    parameter.copy_(best)
        run.seconds = time.perf_counter() - begin
        return run

    def plan(self) -> Iterator[list[dict]]:
        """The rows of every step, without end; the same for the same seed."""
        config = self.config
        if list(self.parts) == [""]:
            epoch = 0
            while True:
                order = _order(self.rows, config, epoch)
                for start in range(0, self.rows, config.batch_size):
                    yield [self.parts[""][i] for i in order[start : start + config.batch_size]]
                epoch += 1
        sampler = TaskSampler({n: len(rows) for n, rows in self.parts.items()}, config.temperature, config.seed)
        streams = {name: _endless(rows, config, place) for place, (name, rows) in enumerate(self.parts.items())}
        while True:
            yield [next(streams[name]) for name in sampler.draw(config.batch_size)]

    def step(self, step: int, rows: list[dict]) -> None:
        """One optimizer step on the rows of all processes."""
        config, run = self.config, self.run_
        factor = schedule_factor(step, self.total, schedule=config.schedule, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        scale = self._scales(rows)
        mine = list(range(distributed.rank(), len(rows), distributed.world_size())) or [0]
        idle = len(rows) <= distributed.rank()  # fewer rows than processes: take part, count nothing
        lengths = [len(row["input_ids"]) for row in rows]
        micro = [mine]
        if config.micro_batch_size or config.max_tokens:
            micro = split_by_size(mine, lengths, batch_size=config.micro_batch_size, max_tokens=config.max_tokens)
        total = torch.zeros((), device=self.device)
        for place, indices in enumerate(micro):
            batch = to_device(collate([rows[i] for i in indices], pad_token_id=self.pad), self.device)
            hold = nullcontext() if place + 1 == len(micro) else distributed.hold_gradients(self.wrapped)
            with hold:
                with self.autocast():
                    part = self._loss(batch, scale) * (0.0 if idle else 1.0)
                # DDP averages gradients over processes; the loss is divided by the items of all of them already
                self.scaler.scale(part * distributed.world_size()).backward()
            total += part.detach()
        distributed.all_sum(total)
        self.scaler.unscale_(self.optimizer)
        limit = config.max_grad_norm if config.max_grad_norm is not None else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.trainable, limit))
        value = float(total)
        if not math.isfinite(value) or (not math.isfinite(norm) and not self.scaler.is_enabled()):
            raise ValueError(
                f"step {step + 1}: loss {value}, gradient norm {norm} on {len(rows)} rows, the first with input_ids "
                f"{rows[0]['input_ids'][:8]}...; the weights are those of the step before. Lower learning_rate "
                f"({config.learning_rate:g}), keep max_grad_norm, or look for bad labels"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        run.history.append({
            "step": step + 1, "epoch": (step + 1) / self.steps_per_epoch, "loss": value,
            "learning_rate": config.learning_rate * factor, "grad_norm": norm, "examples": len(rows), "tokens": sum(lengths),
        })  # fmt: skip

    def _loss(self, batch: dict, scale: dict[str, float]) -> torch.Tensor:
        """The micro-batch's share of the step's loss: summed over items, times 1 / items of the whole step."""
        labels = batch.pop("labels")
        if not isinstance(labels, dict):
            return self.loss[""](self.forward(**batch).logits, labels) * scale[""]
        logits = self.forward(**batch)
        return sum(self.loss[task](logits[task], labels[task]) * scale[task] for task in labels)

    def _scales(self, rows: list[dict]) -> dict[str, float]:
        """{task: weight / labelled items of the step}; with several tasks also times the task's share of the rows."""
        if "" in self.tasks:
            return {"": 1.0 / max(sum(_items(row["labels"]) for row in rows), 1)}
        out = {}
        for task in self.tasks:
            own = [row["labels"][task] for row in rows if task in row["labels"]]
            out[task] = self.weight[task] * len(own) / len(rows) / max(sum(map(_items, own)), 1)
        return out

    def evaluate(self) -> bool:
        """Record the metrics of `eval_dataset`; True when patience has run out."""
        run, config = self.run_, self.config
        with self.autocast():
            metrics = evaluate(self.model, self.eval_dataset, tokenizer=self.tokenizer)
        record = {"step": run.steps, "epoch": run.steps / self.steps_per_epoch}
        run.history.append(record | {f"eval_{name}": value for name, value in metrics.items()})
        run.metrics = metrics
        if not config.patience:
            return False
        if config.metric not in metrics:
            raise ValueError(f"metric={config.metric!r}: evaluation gives {', '.join(metrics)}")
        sign = -1.0 if config.metric.split("/")[-1] in ("loss", "mse") else 1.0
        if self.best is None or sign * metrics[config.metric] > sign * self.best["metrics"][config.metric]:
            self.best = {"metrics": metrics, "weights": [p.detach().clone() for p in self.trainable]}
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        return self.evaluations_since_best >= config.patience

    def _due(self, every: int | None, step: int) -> bool:
        return (step + 1) % (every or self.steps_per_epoch) == 0

    def _progress(self, first: int) -> Any:
        from tqdm.auto import tqdm

        hidden = not self.config.progress or distributed.rank() > 0
        return tqdm(total=self.total, initial=first, desc="fit", unit="step", leave=False, disable=hidden)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        free = ("epochs", "progress", "checkpoint_dir", "checkpoint_every", "keep_last", "resume")
        config = {name: value for name, value in asdict(self.config).items() if name not in free}
        return {"config": config, "steps": self.total, "rows": {name: len(rows) for name, rows in self.parts.items()}}


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    if not config.decay_groups:
        groups = [group | {"weight_decay": config.weight_decay} for group in groups]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)


def _smoothing(kind: str, config: TrainConfig) -> float:
    return config.label_smoothing if kind in ("sequence-classification", "token-classification") else 0.0


def _items(label: Any) -> int:
    """Labelled items of one row; -100 marks what is not labelled."""
    return sum(value != losses.IGNORE for value in label) if isinstance(label, (list, tuple)) else int(label != losses.IGNORE)


def _order(count: int, config: TrainConfig, epoch: int, stream: int = 0) -> list[int]:
    if not config.shuffle:
        return list(range(count))
    seed = (config.seed * 1_000_003 + stream * 10_007 + epoch) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _endless(rows: list[dict], config: TrainConfig, stream: int) -> Iterator[dict]:
    epoch = 0
    while True:
        yield from (rows[i] for i in _order(len(rows), config, epoch, stream))
        epoch += 1
