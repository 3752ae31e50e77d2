"""Relations: which class holds between two spans of a text, read off markers around them.

A row has `text` (one string) and `spans`, [[start, end], [start, end]] in characters, end excluded.  The markers are
signs that every tokenizer knows, "@ first @" and "# second #" (Zhou & Chen 2022, arXiv:2102.01373); the head reads the
encoder's output at the marker before each span (Baldini Soares et al. 2019, arXiv:1906.03158, "entity start").

To copy: this file, core/batches.py, torch and transformers.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from ..core.batches import short

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


class _OnMarkers:
    """A Transformers model with a linear layer on the outputs at two tokens; the base model has its usual name."""

    def __init__(self, config: Any):
        super().__init__(config)
        pools = "add_pooling_layer" in inspect.signature(self.base_class).parameters
        options = {"add_pooling_layer": False} if pools else {}
        setattr(self, self.base_model_prefix, self.base_class(config, **options))
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", None) or 0.0)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

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


@cache
def _class_on(base: type) -> type:
    parent = next(kind for kind in base.__mro__[1:] if kind.__name__.endswith("PreTrainedModel"))
    name = base.__name__.removesuffix("Model") + "ForRelationClassification"

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        return _OnMarkers.forward(self, *args, **inputs)

    own, its = ({n: p for n, p in inspect.signature(f).parameters.items() if p.kind is not p.VAR_KEYWORD}
                for f in (_OnMarkers.forward, base.forward))  # fmt: skip
    more = [p.replace(kind=p.KEYWORD_ONLY) for name, p in its.items() if name not in own]
    forward.__signature__ = inspect.Signature([*own.values(), *more])  # by which it is known what the model takes
    return type(name, (_OnMarkers, parent), {"base_class": base, "__module__": __name__, "forward": forward})


class AutoModelForRelationClassification:
    """As Transformers' Auto classes: `from_pretrained` and `from_config`, for any encoder or decoder."""

    @staticmethod
    def class_of(config: Any) -> type:
        """The model class for a config; ValueError for an encoder-decoder."""
        from transformers import AutoModel

        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"relations are read off an encoder or a decoder; {config.model_type} is both")
        return _class_on(AutoModel._model_mapping[type(config)])

    @classmethod
    def from_config(cls, config: Any) -> nn.Module:
        return cls.class_of(config)(config)

    @classmethod
    def from_pretrained(cls, name: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
        from transformers import AutoConfig

        labels = ("num_labels", "id2label", "label2id", "problem_type")
        names = {key: options.pop(key) for key in labels if key in options}
        places = {key: options[key] for key in ("revision", "subfolder", "cache_dir", "token") if key in options}
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **places, **names)
        return cls.class_of(config).from_pretrained(name, config=config, **options)
