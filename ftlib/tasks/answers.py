"""Question answering: which stretch of a context answers a question, if any does.

A row has `question`, `context` and, to train on, `answers` = {"text": [...], "answer_start": [...]}, SQuAD's form, in
characters: any of them is right, the first is trained; both lists empty: the context does not say.  A pair becomes one
row of tokens or several, *windows* on the context that share `stride` tokens.  Their label is [start, end], two tokens,
the end included; where a window does not hold the whole answer, twice the first special token: [CLS], wherever the
tokenizer puts it, else the one that begins a text, else (T5, GPT-2) the first token.

To copy: this file, core/batches.py and tasks/classification.py.
Source: Rajpurkar et al. 2016, 2018 (arXiv:1606.05250, 1806.03822); Devlin et al. 2019 (arXiv:1810.04805), 4.2 and 4.3.
"""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.batches import IGNORE, refuse, short, whole
from . import classification

FORMS = (("question", "context", "answers"), ("question", "context"))  # columns, the first form that is there
SEARCHING = tuple(f"{name}ForQuestionAnswering" for name in ("Flaubert", "XLM", "XLNet"))  # give other outputs
LENGTH, STRIDE = 384, 128  # tokens of a window, and how many of its context the next begins with, where nobody says


def span(answers: Any, context: str, where: str) -> tuple[int, int]:
    """The characters of the first answer, end excluded, (0, 0) for none; ValueError for one not in the context.

    >>> span({"text": ["Bob"], "answer_start": [8]}, "Ann met Bob", "row 0")
    (8, 11)
    """
    texts, starts = map(answers.get, ("text", "answer_start")) if isinstance(answers, Mapping) else (None, None)
    listed = isinstance(texts, (list, tuple)) and isinstance(starts, (list, tuple))
    if not listed or len(texts) != len(starts):
        form = "as many texts as starts, {'text': [...], 'answer_start': [...]}; both empty: no answer"
        raise ValueError(f"{where}: {short(answers)}; need {form}")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip() or type(start) is not int:
            raise ValueError(f"{where}: {short(text)} at {short(start)}; need a text and a whole number, or no entry")
        if start < 0 or context[start : start + len(text)] != text:
            found = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
            near = min(found, key=lambda place: abs(place - start), default=0)
            there = f"but at {near}: answer_start is off by {abs(start - near)}" if found else "nor anywhere in it"
            remedy = "mend it (characters from 0) or drop the row"
            raise ValueError(f"{where}: {short(text)} is not at character {start} of the context, {there}; {remedy}")
    return (starts[0], starts[0] + len(texts[0])) if texts else (0, 0)


def windows(
    tokenizer: Any, questions: list, contexts: list, wheres: Sequence[str], max_length: int | None = None,
    truncation: bool = True, stride: int | None = None,
) -> Any:  # fmt: skip
    """The tokenizer's encoding, a window a row; `overflow_to_sample_mapping` says of which pair.

    max_length: default 384, or what the tokenizer takes; stride: default 128, at most a third of max_length.
    White space around a question is dropped.  Raises ValueError, TypeError naming the row for what is no text, for a
    question that leaves no room, and with truncation=False for a pair of several windows.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"a {type(tokenizer).__name__} does not say which characters a token is; use a fast tokenizer")
    limit = max_length or min(LENGTH, tokenizer.model_max_length)
    stride = min(STRIDE, limit // 3) if stride is None else whole("stride", stride, 0)
    for name, texts in (("question", questions), ("context", contexts)):
        for text, where in zip(texts, wheres, strict=True):
            classification.text_of(text, f"{where}, column {name!r}")
    questions, special = [text.strip() for text in questions], tokenizer.num_special_tokens_to_add(pair=True)
    alone = tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
    for ids, where in zip(alone, wheres, strict=True):
        if (room := limit - special - len(ids)) <= stride:  # of which the next window repeats `stride`
            left = f"of {len(ids)} tokens leaves {max(room, 0)} of max_length={limit} for the context"
            remedy = f"must be more than stride={stride}: raise max_length, lower stride or shorten it"
            raise ValueError(f"{where}: the question {left}, which {remedy}")
    encoded = tokenizer(
        questions, list(contexts), truncation="only_second", max_length=limit, stride=stride, padding=False,
        return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    counts = np.bincount(encoded["overflow_to_sample_mapping"])
    if not truncation and counts.max() > 1:
        row = int((counts > 1).argmax())
        raise ValueError(f"{wheres[row]}: {counts[row]} windows of max_length={limit}; raise it or set truncation=True")
    return encoded


def in_context(encoded: Any, i: int) -> np.ndarray:
    """Which tokens of window i are the context's, bool (tokens,)."""
    return np.array([text == 1 for text in encoded.sequence_ids(i)])


