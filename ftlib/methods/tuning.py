"""Which parameters move: `tune` and its strategies.

Most strategies set `requires_grad`, nothing else.  What gradual unfreezing, layer-wise learning rates and L2-SP need of
the training loop stands in `model.tuning`, for `ftlib.fit` and, by `optimizing.trainer_options`, the stock `Trainer`.

To copy: this file, methods/{adapters,through_peft,optimizing,regularization,speedups}.py, core/{anatomy,batches}.py and
torch (peft and tasks/ for PEFT configurations).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core import anatomy
from ..core.batches import number, one_of, refuse, whole
from . import adapters, regularization, through_peft
from .optimizing import Tuning, tuning_of

OPTIONS = {  # strategy -> its options
    "full": (), "head-only": (), "last-layers": ("layers",), "frozen-embeddings": (), "bitfit": (), "layer-norm": (),
    "gradual-unfreezing": ("until", "decay"), "layer-decay": ("decay",), "l2-sp": ("strength",), "mixout": ("p",),
    "lora": ("rank", "alpha", "targets", "dropout", "rslora", "base_bits", "seed"),
    "houlsby": ("reduction", "seed"), "pfeiffer": ("reduction", "seed"),
}  # fmt: skip
STRATEGIES = tuple(OPTIONS)


@dataclass(frozen=True)
class TuneReport:
    """What `tune` left trainable; print it to see a table."""

    strategy: str
    trainable: int  # parameters that get gradients
    total: int
    groups: dict[str, tuple[int, int]]  # part of the model -> (trainable, total) parameters
    optimizer_bytes: int  # two float32 moments per trainable parameter (AdamW)

    def __str__(self) -> str:
        lines = [f"{'part':<12}{'trainable':>14}{'total':>14}"]
        lines += [f"{name:<12}{trainable:>14,}{total:>14,}" for name, (trainable, total) in self.groups.items()]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"{'all':<12}{self.trainable:>14,}{self.total:>14,}  ({share:.2f} % trainable)")
        lines.append(f"strategy {self.strategy}; AdamW keeps {self.optimizer_bytes / 2**20:.1f} MiB of moments")
        return "\n".join(lines)


def tune(model: nn.Module, strategy: Any = "full", **options: Any) -> TuneReport:
    """Choose what trains, in place; returns a report.

    Args:
        strategy, with its options; all but "full" also train the head, and with it BERT's pooler (but
            not a language model's output layer, which is pretrained).
            "full": everything.  "head-only": nothing else.  "frozen-embeddings": all Transformer layers.
            "last-layers" (layers=2): the last Transformer layers, of an encoder-decoder those of its decoder.
            "bitfit": all biases (Ben Zaken et al. 2022, arXiv:2106.10199).
            "layer-norm": all normalization layers (Qi et al. 2022, arXiv:2211.08682).
            "gradual-unfreezing" (until=0.5, decay=1.0): the head first; the layers join from the top, one after
                the other, the embeddings last, at that share of the steps (Howard & Ruder 2018, arXiv:1801.06146).
            "layer-decay" (decay=0.9): everything, each layer's learning rate `decay` times that of the layer above;
                head and last layer have the full one (same source; Sun et al. 2019, arXiv:1905.05583).
            "l2-sp" (strength=10.0): everything, pulled by learning rate * strength a step to the pretrained weights.
            "mixout" (p=0.7): everything, with dropout towards the pretrained weights; both: `regularization`.
            "lora" (rank=8, alpha=16, targets=None, dropout=0.0, rslora=False, base_bits=None): targets are endings of
                layer names, "all-linear", or None, the query and value projections; base_bits=8 or 4 keeps the
                frozen linear layers in so many bits.
            "houlsby" and "pfeiffer" (reduction=16): bottleneck adapters after attention and feed-forward, with the
                normalization layers; after feed-forward alone.  See `adapters` for these and their sources.
            a PEFT configuration (peft.LoraConfig(use_dora=True), IA3Config(), PromptTuningConfig(...)): through PEFT.
        seed (0): of the first weights of adapters.

    Calling it again changes the choice; adapters must be merged before.  Raises ValueError for an unknown strategy or
    option, for a model without a head or without what the strategy trains (biases, say), for adapters already there.

    >>> model = nn.Module(); model.base_model = nn.Linear(3, 2); model.classifier = nn.Linear(2, 2)
    >>> tune(model, "head-only").trainable
    6
    """
    named = isinstance(strategy, str)
    known = OPTIONS[one_of("strategy", strategy, STRATEGIES)] if named else ("seed",)
    if unknown := [name for name in options if name not in known]:
        takes = ", ".join(known) or "no options"
        raise ValueError(f"unknown option {unknown[0]!r}: strategy {strategy!r} takes {takes}")
    base = anatomy.base_of(model)
    words = getattr(model, "get_output_embeddings", lambda: None)()  # T5 with its head is its own base
    bare, top = base is model and words is None, anatomy.head_modules(model)
    refuse(
        (adapters.adapters_of(model) or getattr(tuning_of(model), "peft", None) is not None,
         "the model has adapters already; ftlib.merge(model) folds them in, or load the model anew"),
        ((bare and strategy != "full") or (strategy == "head-only" and not top),
         f"{strategy!r} needs a task head; load the model with task=... and num_labels=..."),
        (not named and hasattr(model, "heads"),
         "PEFT configurations are for models with one head; for several use 'lora' or an adapter"),
    )  # fmt: skip
    tuning = Tuning(strategy if named else type(strategy).__name__, dict(options))
    with torch.random.fork_rng():
        torch.manual_seed(whole("seed", options.get("seed", 0), 0))
        moving = _apply(model, base, strategy, {k: v for k, v in options.items() if k != "seed"}, tuning)
    if moving is not None:  # None: PEFT has chosen
        inside, pooler = {id(p) for p in base.parameters()}, getattr(base, "pooler", None)
        parts = [model.get_submodule(name).parameters() for name in anatomy.head_modules(model)]
        head = [p for part in (model.parameters(recurse=False), *parts) for p in part if id(p) not in inside]
        _free(model, [*moving, *head, *([pooler] if pooler is not None and strategy != "full" else [])])
    regularization.remove_mixout(model)
    if strategy == "mixout":
        regularization.add_mixout(adapters.linears(base).values(), tuning.options["p"])
    tuning.names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    model.tuning = tuning
    shown = ", ".join(f"{name}={value}" for name, value in options.items() if name != "seed")
    return report(model, f"{tuning.strategy} ({shown})" if shown else tuning.strategy)


def merge(model: nn.Module) -> nn.Module:
    """Fold adapters into the weights, in place; returns the model, same logits; ValueError for bottlenecks, prompts."""
    if (wrapper := getattr(tuning_of(model), "peft", None)) is not None:
        through_peft.merge_peft(wrapper)
    adapters.merge_own(model)
    regularization.remove_mixout(model)
    vars(model).pop("tuning", None)
    _free(model, [model])
    return model


def _free(model: nn.Module, parts: list[Any]) -> None:
    """Let these parts train and nothing else; computed tables (Marian's and Pegasus' sines) never do."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    for table in _computed(model):
        table.requires_grad_(False)


