"""Several tasks in one step of `fit`: what each counts, whose gradients are taken apart, and what is recorded.

The step's loss is Σ over tasks: Head.weight × the task's weight × its share of the rows × its mean loss over labelled
items.  With a `task_weighting` or `task_gradients` every task of the step has the same share, as in the papers, however
many of its rows were drawn (draw them alike: task_sampler="uniform").

What it costs: one forward and one backward pass, as for one task, except
- `task_gradients`: a row of the Jacobian (4 bytes a shared parameter) for each task, and a backward pass for each task
  a row has.  Only rows of the same tasks go through the encoder together, each once, so no backward pass computes for
  rows of another task: where every row has one task, the work is that of a plain step, in smaller batches.
- `task_cosines`: the same in the steps that record them, over all rows at once.
- "gradnorm": a backward pass through the last layer for each task.
- "famo": a forward pass after the step; one more before it where the step is cut into micro-batches.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..core import anatomy
from ..core.loop import Gradient
from ..methods.balancing import GRADIENTS, TaskWeights, Weighting, cosines
from ..tasks.task import TASKS
from . import distributed
from .feeding import Step
from .recovery import random_state, set_random_state


def begin(model: nn.Module, config: Any, parts: dict, precision: str, epoch: int) -> "Joint | None":
    """What keeps the tasks of a run, None for a model of one task; `epoch`: steps an epoch.

    Raises ValueError for settings of tasks that have no meaning here, and for what `Joint` refuses.
    """
    if "" in parts and config.task_sampler != "temperature":
        raise ValueError(f"task_sampler={config.task_sampler!r} needs several datasets: {{task: dataset}}")
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
        if joint:
            joint.finish()
        return distributed.all_sum(total)

    return gradient


class Losses:
    """What the tasks lose.  functions: {task: (logits, labels) -> loss summed over items}; r_drop: its strength."""

    def __init__(
        self, functions: dict[str, Callable], tasks: dict[str, tuple[str, int]], r_drop: float, autocast: Callable
    ):
        self.functions, self.tasks, self.r_drop, self.autocast = functions, tasks, r_drop, autocast

    def parts(self, forward: Callable, batch: dict, items: dict[str, int], weight: float) -> dict[str, torch.Tensor]:
        """The micro-batch's share of every task's mean loss: summed over items, divided by those of the whole step."""
        with self.autocast():
            return self._parts(forward, batch, items, weight)

    def _parts(self, forward: Callable, batch: dict, items: dict[str, int], weight: float) -> dict[str, torch.Tensor]:
        inputs, labels = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
        logits, again = forward(**inputs), forward(**inputs) if self.r_drop else None
        if not isinstance(labels, dict):
            labels, logits, again = {"": labels}, {"": logits.logits}, again and {"": again.logits}
        parts = {}
        for task in labels:
            value = self.functions[task](logits[task], labels[task])
            if not isinstance(value, torch.Tensor) or value.dim():
                got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"the loss gives {got}; it must give one number, a tensor: the sum over items")
            if again is not None:
                apart = TASKS[self.tasks[task][0]].divergence(logits[task], again[task], labels[task])
                value = (value + self.functions[task](again[task], labels[task])) / 2 + self.r_drop * apart
            parts[task] = value * weight / max(items[task], 1)
        if "" in self.tasks and torch.is_grad_enabled() and not parts[""].requires_grad:
            raise ValueError("the loss depends on no trainable parameter; compute it from the logits, with gradients")
        return parts

    @torch.no_grad()
    def means(self, model: nn.Module, step: Step) -> torch.Tensor:
        """This process's share of the mean losses of a step, float (tasks,)."""
        means = dict.fromkeys(self.tasks, torch.zeros((), device=next(model.parameters()).device))
        for batch, weight in zip(step, step.weights, strict=True):
            for task, value in self.parts(model, batch, step.items, weight).items():
                means[task] = means[task] + value
        return torch.stack(list(means.values()))


