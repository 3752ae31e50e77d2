"""Several tasks in one step of `fit`: what each counts, whose gradients are taken apart, and what is recorded.

The step's loss is Σ over tasks: Head.weight × the task's weight × its share of the rows × its mean loss over labeled
items.  With a `task_weighting` or `task_gradients` every task of the step has the same share, as in the papers, however
many of its rows were drawn.  It costs one forward and one backward pass, and
- `task_gradients`: a row of the Jacobian (4 bytes a shared parameter) for each task, and a backward pass for each task
  a row has; rows of the same tasks go through the encoder together.  `task_cosines`: this where they are recorded.
- "gradnorm": a backward pass through the last layer for each task.
- "famo": a forward pass after the step; one more before it where the step is cut into micro-batches.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..core import anatomy
from ..core.loop import Gradient, logits_of
from ..methods.balancing import GRADIENTS, TaskWeights, Weighting, cosines
from ..tasks.task import TASKS
from . import distributed
from .feeding import Step
from .recovery import random_state, set_random_state


def begin(model: nn.Module, config: Any, parts: dict, precision: str, epoch: int) -> "Joint | None":
    """What keeps the tasks of a run, None for a model of one task; `epoch`: steps an epoch.  ValueError as `Joint`."""
    if "" in parts and (config.task_sampler, config.temperature) != ("temperature", 1):
        what = f"task_sampler={config.task_sampler!r}, temperature={config.temperature}"
        raise ValueError(f"{what}: need several datasets, {{task: dataset}}")
    if hasattr(model, "tasks"):
        return Joint(model, config, precision, epoch)
    if config.task_weighting != "fixed" or config.task_gradients or config.task_cosines:
        raise ValueError("task_weighting, task_gradients and task_cosines need a MultiTaskModel")
    return None


def task_gradient(losses: "Losses", joint: "Joint | None", scaler: torch.amp.GradScaler, plain: nn.Module) -> Gradient:
    """The gradient function of `fit`: all tasks, all processes.  plain: the model, where `steps` has it wrapped."""

    def gradient(model: nn.Module, step: Step) -> torch.Tensor:
        if joint:
            joint.begin(step, losses)
        if losses.vectors and len(step) > 1:
            return as_one(losses, scaler, model, step)
        total = torch.zeros((), device=step.feed.device)
        for place, (batch, weight) in enumerate(zip(step, step.weights, strict=True)):
            with nullcontext() if place + 1 == len(step) else distributed.hold_gradients(model):
                # taken apart, gradients are exchanged by `joint`
                parts = losses.parts(plain if joint and joint.apart else model, batch, step.items, weight)
                part = joint.add(parts) if joint else sum(parts.values())
                # DDP and FSDP average gradients over processes; the loss is divided by the items of all of them already
                if part.requires_grad:  # not so for tasks whose heads are frozen, above a frozen encoder
                    scaler.scale(part * distributed.world_size()).backward()
            total += part.detach()
        if joint and joint.apart:
            joint.join()
        distributed.all_sum(total)
        step.feed.ahead()  # before anyone looks at the result
        return total

    return gradient


def as_one(losses: "Losses", scaler: torch.amp.GradScaler, model: nn.Module, step: Step) -> torch.Tensor:
    """The gradient of vectors in several micro-batches, as if in one: a loss may compare the vectors of all rows.

    They are computed without gradients, the loss gives theirs, and each micro-batch is computed again, with the same
    dropout, to take its share of these on.  Source: Gao et al. 2021 (GradCache, arXiv:2101.06983).
    """
    device = step.feed.device
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in step]

    def computed(own: dict) -> torch.Tensor:
        with losses.autocast():
            return model(**own).logits

    with torch.no_grad():
        states, found = zip(*((random_state(device), computed(own)) for own in inputs), strict=True)
    vectors = torch.cat(found).requires_grad_()
    whole = {"labels": torch.cat([batch["labels"] for batch in step])}
    value = losses.parts(lambda: SimpleNamespace(logits=vectors), whole, step.items, 1.0)[""]
    scaler.scale(value).backward()
    for own, state, gradient in zip(inputs, states, vectors.grad.split([*map(len, found)]), strict=True):
        set_random_state(state, device)
        computed(own).backward(gradient)
    step.feed.ahead()
    return value.detach()


def summed_loss(loss: Any, smoothing: float, device: torch.device, quiet: bool = False) -> Any:
    """A caller's own loss, ready for `fit`: of one of torch.nn's a copy that sums, smoothing labels if it can."""
    theirs = isinstance(loss, nn.Module) and hasattr(loss, "reduction")
    own = copy.deepcopy(loss).to(device) if theirs else copy.copy(loss) if smoothing else loss
    if not quiet and isinstance(own, nn.Module) and any(p.requires_grad for p in own.parameters()):
        warnings.warn("the loss has parameters of its own, which do not train: fit moves the model's", stacklevel=4)
    if (said := getattr(own, "reduction", "sum")) != "sum":
        own.reduction = "sum"
        if not quiet:
            text = f"{type(loss).__name__} has reduction={said!r}; fit divides by the labeled items itself"
            warnings.warn(f"{text}, so it takes reduction='sum'", stacklevel=4)
    if smoothing and loss is not None:
        if getattr(own, "label_smoothing", None) not in (0, smoothing):
            raise ValueError(f"label_smoothing={smoothing} and an own loss: smooth the labels in the loss")
        own.label_smoothing = smoothing
    if isinstance(own, nn.CrossEntropyLoss):  # which wants the classes of tags second
        return lambda x, y: own(x.flatten(0, -2), y if y.is_floating_point() else y.flatten())
    return own


class Losses:
    """What tasks lose, by {task: (logits, labels) -> sum over items}; check: look on a first batch for a mean."""

    def __init__(
        self, functions: dict, tasks: dict, r_drop: float, autocast: Callable, check: bool = False, distill: Any = None
    ):
        self.functions, self.tasks, self.r_drop, self.autocast = functions, tasks, r_drop, autocast
        self.distill, self.asked = distill, distill.asked if distill else {}
        self.unseen = set(functions) if check else set()
        self.vectors = any(TASKS[kind].vectors for kind, _ in tasks.values())

    def parts(self, forward: Callable, batch: dict, items: dict[str, int], weight: float) -> dict[str, torch.Tensor]:
        """The micro-batch's share of every task's mean loss: summed over items, divided by those of the whole step."""
        inputs, labels = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
        parts = {}
        with self.autocast():
            if "" in items and not TASKS[self.tasks[""][0]].labeled:  # summed by token_losses.in_chunks
                return {"": forward(**inputs, labels=labels).loss * weight / max(items[""], 1)}
            output = logits = forward(**inputs, **self.asked)
            again = forward(**inputs) if self.r_drop else None
            if not isinstance(labels, dict):
                labels, logits = {"": labels}, {"": logits_of(logits, batch)}
                again = again and {"": logits_of(again, batch)}
            for task in labels:
                value = self.functions[task](logits[task], labels[task])
                if (got := _what(value)) != "shape ()":
                    raise ValueError(f"the loss gives {got}; it must give one number, a tensor: the sum over items")
                if task in self.unseen and value.requires_grad:
                    self._look(task, logits[task].detach(), labels[task], value.detach())
                if again is not None:
                    apart = TASKS[self.tasks[task][0]].divergence(logits[task], again[task], labels[task])
                    value = (value + self.functions[task](again[task], labels[task])) / 2 + self.r_drop * apart
                if self.distill:
                    value = self.distill(value, output, inputs, labels[task])
                parts[task] = value * weight / max(items[task], 1)
        if "" in self.tasks and torch.is_grad_enabled() and not parts[""].requires_grad:
            raise ValueError("the loss depends on no trainable parameter; compute it from the logits, with gradients")
        return parts

    def rows(self, forward: Callable, batch: dict) -> torch.Tensor:
        """Every row's own mean loss over its labeled items, float (rows,), in which no other row has a part."""
        inputs, labels = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
        record = TASKS[self.tasks[""][0]]
        with self.autocast():
            if record.encoder_decoder:  # which comes a row at a time
                return forward(**inputs, labels=labels).loss[None] / max(int(record.items(labels)), 1)
            logits = logits_of(forward(**inputs), batch)
            each, host = zip(logits.split(1), labels.split(1), strict=True), getattr(labels, "host", labels)
            sums = torch.stack([self.functions[""](x, y) for x, y in each])
            return sums / torch.tensor([max(int(record.items(y)), 1) for y in host.split(1)], device=sums.device)

    def _look(self, task: str, logits: torch.Tensor, labels: torch.Tensor, value: torch.Tensor) -> None:
        """ValueError where the same items twice do not give twice the loss: a mean, which hangs on the batches."""
        if not torch.isfinite(value) or value == 0:  # says nothing; the next batch may
            return
        self.unseen.discard(task)
        with torch.no_grad(), _random_state_kept(logits):
            twice = self.functions[task](torch.cat([logits, logits]), torch.cat([labels, labels]))
        if abs(twice - 4 * value) < 1e-3 * abs(value) and logits.shape != labels.shape and logits.dim() == 2:
            shapes = f"logits {tuple(logits.shape)} against labels {tuple(labels.shape)}"
            raise ValueError(f"the loss pairs {shapes}: each with all; take logits[:, 0]")
        if abs(twice - value) < 1e-3 * abs(value):
            what = f"{float(value):.4g} for {len(labels)} rows and {float(twice):.4g} for the same rows twice"
            raise ValueError(f"the loss gives {what}: a mean; fit needs the sum over items, reduction='sum'")


