"""Optimizer groups, and what a strategy asks of every step.

To copy: this file, methods/regularization.py, methods/speedups.py, core/anatomy.py and torch.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.anatomy import normalizes
from . import regularization


@dataclass
class Tuning:
    """What `tune` chose, and what the training loop has to do about it; `model.tuning`."""

    strategy: str
    options: dict[str, Any]
    names: tuple[str, ...] = ()  # of the parameters that train
    scales: dict[str, float] = field(default_factory=dict)  # parameter -> share of the learning rate, 1 for all others
    stages: list[list[str]] = field(default_factory=list)  # gradual unfreezing: parameters frozen at first, top first
    until: float = 0.0  # share of the steps after which all stages are free
    strength: float = 0.0  # of L2-SP
    start: dict[str, torch.Tensor] = field(default_factory=dict)  # the pretrained weights for L2-SP
    peft: Any = None  # the PeftModel around the model's modules


def tuning_of(model: nn.Module) -> Tuning | None:
    """What `tune` has set up, None for a model as it came."""
    return vars(model).get("tuning")


def parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay=0.01, spare: bool = True) -> list[dict]:
    """Optimizer groups of the trainable parameters: with weight decay, and (biases, norms) without.

    This is the choice of BERT's own optimizer and of the stock `Trainer`; spare=False lets all decay.  After
    `tune(model, "layer-decay")` there are two a layer, with "scale", the layer's share of the learning rate; after
    "l2-sp" the encoder has no decay towards zero.  Raises ValueError when nothing is trainable.

    >>> [len(g["params"]) for g in parameter_groups(nn.Linear(2, 2), learning_rate=1e-3)]
    [1, 1]
    """
    tuning = tuning_of(model) or Tuning("as set", {})
    norms = {p for module in model.modules() if normalizes(module) for p in module.parameters(recurse=False)}
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = spare and (parameter in norms or "bias" in name)  # DeBERTa's q_bias, T5's relative_attention_bias
            decayed = not spared and name not in tuning.start
            found.setdefault((tuning.scales.get(name, 1.0), decayed), []).append(parameter)
    if not found:
        raise ValueError("no parameter is trainable; call ftlib.tune(model, 'full') or set requires_grad")
    return [
        {"params": found[scale, decayed], "weight_decay": weight_decay if decayed else 0.0}
        | {"lr": learning_rate * scale, "scale": scale, "decayed": decayed}
        for scale, decayed in sorted(found, reverse=True)
    ]


def optimizer(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """The optimizer a TrainConfig asks for, on the trainable parameters."""
    rate, decay = config.learning_rate, config.weight_decay
    groups = parameter_groups(model, learning_rate=rate, weight_decay=decay, spare=config.decay_groups)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=rate, fused=fused)


def attach(optimizer: torch.optim.Optimizer, model: nn.Module, *, l1: float = 0.0) -> None:
    """Make every step that is taken do what the strategy asks of it (L2-SP), and L1 on the weights that decay."""
    tuning = tuning_of(model) or Tuning("as set", {})
    starts = {p: tuning.start[name] for name, p in model.named_parameters() if name in tuning.start}

    def moved(optimizer: torch.optim.Optimizer) -> list[tuple[dict, nn.Parameter]]:
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer is called then too, and told so
        return [] if skipped else [(group, p) for group in optimizer.param_groups for p in group["params"]]

    def towards_the_start(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, parameter in moved(optimizer):
            if parameter in starts and parameter.grad is not None:
                regularization.pull_(parameter, starts[parameter], group["lr"] * tuning.strength)

    def towards_zero(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, parameter in moved(optimizer):
            if group["decayed"]:
                regularization.shrink_(parameter, group["lr"] * l1)

    if tuning.strength:
        optimizer.register_step_pre_hook(towards_the_start)
    if l1:
        optimizer.register_step_post_hook(towards_zero)


def begin_step(model: nn.Module, step: int, total: int) -> None:
    """Gradual unfreezing: free the layers whose turn has come at step `step` (0-based) of `total`; else nothing."""
    tuning = tuning_of(model)
    if tuning is None or not tuning.stages:
        return
    end = tuning.until * total
    free = int(len(tuning.stages) * step / end) if step < end else len(tuning.stages)
    for place, stage in enumerate(tuning.stages):
        for name in stage:
            model.get_parameter(name).requires_grad_(place < free)


def described(model: nn.Module) -> str:
    """The model and its strategy in words, for a run that is to go on later: what must not be another then."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    said = {key: value for key, value in config.items() if "drop" in key or key in ("hidden_act", "activation")} | {
        "parameters": [(name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()],
        "dropout": [m.p for m in model.modules() if isinstance(m, nn.Dropout)],
        "heads": {name: repr(spec) for name, spec in getattr(model, "specs", {}).items()},
    }
    if (tuning := tuning_of(model)) is not None:
        starts = hashlib.sha256()
        for start in [*dict(sorted(tuning.start.items())).values(), *regularization.mixing(model).values()]:
            starts.update(start.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        said |= {"strategy": tuning.strategy, "options": tuning.options, "starts": starts.hexdigest()}
        if tuning.peft is not None:
            said["peft"] = tuning.peft.active_peft_config.to_dict()
    return json.dumps(said, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, (set, frozenset)) else repr(x))


def trainer_options(model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0) -> dict[str, Any]:
    """What the stock `Trainer` needs to follow a strategy: Trainer(model, ..., **trainer_options(model, ...)).

    Its own schedule goes on top.  Only "gradual-unfreezing", "layer-decay" and "l2-sp" need it.
    """
    from transformers import TrainerCallback

    class Unfreezing(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begin_step(model, state.global_step, state.max_steps)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begin_step(model, 1, 1)

    groups = parameter_groups(model, learning_rate=learning_rate, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    attach(optimizer, model)
    return {"optimizers": (optimizer, None), "callbacks": [Unfreezing()]}
