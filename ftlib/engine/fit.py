"""The training loop: one function, `fit`, on any model with a task head.

A step: take the rows of the step, cut them into micro-batches, run each forward and backward with the loss *summed*
over labelled items and divided by the number of labelled items of the whole step (all micro-batches, all
processes), clip, AdamW, schedule.  So 1 batch of 32 and 4 of 8 give the same gradient, ragged lengths or not.

To copy this module you need: training.py, settings.py, steps.py, modes.py, memory.py, speedups.py, prediction.py,
rows.py, batching.py, losses.py, optimizing.py, regularization.py, multitask.py, joint.py, balancing.py, distributed.py,
checkpoints.py, files.py, torch and transformers
(metrics.py with scikit-learn, and seqeval for tags, where you evaluate; unpadding.py for compile="reduce-overhead").
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..methods import losses, optimizing
from ..methods.optimizing import schedule_factor
from ..methods.speedups import SeenRows, uninterrupted
from ..show.measuring import measure
from . import checkpoints, distributed
from . import compiling as modes
from . import feeding as steps
from . import task_gradients as joint
from .prediction import evaluate, parts_for, predict, rows_for, tasks_of
from .settings import Run, TrainConfig, choose_device, choose_precision

__all__ = ["Run", "TrainConfig", "choose_device", "choose_precision", "evaluate", "fit", "predict"]


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
        train_dataset: from `tokenize`; or {task: dataset}, mixed by a TaskSampler as `config.task_sampler` says.
        eval_dataset: the same, evaluated after every epoch (or every `eval_every` steps).
        tokenizer: for the padding id; default: the model's config knows it.
        loss: (logits, labels) -> scalar, *summed* over the labelled items; default: the task's own,
            `losses.task_loss`.

    Every module ends in the mode (train or eval) it came in.  An interrupt (Ctrl-C) ends the run early with its
    history; under torchrun it is raised.  The global random state is as before afterwards.  A model on the CPU moves to
    the GPU if there is one.  With distributed="fsdp" a sharded copy is trained, and its weights come back at the end.
    When memory runs out in a step, its micro-batches are halved, with a warning, and the whole step is done again.
    A step whose loss or gradient is not finite is skipped, with a warning and a record that name its rows; fp16
    overflow is left to the loss scaler.
    Raises ValueError or TypeError naming row, column and value before training for data that does not fit the model;
    ValueError after `max_bad_steps` such steps in a row, MemoryError when a single row does not fit; both with the
    weights of the last good step, and the former with a checkpoint if checkpoints are on.
    """
    config = config or TrainConfig()
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config is {config!r}; pass ftlib.TrainConfig(...)")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss is {loss!r}; pass a function (logits, labels) -> summed loss")
    distributed.start()
    parts = parts_for(train_dataset, model, name="train_dataset")
    eval_rows = None
    if eval_dataset is not None:
        eval_rows = rows_for(eval_dataset, model, name="eval_dataset")
    elif config.patience:
        raise ValueError("patience needs eval_dataset")
    model.zero_grad(set_to_none=True)  # gradients of an earlier backward() are no part of the first step
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(config.seed + distributed.rank())
        try:
            device = choose_device()
            dtype = torch.bfloat16 if choose_precision(device, config.precision)[0] == "bf16" else None
            spread = distributed.spread(model, config.distributed, device, dtype)
            with modes.training_modes(model, config), spread as trained, measure() as cost:
                run = _Loop(trained, parts, eval_rows, tokenizer, config, loss).run()
        finally:
            model.zero_grad(set_to_none=True)
    run.peak_memory_mb = cost.peak_mb if cost.peak_gpu_mb is None else cost.peak_gpu_mb
    return run


