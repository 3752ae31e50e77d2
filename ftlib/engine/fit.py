"""`fit`: a `for` over `core.loop.steps`; its body is what happens between steps.  To take home: core/loop.py, alone."""

import hashlib
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..core.batches import refuse
from ..core.device import choose_device, choose_precision, computing
from ..core.loop import schedule_factor, steps
from ..inputs.agreement import agree, name_classes
from ..inputs.rows import Stream, parts_for, rows_for
from ..methods import optimizing, privacy
from ..methods.regularization import dropout_places
from ..methods.unpadding import is_unpadded
from ..show.measuring import measure
from ..tasks.task import TASKS, task_loss, tasks_of
from . import checkpoints, compiling, distributed, recovery, task_gradients
from .feeding import Feed
from .prediction import labeled, metric_names, scores
from .settings import Run, TrainConfig


def fit(
    model: nn.Module, train_dataset: Any, *, eval_dataset: Any = None, tokenizer: Any = None,
    config: TrainConfig | None = None, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    on_record: Callable[[dict[str, Any]], Any] | None = None,
) -> Run:  # fmt: skip
    """Train a model in place; returns the `Run`.

    Args:
        model: a Transformers model with a task head, or a MultiTaskModel.  Parameters with requires_grad move.
        train_dataset: from `tokenize`; or {task: dataset}, mixed as `config.task_sampler` says; or, with
            `config.max_steps`, a stream: any iterable of rows without a length, begun again where it ends if it can.
        eval_dataset: the same, evaluated after every epoch (or every `eval_every` steps); a stream is read whole.
        tokenizer: for the padding id; default: the model's config knows it.
        loss: (logits, labels) -> scalar, *summed* over labeled items, here and in evaluation; default: `task_loss`.
        on_record: called with every record of `Run.history` as it comes, e.g. `show.logging.tensorboard(folder)`.

    Modes (train or eval) and the global random state end as they were.  An interrupt (Ctrl-C) ends the run early with
    its history; under torchrun it is raised.  A model on the CPU moves to the GPU if there is one.  With "fsdp" a
    sharded copy is trained, and its weights come back.
    When memory runs out in a step, its micro-batches are halved, with a warning, and the whole step is done again.
    A step whose loss or gradient is not finite is skipped, with a warning and a record that name its rows; fp16's
    overflow is left to the loss scaler.
    Raises ValueError or TypeError naming row, column and value before training for data that does not fit the model;
    ValueError after `max_bad_steps` such steps in a row, MemoryError when a single row does not fit; both with the
    weights of the last good step, and the former with a checkpoint if checkpoints are on.
    """
    config = config or TrainConfig()
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config is {config!r}; pass ftlib.TrainConfig(...)")
    for name, value in (("loss", loss), ("on_record", on_record)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} is {value!r}; pass a function, see the docstring of fit")
    distributed.start()
    names: dict[str, list[str]] = {}  # of the classes, for a model without, and for both datasets alike
    parts = parts_for(train_dataset, model, name="train_dataset", stream=config.max_steps is not None, names=names)
    held_out = [] if eval_dataset is None else rows_for(eval_dataset, model, name="eval_dataset", names=names)
    name_classes(model, names)
    padding = agree(model, tokenizer, bool(held_out) or (config.micro_batch_size or config.batch_size) > 1)
    model.zero_grad(set_to_none=True)  # gradients of an earlier backward() are no part of the first step
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(config.seed + distributed.rank())
        try:
            device = choose_device()
            dtype = torch.bfloat16 if choose_precision(device, config.precision)[0] == "bf16" else None
            spread = distributed.spread(model, config.distributed, device, dtype)
            modes, weights = compiling.training_modes(model, config), compiling.float32_weights(model, config)
            with modes, weights as kept, spread as trained, measure() as cost:
                training = Training(trained, parts, held_out, padding, config, loss, on_record)
                if kept:
                    training.result.precision, training.result.reason = kept
                training._run()
        finally:
            model.zero_grad(set_to_none=True)
    training.result.peak_memory_mb = cost.peak_mb if cost.peak_gpu_mb is None else cost.peak_gpu_mb
    return training.result


