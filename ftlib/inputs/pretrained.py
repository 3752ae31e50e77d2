"""Pretrained tokenizers and models by short name, folder or hub id; what comes back is plain Transformers.

To copy: this file, inputs/{assets,files,sentence_folders}.py, core/{anatomy,batches}.py, tasks/, torch, transformers.
Weights are float32, the model in eval mode, unless you ask otherwise. No remote code is run; safetensors come first.
"""

import contextlib
import importlib.util
import logging
import os
import re
from collections import Counter
from pathlib import Path

import torch

from ..core.batches import one_of, refuse, whole
from ..tasks.task import TASKS, auto_class
from . import assets, files, sentence_folders

_POOLER = r"(^|\.)(pooler|pooling_layer)(\.|$)"  # may start new although it lies inside the encoder: a head in effect


def load_tokenizer(name, **kwargs):
    """The fast tokenizer of a model named as in `load_model`; `kwargs` go to AutoTokenizer.from_pretrained.

    It truncates and pads only where the caller asks for it. `model_max_length` is the length of the model's position
    table: 512 for minilm, trained on 128. A folder without tokenizer files raises ValueError, one whose files
    sentencepiece reads ImportError without that.
    """
    from transformers import AutoTokenizer

    place = _locate(name, kwargs)
    if any(Path(place).glob("*.spm")) and importlib.util.find_spec("sentencepiece") is None:
        raise ImportError(f"'{name}': sentencepiece reads its tokenizer; pip install sentencepiece sacremoses")
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


def tokenizer_of(model):
    """The tokenizer of a model that was loaded by name; ValueError for another."""
    if not (name := getattr(model.config, "_name_or_path", None)):
        raise ValueError("the model was not loaded by name, so its tokenizer is unknown; pass tokenizer=...")
    return load_tokenizer(name)


def load_model(name, task: str | None = None, num_labels: int | None = None, *, label_names=None, seed=0, **kwargs):
    """A Transformers model: the pretrained encoder with a new head for `task` (None or "encoder": no head).

    name: a short name ("minilm"), an existing folder, or a hub id. task: a kind of task, "sequence-classification" say.
    num_labels may come from `label_names` (which fill config.id2label); regression defaults to 1; a folder saved with a
    head for this task keeps its own. New head weights are drawn from `seed`; the global random state is left alone.
    "causal-lm", "masked-lm" have their vocabulary for labels, and a trained head; "question-answering" start and end.
    `kwargs` go to from_pretrained: dtype, attn_implementation, values of the config.

    Raises ValueError for an unknown task or name, a missing or contradictory number of labels, weights that do not
    fit, a checkpoint that lacks weights of the encoder itself, or, for "causal-lm", any, or one that looks ahead.
    """
    kind = TASKS.get(one_of("task", task or "encoder", ("encoder", *TASKS)))
    num_labels, label_names = _check_labels(kind, num_labels, label_names)

    import transformers

    place = _locate(name, kwargs)
    if kind is not None and kind.labeled:
        if num_labels is None:  # a checkpoint with this kind of head knows
            places = kwargs.keys() & {"revision", "subfolder", "cache_dir", "local_files_only", "token"}
            where = {key: kwargs[key] for key in places} | {"trust_remote_code": False}
            with _explain(name, place):
                config = transformers.AutoConfig.from_pretrained(place, **where)
            if not any(name.endswith(kind.architecture) for name in config.architectures or []):
                raise ValueError(f"task '{task}' needs num_labels=… or label_names=[…]")
            num_labels = config.num_labels
        kwargs |= {"num_labels": num_labels, "problem_type": kind.problem_type}
    if label_names is not None:
        kwargs |= {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    if kind is not None and kind.vectors:
        kwargs = sentence_folders.settings_of(place) | kwargs
    kwargs.setdefault("dtype", torch.float32)  # Transformers 5 would keep whatever type the file has
    auto = auto_class(task) if kind else transformers.AutoModel
    if kind is None and (path := Path(place, "config.json")).is_file():  # T5's encoder alone, say
        named = (files.read_json(path).get("architectures") or [""])[0]
        auto = getattr(transformers, named, auto) if str(named).endswith("EncoderModel") else auto
    # shapes that differ come back in `info`, whose table would go to the log instead of the error
    options = kwargs | {"ignore_mismatched_sizes": True, "output_loading_info": True, "trust_remote_code": False}
    with _explain(name, place), quiet(), torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: CUDA is not started, nor its state touched
        model, info = auto.from_pretrained(place, **options)
    _check_weights(name, model, info, kind, kwargs.get("ignore_mismatched_sizes", False))
    return say_ties(model)


def say_ties(model):
    """The model, its config saying if its output layer has weights of its own, which `tie_weights` would replace."""
    out, words = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("output", "input"))
    if out is not None and words is not None and out.weight is not words.weight:
        model.config.tie_word_embeddings = False
    return model


