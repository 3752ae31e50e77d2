"""Several tasks on one encoder: shared trunk, a head per task, mixed batches.

Each task's stock model (`AutoModelFor...`) gets, instead of an encoder of its own, a stand-in that hands it the shared
one's output.  So the trunk runs once for a batch that mixes tasks, and every head on its own rows with Transformers'
own code.  Where a stock model hands its encoder more than its own inputs (T5, Longformer), the trunk runs for that
task's rows alone.

To copy: this file, core/{anatomy,batches,loop}.py, tasks/, torch and transformers.
Source: Caruana 1997, Multitask Learning; temperature sampling: Raffel et al. 2020 (T5, arXiv:1910.10683), 3.5.2;
annealed sampling: Stickland & Murray 2019 (arXiv:1902.02671), 3.
"""

import copy
import inspect
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core import anatomy
from ..core.batches import number, one_of, refuse, whole
from ..core.loop import logits_of
from ..tasks.task import DEFAULT, KINDS, TASKS, auto_class

SAMPLERS = ("temperature", "uniform", "annealed", "remaining")


@dataclass(frozen=True)
class Head:
    """What a task needs on top of the shared encoder."""

    task: str = DEFAULT  # one of KINDS
    num_labels: int = 2
    label_names: tuple[str, ...] | None = None
    weight: float = 1.0  # of this task's loss in the sum

    def __post_init__(self) -> None:
        one_of("task", self.task, [kind for kind in KINDS if TASKS[kind].labeled and not TASKS[kind].vectors])
        fixed = TASKS[self.task].outputs
        refuse((fixed not in (None, whole("num_labels", self.num_labels)), f"{self.task} has num_labels={fixed}"))
        number("weight", self.weight, 0)
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"{len(self.label_names)} label_names for num_labels={self.num_labels}")


class _SharedTrunk(nn.Module):
    """Stands where a task model's own encoder was: hands on what the shared one computed, or lets it compute."""

    def __init__(self, trunk: nn.Module, wants_pooler: bool):
        super().__init__()
        self.trunk = (trunk,)  # in a tuple: no module of the head's
        self.config, self.wants_pooler = trunk.config, wants_pooler  # BERT's text classifier reads the pooler's output
        self.given: set[int] = set()  # ids of the tensors for which `shared` makes the output
        self.shared: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        asked = {id(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)}
        return self.shared() if asked <= self.given else self.trunk[0](*args, **kwargs)