def no_answer(tokenizer: Any, ids: list[int]) -> int:
    """The token that stands for no answer."""
    return next((ids.index(i) for i in (tokenizer.cls_token_id, tokenizer.bos_token_id) if i in ids), 0)


def rows(
    tokenizer: Any, columns: dict[str, list], wheres: Sequence[str], max_length: int | None, truncation: bool,
    stride: int | None = None,
) -> dict[str, list]:  # fmt: skip
    """Token ids, and with a column `answers` labels, a window a row, as `tokenize` asks for them."""
    encoded = windows(tokenizer, columns["question"], columns["context"], wheres, max_length, truncation, stride)
    found = {name: encoded[name] for name in ("input_ids", "token_type_ids", "attention_mask") if name in encoded}
    if "answers" in columns:
        each = zip(columns["answers"], columns["context"], wheres, strict=True)
        spans = [span(answers, context, f"{where}, column 'answers'") for answers, context, where in each]
        found["labels"] = _labels(tokenizer, encoded, spans, wheres)
    return found


def _labels(tokenizer: Any, encoded: Any, spans: list[tuple[int, int]], wheres: Sequence[str]) -> list[list[int]]:
    """[start, end] of every window: the answer's tokens where none of them lies in another window alone."""
    held: list[list] = [[] for _ in spans]  # (window, its first and last token that share a character with the answer)
    for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
        begins, ends = np.asarray(encoded["offset_mapping"][i]).T
        own = np.flatnonzero(in_context(encoded, i) & (ends > spans[row][0]) & (begins < spans[row][1]))
        held[row] += [(i, own[0], own[-1], begins[own[0]], ends[own[-1]])] if len(own) else []
    labels = [[no_answer(tokenizer, ids)] * 2 for ids in encoded["input_ids"]]
    for (_, end), own, where in zip(spans, held, wheres, strict=True):
        begin, stop = (min(o[3] for o in own), max(o[4] for o in own)) if own else (None, None)
        good = [(i, int(first), int(last)) for i, first, last, a, b in own if (a, b) == (begin, stop)]
        if end and not good:
            what = "no window holds the whole answer: raise stride" if own else "no token stands for the answer: mend"
            raise ValueError(f"{where}, column 'answers': {what}, or drop the row")
        for i, *place in good:
            labels[i] = place
    return labels


def check_span(label: Any, num_labels: int, length: int, where: str) -> list[int]:
    """[start, end] among the row's tokens, end included, or twice -100."""
    pair = label if isinstance(label, (list, tuple)) and len(label) == 2 else [None]
    right = all(isinstance(place, Integral) and not isinstance(place, bool) for place in pair)
    if not right or not (0 <= pair[0] <= pair[1] < length or set(pair) == {IGNORE}):
        raise ValueError(f"{where}: {short(label)}; need [start, end], two of the row's {length} tokens (end included)")
    return [int(place) for place in pair]


def trim(label: list[int], kept: slice, where: str) -> list[int]:
    """The label of a row of which `kept` is left."""
    refuse((label[0] != IGNORE and not kept.start <= label[0] <= label[1] < kept.stop, f"{where}: {label} is padding"))
    return [place if place == IGNORE else place - kept.start for place in label]


def stack(labels: list, sizes: Sequence[int], side: str = "right") -> Tensor:
    """int64 (rows, 2); sizes: tokens of each row, and of the widest, which padding in front moves."""
    shifts = [max(sizes) - size if side == "left" else 0 for size in sizes]
    return torch.tensor([[p + n * (p != IGNORE) for p in label] for label, n in zip(labels, shifts, strict=False)])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over windows: the mean of start's and end's cross-entropy over the tokens; (batch, tokens, 2), (batch, 2).

    Transformers' own loss times the windows, for a batch without padding: that one counts padding as tokens.
    """
    return classification.cross_entropy(logits.transpose(1, 2), labels) / 2


def divergence(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """As of classes, the mean of start's and end's; padding, at -inf on both sides, adds nothing."""
    first, second = (logits.transpose(1, 2).float().clamp(min=-1e4) for logits in (first, second))
    return classification.divergence_of_classes(first, second, labels) / 2


def decide(logits: Tensor) -> Tensor:
    """The best [start, end] with start <= end, int64 (..., 2), by the sum of their logits, (..., tokens, 2).

    >>> decide(torch.tensor([[[0.0, 9.0], [5.0, 0.0], [0.0, 3.0]]]))
    tensor([[0, 0]])
    """
    best, place = logits[..., 0].cummax(-1)  # the best start up to each token
    end = (best + logits[..., 1]).argmax(-1, keepdim=True)
    return torch.cat([place.gather(-1, end), end], -1)
