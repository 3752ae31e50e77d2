"""Language models: rows from a text, a prompt and its completion, or messages, and which of their tokens are trained.

A label stands at its own token and is that token, or -100 where nothing is trained; the model predicts it from the
tokens before, so the first token of a row never counts.  Trained are: a text, all of it; a completion; what an
assistant says.  The end token after it is trained too, or the model would not learn to stop; what the template writes
around it, the prompt for the answer included, is not.

To copy: this file, core/batches.py, tasks/classification.py and tasks/tagging.py.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..core.batches import IGNORE, short
from . import classification
from .classification import text_of
from .tagging import check_tags

FORMS = (("messages",), ("prompt", "completion"), ("text",))  # columns of a dataset, the first form that is there


def items(labels: Any) -> Any:
    """How many tokens are predicted: labeled, and not the first of their row; labels (..., tokens)."""
    return (labels[..., 1:] != IGNORE).sum()


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed over the predicted tokens; logits (batch, tokens, vocabulary), labels (batch, tokens), not yet shifted."""
    return classification.cross_entropy(logits[:, :-1], labels[:, 1:], label_smoothing=label_smoothing)


def check_tokens(label: Any, num_labels: int, length: int, where: str) -> list[int]:
    """A token of the vocabulary, or -100, for every token; ValueError where nothing is left to predict."""
    label = check_tags(label, num_labels, length, where)
    if all(value == IGNORE for value in label[1:]):
        which = "but the first's, which nothing predicts"
        raise ValueError(f"{where}: no token is trained: all labels are {IGNORE} ({which})")
    return label


