"""Which parameters move: full, head-only, last-layers; and how fast each of them moves.

Fine-tuning is gradient descent on a chosen subset of the parameters, θ' = θ - η ∇L(θ).  `tune` chooses the subset
by setting `requires_grad`, nothing else; `parameter_groups` gives the optimizer what is left.

To copy this module you need: tuning.py and torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

STRATEGIES = ("full", "head-only", "last-layers")
SCHEDULES = ("constant", "linear", "cosine", "exponential")


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


def tune(model: nn.Module, strategy: str = "full", *, layers: int = 2) -> TuneReport:
    """Choose which parameters train, in place; returns a report.

    Args:
        strategy: "full" moves everything; "head-only" what stands above the Transformer layers: the task head, and
            BERT's pooler, a dense layer that RoBERTa, ELECTRA and DistilBERT count as part of the head anyway;
            "last-layers" these and the last `layers` Transformer layers.
        layers: how many, for "last-layers".

    The call starts from a model with everything trainable, so calling it again changes the choice.  A frozen part
    still runs with dropout in training mode; that regularizes the head and costs nothing.
    Raises ValueError for an unknown strategy, for a model without a head, and for more layers than there are.
    Source: Howard & Ruder 2018 (arXiv:1801.06146) for training the top first.

    >>> model = nn.Module(); model.base_model = nn.Linear(3, 2); model.classifier = nn.Linear(2, 2)
    >>> tune(model, "head-only").trainable
    6
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    base = base_model_of(model)
    encoder_ids = {id(p) for p in base.parameters()}
    head = [p for p in model.parameters() if id(p) not in encoder_ids]
    if strategy != "full" and not head:
        raise ValueError(f"{strategy!r} needs a task head; load the model with task=... and num_labels=...")

    pooler = getattr(base, "pooler", None)
    moving = [model] if strategy == "full" else [*head, *([pooler] if pooler is not None else [])]
    if strategy == "last-layers":
        blocks = encoder_layers(model)
        if type(layers) is not int or not 1 <= layers <= len(blocks):
            raise ValueError(f"layers={layers!r}: the encoder has {len(blocks)}; choose 1 to {len(blocks)}")
        moving += blocks[-layers:]

    model.requires_grad_(False)
    for part in moving:
        part.requires_grad_(True)
    return report(model, strategy if strategy != "last-layers" else f"last-layers ({layers})")


def report(model: nn.Module, strategy: str = "as set") -> TuneReport:
    """Count trainable and total parameters of a model, as embeddings, layers, pooler and head."""
    groups = {name: [0, 0] for name in ("embeddings", "layers", "pooler", "head")}
    base = base_model_of(model)
    in_encoder = {id(p): name for name, p in base.named_parameters()}
    for parameter in model.parameters():
        name = in_encoder.get(id(parameter))
        if name is None:
            part = "head"
        else:
            part = next((part for part in ("embeddings", "pooler") if part in name.split(".")), "layers")
        groups[part][1] += parameter.numel()
        groups[part][0] += parameter.numel() if parameter.requires_grad else 0
    trainable, total = (sum(counts[i] for counts in groups.values()) for i in (0, 1))
    kept = {name: (t, n) for name, (t, n) in groups.items() if n}
    return TuneReport(strategy, trainable, total, kept, optimizer_bytes=2 * 4 * trainable)


def _no_decay_names(model: nn.Module) -> Iterator[str]:
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            normalizes = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "norm" in type(module).__name__.lower()
            if name == "bias" or normalizes:
                yield f"{module_name}.{name}" if module_name else name


def parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Two optimizer groups of the trainable parameters: with weight decay, and (biases, norms) without.

    Decay pulls weights towards zero; biases and normalization gains have no reason to be small.  This is the choice of
    BERT's own optimizer and of the stock `Trainer`.
    Raises ValueError when nothing is trainable.

    >>> [len(g["params"]) for g in parameter_groups(nn.Linear(2, 2), learning_rate=1e-3)]
    [1, 1]
    """
    spared = set(_no_decay_names(model))
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name in spared else decayed).append(parameter)
    if not decayed and not plain:
        raise ValueError("no parameter is trainable; call ftlib.tune(model, 'full') or set requires_grad")
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr": learning_rate},
        {"params": plain, "weight_decay": 0.0, "lr": learning_rate},
    ]
    return [group for group in groups if group["params"]]


def schedule_factor(step: int, total: int, *, schedule: str = "linear", warmup: int = 0) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (0-based) of `total`.

    After `warmup` linearly rising steps: "constant" stays at 1; "linear" falls to 0; "cosine" falls to 0 along half a
    cosine; "exponential" falls by the same ratio every step, to 0.01 at the end.

    >>> [round(schedule_factor(s, 4, warmup=1), 2) for s in range(5)]
    [0.0, 1.0, 0.67, 0.33, 0.0]
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return step / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)  # 0 after warm-up, 1 at the end
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 0.01**done
