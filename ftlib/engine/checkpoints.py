"""Training states on disk, so that a run can go on: safetensors and JSON, never pickle; written aside, then renamed.

To copy this module you need: checkpoints.py, files.py, distributed.py, torch and safetensors.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..inputs.files import MARK, aside, read_json, read_tensors, tensors_of
from . import distributed


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """What dropout will draw from, as of now."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _folders(parent: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in Path(parent).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def prepare(parent: str | os.PathLike, *, going_on: bool) -> None:
    """Make the folder now, not an epoch later; ValueError when a new run would mix its checkpoints with another's.

    What a process left that was killed while it wrote a checkpoint is swept away.
    """
    parent = Path(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if distributed.rank() == 0:
            tempfile.TemporaryDirectory(prefix=".try-", dir=parent).cleanup()
    except OSError as error:
        raise OSError(f"checkpoint_dir={str(parent)!r} can't be written to ({error}); choose another") from error
    if distributed.rank() == 0:
        for left in parent.glob(".step-*"):
            if not (parts := re.fullmatch(rf"\.(step-\d{{8,}})\.{MARK}\.(new|old)", left.name)):
                continue
            if parts[2] == "old" and not (parent / parts[1]).exists():  # killed between the two renames
                left.rename(parent / parts[1])
            else:
                shutil.rmtree(left, ignore_errors=True)
    distributed.barrier()
    old = _folders(parent)
    if old and not going_on:
        raise ValueError(
            f"{parent} holds {old[-1].name} of an earlier run; go on with it (resume='auto'), delete it, or choose "
            "another checkpoint_dir"
        )


def fingerprint(loop: Any) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run."""
    free = ("epochs", "progress", "checkpoint_dir", "checkpoint_every", "keep_last", "resume", "distributed")
    free += ("gradient_checkpointing",)  # the same numbers
    config = {name: value for name, value in asdict(loop.config).items() if name not in free}
    if callable(config["task_gradients"]):  # in words that are the same in the next process
        config["task_gradients"] = re.sub(" at 0x[0-9a-f]+", "", repr(config["task_gradients"]))
    return {
        "config": config, "steps": loop.total, "rows": {name: len(rows) for name, rows in loop.parts.items()},
        "data": loop.digest, "model": loop.model_digest,
    }  # fmt: skip


def save_training(loop: Any) -> Path:
    """Write all that `fit` needs to go on: weights, optimizer, random state, history.

    Older ones are deleted, except the last `keep_last` and the one of the best evaluation, where there is one; the
    best weights themselves also lie in every one after it.  Raises OSError where the disk is full.
    Process 0 writes, whole tensors also where the weights are spread over processes: any number of them can go on.
    """
    folder = Path(loop.config.checkpoint_dir) / f"step-{loop.run_.steps:08d}"
    states = {kind: distributed.gather(state, loop.device) for kind, state in loop.random_state.items()}
    tensors = {f"model.{k}": v for k, v in loop.model.state_dict().items()}
    moved = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    for index, state in loop.optimizer.state_dict()["state"].items():
        values = {k: loop.seen.spread(torch.as_tensor(v), moved[index]) for k, v in state.items() if v is not None}
        tensors |= {f"optimizer.{index}.{k}": value for k, value in values.items()}
    tensors |= {f"rng.{kind}.{i}": part for kind, parts in states.items() for i, part in enumerate(parts)}
    if loop.best:
        tensors |= {f"best.{i}": weight for i, weight in enumerate(loop.best["weights"])}
    if loop.seen.own is not None:
        tensors["seen"] = loop.seen.seen
    if loop.joint:
        tensors |= {f"tasks.{name}": value for name, value in loop.joint.weights.state.items()}
    tensors = distributed.to_first(tensors)
    if distributed.rank() == 0:
        try:
            with aside(folder) as temporary:
                save_file(tensors_of(tensors), temporary / "state.safetensors")
                state = {
                    "fingerprint": fingerprint(loop), "step": loop.run_.steps, "history": loop.run_.history,
                    "metrics": loop.run_.metrics, "seconds": loop.run_.seconds, "scaler": loop.scaler.state_dict(),
                    "best": loop.best["metrics"] if loop.best else None,
                    "best_step": loop.best["step"] if loop.best else None, "since_best": loop.evaluations_since_best,
                    "decay": loop.seen.pending, "embedding": loop.seen.name,
                    "micro_batch_size": loop.run_.micro_batch_size, "max_tokens": loop.run_.max_tokens,
                }  # fmt: skip
                (temporary / "state.json").write_text(json.dumps(state))
                files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
                (temporary / "manifest.json").write_text(json.dumps(files, indent=1))
        except OSError as error:
            last = ", ".join(path.name for path in _folders(folder.parent)[-1:]) or "none"
            remedy = "make room, or mend the disk, and go on with resume='auto'"
            raise OSError(f"{error}. The last checkpoint is {last}; {remedy}") from error
        # later ones than this are damaged ones that `resume_training` skipped
        written = [path for path in _folders(folder.parent) if _step(path) <= loop.run_.steps]
        for old in written[: -loop.config.keep_last]:
            if not loop.best or _step(old) != loop.best["step"]:
                shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return folder


def resume_training(loop: Any) -> int | None:
    """Load the newest whole checkpoint into the loop; returns its step, or None where there is none.

    Damaged checkpoints are skipped with a warning that names the file; one of another run is refused.  The number of
    processes, and how they share the work, may differ from the run before; only dropout then draws other numbers.
    """
    step = _resume(loop)
    found = [int(part) for part in distributed.gather(torch.tensor(step or 0), loop.device)]
    if len(set(found)) > 1:
        raise ValueError(
            f"the processes find checkpoints of the steps {found} in {loop.config.checkpoint_dir}; "
            "it must be one folder that all machines share"
        )
    return step


def _resume(loop: Any) -> int | None:
    for folder in reversed(_folders(loop.config.checkpoint_dir)):
        problem = damage(folder)
        if problem:
            warnings.warn(f"skipped checkpoint {folder.name}: {problem}", stacklevel=3)
            continue
        state, tensors = read_json(folder / "state.json"), read_tensors(folder / "state.safetensors")
        if isinstance(state.get("fingerprint"), dict):
            _refuse_another_run(state["fingerprint"], json.loads(json.dumps(fingerprint(loop))), folder)
        if problem := _unfit(loop, state, tensors):
            warnings.warn(f"skipped checkpoint {folder.name}: {problem}", stacklevel=3)
            continue
        if loop.seen.own is None and "seen" in tensors:  # the rows not seen still wait for their weight decay
            late = torch.ones(len(tensors[f"model.{state['embedding']}"]), 1)
            late[tensors["seen"]] = 0
            tensors[f"model.{state['embedding']}"] *= 1 + late * (state["decay"] - 1)
        weights = loop.model.state_dict()
        loop.model.load_state_dict({k: distributed.cut(tensors[f"model.{k}"], like) for k, like in weights.items()})
        optimizer = loop.optimizer.state_dict()
        moved = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                parameter = moved[int(index)]
                tensor = loop.seen.gathered(tensor, parameter)
                if tensor.shape == parameter.shape:  # not so the number of steps
                    tensor = distributed.cut(tensor, parameter)
                slots.setdefault(int(index), {})[key] = tensor
        loop.optimizer.load_state_dict({**optimizer, "state": slots})
        own = distributed.rank()  # a process that was not there keeps the state it has
        found = {kind: tensors[f"rng.{kind}.{own}"] for kind in ("cpu", "cuda") if f"rng.{kind}.{own}" in tensors}
        set_random_state(found, loop.device)
        loop.random_state = random_state(loop.device)
        loop.scaler.load_state_dict(state["scaler"])
        run = loop.run_
        run.steps = state["step"]
        for key in ("history", "metrics", "seconds", "micro_batch_size", "max_tokens"):
            setattr(run, key, state[key])
        loop.evaluations_since_best = state["since_best"]
        if loop.seen.own is not None:
            loop.seen.pending = state["decay"]
        if loop.joint:
            loop.joint.weights.state = {name: tensors[f"tasks.{name}"] for name in loop.joint.weights.state}
        if state["best"] is not None:
            best = [distributed.cut(tensors[f"best.{i}"].to(loop.device), p) for i, p in enumerate(loop._kept())]
            loop.best = {"metrics": state["best"], "weights": best, "step": state["best_step"]}
        return state["step"]
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole: every file there, of its size and SHA-256."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (ValueError, OSError) as error:
        return str(error)
    if manifest.keys() != {"state.json", "state.safetensors"}:
        return f"manifest.json lists {', '.join(manifest) or 'nothing'}, not state.json and state.safetensors"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        written = entry if isinstance(entry, dict) else {}
        try:
            size, digest = path.stat().st_size, _sha256(path)
        except OSError as error:  # a dying disk
            return f"{name} can't be read ({error})"
        if size != written.get("bytes"):
            return f"{name} has {size} bytes, {written.get('bytes')} were written"
        if digest != written.get("sha256"):
            return f"{name}: its SHA-256 is not the one that was written"
    return None


_FIELDS = {
    "fingerprint": dict, "step": int, "history": list, "metrics": dict, "seconds": (int, float), "scaler": dict,
    "best": (dict, type(None)), "best_step": (int, type(None)), "since_best": int, "decay": (int, float),
    "embedding": (str, type(None)), "micro_batch_size": (int, type(None)), "max_tokens": (int, type(None)),
}  # fmt: skip
_SLOTS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def _unfit(loop: Any, state: dict, tensors: dict[str, torch.Tensor]) -> str | None:
    """What in whole files keeps them from being loaded, so that nothing is ever half-loaded; None: nothing does."""
    for key, kind in _FIELDS.items():
        if not isinstance(state.get(key), kind):
            return f"state.json: {key} is {str(state.get(key, 'missing'))[:40]}"
    if not state["history"] or not all(isinstance(record, dict) for record in state["history"]):
        return "state.json: history is no list of records"
    taken = [record.get("step") for record in state["history"] if "loss" in record]
    if state["step"] != len(taken) or taken != [*range(1, len(taken) + 1)]:
        return f"state.json: step is {state['step']}, and the history has others"
    if state["best"] is not None and not isinstance(state["best"].get(loop.config.metric), (int, float)):
        return f"state.json: best has no {loop.config.metric}"
    for key in ("micro_batch_size", "max_tokens"):
        if state[key] is not None and state[key] < (loop.longest if key == "max_tokens" else 1):
            return f"state.json: {key} is {state[key]}"
    kept = loop._kept()
    wanted = {f"model.{name}": tensor.shape for name, tensor in loop.model.state_dict().items()}
    if state["best"] is not None:
        wanted |= {f"best.{i}": parameter.shape for i, parameter in enumerate(kept)}
    moved = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    full = {id(own): whole.shape for own, whole in zip(loop.trainable, kept, strict=True)}
    begun = {int(found[1]) for name in tensors if (found := re.match(r"optimizer\.(\d+)\.", name))}
    for index, parameter in enumerate(moved):
        if index in begun:
            for key in _SLOTS[loop.config.optimizer]:
                wanted[f"optimizer.{index}.{key}"] = torch.Size() if key == "step" else full[id(parameter)]
    wanted |= {name: torch.get_rng_state().shape for name in tensors if name.startswith("rng.cpu.")}
    if loop.joint:
        wanted |= {f"tasks.{name}": value.shape for name, value in loop.joint.weights.state.items()}
    for name, size in wanted.items():
        if (found := getattr(tensors.get(name), "shape", None)) != size:
            return f"state.safetensors: {name} is {'missing' if found is None else tuple(found)}, not {tuple(size)}"
    for name in (name for name in tensors if name.startswith("rng.cpu.")):
        try:
            torch.Generator().set_state(tensors[name])
        except (RuntimeError, TypeError) as error:
            return f"state.safetensors: {name} is no random state ({error})"
    more = [name for name in tensors if name not in wanted and name != "seen" and not name.startswith("rng.")]
    if more:
        return f"state.safetensors: {more[0]} is no part of this run"
    if "seen" in tensors and f"model.{state['embedding']}" not in wanted:
        return f"state.json: embedding is {state['embedding']}"
    return None


def _refuse_another_run(theirs: dict, ours: dict, folder: Path) -> None:
    if theirs == ours:
        return
    config = theirs.get("config", {})
    pairs = {f"config.{k}": (config.get(k), value) for k, value in ours["config"].items()}
    pairs |= {k: (theirs.get(k), value) for k, value in ours.items() if k != "config"}
    hashes = ("data", "model")  # nothing to see in them
    changed = [
        f"{key} differs" if key in hashes else f"{key} was {was!r} and is {now!r}"
        for key, (was, now) in pairs.items()
        if was != now
    ]
    raise ValueError(
        f"{folder} is from another run: {', '.join(changed) or 'its settings differ'}; "
        "use the same settings, model and data, or another checkpoint_dir"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
