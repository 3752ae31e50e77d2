"""What a model of masked tokens would put in the place of each mask.

To copy: this file, inputs/{tokenizing,rows,agreement}.py, core/{anatomy,batches}.py, tasks/,
methods/{speedups,token_losses}.py and torch.
"""

from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..core import anatomy
from ..core.batches import IGNORE, collate, refuse, short, split_by_size, to_device, whole
from ..inputs.agreement import agree
from ..inputs.rows import Door, checked, token_limit
from ..inputs.tokenizing import encode_texts
from ..methods.speedups import shortcuts
from ..methods.token_losses import best_tokens
from ..tasks.task import TASKS, kind_of


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
    pad, ready = agree(model, tokenizer, len(rows) > 1), checked(rows, Door.of(model, "data"))
    batches = split_by_size(range(len(rows)), ready.lengths, batch_size=batch_size, alike=pad.alike)
    found: list[list] = [[] for _ in rows]
    stack, device = {"": TASKS[kind_of(model) or ""].stack}, next(model.parameters()).device
    with anatomy.evaluating(model), shortcuts(model):
        for places in tqdm(batches, desc="predict", unit="batch", leave=False, disable=not progress):
            batch = collate([ready[i] for i in places], pad_token_id=pad.id, padding_side=pad.side, stack=stack)
            owners = [i for i in places for label in ready[i]["labels"] if label != IGNORE]
            scores, ids = (one.tolist() for one in best_tokens(model, to_device(batch, device), count))
            for i, *best in zip(owners, scores, ids, strict=True):
                pairs = zip(*best, strict=True)
                found[i].append([{"token": t, "text": tokenizer.decode([t]), "score": s} for s, t in pairs])
    return found
