"""Models on disk: safetensors and JSON, never pickle; adapters in PEFT's format; proved, then moved into place.

To copy: this file, engine/{untrusted,bases}.py, inputs/{files,pretrained,assets,sentence_folders}.py, core/, tasks/,
torch, transformers and methods/{tuning,adapters,through_peft,optimizing,regularization,speedups}.py
(methods/{multitask,pruning}.py, peft).
"""

import copy
import json
import os
import re
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..core.anatomy import head_modules, unwrapped
from ..inputs import files, pretrained
from ..inputs.files import fingerprint, read_json, read_tensors, said, tensors_of
from ..inputs.sentence_folders import write_settings
from ..methods import adapters, through_peft
from ..methods.optimizing import tuning_of
from ..methods.tuning import tune
from ..tasks.task import TASKS, given_names, kind_of, names_of, vectors_of
from . import bases
from .bases import PREFIX
from .untrusted import refuse_large_numbers, refuse_other_files, refuse_sizes


def save(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None, about: dict | None = None) -> Path:
    """Write a model to a folder that `load`, and for stock models `from_pretrained`, opens.

    An adapter ("lora", "houlsby", "pfeiffer", a PEFT configuration) becomes adapter_config.json and
    adapter_model.safetensors, PEFT's format, the head inside, and ftlib.json: which head, which base.  Embeddings that
    were changed travel with it; any other base that is not what lies on disk under its name is saved in `base/` too,
    with a warning.  A MultiTaskModel becomes `encoder/` (for AutoModel), `heads.safetensors` and `multitask.json`.
    about: {"data": ..., "licence": ..., "metrics": {...}, "command": ...}, all optional, for README.md, the model card.

    What was written is opened again before it takes the place of an older model, whose files go, the tokenizer's only
    where `tokenizer` is given; any other file stays.  Killed or out of disk, the folder holds the old or the new one.
    Raises ValueError for what would not come back, OSError where the folder can't be written; what was there stays.
    """
    for what in (model, *([] if tokenizer is None else [tokenizer])):
        if not hasattr(what, "save_pretrained") and not hasattr(what, "specs"):
            raise TypeError(f"got a {type(what).__name__}, which can't be saved; pass one of Transformers'")
    model, folder = getattr(model, "_orig_mod", model), Path(folder).resolve()  # what torch.compile has wrapped
    refuse_other_files(folder)
    with pretrained.quiet(), files.replacing(folder) as new:
        several = hasattr(model, "specs") and hasattr(model, "heads")
        trunk, part = (model.encoder, "encoder") if several else (model, ".")
        (new / part).mkdir(exist_ok=True)
        tuning = tuning_of(model)
        wrapper = trunk if hasattr(trunk, "get_base_model") else getattr(tuning, "peft", None)
        if adapters.adapters_of(trunk) or wrapper is not None:
            if hasattr(trunk.config, "kept_units"):
                raise ValueError("the model was pruned under its adapter; ftlib.merge(model) folds that in")
            _save_adapter(trunk, new / part, folder / part, tuning, wrapper)
        else:
            _save_whole(trunk, new / part)
        if vectors_of(trunk):
            write_settings(new, unwrapped(trunk).config)
        if several:
            save_file(tensors_of(model.heads.state_dict()), new / "heads.safetensors")
            specs = {name: asdict(spec) for name, spec in model.specs.items()}
            (new / "multitask.json").write_text(json.dumps({"heads": specs}, indent=1))
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        write_card(model, folder, about, new)
    return folder