def _computed(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if "Sinusoidal" in type(m).__name__ for p in m.parameters()]


def _apply(model: nn.Module, base: nn.Module, strategy: Any, options: dict, tuning: Tuning) -> list[Any] | None:
    """What trains beside the head, None where PEFT has chosen; fills in `tuning`.  ValueError for nothing like it."""
    if not isinstance(strategy, str):
        tuning.peft = through_peft.add_peft(model, strategy, anatomy.head_modules(model))
        return None
    if strategy == "mixout":
        tuning.options["p"] = float(number("p", options.get("p", 0.7), 0, 1, below=True))
    if strategy in ("gradual-unfreezing", "layer-decay"):
        below = _downwards(model)
        decay = number("decay", options.get("decay", 0.9 if strategy == "layer-decay" else 1.0), 0, 1)
        tuning.scales = {name: decay**depth for depth, layer in enumerate(below) for name in layer if decay != 1}
        if strategy == "gradual-unfreezing":
            tuning.until, tuning.stages = float(number("until", options.get("until", 0.5), 0, 1)), below
    if strategy == "l2-sp":
        tuning.strength = number("strength", options.get("strength", 10.0), 0)
        inside = {id(p) for p in base.parameters()}
        tuning.start = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) in inside}
    if strategy in ("lora", "houlsby", "pfeiffer"):
        if strategy == "lora":
            adapters.add_lora(base, **options)
        else:
            adapters.add_bottlenecks(base, **options, attention=strategy == "houlsby")
        norms = [module for module in base.modules() if strategy == "houlsby" and anatomy.normalizes(module)]
        return [*(p for adapter in adapters.adapters_of(base).values() for p in adapter.own().values()), *norms]
    if strategy == "head-only":
        return []
    if strategy == "last-layers":
        layers = anatomy.layers(model)
        return layers[-one_of("layers", options.get("layers", 2), range(1, len(layers) + 1)) :]
    below = {id(p) for p in anatomy.embeddings(model)}
    what, found = {
        "frozen-embeddings": ("embeddings", [p for p in base.parameters() if below and id(p) not in below]),
        "bitfit": ("biases", [p for name, p in base.named_parameters() if name.endswith("bias")]),  # q_bias too
        "layer-norm": ("normalization layers", [module for module in base.modules() if anatomy.normalizes(module)]),
    }.get(strategy, ("", [model]))
    if not found:
        raise ValueError(f"no {what} found in {type(base).__name__}; choose another strategy, or set requires_grad")
    return found