class _Loop:
    """The state of one call of `fit`."""

    def __init__(
        self, model: nn.Module, parts: dict, eval_rows: list | None, tokenizer: Any, config: TrainConfig, loss: Any
    ):
        self.model, self.parts, self.config = model, parts, config
        self.eval_rows, self.tokenizer = eval_rows, tokenizer
        self.longest = max(len(row["input_ids"]) for rows in parts.values() for row in rows)
        if config.max_tokens and self.longest > config.max_tokens:
            raise ValueError(f"max_tokens={config.max_tokens}, but the longest training row has {self.longest} tokens")
        if config.checkpoint_dir:
            checkpoints.prepare(config.checkpoint_dir, going_on=config.resume is not None)
        device = next(model.parameters()).device
        if device.type == "cpu" and choose_device().type == "cuda":
            device = choose_device()
            model.to(device)
        self.device = device
        precision, reason = choose_precision(device, config.precision)
        self.run_ = Run(
            config, precision=precision, reason=reason, micro_batch_size=config.micro_batch_size,
            max_tokens=config.max_tokens,
        )  # fmt: skip
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.autocast = (lambda: torch.autocast(device.type, dtype)) if dtype else nullcontext
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.tasks = tasks_of(model)
        kinds = {kind for kind, _ in self.tasks.values()}
        if config.label_smoothing and loss is None and not any(kind in _SMOOTHED for kind in kinds):
            raise ValueError(f"label_smoothing={config.label_smoothing} has no meaning for {', '.join(sorted(kinds))}")
        if config.r_drop and any(kind == "regression" for kind in kinds):
            raise ValueError(f"r_drop={config.r_drop} compares predicted distributions; regression has none")
        optimizing.check(model, config.distributed)
        self.pad = getattr(tokenizer, "pad_token_id", None)
        if self.pad is None:
            self.pad = getattr(model.config, "pad_token_id", None) or 0
        self.steps_per_epoch = math.ceil(sum(map(len, parts.values())) / config.batch_size)
        self.joint = joint.begin(model, config, parts, precision, self.steps_per_epoch)  # None for a single task
        if config.checkpoint_dir:
            self.model_digest = hashlib.sha256(optimizing.described(model).encode()).hexdigest()
            self.digest = steps.digest(parts, eval_rows or [])
        self.best: dict[str, Any] | None = None  # metrics, weights (early stopping)
        self.evaluations_since_best = 0
        self.seen = SeenRows(model, self._words())
        try:
            self.seen.on()
            self._begin(model, loss)
        except BaseException:
            self.seen.off()
            raise

    def _begin(self, model: nn.Module, loss: Any) -> None:
        """What belongs to the parameters that train, some words of the embedding among them."""
        config = self.config
        self.optimizer = optimizing.optimizer(model, config)
        optimizing.attach(self.optimizer, model, l1=config.l1)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.wrapped = distributed.wrap(model)
        self.graphs = config.compile == "reduce-overhead"
        self.forward = modes.captured(model, self.wrapped) if self.graphs else self.wrapped
        functions = {t: loss or losses.task_loss(kind, _smoothing(kind, config)) for t, (kind, _) in self.tasks.items()}
        self.losses = joint.Losses(functions, self.tasks, config.r_drop, self.autocast)
        self.ahead = steps.Ahead(self.run_, self.pad, self.device, self.longest if self.graphs else None)
        self.upcoming: list[dict] | None = None  # the rows of the step after this one
        self.total = config.max_steps or config.epochs * self.steps_per_epoch
        self.warmup = math.ceil(config.warmup_fraction * self.total)
        self.whole = True  # weights, optimizer, history and random state all stand at the same step
        self.random_state = checkpoints.random_state(self.device)

    def _words(self) -> Iterator[int] | None:
        """The token ids of the training rows, gathered only if need be; None where the whole embedding trains."""
        config = self.config
        decay_is_a_factor = config.optimizer == "adamw" or not config.weight_decay
        plain = decay_is_a_factor and not config.l1 and not optimizing.follows_steps(self.model)
        if not config.shortcuts or config.compile or not plain or distributed.world_size() > 1:
            return None
        rows = chain.from_iterable(self.parts.values())
        return chain([self.pad], chain.from_iterable(row["input_ids"] for row in rows))

    def run(self) -> Run:
        try:
            return self._run()
        finally:
            self.seen.off()
            optimizing.begin_step(self.model, 1, 1)  # nothing stays frozen that was free

    def _run(self) -> Run:
        run, config = self.run_, self.config
        self.seen.off()
        first = (checkpoints.resume_training(self) or 0) if config.resume else 0
        self.seen.on()
        plan = steps.plan(self.parts, config)
        for _ in range(first):  # the order is a function of the seed: walk to where the run stopped
            next(plan)
        self.begin = time.perf_counter() - run.seconds
        bar = self._progress(first)
        self.model.train()
        try:
            # a run that was interrupted while evaluating does that first
            unfinished = first > 0 and "loss" in run.history[-1]
            stop = self._out_of_patience() or (unfinished and self._evaluated())
            self.upcoming = next(plan)
            while not stop and run.steps < self.total:
                rows, self.upcoming = self.upcoming, next(plan) if run.steps + 1 < self.total else None
                self.step(run.steps, rows)
                bar.update()
                bar.set_postfix(loss=f"{run.history[-1]['loss']:.3f}", refresh=False)
                stop = self._evaluated()
                last = run.steps == self.total
                if config.checkpoint_dir and (stop or last or self._due(config.checkpoint_every)):
                    self._save()
            if stop:
                run.stopped = "early stopping"
            elif reason := steps.hopeless(run.history, config, self.total):  # gone on with until no step was left
                raise ValueError(reason)
        except KeyboardInterrupt:
            run.stopped = "interrupted"
            if distributed.world_size() > 1:  # at several steps: the processes can't go on together
                raise
            if config.checkpoint_dir and self.whole and run.steps > first:
                self._save()
        finally:
            bar.close()
        if config.patience and self.best:  # early stopping keeps the best weights
            run.metrics = self.best["metrics"]
            self.seen.off()
            with torch.no_grad():
                for parameter, best in zip(self._kept(), self.best["weights"], strict=True):
                    parameter.copy_(best)
        run.seconds = time.perf_counter() - self.begin
        return run

    def step(self, step: int, rows: list[dict]) -> None:
        """One optimizer step on the rows of all processes."""
        config, run = self.config, self.run_
        factor = schedule_factor(step, self.total, schedule=config.schedule, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor * group["scale"]
        optimizing.begin_step(self.model, step, self.total)
        begun = checkpoints.random_state(self.device)
        while True:
            try:
                total, batches = self._gradients(step, rows, begun)
                break
            except RuntimeError as error:
                if not steps.out_of_memory(error):
                    raise
                steps.halve(rows, run, self.longest)
            self.model.zero_grad(set_to_none=True)
            steps.free(self.device)
            checkpoints.set_random_state(begun, self.device)
        distributed.all_sum(total)
        self.scaler.unscale_(self.optimizer)
        limit = config.max_grad_norm if config.max_grad_norm is not None else math.inf
        norm = float(distributed.whole(nn.utils.clip_grad_norm_(self.trainable, limit)))
        value = float(total)
        scale = self.scaler.get_scale()  # fp16's overflow is the scaler's, until nothing is left to scale down
        good = math.isfinite(value) and (math.isfinite(norm) or (self.scaler.is_enabled() and scale >= 1))
        record = {
            "step": step + 1, "epoch": (step + 1) / self.steps_per_epoch, "loss": value,
            "learning_rate": config.learning_rate * factor, "grad_norm": norm, "examples": len(rows),
            "tokens": sum(len(row["input_ids"]) for row in rows), "micro_batches": len(batches),
        } | ({} if good else {"skipped": steps.numbers(self.parts, rows)})  # fmt: skip
        with uninterrupted():  # weights, optimizer, history and random state go on together
            self.whole = False
            if good:
                self.scaler.step(self.optimizer)
            self.scaler.update()
            if good and self.scaler.get_scale() >= scale:  # smaller: fp16 overflowed, and the step was left out
                self.seen.decayed(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
            if self.joint and good:
                record |= self.joint.end(lambda: self._look(rows, batches, begun))
            run.steps, run.seconds = step + 1, time.perf_counter() - self.begin
            run.history.append(record | {"seconds": run.seconds})
            self.random_state = checkpoints.random_state(self.device)
            self.whole = True
        if not good:
            if reason := steps.hopeless(run.history, config, self.total):
                if config.checkpoint_dir:
                    self._save()
                raise ValueError(reason)
            steps.warn_of(record)

    def _gradients(self, step: int, rows: list[dict], begun: dict) -> tuple[torch.Tensor, list]:
        """This process's share of the step's loss, its gradients added up; and the micro-batches."""
        items, shares = steps.counts(rows, self.tasks)
        batches = self.ahead.take(rows)
        if self.joint:
            self.joint.begin(step, shares, lambda: self._look(rows, batches, begun), cut=len(batches) > 1)
        total = torch.zeros((), device=self.device)
        for place, (batch, weight) in enumerate(batches):
            last = place + 1 == len(batches)
            with nullcontext() if last else distributed.hold_gradients(self.wrapped):
                # taken apart, gradients are exchanged by `joint`
                forward = self.model if self.joint and self.joint.apart else self.forward
                parts = self.losses.parts(forward, batch, items, weight)
                part = self.joint.add(parts) if self.joint else sum(parts.values())
                # DDP and FSDP average gradients over processes; the loss is divided by the items of all of them already
                if part.requires_grad:  # not so for tasks whose heads are frozen, above a frozen encoder
                    self.scaler.scale(part * distributed.world_size()).backward()
            total += part.detach()
            if self.graphs and not last:
                modes.own_gradients(self.trainable)
        if self.joint:
            self.joint.finish()
        if self.upcoming is not None:
            self.ahead.make(self.upcoming)
        return total, batches

    def _look(self, rows: list[dict], batches: list, begun: dict) -> torch.Tensor:
        """This process's share of the tasks' mean losses, float (tasks,), with the step's dropout; nothing moves."""
        now = checkpoints.random_state(self.device)
        checkpoints.set_random_state(begun, self.device)
        means = self.losses.means(self.model, batches, steps.counts(rows, self.tasks)[0])
        checkpoints.set_random_state(now, self.device)
        return means

    def _save(self) -> None:
        with self.seen.whole(decay=False):  # what has decayed stands beside it
            checkpoints.save_training(self)

    def _kept(self) -> list[nn.Parameter]:
        """The trainable parameters, with the whole word embedding in the place of its seen rows."""
        return [self.seen.full if p is self.seen.own else p for p in self.trainable]

    def _evaluated(self) -> bool:
        """Evaluate if it is time; True when patience has run out.  An error costs no step: they are saved first."""
        try:
            return self._evaluation_due() and self.evaluate()
        except Exception:
            if self.config.checkpoint_dir and distributed.world_size() == 1:
                self._save()
            raise

    def evaluate(self) -> bool:
        """Record the metrics of the evaluation rows; True when patience has run out."""
        with self.seen.whole():
            return self._evaluate()

    def _evaluate(self) -> bool:
        run, config = self.run_, self.config
        with self.autocast():
            metrics = evaluate(self.model, self.eval_rows, tokenizer=self.tokenizer, shared=True)
        if config.patience:
            if config.metric not in metrics:
                raise ValueError(f"metric={config.metric!r}: evaluation gives {', '.join(metrics)}")
            metrics[config.metric] = distributed.from_first(metrics[config.metric], self.device)
        with uninterrupted():  # the best weights and the record of them
            if config.patience:
                if self.best is None or self._score(metrics) > self._score(self.best["metrics"]):
                    weights = [p.detach().clone() for p in self._kept()]
                    self.best = {"metrics": metrics, "weights": weights, "step": run.steps}
                    self.evaluations_since_best = 0
                else:
                    self.evaluations_since_best += 1
            run.metrics = metrics
            record = {"step": run.steps, "epoch": run.steps / self.steps_per_epoch}
            run.history.append(record | {f"eval_{name}": value for name, value in metrics.items()})
        return self._out_of_patience()

    def _out_of_patience(self) -> bool:
        return bool(self.config.patience) and self.evaluations_since_best >= self.config.patience

    def _score(self, metrics: dict[str, float]) -> float:
        """Larger is better; a metric that is not a number is the worst."""
        value = metrics[self.config.metric]
        sign = -1.0 if self.config.metric.split("/")[-1] in ("loss", "mse") else 1.0
        return -math.inf if math.isnan(value) else sign * value

    def _evaluation_due(self) -> bool:
        last = self.run_.steps == self.total
        return self.eval_rows is not None and (last or self._due(self.config.eval_every))

    def _due(self, every: int | None) -> bool:
        return self.run_.steps % (every or self.steps_per_epoch) == 0

    def _progress(self, first: int) -> Any:
        from tqdm.auto import tqdm

        hidden = not self.config.progress or distributed.rank() > 0
        if not hidden and self.run_.precision != "fp32":
            tqdm.write(f"precision {self.run_.precision}: {self.run_.reason}")
        return tqdm(total=self.total, initial=first, desc="fit", unit="step", leave=False, disable=hidden)


_SMOOTHED = ("sequence-classification", "token-classification")


def _smoothing(kind: str, config: TrainConfig) -> float:
    return config.label_smoothing if kind in _SMOOTHED else 0.0
