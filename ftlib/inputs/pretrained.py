"""Pretrained tokenizers and models by short name, folder or hub id; what comes back is plain Transformers.

    tokenizer = load_tokenizer("minilm")
    model = load_model("minilm", task="sequence-classification", num_labels=2)

Weights are float32 and the model is in eval mode unless you ask otherwise. No remote code is ever run, and
safetensors files are preferred to pickles. Needs: files.py, assets.py, wheels.py, torch and transformers.
"""

import contextlib
import logging
import os
import re
from pathlib import Path

from . import assets

# task -> (Transformers class, ending of the architecture name, problem_type)
_TASKS = {
    "encoder": ("AutoModel", "", None),
    "sequence-classification": (
        "AutoModelForSequenceClassification", "ForSequenceClassification", "single_label_classification",
    ),
    "multi-label-classification": (
        "AutoModelForSequenceClassification", "ForSequenceClassification", "multi_label_classification",
    ),
    "regression": ("AutoModelForSequenceClassification", "ForSequenceClassification", "regression"),
    "token-classification": ("AutoModelForTokenClassification", "ForTokenClassification", None),
}  # fmt: skip

# Parts that a task may start new although they lie inside the encoder: the pooler is a head in all but name.
_MAY_BE_NEW = re.compile(r"(^|\.)(pooler|pooling_layer)(\.|$)")


def load_tokenizer(name, **kwargs):
    """The fast tokenizer of a model named as in `load_model`; `kwargs` go to AutoTokenizer.from_pretrained.

    Truncation and padding happen only where the caller asks for them: settings baked into tokenizer.json
    are removed (minilm's file would cut and pad every text to 128 tokens). `model_max_length` is the length
    of the model's position table: 512 for minilm, which was trained on 128 tokens and which
    sentence-transformers cuts at 256. A folder without tokenizer files raises ValueError.

    >>> load_tokenizer("mini-lm")
    Traceback (most recent call last):
        ...
    ValueError: no asset is called 'mini-lm'; did you mean minilm? ...
    """
    from transformers import AutoTokenizer

    place = _locate(name, kwargs)
    with _explain(name, place):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **kwargs)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # Transformers made one up from config.json
        raise ValueError(f"'{name}' has no tokenizer files; load that of the model it was trained from")
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
            tokenizer.init_kwargs.pop(key, None)  # or save_pretrained would write them down again
    return tokenizer


def load_model(
    name, task: str | None = None, num_labels: int | None = None, *, label_names=None, seed: int = 0, **kwargs
):
    """A Transformers model: the pretrained encoder with a new head for `task` (None or "encoder": no head).

    name: a short name ("minilm"), an existing folder, or a hub id. task: "sequence-classification",
    "multi-label-classification", "regression", "token-classification". num_labels may come from `label_names`
    (which fill config.id2label); regression defaults to 1; a folder saved with a head for this task keeps
    its own. New head weights are drawn from `seed`, so two calls give equal models, and the global random
    state is left alone. Weights are float32 and the model is in eval mode. `kwargs` go to from_pretrained:
    dtype, attn_implementation, values of the config.

    Raises ValueError for an unknown task or name, a missing or contradictory number of labels, weights that
    do not fit, or a checkpoint that lacks weights of the encoder itself.

    >>> load_model("minilm", task="classify")
    Traceback (most recent call last):
        ...
    ValueError: unknown task 'classify'; choose from encoder, sequence-classification, ...
    """
    task = "encoder" if task is None else task
    if task not in _TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(_TASKS)}")
    num_labels, label_names = _check_labels(task, num_labels, label_names)

    import torch
    import transformers

    place = _locate(name, kwargs)
    class_name, ending, problem_type = _TASKS[task]
    if task != "encoder":
        if num_labels is None:
            num_labels = _labels_of_checkpoint(place, ending, kwargs)
            if num_labels is None:
                raise ValueError(f"task '{task}' needs num_labels=… or label_names=[…]")
        else:
            kwargs["num_labels"] = num_labels
        kwargs["problem_type"] = problem_type
        if label_names is not None:
            kwargs["id2label"] = dict(enumerate(label_names))
            kwargs["label2id"] = {label: i for i, label in enumerate(label_names)}
    kwargs.setdefault("dtype", torch.float32)  # Transformers 5 would keep whatever type the file has
    with _explain(name, place), _seeded(seed, kwargs), _quiet_loading(name):
        model, info = getattr(transformers, class_name).from_pretrained(
            place, trust_remote_code=False, output_loading_info=True, **kwargs
        )
    _check_encoder(name, model, info, task)
    return model


