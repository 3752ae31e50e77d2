"""Distillation: a small model made of a teacher's layers, and a teacher's part in the loss.

    student = ftlib.shrink(teacher, layers=3)
    config = ftlib.TrainConfig(distill=ftlib.Distillation(teacher, hidden=1.0))
    ftlib.fit(student, train, config=config)

To copy: this file, methods/{adapters,optimizing,regularization,speedups}.py, inputs/files.py, core/ and tasks/
(methods/{unpadding,packing}.py for a model that is unpadded).
Source: Hinton et al. 2015 (arXiv:1503.02531); Sanh et al. 2019 (DistilBERT, arXiv:1910.01108); Jiao et al. 2020
(TinyBERT, arXiv:1909.10351).
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import anatomy
from ..core.batches import IGNORE, number, one_of, refuse
from ..core.loop import Batch, Gradient, Step, logits_of
from ..inputs.files import fingerprint, said
from ..tasks.task import TASKS, tasks_of
from .adapters import adapters_of
from .optimizing import tuning_of

_ALIKE = ("vocab_size", "hidden_size", "num_attention_heads")


def evenly(layers: int, of: int) -> list[int]:
    """The numbers, from 0, of so many layers, evenly spaced, the last among them.

    >>> evenly(3, of=6)
    [1, 3, 5]
    """
    one_of("layers", layers, range(1, of + 1))
    return [(i + 1) * of // layers - 1 for i in range(layers)]


def shrink(model: nn.Module, layers: int | Sequence[int] = 3) -> nn.Module:
    """A student: a new model of the same class with some of the layers, all other weights copied; the model stays.

    layers: how many, evenly spaced, the last among them; or their numbers, counted from 0, in order.
    It is an ordinary Transformers model, whose config says how many layers it has; unpadded where the model is.
    Raises ValueError for a model with adapters, with several heads or stacks of layers, or without a list of them.
    """
    refuse(
        (hasattr(model, "heads"), "a MultiTaskModel: shrink its encoder, and put the heads on that"),
        (adapters_of(model) or getattr(tuning_of(model), "peft", None), "the model has adapters: ftlib.merge it first"),
        (hasattr(model.config, "kept_units"), "heads or neurons were removed of the model: shrink it before that"),
        (len(anatomy.stacks(model)) > 1, f"{anatomy.kind_of(model)} has layers on two sides; shrink is for one"),
    )
    stack, config = anatomy.layers(model), copy.deepcopy(model.config)
    chosen = evenly(layers, len(stack)) if isinstance(layers, int) else list(layers)
    given = chosen == sorted({*chosen} & {*range(len(stack))}) and chosen
    refuse((not given, f"layers={layers!r}: a number, or numbers from 0 to {len(stack) - 1} in order, each once"))
    for name, value in config.to_dict().items():  # layer_types: a word for every layer
        if isinstance(value, list) and len(value) == len(stack) and "layer" in name:
            vars(config)[name] = [value[i] for i in chosen]
    config.num_hidden_layers = len(chosen)
    packed = config._attn_implementation.startswith("unpadded_by_")
    config._attn_implementation = "sdpa" if packed else config._attn_implementation
    at = next(name for name, module in model.named_modules() if module is stack[0]).rpartition(".")[0]
    state = {}
    for name, tensor in model.state_dict().items():
        old, _, rest = name.removeprefix(f"{at}.").partition(".")
        inside = name.startswith(f"{at}.") and old.isdigit()
        if not inside or int(old) in chosen:
            state[f"{at}.{chosen.index(int(old))}.{rest}" if inside else name] = tensor.detach().clone()
    with said(f"{anatomy.kind_of(model)} with layers {chosen} alone is no model"), torch.random.fork_rng(devices=()):
        student = type(model)(config)
        student.load_state_dict(state, assign=True)
    student.tie_weights()
    student.to(next(model.parameters()).device).train(model.training)
    if hasattr(model, "generation_config"):
        student.generation_config = copy.deepcopy(model.generation_config)
    if packed:
        from .unpadding import unpad

        unpad(student)
    return student


class Distillation:
    """What a student loses against labels and a teacher: labels * L + logits * S + hidden * H + attention * A.

    L: the task's own loss.  S: T² KL(teacher ‖ student), both softened by the temperature T, in nats (of numbers the
    squared difference).  H: the mean squared difference of hidden states, over real tokens and width; A: of attention
    probabilities, over heads and pairs of real tokens; both means over the student's layers.  All are summed over the
    labeled items and divided by those of the step, an item having its row's H and A.

    Args:
        teacher: reads what the student reads, in eval mode; unpadded or not, whatever the student is.  For `logits` it
            needs the student's task and labels, for the others the student's width, or number of heads.
        layers: the teacher's layer, from 0, for each of the student's; default: as `shrink` chooses them.
    In a plain loop: ftlib.steps(..., gradient=Distillation(teacher).gradient()).  Without a label of its own a row
    takes part with any label where labels=0.
    Raises ValueError for weights that are none, and, as training begins, for a teacher that doesn't fit the student.
    """

    def __init__(
        self, teacher: nn.Module, *, temperature: float = 2.0, labels: float = 0.5, logits: float = 0.5,
        hidden: float = 0.0, attention: float = 0.0, layers: Sequence[int] | None = None,
    ):  # fmt: skip
        weights = {"labels": labels, "logits": logits, "hidden": hidden, "attention": attention}
        self.weights = {name: number(name, value, 0) for name, value in weights.items()}
        refuse((not any([logits, hidden, attention]), "a teacher without a part: give logits, hidden or attention"))
        self.temperature, self.layers = number("temperature", temperature, 1e-6), layers
        self.teacher = teacher
        asked = {"output_hidden_states": hidden, "output_attentions": attention}
        self.asked = {name: True for name, weight in asked.items() if weight}  # of both models' forward

    def __deepcopy__(self, memo: dict) -> "Distillation":
        return self  # a config that is copied, or written down, has the same teacher

    @cached_property
    def described(self) -> dict[str, Any]:
        """What a resumed run must share with this one."""
        own = {"temperature": self.temperature, "layers": self.layers and list(self.layers), **self.weights}
        return own | {"teacher": fingerprint(self.teacher.state_dict())}

    def begin(self, student: nn.Module) -> None:
        """Get ready for this student: ValueError where the teacher doesn't fit it; the teacher moves to its device."""
        teacher, both, weights = self.teacher, (self.teacher, student), self.weights
        refuse(
            (teacher is student, "the teacher is the student itself; pass another model, or a copy"),
            (any(hasattr(one, "heads") for one in both), "for models with one head; export the task's"),
            *((getattr(one.config, "is_encoder_decoder", False), "for models of one side, not two") for one in both),
            what="distill: ",
        )
        own, configs = tasks_of(student)[""], [anatomy.base_of(one).config for one in both]
        theirs = tasks_of(teacher)[""] if weights["logits"] else own
        self.student, self.record = student, TASKS[own[0]]
        soft = self.record.smooths or self.record.multi_hot or self.record.likelihood < 1
        words, width, heads = ([get(one) for one in configs] for get in map(attrgetter, _ALIKE))
        remedy = 'call ftlib.repad(model) and model.set_attn_implementation("eager") on both'
        eager = all(config._attn_implementation == "eager" for config in configs)
        refuse(
            (words[0] != words[1], f"the teacher knows {words[0]} tokens, the student {words[1]}; use one tokenizer"),
            (theirs != own, f"the teacher's task and labels are {theirs}, the student's {own}; mend it, or logits=0"),
            (weights["logits"] and not soft, f"{own[0]} has no classes to soften; logits=0, and hidden=1.0, say"),
            (weights["hidden"] and width[0] != width[1],
             f"hidden: the teacher is {width[0]} wide, the student {width[1]}; hidden=0, or a student of ftlib.shrink"),
            (weights["attention"] and not eager, f"attention: no probabilities are kept; {remedy}"),
            (weights["attention"] and heads[0] != heads[1],
             f"attention: the teacher has {heads[0]} heads, the student {heads[1]}; attention=0"),
            what="distill: ",
        )  # fmt: skip
        deep, need = (len(anatomy.layers(one)) if self.asked else 1 for one in both)
        self.pairs = evenly(need, deep) if self.layers is None else list(self.layers)
        fits = len(self.pairs) == need and {*self.pairs} <= {*range(deep)}
        refuse((not fits, f"distill: layers={self.layers}: need {need} of the teacher's layers, 0 to {deep - 1}"))
        teacher.to(next(student.parameters()).device)

    def __call__(self, loss: Tensor, output: Any, inputs: Batch, labels: Tensor) -> Tensor:
        """The student's own loss joined with the teacher's parts, summed over the labeled items."""
        with anatomy.evaluating(self.teacher):
            theirs = self.teacher(**inputs, **self.asked)
        loss, mask = self.weights["labels"] * loss, inputs.get("attention_mask")
        if self.weights["logits"]:
            both = logits_of(output, inputs), logits_of(theirs, inputs)
            loss = loss + self.weights["logits"] * self._soft(*both, labels)
        seen = getattr(labels, "host", labels) if self.asked else ()  # counted there, so that nothing waits for a GPU
        items = torch.tensor([float(self.record.items(one)) for one in seen], device=labels.device)  # of every row
        for name, field, first in (("hidden", "hidden_states", 1), ("attention", "attentions", 0)):
            if self.weights[name]:
                own, other = getattr(output, field)[first:], getattr(theirs, field)[first:]  # of the layers
                apart = sum(_apart(own[i], other[k], mask) for i, k in enumerate(self.pairs)) / len(self.pairs)
                loss = loss + self.weights[name] * (items * apart).sum()
        return loss

    def _soft(self, own: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
        own, theirs = own.float() / self.temperature, theirs.float() / self.temperature
        if self.record.likelihood < 1:  # numbers
            return self.temperature**2 * F.mse_loss(own, theirs, reduction="sum")
        if self.record.multi_hot:  # each label is two classes, of which one has the logit 0
            own, theirs = (torch.stack((z, torch.zeros_like(z)), -1) for z in (own, theirs))
        if self.record.prompt:  # the next token: labels stand one place behind
            own, theirs, labels = own[:, :-1], theirs[:, :-1], labels[:, 1:]
        p, q = theirs[labels != IGNORE].log_softmax(-1), own[labels != IGNORE].log_softmax(-1)
        return self.temperature**2 * F.kl_div(q, p, reduction="sum", log_target=True)

    def gradient(
        self, loss: Callable | None = None, *, autocast: Callable = nullcontext,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Gradient:  # fmt: skip
        """The gradient function for `core.loop.steps`; loss: (logits, labels) -> sum, default: the task's own."""

        def gradient(model: nn.Module, step: Step) -> Tensor:
            if (student := getattr(model, "module", model)) is not getattr(self, "student", None):
                self.begin(student)
            items = max(sum(int(self.record.items(batch["labels"])) for batch in step), 1)
            total = torch.zeros((), device=step[0]["labels"].device)
            for batch in step:
                inputs, labels = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
                with autocast():
                    output = model(**inputs, **self.asked)
                    own = (loss or self.record.loss)(logits_of(output, inputs), labels)
                    part = self(own, output, inputs, labels) / items
                (scaler.scale(part) if scaler else part).backward()
                total += part.detach()
            return total

        return gradient


def _apart(own: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """(batch,): the mean squared difference over real tokens, of (batch, tokens, width), or pairs (…, heads, n, n)."""
    each = (own.float() - theirs.float()).square().mean(2 if own.ndim == 3 else 1)  # (batch, tokens) or (batch, n, n)
    real = torch.ones(len(each), each.shape[1], device=each.device) if mask is None else mask.float()
    real = real if own.ndim == 3 else real[:, :, None] * real[:, None]
    return (each * real).flatten(1).sum(1) / real.flatten(1).sum(1)
