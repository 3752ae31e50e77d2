"""From questions and contexts to answers: windows on the way in, the best stretch of text on the way out.

To copy: this file, inputs/{rows,agreement}.py, core/{anatomy,batches}.py, tasks/ and torch.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from ..core.batches import whole
from ..inputs.rows import Door, Rows, checked, token_limit
from ..tasks import answers

CHUNK = 1_000  # pairs at a time: encodings, with the places of all tokens, are large


def questions(
    model: nn.Module, table: Any, tokenizer: Any, *, max_length: int | None = None, stride: int | None = None,
    max_answer: int = 30, no_answer: float = 0.0,
) -> tuple[Rows, Callable]:  # fmt: skip
    """Checked rows, a window each, of a table with `question` and `context`; and what makes answers of logits."""
    whole("max_answer", max_answer)
    columns = {name: list(table[name]) for name in answers.FORMS[-1]}
    limit = max_length or min(answers.LENGTH, tokenizer.model_max_length)
    limit, rows, found = token_limit(limit, tokenizer, model.config), [], []
    for start in range(0, len(table), CHUNK):
        pairs = [own[start : start + CHUNK] for own in columns.values()]
        wheres = [f"row {start + i}" for i in range(len(pairs[0]))]
        encoded = answers.windows(tokenizer, *pairs, wheres, limit, True, stride)
        for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
            rows.append({n: encoded[n][i] for n in ("input_ids", "token_type_ids") if n in encoded})
            places = np.flatnonzero(answers.in_context(encoded, i))
            offsets = np.asarray(encoded["offset_mapping"][i], dtype=np.int32)[places]  # characters of the context
            found.append((start + row, places, offsets, answers.no_answer(tokenizer, rows[-1]["input_ids"])))

    def read(logits: list[np.ndarray]) -> list[dict]:
        own: list[list] = [[] for _ in columns["context"]]
        for (row, places, offsets, nowhere), values in zip(found, logits, strict=True):
            values = values.astype(np.float64)
            best = _best(values[places], offsets, columns["context"][row], max_answer)
            own[row].append((*best, float(values[nowhere].sum())))
        return [_answer(each, context, no_answer) for each, context in zip(own, columns["context"], strict=True)]

    return checked(rows, Door.of(model, "data", labels_needed=False)), read


def _best(logits: np.ndarray, offsets: np.ndarray, context: str, most: int) -> tuple[float, int, int, float]:
    """(score, first and last character of the best stretch of a window, log of the sum over all of exp(score))."""
    blank = [not context[begin:end].strip() for begin, end in offsets]
    logits = np.where(np.array(blank)[:, None], -np.inf, logits)  # white space alone begins and ends no answer
    size = len(logits)
    scores = np.full((min(most, size), size), -np.inf)  # [length - 1, start]
    for more, row in enumerate(scores):
        row[: size - more] = logits[: size - more, 0] + logits[more:, 1]
    if not np.isfinite(best := scores.max(initial=-np.inf)):
        return -math.inf, 0, 0, -math.inf
    more, start = divmod(int(scores.argmax()), size)
    every = best + math.log(np.exp(scores - best).sum())
    return float(best), int(offsets[start, 0]), int(offsets[start + more, 1]), every


def _answer(windows: list[tuple], context: str, threshold: float) -> dict[str, Any]:
    """One answer out of its windows: (score, begin, end, log of the sum over all stretches, score of no answer)."""
    score, begin, end, *_ = max(windows, key=lambda window: window[0])
    nothing = min(window[-1] for window in windows)
    every = float(np.logaddexp.reduce([nothing, *(window[3] for window in windows)]))
    scores = {"score": math.exp(score - every), "no_answer_score": math.exp(nothing - every)}
    if score == -math.inf or nothing - score > threshold:
        return {"answer": "", "start": None, "end": None, **scores}
    text = context[begin:end]
    begin, end = begin + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())  # byte-level tokens
    return {"answer": context[begin:end], "start": begin, "end": end, **scores}
