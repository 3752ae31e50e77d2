"""What a folder from elsewhere may hold, asked before anything in it is built, loaded or replaced.

To copy: this file and inputs/files.py.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..inputs.files import read_json, shapes_of

_MARKS = {"config.json": "model_type", "multitask.json": "heads", "adapter_config.json": "peft_type"}
_ENDINGS = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")  # what save_pretrained and people write


def refuse_other_files(folder: Path) -> None:
    """Raise unless the folder is absent, empty, or holds a model and nothing that can't be one's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    entries, marks = sorted(folder.iterdir()) if folder.is_dir() else [], _MARKS.items()
    if entries and not any((folder / mark).is_file() and key in read_json(folder / mark) for mark, key in marks):
        raise ValueError(f"{folder} holds files but no model; choose another folder, or empty it")
    for entry in entries:
        if entry.name != "encoder" if entry.is_dir() else entry.suffix not in _ENDINGS:
            raise ValueError(f"{folder} holds more than a model: {entry.name}; choose another folder, or move that")


def refuse_sizes(folder: Path, config: dict, kind: type) -> None:
    """Raise ValueError where config.json describes a larger model than the weights are, before one fills the memory."""
    shapes = {name: shape for path in folder.glob("*.safetensors") for name, shape in shapes_of(path).items()}
    if not shapes:
        raise ValueError(f"{folder} holds no .safetensors file, and no other weights are read; save the model again")
    largest = max([2**20, *(size for shape in shapes.values() for size in shape)])
    for key, value in whole_numbers(config):
        if abs(value) > (max(len(shapes), 100) if key.endswith("layers") else largest):
            raise ValueError(f"{folder}/config.json: {key} is {value}, too large for the weights; mend it")
    try:
        with torch.device("meta"):
            twin = kind(kind.config_class.from_dict(config))
            twin.tie_weights()
        asked = sum(p.numel() for p in twin.parameters())
    except Exception as error:
        raise ValueError(f"{folder}/config.json describes no {kind.__name__} ({error}); mend it") from error
    held = sum(math.prod(shape) for shape in shapes.values())
    if asked > held:
        raise ValueError(f"{folder}: weights missing: config.json describes {asked} numbers, the files hold {held}")


def whole_numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else ((key, inner) for inner in value):
            yield from whole_numbers(inner, name)
    elif isinstance(value, int):
        yield key, value


def refuse_adapter_sizes(folder: Path) -> None:
    """Raise ValueError where the settings describe larger matrices than the file holds, before they fill the memory."""
    path = folder / "adapter_model.safetensors"
    shapes = shapes_of(path).values() if path.is_file() else ()
    largest = max([4096, *(size for shape in shapes for size in shape)])
    for name in ("adapter_config.json", "ftlib.json"):
        for key, value in whole_numbers(read_json(folder / name) if (folder / name).is_file() else {}):
            if abs(value) > largest and not key.endswith(("seed", "key")):
                raise ValueError(f"{folder}/{name}: {key} is {value}, too large for the weights; mend it")
