"""The encoder as a fixed function from text to a vector.

To copy this module you need: features.py, batching.py, rows.py, torch and transformers (pretrained.py and assets.py
only to load by name).
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ftlib.batching import collate, encode_texts, evaluating, split_by_size, to_device
from ftlib.rows import token_limit

POOLINGS = ("mean", "cls", "max")


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: str = "mean") -> torch.Tensor:
    """One vector per text from (batch, tokens, hidden) and a 0/1 mask (batch, tokens): returns (batch, hidden).

    "mean" averages the real tokens, "max" takes the largest value of each dimension over them, "cls" takes the first
    real token.  The mask matters: without it padding is averaged in, and a text's vector depends on its neighbours.
    Source: Reimers & Gurevych 2019 (Sentence-BERT, arXiv:1908.10084), section 3.

    >>> hidden = torch.tensor([[[2.0], [4.0], [99.0]]])
    >>> [pool(hidden, torch.tensor([[1, 1, 0]]), p).item() for p in ("mean", "cls", "max")]
    [3.0, 2.0, 4.0]
    """
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}; choose one of {', '.join(POOLINGS)}")
    mask = attention_mask.bool().unsqueeze(-1)  # (batch, tokens, 1)
    if pooling == "cls":
        first = attention_mask.to(torch.int64).argmax(dim=1)  # (batch,), not 0 where padding is on the left
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    if pooling == "max":
        return hidden.masked_fill(~mask, torch.finfo(hidden.dtype).min).amax(dim=1)
    return hidden.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def extract_features(
    model: nn.Module | str | os.PathLike,
    texts: Iterable[Any],
    *,
    tokenizer: Any = None,
    pooling: str = "mean",
    layer: int = -1,
    batch_size: int = 64,
    max_length: int | None = None,
    normalize: bool = False,
    progress: bool = False,
) -> np.ndarray:
    """Vectors of texts: float32 (texts, hidden), in the order given.

    Args:
        model: a Transformers model (its encoder is used, without a task head), or a name for `load_model`.
        texts: strings, (text, text_pair) tuples, or lists of words.
        tokenizer: default: found by the model's name.
        pooling: "mean", "cls" or "max" over real tokens; see `pool`.
        layer: which layer's output, counted like hidden_states: 0 the embeddings, 1 the first layer, -1 the last.
        batch_size: texts a batch; texts are sorted by length, the longest first, and put back in order.
        max_length: cut longer texts, in tokens; default: what the model takes.
        normalize: divide each vector by its length, so that a dot product is a cosine.

    The model's train or eval mode is as before afterwards; dropout is off here.
    Raises ValueError or TypeError naming the row for empty texts and None, and for a layer that does not exist.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}; choose one of {', '.join(POOLINGS)}")
    if isinstance(model, (str, os.PathLike)):
        from ftlib.pretrained import load_model, load_tokenizer

        tokenizer = tokenizer or load_tokenizer(model)
        model = load_model(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    base = base.encoder if hasattr(base, "heads") else getattr(base, "base_model", base)
    if not hasattr(base, "config"):
        raise TypeError(f"model is a {type(model).__name__}; pass a Transformers model, or its name")
    if tokenizer is None:
        from ftlib.pretrained import load_tokenizer

        if not base.config._name_or_path:
            raise ValueError("the model was not loaded by name, so its tokenizer is unknown; pass tokenizer=...")
        tokenizer = load_tokenizer(base.config._name_or_path)
    count = base.config.num_hidden_layers
    if type(layer) is not int or not -count - 1 <= layer <= count:
        raise ValueError(f"layer={layer!r}: choose 0 (embeddings) to {count}, or from the end, -1 to {-count - 1}")

    rows = encode_texts(texts, tokenizer, max_length=token_limit(max_length, tokenizer, base.config))
    lengths = [len(row["input_ids"]) for row in rows]
    out = np.empty((len(rows), base.config.hidden_size), dtype=np.float32)
    plan = split_by_size(range(len(rows)), lengths, batch_size=batch_size)
    if progress:
        from tqdm.auto import tqdm

        plan = tqdm(plan, desc="features", unit="batch", leave=False)
    last = layer in (-1, count)
    device = next(base.parameters()).device
    with evaluating(base):
        for indices in plan:
            batch = collate([rows[i] for i in indices], pad_token_id=tokenizer.pad_token_id or 0)
            batch = to_device(batch, device)
            output = base(**batch, output_hidden_states=not last)
            hidden = output.last_hidden_state if last else output.hidden_states[layer]  # (batch, tokens, hidden)
            vectors = pool(hidden.float(), batch["attention_mask"], pooling)  # (batch, hidden)
            if normalize:
                vectors = nn.functional.normalize(vectors, dim=-1)
            out[indices] = vectors.cpu().numpy()
    return out
