"""Folders that appear whole or not at all; JSON and safetensors read with a word on what is wrong.

To copy: this file alone.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

MARK = "[0-9a-f]{8}"  # between the name of a folder and .new or .old


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A temporary folder next to `folder` that takes its place, safe against a power cut, when all went well.

    Raises OSError naming the folder where it can't be written; what was there before stays.
    """
    mark = uuid.uuid4().hex[:8]
    temporary, old = folder.with_name(f".{folder.name}.{mark}.new"), folder.with_name(f".{folder.name}.{mark}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {folder} ({error}); what was there before is as it was") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def refuse_kernels(value: Any, where: str) -> None:
    """Raise ValueError where a model's config wants attention (or experts) from a hub: code would come from there."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if str(key).endswith("_implementation") and "/" in str(inner):
            raise ValueError(f"{where}: {key} is {inner!r}, code from a hub; refused: take it out, or write 'sdpa'")
        refuse_kernels(inner, where)


def _sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing
            raise
    finally:
        os.close(handle)


def tensors_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU: tied weights share memory, which safetensors refuses to guess about."""
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Errors say which file is no such kind."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the folder holds no whole model")
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: not {kind} ({error})") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError naming the file where there is none."""
    with _reading(path, "JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header alone."""
    with _reading(path, "a whole safetensors file"), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with _reading(path, "a whole safetensors file"):
        return load_file(path)
