"""Base, layers, head, embeddings of any Transformers model; who answers a module's calls.  To copy: this file alone."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_of(model: nn.Module) -> nn.Module:
    """The pretrained model inside a task model, a PEFT model, or a model with several heads (`heads`, `encoder`)."""
    model = unwrapped(model.encoder if hasattr(model, "heads") and hasattr(model, "encoder") else model)
    return getattr(model, "base_model", model)


def kind_of(model: nn.Module) -> str:
    """The model type, "bert" say, as messages name it; the name of the class where there is none."""
    return getattr(getattr(base_of(model), "config", None), "model_type", type(model).__name__)


def _lists(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """(owner, items) of the outermost lists of modules; lists in a list (Funnel's blocks) as one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            items = [layer for item in child for layer in (item if isinstance(item, nn.ModuleList) else [item])]
            yield from [(module, items)] if items else []
        else:
            yield from _lists(child)


def _found(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    base = base_of(model)
    both = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    roots = [base.get_encoder(), base.get_decoder()] if both else [base]
    found = {items[0]: (owner, items) for root in roots for owner, items in _lists(root)}.values()
    # lists of single functions, a projection for each layer say, count only where there is nothing else
    return [one for one in found if any(list(layer.children()) for layer in one[1])] or list(found)


def stacks(model: nn.Module) -> list[list[nn.Module]]:
    """The stacks of layers in forward order: one; an encoder's and a decoder's; [] without a list of modules."""
    return [items for _, items in _found(model)]


def layers(model: nn.Module) -> list[nn.Module]:
    """The stack next to the head, first layer first; ValueError for none, XLM's in parts, ALBERT's that are one."""
    base, found = base_of(model), _found(model)
    if kind_of(model) == "albert":
        raise ValueError("ALBERT's layers share one set of weights; there are no last layers to train alone")
    if not found or len({owner for owner, _ in found}) < len(found):
        raise ValueError(f"{type(base).__name__} has no list of layers")
    return found[-1][1]


def embeddings(model: nn.Module) -> list[nn.Parameter]:
    """What stands below the first layer: tables of words, positions and types, with their norms and projections."""
    base = base_of(model)
    inside = {id(p) for stack in stacks(model) for layer in stack for p in layer.parameters()}
    tables = {id(m.weight) for n, m in base.named_modules() if isinstance(m, nn.Embedding) and "bias" not in n}
    return [p for n, p in base.named_parameters() if id(p) not in inside and (id(p) in tables or "emb" in n)]


def head_modules(model: nn.Module) -> list[str]:
    """The names of what stands above the layers: the base's pooler and the task head; [] for a model without a head."""
    base, words = base_of(model), getattr(model, "get_output_embeddings", lambda: None)()
    if base is model or words is not None:  # a language model's output layer: pretrained, tied or not
        return []
    shared = {id(p) for p in base.parameters()}
    parts = [(name, child) for name, child in model.named_children() if base not in child.modules()]
    outside = [name for name, child in parts if any(id(p) not in shared for p in child.parameters())]
    pooler = getattr(base, "pooler", None)
    inside = [name for name, module in model.named_modules() if pooler is not None and module is pooler]
    return [*inside, *outside] if outside else []


def normalizes(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "norm" in type(module).__name__.lower()


_AFTER_PAD = tuple(  # model types whose position numbers start after the padding id
    "camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm mpnet roberta roberta-prelayernorm "
    "xlm-roberta xlm-roberta-xl xmod".split()
)


def max_positions(config: Any) -> int | None:
    """Longest row a model takes, in tokens; None where it does not say, or has no limit."""
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_encoder_position_embeddings", None))
    taken = (config.pad_token_id or 0) + 1 if getattr(config, "model_type", None) in _AFTER_PAD else 0
    return limit - taken if isinstance(limit, int) and limit > 0 else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Dropout off and no gradients inside; afterwards every module is in the mode (train or eval) it was in."""
    modes = {module: module.training for module in model.modules()}
    kinds = {m: m.attention_type for m in modes if hasattr(m, "set_attention_type")}  # BigBird's, set by a short row
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, kind in kinds.items():
            module.attention_type == kind or module.set_attention_type(kind)
        for module, training in modes.items():
            module.training = training


_OURS = ("forward", "_replicate_for_data_parallel")  # what `put_forward` puts into a module


def put_forward(module: nn.Module, function: Callable, *given: Any, signature: bool = False) -> None:
    """Let `function(module, *given, ...)` answer the module's calls; signature: show its own, for the Trainer."""
    module.forward = functools.partial(function, module, *given)
    module._replicate_for_data_parallel = functools.partial(_replica, module, function, given, signature)
    if signature:
        module.forward.__signature__ = inspect.signature(type(module).forward.__get__(module))


def _replica(module: nn.Module, function: Callable, given: tuple, signature: bool) -> nn.Module:
    """The module's copy on another GPU, which answers for itself (nn.DataParallel: the Trainer in one process)."""
    copy = type(module)._replicate_for_data_parallel(module)
    put_forward(copy, function, *given, signature=signature)
    return copy


def taken_by(module: nn.Module) -> Any:
    """What was put in the place of the module's own forward (`func` and `args` of `put_forward`), None if nothing."""
    return vars(module).get("forward")


def take_forward(module: nn.Module) -> None:
    for name in _OURS:
        vars(module).pop(name, None)


@contextmanager
def forwards(functions: dict[nn.Module, Callable]) -> Iterator[None]:
    """Inside, `function(module, ...)` answers each module's calls; afterwards, errors included, what did before.

    >>> with forwards({(double := nn.Identity()): lambda module, x: 2 * x}):
    ...     double(3)
    6
    """
    before = {module: {name: vars(module)[name] for name in _OURS if name in vars(module)} for module in functions}
    try:
        for module, function in functions.items():
            put_forward(module, function)
        yield
    finally:
        for module, own in before.items():
            take_forward(module)
            vars(module).update(own)
