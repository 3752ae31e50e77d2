"""What a model of masked tokens would put in the place of each mask."""

from typing import Any

from torch import nn

from ..core.batches import IGNORE, refuse, short, whole
from ..inputs.agreement import agree
from ..inputs.rows import Door, checked, token_limit
from ..inputs.tokenizing import encode_texts
from ..methods.token_losses import best_tokens
from .prediction import batches_of


def fill(
    model: nn.Module, texts: list[str], tokenizer: Any, top_k: int = 5, max_length: int | None = None,
    batch_size: int = 64, progress: bool = False,
) -> list[list[list[dict[str, Any]]]]:  # fmt: skip
    """For every text, for every mask in it, the `top_k` likeliest tokens: {"token": id, "text", "score": probability}.

    As Transformers' fill-mask pipeline: where a text has several masks, each is filled by itself.
    Raises ValueError or TypeError naming the text for one without a mask, or whose mask is cut off.
    """
    count, mask = min(whole("top_k", top_k), len(tokenizer)), tokenizer.mask_token
    limit, rows = token_limit(max_length, tokenizer, model.config), []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i}: {short(text)}; pass texts with the mask token, {mask}")
    for i, (text, row) in enumerate(zip(texts, encode_texts(texts, tokenizer, max_length=limit), strict=True)):
        labels = [token if token == tokenizer.mask_token_id else IGNORE for token in row["input_ids"]]
        there, kept = text.count(mask or "\0"), sum(label != IGNORE for label in labels)
        refuse(
            (not there, f"text {i}: no mask token {mask} in {short(text)}"),
            (kept < there, f"text {i}: {there - kept} of {there} masks are behind token {limit}; shorten the text"),
        )
        rows.append(row | {"labels": labels})
    if not rows:
        return []
    ready, found = checked(rows, Door.of(model, "data")), [[] for _ in rows]
    how = dict(batch_size=batch_size, padding=agree(model, tokenizer, len(rows) > 1), progress=progress)
    best = batches_of(model, [ready], read=lambda model, batch: best_tokens(model, batch, count), **how)
    for places, own, (scores, ids) in best:
        owners = [i for i, row in zip(places, own, strict=True) for label in row["labels"] if label != IGNORE]
        for i, *each in zip(owners, scores.tolist(), ids.tolist(), strict=True):
            pairs = zip(*each, strict=True)
            found[i].append([{"token": t, "text": tokenizer.decode([t]), "score": s} for s, t in pairs])
    return found
