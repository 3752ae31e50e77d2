"""What a sentence-transformers folder says beside the weights: how its vectors are made of hidden states.

modules.json lists the steps: encoder, pooling, Dense, Normalize.  Only JSON and safetensors are read; others refused.

To copy: this file, inputs/files.py, torch and transformers.
Source: sentence-transformers 6.2 (Reimers & Gurevych 2019, arXiv:1908.10084); older folders have the same files.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .files import read_tensors, said

_ENCODER_FILES = [f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "xlm-roberta", "xlnet")]
_ACTIVATIONS = {f"{k.__module__}.{k.__name__}": k for k in (nn.Tanh, nn.Identity, nn.ReLU, nn.GELU, nn.Sigmoid)}
_OLDER = {  # settings that chose a pooling before version 6
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}  # fmt: skip
_FREE = "max_seq_length do_lower_case unpad_inputs embedding_dimension word_embedding_dimension include_prompt"
_KNOWN = {  # setting of a module -> what it may be (None: anything); of others only what is off
    **dict.fromkeys([*_FREE.split(), "in_features", "out_features", "bias", *_OLDER]),
    "pooling_mode": [*_OLDER.values()], "activation_function": [*_ACTIVATIONS],
    "module_input_name": ["sentence_embedding"], "module_output_name": ["sentence_embedding", "token_embeddings"],
    "transformer_task": ["feature-extraction"],
    "modality_config": [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}],
}  # fmt: skip


@dataclass
class Recipe:
    """How vectors come from texts; as it is: for a model whose folder says nothing."""

    pooling: str = "mean"
    dense: tuple[nn.Module, ...] = ()  # on pooled vectors (batch, hidden)
    normalize: bool = False  # what comes out of these
    folder: str = ""  # that says so
    place: str = ""  # of the encoder, where it does not lie in the folder itself
    max_length: int | None = None
    prompt: str = ""
    lower: bool = False

    def text(self, text: Any) -> Any:
        """A text with the prompt in front; in small letters, letter by letter, if the folder says so."""
        if not (self.prompt or self.lower):
            return text
        if not isinstance(text, str):
            raise TypeError(f"{self.folder} wants a prompt or small letters: pass strings, not {text!r:.40}")
        return "".join(map(str.lower, self.prompt + text)) if self.lower else self.prompt + text


def recipe_of(place: str) -> Recipe:
    """Read a folder, or the files of a hub id; ValueError naming the module, or its setting, that is not done here."""
    steps = _said(place, "modules.json", several=True)
    if not steps:
        return Recipe()
    kinds, paths = [str(step.get("type")) for step in steps], [str(step.get("path") or "") for step in steps]
    kinds = [kind.rsplit(".", 1)[-1] if kind.startswith("sentence_transformers.") else kind for kind in kinds]
    encoder = next(filter(None, (_said(place, paths[0], file) for file in _ENCODER_FILES)), {})
    own = [encoder, *(_said(place, path, "config.json") for path in paths[1:]), {}]
    whole, pooling = _said(place, "config_sentence_transformers.json"), own[1]
    modes = [mode for key, mode in _OLDER.items() if pooling.get(key)] or ["mean"]
    pooling.setdefault("pooling_mode", modes if len(modes) > 1 else modes[0])
    prompt = (whole.get("prompts") or {}).get(whole.get("default_prompt_name")) or ""
    odd = ["no Pooling"] if len(kinds) == 1 else []
    odd += [] if whole.get("model_type") in (None, "SentenceTransformer") else [str(whole["model_type"])]
    odd += ["Pooling (include_prompt)"] if prompt and pooling.get("include_prompt") is False else []
    odd += ["Normalize before Dense"] if "Normalize" in kinds[:-1] else []
    for i, (kind, settings) in enumerate(zip(kinds, own, strict=False)):
        right = kind in (("Transformer",), ("Pooling",), ("Dense", "Normalize"))[min(i, 2)]
        wrong = [k for k, v in settings.items() if v and _KNOWN.get(k, ()) is not None and v not in _KNOWN.get(k, ())]
        odd += [f"{kind} ({key}: {settings[key]})" for key in wrong] if right else [kind]
    if odd:
        why = "is not done here; use sentence-transformers, or pass the model itself, and pooling="
        raise ValueError(f"{place}/modules.json: {', '.join(odd)} {why}")
    return Recipe(
        pooling=pooling["pooling_mode"], folder=place, place=os.path.join(place, paths[0]) if paths[0] else "",
        dense=tuple(_dense(place, paths[i], own[i]) for i, kind in enumerate(kinds) if kind == "Dense"),
        normalize="Normalize" in kinds, max_length=encoder.get("max_seq_length"), prompt=prompt,
        lower=bool(encoder.get("do_lower_case")),
    )  # fmt: skip


def _dense(place: str, path: str, settings: dict) -> nn.Module:
    file = os.path.join(path, "model.safetensors")
    weights = read_tensors(_file(place, file) or Path(place, file))
    weights = {name.removeprefix("linear."): tensor.float() for name, tensor in weights.items()}
    layer = nn.Linear(*weights["weight"].shape[::-1], "bias" in weights)
    layer.load_state_dict(weights)
    return nn.Sequential(layer, _ACTIVATIONS.get(settings.get("activation_function"), nn.Tanh)())


def _file(place: str, name: str) -> Path | None:
    """A file of a folder or hub id; None where there is none, or no hub: loading the model says that."""
    from transformers.utils import cached_file

    with suppress(OSError):
        found = cached_file(place, name)
        return found and Path(found)


def _said(place: str, *names: str, several: bool = False) -> Any:
    """What a JSON file says, an object or a list of them; nothing where there is none."""
    if (file := _file(place, os.path.join(*names))) is None:
        return {}
    with said(f"{file}: expected sentence-transformers' settings in JSON; mend it"):
        settings = json.loads(file.read_text("utf-8"))
        return list(map(dict, settings)) if several else dict(settings)


def settings_of(place: str) -> dict[str, Any]:
    """`pooling` and `normalize` of a folder, {} where it says nothing; ValueError for what a model would not learn."""
    recipe = recipe_of(place)
    asked = {"Dense": recipe.dense, "a default prompt": recipe.prompt, "small letters": recipe.lower}
    if odd := [name for name, there in asked.items() if there]:
        raise ValueError(f"{place}/modules.json asks for {', '.join(odd)}, which this task has not; pass its encoder")
    return {"pooling": recipe.pooling, "normalize": recipe.normalize} if recipe.folder else {}


def write_settings(folder: Path, config: Any) -> None:
    """Say beside a saved encoder how its vectors are made, from config.pooling and config.normalize."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", **({"Normalize": "2_Normalize"} if config.normalize else {})}
    steps = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    modes = {key: mode == config.pooling for key, mode in _OLDER.items()}
    (folder / "1_Pooling").mkdir()
    for name, content in {
        "modules.json": steps, "sentence_bert_config.json": {"max_seq_length": None, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size, **modes},
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