def load(folder: str | os.PathLike, *, base: Any = None) -> nn.Module:
    """Read a model that `save` (or `save_pretrained`) wrote, in eval mode, with its own head.

    Weights become float32, also those that were saved in half precision: `from_pretrained` keeps their type.
    base: for an adapter, the pretrained model in place of the one it names: a short name, folder or hub id, or a model
    with a head, which is copied.  Another one than it was trained on is refused, a given one taken with a warning.
    Only safetensors are read, and only model classes of Transformers are built; no code from the folder runs.
    Raises FileNotFoundError for a folder that is not there, ValueError naming the file for one that is not whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; save a model there first: ftlib.save(model, {str(folder)!r})")
    with pretrained.quiet(), files.settled(folder):
        several = (folder / "multitask.json").is_file()
        inner = folder / "encoder" if several else folder
        adapted = (inner / "adapter_config.json").is_file() and not (inner / "config.json").is_file()
        if base is not None and not adapted:
            raise ValueError(f"base={base!r}: {folder} holds a whole model, which needs none")
        note = read_json(inner / "ftlib.json") if adapted and (inner / "ftlib.json").is_file() else {}  # PEFT has none
        trunk, wrong = (_base_of(inner, base, note), []) if adapted else _opened(inner, dtype=torch.float32)
        if wrong:
            raise ValueError(f"{inner}: weights missing or of another shape: {', '.join(wrong[:3])}")
        if hasattr(trunk.config, "kept_units") and not adapted:
            from ..methods.pruning import narrowed

            with said(f"{folder}: config.json, kept_units, is not what was taken out of this model"):
                narrowed(trunk)
        model = _with_heads(trunk, folder) if several else trunk
        if adapted:
            _put_adapter(model, trunk, inner, base, note)
    return model.eval()


def _opened(folder: Path, **options: Any) -> tuple[nn.Module, list[str]]:
    """The whole model in a folder, and the names of weights that the file, or the model, lacks or has otherwise."""
    kind, options = refuse_sizes(folder), {"use_safetensors": True, "trust_remote_code": False} | options
    with said(f"{folder}: can't read the weights; damaged, or not those of config.json"):
        model, info = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    wrong = sorted(str(name) for how in ("missing", "mismatched") for name in info[f"{how}_keys"])
    return pretrained.say_ties(model), wrong


def _save_whole(model: nn.Module, folder: Path) -> None:
    """Write a stock model; ValueError naming what `load` would not bring back as it is: weights, ties, shapes."""
    if coded := [name for name in model.state_dict() if name.endswith(".codes")]:
        raise ValueError(f"{coded[0]} is quantized, which no config says; save the model before ftlib.quantize")
    if hasattr(model.config, "kept_units"):
        from ..methods.pruning import widened

        model = widened(model)
    model.save_pretrained(folder)
    config, labels = read_json(folder / "config.json"), names_of(model)
    if type(model.config).from_dict(dict(config)).id2label != labels:  # two, which BART takes for its three: left out
        config |= {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # opened again: the structure without its weights, where accelerate can (Trainer and PEFT bring it), and a sample
    place = {"device_map": "meta"} if find_spec("accelerate") else {}
    was, (twin, lost) = model.state_dict(), _opened(folder, **place)
    shapes = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    lost += [name for name in was.keys() | shapes if name not in was or shapes.get(name) != was[name].shape]
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            own = [name for name in file.keys() if name in was and name not in lost]
            pairs = ((name, file.get_tensor(name)) for name in own[:: len(own) // 32 + 1])
            lost += [name for name, tensor in pairs if fingerprint({name: tensor}) != fingerprint({name: was[name]})]
    if lost:
        remedy = "model.save_pretrained(folder) writes it as Transformers can"
        raise ValueError(f"{min(lost)} and {len(lost) - 1} more weights would not come back; {remedy}")


def _with_heads(encoder: nn.Module, folder: Path) -> nn.Module:
    from ..methods.multitask import Head, MultiTaskModel

    refuse_large_numbers(folder, "heads.safetensors", "multitask.json")
    tensors = read_tensors(folder / "heads.safetensors")
    with said(f"{folder}/multitask.json describes no heads; mend it"):
        specs = read_json(folder / "multitask.json")["heads"]
        for spec in specs.values():
            spec["label_names"] = spec.get("label_names") and tuple(map(str, spec["label_names"]))
        model = MultiTaskModel(encoder, {name: Head(**spec) for name, spec in specs.items()})
    with said(f"{folder}/heads.safetensors does not fit multitask.json"):
        model.heads.load_state_dict(tensors)
    return model


_OURS, _ADAPTER = ("lora", "houlsby", "pfeiffer"), "adapter_model.safetensors"


def _save_adapter(model: nn.Module, folder: Path, target: Path, tuning: Any, wrapper: Any) -> None:
    """Write an adapter; target: where the folder will be; wrapper: the PeftModel around the model, if there is one."""
    path = folder / _ADAPTER
    if tuning is None and wrapper is None:
        raise ValueError("the model has adapters that ftlib.tune did not put there; ftlib.merge(model) folds them in")
    model = unwrapped(model)
    heads = [name for name in head_modules(model) if not name.startswith(f"{model.base_model_prefix}.")]
    if wrapper is not None:
        wrapper.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a card with nothing in it but a path on this machine
        config, state = read_json(folder / "adapter_config.json"), read_tensors(path)
        if lost := [] if tuning else [name for name in heads if not any(f".{name}." in key for key in state)]:
            raise ValueError(f"PEFT does not save the head {lost[0]!r}; name it in the configuration's modules_to_save")
    else:
        own = {f"{name}.{part}" for name, adapter in adapters.adapters_of(model).items() for part in adapter.own()}
        names = {*tuning.names, *(name.removeprefix("encoder.") for name in tuning.names)} | own
        state = tensors_of({PREFIX + n: p for n, p in model.named_parameters() if n in names or p.requires_grad})
        config = through_peft.peft_config(model, head_modules(model))
    prefix = "base_model." if wrapper is not None and wrapper.active_peft_config.is_prompt_learning else PREFIX
    config["base_model_name_or_path"], identity, words = bases.put_down(model, state, folder, target)
    state |= tensors_of({prefix + key: tensor for key, tensor in words.items()})
    save_file(state, path, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    note = {
        "strategy": tuning and tuning.strategy, "options": tuning.options if tuning else {}, "task": kind_of(model),
        "num_labels": len(names_of(model)), "label_names": given_names(names_of(model)), "base": identity,
    }  # fmt: skip
    note |= vectors_of(model)
    (folder / "ftlib.json").write_text(json.dumps(note, indent=1, default=sorted))  # targets may be a set
    if fingerprint(read_tensors(path)) != fingerprint(state) or (wrapper and not through_peft.settings_in(folder)):
        raise OSError(f"{path}: what was read back is not what was written")


def _base_of(folder: Path, base: Any, note: dict) -> nn.Module:
    """The pretrained model under an adapter, with a new head of the right kind."""
    refuse_large_numbers(folder, _ADAPTER, "adapter_config.json", "ftlib.json")
    if isinstance(base, nn.Module):
        return copy.deepcopy(base)
    config, own = read_json(folder / "adapter_config.json"), folder / "base"
    name = base if base is not None else config.get("base_model_name_or_path")
    if base is None and (own / "config.json").is_file():
        refuse_sizes(own)
        name = own
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ValueError(f"{folder}/adapter_config.json names no base model; pass base=... (a name, folder or model)")
    note = note or through_peft.head_guess(folder, config)
    classes = note.get("task") in TASKS and TASKS[note["task"]].labeled
    labels = ("num_labels", "label_names", *TASKS[note["task"]].vectors) if classes else ()
    given = {key: note[key] for key in labels if note.get(key) is not None}
    safe = {"use_safetensors": True} if name == own else {}
    with said(f"{folder}: can't load its base model {str(name)!r}; pass base=..."):
        return pretrained.load_model(pretrained.local_name(name), note.get("task"), **given, **safe)


def _put_adapter(model: nn.Module, place: nn.Module, folder: Path, base: Any, note: dict) -> None:
    """Put the adapter in a folder on a base model; `place` is the part of the model that it was saved from."""
    path, heads, ours = folder / _ADAPTER, head_modules(place), note.get("strategy") in _OURS
    tensors = read_tensors(path)
    if read_json(folder / "adapter_config.json").get("megatron_config") is not None:
        raise ValueError(f"{folder}/adapter_config.json: megatron_config would import a module; refused")
    if place is model and note.get("strategy") and heads and not isinstance(base, nn.Module):
        if not any(f".{part}." in f".{name}" for part in heads for name in tensors):
            what = f"{path} lacks the task head ({', '.join(heads)}), which would start random"
            raise ValueError(f"{what}; pass base=a model that has it")
    bases.fit_to(place, tensors, note.get("base"), folder, base is not None)
    with said(f"{folder}: its settings make no adapter for this model; mend them"):
        tune(model, note["strategy"], **note["options"]) if ours else tune(model, through_peft.settings_in(folder))
    if ours:
        above = "" if place is model else "encoder."  # of a model of several heads; T5's own encoder is another
        wanted = {n.removeprefix(above) for n in tuning_of(model).names if not n.startswith("heads.")}
        got = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    else:
        import peft

        fresh = peft.get_peft_model_state_dict(tuning_of(model).peft, save_embedding_layers=False)
        wanted, got = fresh.keys(), tensors
    # the base may bring the head along; the pooler, which PEFT does not save unless told to, comes from the base too
    brought = heads if isinstance(base, nn.Module) and place is model else []
    brought = brought or [n for n in heads if not note.get("strategy") and n.startswith(f"{place.base_model_prefix}.")]
    if missing := sorted(n for n in wanted - got.keys() if not any(f".{part}." in f".{n}" for part in brought)):
        remedy = "if that is the task head, pass base=a model that has it"
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more, which would start random; {remedy}")
    with said(f"{path} does not fit its base model"):
        if ours:
            extra = place.load_state_dict(got, strict=False).unexpected_keys
        else:
            extra = peft.set_peft_model_state_dict(tuning_of(model).peft, fresh | got).unexpected_keys
    if extra := sorted(set(extra) - wanted):
        raise ValueError(f"{path} has weights that the model lacks: {', '.join(extra[:3])}")


_MARK = "<!-- Written by ftlib.save, which replaces it; take this line away to keep your own. -->"
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model or data set on the Hub; of a licence


def write_card(model: nn.Module, folder: Path, about: dict[str, Any] | None, place: Path | None = None) -> None:
    """Write a card, in the Hub's form, for a folder (in `place`), unless it has its own; about: as `save` takes it."""
    there, place, about = folder / "README.md", place or folder, about or {}
    if there.exists() and _MARK not in there.read_text("utf-8", "replace"):
        return warnings.warn(f"{there} is your own and stays; no model card", stacklevel=3) if about else None
    heads = getattr(model, "specs", {})
    inner = unwrapped(model.encoder if heads else model)
    kind, home = kind_of(inner), pretrained.public_name(getattr(inner.config, "_name_or_path", "")) or ""
    base = f"the folder `{Path(home).name}`" if os.path.isabs(home) else home  # the path says nothing elsewhere
    data, licence = about.get("data") or [], str(about.get("licence") or "")
    data, known = [data] if isinstance(data, str) else [*map(str, data)], _ID.fullmatch(licence)
    front = {
        "library_name": "peft" if (place / "adapter_config.json").is_file() else "transformers", "tags": ["ftlib"],
        "base_model": home if base == home else "", "datasets": [*filter(_ID.fullmatch, data)],
        "license": licence.lower() if known else licence and "other", "license_name": "" if known else licence,
        "pipeline_tag": TASKS[kind].use if kind else "feature-extraction",
    }  # fmt: skip
    body = {
        "base model": base, "task": ", ".join(f"{name}: {head.task}" for name, head in heads.items()) or kind,
        "labels": ", ".join((given_names(names_of(inner)) or [])[:20]),
        "what was trained": getattr(tuning_of(model), "strategy", None), **about, "data": ", ".join(data),
        "metrics": ", ".join(f"{name} {number}" for name, number in (about.get("metrics") or {}).items()),
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }  # fmt: skip
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items() if value)]
    lines += ["---", _MARK, f"\n# Fine-tuned {Path(home).name or 'model'}\n"]
    lines += [f"- {key}: {value}" for key, value in body.items() if value]
    (place / "README.md").write_text("\n".join(lines) + "\n", "utf-8")
