"""Several tasks on one encoder: shared trunk, a head per task, mixed batches.

For each task we build the stock model (`AutoModelFor...`) and give it, instead of an encoder of its own, a stand-in
that hands it the shared encoder's output.  So the trunk runs once for a batch that mixes tasks, every head runs on its
own rows with Transformers' own code, and one task can be taken out as a plain Transformers model.

Whose gradient wins where tasks disagree is the subject of `balancing`.

To copy: this file, core/anatomy.py, core/batches.py, tasks/, torch and transformers.
Source: Caruana 1997, Multitask Learning; temperature sampling: Raffel et al. 2020 (T5, arXiv:1910.10683), 3.5.2;
annealed sampling: Stickland & Murray 2019 (arXiv:1902.02671), 3.
"""

import copy
import inspect
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.batches import number, one_of, whole
from ..tasks.task import DEFAULT, KINDS, TASKS, auto_class

__all__ = ["KINDS", "SAMPLERS", "Head", "MultiTaskModel", "TaskSampler"]

SAMPLERS = ("temperature", "uniform", "annealed", "remaining")


@dataclass(frozen=True)
class Head:
    """What a task needs on top of the shared encoder."""

    task: str = DEFAULT  # one of KINDS
    num_labels: int = 2
    label_names: tuple[str, ...] | None = None
    weight: float = 1.0  # of this task's loss in the sum

    def __post_init__(self) -> None:
        one_of("task", self.task, KINDS)
        whole("num_labels", self.num_labels)
        number("weight", self.weight, 0)
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"{len(self.label_names)} label_names for num_labels={self.num_labels}")


