"""Entities of texts, in characters: a tagger's logits, joined over windows, as words, as tags, as spans."""

from bisect import bisect
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.batches import Row, one_of, refuse, whole
from ..inputs.agreement import agree
from ..inputs.rows import text_iterator, token_limit
from ..methods.sequences import Transitions, bio_transitions, viterbi
from ..tasks.classification import text_of
from ..tasks.tagging import is_bio, named_tags, spans_to_tags, tag_groups, word_ids
from ..tasks.task import TASKS, names_of, tasks_of
from .prediction import logits_of

AGGREGATIONS = ("first", "average", "max", "simple", "none")


def entities(
    model: nn.Module, texts: Any, *, tokenizer: Any, aggregation: str = "first", constrained: bool = False,
    transitions: Transitions | None = None, stride: int = 64, max_length: int | None = None, batch_size: int = 64,
    task: str = "", **options: Any,
) -> list[list[dict]]:  # fmt: skip
    """The entities of every text: [{"label", "start", "end", "text", "score"}, ...], in characters, end excluded.

    Args:
        texts: strings.  One longer than `max_length` tokens (default: what the model takes) is cut into windows.
        aggregation: a word has the probabilities of its "first" piece, their "average", or those of the piece with the
            highest one ("max"); "simple": every piece is a word; "none": and an entity, whose label is its whole tag.
        constrained: the best tags among those that are right BIO, by `bio_transitions` of the model's labels; else a
            tag that breaks BIO begins an entity.
        transitions: of a CRF, `crf.transitions`; with `constrained` both count.
        stride: how many tokens a window shares with the next, at most half of them; each word is read in the window
            where it is farthest from both ends.
        options: progress and shared, as in `predict`.

    Words are the tokenizer's, and end where those of `tagging.spans_to_tags` do.  score: the mean over the words of the
    probability of their tag.  Labels that are no BIO ("NOUN") join equal neighbors.
    Raises ValueError or TypeError naming the row for an empty text and what is none; ValueError for no tagger.

    As Transformers' pipeline, except: words of byte-level BPE and SentencePiece, which there end at white space alone,
    comma included, and where a lone "▁" is one; white space around an entity, which it keeps; E- and S-, which it does
    not know; windows, where it takes the longest of overlapping entities, halves of words among them.
    """
    one_of("aggregation", aggregation, AGGREGATIONS)
    whole("stride", stride, 0)
    whole("max_length", 2**30 if max_length is None else max_length, tokenizer.num_special_tokens_to_add() + 1)
    tasks, limit = tasks_of(model), token_limit(max_length, tokenizer, model.config) or 2**30
    tagger = task in tasks and TASKS[tasks[task][0]].named is named_tags
    refuse((not tagger, f"task={task!r}: entities are read off a tagger's labels; the model has {tasks}"))
    texts = [text_of(text, f"row {i}, column 'text'") for i, text in enumerate(text_iterator(texts))]
    how = dict(return_offsets_mapping=True, return_attention_mask=False, truncation=False, padding=False, verbose=False)
    encoded = tokenizer(texts, **how) if texts else None
    windows = [_windows(encoded, i, limit, stride) for i in range(len(texts))]
    rows = [row for own in windows for _, row in own]
    padding = agree(model, tokenizer, batch_size != 1 and len(rows) > 1)
    logits = iter(logits_of(model, rows, task=task, batch_size=batch_size, padding=padding, **options))
    names = [name for _, name in sorted(names_of(model, task).items())]
    bio, keys = [name if is_bio(name) else f"I-{name}" for name in names], ("label", "start", "end", "text", "score")
    if constrained:
        allowed = bio_transitions(names)
        transitions = [a.to(b) + b for a, b in zip(allowed, transitions or allowed, strict=True)]  # -inf twice: -inf
    found: list[list[dict]] = []
    for i, text in enumerate(texts):
        words, chances = _words(text, encoded, i, [(own, next(logits)) for own, _ in windows[i]], aggregation)
        numbers = chances.argmax(-1)
        if transitions is not None and words:
            numbers = viterbi(torch.from_numpy(np.log(chances + 1e-300))[None], transitions)[0].numpy()
        groups = tag_groups([bio[n] for n in numbers])
        if aggregation == "none":
            groups = [(names[n], k, k + 1) for k, n in enumerate(numbers) if names[n] != "O"]
        sure = chances[np.arange(len(words)), numbers]  # (words,)
        found.append([])
        for label, first, end in groups:
            a, b = words[first][0], words[end - 1][1]  # SentencePiece's pieces hold the space before
            a, b = b - len(text[a:b].lstrip()), a + len(text[a:b].rstrip())
            values = label, a, b, text[a:b], float(sure[first:end].mean())
            found[-1] += [dict(zip(keys, values, strict=True))] if a < b else []
    return found


