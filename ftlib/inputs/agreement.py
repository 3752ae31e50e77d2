"""What a model takes, compared once with what it is given: tokenizer, columns of rows, names of classes.

Another padding id, or classes in another order, change answers without an error.  Every door (fit, evaluate, predict,
extract_features) asks here; right is the stock model on each row alone.

To copy: this file, core/anatomy.py, core/batches.py and tasks/.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..core import anatomy
from ..core.batches import Row, short
from ..tasks.task import given_names, names_of

# Convolutions, blocks, hashes or Fourier sums over the whole row, padding included, whatever the mask says.
_MIXING = "big_bird bigbird_pegasus canine convbert fnet funnel mobilebert nystromformer reformer yoso".split()


class Padding(NamedTuple):
    """How rows are filled up to a batch, so that each has the logits it has alone."""

    id: int = 0
    side: str = "right"  # or "left"
    alike: bool = False  # only rows of one length go together: this model reads padding


def agree(model: nn.Module, tokenizer: Any = None, several: bool = True) -> Padding:
    """Compare tokenizer, config and embeddings, and say how to pad.  several: whether a batch may have two rows.

    Of two padding ids within the embeddings the config's is taken, which the forward reads; the tokenizer's, if it is
    the only one, is written there; both with a warning.  ValueError where one is needed and there is none.
    """
    if tokenizer is not None and not hasattr(tokenizer, "pad_token_id"):
        raise TypeError(f"tokenizer is {short(tokenizer)}; pass one, e.g. ftlib.load_tokenizer('minilm')")
    rows, parts, kind = vocabulary(model), _parts(model), anatomy.kind_of(model)
    outer = [part.config for part in (*parts, anatomy.base_of(model)) if hasattr(part, "config")]
    configs = [one for one in (*(getattr(c, "text_config", c) for c in outer), *outer) if hasattr(one, "pad_token_id")]
    known, asked = [config.pad_token_id for config in configs], getattr(tokenizer, "pad_token_id", None)
    good = [one for one in [*known, asked] if isinstance(one, int) and 0 <= one < (rows or one + 1)]
    last = _reads(model, "pad_token_id")  # the head finds the last token by it
    both = getattr(outer[-1], "is_encoder_decoder", False)  # the decoder's row begins with, or is shifted by, one
    if not good and (both or (several and last)):
        found = f"model.config.pad_token_id is {known[0] if known else None}, tokenizer.pad_token_id is {asked}"
        remedy = "set tokenizer.pad_token = tokenizer.eos_token (without one, model.config.pad_token_id)"
        more = "or, for a token that was added, model.resize_token_embeddings(len(tokenizer))"
        raise ValueError(f"{kind} needs a padding id below {rows}: {found}; {remedy}, {more}")
    pad = good[0] if good else 0
    if good and (others := {value for value in known if value != pad}):
        for config in configs:
            config.pad_token_id = pad
        was = ", ".join(map(str, others))
        warnings.warn(f"model.config.pad_token_id is {pad} from now on (the tokenizer's), not {was}", stacklevel=3)
    elif asked not in (None, pad):
        said = f"the tokenizer pads with {asked}, the model with {pad} (model.config.pad_token_id), which is taken"
        warnings.warn(f"{said}; make them equal", stacklevel=3)
    read = {getattr(getattr(part, "sequence_summary", None), "summary_type", "first") for part in parts}
    # XLNet counts positions from each other; others number them, so that padding in front would move the text
    left = kind == "xlnet" and read <= {"last", "cls_index"}  # of a row without cls_index the last place is read
    # behind the vectors of a tuned prompt there are no ids to find a row's end by: the last place is read
    prompt = last and getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    alike = kind in _MIXING or pad == end_id(model) or (read != {"first"} and not left) or bool(prompt)
    if alike and "text_lengths" in inputs_of(model):
        raise ValueError(f"{kind} reads padding, so a row's texts, of several lengths, can't be computed together")
    return Padding(pad, "left" if left else "right", alike)


def _parts(model: nn.Module) -> list[nn.Module]:
    """The models whose forward makes logits: one, or the heads of a MultiTaskModel."""
    return [*model.heads.values()] if hasattr(model, "heads") else [anatomy.unwrapped(model)]


def _reads(model: nn.Module, name: str) -> bool:
    """Whether a head's forward reads this field of its config."""
    codes = (getattr(inspect.unwrap(type(part).forward), "__code__", None) for part in _parts(model))
    return any(name in getattr(code, "co_names", ()) for code in codes)


def end_id(model: nn.Module) -> int | None:
    """The end token that the head reads the row at (BART's and T5's do), None for another head."""
    return getattr(_parts(model)[0].config, "eos_token_id", None) if _reads(model, "eos_token_id") else None