def _check_labels(task, num_labels, label_names):
    """Number and names of the labels, made consistent; (None, None) when the checkpoint has to tell."""
    if label_names is not None:
        label_names = [str(label) for label in label_names]
        repeated = sorted({label for label in label_names if label_names.count(label) > 1})
        if repeated:
            raise ValueError(f"label_names has {repeated[0]!r} more than once; each label needs its own name")
        if num_labels is not None and num_labels != len(label_names):
            raise ValueError(f"num_labels={num_labels} but label_names has {len(label_names)} names")
        num_labels = len(label_names)
    if task == "encoder":
        if num_labels is not None:
            raise ValueError("num_labels and label_names belong to a head; give a task as well")
        return None, None
    if num_labels is None:
        return (1, None) if task == "regression" else (None, None)
    if type(num_labels) is not int or num_labels < 1:
        raise ValueError(f"num_labels must be a whole number of at least 1, got {num_labels!r}")
    if task == "sequence-classification" and num_labels == 1:
        raise ValueError("one label leaves nothing to classify; use num_labels=2, or task='regression'")
    return num_labels, label_names


def _locate(name, kwargs) -> str:
    """Folder or hub id that from_pretrained understands."""
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code is refused: ftlib runs no code from a model's folder or hub page")
    name = os.fspath(name)
    known = assets.manifest()
    if name in known:
        if known[name]["kind"] != "model":
            raise ValueError(f"'{name}' is a corpus; load it with load_corpus('{name}')")
        return str(assets.path(name))
    if os.path.isdir(name):
        if os.path.isfile(os.path.join(name, "config.json")):
            from .files import read_json, refuse_kernels

            refuse_kernels(read_json(Path(name) / "config.json"), f"{name}/config.json")
        return name
    models = [asset for asset, entry in known.items() if entry["kind"] == "model"]
    looks_local = name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1
    if looks_local:
        raise ValueError(f"there is no folder '{name}'")
    if "/" not in name and assets.near_names(name, models):
        raise ValueError(assets.unknown_name(name, models))
    return name


@contextlib.contextmanager
def _explain(name, place):
    """Transformers says the same for a misspelt name and a missing network; add what was looked for where."""
    try:
        yield
    except OSError as error:
        if os.path.isdir(place):
            raise
        models = ", ".join(asset for asset, entry in assets.manifest().items() if entry["kind"] == "model")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"'{name}' is no asset of ours and no folder here, so it was looked for on the hub, which "
            f"failed: {reason} Without the hub, use one of: {models}"
        ) from error
    except (ValueError, TypeError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # Transformers has many types for settings that make no sense
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"'{name}': Transformers can't use its files ({reason}); mend config.json") from error


def _labels_of_checkpoint(place: str, ending: str, kwargs) -> int | None:
    """num_labels of a checkpoint that already has this kind of head, else None."""
    from transformers import AutoConfig

    places = ("revision", "subfolder", "cache_dir", "local_files_only", "token")
    where = {key: kwargs[key] for key in places if key in kwargs}
    with _explain(place, place):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **where)
    has_head = any(name.endswith(ending) for name in config.architectures or [])
    return config.num_labels if has_head else None


@contextlib.contextmanager
def _seeded(seed: int, kwargs):
    """Draw new weights from `seed` and put the global random state back."""
    import torch

    # Seeding CUDA would start it, or change its global state, for a head that is drawn on the CPU.
    wanted = kwargs.get("device_map") is not None or torch.cuda.is_initialized()
    on_cuda = wanted and torch.cuda.is_available()
    devices = list(range(torch.cuda.device_count())) if on_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


@contextlib.contextmanager
def _quiet_loading(name):
    """Drop the bar over local tensors and the table of new weights (_check_encoder looks at those instead).

    When loading fails because shapes differ, the table goes into the error.
    """
    from transformers.utils import logging as transformers_logging

    reports = []

    def keep(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" in record.getMessage():
            reports.append(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()))
            return False
        return True

    def bar(factory, args, options):
        return factory(*args, **{**options, "disable": True})

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    # The hook touches Transformers' own bars alone; downloads from the hub keep theirs.
    set_hook = getattr(transformers_logging, "set_tqdm_hook", lambda hook: None)
    before = set_hook(bar)
    try:
        yield
    except RuntimeError as error:
        if not reports:
            raise
        raise ValueError(
            f"the weights of '{name}' do not fit the model asked for; num_labels of a saved head must be "
            f"what it was saved with (ignore_mismatched_sizes=True starts a new head instead).\n{reports[-1]}"
        ) from error
    finally:
        set_hook(before)
        logger.removeFilter(keep)


def _check_encoder(name, model, info: dict, task: str) -> None:
    """Only the head may be new; a hole in the encoder means the checkpoint is not what it is taken for."""
    prefix = "" if task == "encoder" else f"{model.base_model_prefix}."
    fresh = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    holes = sorted(key for key in fresh if key.startswith(prefix) and not _MAY_BE_NEW.search(key))
    if holes:
        more = f" and {len(holes) - 3} more" if len(holes) > 3 else ""
        raise ValueError(
            f"the checkpoint '{name}' lacks weights of the encoder itself ({', '.join(holes[:3])}{more}); "
            f"they would start random. Is it a checkpoint of {type(model).__name__}?"
        )
