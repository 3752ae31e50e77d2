"""Models on disk: safetensors and JSON, never pickle; adapters in PEFT's format; written aside, then renamed.

To copy: this file, engine/untrusted.py, inputs/files.py, core/, tasks/, torch, transformers and
methods/{tuning,adapters,through_peft,optimizing,regularization,speedups}.py (methods/multitask.py for a MultiTaskModel,
the rest of inputs/ for an adapter whose base model has a name).
"""

import copy
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..core.anatomy import head_modules
from ..inputs.files import MARK, aside, read_json, read_tensors, refuse_kernels, tensors_of
from ..methods import adapters, through_peft
from ..methods.optimizing import tuning_of
from ..methods.tuning import tune
from ..tasks.task import class_named, given_names, kind_of
from .untrusted import refuse_adapter_sizes, refuse_other_files, refuse_sizes


def save(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Write a model to a folder that `load`, and for stock models `from_pretrained`, opens.

    A model with adapters (`tune`: "lora", "houlsby", "pfeiffer", a PEFT configuration) becomes adapter_config.json and
    adapter_model.safetensors, PEFT's format, with its task head inside, and ftlib.json, which says what head that is;
    PEFT opens it but for bottleneck adapters, which it does not know.  `merge` first to save a whole model.
    A MultiTaskModel becomes `encoder/` (opens with AutoModel), `heads.safetensors` and `multitask.json`.
    The folder appears whole or not at all; an older model in its place is replaced, all of it.
    Raises ValueError when the folder holds something else than a model's files.
    """
    for what, value in (("model", model), *([("tokenizer", tokenizer)] if tokenizer is not None else [])):
        if not hasattr(value, "save_pretrained") and not hasattr(value, "specs"):
            raise TypeError(f"the {what} is a {type(value).__name__}, which can't be saved; pass one of Transformers'")
    folder = Path(folder).resolve()
    refuse_other_files(folder)
    with aside(folder) as temporary:
        if hasattr(model, "specs") and hasattr(model, "heads"):
            _save_multitask(model, temporary)
        elif adapters.adapters_of(model) or getattr(tuning_of(model), "peft", None) is not None:
            _save_adapter(model, temporary)
        else:
            model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return folder


def load(folder: str | os.PathLike, *, base: Any = None) -> nn.Module:
    """Read a model that `save` (or `save_pretrained`) wrote, in eval mode, float32, with its own head.

    base: for an adapter, the pretrained model under it: a short name, folder or hub id, in place of the one the adapter
    names; or a model with a head, of which a copy is taken.
    Only safetensors are read, and only model classes of Transformers are built; no code from the folder runs.
    Raises FileNotFoundError for a folder that is not there, ValueError naming the file for one that is not whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        replaced = re.compile(rf"\.{re.escape(folder.name)}\.{MARK}\.old")
        old = [path for path in folder.parent.glob(".*.old") if replaced.fullmatch(path.name)]
        killed = f"a process was killed while it replaced it; the model before lies in {old and old[0]}: rename that"
        remedy = killed if old else f"save a model there first: ftlib.save(model, {str(folder)!r})"
        raise FileNotFoundError(f"no folder {folder}; {remedy}")
    if (folder / "multitask.json").is_file():
        return _load_multitask(folder, base)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        refuse_adapter_sizes(folder)
        model = _base_of(folder, base)
        _put_adapter(model, model, folder, headless=isinstance(base, nn.Module))
        return model.eval()
    if base is not None:
        raise ValueError(f"base={base!r}: {folder} holds a whole model, which needs none")
    return _load_stock(folder)


def _load_stock(folder: Path) -> nn.Module:
    config = read_json(folder / "config.json")
    refuse_kernels(config, f"{folder}/config.json")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if (kind := class_named(name, config)) is None:
        raise ValueError(f"{folder}/config.json: architectures {names!r} names no Transformers model")
    refuse_sizes(folder, config, kind)
    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # safetensors, torch and Transformers have many types for a damaged or foreign file
        shown = OSError if isinstance(error, OSError) else ValueError
        raise shown(f"{folder}: can't read the weights ({error}); damaged, or not those of config.json") from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ValueError(f"{folder}: weights missing or of another shape: {', '.join(wrong[:3])}")
    return model.eval()


def _save_multitask(model: nn.Module, folder: Path) -> None:
    if adapters.adapters_of(model.encoder):
        (folder / "encoder").mkdir()
        _save_adapter(model.encoder, folder / "encoder", tuning_of(model))
    else:
        model.encoder.save_pretrained(folder / "encoder")
    save_file(tensors_of(model.heads.state_dict()), folder / "heads.safetensors")
    specs = {name: asdict(spec) for name, spec in model.specs.items()}
    (folder / "multitask.json").write_text(json.dumps({"heads": specs}, indent=1))


def _load_multitask(folder: Path, base: Any) -> nn.Module:
    from ..methods.multitask import Head, MultiTaskModel

    specs = read_json(folder / "multitask.json").get("heads")
    if not isinstance(specs, dict):
        raise ValueError(f"{folder}/multitask.json: no 'heads'; save the model again")
    try:
        heads = {
            name: Head(**{**spec, "label_names": tuple(spec["label_names"]) if spec.get("label_names") else None})
            for name, spec in specs.items()
        }
        if not all(isinstance(name, str) for head in heads.values() for name in head.label_names or ()):
            raise ValueError("label_names must be texts")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/multitask.json: {error}") from None
    tensors = read_tensors(folder / "heads.safetensors")
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if any(head.num_labels > largest for head in heads.values()):
        raise ValueError(f"{folder}/heads.safetensors does not fit multitask.json, which has more labels; mend it")
    adapted = (folder / "encoder" / "adapter_config.json").is_file()
    if adapted:
        refuse_adapter_sizes(folder / "encoder")
    encoder = _base_of(folder / "encoder", base) if adapted else _load_stock(folder / "encoder")
    model = MultiTaskModel(encoder, heads)
    if adapted:
        _put_adapter(model, model.encoder, folder / "encoder")
    try:
        model.heads.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder}/heads.safetensors does not fit multitask.json: {error}") from None
    return model.eval()


