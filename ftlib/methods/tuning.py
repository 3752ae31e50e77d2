"""Which parameters move: `tune` and its strategies.

Fine-tuning is gradient descent on a chosen subset of the parameters, θ' = θ - η ∇L(θ).  Most strategies choose the
subset by setting `requires_grad`, nothing else.  LoRA and the adapters freeze the encoder and put something small
inside it.  Three need the training loop: gradual unfreezing, layer-wise learning rates, and L2-SP; what they need
stands in `model.tuning`, which `ftlib.fit` reads, and `optimizing.trainer_options` hands to the stock `Trainer`.

To copy this module you need: tuning.py, adapters.py, rows.py, optimizing.py, regularization.py, speedups.py and torch.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import adapters, regularization
from .optimizing import Tuning, normalizes, tuning_of

OPTIONS = {  # strategy -> its options
    "full": (),
    "head-only": (),
    "last-layers": ("layers",),
    "frozen-embeddings": (),
    "bitfit": (),
    "layer-norm": (),
    "gradual-unfreezing": ("until", "decay"),
    "layer-decay": ("decay",),
    "l2-sp": ("strength",),
    "mixout": ("p",),
    "lora": ("rank", "alpha", "targets", "dropout", "rslora", "base_bits", "seed"),
    "houlsby": ("reduction", "seed"),
    "pfeiffer": ("reduction", "seed"),
}
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


def base_model_of(model: nn.Module) -> nn.Module:
    """The pretrained encoder inside a task model, a PEFT model, or a MultiTaskModel."""
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    if hasattr(model, "heads") and hasattr(model, "encoder"):
        return model.encoder
    return getattr(model, "base_model", model)


def head_modules(model: nn.Module) -> list[str]:
    """The names of what stands above the Transformer layers: the task head, and the encoder's pooler."""
    base = base_model_of(model)
    outside = [name for name, c in model.named_children() if base not in c.modules() and list(c.parameters())]
    pooler = getattr(base, "pooler", None)
    inside = [name for name, module in model.named_modules() if pooler is not None and module is pooler]
    return [*inside, *outside] if outside else []


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The Transformer layers in order; the longest ModuleList inside the base model.

    Raises ValueError for models without such a list, and for ALBERT, whose layers share one set of weights.
    """
    base = base_model_of(model)
    if hasattr(getattr(base, "config", None), "num_hidden_groups"):
        raise ValueError("ALBERT's layers share one set of weights; there are no last layers to train alone")
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        raise ValueError(f"{type(base).__name__} has no list of layers")
    return list(max(lists, key=len))


def tune(model: nn.Module, strategy: Any = "full", **options: Any) -> TuneReport:
    """Choose what trains, in place; returns a report.

    Args:
        strategy, with its options; all but "full" also train the head, and BERT's pooler, a dense layer that RoBERTa,
        ELECTRA and DistilBERT count as part of the head anyway.
            "full": everything.
            "head-only": nothing else.
            "last-layers" (layers=2): and the last Transformer layers.
            "frozen-embeddings": and all Transformer layers.
            "bitfit": and all biases (Ben Zaken et al. 2022, arXiv:2106.10199).
            "layer-norm": and all normalization layers (Qi et al. 2022, arXiv:2211.08682).
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

    The call starts from a model with everything trainable, so calling it again changes the choice; adapters must be
    merged or removed before.  A frozen part still runs with dropout in training mode; that regularizes the head.
    Raises ValueError for an unknown strategy or option, for a model without a head, for adapters already there.

    >>> model = nn.Module(); model.base_model = nn.Linear(3, 2); model.classifier = nn.Linear(2, 2)
    >>> tune(model, "head-only").trainable
    6
    """
    named = isinstance(strategy, str)
    if named and strategy not in OPTIONS:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    known = OPTIONS[strategy] if named else ("seed",)
    for name in options:
        if name not in known:
            what = f"takes {', '.join(known)}" if known else "takes no options"
            raise ValueError(f"unknown option {name!r}: strategy {strategy!r} {what}")
    if adapters.adapters_of(model) or getattr(tuning_of(model), "peft", None) is not None:
        raise ValueError("the model has adapters already; ftlib.merge(model) folds them in, or load the model anew")
    base = base_model_of(model)
    encoder_ids = {id(p) for p in base.parameters()}
    head = [p for p in model.parameters() if id(p) not in encoder_ids]
    if strategy != "full" and not head:
        raise ValueError(f"{strategy!r} needs a task head; load the model with task=... and num_labels=...")
    if not named and hasattr(model, "heads"):
        raise ValueError("PEFT configurations are for models with one head; for several use 'lora' or an adapter")
    tuning = Tuning(strategy if named else type(strategy).__name__, dict(options))
    seed = options.get("seed", 0)
    if type(seed) is not int:
        raise ValueError(f"seed={seed!r}: need a whole number")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        moving = _apply(model, base, strategy, {k: v for k, v in options.items() if k != "seed"}, tuning)

    if moving is not None:  # None: PEFT has chosen
        pooler = getattr(base, "pooler", None)
        model.requires_grad_(False)
        for part in [*moving, *head, *([pooler] if pooler is not None and strategy != "full" else [])]:
            part.requires_grad_(True)
    regularization.remove_mixout(model)
    if strategy == "mixout":
        regularization.add_mixout(adapters.linears(base).values(), tuning.options["p"])
    tuning.names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    model.tuning = tuning
    shown = ", ".join(f"{name}={value}" for name, value in options.items() if name != "seed")
    return report(model, f"{tuning.strategy} ({shown})" if shown else tuning.strategy)


def merge(model: nn.Module) -> nn.Module:
    """Fold adapters into the weights, in place: a plain Transformers model with the same logits; returns it.

    A strategy without adapters leaves nothing to fold; its model is plain already.
    Raises ValueError for what is not linear in the layer's input: bottleneck adapters, prompts.
    """
    wrapper = getattr(tuning_of(model), "peft", None)
    if wrapper is not None:
        adapters.merge_peft(wrapper)
    adapters.merge_own(model)
    regularization.remove_mixout(model)
    vars(model).pop("tuning", None)
    return model.requires_grad_(True)


def _apply(model: nn.Module, base: nn.Module, strategy: Any, options: dict, tuning: Tuning) -> list[Any] | None:
    """The modules and parameters that train beside the head; fills in what the training loop has to know."""
    if not isinstance(strategy, str):
        tuning.peft = adapters.add_peft(model, strategy, head_modules(model))
        return None
    if strategy == "mixout":
        tuning.options["p"] = _share("p", options.get("p", 0.7), below=True)
    if strategy in ("full", "mixout"):
        return [model]
    if strategy == "head-only":
        return []
    if strategy == "last-layers":
        blocks, layers = encoder_layers(model), options.get("layers", 2)
        if type(layers) is not int or not 1 <= layers <= len(blocks):
            raise ValueError(f"layers={layers!r}: the encoder has {len(blocks)}; choose 1 to {len(blocks)}")
        return blocks[-layers:]
    if strategy == "frozen-embeddings":
        kept = [p for name, p in base.named_parameters() if "embed" not in name.split(".")[0]]
        if len(kept) == len(list(base.parameters())):
            raise ValueError(f"no embeddings found in {type(base).__name__}; set requires_grad yourself")
        return kept
    if strategy == "bitfit":
        return [p for name, p in base.named_parameters() if name.split(".")[-1] == "bias"]
    if strategy == "layer-norm":
        return [module for module in base.modules() if normalizes(module)]
    if strategy in ("gradual-unfreezing", "layer-decay"):
        below = _downwards(model)
        decay = _share("decay", options.get("decay", 0.9 if strategy == "layer-decay" else 1.0))
        tuning.scales = {name: decay**depth for depth, layer in enumerate(below) for name in layer if decay != 1}
        if strategy == "gradual-unfreezing":
            tuning.until, tuning.stages = _share("until", options.get("until", 0.5)), below
        return [model]
    if strategy == "l2-sp":
        strength = options.get("strength", 10.0)
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
            raise ValueError(f"strength={strength!r}: need a number of at least 0")
        tuning.strength = strength
        inside = {id(p) for p in base.parameters()}
        tuning.start = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) in inside}
        return [model]
    if strategy == "lora":
        adapters.add_lora(base, **options)
        norms = []
    else:
        adapters.add_bottlenecks(base, **options, attention=strategy == "houlsby")
        norms = [module for module in base.modules() if strategy == "houlsby" and normalizes(module)]
    return [*(p for adapter in adapters.adapters_of(base).values() for p in adapter.own().values()), *norms]


def _share(name: str, value: Any, *, below: bool = False) -> float:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not 0 <= value <= 1 or (below and value == 1):
        raise ValueError(f"{name}={value!r}: need a number from 0 to {'below ' if below else ''}1")
    return float(value)


def _downwards(model: nn.Module) -> list[list[str]]:
    """The names of the encoder's parameters, a list a layer from the top down, the last one of the embeddings.

    What stands above the layers (head, pooler, a last normalization) is not among them.
    """
    layers = encoder_layers(model)
    place = {id(p): depth for depth, layer in enumerate(reversed(layers)) for p in layer.parameters()}
    first = next(iter(layers[0].parameters()))
    lists: list[list[str]] = [[] for _ in range(len(layers) + 1)]
    below = True  # parameters come in the order of the modules: embeddings, layers, the rest
    inside = {id(p) for p in base_model_of(model).parameters()}
    for name, parameter in model.named_parameters():
        below = below and parameter is not first
        if id(parameter) in place:
            lists[place[id(parameter)]].append(name)
        elif id(parameter) in inside and (below or "embed" in name):
            lists[-1].append(name)
    return lists


def report(model: nn.Module, strategy: str = "as set") -> TuneReport:
    """Count trainable and total parameters of a model, as embeddings, layers, adapters, pooler and head."""
    groups = {name: [0, 0] for name in ("embeddings", "layers", "adapters", "pooler", "head")}
    base = base_model_of(model)
    in_encoder = {id(p): name for name, p in base.named_parameters()}
    own = {id(p) for adapter in adapters.adapters_of(model).values() for p in adapter.own().values()}
    marks = adapters.peft_marks(getattr(tuning_of(model), "peft", None))
    for full_name, parameter in model.named_parameters():
        if ".original_module." in full_name:  # PEFT keeps the head as it came beside the one that trains
            continue
        name = in_encoder.get(id(parameter))
        if id(parameter) in own or any(mark in full_name for mark in marks):
            part = "adapters"
        elif name is None:
            part = "head"
        else:
            part = next((part for part in ("embeddings", "pooler") if part in name.split(".")), "layers")
        groups[part][1] += parameter.numel()
        groups[part][0] += parameter.numel() if parameter.requires_grad else 0
    groups["layers"][1] += sum(m.codes.numel() for m in model.modules() if isinstance(m, adapters.Int8Linear))
    trainable, total = (sum(counts[i] for counts in groups.values()) for i in (0, 1))
    kept = {name: (t, n) for name, (t, n) in groups.items() if n}
    return TuneReport(strategy, trainable, total, kept, optimizer_bytes=2 * 4 * trainable)


