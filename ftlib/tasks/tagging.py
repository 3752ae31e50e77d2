"""Tags: one answer a token.  Labels of words go to the first piece of each word.

To copy: this file, core/batches.py and tasks/classification.py.
"""

from typing import Any

import numpy as np

from ..core.batches import IGNORE, short
from .classification import check_classes


def word_ids(encoded: Any, i: int) -> list[int | None]:
    """The word of the first text that each token of row i is part of; None for special tokens and the second text."""
    both = zip(encoded.word_ids(i), encoded.sequence_ids(i), strict=True)
    return [word if text == 0 else None for word, text in both]


def align(value: Any, text: Any, encoded: Any, i: int, where: str) -> list[int]:
    """Tags of words as tags of tokens: each on the first piece of its word, -100 elsewhere."""
    words = "one string" if isinstance(text, str) else f"{len(text)} words"
    if words == "one string" or len(value) != len(text):
        raise ValueError(f"{where}: {len(value)} tags for {words}; mend the row, one tag a word in a list of words")
    places = word_ids(encoded, i)
    pairs = zip([None, *places], places, strict=False)  # (word of the token before, word)
    return [IGNORE if word in (None, before) else value[word] for before, word in pairs]


def check_tags(label: Any, num_labels: int, length: int, where: str) -> list[int]:
    """A class number, or -100, for every token."""
    if not isinstance(label, (list, tuple)) or len(label) != length:
        got = f"{len(label)} labels" if isinstance(label, (list, tuple)) else short(label)
        raise ValueError(f"{where}: {got} for {length} tokens; one label per token, {IGNORE} to ignore")
    return check_classes(list(label), num_labels, where)


def named_tags(decided: np.ndarray, names: dict[int, str]) -> list[str | None]:
    return [names[int(i)] if i != IGNORE else None for i in decided]
