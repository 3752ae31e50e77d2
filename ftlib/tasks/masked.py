"""Masked tokens: a row keeps its text, and its masks are drawn anew each time a step reads it.

Of a row's tokens a share is chosen; of the chosen ones 80 % become the mask token, 10 % any token, 10 % stay, and the
model predicts what they were.  `labels` are the tokens that may be chosen, -100 at special ones and unknown words;
`masking` is [mask token, number of tokens, share]; `begins`, where whole words are chosen, is 1 at a word's first
token.  A row without `masking` has been masked by somebody else and stays as it is.

A model with a second head on pairs (BertForPreTraining, AlbertForPreTraining) also learns `next_sentence_label` or
`sentence_order_label`, where rows have it: the mean over rows is added to the mean over masked tokens.

To copy: this file, core/batches.py and tasks/{classification,tagging}.py.
Source: Devlin et al. 2019 (BERT, arXiv:1810.04805); Lan et al. 2020 (ALBERT, arXiv:1909.11942).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.batches import IGNORE, Row, number, short
from .classification import labeled, text_of
from .tagging import check_tags

PAIRS = ("next_sentence_label", "sentence_order_label")  # 0: they belong together, 1: they don't
FORMS = (*(("text", "text_pair", name) for name in PAIRS), ("text", "text_pair"), ("text",))  # columns of a dataset
READS = {"text": "text"}
OPTIONS = ("mask_probability", "whole_words")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
COLUMNS = ("masking", "begins")  # of a row, beside token ids and labels


def check_tokens(label: Any, num_labels: int, length: int, where: str) -> list[int]:
    """A token of the vocabulary, or -100, for every token; ValueError where none can be masked."""
    label = check_tags(label, num_labels, length, where)
    if all(value == IGNORE for value in label):
        raise ValueError(f"{where}: no token can be masked: all labels are {IGNORE}; drop the row")
    return label


def settings(tokenizer: Any, mask_probability: float = 0.15) -> list[float]:
    """`masking` of a row; ValueError for a tokenizer without a mask token, and for no share of tokens."""
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise ValueError("the tokenizer has no mask token; load that of an encoder, or set tokenizer.mask_token")
    share = number("mask_probability", mask_probability, 1e-6, 1)
    return [float(tokenizer.mask_token_id), float(len(tokenizer)), float(share)]


def word_begins(encoded: Any, i: int) -> list[int]:
    """1 at the first token of every word of row i, 0 at its others: as the tokenizer splits words, and at white space.

    A SentencePiece tokenizer may split nothing before it makes pieces; its pieces tell, by the sign they begin with.
    """
    words, tokens = encoded.word_ids(i), encoded.tokens(i)
    before = [None, *words]
    return [
        int(word is None or word != last or token.startswith("\u2581"))
        for word, last, token in zip(words, before, tokens, strict=False)
    ]


def rows(
    tokenizer: Any, columns: dict[str, list], wheres: Sequence[str], max_length: int | None, truncation: bool,
    mask_probability: float = 0.15, whole_words: bool = False,
) -> dict[str, list]:  # fmt: skip
    """Token ids, labels and `masking`, as `tokenize` asks for them; with whole_words also `begins`; of pairs the label.

    Raises ValueError, TypeError naming the row for what is empty, no text, no label of a pair, or too long.
    """
    texts = [
        [text_of(text, f"{at}, column {name!r}") for text, at in zip(columns[name], wheres, strict=True)]
        for name in FORMS[2] if name in columns
    ]  # fmt: skip
    pairs = {name: columns[name] for name in PAIRS if name in columns}
    for name, value, at in ((n, v, at) for n, own in pairs.items() for v, at in zip(own, wheres, strict=True)):
        if value not in (0, 1):
            raise ValueError(f"{at}, column {name!r}: {short(value)}; 0 if the texts belong together, 1 if not")
    masking, limit = settings(tokenizer, mask_probability), max_length or tokenizer.model_max_length
    if whole_words and not tokenizer.is_fast:
        raise ValueError("whole_words=True needs a fast tokenizer, which knows the words of its tokens")
    cut = truncation and limit <= 1_000_000  # more is the library's "no limit known"
    encoded = tokenizer(*texts, truncation=cut, max_length=limit if cut else None, verbose=False)
    for ids, at in zip(encoded["input_ids"], wheres, strict=True):
        if len(ids) > limit:
            raise ValueError(f"{at}: {len(ids)} tokens, the limit is {limit}; cut it or set truncation=True")
    made, special = {name: encoded[name] for name in INPUTS if name in encoded}, {*tokenizer.all_special_ids}
    made["labels"] = [[IGNORE if token in special else token for token in ids] for ids in encoded["input_ids"]]
    made |= {"begins": [word_begins(encoded, i) for i in range(len(wheres))]} if whole_words else {}
    return made | {"masking": [masking] * len(wheres)} | pairs


def mask(row: Mapping[str, Any], key: Sequence[int]) -> Row:
    """The row as the model reads it, by the key alone, numbers from 0: masked ids, labels where they are predicted.

    >>> row = {"input_ids": [2, 5, 6, 3], "labels": [-100, 5, 6, -100], "masking": [4, 9, 1.0]}
    >>> mask(row, [0, 0, 2])
    {'input_ids': array([2, 4, 4, 3]), 'labels': [-100, 5, 6, -100]}
    """
    out = {name: value for name, value in row.items() if name not in COLUMNS}
    if "masking" not in row:
        return out
    (token, size, share), rng = row["masking"], np.random.default_rng(key)
    ids, labels = (np.array(row[name]) for name in ("input_ids", "labels"))
    chance, fate, other = rng.random(len(ids)), rng.random(len(ids)), rng.integers(int(size), size=len(ids))
    if "begins" in row:  # all tokens of a word have the chance of its first
        begins = np.array(row["begins"], dtype=bool)
        begins[0] = True
        chance = chance[np.flatnonzero(begins)][begins.cumsum() - 1]
    chosen = (chance < share) & (labels != IGNORE)
    ids = np.where(chosen & (fate < 0.8), int(token), np.where(chosen & (fate >= 0.9), other, ids))
    return out | {"input_ids": ids, "labels": np.where(chosen, labels, IGNORE).tolist()}


def draw(rows: Sequence[Row], keys: Sequence[Sequence[int]]) -> list[Row]:
    """`mask` for the rows of a step; those of pairs also get `pair_weight`, the step's masked tokens a row.

    The step divides its summed loss by masked tokens, so with this weight that of pairs is a mean over rows.
    """
    made = [mask(row, key) for row, key in zip(rows, keys, strict=True)]
    if any(name in row for row in made for name in PAIRS):
        count = sum(int(labeled(np.asarray(row["labels"]))) for row in made)
        made = [row | {"pair_weight": float(count / len(made))} for row in made]
    return made


def measures(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What evaluation has beside the loss: of masked tokens, and of pairs."""
    return ("accuracy", "pair_loss", "pair_accuracy") if any(name in row for name in PAIRS) else ("accuracy",)
