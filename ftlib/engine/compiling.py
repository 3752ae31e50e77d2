"""How a model runs while it trains: compiled, with gradient checkpointing, in TF32; and as it came afterwards.

To copy: this file, methods/{adapters,optimizing,regularization,speedups,token_losses}.py, core/, tasks/ and torch.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ..core import anatomy
from ..core.device import asked
from ..methods import token_losses
from ..methods.adapters import adapters_of
from ..methods.optimizing import tuning_of
from ..methods.regularization import dropout_rate
from ..methods.speedups import shortcuts
from ..tasks.task import TASKS, kind_of


@contextmanager
def training_modes(model: nn.Module, config: Any) -> Iterator[None]:
    """Switch on what a TrainConfig asks for; afterwards, errors included, model and torch are as they came."""
    names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    before = {m: {name: vars(m)[name] for name in names if name in vars(m)} for m in model.modules()}
    matmul = torch.get_float32_matmul_precision()
    try:
        with ExitStack() as stack:
            if config.gradient_checkpointing:
                checkpoint_layers(model)
            if asked(config.precision) == "tf32":
                torch.set_float32_matmul_precision("high")
            if config.compile:
                stack.enter_context(compiled_layers(model))
            elif config.shortcuts:
                stack.enter_context(shortcuts(model))
            if config.distill and config.shortcuts:
                stack.enter_context(shortcuts(config.distill.teacher))
            stack.enter_context(dropout_rate(model, config.dropout))
            if (kind := kind_of(model)) and not TASKS[kind].labeled:  # a language model sums its own loss
                stack.enter_context(token_losses.in_chunks(model, config.label_smoothing))
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        for module, attributes in before.items():
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(attributes)


@contextmanager
def float32_weights(model: nn.Module, config: Any) -> Iterator[tuple[str, str] | None]:
    """Inside, weights of half precision that train are float32; afterwards all have the type they had, rounded.

    In bfloat16 a step below 1/256 of a weight is lost.  Frozen bfloat16 weights stay (yields precision and reason) if
    they are most of the model and `config` asks for no other precision; modules that train compute in float32 there.
    """
    half = {p: p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    moving = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in half if not p.requires_grad]
    if not half:
        yield None
        return
    keep = sum(p.numel() for p in frozen) > sum(p.numel() for p in moving) and config.distributed != "fsdp"
    keep = keep and asked(config.precision) in ("auto", "bf16") and {p.dtype for p in frozen} == {torch.bfloat16}
    owners = {module: list(module.parameters(recurse=False)) for module in model.modules()} if keep else {}
    mixed = [module for module, own in owners.items() if any(p.requires_grad for p in own)]
    held = {*adapters_of(model).values()}  # these know two types; in others, Funnel's attention, children would differ
    if any(m not in held and any(map(owners.get, m.children())) for m in mixed):
        keep, owners, mixed = False, {}, []
    inside, hooks = set(anatomy.base_of(model).modules()), []
    try:
        for p in [p for module in mixed for p in owners[module]] if keep else half:
            p.data = p.data.float()
        for module, own in owners.items():
            if own:
                hooks.append(module.register_forward_pre_hook(partial(_cast, own[0].dtype), with_kwargs=True))
            if module in mixed and module in inside:  # the head's logits stay float32
                hooks.append(module.register_forward_hook(lambda module, _, out: _cast(torch.bfloat16, module, out)[0]))
        yield ("bf16", "the frozen weights are bfloat16; those that train are float32 meanwhile") if keep else None
    finally:
        for hook in hooks:
            hook.remove()
        for p, dtype in half.items():
            p.data = p.data.to(dtype)


def _cast(dtype: torch.dtype, module: nn.Module, *given: Any) -> tuple:
    """What a module takes or gives, its float tensors in another type."""
    return tree_map_only(torch.Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, given)


def checkpoint_layers(model: nn.Module) -> None:
    """Keep every layer's input alone, and compute it again in the backward pass; ValueError for a model that can't."""
    if getattr(tuning_of(model), "strategy", None) in ("PrefixTuningConfig", "CartridgeConfig"):
        raise ValueError("gradient_checkpointing=True drops the prefix of prefix tuning; leave it off")
    # what Transformers' own switch sets, which has had two names and can't say how things were before
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not layers:
        raise ValueError(f"gradient_checkpointing=True: {anatomy.kind_of(model)} models have no gradient checkpointing")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the layers are compiled, one by one: all run the same code, so one compiled graph serves all of them.

    Lengths and batch sizes are symbols in it, so ragged batches compile nothing new, except for a dimension of 1, for
    evaluation and for a batch without padding.  Unpadding and hooks on layers stay.  Dropout draws other numbers than
    uncompiled, the same for the same seed.  A model without a list of layers is compiled whole.
    """
    layers = [layer for stack in anatomy.stacks(model) for layer in stack] or [model]
    compiled = {layer: torch.compile(layer.forward, dynamic=True) for layer in layers}
    answers = dict.fromkeys(layers, lambda layer, *args, **kwargs: compiled[layer](*args, **kwargs))
    # the graphs of all models in this process count as variants of one layer; 8, the default, are soon used up
    with torch._dynamo.config.patch(recompile_limit=64), anatomy.forwards(answers):
        yield