class Joint:
    """A step: `begin`, `add` for every micro-batch, `finish` for the gradients, and `end` when the weights have moved.

    Raises ValueError for a model of one task and for settings that need each task's gradients where they can't be had.
    """

    def __init__(self, model: nn.Module, config: Any, precision: str, epoch: int):
        weighting = config.task_weighting
        weighting = weighting if isinstance(weighting, Weighting) else Weighting(weighting)
        self.how = weighting.how
        asked = {
            f"task_weighting={self.how!r}": self.how == "gradnorm", "task_gradients": config.task_gradients is not None,
            "task_cosines": config.task_cosines is not None,
        }  # fmt: skip
        for name in (name for name, on in asked.items() if on):
            if config.compile:
                raise ValueError(f"{name} takes gradients a task at a time, which compiled layers can't; compile=False")
            if precision == "fp16":
                raise ValueError(f"{name}: precision 'fp16' scales gradients for one backward pass; use bf16 or fp32")
            if not any(p.requires_grad for p in model.encoder.parameters()):
                raise ValueError(f"{name}: the encoder is frozen, so the tasks share no parameter that moves")
        self.model, self.seed, self.epoch = model, config.seed, epoch
        self.tasks = list(model.tasks)
        self.place = {task: place for place, task in enumerate(self.tasks)}
        factors = [TASKS[kind].likelihood for kind, _ in model.tasks.values()]
        self.weights = TaskWeights(weighting, factors, seed=config.seed)
        word = isinstance(config.task_gradients, str)
        self.combine = GRADIENTS[config.task_gradients] if word else config.task_gradients
        self.every = config.task_cosines
        self.even = self.how != "fixed" or self.combine is not None

    def _attach(self) -> None:
        """Take the parameters that move in this step: the encoder's are shared, the others the heads' own."""
        shared = [p for p in self.model.encoder.parameters() if p.requires_grad]
        self.parameters = shared + [p for p in self.model.heads.parameters() if p.requires_grad]
        self.shared = sum(p.numel() for p in shared)
        self.layer: list[nn.Parameter] = []
        if self.how == "gradnorm":
            last = {id(p) for stack in anatomy.stacks(self.model)[-1:] for p in stack[-1].parameters()}
            self.layer = [p for p in shared if id(p) in last] or shared

    def begin(self, step: Step, losses: "Losses") -> None:
        """Start a step; its shares are 0 for a task without labelled items."""
        shares, self.current, self.losses = step.shares, step, losses
        self.begun = random_state(step.feed.device)
        self._attach()
        device = next(self.model.parameters()).device
        self.there = torch.tensor([shares[task] > 0 for task in self.tasks])
        count = max(int(self.there.sum()), 1)
        alike = sum(shares.values()) / count
        self.base = [self.model.specs[t].weight * (alike if self.even else shares[t]) for t in self.tasks]
        self.factors: list[float] = []  # of the tasks' mean losses, known before the losses except with "famo"
        self.step = step.number
        if self.how != "famo":
            self._weigh()
        elif len(step) > 1:
            self._weigh(self._known(self._look()))
        self.due = self.every is not None and self.step % self.every == 0
        self.apart = self.combine is not None or self.due
        self.means = torch.zeros(len(self.tasks), device=device)
        if self.layer:  # gradients of the mean losses on it, for "gradnorm"
            self.last = torch.zeros(len(self.tasks), sum(p.numel() for p in self.layer), device=device)
        if self.apart:
            size = sum(p.numel() for p in self.parameters)
            self.jacobian = torch.zeros(len(self.tasks), size, device=device)
            self.used = torch.zeros(len(self.parameters), device=device)

    def add(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Take a micro-batch's share of the mean losses; returns its share of the step's loss, to go backward from.

        Where gradients are taken apart that is done here, and what is returned has none.
        """
        places = [self.place[task] for task in losses]
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.means[places] += values
        if not self.factors:
            everywhere = torch.zeros_like(self.means)
            everywhere[places] = values
            self._weigh(self._known(everywhere))
        moving = [(place, loss) for place, loss in zip(places, losses.values(), strict=True) if loss.requires_grad]
        if self.layer:
            for place, loss in moving:
                _add_gradient(self.last[place], loss, self.layer, keep=True)
        parts = [self.factors[place] * loss for place, loss in zip(places, losses.values(), strict=True)]
        if self.apart:
            for left, (place, loss) in enumerate(moving, 1 - len(moving)):
                part = self.factors[place] * loss
                self.used += _add_gradient(self.jacobian[place], part, self.parameters, keep=left < 0)
            parts = [part.detach() for part in parts]
        return sum(parts)

    def finish(self) -> None:
        """When all micro-batches are in: join the tasks' gradients and give them to the parameters."""
        distributed.all_sum(self.means)
        self.cosines: dict[str, float] = {}
        if not self.apart:
            return
        distributed.all_sum(self.jacobian)
        distributed.all_sum(self.used)
        there = self.there.nonzero().flatten().tolist()
        rows = self.jacobian[:, : self.shared]
        if len(there) < len(self.tasks):
            rows = rows[there]  # (tasks of this step, shared parameters)
        if self.due:
            found = cosines(rows)
            for i, first in enumerate(there):
                for j, second in enumerate(there[:i]):
                    if found[i, j].isfinite():
                        self.cosines[f"cosine/{self.tasks[second]}/{self.tasks[first]}"] = float(found[i, j])
        balance = self.combine and there and self.shared and self.means.isfinite().all()
        joined = self._joined(rows) if balance else rows.sum(0)
        flat = torch.cat([joined, self.jacobian[:, self.shared :].sum(0)])
        parts = flat.split([p.numel() for p in self.parameters])
        for parameter, gradient, used in zip(self.parameters, parts, self.used.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if used else None
        del self.jacobian

    def _joined(self, rows: torch.Tensor) -> torch.Tensor:
        """What the method makes of the rows; where it draws numbers, the same on every process and in every run."""
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            torch.manual_seed((self.seed * 1_000_003 + self.step) % 2**63)
            joined = self.combine(rows)
        if not isinstance(joined, torch.Tensor) or joined.shape != rows.shape[1:]:
            got = f"shape {tuple(joined.shape)}" if isinstance(joined, torch.Tensor) else type(joined).__name__
            wanted = f"one gradient, {tuple(rows.shape[1:])}"
            raise ValueError(f"task_gradients gives {got} for a jacobian {tuple(rows.shape)}; it must give {wanted}")
        return joined.detach().to(rows)

    def _look(self) -> torch.Tensor:
        """This process's share of the tasks' mean losses, float (tasks,), with the step's dropout; nothing moves."""
        device = self.current.feed.device
        now = random_state(device)
        set_random_state(self.begun, device)
        means = self.losses.means(self.model, self.current)
        set_random_state(now, device)
        return means

    def end(self) -> dict[str, float]:
        """Learn from the step, once it is done; returns its records: mean losses, weights, cosines."""
        losses = self._nan_where_absent(self.means)
        lengths = distributed.all_sum(self.last).norm(dim=1).cpu().double() if self.layer else None
        after = self._known(self._look()) if self.how == "famo" else None
        if self.how != "gradnorm" or self.layer:  # not so while the whole encoder is frozen
            self.weights.learn(losses, lengths=lengths, after=after)
        if (self.step + 1) % self.epoch == 0:
            self.weights.end_epoch()
        there = [place for place, here in enumerate(self.there.tolist()) if here]
        record = {f"{self.tasks[place]}/loss": float(losses[place]) for place in there}
        if self.how != "fixed":
            record |= {f"{self.tasks[place]}/weight": float(self.used_weights[place]) for place in there}
        return record | self.cosines

    def _weigh(self, losses: torch.Tensor | None = None) -> None:
        self.used_weights = self.weights.weights(self.step, losses)
        self.factors = [base * weight for base, weight in zip(self.base, self.used_weights.tolist(), strict=True)]

    def _known(self, means: torch.Tensor) -> torch.Tensor:
        """Mean losses from this process's share of them."""
        return self._nan_where_absent(distributed.all_sum(means))

    def _nan_where_absent(self, means: torch.Tensor) -> torch.Tensor:
        return torch.where(self.there, means.cpu().double(), torch.nan)


def _add_gradient(row: torch.Tensor, loss: torch.Tensor, parameters: list[nn.Parameter], *, keep: bool) -> torch.Tensor:
    """Add the loss's gradient to a row (parameters,); returns which parameters it depends on, 0/1."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    for piece, gradient in zip(row.split([p.numel() for p in parameters]), gradients, strict=True):
        if gradient is not None:
            piece += gradient.flatten()
    return torch.tensor([float(gradient is not None) for gradient in gradients], device=row.device)