# ---------------------------------------------------------------------------------------------------- adapters

_OURS = ("lora", "houlsby", "pfeiffer")
_PREFIX = "base_model.model."  # what PEFT puts before the names of weights


def _save_adapter(model: nn.Module, folder: Path, tuning: Any = None) -> None:
    from ..inputs import assets

    tuning = tuning or tuning_of(model)
    if tuning is None:
        raise ValueError("the model has adapters that ftlib.tune did not put there; ftlib.merge(model) folds them in")
    # the base model's name, as it is known on another machine: an asset's hub id, else what it was loaded by
    place = getattr(model.config, "_name_or_path", "")
    hubs = {str(assets.cache_dir() / name): entry.get("hub") for name, entry in assets.manifest().items()}
    named = {"base_model_name_or_path": hubs.get(place) or place or None}
    if tuning.peft is not None:
        tuning.peft.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # a card with nothing in it but a path on this machine
        config = read_json(folder / "adapter_config.json") | named
    else:
        own = {f"{name}.{part}" for name, adapter in adapters.adapters_of(model).items() for part in adapter.own()}
        names = {name.removeprefix("encoder.") for name in tuning.names} | own
        state = {name: p for name, p in model.named_parameters() if name in names or p.requires_grad}
        save_file(tensors_of({_PREFIX + n: p for n, p in state.items()}), folder / "adapter_model.safetensors")
        config = through_peft.peft_config(model, head_modules(model)) | named
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    note = {
        "strategy": tuning.strategy, "options": tuning.options, "task": kind_of(model),
        "num_labels": len(model.config.id2label), "label_names": given_names(model.config.id2label),
    }  # fmt: skip
    (folder / "ftlib.json").write_text(json.dumps(note, indent=1, default=sorted))  # targets may be a set


def _base_of(folder: Path, base: Any) -> nn.Module:
    """The pretrained model under an adapter, with a new head of the right kind."""
    if isinstance(base, nn.Module):
        return copy.deepcopy(base)
    from ..inputs import assets
    from ..inputs.pretrained import load_model

    config = read_json(folder / "adapter_config.json")
    name = base if base is not None else config.get("base_model_name_or_path")
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ValueError(f"{folder}/adapter_config.json names no base model; pass base=... (a name, folder or model)")
    ours = {entry.get("hub"): asset for asset, entry in assets.manifest().items() if entry["kind"] == "model"}
    known = (folder / "ftlib.json").is_file()
    note = read_json(folder / "ftlib.json") if known else through_peft.head_guess(folder, config)
    given = {key: note[key] for key in ("num_labels", "label_names") if note.get("task") and note.get(key) is not None}
    try:
        return load_model(ours.get(name, name), note.get("task"), **given)
    except OSError as error:
        raise OSError(f"{folder}: can't load its base model {name!r}; pass base=... ({error})") from error


def _put_adapter(model: nn.Module, place: nn.Module, folder: Path, *, headless: bool = False) -> None:
    """Put the adapter in a folder on a base model; `place` is the part of the model that it was saved from."""
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    note = read_json(folder / "ftlib.json") if (folder / "ftlib.json").is_file() else {}
    tensors, heads = read_tensors(path), head_modules(place)
    ours = note.get("strategy") in _OURS
    if ours and not isinstance(note.get("options"), dict):
        raise ValueError(f"{folder}/ftlib.json: no 'options'; save the model again")
    if config.get("megatron_config") is not None:
        raise ValueError(f"{folder}/adapter_config.json: megatron_config would import a module; refused")
    try:
        tune(model, note["strategy"], **note["options"]) if ours else tune(model, through_peft.settings_in(folder))
    except Exception as error:  # PEFT has many types for settings that make no sense
        raise ValueError(f"{folder}: its settings make no adapter for this model ({error}); mend them") from error
    if ours:
        wanted = {n.removeprefix("encoder.") for n in tuning_of(model).names if not n.startswith("heads.")}
        got = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    else:
        import peft

        wrapper = tuning_of(model).peft
        fresh = peft.get_peft_model_state_dict(wrapper, save_embedding_layers=False)
        wanted, got = fresh.keys(), tensors
    # the base may bring the head along; the pooler, which PEFT does not save unless told to, comes from the base too
    inside = f"{place.base_model_prefix}."
    given = [f".{name}." for name in heads if headless or (not note and name.startswith(inside))]
    if missing := sorted(name for name in wanted - got.keys() if not any(part in f".{name}" for part in given)):
        remedy = "if that is the task head, pass base=a model that has it"
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more, which would start random; {remedy}")
    try:
        if ours:
            extra = place.load_state_dict(got, strict=False).unexpected_keys
        else:
            extra = set(peft.set_peft_model_state_dict(wrapper, fresh | got).unexpected_keys) - wanted
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not fit its base model: {error}") from error
    if extra:
        raise ValueError(f"{path} has weights that the model lacks: {', '.join(sorted(extra)[:3])}")
