"""Text to text: rows of a source and a target, for models of an encoder and a decoder (T5, BART, mBART, Marian, ...).

A label is the target's tokens with the end token, a row of its own beside the source's.  The decoder reads the labels
shifted by one, the model's start token before them (methods/token_losses.py), so that every token is predicted.  A
tokenizer with languages writes their codes into source and target: tokenizer.src_lang, tokenizer.tgt_lang.

To copy: this file, core/batches.py and tasks/classification.py.
Source: Sutskever et al. 2014 (arXiv:1409.3215); Raffel et al. 2020 (T5, arXiv:1910.10683).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.batches import IGNORE, padded, refuse, short, whole
from . import classification
from .classification import text_of

FORMS = (("source", "target"), ("source",))  # columns of a dataset, the first form that is there
READS = {"text": "source", "label": "target"}  # which of them text= and label= name
OPTIONS = ("max_target_length", "prefix")


def stack(labels: list, sizes: Sequence[int], side: str = "right") -> Tensor:
    """int64 (rows, tokens of the longest label), -100 behind; sizes are the sources'."""
    return padded(labels, [len(label) for label in labels], fill=IGNORE)


def check_target(label: Any, num_labels: int, length: int | None, where: str) -> list[int]:
    """Tokens of the vocabulary, or -100, no more than `length`, which the decoder takes; one at least is trained."""
    if not isinstance(label, (list, tuple)):
        raise TypeError(f"{where}: {short(label)}; need the target's tokens, a list")
    label, most = classification.check_classes(list(label), num_labels, where), length or len(label)
    refuse(
        (len(label) > most, f"{len(label)} tokens, the decoder takes {most}; tokenize with max_target_length={most}"),
        (all(token == IGNORE for token in label), "no token is trained; drop the row"),
        what=f"{where}: ",
    )
    return label


def rows(
    tokenizer: Any, columns: dict[str, list], wheres: Sequence[str], max_length: int | None, truncation: bool,
    max_target_length: int | None = None, prefix: str = "",
) -> dict[str, list]:  # fmt: skip
    """Token ids, and with targets labels, as `tokenize` asks for them; `cut` says which sources were cut.

    Only where max_length asks for it, and never a target: a model would learn to stop in the middle.  prefix stands
    before every source.  Raises ValueError, TypeError naming the row for what is empty, no text or too long.
    """
    if max_target_length is not None:
        whole("max_target_length", max_target_length)
    sources = [prefix + text_of(text, f"{at}, source") for text, at in zip(columns["source"], wheres, strict=True)]
    check_languages(tokenizer, "target" in columns)
    limit, asked = max_length or tokenizer.model_max_length, truncation and max_length is not None
    found = tokenizer(sources, return_token_type_ids=False, return_attention_mask=True, verbose=False)
    cut = [len(ids) > limit for ids in found["input_ids"]]
    if any(cut) and not asked:
        row, remedy = cut.index(True), "shorten it, or ask for a cut: max_length=... (and truncation=True)"
        long = f"{len(found['input_ids'][row])} tokens, the limit is {limit}"
        raise ValueError(f"{wheres[row]}, source: {long}; {remedy}")
    if any(cut):
        found = tokenizer(sources, truncation=True, max_length=limit, return_token_type_ids=False, verbose=False)
    made = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "cut": cut}
    if "target" in columns:
        targets = [text_of(text, f"{at}, target") for text, at in zip(columns["target"], wheres, strict=True)]
        made["labels"] = target_ids(tokenizer, targets)
        most = max_target_length if max_target_length is not None else tokenizer.model_max_length
        for ids, at in zip(made["labels"], wheres, strict=True):
            if len(ids) > most:
                long = f"{len(ids)} tokens with the end token, the limit is {most}"
                raise ValueError(f"{at}, target: {long}; raise max_target_length, shorten it or drop the row")
    return made


def source_ids(tokenizer: Any, text: Any, where: str) -> list[int]:
    """The tokens of a text to be read."""
    return tokenizer(text_of(text, where), verbose=False)["input_ids"]


def target_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of texts to be written, with an end token, behind which mBART has the language."""
    if (end := tokenizer.eos_token_id) is None:
        raise ValueError("nothing would end a target: tokenizer.eos_token is None; set it to a token that is a pair's")
    found = tokenizer(text_target=texts, return_token_type_ids=False, verbose=False)["input_ids"]
    return [ids if end in ids[-2:] else [*ids, end] for ids in found]


def check_languages(tokenizer: Any, both: bool) -> int | None:
    """The code of the language to be written, None without languages; ValueError for one that is unknown, or not set.

    Transformers would take the unknown token for the one, and the language that is read for the other.
    """
    codes, code = getattr(tokenizer, "lang_code_to_id", {}), None
    for name in ("src_lang", "tgt_lang") if both else ("src_lang",):
        said = getattr(tokenizer, name, "")
        code = codes.get(said, tokenizer.convert_tokens_to_ids(said)) if said else None
        if said is None or (said and code in (None, tokenizer.unk_token_id)):
            remedy = f"set tokenizer.{name} to one of its codes{': ' * bool(codes)}{short(sorted(codes))[1:-1]}"
            raise ValueError(f"tokenizer.{name}={said!r} is no language of the tokenizer; {remedy}")
    return code if both else None


def start_ids(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What Transformers' `generate` must know of a model: the token before an answer, and what is forced or barred.

    A language to be written decides; then what the model was saved with: BART ends at its longest with an end token,
    Marian never says padding.  ValueError where nothing says what an answer starts with, or two differ.
    """
    own = model.generation_config
    known = {one.decoder_start_token_id for one in (model.config, own) if hasattr(one, "decoder_start_token_id")}
    found, first = sorted(known - {None}), own.forced_bos_token_id
    if hasattr(tokenizer, "tgt_lang") and (code := check_languages(tokenizer, both=True)) is not None:
        ids = target_ids(tokenizer, ["a"])[0]
        found, first = ([code], None) if ids[-1] == code else (found, code if ids[0] == code else first)
    name = "decoder_start_token_id"
    refuse(
        (not found, f"{name} is None in model.config; set it to what the model was trained to start with"),
        (len(found) > 1, f"{name} is {' and '.join(map(str, found))} in model.config and model.generation_config; make "
                         "them what the model was trained to start with"),
    )  # fmt: skip
    more = {key: getattr(own, key) for key in ("forced_eos_token_id", "bad_words_ids")}
    return {name: found[0], "forced_bos_token_id": first} | more


def pair(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(the source's tokens, the target's) of a row.

    >>> pair({"input_ids": [5, 6], "labels": [7, 8, 1, -100]})
    ([5, 6], [7, 8, 1])
    """
    return [int(token) for token in row["input_ids"]], [int(label) for label in row["labels"] if label != IGNORE]
