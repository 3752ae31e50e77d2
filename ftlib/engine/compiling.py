"""How a model runs while it trains: compiled, with gradient checkpointing, in TF32; and as it came afterwards.

To copy: this file, methods/optimizing.py, methods/regularization.py, methods/speedups.py, core/anatomy.py and torch.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..core import anatomy
from ..methods.optimizing import tuning_of
from ..methods.regularization import dropout_rate
from ..methods.speedups import shortcuts


@contextmanager
def training_modes(model: nn.Module, config: Any) -> Iterator[None]:
    """Switch on what a TrainConfig asks for; afterwards, errors included, model and torch are as they came."""
    modes = {module: module.training for module in model.modules()}
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = {module: {name: vars(module)[name] for name in names if name in vars(module)} for module in modes}
    matmul = torch.get_float32_matmul_precision()
    try:
        with ExitStack() as stack:
            if config.gradient_checkpointing:
                checkpoint_layers(model)
            if config.precision == "tf32":
                torch.set_float32_matmul_precision("high")
            if config.compile:
                stack.enter_context(compiled_layers(model))
            elif config.shortcuts:
                stack.enter_context(shortcuts(model))
            stack.enter_context(dropout_rate(model, config.dropout))
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        for module, attributes in before.items():
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(attributes)
        anatomy.restore_modes(modes)


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the input of every layer for the backward pass, which computes the layer again: less memory, more time.

    What Transformers' own switch sets, which has had two names and can't say how things were before.
    Raises ValueError for a model type without it, and for prefix tuning, whose prefix the layers would then leave out.
    """
    if getattr(tuning_of(model), "strategy", None) in ("PrefixTuningConfig", "CartridgeConfig"):
        raise ValueError("gradient_checkpointing=True drops the prefix of prefix tuning; leave it off")
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not layers:
        kind = anatomy.kind_of(model)
        raise ValueError(f"gradient_checkpointing=True: {kind} models have no gradient checkpointing")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the layers are compiled, one by one: all run the same code, so one compiled graph serves all of them.

    Lengths and batch sizes are symbols in it (dynamic=True), so ragged batches compile nothing new, except for a
    dimension of exactly 1, for evaluation and for a batch without padding.  What decides by looking at the data, such
    as dropping padding, happens between the embeddings and the first layer and stays as it is; so do hooks on layers.
    Dropout draws other numbers than uncompiled, the same for the same seed.  A model without a list of layers is
    compiled whole.
    """
    layers = [layer for stack in anatomy.stacks(model) for layer in stack] or [model]
    # the graphs of all models in this process count as variants of one layer; 8, the default, are soon used up
    with torch._dynamo.config.patch(recompile_limit=64), anatomy.forwards({one: _compiled(one) for one in layers}):
        yield


def _compiled(layer: nn.Module) -> Callable[..., Any]:
    compiled = torch.compile(layer.forward, dynamic=True)
    return lambda layer, *args, **kwargs: compiled(*args, **kwargs)
