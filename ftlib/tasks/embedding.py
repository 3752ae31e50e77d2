"""Texts as vectors: pairs that belong together, triplets, pairs with a score; what is learned is the cosine.

A row holds several texts: `input_ids` are their tokens one after the other, `text_lengths` says how many each has.  The
model, any encoder or decoder, gives a vector each, pooled as config.pooling says and, if config.normalize does, of
length 1: losses take (rows, texts, hidden).  `labels` are scores, floats from -1 to 1; without them each is the whole
number 1: the row's first two texts belong together.

To copy: this file, tasks/{heads,classification,metrics,overlap}.py, core/batches.py, torch and transformers.
Source: Reimers & Gurevych 2019 (Sentence-BERT, arXiv:1908.10084); names and defaults are sentence-transformers'.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batches import one_of, refuse, short, whole
from .classification import plain, text_of
from .heads import Auto, OnBase
from .metrics import pearson, spearman

FORMS = (("anchor", "positive", "negative"), ("anchor", "positive"), ("text", "text_pair", "label"))  # columns
READS = {"text": "text", "label": "label"}  # which of them text= and label= of `tokenize` name
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")


def check_score(label: Any, num_labels: int, length: int, where: str) -> float | int:
    """A score, a float from -1 to 1, or the whole number 1 where texts belong together and there are no scores."""
    value = plain(label)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {short(value)} is no score; need a float, or the whole number 1 where none is known")
    refuse(
        (type(value) is int and value != 1, f"{value} is a whole number; write a score as {float(value)}"),
        (not -1 <= value <= 1, f"the score is {value}; a cosine lies from -1 to 1: divide (a scale of 0 to 5 by 5)"),
        what=f"{where}: ",
    )
    return value


def rows(
    tokenizer: Any, columns: dict[str, list], wheres: Sequence[str], max_length: int | None, truncation: bool
) -> dict[str, list]:
    """Token ids of each row's texts, `text_lengths` and labels, as `tokenize` asks for them; max_length: of one text.

    Raises ValueError, TypeError naming row and column for what is empty, no text, no score, or too long.
    """
    limit, made = max_length or tokenizer.model_max_length, []
    cut = truncation and limit <= 1_000_000  # more is the library's "no limit known"
    for name in [name for form in FORMS[::2] for name in form if name in columns and name != "label"]:
        texts = [text_of(text, f"{at}, column {name!r}") for text, at in zip(columns[name], wheres, strict=True)]
        options = {"truncation": cut, "max_length": limit if cut else None, "return_attention_mask": False}
        made.append(tokenizer(texts, **options, verbose=False))
        for ids, at in zip(made[-1]["input_ids"], wheres, strict=True):
            long = f"{at}, column {name!r}: {len(ids)} tokens, the limit is {limit}"
            refuse((len(ids) > limit, f"{long}; cut it or set truncation=True"))
    keys = [key for key in ("input_ids", "token_type_ids") if key in made[0]]
    out = {key: [[*chain(*texts)] for texts in zip(*(one[key] for one in made), strict=True)] for key in keys}
    out["text_lengths"] = [[*map(len, texts)] for texts in zip(*(one["input_ids"] for one in made), strict=True)]
    scores, ends = columns.get("label", [1] * len(wheres)), [f"{at}, column 'label'" for at in wheres]
    scores = [float(score) if type(score) is int and "label" in columns else score for score in scores]
    return out | {"labels": [check_score(score, 1, 0, at) for score, at in zip(scores, ends, strict=True)]}


# ------------------------------------------------------------------------------------------------------- the model


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str = "mean") -> Tensor:
    """One vector per text from (batch, tokens, hidden) and a 0/1 mask (batch, tokens): returns (batch, hidden).

    Over the real tokens: "mean", "max" of each dimension, the first ("cls"), the last ("lasttoken"), which is a
    decoder's only one to have seen the text; "weightedmean" weighs the n-th token n times, "mean_sqrt_len_tokens"
    divides the sum by the root of the count: sentence-transformers' names.
    Source: Reimers & Gurevych 2019 (Sentence-BERT, arXiv:1908.10084), section 3.

    >>> hidden = torch.tensor([[[2.0], [4.0], [99.0]]])
    >>> [pool(hidden, torch.tensor([[1, 1, 0]]), p).item() for p in ("mean", "cls", "max")]
    [3.0, 2.0, 4.0]
    """
    one_of("pooling", pooling, POOLINGS)
    mask = attention_mask.bool().unsqueeze(-1)  # (batch, tokens, 1)
    if pooling in ("cls", "lasttoken"):
        seen = attention_mask.to(torch.int64) if pooling == "cls" else attention_mask.to(torch.int64).cumsum(dim=1)
        place = seen.argmax(dim=1)  # (batch,), the first of the largest: not 0 where padding is on the left
        return hidden[torch.arange(len(hidden), device=hidden.device), place]
    if pooling == "max":
        return hidden.masked_fill(~mask, torch.finfo(hidden.dtype).min).amax(dim=1)
    weights = mask.to(hidden.dtype) if pooling != "weightedmean" else mask.cumsum(dim=1).to(hidden.dtype) * mask
    count = weights.sum(dim=1).clamp(min=1)  # (batch, 1)
    total = (hidden.masked_fill(~mask, 0.0) * weights).sum(dim=1)
    return total / (count.sqrt() if pooling == "mean_sqrt_len_tokens" else count)


def apart(inputs: dict[str, Tensor], lengths: Tensor, fill: int = 0) -> dict[str, Tensor]:
    """Rows of several texts, (batch, tokens), as a row each, (batch * texts, tokens of the longest), padded behind.

    >>> ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    >>> apart({"input_ids": ids, "attention_mask": mask}, torch.tensor([[1, 2], [1, 1]]))["input_ids"].tolist()
    [[5, 0], [6, 7], [8, 0], [9, 0]]
    """
    mask = inputs["attention_mask"]
    steps = torch.arange(int(getattr(lengths, "host", lengths).max()), device=mask.device)
    begins = lengths.cumsum(1) - lengths + mask.argmax(1, keepdim=True)  # (batch, texts); padding may stand in front
    places = (begins[..., None] + steps).clamp(max=mask.shape[1] - 1).flatten(1)  # (batch, texts * longest)
    real = (steps < lengths[..., None]).flatten(0, 1)  # (batch * texts, longest)
    return {
        name: value.gather(1, places).view_as(real).where(real, fill if name == "input_ids" else 0)
        for name, value in inputs.items() if value is not None and value.shape == mask.shape
    }  # fmt: skip


class _Vectors(OnBase):
    """Pooling, and nothing that is trained."""

    def build(self, config: Any) -> None:
        config.pooling = one_of("pooling", getattr(config, "pooling", "mean"), POOLINGS)
        config.normalize = one_of("normalize", getattr(config, "normalize", True), (True, False))

    def forward(self, input_ids=None, attention_mask=None, text_lengths=None, labels=None, **inputs) -> Any:
        """text_lengths: int64 (batch, texts); logits are the vectors, float32 (batch, texts, hidden).

        Without text_lengths a row is one text: (batch, hidden).
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        refuse((input_ids is None, "no input_ids: a prompt in front of vectors can't be told from the texts"))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs |= {"input_ids": input_ids, "attention_mask": mask}
        if text_lengths is not None:
            inputs |= apart(inputs, text_lengths, self.config.pad_token_id or 0)
        hidden = self.base_model(**inputs)[0]  # (batch * texts, tokens, hidden)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        vectors = pool(hidden, inputs["attention_mask"], self.config.pooling)
        vectors = F.normalize(vectors, dim=-1) if self.config.normalize else vectors
        vectors = vectors if text_lengths is None else vectors.unflatten(0, text_lengths.shape)
        return SequenceClassifierOutput(None if labels is None else loss(vectors, labels) / len(labels), vectors)


