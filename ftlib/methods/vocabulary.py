"""A vocabulary that grows, and a head on masked tokens for an encoder without one: both start from what is known.

To copy: this file, core/{anatomy,batches}.py, tasks/, torch and transformers.
Source: Hewitt 2021 (nlp.stanford.edu/~johnhew/vocab-expansion.html): new rows as means; here of the token's own pieces.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..core import anatomy
from ..core.batches import IGNORE, refuse, short
from ..tasks.task import TASKS, auto_class

SHIFT = 3.0  # in the first head's transform: its activation is all but straight from here on


@torch.no_grad()
def add_tokens(model: nn.Module, tokenizer: Any, tokens: Iterable[Any]) -> list[int]:
    """Add words to a tokenizer, and a row for each to the model's tables, in place; returns their ids.

    tokens: str, or tokenizers.AddedToken, which says if it may stand inside a word.  A new row, and its bias in the
    head, is the mean of those of the pieces that the word was until now; a tied head stays tied, rows that are there
    already stay as they are.  Transformers' own resizing draws new rows from the distribution of all old ones.
    Raises ValueError for a token that is empty, there already or given twice, and for a model with an adapter.

    Train, and save both: `ftlib.save(model, folder, tokenizer)`.
    """
    known, given = tokenizer.get_vocab(), list(tokens)
    words = [getattr(token, "content", token) for token in given]
    for i, word in enumerate(words):
        refuse(
            (not isinstance(word, str) or not word.strip(), "is no word"),
            (word in known, "is in the vocabulary already"),
            (word in words[:i], "was given twice"),
            what=f"token {i}, {short(word)}: ",
        )
    refuse((anatomy.unwrapped(model) is not model or hasattr(model, "tuning"), "add tokens before ftlib.tune"))
    pieces = [tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"] for word in words]
    tokenizer.add_tokens(given)
    ids = tokenizer.convert_tokens_to_ids(words)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # some tables have rows to spare
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    out = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight, *(() if out is None else (out.weight, out.bias))]
    for table in {id(t): t for t in tables if t is not None}.values():
        for row, own in zip(ids, pieces, strict=True):
            table[row] = table[own].mean(0)
    return ids


@torch.no_grad()
def masked_head(encoder: nn.Module, rows: Iterable[Mapping[str, Any]]) -> nn.Module:
    """A model of masked tokens around an encoder, whose modules it takes; rows: tokenized, of the texts it will see.

    The head starts as well as one can without training: its transform changes nothing but the length of a vector, the
    output layer is the encoder's own embeddings, and its bias the log of each token's frequency in the rows, plus one.
    Raises ValueError for rows without tokens, a head that is there, and where hidden and embedding sizes differ.
    """
    table, base = encoder.get_input_embeddings().weight, anatomy.base_of(encoder)
    counts = torch.ones(len(table), dtype=torch.float64)
    for row in rows:
        ids = row["labels"] if "labels" in row else row["input_ids"]
        counts += torch.bincount(torch.tensor([i for i in ids if i != IGNORE], dtype=torch.int64), minlength=len(table))
    kind = next(kind for kind, task in TASKS.items() if task.draw)
    model = auto_class(kind).from_config(encoder.config)
    out = model.get_output_embeddings()
    refuse(
        (base is not encoder, f"{type(encoder).__name__} has a head; load the encoder alone: task='encoder'"),
        (counts.sum() == len(counts), "rows hold no tokens"),
        (out.in_features != encoder.config.hidden_size, f"the head of {anatomy.kind_of(model)} makes hidden vectors "
         f"of {encoder.config.hidden_size} numbers ones of {out.in_features}; such a transform has to be learned"),
    )  # fmt: skip
    model.base_model.load_state_dict(encoder.state_dict(), strict=False)
    inside = {*model.base_model.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not out and module not in inside:
            nn.init.eye_(module.weight)
            if module.bias is not None:  # far from where the activation bends; the norm behind it takes it away again
                module.bias.fill_(SHIFT)
    out.bias.copy_((counts / counts.sum()).log())
    model.config._name_or_path = encoder.config._name_or_path
    return model.to(table.device).eval()