def _downwards(model: nn.Module) -> list[list[str]]:
    """Names of the base's parameters, a list a layer from the top (a decoder's first) down, embeddings last."""
    top, stacks = anatomy.layers(model), anatomy.stacks(model)  # refuses models without separate layers
    stages = [*[list(layer.parameters()) for stack in stacks for layer in stack][::-1], anatomy.embeddings(model)]
    placed = {id(p) for stage in stages for p in stage}
    if len(stacks) > 1 or anatomy.kind_of(model) == "deberta-v2":  # its encoder.LayerNorm is of the table of distances
        inside = ((name, p) for name, p in anatomy.base_of(model).named_parameters() if name.startswith("encoder."))
        stages[len(top) if len(stacks) > 1 else -1] += [p for _, p in inside if id(p) not in placed]
    fixed = set(map(id, _computed(model)))
    names = {id(p): name for name, p in model.named_parameters() if id(p) not in fixed}
    return [[names[id(p)] for p in stage if id(p) in names] for stage in stages]


def report(model: nn.Module, strategy: str = "as set") -> TuneReport:
    """Count trainable and total parameters of a model, as embeddings, layers, adapters, pooler and head."""
    groups = {name: [0, 0] for name in ("embeddings", "layers", "adapters", "pooler", "head")}
    base, below = anatomy.base_of(model), {id(p) for p in anatomy.embeddings(model)}
    inside = {id(p) for p in base.parameters()}
    own = {id(p) for adapter in adapters.adapters_of(model).values() for p in adapter.own().values()}
    peft, marks = getattr(tuning_of(model), "peft", None), ()  # what stands in the names of PEFT's own parameters
    if peft:
        marks = ("prompt_encoder." if peft.active_peft_config.is_prompt_learning else f".{peft.base_model.prefix}",)
    for name, p in model.named_parameters():
        if ".original_module." in name:  # PEFT keeps the head as it came beside the one that trains
            continue
        part = "embeddings" if id(p) in below else "pooler" if "pooler" in name.split(".") else "layers"
        part = part if id(p) in inside else "head"
        part = "adapters" if id(p) in own or any(mark in name for mark in marks) else part
        groups[part][0] += p.numel() if p.requires_grad else 0
        groups[part][1] += p.numel()
    groups["layers"][1] += sum(m.codes.numel() for m in model.modules() if isinstance(m, adapters.Int8Linear))
    trainable, total = (sum(counts[i] for counts in groups.values()) for i in (0, 1))
    groups = {name: (t, n) for name, (t, n) in groups.items() if n}
    return TuneReport(strategy, trainable, total, groups, optimizer_bytes=2 * 4 * trainable)