class AutoModelForSentenceEmbedding(Auto):
    head, ending, what, settings = _Vectors, "ForSentenceEmbedding", "vectors of texts", ("pooling", "normalize")


# ------------------------------------------------------------------------------------------------------ the losses


def _texts(vectors: Tensor, least: int) -> Tensor:
    """(texts, rows, hidden); ValueError for fewer texts a row."""
    texts = vectors.shape[1] if vectors.dim() == 3 else 1
    refuse((texts < least, f"rows of {texts} texts, the loss needs {least}: {' and '.join(FORMS[0][:least])}"))
    return vectors.transpose(0, 1)


def in_batch(vectors: Tensor, labels: Tensor | None = None, scale: float = 20.0) -> Tensor:
    """Cross-entropy, summed over rows, of scale * cosine: an anchor's positive among the texts of all rows.

    vectors: (rows, 2 or more texts, hidden): anchor, positive, further negatives.  What counts as wrong are all other
    rows' positives and all negatives, so the loss hangs on which rows are taken together, and the same positive twice
    among them is counted as wrong; evaluation takes batches.  The mean is MultipleNegativesRankingLoss of that library.
    Source: Henderson et al. 2017 (arXiv:1705.00652), section 4.4; van den Oord et al. 2018 (InfoNCE, arXiv:1807.03748).
    """
    with torch.autocast(vectors.device.type, enabled=False):  # 20 times a cosine in bf16 has an error of 0.1
        anchors, *others = F.normalize(_texts(vectors, 2), dim=-1)
        wanted = torch.arange(len(anchors), device=vectors.device)
        return F.cross_entropy(scale * anchors @ torch.cat(others).T, wanted, reduction="sum")


