"""The training loop: `steps`, a generator that takes one optimizer step and yields what happened.

What a step computes is the business of `gradient`, (model, step) -> its loss, which leaves gradients behind: `summed`;
several tasks, a teacher, noise for privacy are others of that form.
To copy: this file alone.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100  # the label that counts nowhere
SCHEDULES = ("constant", "linear", "cosine", "exponential")
Batch = dict[str, Any]  # tensors on the model's device, "labels" among them
Step = list[Batch]  # the micro-batches of one optimizer step
Gradient = Callable[[nn.Module, Step], torch.Tensor]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the labeled items; logits (..., classes), labels int64 (...)."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=IGNORE)


def labeled(labels: torch.Tensor) -> int:
    return int((labels != IGNORE).sum())


def logits_of(output: Any, batch: Batch) -> torch.Tensor:
    """`output.logits`; of a model that marks answers, starts and ends, (batch, tokens, 2), -inf at padding."""
    if not hasattr(output, "start_logits"):
        return output.logits
    both, mask = torch.stack((output.start_logits, output.end_logits), -1), batch.get("attention_mask")
    return both if mask is None else both.masked_fill(mask[..., None] == 0, -math.inf)


def summed(
    loss: Callable = cross_entropy, count: Callable = labeled, autocast: Callable = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> Gradient:  # fmt: skip
    """The plain gradient: losses summed, divided by the whole step's labeled items: 1 batch of 32 is as 4 of 8.

    loss: (logits, labels) -> scalar, summed over items.  count: labels -> how many there are.
    """

    def gradient(model: nn.Module, step: Step) -> torch.Tensor:
        items = max(sum(count(batch["labels"]) for batch in step), 1)
        total = torch.zeros(())
        for batch in step:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with autocast():
                part = loss(logits_of(model(**inputs), batch), batch["labels"]) / items
            (scaler.scale(part) if scaler else part).backward()
            total = total.to(part.device) + part.detach()
        return total

    return gradient


def schedule_factor(step: int, total: int, *, schedule: str = "linear", warmup: int = 0) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (0-based) of `total`.

    After `warmup` linearly rising steps: "constant" stays at 1; "linear" falls to 0; "cosine" falls to 0 along half a
    cosine; "exponential" falls by the same ratio every step, to 0.01 at the end; "range" rises so, from 1e-5 to 1.

    >>> [round(schedule_factor(s, 4, warmup=1), 2) for s in range(5)]
    [0.0, 1.0, 0.67, 0.33, 0.0]
    """
    if schedule not in (*SCHEDULES, "range"):
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return step / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)  # 0 after warm-up, 1 at the end
    return {
        "constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "exponential": 0.01**done, "range": 1e-5 ** (1.0 - done),
    }[schedule]  # fmt: skip


def steps(
    model: nn.Module, batches: Iterable[Step], optimizer: torch.optim.Optimizer, *, total: int, first: int = 0,
    gradient: Gradient | None = None, schedule: Callable[[int, int], float] = schedule_factor,
    max_grad_norm: float | None = 1.0, scaler: torch.amp.GradScaler | None = None, whole: Callable = nullcontext,
    done: Callable[[dict], Any] = lambda record: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Steps `first` to `total` of a run; yields a record after each: step (from 1), loss, learning_rate, grad_norm.

    Args:
        batches: for every step from `first` on the list of its micro-batches, on the model's device; where they end,
            so does the run.  For one batch a step: ([batch] for batch in loader).
        optimizer: the "lr" of its groups is the peak, also afterwards; `schedule`: (step, total) -> factor.
        gradient: leaves the step's gradient in the parameters and returns its loss, a tensor; default: `summed()`.
        max_grad_norm: clip the gradient to this length; None: don't.
        scaler: a torch.amp.GradScaler, for fp16, whose overflows leave a step out; give it to `gradient` too.
        whole: a context around what must go together: weights, optimizer and `done(record)`, which may add to it.

    A step whose loss or gradient is not finite moves nothing, and its record says "skipped", but for fp16's overflows.
    The model is in train mode at every step; between two of them it is yours.  Gradients begin at zero.

    >>> model = torch.nn.Linear(1, 1)
    >>> square = lambda model, step: [loss := (model(step[0]["x"]) ** 2).sum(), loss.backward()][0]
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> [r["step"] for r in steps(model, [[{"x": torch.ones(1, 1)}]] * 9, sgd, total=2, gradient=square)]
    [1, 2]
    """
    gradient, groups = gradient or summed(scaler=scaler), optimizer.param_groups
    parameters, peaks = [p for group in groups for p in group["params"]], [group["lr"] for group in groups]
    optimizer.zero_grad(set_to_none=True)
    try:
        for number, step in zip(range(first, total), batches, strict=False):
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * schedule(number, total)
            model.train()
            loss = gradient(model, step)
            if scaler:
                scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # weights spread over processes
            value, length = torch.stack([loss.detach().float(), norm.to(loss.device).float()]).tolist()  # one wait
            good = math.isfinite(value) and (math.isfinite(length) or (scaler and scaler.get_scale() >= 1))  # overflow
            record = {"step": number + 1, "loss": value, "grad_norm": length}
            record |= {"learning_rate": max(group["lr"] for group in groups)} | ({} if good else {"skipped": True})
            if good and max_grad_norm is not None and length > max_grad_norm:
                nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
            with whole():
                if good:
                    scaler.step(optimizer) if scaler else optimizer.step()
                if scaler:
                    scaler.update()
                optimizer.zero_grad(set_to_none=True)
                done(record)
            yield record
    finally:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak
