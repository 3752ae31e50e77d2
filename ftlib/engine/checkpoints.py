"""Training states on disk, so that a run can go on: safetensors and JSON, never pickle; written aside, then renamed.

A checkpoint knows names and shapes, nothing else: of {name: object}, each with state_dict and load_state_dict, it keeps
tensors in state.safetensors, as "name.key", and the rest in state.json.

To copy: this file, engine/distributed.py, inputs/files.py and core/anatomy.py.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..inputs.files import MARK, aside, read_json, read_tensors, said, tensors_of
from . import distributed


def _folders(parent: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = (path for path in Path(parent).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def prepare(parent: str | os.PathLike, *, going_on: bool) -> None:
    """Make the folder, and sweep away what a killed process left; ValueError where a new run would mix with another."""
    parent = Path(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if distributed.rank() == 0:
            tempfile.TemporaryDirectory(prefix=".try-", dir=parent).cleanup()
    except OSError as error:
        raise OSError(f"checkpoint_dir={str(parent)!r} can't be written to ({error}); choose another") from error
    for left in parent.glob(".step-*") if distributed.rank() == 0 else ():
        parts = re.fullmatch(rf"\.(step-\d{{8,}})\.{MARK}\.(new|old)", left.name)
        if parts and parts[2] == "old" and not (parent / parts[1]).exists():  # killed between the two renames
            left.rename(parent / parts[1])
        elif parts:
            shutil.rmtree(left, ignore_errors=True)
    distributed.barrier()
    if (old := _folders(parent)) and not going_on:
        remedy = "go on with it (resume='auto'), delete it, or choose another checkpoint_dir"
        raise ValueError(f"{parent} holds {old[-1].name} of an earlier run; {remedy}")


@contextmanager
def held(folder: str | os.PathLike) -> Iterator[None]:
    """A context in which no other process writes into a folder (flock on .lock); ValueError naming one that does."""
    path, file, new = Path(folder) / ".lock", None, not os.path.exists(folder)
    try:
        if distributed.rank() == 0:
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            while file is None or not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file = open(path, "a+")  # again where the one before has just taken it away
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
    except BlockingIOError:
        file.seek(0)
        who = file.read() or "another process"
        raise ValueError(f"{folder} is in use by {who}; wait for it, end it, or choose another folder") from None
    except (ImportError, OSError) as error:
        if file is None and isinstance(error, OSError):
            raise OSError(f"{folder} can't be written to ({error.strerror or error}); choose another") from error
        warnings.warn(f"no lock on {folder} ({error}): nothing keeps a second run away from it", stacklevel=3)
    try:
        yield
    finally:
        if file:
            path.unlink(missing_ok=True)
            file.close()
            with suppress(OSError):  # something is in it
                new and path.parent.rmdir()


class OptimizerState:
    """An optimizer's state by the names of the parameters, for any number of processes, however weights are spread."""

    # torch.distributed.checkpoint.state_dict would first take a step with zero gradients, and so run our hooks

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module):
        self.optimizer = optimizer
        names = {id(p): name for name, p in model.named_parameters()}
        self.moved = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}

    def state_dict(self) -> dict[str, torch.Tensor]:
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.moved.items()}
        return {f"{n}.{k}": torch.as_tensor(v) for n, own in states.items() for k, v in own.items() if v is not None}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        places, slots = {name: i for i, name in enumerate(self.moved)}, {}
        for name, tensor in state.items():
            name, _, key = name.rpartition(".")
            tensor = tensor if key == "step" else distributed.cut(tensor, self.moved[name])
            slots.setdefault(places[name], {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})


class ModelState:
    """A model's weights, also where they are spread over processes."""

    def __init__(self, model: nn.Module):
        self.model, self.state_dict = model, model.state_dict

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        own = self.model.state_dict()
        self.model.load_state_dict({name: distributed.cut(tensor, own[name]) for name, tensor in state.items()})


class Checkpoints:
    """The checkpoints of a run in a folder.  parts: what is kept; fingerprint: what a run must share to go on."""

    def __init__(self, folder: Any, parts: dict[str, Any], fingerprint: dict[str, Any], keep_last: int):
        self.folder, self.parts, self.keep_last = Path(folder), parts, keep_last
        self.fingerprint = json.loads(json.dumps(fingerprint))

    def save(self, step: int, best: int | None = None) -> Path:
        """Write what the parts hold after so many steps; delete older ones but the last and that of step `best`."""
        folder = self.folder / f"step-{step:08d}"
        states = {name: part.state_dict() for name, part in self.parts.items()}
        tensors = {f"{n}.{k}": v for n, s in states.items() for k, v in s.items() if isinstance(v, torch.Tensor)}
        plain = {n: {k: v for k, v in s.items() if not isinstance(v, torch.Tensor)} for n, s in states.items()}
        tensors = distributed.to_first(tensors)
        if distributed.rank() == 0:
            try:
                with aside(folder) as temporary:
                    save_file(tensors_of(tensors), temporary / "state.safetensors")
                    state = {"fingerprint": self.fingerprint, "step": step, **plain}
                    (temporary / "state.json").write_text(json.dumps(state))
                    files = {file.name: _print(file) for file in temporary.iterdir()}
                    (temporary / "manifest.json").write_text(json.dumps(files, indent=1, sort_keys=True))
            except OSError as error:
                last = ", ".join(path.name for path in _folders(self.folder)[-1:]) or "none"
                remedy = "make room, or mend the disk, and go on with resume='auto'"
                raise OSError(f"{error}. The last checkpoint is {last}; {remedy}") from error
            written = [path for path in _folders(self.folder) if _step(path) <= step]  # later ones: damaged, skipped
            for old in (path for path in written[: -self.keep_last] if _step(path) != best):
                shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()
        return folder

    def resume(self) -> int | None:
        """Load the newest whole checkpoint and return its step, None for none; damaged ones are skipped, and said."""
        step = None
        for folder in reversed(_folders(self.folder)):
            if problem := damage(folder):
                warnings.warn(f"skipped checkpoint {folder.name}: {problem}", stacklevel=4)
                continue
            state, tensors = read_json(folder / "state.json"), read_tensors(folder / "state.safetensors")
            if state.get("fingerprint") != self.fingerprint:
                _refuse_another_run(state.get("fingerprint"), self.fingerprint, folder)
            with said(f"{folder}: whole, but not as fit writes it; delete it, or choose another checkpoint_dir"):
                for name, part in self.parts.items():
                    own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                    part.load_state_dict(state[name] | own)
                step = int(state["step"])
            break
        if len(set(found := distributed.gather(step or 0))) > 1:
            need = "it must be one folder that all machines share"
            raise ValueError(f"the processes find checkpoints of the steps {found} in {self.folder}; {need}")
        return step


def fingerprint(config: Any, **more: Any) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run."""
    free = "epochs progress checkpoint_dir checkpoint_every keep_last resume distributed gradient_checkpointing".split()
    kept = {name: value for name, value in asdict(config).items() if name not in free}  # the others change no numbers
    if callable(kept["task_gradients"]):  # in words that are the same in the next process
        kept["task_gradients"] = re.sub(" at 0x[0-9a-f]+", "", repr(kept["task_gradients"]))
    kept["distill"] = kept["distill"] and kept["distill"].described
    return {"config": kept} | more


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole: every file there, of its size and SHA-256."""
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest.keys() != {"state.json", "state.safetensors"}:
            return f"manifest.json lists {', '.join(manifest) or 'nothing'}, not state.json and state.safetensors"
        for name, written in manifest.items():
            if (found := _print(folder / name)) != written:
                return f"{name} has {found}, written were {written}"
    except (ValueError, OSError) as error:  # a file that is not there, a dying disk
        return f"a file can't be read ({error})"
    return None


def _refuse_another_run(theirs: Any, ours: dict, folder: Path) -> None:
    both = (one if isinstance(one, dict) else {} for one in (theirs, ours))
    before, now = ({f"config.{k}": v for k, v in one.get("config", {}).items()} | one for one in both)
    changed = {k: f"was {before.get(k)!r} and is {v!r}" for k, v in now.items() if before.get(k) != v and k != "config"}
    changed |= dict.fromkeys(changed.keys() & {"data", "model"}, "differs")  # hashes: nothing to see in them
    what = ", ".join(f"{key} {how}" for key, how in changed.items()) or "its settings differ"
    remedy = "use the same settings, model and data, or another checkpoint_dir"
    raise ValueError(f"{folder} is from another run: {what}; {remedy}")


def _print(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