class Best:
    """The best evaluation so far, with its weights, and how many came since: early stopping."""

    def __init__(self, trainable: dict[str, nn.Parameter], metric: str, patience: int | None):
        self.trainable, self.metric, self.patience = trainable, metric, patience
        self.metrics: dict[str, float] | None = None
        self.step: int | None = None
        self.since = 0
        self.weights: dict[str, torch.Tensor] = {}

    def look(self, metrics: dict[str, float], step: int) -> None:
        self.since += 1
        if self.metrics is None or self.score(metrics) > self.score(self.metrics):
            self.metrics, self.step, self.since = metrics, step, 0
            self.weights = {name: p.detach().clone() for name, p in self.trainable.items()}

    def score(self, metrics: dict[str, float]) -> float:
        """Larger is better; a metric that is not a number is the worst."""
        value = metrics[self.metric]
        sign = -1.0 if self.metric.split("/")[-1] in ("loss", "mse", "perplexity") else 1.0
        return -math.inf if math.isnan(value) else sign * value

    @property
    def out_of_patience(self) -> bool:
        return bool(self.patience) and self.since >= self.patience

    @torch.no_grad()
    def put_back(self) -> None:
        for name, weight in self.weights.items():
            self.trainable[name].copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "step": self.step, "since": self.since, **self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics, self.step, self.since = state["metrics"], state["step"], state["since"]
        whole = {name: state[name] for name in self.trainable if name in state}
        self.weights = {n: distributed.cut(t, self.trainable[n]).to(self.trainable[n].device) for n, t in whole.items()}


