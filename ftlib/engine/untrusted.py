"""What a folder from elsewhere may hold, asked before anything in it is built, loaded or replaced.

To copy: this file, inputs/files.py, core/, tasks/, torch and transformers.
"""

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_buffer_registration_hook as at_buffers
from torch.nn.modules.module import register_module_parameter_registration_hook as at_parameters

from ..inputs.files import read_json, refuse_kernels, said, shapes_of
from ..tasks.task import class_named

_NO_SIZES = ("seed", "key", "alpha", "step", "init", "final", "interval", "token_id", "weight")  # ends of keys
_MARKS = {"config.json": "model_type", "multitask.json": "heads", "adapter_config.json": "peft_type"}


def refuse_other_files(folder: Path) -> None:
    """Raise where saving a model to a folder would take away a file that is no model's, but is called like one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    for path, key in ((folder / inside / name, key) for name, key in _MARKS.items() for inside in (".", "encoder")):
        if path.is_file() and key not in read_json(path):
            raise ValueError(f"{path} is no model's, and a model would take its place; move it, or choose another")


def refuse_sizes(folder: Path) -> type:
    """The class of the model that config.json describes, built on no device; ValueError if larger than its weights."""
    config = read_json(folder / "config.json")
    refuse_kernels(config, f"{folder}/config.json")
    names = config.get("architectures")
    if (kind := class_named(str(names[0]) if isinstance(names, list) and names else "", config)) is None:
        raise ValueError(f"{folder}/config.json: architectures {names!r} names no Transformers model")
    shapes = {name: shape for path in folder.glob("*.safetensors") for name, shape in shapes_of(path).items()}
    if not shapes:
        raise ValueError(f"{folder} holds no .safetensors file, and no other weights are read; save the model again")
    largest = max(size for shape in shapes.values() for size in (1000, *shape))
    most = dict.fromkeys(("layer", "layers"), max(len(shapes), 100)) | {"labels": largest, "[]": max(2**20, largest)}
    for key, value in whole_numbers(config):
        if abs(value) > most.get(key[-2:] if key.endswith("[]") else key.rpartition("_")[2], math.inf):
            raise ValueError(f"{folder}/config.json: {key} is {value}, too large for the weights; mend it")
    held = sum(math.prod(shape) for shape in shapes.values())
    made = getattr(kind, "_keys_to_ignore_on_save", None) or ()  # tables that are computed
    with said(f"{folder}/config.json describes no {kind.__name__}; mend it"):
        with torch.device("meta"), _bounded(4 * held + 2**26, 10 * len(shapes) + 1000):
            twin = kind(kind.config_class.from_dict(config))
            twin.tie_weights()
        asked = sum(p.numel() for n, p in twin.named_parameters() if not any(re.search(key, n) for key in made))
    if asked > held:
        raise ValueError(f"{folder}: weights missing: config.json describes {asked} numbers, the files hold {held}")
    return kind


@contextmanager
def _bounded(numbers: int, tensors: int) -> Iterator[None]:
    """Raise ValueError as soon as the modules that this thread builds have more numbers, or tensors."""
    left, own = [numbers, tensors], threading.get_ident()

    def count(module: Any, name: str, tensor: Any) -> None:
        if tensor is not None and threading.get_ident() == own:
            left[:] = left[0] - tensor.numel(), left[1] - 1
            if min(left) < 0:
                raise ValueError(f"too large for the weights: at {name!r} of {type(module).__name__}")

    with at_parameters(count), at_buffers(count):
        yield


def whole_numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """(key, number) of all whole numbers; the key ends in [] for those in a list."""
    if isinstance(value, (dict, list)):
        inside = value.items() if isinstance(value, dict) else ((f"{key.removesuffix('[]')}[]", one) for one in value)
        for name, inner in inside:
            yield from whole_numbers(inner, name)
    elif isinstance(value, int):
        yield key, value


def refuse_large_numbers(folder: Path, weights: str, *settings: str) -> None:
    """Raise ValueError where settings describe larger matrices than a file of weights holds, before these are made."""
    shapes = shapes_of(folder / weights).values() if (folder / weights).is_file() else ()
    largest = max([4096, *(size for shape in shapes for size in shape)])
    for path in (folder / name for name in settings if (folder / name).is_file()):
        for key, value in whole_numbers(read_json(path) | {"base": None}):  # with which the base is only compared
            if abs(value) > largest and not key.endswith(_NO_SIZES):
                raise ValueError(f"{path}: {key} is {value}, too large for the weights; mend it")
