"""The base model under an adapter: whether it lies on disk as the adapter knows it, and what of it has to travel.

To copy: this file, inputs/{files,pretrained,assets,sentence_folders}.py, methods/adapters.py, core/, tasks/, torch,
transformers.
"""

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.anatomy import base_of
from ..inputs import pretrained
from ..inputs.files import fingerprint
from ..methods import adapters
from ..tasks.task import TASKS, kind_of

PREFIX = "base_model.model."  # what PEFT puts before the names of weights
_HELD = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.)")  # in names: what an adapter holds
_FREE = ("_name_or_path", "architectures", "is_encoder_decoder", "dtype", "torch_dtype", "transformers_version",
         "id2label", "label2id", "num_labels", "problem_type", "vocab_size", "use_cache", "return_dict",
         "tie_word_embeddings")  # fmt: skip


def _own(base: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's weights under the names they have without adapters; those in 8 bits as the floats they are."""
    own = {_HELD.sub("", name): tensor for name, tensor in base.state_dict().items()}
    eight = {name: module for name, module in base.named_modules() if isinstance(module, adapters.Int8Linear)}
    weights = {n: m.weight if m.kind is nn.Linear else m.weight.T for n, m in eight.items()}
    return own | {_HELD.sub("", f"{name}.weight"): weight for name, weight in weights.items()}


def _rest(model: nn.Module, state: Any) -> tuple[dict[str, torch.Tensor], str, str]:
    """(the base's weights that are not among an adapter's, nor tied to one; the base's place; the table of words)."""
    base = base_of(model)
    at = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    table = next(f"{name}.weight" for name, module in base.named_modules() if module is base.get_input_embeddings())
    both = (_HELD.sub("", name.removeprefix(prefix)) for name in state for prefix in (PREFIX, "base_model."))
    moved, own = {name.removeprefix(at) for name in both if name.startswith(at)}, _own(base)
    memory = {tensor.data_ptr() for name, tensor in own.items() if name in moved and tensor.numel()}
    return {n: t for n, t in own.items() if n not in moved and t.data_ptr() not in memory}, at, table


def _settings(config: Any) -> dict[str, Any]:
    """What of a config makes another model of the same weights."""
    plain = json.loads(json.dumps(config.to_dict(), default=str)).items()
    free = {*_FREE, *(key for task in TASKS.values() for key in task.vectors)}  # of a head, which `ftlib.json` knows
    return {key: value for key, value in plain if key not in free and "drop" not in key and key[0] != "_"}


def _differing(one: dict, other: dict) -> list[str]:
    keys = [key for key in one.keys() & other.keys() if not key.endswith("_token_id")]
    return [f"another {key} in its config" for key in keys if one[key] != other[key]]


def put_down(model: nn.Module, state: dict, folder: Path, target: Path) -> tuple[str | None, dict, dict]:
    """An adapter's name for its base, the base's identity, embeddings that go along; `base/` for one not on disk."""
    base, place, words = base_of(model), getattr(model.config, "_name_or_path", ""), {}
    (left, at, table), home = _rest(model, state), Path(place).resolve()
    top = target.parent if folder.name == "encoder" else target
    try:
        if not place or home in (top, top / "encoder") or (home.parent / "adapter_config.json").is_file():
            raise ValueError(f"it was loaded from {place or 'no folder or name'}" + (place and ", an adapter's own"))
        kind = kind_of(model) if base is model else None  # T5's head is in its base
        twin = pretrained.load_model(place, kind, local_files_only=True)
        exact, other = _own(twin), _differing(_settings(model.config), _settings(twin.config))
        eight = [n for n, module in base.named_modules() if isinstance(module, adapters.Int8Linear) and not other]
        plain = {name: twin.get_submodule(name) for name in (_HELD.sub("", f"{name}.")[:-1] for name in eight)}
        adapters.replace(twin, {name: adapters.Int8Linear(linear) for name, linear in plain.items()})
        rounded, floats = _own(twin), {n: t.cpu() for n, t in left.items() if t.is_floating_point()}  # 4 bits are none
        moved = [n for n, t in floats.items() if n in rounded and not torch.equal(rounded[n].to(t.dtype), t)]
        if table in moved:
            words = {at + name: left[table] for name in base.state_dict() if _HELD.sub("", name) == table}
        other += [f"another {name}" for name in sorted(_rest(model, [*state, *words])[0].keys() & set(moved))]
        why = f"{place} has {other[0]}" if other else ""
    except Exception as error:  # of many types: a folder that can't be read
        why = str(error)
    if why:
        if any(type(module).__name__ == "Linear4bit" for module in base.modules()):
            raise ValueError(f"{why}; its base is in 4 bits and can't be saved too: save it first, tune it by name")
        with torch.device("meta"):
            bare, own = type(base)(copy.deepcopy(base.config)), _own(base)
        words, exact = {}, {name: own[name].cpu() for name in bare.state_dict() if name in own}  # a pooler may be new
        bare.save_pretrained(folder / "base", state_dict=dict(exact))
        warnings.warn(f"the adapter's base model is saved too, in {target / 'base'}: {why}", stacklevel=4)
    left, *_ = _rest(model, [*state, *words])
    weights = fingerprint({name: tensor for name, tensor in exact.items() if name in left})
    name = str(target / "base") if why else pretrained.public_name(place)
    return name, {"weights": weights, "config": _settings(model.config)}, words


def fit_to(model: nn.Module, tensors: dict, note: Any, folder: Path, given: bool) -> None:
    """Fit a base to an adapter's words; ValueError, or, for one the user gave, a warning, if `note` names another."""
    left, at, table = _rest(model, tensors)
    ends = [tensor for name, tensor in tensors.items() if _HELD.sub("", name).endswith(f".{at}{table}")]
    if ends and len(ends[0]) != len(base_of(model).get_input_embeddings().weight):
        with torch.random.fork_rng():
            model.resize_token_embeddings(len(ends[0]), mean_resizing=False)
    if not isinstance(note, dict) or not isinstance(note.get("config"), dict):
        return
    now, then = fingerprint(left), note.get("weights")
    what = [f"weights {now}, then {then}"] if now != then else []
    if what := what + _differing(note["config"], _settings(model.config)):
        said = f"{folder}: this base model is not the one the adapter was trained on ({what[0]})"
        if not given:
            raise ValueError(f"{said}; put that back, or pass base=..., which is taken with a warning")
        warnings.warn(f"{said}; its answers will differ", stacklevel=5)
    for key, value in note["config"].items():  # the model was asked with these ids
        if key.endswith("_token_id") and isinstance(value, int | list | None):
            setattr(model.config, key, value)
