"""Models and training states on disk: safetensors and JSON, never pickle; written aside, then renamed.

To copy this module you need: checkpoints.py, distributed.py, torch, transformers and safetensors (multitask.py for
models with several heads).
"""

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ftlib import distributed

# ------------------------------------------------------------------------------------------------------ models


def save(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Write a model to a folder that `load`, and for stock models `from_pretrained`, opens.

    A MultiTaskModel becomes `encoder/` (opens with AutoModel), `heads.safetensors` and `multitask.json`.
    The folder appears whole or not at all; an older model in its place is replaced.
    Raises ValueError when the folder holds something that is no model.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / f).is_file() for f in _MARKS):
        raise ValueError(f"{folder} holds files but no model; choose another folder, or empty it")
    with _aside(folder) as temporary:
        if hasattr(model, "specs") and hasattr(model, "heads"):
            _save_multitask(model, temporary)
        else:
            model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return folder


def load(folder: str | os.PathLike) -> nn.Module:
    """Read a model that `save` (or `save_pretrained`) wrote, in eval mode, float32, with its own head.

    Only safetensors are read, and only model classes of Transformers are built; no code from the folder runs.
    Raises FileNotFoundError for a folder that is not there, ValueError naming the file for one that is not whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; save a model there first: ftlib.save(model, {str(folder)!r})")
    if (folder / "multitask.json").is_file():
        return _load_multitask(folder)
    return _load_stock(folder)


_MARKS = ("config.json", "multitask.json", "adapter_config.json")


def _load_stock(folder: Path) -> nn.Module:
    import transformers

    config = _read_json(folder / "config.json")
    names = config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{folder}/config.json: architectures {names!r} names no Transformers model")
    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # safetensors raises its own type for a damaged file
        if isinstance(error, (ValueError, OSError)):
            raise
        raise ValueError(f"{folder}: can't read the weights ({error}); the file is damaged or not safetensors") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{folder}: weights missing or of another shape: {sorted(map(str, info['missing_keys']))[:3]}")
    return model.eval()


def _save_multitask(model: nn.Module, folder: Path) -> None:
    model.encoder.save_pretrained(folder / "encoder")
    save_file({k: v.detach().cpu().contiguous() for k, v in model.heads.state_dict().items()}, folder / "heads.safetensors")
    specs = {name: asdict(spec) for name, spec in model.specs.items()}
    (folder / "multitask.json").write_text(json.dumps({"heads": specs}, indent=1))


def _load_multitask(folder: Path) -> nn.Module:
    from ftlib.multitask import Head, MultiTaskModel

    specs = _read_json(folder / "multitask.json").get("heads")
    if not isinstance(specs, dict):
        raise ValueError(f"{folder}/multitask.json: no 'heads'")
    try:
        heads = {
            name: Head(**{**spec, "label_names": tuple(spec["label_names"]) if spec.get("label_names") else None})
            for name, spec in specs.items()
        }
    except TypeError as error:
        raise ValueError(f"{folder}/multitask.json: {error}") from None
    model = MultiTaskModel(_load_stock(folder / "encoder"), heads)
    model.heads.load_state_dict(_read_tensors(folder / "heads.safetensors"))
    return model.eval()


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the folder holds no whole model")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the folder holds no whole model")
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A temporary folder next to `folder` that takes its place when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    temporary, old = folder.with_name(f".{folder.name}.{mark}.new"), folder.with_name(f".{folder.name}.{mark}.old")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------- training states


def save_training(loop: Any) -> Path | None:
    """Write all that `fit` needs to go on: weights, optimizer, random state, history.  Process 0 writes."""
    folder = Path(loop.config.checkpoint_dir) / f"step-{loop.run_.steps:08d}"
    if distributed.rank() == 0:
        with _aside(folder) as temporary:
            tensors = {f"model.{k}": v for k, v in loop.model.state_dict().items()}
            for index, state in loop.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items() if v is not None}
            tensors["rng.cpu"] = torch.get_rng_state()
            if loop.device.type == "cuda":
                tensors["rng.cuda"] = torch.cuda.get_rng_state(loop.device)
            if loop.best:
                tensors |= {f"best.{i}": weight for i, weight in enumerate(loop.best["weights"])}
            # clone: tied weights share memory, which safetensors refuses to guess about
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
            state = {
                "fingerprint": loop.fingerprint(), "step": loop.run_.steps, "history": loop.run_.history,
                "metrics": loop.run_.metrics, "seconds": loop.run_.seconds, "scaler": loop.scaler.state_dict(),
                "best": loop.best["metrics"] if loop.best else None, "since_best": loop.evaluations_since_best,
            }  # fmt: skip
            (temporary / "state.json").write_text(json.dumps(state))
            files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps(files, indent=1))
        for old in sorted(folder.parent.glob("step-*"))[: -loop.config.keep_last]:
            shutil.rmtree(old)
    distributed.barrier()
    return folder


def resume_training(loop: Any) -> int | None:
    """Load the newest whole checkpoint into the loop; returns its step, or None where there is none.

    Damaged checkpoints are skipped with a warning that names the file; one of another run is refused.
    """
    for folder in sorted(Path(loop.config.checkpoint_dir).glob("step-*"), reverse=True):
        problem = damage(folder)
        if problem:
            warnings.warn(f"skipped checkpoint {folder.name}: {problem}", stacklevel=2)
            continue
        state = _read_json(folder / "state.json")
        _refuse_another_run(state["fingerprint"], json.loads(json.dumps(loop.fingerprint())), folder)
        tensors = _read_tensors(folder / "state.safetensors")
        loop.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        optimizer = loop.optimizer.state_dict()
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                slots.setdefault(int(index), {})[key] = tensor
        loop.optimizer.load_state_dict({**optimizer, "state": slots})
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and loop.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], loop.device)
        loop.scaler.load_state_dict(state["scaler"])
        run = loop.run_
        run.history, run.metrics, run.seconds, run.steps = state["history"], state["metrics"], state["seconds"], state["step"]
        loop.evaluations_since_best = state["since_best"]
        if state["best"] is not None:
            weights = [tensors[f"best.{i}"].to(loop.device) for i in range(len(loop.trainable))]
            loop.best = {"metrics": state["best"], "weights": weights}
        return state["step"]
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole: every file there, of its size and SHA-256."""
    try:
        manifest = _read_json(folder / "manifest.json")
    except (ValueError, OSError) as error:
        return str(error)
    if not {"state.json", "state.safetensors"} <= manifest.keys():
        return "manifest.json does not list state.json and state.safetensors"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes, {entry.get('bytes')} were written"
        if _sha256(path) != entry.get("sha256"):
            return f"{name}: its SHA-256 is not the one that was written"
    return None


def _refuse_another_run(theirs: dict, ours: dict, folder: Path) -> None:
    if theirs == ours:
        return
    changed = [f"config.{k}" for k in ours["config"] if theirs["config"].get(k) != ours["config"][k]]
    changed += [k for k in ("steps", "rows") if theirs.get(k) != ours[k]]
    raise ValueError(
        f"{folder} is from another run: {', '.join(changed) or 'its settings'} differ; "
        "use the same settings and data, or another checkpoint_dir"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