def vocabulary(model: nn.Module) -> int | None:
    """Rows of the embedding table; without one, what the config says, None for characters (CANINE)."""
    base = anatomy.base_of(model)
    try:
        return len(base.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return getattr(base.config, "vocab_size", None)


_SIZES = {  # inputs with a value a token, and the config's name for the number below which values must be
    "bbox": "max_2d_position_embeddings", "global_attention_mask": "", "input_mask": "",
    "input_pronunciation_ids": "pronunciation_vocab_size", "input_shape_ids": "shape_vocab_size", "langs": "n_langs",
    "position_ids": "max_position_embeddings", "task_type_ids": "task_type_vocab_size",
    "token_type_ids": "type_vocab_size", "xpath_subs_seq": "", "xpath_tags_seq": "",
}  # fmt: skip
A_TOKEN = frozenset(_SIZES)
_OF_TOKENIZERS = frozenset(  # what tokenizers make for every model, for other models, or for people
    "attention_mask begins input_ids labels masking offset_mapping special_tokens_mask token_type_ids word_ids "
    "word_starts".split()
)


def inputs_of(model: nn.Module) -> frozenset[str]:
    """The names of what a model's forward takes beside token ids, mask and labels."""
    named = inspect.signature(anatomy.unwrapped(model).forward).parameters
    known = frozenset(getattr(model, "input_names", named))  # a MultiTaskModel knows them
    return known - {"attention_mask", "input_ids", "inputs_embeds", "labels"}


def sizes_of(model: nn.Module) -> dict[str, int]:
    """{input: number below which its values must be}, where it is known."""
    found = {name: getattr(anatomy.base_of(model).config, field, None) for name, field in _SIZES.items()}
    return {n: size for n, size in found.items() if isinstance(size, int) and size > 0} | {"global_attention_mask": 2}


def warn_of_unread(row: Any, inputs: frozenset[str], name: str) -> None:
    """Warn of columns with numbers a token that this model's forward does not take; texts and such are no inputs."""
    for column in sorted(set(row) - inputs - _OF_TOKENIZERS):
        values = _numbers(row[column])
        if values is not None and values.ndim and len(values) == np.size(row.get("input_ids")) > 1:
            warnings.warn(f"{name}: the model takes no {column!r}, so that column is not read", stacklevel=5)


def _numbers(value: Any) -> np.ndarray | None:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # lists of different lengths; a tensor on a GPU
        return None
    right = array.dtype.kind in "biu" or (array.dtype.kind == "f" and np.isfinite(array).all())
    return array if right and array.size else None


def _outside(values: Any, size: int | None) -> str:
    """What is wrong with numbers that are not all from 0 to below `size`, "" if they are."""
    if size is None or not (found := np.asarray(values)).size:
        return ""
    low, high = found.min(), found.max()
    return "" if 0 <= low <= high < size else f"{high if high >= size else low} is outside 0..{size - 1}"


def token_ids(values: Any, size: int | None, where: str) -> Sequence[int]:
    """Whole numbers, each below `size`; arrays from Arrow stay where they are."""
    if not (isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim == 1 and len(values)):
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{where}: expected a list of whole numbers, got {short(values)}")
        for value in values if set(map(type, values)) - {int} else ():
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{where}: {short(value)} is no whole number")
        values = [int(value) for value in values]
    if bad := _outside(values, size):
        remedy = "tokenizer and model differ: model.resize_token_embeddings(len(tokenizer)), or another tokenizer"
        raise ValueError(f"{where}: id {bad}; {remedy}")
    return values


def checked_input(name: str, value: Any, length: int, size: int | None, where: str) -> set[tuple]:
    """The forms that a further input may have: (-1, ...) with a value a token, else its shape; ValueError for none."""
    found, places = _numbers(value), name.endswith("_positions")
    shape, whole = np.shape(found), places or size is not None or name.endswith("_ids")
    bad, why = "" if found is None else _outside(found, length if places else size), ""
    if found is None or (whole and found.dtype.kind == "f") or (places and bad):
        what = "positions of the row's tokens" if places else "numbers"
        why = f"expected {what}, got {short(value)}; drop the column or mend it"
    elif name in A_TOKEN and shape[:1] != (length,):
        why = f"{len(value) if shape else 1} {name} values for {length} input_ids; must be equal"
    elif bad:
        why = f"{'id' if name.endswith('_ids') else 'value'} {bad}"
    if why:
        raise ValueError(f"{where}, column {name!r}: {why}")
    forms = {(-1, *shape[1:])} if shape[:1] == (length,) else {shape}
    return forms if name in A_TOKEN else forms | {shape}


def longest_text(lengths: Any, tokens: int, where: str) -> int:
    """Tokens of the longest of a row's texts, which has `tokens` in all; ValueError for lengths that don't add up."""
    found = _numbers([tokens] if lengths is None else lengths)
    if found is None or found.ndim != 1 or found.dtype.kind == "f" or found.min() < 1 or found.sum() != tokens:
        need = f"one at least a text, {tokens} together"
        raise ValueError(f"{where}, column 'text_lengths': {short(lengths)}; need how many tokens each has, {need}")
    return int(found.max())


def check_alike(first: dict, ids: Sequence[int], forms: dict[str, set[tuple]], end: int | None, where: str) -> None:
    """Refuse a row whose columns, their forms, or end tokens are not those of the `first`: rows make one batch."""
    ends = None if end is None else int(np.count_nonzero(np.asarray(ids) == end))
    first |= {} if first else {"columns": [*forms], "ends": ends, **forms}
    first |= {name: form & first.get(name, form) for name, form in forms.items()}
    why = ""
    if odd := {*first["columns"]} ^ {*forms}:
        why = f": {min(odd)} in some rows and not in others; tokenize all rows alike"
    elif ragged := [name for name in forms if not first[name]]:
        why = f", column {ragged[0]!r}: neither a value a token nor of one shape in all rows; drop it or mend it"
    elif ends == 0 or ends != first["ends"]:
        why = f", column 'input_ids': {ends} end tokens (id {end}); the head reads the last of as many in each row, 1 "
        why += "or more: tokenize with special tokens, or mend model.config.eos_token_id"
    if why:
        raise ValueError(where + why)


def trimmed(out: Row, mask: Any, pad: int | None, where: str) -> tuple[Row, slice]:
    """The row without the padding at its ends that its mask marks, and which tokens are left; other zeros stay."""
    length, where = len(out["input_ids"]), f"{where}, column 'attention_mask'"
    if mask is None:
        return out, slice(0, length)
    found = _numbers(mask)
    if found is None or found.shape != (length,) or not ((found == 0) | (found == 1)).all():
        raise ValueError(f"{where}: expected 0 (hidden) or 1 for each of {length} input_ids, got {short(mask)}")
    text = pad is not None and np.asarray(out["input_ids"]) != pad  # hidden, and no padding
    real = np.flatnonzero((found == 1) | text) if found.any() else []
    kept = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)
    if found.all():
        return out, kept
    cut = {}
    for name, value in out.items():
        numbers = _numbers(value)  # what has none is for `checked_input` to refuse
        if numbers is not None and name.endswith("_positions"):  # of tokens: they move with these
            cut[name] = (numbers - kept.start).tolist()
        else:
            cut[name] = list(value[kept]) if np.shape(numbers)[:1] == (length,) else value
    hidden = found[kept].astype(int).tolist()
    return cut if all(hidden) else cut | {"attention_mask": hidden}, kept