def encode(
    tokenizer: Any, row: Mapping[str, Any], where: str, max_length: int | None = None, truncation: bool = True
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a row with the columns of one of `FORMS`; `where` names it in errors.

    Raises ValueError or TypeError for texts that are none, for a template that can't say which tokens are the
    assistant's, and for a row of which no token would be trained.
    """
    if "messages" in row or isinstance(row.get("prompt"), (list, tuple)):
        parts = _turns(tokenizer, row, where)
    else:
        parts = _completed(tokenizer, row, where)
    ids = [token for part, _ in parts for token in part]
    labels = [token if trained else IGNORE for part, trained in parts for token in part]
    limit = max_length or getattr(tokenizer, "model_max_length", None) or len(ids)
    if len(ids) > limit and not truncation:
        raise ValueError(f"{where}: {len(ids)} tokens, the limit is {limit}; cut it or set truncation=True")
    if not any(label != IGNORE for label in labels[1:limit]):
        late = any(label != IGNORE for label in labels[limit:])
        why = f"what would be trained begins after max_length={limit}; raise it" if late else "no assistant turn"
        raise ValueError(f"{where}: no token would be trained: {why}, or drop the row")
    return {"input_ids": ids[:limit], "labels": labels[:limit]}


def rows(
    tokenizer: Any, columns: dict[str, list], wheres: Sequence[str], max_length: int | None, truncation: bool
) -> dict[str, list]:
    """`encode` for every row of a batch of columns, as `tokenize` asks for it."""
    each = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    found = [encode(tokenizer, row, at, max_length, truncation) for row, at in zip(each, wheres, strict=True)]
    made = {name: [row[name] for row in found] for name in ("input_ids", "labels")}
    return {"attention_mask": [[1] * len(ids) for ids in made["input_ids"]]} | made


def prompt_ids(tokenizer: Any, prompt: Any, where: str) -> list[int]:
    """The tokens after which a model is to go on: a text's, or those of messages and the template's prompt for more."""
    if isinstance(prompt, str):
        return _joined(tokenizer, [text_of(prompt, where), ""], True, where)[0]
    return _ids(tokenizer, _rendered(tokenizer, _messages(prompt, where), where, add_generation_prompt=True), False)


def end_ids(tokenizer: Any, config: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end token, and what the generation config names."""
    named = getattr(config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({one for one in (*named, getattr(tokenizer, "eos_token_id", None)) if one is not None})


def last_answer(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(what stands before the last trained stretch of a row, that stretch), tokens each.

    >>> last_answer({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]})
    ([5, 6, 7], [8])
    """
    ids, trained = [list(map(int, row[name])) for name in ("input_ids", "labels")]
    end = max(i for i, label in enumerate(trained) if label != IGNORE) + 1
    start = next((i + 1 for i in range(end - 1, -1, -1) if trained[i] == IGNORE), 1)
    return ids[:start], ids[start:end]


def tokens_a_byte(tokenizer: Any, labels: Iterable[Iterable[int]]) -> float:
    """Tokens a byte of the text (UTF-8) they are, -100 aside; nan where they are no text, end tokens alone say."""
    tokens, size = 0, 0
    for row in labels:
        ids = [int(label) for label in row if label != IGNORE]
        tokens += len(ids)
        size += len(tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8"))
    return tokens / size if size else float("nan")


Parts = list[tuple[list[int], bool]]  # tokens, and whether they are trained


def _completed(tokenizer: Any, row: Mapping[str, Any], where: str) -> Parts:
    """A text, or prompt and completion, and the end token."""
    names = next(form for form in FORMS[1:] if form[-1] in row)
    *before, last = _joined(tokenizer, [text_of(row[name], f"{where}, column {name!r}") for name in names], True, where)
    end = tokenizer.eos_token_id
    if end is None and before:
        raise ValueError(f"{where}: nothing would end the completion; set tokenizer.eos_token")
    last = last if end is None or last[-1:] == [end] else [*last, end]
    return [*((part, False) for part in before), (last, True)]


def _turns(tokenizer: Any, row: Mapping[str, Any], where: str) -> Parts:
    """A conversation by the tokenizer's template; what an assistant says is trained, in a prompt not."""
    given = [] if "messages" in row else _messages(row["prompt"], f"{where}, column 'prompt'")
    name = "completion" if given else "messages"
    turns = [*given, *_messages(row.get(name), f"{where}, column {name!r}")]
    render = partial(_rendered, tokenizer, where=where, **({"tools": row["tools"]} if row.get("tools") else {}))
    text = render(turns)
    if re.search(r"{%-?\s*generation", str(tokenizer.get_chat_template())):
        return _by_marks(tokenizer, render(turns, tokens=True), _ids(tokenizer, render(turns[: len(given)]), False))
    cuts = [0]
    for place in [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= len(given)]:
        before = render(turns[:place], add_generation_prompt=True)
        end = _end_of_turn(tokenizer, text, len(before), turns, place, render)
        if not text.startswith(before) or end is None:
            what = f"the template does not write turn {place} as it asks for an answer"
            remedy = "end the conversation with this turn, or use a template with {% generation %} marks"
            raise ValueError(f"{where}: {what}; {remedy}")
        cuts += [len(before), end]
    pieces = [text[a:b] for a, b in pairwise([*cuts, len(text)])]
    return [(ids, place % 2 == 1) for place, ids in enumerate(_joined(tokenizer, pieces, False, where))]


def _end_of_turn(tokenizer: Any, text: str, start: int, turns: list, place: int, render: Any) -> int | None:
    """Where what an assistant says from `start` on ends, its end token included; None where nothing tells."""
    _, special = _special(tokenizer, len(tokenizer), tokenizer.eos_token_id)
    if text.startswith(said := render(turns[: place + 1])):
        content = last = len(said)
        for found in reversed(list(special.finditer(said, start))):
            if said[found.end() : content].strip():
                break
            content = found.start()
    else:  # an earlier turn is written in another way than the last: put something else there
        other = render([*turns[:place], turns[place] | {"content": "\ue000"}, *turns[place + 1 :]])
        _, written, after = other.partition("\ue000")
        content = last = max(start, len(text) - len(after))
        if not written or not text.endswith(after):
            return None
    end = special.search(text, content)
    while end and (more := special.match(text, end.end(), last)):
        end = more
    own = end and (end.end() <= last or turns[place].get("tool_calls") or not text[content : end.start()].strip())
    return end.end() if own else last


def _by_marks(tokenizer: Any, found: Any, before: list[int]) -> Parts:
    """By the template's own marks, behind the tokens `before`; an end token just behind them is trained too."""
    ids, mask = found["input_ids"], list(found["assistant_masks"])
    special, _ = _special(tokenizer, len(tokenizer), tokenizer.eos_token_id)
    for i in range(1, len(ids)):
        if mask[i - 1] and not mask[i] and ids[i] in special:
            said = next(j for j in range(i - 1, -1, -1) if not mask[j] or tokenizer.decode(ids[j]).strip())
            mask[i] = ids[said] not in special  # or the marks hold one already, and a line break say
    return [([token], bool(own) and i >= len(before)) for i, (token, own) in enumerate(zip(ids, mask, strict=True))]


def _rendered(tokenizer: Any, turns: list, where: str, tokens: bool = False, **options: Any) -> Any:
    """Messages as the template writes them: text, or tokens with the template's marks."""
    if not turns:
        return ""
    if not getattr(tokenizer, "chat_template", None):
        remedy = "load the tokenizer of the instruct model, set tokenizer.chat_template, or use prompt and completion"
        raise ValueError(f"{where}: messages, but the tokenizer has no chat template; {remedy}")
    more = dict(return_dict=True, return_assistant_tokens_mask=True) if tokens else {}
    try:
        return tokenizer.apply_chat_template(turns, tokenize=tokens, **more, **options)
    except Exception as error:  # of jinja2, which a template raises itself, and of what it does with the messages
        raise ValueError(f"{where}: the chat template refuses the messages ({error}); mend the roles") from error


def _messages(value: Any, where: str) -> list[dict]:
    right = isinstance(value, (list, tuple)) and value and all(isinstance(turn, Mapping) for turn in value)
    if not right or not all(isinstance(turn.get("role"), str) for turn in value):
        raise ValueError(f"{where}: expected messages, [{{'role': ..., 'content': ...}}, ...], got {short(value)}")
    # Arrow gives every message all keys
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in value]
    for i, turn in enumerate(turns):
        if "content" in turn and turn["role"] == "assistant" and isinstance(turn["content"], str):
            text_of(turn["content"], f"{where}, message {i}")
        elif turn.keys() == {"role"}:
            raise ValueError(f"{where}, message {i}: no content; fill it in or drop the row")
    return turns


@lru_cache(maxsize=4)
def _special(tokenizer: Any, size: int, end: int | None) -> tuple[set[int], re.Pattern]:
    """The special tokens of a tokenizer of this size and end token: their numbers, and a pattern of them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})  # thousands in some tokenizers
    ids = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    return ids, re.compile("|".join(map(re.escape, tokenizer.convert_ids_to_tokens(sorted(ids)))) or "(?!)")


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _joined(tokenizer: Any, pieces: list[str], special: bool, where: str) -> list[list[int]]:
    """The tokens of each piece of a text; those before a cut are the ones they are when the text ends there.

    So a prompt has in training the tokens that it has when the model is asked to go on.  special: with what the
    tokenizer puts in front of a text; what it puts behind one is left out.
    """
    plain, full = (_ids(tokenizer, "a", own) for own in (False, special))
    front = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    behind = len(full) - len(plain) - front

    def ids(text: str) -> list[int]:
        own = _ids(tokenizer, text, special)
        return own[: len(own) - behind]

    if len(pieces) == 1:
        return [ids(pieces[0])]
    whole, parts = ids("".join(pieces)), [ids(pieces[0]), *(_ids(tokenizer, piece, False) for piece in pieces[1:])]
    if (joined := [token for part in parts for token in part]) == whole:
        return parts
    heads = [ids("".join(pieces[:i])) for i in range(1, len(pieces))]
    if all(whole[: len(head)] == head for head in heads):
        return [whole[a:b] for a, b in pairwise([0, *map(len, heads), len(whole)])]
    if tokenizer.decode(joined) != tokenizer.decode(whole):
        what = f"the tokens of {short(pieces[0][-20:])} change with what follows, {short(pieces[1][:20])}"
        raise ValueError(f"{where}: {what}; put the space or line break between them into one of the two")
    return parts