class Training:
    """The parts of one call of `fit`, put together, and the `for`."""

    def __init__(
        self, model: nn.Module, parts: dict, held_out: list, padding: Any, config: Any, loss: Any, on_record: Any
    ):
        self.model, self.held_out, self.config, self.on_record = model, held_out, config, on_record
        device = next(model.parameters()).device
        if device.type == "cpu" and choose_device().type == "cuda":
            model.to(device := choose_device())
        precision, reason = choose_precision(device, config.precision)
        sizes = config.micro_batch_size, config.max_tokens
        self.result = Run(config, precision=precision, reason=reason, micro_batch_size=sizes[0], max_tokens=sizes[1])
        self.autocast = computing(device, precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        tasks = tasks_of(model)
        _check(model, tasks, config, loss, held_out, list(parts.values()))
        if config.distill:
            config.distill.begin(model)
        smoothed = task_gradients.summed_loss(loss, config.label_smoothing, device)
        self.loss = task_gradients.summed_loss(loss, 0.0, device, quiet=True)  # for evaluation
        self.feed = Feed(parts, tasks, self.result, padding, device, is_unpadded(model))
        self.epoch = math.ceil(sum(self.feed.rows.values()) / config.batch_size) or config.max_steps  # steps in one
        self.total = config.max_steps or config.epochs * self.epoch
        self.joint = task_gradients.begin(model, config, parts, precision, self.epoch)  # None for a single task
        self.private = privacy.begin(model, config, parts, held_out, self.total, device)  # None without privacy
        self.optimizer = optimizing.optimizer(model, config)
        optimizing.attach(self.optimizer, model, l1=config.l1)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.best = Best(trainable, config.metric, config.patience)
        self.random = recovery.RandomState(device)
        self.kept = self._checkpoints(parts) if config.checkpoint_dir else None
        self.together = recovery.Together()
        self.wrapped = distributed.wrap(model)
        flat = config.label_smoothing
        functions = {t: smoothed or task_loss(k, flat * TASKS[k].smooths) for t, (k, _) in tasks.items()}
        how = config.r_drop, self.autocast, smoothed is not None, config.distill
        losses = task_gradients.Losses(functions, tasks, *how)
        plain = task_gradients.task_gradient(losses, self.joint, self.scaler, model)
        gradient = self.private.gradient(losses.rows) if self.private else plain
        self.gradient = recovery.halving(gradient, device)

    def _checkpoints(self, parts: dict) -> checkpoints.Checkpoints:
        """Where the run is kept, all that must go on, and what another call must share with this one."""
        model, config = self.model, self.config
        checkpoints.prepare(config.checkpoint_dir, going_on=config.resume is not None)
        rows = {name: self.feed.rows.get(name, 0) for name in parts}
        described = hashlib.sha256(optimizing.described(model).encode()).hexdigest()
        data = self.feed.digest(self.held_out)
        run = {"steps": self.total, "precision": self.result.precision, "rows": rows, "data": data}
        same = checkpoints.fingerprint(config, **run, model=described)
        resumable = {
            "random": self.random, "model": checkpoints.ModelState(model), "scaler": self.scaler, "best": self.best,
            "optimizer": checkpoints.OptimizerState(self.optimizer, model), "run": self.result,
        } | ({"tasks": self.joint.weights} if self.joint else {})  # fmt: skip
        resumable |= {"privacy": self.private} if self.private else {}
        return checkpoints.Checkpoints(config.checkpoint_dir, resumable, same, config.keep_last)

    def _run(self) -> None:
        run, config = self.result, self.config
        first = (self.kept.resume() or 0) if config.resume else 0
        self.feed.start(first, self.total, self.private and self.private.places())
        self.begin = time.perf_counter() - run.seconds
        hidden = not config.progress or distributed.rank() > 0
        if not hidden and run.precision != "fp32":
            tqdm.write(f"precision {run.precision}: {run.reason}")
        bar = tqdm(total=self.total, initial=first, desc="fit", unit="step", leave=False, disable=hidden)
        self.model.train()
        try:
            unfinished = first > 0 and "loss" in run.history[-1]  # interrupted while it evaluated: that comes first
            stop = self.best.out_of_patience or (unfinished and self._evaluated())
            if stop and unfinished:
                self._save()
            optimizing.begin_step(self.model, first, self.total)
            for record in () if stop else self.steps(first):
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                self._tell(record)
                if "skipped" in record:
                    if reason := recovery.hopeless(run.history, config, self.total):
                        self._save()
                        raise ValueError(reason)
                    if distributed.rank() == 0:
                        warnings.warn(f"{recovery.BAD.format(**record)}; the step is skipped", stacklevel=3)
                optimizing.begin_step(self.model, run.steps, self.total)
                stop = self._evaluated()
                if stop or self._due(config.checkpoint_every):
                    self._save()
                if stop:
                    break
            if stop:
                run.stopped = "early stopping"
            elif reason := recovery.hopeless(run.history, config, self.total):  # gone on with until no step was left
                raise ValueError(reason)
            elif run.steps < self.total:  # a stream has ended
                if not run.history:
                    raise ValueError("train_dataset has zero examples")
                run.stopped = "no more rows"
                if self.held_out and "loss" in run.history[-1]:
                    self.evaluate()
                self._save()
        except KeyboardInterrupt:
            run.stopped = "interrupted"
            if distributed.world_size() > 1:  # at several steps: the processes can't go on together
                raise
            if self.together.whole and run.steps > first:
                self._save()
        finally:
            optimizing.begin_step(self.model, 1, 1)  # nothing stays frozen that was free
            bar.close()
        if config.patience and self.best.metrics is not None:  # early stopping keeps the best weights
            run.metrics = self.best.metrics
            self.best.put_back()
        run.seconds = time.perf_counter() - self.begin
        run.epsilon = self.private and self.private.spent()

    def steps(self, first: int) -> Any:
        config = self.config
        warmup = math.ceil(config.warmup_fraction * self.total) if self.total > 1 else 0  # a rate of 0 moves nothing
        return steps(
            self.wrapped, self.feed, self.optimizer, total=self.total, first=first, gradient=self.gradient,
            schedule=partial(schedule_factor, schedule=config.schedule, warmup=warmup),
            max_grad_norm=None if self.private else config.max_grad_norm,  # of rows, not of the noisy step
            scaler=self.scaler if self.scaler.is_enabled() else None,
            whole=self.together, done=self._done,
        )  # fmt: skip

    def _done(self, record: dict[str, Any]) -> None:
        """Weights, optimizer, history and random state go on together: this is called inside `together`."""
        run, step = self.result, self.feed.step
        record |= {
            "epoch": record["step"] / self.epoch, "examples": len(step.rows), "micro_batches": len(step),
            "tokens": sum(len(row["input_ids"]) for row in step.rows),
        }  # fmt: skip
        if "skipped" in record:
            record["skipped"] = step.row_numbers()
        elif self.joint:
            record |= self.joint.end()
        run.steps, run.seconds = record["step"], time.perf_counter() - self.begin
        record["seconds"] = run.seconds
        run.history.append(record)
        self.random.take()
        self.private and self.private.take(run.steps)

    def _save(self) -> None:
        self.result.epsilon = self.private and self.private.spent()
        self.kept and self.kept.save(self.result.steps, best=self.best.step)

    def _tell(self, record: dict[str, Any]) -> None:
        if self.on_record and distributed.rank() == 0:
            self.on_record(record)

    def _evaluated(self) -> bool:
        """Evaluate if it is time; True when patience has run out.  An error costs no step: they are saved first."""
        try:
            return bool(self.held_out) and self._due(self.config.eval_every) and self.evaluate()
        except Exception:
            if distributed.world_size() == 1:
                self._save()
            raise

    def evaluate(self) -> bool:
        """Record the metrics of the evaluation rows; True when patience has run out."""
        run, config = self.result, self.config
        rows = min(64, 4 * (run.micro_batch_size or 16))  # without gradients four times as many fit
        options = dict(padding=self.feed.pad, loss=self.loss, autocast=self.autocast, batch_size=rows)
        metrics = scores(self.model, self.held_out, shared=True, **options)
        if config.patience and math.isnan(metrics.get(config.metric, 0.0)):
            warnings.warn(f"{config.metric} is not a number at step {run.steps}: no evaluation is better", stacklevel=5)
        if config.patience:
            metrics[config.metric] = distributed.gather(metrics[config.metric])[0]  # so that all decide alike
        record = {"step": run.steps, "epoch": run.steps / self.epoch}
        record |= {f"eval_{name}": value for name, value in metrics.items()}
        with recovery.uninterrupted():  # the best weights and the record of them
            if config.patience:
                self.best.look(metrics, run.steps)
            run.metrics = metrics
            run.history.append(record)
        self._tell(record)
        return self.best.out_of_patience

    def _due(self, every: int | None) -> bool:
        return self.result.steps == self.total or self.result.steps % (every or self.epoch) == 0


def _check(model: nn.Module, tasks: dict, config: TrainConfig, loss: Any, held_out: list, parts: list) -> None:
    """Refuse what is asked for and has no meaning for this model, or these rows."""
    kinds = sorted({kind for kind, _ in tasks.values()})
    records, smoothing = [TASKS[kind] for kind in kinds], config.label_smoothing
    names = metric_names(model, held_out) if held_out else []
    tuning = optimizing.tuning_of(model)
    refuse(
        (config.privacy and config.distill, "privacy: a teacher has no part in a row's own loss; leave distill out"),
        (config.privacy and distributed.world_size() > 1, "privacy: each process would draw rows and noise; start one"),
        (config.distributed == "fsdp" and tuning and (tuning.stages or tuning.start),  # which need the weights whole
         f"distributed='fsdp' has no {tuning and tuning.strategy}; use distributed='ddp'"),
        (smoothing and loss is None and not any(record.smooths for record in records),
         f"label_smoothing={smoothing} has no meaning for {', '.join(kinds)}"),
        *((config.r_drop, f"r_drop={config.r_drop} compares predicted distributions of classes; not for {kind}")
          for kind in kinds if TASKS[kind].divergence is None),
        (config.distill and not all(record.labeled for record in records),
         "distill takes logits, which a language model never has all at once; ftlib.steps takes distill.gradient()"),
        (loss is not None and not all(record.labeled for record in records),
         "loss= takes logits, which a language model never has all at once; give ftlib.steps a gradient function"),
        (distributed.world_size() > 1 and any(record.vectors for record in records),
         "the loss compares vectors of all rows, and a process has its own alone: train in one process"),
        (config.patience and not held_out, "patience needs eval_dataset"),
        (config.patience and config.metric not in names,
         f"metric={config.metric!r}: evaluation gives {', '.join(names)}"),
        (config.eval_every and not held_out, f"eval_every={config.eval_every} needs eval_dataset"),
    )  # fmt: skip
    for idle, what in (
        (not config.patience and config.metric != "loss", f"metric={config.metric!r} has no effect without patience"),
        (config.r_drop and not any(getattr(*place) for place in dropout_places(model)),
         f"r_drop={config.r_drop} only costs time: all dropout rates of the model are 0"),
        (not (isinstance(parts[0], Stream) or labeled(model, parts)),
         "train_dataset: every label is -100 (ignored), nothing is learned"),
    ):  # fmt: skip
        if idle:
            warnings.warn(what, stacklevel=4)
