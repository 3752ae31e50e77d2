"""How a model runs while it trains: compiled, with gradient checkpointing, in TF32; and as it came afterwards.

To copy this module you need: modes.py, optimizing.py, regularization.py, speedups.py, batching.py, rows.py and torch
(unpadding.py for compile="reduce-overhead").
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..inputs.tokenizing import restore_modes
from ..methods.optimizing import tuning_of
from ..methods.regularization import dropout_rate
from ..methods.speedups import shortcuts


@contextmanager
def training_modes(model: nn.Module, config: Any) -> Iterator[None]:
    """Switch on what a TrainConfig asks for; afterwards, errors included, model and torch are as they came."""
    modes = {module: module.training for module in model.modules()}
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    matmul = torch.get_float32_matmul_precision()
    try:
        if config.gradient_checkpointing:
            checkpoint_layers(model)
        if config.compile is True:
            compile_layers(model)
        if config.precision == "tf32":
            torch.set_float32_matmul_precision("high")
        if config.compile:
            # the graphs of all models in this process count as variants of one layer; 8, the default, are soon used up
            quicker = torch._dynamo.config.patch(recompile_limit=64)
        else:
            quicker = shortcuts(model) if config.shortcuts else nullcontext()
        with quicker, dropout_rate(model, config.dropout):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        for module, before in attributes:
            for name in ("forward", "gradient_checkpointing", "_gradient_checkpointing_func"):
                vars(module).pop(name, None)
                vars(module).update({name: before[name]} if name in before else {})
        restore_modes(modes)


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the input of every layer for the backward pass, which computes the layer again: less memory, more time.

    What Transformers' own switch sets, which has had two names and can't say how things were before.
    Raises ValueError for a model type without it, and for prefix tuning, whose prefix the layers would then leave out.
    """
    if getattr(tuning_of(model), "strategy", None) in ("PrefixTuningConfig", "CartridgeConfig"):
        raise ValueError("gradient_checkpointing=True drops the prefix of prefix tuning; leave it off")
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not layers:
        raise ValueError(f"gradient_checkpointing=True: {_type(model)} models have no gradient checkpointing")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def compile_layers(model: nn.Module) -> None:
    """Compile the layers one by one: all run the same code, so one compiled graph serves all of them.

    Lengths and batch sizes are symbols in it (dynamic=True), so ragged batches compile nothing new, except for a
    dimension of exactly 1, for evaluation and for a batch without padding.  What decides by looking at the data, such
    as dropping padding, happens between the embeddings and the first layer and stays as it is; so do hooks on layers.
    Dropout draws other numbers than uncompiled, the same for the same seed.  A model without a list of layers is
    compiled whole.
    """
    for layer in list(dict.fromkeys(_layers(model))) or [model]:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The items of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def captured(model: nn.Module, wrapped: nn.Module) -> Callable[..., Any]:
    """The whole forward pass for compile="reduce-overhead": on a GPU one CUDA graph a shape, started as one.

    For small batches, where the GPU waits for Python to launch kernels.  A graph has fixed shapes, so the batches
    must come in few of them.  Raises ValueError for an unpadded model, several tasks and several processes.
    """
    from ..methods.unpadding import is_unpadded

    if is_unpadded(model):
        raise ValueError("compile='reduce-overhead' needs batches of few shapes; ftlib.repad(model), or compile=True")
    if hasattr(model, "tasks"):
        raise ValueError("compile='reduce-overhead' needs one task: the rows of a task vary; use compile=True")
    if wrapped is not model:
        raise ValueError("compile='reduce-overhead' is for one process; use compile=True")
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=True)

    def forward(**batch: torch.Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**batch)

    return forward


def own_gradients(parameters: list[nn.Parameter]) -> None:
    """Copy gradients out of a CUDA graph's memory, which the next micro-batch overwrites."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def _type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)
