"""Folders that appear whole or not at all; JSON and safetensors, with helpful errors.  To copy: this file alone."""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

MARK = "[0-9a-f]{8}"  # between the name of a folder and .new or .old


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, that takes its place, safe against power cuts, if all went well; OSError naming it."""
    mark = uuid.uuid4().hex[:8]
    temporary, old = folder.with_name(f".{folder.name}.{mark}.new"), folder.with_name(f".{folder.name}.{mark}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {folder} ({error}); what was there before is as it was") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


# What a model's and a tokenizer's files are called: these are replaced, all others in the folder stay.
_MODEL = r"(.+/)?((generation_|adapter_)?config|ftlib|multitask|model\.safetensors\.index)\.json"
_MODEL += r"|(modules|sentence_bert_config|config_sentence_transformers)\.json"
_MODEL += r"|(.+/)?((adapter_)?model(-\d+-of-\d+)?|heads)\.safetensors"
_WORDS = r"(tokenizer(_config)?|special_tokens_map|added_tokens|vocab)\.json|(merges|vocab)\.txt|chat_template\.jinja"
_WORDS += r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|additional_chat_templates/.*"
_PARTS = (".", "encoder/base", "encoder", "base", "additional_chat_templates", "1_Pooling")  # the folders of a model
_BESIDE = {"base": "adapter_config.json", "encoder/base": "adapter_config.json"}  # or not ours
_BESIDE |= {"encoder": "multitask.json", "1_Pooling": "modules.json"}
_STAGE, _WHOLE = ".saving", "whole"  # where new files wait in a folder; what goes for them, once all are on the disk


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, whose files take the places of the model's (and tokenizer's) there when all went well.

    Killed or out of disk, it leaves all of the old or, after `settled`, all of the new; others wait.  The folder is
    never renamed: it may be a mount point.  Raises OSError naming it where it can't be written.
    """
    stage = folder / _STAGE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, alone=True):
            _finish(folder)
            shutil.rmtree(stage, ignore_errors=True)  # of a process that was killed
            stage.mkdir()
            try:
                yield stage
                (stage / ".old").write_text("\n".join(_old(folder, set(_names(stage)))), "utf-8")
                _settle(stage)
                (stage / ".old").rename(stage / _WHOLE)
                _sync(stage)
                _finish(folder)
            finally:
                if not (stage / _WHOLE).exists():
                    shutil.rmtree(stage, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        done, old = "what is new is whole in there, and the next load or save goes on", "what was there is as it was"
        raise OSError(f"could not write {folder} ({error}); {done if (stage / _WHOLE).exists() else old}") from error


@contextmanager
def settled(folder: Path) -> Iterator[None]:
    """A folder of `replacing` to read from: a replacement that was cut short is finished, a new one waits."""
    with _locked(folder, alone=(folder / _STAGE / _WHOLE).exists()):
        _finish(folder)
        yield


@contextmanager
def _locked(folder: Path, alone: bool) -> Iterator[None]:
    """Wait for others that write into a folder (alone: or read it); no lock on Windows and some network disks."""
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            import fcntl

            held.callback(os.close, handle := os.open(folder, os.O_RDONLY))
            fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def _names(folder: Path) -> list[str]:
    """The files in the folders of a model, last what is read first."""
    found = (path for inner in _PARTS for path in (folder / inner).glob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in found)
    return sorted(names, key=lambda name: (name.endswith(("config.json", "multitask.json")), name))


def _old(folder: Path, new: set[str]) -> list[str]:
    """The files of an older model (tokenizer) that no new one replaces."""
    owned = f"{_MODEL}|{_WORDS}" if any(re.fullmatch(_WORDS, name) for name in new) else _MODEL
    inside = [inner for inner, mark in _BESIDE.items() if not (folder / inner).parent.joinpath(mark).is_file()]
    old = (name for name in _names(folder) if name not in new and re.fullmatch(owned, name))
    return [name for name in old if Path(name).parent.as_posix() not in inside]


def _finish(folder: Path) -> None:
    """Put the files that wait in their places, which may be done in part, and take away what they replace."""
    stage = folder / _STAGE
    if not (stage / _WHOLE).is_file():
        return
    if links := [inner for inner in (_STAGE, *_PARTS[1:]) if (folder / inner).is_symlink()]:
        raise ValueError(f"{folder}: files wait in {_STAGE} to go through the link {links[0]!r}; refused: take it away")
    old = (stage / _WHOLE).read_text("utf-8", "replace").split("\n")
    for name in [name for name in _names(stage) if name != _WHOLE]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(stage / name, folder / name, copy_function=shutil.copyfile)  # copies onto a mounted file
        _sync(folder / name)
    for name in set(old).intersection(_names(folder)):
        (folder / name).unlink()
    for inner in _PARTS[1:]:
        with suppress(OSError):  # not there, or others' files are in it
            (folder / inner).rmdir()
    _sync(folder)
    (stage / _WHOLE).unlink()
    shutil.rmtree(stage, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Bring a folder to the disk, its files with the usual rights: safetensors lets the owner alone read them."""
    (probe := folder / ".mode").touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
        _sync(path)


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
def said(what: str) -> Iterator[None]:
    """Errors inside, of the many types that others' code has, become ValueErrors that begin with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({error})") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError naming the file where there is none."""
    with said(f"{path}: not JSON with an object in it"):
        return {**json.loads(path.read_text(encoding="utf-8"))}


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header alone."""
    with said(f"{path}: not a whole safetensors file"), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """16 hexadecimal digits of names, shapes and float32 values: of each tensor the sum of all bits, and a sample."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        bits = tensor.detach().float().contiguous().view(torch.int32).flatten()
        sample = bits[:: bits.numel() // 64 + 1].tolist()
        found.update(f"{name} {tuple(tensor.shape)} {bits.sum(dtype=torch.int64)} {sample}".encode())
    return found.hexdigest()[:16]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with said(f"{path}: not a whole safetensors file"), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}