class _SharedTrunk(nn.Module):
    """Stands where a task model's own encoder was, and returns what the shared encoder computed."""

    def __init__(self, config: Any, wants_pooler: bool):
        super().__init__()
        self.config, self.output = config, None
        self.wants_pooler = wants_pooler  # BERT's text classifier reads the pooler's output; others bring their own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class MultiTaskModel(nn.Module):
    """One encoder, a head per task.

    Args:
        encoder: a Transformers encoder (`load_model(name)`), shared by all tasks.
        heads: {task name: Head}.
        seed: of the heads' first weights.

    Shapes: `input_ids`, `attention_mask` int64 (batch, tokens).  With `task=` the logits of that task for every row;
    with `rows` = {task: int64 (rows of the task,)}, as `collate` makes it, {task: logits (rows of the task, ...)}.
    Raises ValueError for an encoder that already has a head, for no heads, and for a task that is not there.
    """

    def __init__(self, encoder: nn.Module, heads: dict[str, Head], *, seed: int = 0):
        super().__init__()
        if getattr(encoder, "base_model", encoder) is not encoder:
            raise ValueError(f"{type(encoder).__name__} has a head already; pass the bare encoder: load_model(name)")
        if not isinstance(heads, dict) or not heads:
            raise ValueError(f"heads is {heads!r}; pass {{task name: ftlib.Head(...)}}, each name once")
        self.encoder, self.config = encoder, encoder.config
        self.specs, self.heads = dict(heads), nn.ModuleDict()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name, spec in heads.items():
                if not isinstance(spec, Head):
                    raise TypeError(f"heads[{name!r}] is {spec!r}; use ftlib.Head(task=..., num_labels=...)")
                if not isinstance(name, str) or not name or "." in name or hasattr(self.heads, name):
                    need = "use letters, digits, '-' and '_' (it names weights); some are taken by PyTorch's ModuleDict"
                    raise ValueError(f"task name {name!r}: {need}")
                config = copy.deepcopy(encoder.config)
                names = spec.label_names or [f"LABEL_{i}" for i in range(spec.num_labels)]
                config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
                config.problem_type = TASKS[spec.task].problem_type
                config.num_hidden_layers, layers = 0, config.num_hidden_layers  # build the head, not another encoder
                head = auto_class(spec.task).from_config(config)
                config.num_hidden_layers = layers
                wants_pooler = getattr(head.base_model, "pooler", None) is not None
                if wants_pooler and getattr(encoder, "pooler", None) is None:
                    raise ValueError(f"task {name!r} needs the encoder's pooler; load the encoder with its pooler")
                setattr(head, head.base_model_prefix, _SharedTrunk(encoder.config, wants_pooler))
                shared = next(encoder.parameters())
                self.heads[name] = head.to(shared.device, shared.dtype)
        parts = {"": encoder, **self.heads}
        self._takes = {name: set(inspect.signature(part.forward).parameters) for name, part in parts.items()}

    @property
    def tasks(self) -> dict[str, tuple[str, int]]:
        """{task name: (kind, number of labels)}."""
        return {name: (spec.task, spec.num_labels) for name, spec in self.specs.items()}

    @property
    def input_names(self) -> set[str]:
        """What encoder and heads take."""
        return set().union(*self._takes.values())

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *,
        rows: dict[str, torch.Tensor] | None = None, task: str | None = None, **inputs: torch.Tensor,
    ) -> Any:  # fmt: skip
        if (rows is None) == (task is None):
            raise ValueError("pass either task=name, for every row, or rows={task: row numbers}")
        for name in [task] if rows is None else rows:
            if name not in self.heads:
                raise ValueError(f"unknown task {name!r}; this model has {', '.join(self.heads)}")
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        # the trunk, once for all tasks
        shared = self.encoder(**{k: v for k, v in inputs.items() if k in self._takes[""]})
        if rows is None:
            return self._head(task, shared, inputs)
        logits, tensors = {}, {k: v for k, v in shared.items() if isinstance(v, torch.Tensor)}
        for name, index in rows.items():
            own = type(shared)(**{k: v[index] for k, v in tensors.items()})
            logits[name] = self._head(name, own, {k: v[index] for k, v in inputs.items() if v is not None})
        return logits

    def _head(self, name: str, shared: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        head = self.heads[name]
        head.base_model.output = shared
        try:
            return head(**{k: v for k, v in inputs.items() if k in self._takes[name]}).logits
        finally:
            head.base_model.output = None

    def export(self, name: str) -> nn.Module:
        """One task as a plain Transformers model with a copy of the encoder: same logits, `save_pretrained` works."""
        if name not in self.heads:
            raise ValueError(f"unknown task {name!r}; this model has {', '.join(self.heads)}")
        model, encoder = copy.deepcopy(self.heads[name]), copy.deepcopy(self.encoder)
        if hasattr(encoder, "pooler") and not model.base_model.wants_pooler:
            encoder.pooler = None
        setattr(model, model.base_model_prefix, encoder)
        model.config._attn_implementation = encoder.config._attn_implementation  # unpadded or not, as it is now
        for module in encoder.modules():  # one config for the whole model, as the stock constructor has it
            if hasattr(module, "config"):
                module.config = model.config
        return model.train(self.training)


class TaskSampler:
    """Draw the task of every example, from {task: number of examples}; an epoch is as many draws as examples.

    - "temperature": with probability proportional to size ** (1 / temperature).  1 is proportional to the sizes, a
      large one approaches uniform: small tasks are seen more often, and large ones less.
    - "uniform": every task alike.
    - "annealed": proportional to size ** a, with a falling evenly from 1 in the first of `epochs` to 0.2 in the last.
    - "remaining": proportional to the examples that remain of the epoch, so every example comes once an epoch.
    The same seed draws the same tasks.

    >>> TaskSampler({"big": 9000, "small": 1000}, temperature=2).probabilities
    {'big': 0.75, 'small': 0.25}
    """

    def __init__(
        self, sizes: dict[str, int], temperature: float = 1.0, seed: int = 0, *,
        how: str = "temperature", epochs: int = 1,
    ):  # fmt: skip
        if not sizes:
            raise ValueError("sizes is empty; pass {task name: number of examples}")
        for name, size in sizes.items():
            whole(f"examples of the task {name!r}", size)
        if temperature != math.inf:  # in the limit all tasks alike
            number("temperature", temperature, 1e-6)
        one_of("sampler", how, SAMPLERS)
        self.sizes, self.temperature, self.how, self.epochs = dict(sizes), temperature, how, whole("epochs", epochs)
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0
        self.order: list[str] = []  # "remaining": the tasks of what is left of the epoch

    @classmethod
    def of(cls, sizes: dict[str, int], config: Any) -> "TaskSampler":
        """As a TrainConfig asks for it."""
        epochs = config.epochs
        if config.max_steps:
            epochs = math.ceil(config.max_steps / math.ceil(sum(sizes.values()) / config.batch_size))
        return cls(sizes, config.temperature, config.seed, how=config.task_sampler, epochs=epochs)

    @property
    def probabilities(self) -> dict[str, float]:
        """{task: its probability in the next draw}."""
        power = {"temperature": 1 / self.temperature, "uniform": 0.0}.get(self.how, 1.0)
        if self.how == "annealed" and self.epochs > 1:
            epoch = min(self.drawn // sum(self.sizes.values()), self.epochs - 1)  # from 0
            power = 1 - 0.8 * epoch / (self.epochs - 1)
        left = Counter(self.order) if self.order else self.sizes
        largest = max(left.values())  # shares of it, so that no power overflows
        weights = {name: (left[name] / largest) ** power for name in self.sizes}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def draw(self, count: int) -> list[str]:
        """The tasks of the next `count` examples."""
        if self.how == "remaining":
            names = [name for name, size in self.sizes.items() for _ in range(size)]
            while len(self.order) < count:
                self.order += [names[i] for i in torch.randperm(len(names), generator=self.generator).tolist()]
            drawn, self.order = self.order[:count], self.order[count:]
            return drawn
        names, weights = zip(*self.probabilities.items(), strict=True)
        self.drawn += count
        weights = torch.tensor(weights, dtype=torch.float64)
        drawn = torch.multinomial(weights, count, replacement=True, generator=self.generator)  # (count,)
        return [names[i] for i in drawn.tolist()]