class Joint:
    """A step: `begin`, `add` for every micro-batch, `join` where gradients are `apart`, `end` when weights moved."""

    def __init__(self, model: nn.Module, config: Any, precision: str, epoch: int):
        asked = config.task_weighting
        weighting = asked if isinstance(asked, Weighting) else Weighting(asked)
        self.model, self.config, self.epoch, self.how = model, config, epoch, weighting.how
        one = len(model.tasks) < 2
        needs = [f"task_weighting={self.how!r}"] if self.how == "gradnorm" or (one and self.how != "fixed") else []
        needs += [name for name in ("task_gradients", "task_cosines") if getattr(config, name) is not None]
        fixed = not any(p.requires_grad for p in model.encoder.parameters())
        for wrong, why in (
            (config.compile, " takes gradients a task at a time, which compiled layers can't; compile=False"),
            (precision == "fp16", ": precision 'fp16' scales gradients for one backward pass; use bf16 or fp32"),
            (one, ": the model has one task, so there is nothing to weigh or join"),
            (fixed, ": the encoder is frozen, so the tasks share no parameter that moves"),
        ):  # fmt: skip
            if needs and wrong:
                raise ValueError(needs[0] + why)
        self.place = {task: place for place, task in enumerate(model.tasks)}
        factors = [TASKS[kind].likelihood for kind, _ in model.tasks.values()]
        self.weights = TaskWeights(weighting, factors, seed=config.seed)
        how = config.task_gradients
        self.combine = GRADIENTS[how] if isinstance(how, str) else how

    def begin(self, step: Step, losses: Losses) -> None:
        """Start a step; its shares are 0 for a task without labeled items."""
        self.step, self.losses, self.begun = step, losses, random_state(step.feed.device)
        # those that move in this step: the encoder's are shared, the others the heads' own
        shared = [p for p in self.model.encoder.parameters() if p.requires_grad]
        self.parameters = shared + [p for p in self.model.heads.parameters() if p.requires_grad]
        self.shared = sum(p.numel() for p in shared)
        self.there = {task: place for task, place in self.place.items() if step.shares[task] > 0}  # tasks of this step
        alike = sum(step.shares.values()) / max(len(self.there), 1)
        even = self.how != "fixed" or self.combine is not None
        base = [self.model.specs[task].weight * (alike if even else step.shares[task]) for task in self.place]
        self.base = torch.tensor(base, dtype=torch.float64)
        self.means, self.layer = torch.zeros(len(self.place), device=step.feed.device), []
        self.weight: torch.Tensor | None = None  # of the tasks' mean losses, known before these except with "famo"
        if self.how != "famo" or len(step) > 1:
            self.weight = self.weights.weights(step.number, self._look() if self.how == "famo" else None)
        self.due = self.config.task_cosines is not None and step.number % self.config.task_cosines == 0
        self.apart, self.cosines = self.combine is not None or self.due, {}
        if self.how == "gradnorm":  # gradients of the mean losses on the last layer
            last = {id(p) for stack in anatomy.stacks(self.model)[-1:] for p in stack[-1].parameters()}
            self.layer = [p for p in shared if id(p) in last] or shared
            self.last = self.means.new_zeros(len(self.place), sum(p.numel() for p in self.layer))
        if self.apart:
            self.jacobian = self.means.new_zeros(len(self.place), sum(p.numel() for p in self.parameters))
            self.used = self.means.new_zeros(len(self.parameters))

    def add(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Take a micro-batch's share of the mean losses; returns that of the step's, without gradients if `apart`."""
        row = self._row(losses)
        self.means += row
        if self.weight is None:
            self.weight = self.weights.weights(self.step.number, self._known(row))
        factors = dict(zip(self.place, (self.base * self.weight).tolist(), strict=True))
        moving = [task for task, loss in losses.items() if loss.requires_grad]
        for task in moving if self.layer else ():
            _add_gradient(self.last[self.place[task]], losses[task], self.layer, keep=True)
        parts = {task: factors[task] * loss for task, loss in losses.items()}
        if not self.apart:
            return sum(parts.values())
        for task in moving:
            row = self.jacobian[self.place[task]]
            self.used += _add_gradient(row, parts[task], self.parameters, keep=task != moving[-1])
        return sum(parts.values()).detach()

    def join(self) -> None:
        """When all micro-batches are in: join the tasks' gradients and give them to the parameters."""
        distributed.all_sum(self.jacobian)
        distributed.all_sum(self.used)
        rows = self.jacobian[:, : self.shared]
        if len(self.there) < len(self.place):
            rows = rows[list(self.there.values())]  # (tasks of this step, shared parameters)
        if self.due:
            found = cosines(rows)
            for (i, first), (j, second) in combinations(enumerate(self.there), 2):
                if found[j, i].isfinite():
                    self.cosines[f"cosine/{first}/{second}"] = float(found[j, i])
        finite = distributed.all_sum(self.means.clone()).isfinite().all()
        joined = self._joined(rows) if self.combine and self.there and self.shared and finite else rows.sum(0)
        flat = torch.cat([joined, self.jacobian[:, self.shared :].sum(0)])
        parts = flat.split([p.numel() for p in self.parameters])
        for parameter, gradient, used in zip(self.parameters, parts, self.used.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if used else None
        del self.jacobian

    def _joined(self, rows: torch.Tensor) -> torch.Tensor:
        """What the method makes of the rows; where it draws numbers, the same on every process and in every run."""
        with _random_state_kept(rows):
            torch.manual_seed((self.config.seed * 1_000_003 + self.step.number) % 2**63)
            joined = self.combine(rows)
        if (got := _what(joined)) != (wanted := f"shape {tuple(rows.shape[1:])}"):
            given = f"task_gradients gives {got} for a jacobian {tuple(rows.shape)}"
            raise ValueError(f"{given}; it must give one gradient, {wanted}")
        return joined.detach().to(rows)

    def end(self) -> dict[str, float]:
        """Learn from the step, once it is done; returns its records: mean losses, weights, cosines."""
        losses = self._known(self.means)
        lengths = distributed.all_sum(self.last).norm(dim=1).cpu().double() if self.layer else None
        after = self._look() if self.how == "famo" else None
        if self.how != "gradnorm" or self.layer:  # not so while the whole encoder is frozen
            self.weights.learn(losses, lengths=lengths, after=after)
        if (self.step.number + 1) % self.epoch == 0:
            self.weights.end_epoch()
        record = {f"{task}/loss": float(losses[place]) for task, place in self.there.items()}
        if self.how != "fixed":
            record |= {f"{task}/weight": float(self.weight[place]) for task, place in self.there.items()}
        return record | self.cosines

    @torch.no_grad()
    def _look(self) -> torch.Tensor:
        """The tasks' mean losses on the step as the weights are now, with its dropout; nothing moves."""
        step, each = self.step, zip(self.step, self.step.weights, strict=True)
        with _random_state_kept(self.means):
            set_random_state(self.begun, step.feed.device)
            means = sum(self._row(self.losses.parts(self.model, batch, step.items, weight)) for batch, weight in each)
        return self._known(means)

    def _row(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """The numbers alone, float (tasks,), 0 for a task that is not among them."""
        none = torch.zeros((), device=self.step.feed.device)
        return torch.stack([losses.get(task, none).detach().float() for task in self.place])

    def _known(self, means: torch.Tensor) -> torch.Tensor:
        """Mean losses from this process's share of them, nan for a task without labeled items."""
        there = torch.tensor([task in self.there for task in self.place])
        return torch.where(there, distributed.all_sum(means).cpu().double(), torch.nan)


def _random_state_kept(like: torch.Tensor) -> AbstractContextManager:
    return torch.random.fork_rng([like.device] if like.is_cuda else [])


def _what(value: Any) -> str:
    """How a message shows what a function gave."""
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _add_gradient(row: torch.Tensor, loss: torch.Tensor, parameters: list[nn.Parameter], *, keep: bool) -> torch.Tensor:
    """Add the loss's gradient to a row (parameters,); returns which parameters it depends on, 0/1."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    for piece, gradient in zip(row.split([p.numel() for p in parameters]), gradients, strict=True):
        if gradient is not None:
            piece += gradient.flatten()
    return torch.tensor([float(gradient is not None) for gradient in gradients], device=row.device)