class MultiTaskModel(nn.Module):
    """One encoder, a head per task.

    Args:
        encoder: a Transformers encoder, decoder or encoder-decoder (`load_model(name)`), shared by all tasks.
        heads: {task name: Head}.
        seed: of the heads' first weights.

    Shapes: `input_ids`, `attention_mask` int64 (batch, tokens).  With `task=` the logits of that task for every row;
    with `rows` = {task: int64 (rows of the task,)}, as `collate` makes it, {task: logits (rows of the task, ...)}.
    Raises ValueError for an encoder that has a head, for no heads, for a kind of task without a head in Transformers.
    """

    def __init__(self, encoder: nn.Module, heads: dict[str, Head], *, seed: int = 0):
        super().__init__()
        if getattr(encoder, "base_model", encoder) is not encoder:
            what = f"{type(encoder).__name__} has a head already, or is PEFT's wrapper"
            raise ValueError(f"{what}; pass the bare encoder: load_model(name)")
        if not isinstance(heads, dict) or not heads:
            raise ValueError(f"heads is {heads!r}; pass {{task name: ftlib.Head(...)}}, each name once")
        self.encoder, self.config = encoder, encoder.config
        self.specs, self.heads = dict(heads), nn.ModuleDict()
        self._takes = {"": set(inspect.signature(encoder.forward).parameters)}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name, spec in heads.items():
                if not isinstance(spec, Head):
                    raise TypeError(f"heads[{name!r}] is {spec!r}; use ftlib.Head(task=..., num_labels=...)")
                if not isinstance(name, str) or not name or "." in name or hasattr(self.heads, name):
                    need = "use letters, digits, '-' and '_' (it names weights); some are taken by PyTorch's ModuleDict"
                    raise ValueError(f"task name {name!r}: {need}")
                self.heads[name] = self._built(name, spec)
                self._takes[name] = set(inspect.signature(self.heads[name].forward).parameters)
        self.input_names = set().union(*self._takes.values())

    def _built(self, name: str, spec: Head) -> nn.Module:
        """The stock model for this task, on the stand-in; its head drawn as Transformers draws it."""
        config = copy.deepcopy(self.config)
        names = spec.label_names or [f"LABEL_{i}" for i in range(spec.num_labels)]
        config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        config.problem_type = TASKS[spec.task].problem_type
        try:
            with torch.device("meta"):  # where a second encoder takes no memory
                head = auto_class(spec.task).from_config(config)
        except (ValueError, LookupError) as error:
            why = f"Transformers has no head for {spec.task} on {anatomy.kind_of(self.encoder)} models"
            raise ValueError(f"task {name!r}: {why} ({str(error).splitlines()[0][:120]})") from error
        stock, kind = head.base_model, type(self.encoder).__name__
        if type(stock) is not type(self.encoder):
            why = f"{type(head).__name__} stands on a {type(stock).__name__}, and can't share this {kind}; pass that"
            raise ValueError(f"task {name!r}: {why}, or another encoder")
        pooled = getattr(stock, "pooler", None) is not None
        if pooled and getattr(self.encoder, "pooler", None) is None:
            raise ValueError(f"task {name!r} needs the encoder's pooler; load the encoder with its pooler")
        setattr(head, head.base_model_prefix, _SharedTrunk(self.encoder, pooled))
        head.to_empty(device="cpu")
        for module in head.modules():  # as the constructors would off the meta device, then as Transformers does
            vars(module).pop("_is_hf_initialized", None)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        head.initialize_weights()
        shared = next(self.encoder.parameters())
        return head.to(shared.device, shared.dtype).train(self.encoder.training)

    @property
    def tasks(self) -> dict[str, tuple[str, int]]:
        """{task name: (kind, number of labels)}."""
        return {name: (spec.task, spec.num_labels) for name, spec in self.specs.items()}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *,
        rows: dict[str, torch.Tensor] | None = None, task: str | None = None, **inputs: torch.Tensor,
    ) -> Any:  # fmt: skip
        if (rows is None) == (task is None):
            raise ValueError("pass either task=name, for every row, or rows={task: row numbers}")
        rows = {task: slice(None)} if rows is None else rows
        heads = {name: self._known(name) for name in rows}
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        logits, whole = {}, []  # whole: the output for all rows, once a task has asked for its share

        def share(index: Any) -> Any:
            if not whole:
                whole.append(self.encoder(**{k: v for k, v in inputs.items() if k in self._takes[""]}))
            return type(whole[0])(**{k: v[index] for k, v in whole[0].items() if isinstance(v, torch.Tensor)})

        for name, index in rows.items():
            head, trunk = heads[name], heads[name].base_model
            own = {k: v[index] for k, v in inputs.items() if v is not None and k in self._takes[name]}
            head.config.pad_token_id = self.config.pad_token_id  # by which a decoder's head finds the last token
            trunk.given, trunk.shared = set(map(id, own.values())), partial(share, index)
            try:
                logits[name] = logits_of(head(**own), own)
            finally:
                trunk.given, trunk.shared = set(), None
        return logits if task is None else logits[task]

    def _known(self, name: str) -> nn.Module:
        if name not in self.heads:
            raise ValueError(f"unknown task {name!r}; this model has {', '.join(self.heads)}")
        return self.heads[name]

    def export(self, name: str) -> nn.Module:
        """One task as a plain Transformers model with a copy of the encoder: same logits, `save_pretrained` works."""
        model = copy.deepcopy(self._known(name))
        (encoder,) = model.base_model.trunk
        if hasattr(encoder, "pooler") and not model.base_model.wants_pooler:
            encoder.pooler = None
        setattr(model, model.base_model_prefix, encoder)
        shared, model.config.pad_token_id = encoder.config, self.config.pad_token_id
        model.config._attn_implementation = shared._attn_implementation  # unpadded or not, as it is now
        for module in encoder.modules():  # one config for the whole model, as the stock constructor has it
            if getattr(module, "config", None) is shared:  # T5's encoder and decoder have their own
                module.config = model.config
        return model.train(self.training)


class TaskSampler:
    """Draw the task of every example, from {task: number of examples}; an epoch is as many draws as examples.

    - "temperature": with probability proportional to size ** (1 / temperature); a large one approaches "uniform".
    - "annealed": proportional to size ** a, with a falling evenly from 1 in the first of `epochs` to 0.2 in the last.
    - "remaining": proportional to the examples that remain of the epoch, so every example comes once an epoch.
    The same seed draws the same tasks.

    >>> TaskSampler({"big": 9000, "small": 1000}, temperature=2).probabilities
    {'big': 0.75, 'small': 0.25}
    """

    def __init__(self, sizes: dict, temperature: float = 1.0, seed: int = 0, *, how: str = "temperature", epochs=1):
        if not sizes:
            raise ValueError("sizes is empty; pass {task name: number of examples}")
        for name, size in sizes.items():
            whole(f"examples of the task {name!r}", size)
        if temperature != math.inf:  # in the limit all tasks alike
            number("temperature", temperature, 1e-6)
        one_of("sampler", how, SAMPLERS)
        self.sizes, self.temperature, self.how, self.epochs = dict(sizes), temperature, how, whole("epochs", epochs)
        self.generator, self.drawn = torch.Generator().manual_seed(seed), 0
        self.order: list[str] = []  # "remaining": the tasks of what is left of the epoch

    @classmethod
    def of(cls, sizes: dict[str, int], config: Any) -> "TaskSampler":
        """As a TrainConfig asks for it."""
        epoch = math.ceil(sum(sizes.values()) / config.batch_size)  # steps
        epochs = math.ceil(config.max_steps / epoch) if config.max_steps else config.epochs
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