def cosine(vectors: Tensor, labels: Tensor) -> Tensor:
    """(cosine - score)², summed over rows; labels float (rows,).  The mean is CosineSimilarityLoss.

    >>> cosine(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([0.5]))
    tensor(0.2500)
    """
    refuse((not labels.is_floating_point(), "the cosine loss needs scores, floats: tokenize rows with a label"))
    first, second, *_ = _texts(vectors, 2)
    return (F.cosine_similarity(first, second) - labels).square().sum()


def triplet(vectors: Tensor, labels: Tensor | None = None, margin: float = 5.0) -> Tensor:
    """max(0, |anchor - positive| - |anchor - negative| + margin), summed over rows; vectors (rows, 3, hidden).

    Of vectors of length 1 no distance is above 2: load the model with normalize=False, or take a smaller margin.
    Source: Schroff et al. 2015 (arXiv:1503.03832), whose distances are squared; the mean is TripletLoss.
    """
    anchor, positive, negative, *_ = _texts(vectors, 3)
    return F.relu(F.pairwise_distance(anchor, positive) - F.pairwise_distance(anchor, negative) + margin).sum()


def matryoshka(loss: Callable, widths: Sequence[int], weights: Sequence[float] | None = None) -> Callable:
    """A loss of vectors as the sum of it over their first `widths` numbers, made length 1; weights: of each, or 1.

    Source: Kusupati et al. 2022 (arXiv:2205.13147), equation 1.  ValueError for a width that no vector has.
    """
    sizes, shares = [whole("widths", width) for width in widths], [1.0] * len(widths) if weights is None else weights
    refuse((not sizes or len(shares) != len(sizes), f"{len(shares)} weights for {len(sizes)} widths"))

    def summed(vectors: Tensor, labels: Tensor) -> Tensor:
        full = vectors.shape[-1]
        refuse((max(sizes) > full, f"widths={max(sizes)}: the vectors have {full} numbers"))
        parts = zip(sizes, shares, strict=True)
        return sum(share * loss(F.normalize(vectors[..., :size], dim=-1), labels) for size, share in parts)

    return summed


def loss(vectors: Tensor, labels: Tensor) -> Tensor:
    """`cosine` where there are scores, else `in_batch`."""
    return cosine(vectors, labels) if labels.is_floating_point() else in_batch(vectors)


def measures(row: Any) -> tuple[str, ...]:
    return ("spearman", "pearson") if isinstance(row["labels"], float) else ("accuracy_at_1",)


def score(vectors: Any, labels: Any, names: Any = None) -> dict[str, float]:
    """Of scored pairs the correlations of cosine and score; else the share of anchors whose positive is the nearest.

    vectors: float (rows, texts, hidden).  The nearest by cosine, among the other texts of all rows; ties count.

    >>> score([[[1, 0], [1, 1]], [[0, 1], [1, 0]]], [1, 1])
    {'accuracy_at_1': 0.0}
    """
    vectors, labels = np.asarray(vectors, dtype=np.float64), np.asarray(labels)
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
    own = (unit[:, 0] * unit[:, 1]).sum(-1)
    if labels.dtype.kind == "f":
        return {"spearman": spearman(own, labels), "pearson": pearson(own, labels)}
    others, right = unit[:, 1:].reshape(-1, unit.shape[-1]), 0
    for start in range(0, len(unit), 1_024):
        best = (unit[start : start + 1_024, 0] @ others.T).max(1)
        right += int((own[start : start + 1_024] >= best - 1e-6).sum())
    return {"accuracy_at_1": right / len(unit)}