def _check_labels(kind, num_labels, label_names):
    """Number and names of the labels, made consistent; (None, None) when the checkpoint has to tell."""
    names = None if label_names is None else [str(label) for label in label_names]
    count = num_labels if names is None else len(names)
    if kind and (not kind.labeled or kind.outputs):
        what = f"this task has {kind.outputs} outputs" if kind.labeled else "the labels of a language model are tokens"
        own = count is not None and (names or count != kind.outputs)
        refuse((own, f"{what}: leave out num_labels and label_names"))
        return kind.outputs, None
    if count is None:
        return (1 if kind and kind.probabilities is None else None), None
    one = whole("num_labels", count) == 1 and kind and kind.problem_type == "single_label_classification"
    repeated = [label for label, times in Counter(names).items() if times > 1]
    refuse(
        (repeated, f"label_names has {str(repeated[:1])[1:-1]} more than once; each label needs its own name"),
        (num_labels not in (None, count), f"num_labels={num_labels} but label_names has {count} names"),
        (kind is None, "num_labels and label_names belong to a head; give a task as well"),
        (one, "one label leaves nothing to classify; use num_labels=2, or task='regression'"),
    )
    return count, names


def _locate(name, kwargs) -> str:
    """Folder or hub id that from_pretrained understands."""
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code is refused: ftlib runs no code from a model's folder or hub page")
    name = os.fspath(name)
    if os.path.isdir(name) and (os.path.basename(name) != name or name not in _listed()):
        if (config := Path(name, "config.json")).is_file():
            files.refuse_kernels(files.read_json(config), str(config))
        return name
    if (kind := _listed().get(name, {}).get("kind")) == "model":
        return str(assets.path(name))
    if kind:
        raise ValueError(f"'{name}' is a {kind}; {assets.WAYS[kind]}('{name}')")
    local = name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1
    if local or ("/" not in name and assets.did_you_mean(name, _models())):
        raise ValueError(f"there is no folder '{name}'" if local else assets.unknown_name(name, _models()))
    return name


def _listed() -> dict[str, dict]:
    """The assets; none where a copy of this file came without their list: folders and hub ids need none."""
    with contextlib.suppress(FileNotFoundError):
        return assets.manifest()
    return {}


def _models() -> dict[str, str]:
    """{model among the assets: its hub id}."""
    return {name: entry.get("hub") for name, entry in _listed().items() if entry["kind"] == "model"}


def public_name(place: str) -> str | None:
    """What the place a model came from is called elsewhere: an asset's hub id or name, a folder's path, a hub id."""
    hubs = {str(assets.cache_dir() / name): hub or name for name, hub in _models().items()}
    return hubs.get(place) or (os.path.abspath(place) if os.path.isdir(place) else place) or None


def local_name(name: str) -> str:
    """The asset with this hub id, if it is one."""
    return {hub: asset for asset, hub in _models().items()}.get(name, name)


@contextlib.contextmanager
def _explain(name, place):
    """Transformers says the same for a misspelt name and a missing network; add what was looked for where."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # Transformers has many types for settings that make no sense
        if isinstance(error, OSError) and os.path.isdir(place):
            raise
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        if not isinstance(error, OSError):
            raise ValueError(f"'{name}': Transformers can't use its files ({reason}); mend config.json") from error
        looked = f"'{name}' is no asset of ours and no folder here, so it was looked for on the hub, which failed"
        raise OSError(f"{looked}: {reason} Without the hub, use one of: {', '.join(_models())}") from error


@contextlib.contextmanager
def quiet():
    """Without Transformers' bars over tensors, table of new weights, and warning of T5 1.1's untied layer."""
    from transformers.utils import logging as theirs

    def wanted(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        table = record.funcName == "log_state_dict_report" and "CONVERSION" not in said
        return not table and not (record.funcName == "tie_weights" and "NOT tie" in said)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(wanted)
    before = theirs.set_tqdm_hook(lambda factory, args, options: factory(*args, **options | {"disable": True}))
    try:
        yield
    finally:
        theirs.set_tqdm_hook(before)
        logger.removeFilter(wanted)


def _check_weights(name, model, info: dict, kind, may_differ: bool) -> None:
    """Only the head of a classifier may be new; another hole means the checkpoint is not what it is taken for."""
    different = info["mismatched_keys"]  # (key, shape in the file, shape asked for)
    other = [f"{key} {tuple(saved)} in the file, {tuple(asked)} asked for" for key, saved, asked in different]
    if other and not may_differ:
        remedy = "num_labels of a saved head is what it was saved with; ignore_mismatched_sizes=True starts anew"
        raise ValueError(f"the weights of '{name}' do not fit ({'; '.join(sorted(other)[:3])}): {remedy}")
    prefix = f"{model.base_model_prefix}." if kind else ""
    computed = {f"{n}.weight" for n, module in model.named_modules() if "Sinusoidal" in type(module).__name__}
    fresh = {*info["missing_keys"], *(key[0] for key in different)} - computed  # Marian's and Pegasus' sines
    holes = sorted(key for key in fresh if key.startswith(prefix) and not re.search(_POOLER, key))
    if holes:
        lost = f"{len(holes)} weights of the encoder itself ({', '.join(holes[:3])}, …), which would start random"
        raise ValueError(f"the checkpoint '{name}' lacks {lost}; is it one of {type(model).__name__}?")
    if kind is None or kind.labeled:
        return
    tokens = model.get_input_embeddings().num_embeddings
    causal = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    lost = f"lacks {', '.join(sorted(fresh)[:3])}: a head that starts random over {tokens} tokens is no language model"
    masks, of = kind.draw is not None, type(model).__name__
    remedy = "start one on an encoder: ftlib.masked_head" if masks else "load one that predicts the next token"
    refuse(
        (fresh, f"the checkpoint '{name}' {lost}; {remedy}"),
        (masks and not of.endswith(kind.architecture), f"'{name}' is a {of}, which predicts no masked tokens"),
        (causal == {False} and not masks, f"'{name}' is no language model: in {of} each token sees all others"),
    )