def class_names(features: Any, under: str = "") -> dict[str, list[str]]:
    """{task: names} of the labels of a Dataset, from its `features`; {} where nobody gave any."""
    label = (features or {}).get("labels")
    kinds = label if isinstance(label, dict) else {under: label}  # the inner ones of tags: a list of classes
    found = {task: getattr(getattr(kind, "feature", kind), "names", None) for task, kind in kinds.items()}
    return {task: list(names) for task, names in found.items() if names and given_names(dict(enumerate(names)))}


def matched(own: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    """Which class of the model each name of the data is, in any order, capitals aside; ValueError where one is none."""
    # "0", "1", … beside words are no names
    digits = [all(map(str.isdecimal, one)) for one in (own, names)]
    if digits[0] != digits[1] and [str(i) for i in range(len(names))] in (list(own), list(names)):
        return list(range(len(names)))
    fold = str if len({name.casefold() for name in own}) < len(own) else str.casefold
    numbers = {fold(name): i for i, name in enumerate(own)}
    places = [numbers.get(fold(name)) for name in names]
    if None in places or len({*places}) < len(places):
        remedy = "load the model without names (fit takes the data's), or set model.config.id2label, or rename"
        raise ValueError(f"{where}: the data has the classes {list(names)}, the model has {list(own)}; {remedy}")
    return places


def name_classes(model: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
    """Give a model whose classes nobody named the data's names, as `parts_for` found them: {task: names}."""
    for task, own in names.items():
        config, former = (model.heads[task] if task else model).config, names_of(model, task)
        if given_names(former) is None:
            own = [*own, *(f"LABEL_{i}" for i in range(len(own), len(former)))]
            config.id2label, config.label2id = dict(enumerate(own)), {name: i for i, name in enumerate(own)}
            if task:  # what `save` writes down
                model.specs[task] = replace(model.specs[task], label_names=tuple(own))
