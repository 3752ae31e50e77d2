"""Relations: which class holds between two spans of a text, read off markers around them.

A row has `text` (one string) and `spans`, [[start, end], [start, end]] in characters, end excluded.  The markers are
signs that every tokenizer knows, "@ first @" and "# second #" (Zhou & Chen 2022, arXiv:2102.01373); the head reads the
encoder's output at the marker before each span (Baldini Soares et al. 2019, arXiv:1906.03158, "entity start").

To copy: this file, tasks/heads.py, core/batches.py, torch and transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.batches import short
from .heads import Auto, OnBase

MARKERS = ("@", "#")


def mark(text: str, spans: Any) -> tuple[str, list[int]]:
    """The text with markers, and at which character the marker before each span stands.

    Raises ValueError for spans that are not two, lie outside the text, are empty or overlap.

    >>> mark("Ann met Bob", [[8, 11], [0, 3]])
    ('# Ann # met @ Bob @', [12, 0])
    """
    pairs = [spans, *spans] if isinstance(spans, (list, tuple)) else [spans]
    right = len(pairs) == 3 and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    if not right or not all(type(place) is int for span in spans for place in span):
        raise ValueError(f"spans is {short(spans)}; need two, [[start, end], [start, end]] in characters")
    order = sorted((0, 1), key=lambda i: tuple(spans[i]))
    (a, b), (c, d) = (spans[i] for i in order)
    if not 0 <= a < b <= c < d <= len(text):
        raise ValueError(f"spans is {spans}: each must lie in the text (0 to {len(text)}), hold a sign, not overlap")
    one, two = (MARKERS[i] for i in order)
    marked = f"{text[:a]}{one} {text[a:b]} {one}{text[b:c]}{two} {text[c:d]} {two}{text[d:]}"
    return marked, [(a, c + 4)[i] for i in order]  # two markers of two signs stand before the second


def encode(tokenized: Callable, first: list, second: list | None, columns: dict, wheres: list) -> tuple[Any, dict]:
    """Token ids of the marked texts, and `marker_positions`: which tokens the head reads, two a row."""
    texts, places = [], []
    for text, spans, where in zip(first, columns["spans"], wheres, strict=True):
        if not isinstance(text, str):
            raise TypeError(f"{where}: {short(text)}; spans are in the characters of a text, so join the words")
        try:
            marked, place = mark(text, spans)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        texts.append(marked)
        places.append(place)
    encoded = tokenized(texts, second)
    positions = [[encoded.char_to_token(i, p, 0) for p in place] for i, place in enumerate(places)]
    for i, (where, spans, place) in enumerate(zip(wheres, columns["spans"], places, strict=True)):
        ends = [p + 1 + stop - begin for p, (begin, stop) in zip(place, spans, strict=True)]  # last characters
        if None in (*positions[i], *(encoded.char_to_token(i, end, 0) for end in ends)):
            raise ValueError(f"{where}: a span lies beyond max_length; raise it, or cut the text around the spans")
    return encoded, {"marker_positions": positions}


class _OnMarkers(OnBase):
    """A linear layer on the outputs at two tokens."""

    def build(self, config: Any) -> None:
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", None) or 0.0)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)

    def forward(self, input_ids=None, attention_mask=None, marker_positions=None, labels=None, **inputs) -> Any:
        """marker_positions: int64 (batch, 2); logits (batch, labels)."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        if marker_positions is None:
            raise ValueError("rows without marker_positions; say what they are for: tokenize(..., task=...)")
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden = self.base_model(**inputs)[0]  # (batch, tokens, hidden)
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        logits = self.classifier(self.dropout(hidden[rows, marker_positions].flatten(1)))  # (batch, labels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class AutoModelForRelationClassification(Auto):
    head, ending, what = _OnMarkers, "ForRelationClassification", "relations"