def _windows(encoded: Any, i: int, limit: int, stride: int) -> list[tuple[np.ndarray, Row]]:
    """(which pieces, row) of every window of text i: the special tokens that stand before, pieces, those behind."""
    if not (inside := _pieces(encoded, i)):  # control characters alone
        return []
    head, tail = [*range(inside[0])], [*range(inside[-1] + 1, len(encoded["input_ids"][i]))]
    most = min(limit - len(head) - len(tail), len(inside))
    shared = min(stride, most // 2)
    out = []
    for first in range(0, max(len(inside) - shared, 1), most - shared):
        places = head + inside[first : first + most] + tail
        row = {k: [encoded[k][i][n] for n in places] for k in ("input_ids", "token_type_ids") if k in encoded}
        out.append((np.arange(len(inside))[first : first + most], row))
    return out


def _pieces(encoded: Any, i: int) -> list[int]:
    """The places of a text's own tokens, which stand together between special ones."""
    return [k for k, word in enumerate(word_ids(encoded, i)) if word is not None]


def _words(text: str, encoded: Any, i: int, parts: list, aggregation: str) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(start, end) of every word in characters, and its probabilities (words, labels); parts: [(pieces, logits)]."""
    pieces, whose, apart = _pieces(encoded, i), encoded.word_ids(i), aggregation in ("simple", "none")
    held, starts = [encoded["offset_mapping"][i][k] for k in pieces], spans_to_tags(text, [])[1]
    # a lone "▁" goes with the word behind it, as in training
    ours = [bisect(starts, end - len(text[start:end].lstrip())) for start, end in held]
    keys = [(whose[k], own) for k, own in zip(pieces, ours, strict=True)]
    begins = [n for n, key in enumerate(keys) if apart or n == 0 or key != keys[n - 1]]
    runs = pairwise([*begins, len(pieces)])
    runs = [(a, b) for a, b in runs if apart or text[held[a][0] : held[b - 1][1]].strip()]  # a space is no word
    if not runs:
        return [], np.empty((0, 1))
    values = _joined(parts, runs, pieces)
    values = np.exp(values - values.max(-1, keepdims=True))  # (pieces, labels)
    values /= values.sum(-1, keepdims=True)
    if aggregation == "average":
        values = np.stack([values[a:b].mean(0) for a, b in runs])
    else:
        values = values[[a + values[a:b].max(-1).argmax() if aggregation == "max" else a for a, b in runs]]
    return [(held[a][0], held[b - 1][1]) for a, b in runs], values


def _joined(parts: list, runs: list[tuple[int, int]], pieces: list[int]) -> np.ndarray:
    """Logits (pieces, labels) from those of windows; a word's all from where it is farthest from both ends."""
    first, end = np.arange(len(pieces)), np.arange(len(pieces)) + 1  # of each piece's word
    for a, b in runs:
        first[a:b], end[a:b] = a, b
    room, joined = np.full(len(pieces), -np.inf), np.empty((len(pieces), parts[0][1].shape[1]))
    for own, logits in parts:
        found = np.minimum(first[own] - own[0], own[-1] + 1 - end[own])  # below 0 for a word that is cut
        better = found > room[own]
        room[own[better]], joined[own[better]] = found[better], logits[pieces[0] :][: len(own)][better]
    return joined
