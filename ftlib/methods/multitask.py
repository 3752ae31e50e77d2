"""Several tasks on one encoder: shared trunk, a head per task, mixed batches.

A head here is exactly what the stock task model puts on top of its encoder.  For each task we build the stock model
(`AutoModelFor...`) and give it, instead of an encoder of its own, a stand-in that hands it the shared encoder's
output.  So the trunk runs once for a batch that mixes tasks, every head runs on its own rows with Transformers' own
code, and one task can be taken out as a plain Transformers model.

Whose gradient wins where tasks disagree is the subject of `balancing`; its `pcgrad`, `cagrad`, `mgda` are here too.

To copy this module you need: multitask.py, balancing.py, torch and transformers.
Source: Caruana 1997, Multitask Learning; temperature sampling: Raffel et al. 2020 (T5, arXiv:1910.10683), 3.5.2;
annealed sampling: Stickland & Murray 2019 (arXiv:1902.02671), 3.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from .balancing import cagrad, mgda, pcgrad

__all__ = ["KINDS", "SAMPLERS", "Head", "MultiTaskModel", "TaskSampler", "cagrad", "mgda", "pcgrad"]

KINDS = ("sequence-classification", "multi-label-classification", "regression", "token-classification")
SAMPLERS = ("temperature", "uniform", "annealed", "remaining")
_PROBLEM = {
    "sequence-classification": "single_label_classification",
    "multi-label-classification": "multi_label_classification",
    "regression": "regression",
}


@dataclass(frozen=True)
class Head:
    """What a task needs on top of the shared encoder."""

    task: str = "sequence-classification"  # one of KINDS
    num_labels: int = 2
    label_names: tuple[str, ...] | None = None
    weight: float = 1.0  # of this task's loss in the sum

    def __post_init__(self) -> None:
        if self.task not in KINDS:
            raise ValueError(f"unknown task {self.task!r}; choose one of {', '.join(KINDS)}")
        if type(self.num_labels) is not int or self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels!r}: need a whole number of at least 1")
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"{len(self.label_names)} label_names for num_labels={self.num_labels}")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight={self.weight}: need a number of at least 0")


class _SharedTrunk(nn.Module):
    """Stands where a task model's own encoder was, and returns what the shared encoder computed."""

    def __init__(self, config: Any, wants_pooler: bool):
        super().__init__()
        self.config = config
        self.wants_pooler = wants_pooler  # BERT's text classifier reads the pooler's output; others bring their own
        self.output: Any = None

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
        import transformers

        if getattr(encoder, "base_model", encoder) is not encoder:
            raise ValueError(f"{type(encoder).__name__} has a head already; pass the bare encoder: load_model(name)")
        if not isinstance(heads, dict) or not heads:
            raise ValueError(f"heads is {heads!r}; pass {{task name: ftlib.Head(...)}}, each name once")
        self.encoder = encoder
        self.config = encoder.config
        self.specs = dict(heads)
        self.heads = nn.ModuleDict()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name, spec in heads.items():
                if not isinstance(spec, Head):
                    raise TypeError(f"heads[{name!r}] is {spec!r}; use ftlib.Head(task=..., num_labels=...)")
                if not isinstance(name, str) or not name or "." in name:
                    raise ValueError(f"task name {name!r}: use letters, digits, '-' and '_' (it names weights)")
                if hasattr(self.heads, name):
                    raise ValueError(f"task name {name!r} is taken by PyTorch's ModuleDict; choose another")
                config = copy.deepcopy(encoder.config)
                names = spec.label_names or [f"LABEL_{i}" for i in range(spec.num_labels)]
                config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
                config.problem_type = _PROBLEM.get(spec.task)
                config.num_hidden_layers, layers = 0, config.num_hidden_layers  # build the head, not another encoder
                kind = "Token" if spec.task == "token-classification" else "Sequence"
                head = getattr(transformers, f"AutoModelFor{kind}Classification").from_config(config)
                config.num_hidden_layers = layers
                wants_pooler = getattr(head.base_model, "pooler", None) is not None
                if wants_pooler and getattr(encoder, "pooler", None) is None:
                    raise ValueError(f"task {name!r} needs the encoder's pooler; load the encoder with its pooler")
                setattr(head, head.base_model_prefix, _SharedTrunk(encoder.config, wants_pooler))
                shared = next(encoder.parameters())
                self.heads[name] = head.to(shared.device, shared.dtype)

    @property
    def tasks(self) -> dict[str, tuple[str, int]]:
        """{task name: (kind, number of labels)}."""
        return {name: (spec.task, spec.num_labels) for name, spec in self.specs.items()}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        *,
        rows: dict[str, torch.Tensor] | None = None,
        task: str | None = None,
    ) -> Any:
        if (rows is None) == (task is None):
            raise ValueError("pass either task=name, for every row, or rows={task: row numbers}")
        for name in [task] if rows is None else rows:
            if name not in self.heads:
                raise ValueError(f"unknown task {name!r}; this model has {', '.join(self.heads)}")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        shared = self.encoder(**inputs)  # the trunk, once for all tasks
        if rows is None:
            return self._head(task, shared, inputs)
        return {
            name: self._head(name, _take(shared, index), {k: v[index] for k, v in inputs.items() if v is not None})
            for name, index in rows.items()
        }

    def _head(self, name: str, shared: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        head = self.heads[name]
        trunk = getattr(head, head.base_model_prefix)
        trunk.output = shared
        try:
            return head(**inputs).logits
        finally:
            trunk.output = None

    def export(self, name: str) -> nn.Module:
        """One task as a plain Transformers model with a copy of the encoder: same logits, `save_pretrained` works."""
        if name not in self.heads:
            raise ValueError(f"unknown task {name!r}; this model has {', '.join(self.heads)}")
        model = copy.deepcopy(self.heads[name])
        encoder = copy.deepcopy(self.encoder)
        if not self.heads[name].base_model.wants_pooler and getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        setattr(model, model.base_model_prefix, encoder)
        model.config._attn_implementation = encoder.config._attn_implementation  # unpadded or not, as it is now
        for module in encoder.modules():  # one config for the whole model, as the stock constructor has it
            if hasattr(module, "config"):
                module.config = model.config
        return model.train(self.training)


def _take(shared: Any, index: torch.Tensor) -> Any:
    """The rows `index` of an encoder's output."""
    return type(shared)(**{key: value[index] for key, value in shared.items() if isinstance(value, torch.Tensor)})


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
            if type(size) is not int or size < 1:
                raise ValueError(f"task {name!r} has {size!r} examples; every task needs at least one")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0 (1 proportional, large towards uniform)")
        if how not in SAMPLERS:
            raise ValueError(f"unknown sampler {how!r}; choose one of {', '.join(SAMPLERS)}")
        if type(epochs) is not int or epochs < 1:
            raise ValueError(f"epochs={epochs!r}: need a whole number of at least 1")
        self.sizes, self.temperature, self.how, self.epochs = dict(sizes), temperature, how, epochs
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0
        self.order: list[str] = []  # "remaining": the tasks of what is left of the epoch

    @property
    def probabilities(self) -> dict[str, float]:
        """{task: its probability in the next draw}."""
        if self.how == "remaining":
            left = self.order or list(self._repeated())
            return {name: left.count(name) / len(left) for name in self.sizes}
        power = 1 / self.temperature
        if self.how == "uniform":
            power = 0.0
        elif self.how == "annealed" and self.epochs > 1:
            epoch = min(self.drawn // sum(self.sizes.values()), self.epochs - 1)  # from 0
            power = 1 - 0.8 * epoch / (self.epochs - 1)
        largest = max(self.sizes.values())  # shares of it, so that no power overflows
        weights = {name: (size / largest) ** power for name, size in self.sizes.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def draw(self, count: int) -> list[str]:
        """The tasks of the next `count` examples."""
        if self.how == "remaining":
            while len(self.order) < count:
                names = list(self._repeated())
                self.order += [names[i] for i in torch.randperm(len(names), generator=self.generator).tolist()]
            drawn, self.order = self.order[:count], self.order[count:]
            return drawn
        probabilities = self.probabilities
        names = list(probabilities)
        weights = torch.tensor(list(probabilities.values()), dtype=torch.float64)
        self.drawn += count
        drawn = torch.multinomial(weights, count, replacement=True, generator=self.generator)  # (count,)
        return [names[i] for i in drawn.tolist()]

    def _repeated(self) -> Iterator[str]:
        return chain.from_iterable([name] * size for name, size in self.sizes.items())
