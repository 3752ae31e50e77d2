"""More rows from the rows there are: words deleted, swapped, put in or replaced, back-translation; mixup.

A way to change a text is a function (text, generator) -> text, with a numpy.random.Generator.  Words are what white
space parts; they come back with a space between.

To copy: this file, inputs/{agreement,reading,rows}.py, core/{anatomy,batches}.py, tasks/, torch and datasets.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core import anatomy
from ..core.batches import number, refuse, short, whole
from ..inputs.reading import as_dataset
from ..inputs.rows import token_limit
from ..tasks.classification import text_of
from ..tasks.task import TASKS, kind_of, task_loss

Change = Callable[[str, np.random.Generator], str]


def changes(words: int, rate: float) -> int:
    """How many of a text's words are changed: rate · words, rounded down, but one at least.

    Source: Wei and Zou 2019, EDA (arXiv:1901.11196), section 2; they take 0.05 for up to 2,000 rows, then 0.1.

    >>> [changes(words, 0.1) for words in (4, 19, 20, 35)]
    [1, 1, 2, 3]
    """
    return max(1, int(rate * words))


def delete_words(text: str, generator: np.random.Generator, rate: float = 0.1) -> str:
    """Every word is left out with probability `rate`; where that leaves none, one of them stays (EDA)."""
    words = text.split()
    kept = [word for word, drawn in zip(words, generator.random(len(words)), strict=True) if drawn >= rate]
    return " ".join(kept or [generator.choice(words)])


def swap_words(text: str, generator: np.random.Generator, rate: float = 0.1) -> str:
    """Two words at different places change places, `changes` times one after the other (EDA)."""
    words = text.split()
    for _ in range(changes(len(words), rate) if len(words) > 1 else 0):
        i, j = generator.choice(len(words), 2, replace=False)
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


def masked_words(
    model: nn.Module, tokenizer: Any, *, rate: float = 0.1, insert: bool = False, top_k: int = 20,
    temperature: float = 1.0, keep: Collection[str] = (),
) -> Change:  # fmt: skip
    """A change by a masked language model: `changes` words give way to others that it expects there.

    All of them are masked at once, and each is drawn, by the model's probabilities, from its `top_k` likeliest whole
    words of letters, not the word that was there.  insert: words come in front of them instead.  keep: words that stay,
    those that make the label, say.  Marks around a word stay; words behind the model's longest text stay as they are.
    model: AutoModelForMaskedLM.  Raises ValueError for a tokenizer without a mask.
    Source: Kobayashi 2018 (arXiv:1805.06201), without the label; insertion: Kumar et al. 2020 (arXiv:2003.02245).
    """
    refuse((tokenizer.mask_token is None, "the tokenizer has no mask token: it belongs to no masked language model"))
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    begins = ("▁", "Ġ") if any(piece.startswith(("▁", "Ġ")) for piece in pieces) else ""
    words = [tokenizer.convert_tokens_to_string([p]).strip() if p.startswith(begins) else "" for p in pieces]
    barred = torch.tensor([not word.isalpha() for word in words])  # "##s" and "[MASK]" too
    kept, limit = {word.lower() for word in keep}, token_limit(None, tokenizer, model.config)
    ids: dict[str, list[int]] = {}
    for i, word in enumerate(words):
        ids.setdefault(word.lower(), []).append(i)

    def change(text: str, generator: np.random.Generator) -> str:
        refuse((tokenizer.mask_token in text, f"a text has {tokenizer.mask_token} in it: {short(text)}"))
        parts = [re.fullmatch(r"(\W*)(.*?)(\W*)", word, re.DOTALL).groups() for word in text.split()]
        free = [i for i, (_, word, _) in enumerate(parts) if word and word.lower() not in kept]
        count = min(changes(len(parts), rate), len(free))
        chosen = sorted(generator.choice(free, count, replace=False).tolist()) if count else []

        def put(fillings: Sequence[str]) -> str:
            new = dict(zip(chosen, fillings, strict=False))
            new = {i: f"{filling} {parts[i][1]}" if insert else filling for i, filling in new.items()}
            return " ".join(a + new.get(i, word) + b for i, (a, word, b) in enumerate(parts))

        masked, fillings = put([tokenizer.mask_token] * count), []
        batch = tokenizer(masked, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
        with anatomy.evaluating(model):
            logits = model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id]  # (masks, vocabulary)
        for i, own in zip(chosen, logits.float().cpu()[:, : len(words)].masked_fill(barred, -torch.inf), strict=False):
            own[ids.get(parts[i][1].lower(), [])] = -torch.inf
            values, places = own.topk(min(top_k, len(own)))
            shares = (values / temperature).double().softmax(-1).numpy()
            fillings.append(words[places[generator.choice(len(shares), p=shares)]])
        return put(fillings)

    return change


def back_translation(there: Callable[..., list[str]], back: Callable[..., list[str]]) -> Change:
    """A text into another language and back; there, back: (texts, seed=...) -> texts, of `ftlib.generate` say.

    partial(ftlib.generate, model, tokenizer=tokenizer, temperature=0.9) is one: without a temperature all copies are
    alike.  Source: Sennrich et al. 2016 (arXiv:1511.06709); Edunov et al. 2018 (arXiv:1808.09381) on drawing.
    """

    def change(text: str, generator: np.random.Generator) -> str:
        first, second = generator.integers(2**31, size=2).tolist()
        return back(there([text], seed=first), seed=second)[0]

    return change


def augment(rows: Any, how: Change | Sequence[Change], times: int = 1, *, seed: int = 0, text: str = "text") -> Any:
    """A Dataset of the rows and, behind them, `times` changed copies of each, with its label and other columns.

    rows: what `tokenize` takes; of several splits "train" alone grows.  Split first: a changed copy of a validation row
    gives it away.  how: a change, or several, which a row's copies take in turn.  A copy hangs on seed, row and number.
    Raises ValueError or TypeError naming the row for a text that is none, before or after a change.
    """
    import datasets

    table = as_dataset(rows)
    if isinstance(table, dict):
        refuse(("train" not in table, f"no split 'train' among {', '.join(table)}: only that may grow"))
        return type(table)({**table, "train": augment(table["train"], how, times, seed=seed, text=text)})
    names = table.column_names or ()
    refuse((text not in names, f"no column {text!r} among {', '.join(names)}; say text="))
    changed, grown = [how] if callable(how) else list(how), []
    for i, row in enumerate(table):
        for copy in range(whole("times", times)):
            given = text_of(row[text], f"row {i}, column {text!r}")
            new = changed[copy % len(changed)](given, np.random.default_rng([whole("seed", seed, 0), i, copy]))
            grown.append({**row, text: text_of(new, f"row {i}, column {text!r}")})
    return datasets.concatenate_datasets([table, datasets.Dataset.from_list(grown, table.features)])


@contextmanager
def mixup(model: nn.Module, alpha: float = 0.2) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Inside, training mixes what the head reads of each row with another row's; gives the loss for `fit(loss=)`.

    λ x + (1 - λ) x' with λ ~ Beta(alpha, alpha), one a batch, and λ loss(label) + (1 - λ) loss(label'), summed; x' is
    the row a random number of places before in the batch.  Evaluation is as without.  Not with `r_drop`.

        with mixup(model) as loss:
            fit(model, train, loss=loss)

    Raises ValueError for tasks with a label a token, and for heads that read rows at various places, a decoder's.
    Source: Zhang et al. 2018 (arXiv:1710.09412); in Transformers: Sun et al. 2020 (arXiv:2010.02394).
    """
    number("alpha", alpha, 1e-6)
    record, own, mixed = TASKS[kind_of(model)], task_loss(kind_of(model)), []
    refuse((record.a_token or record.rows, f"mixup is for a label a row, not for {kind_of(model)}"))
    head = model.get_submodule(anatomy.head_modules(model)[0])

    def mix(module: nn.Module, inputs: tuple) -> tuple | None:
        mixed.clear()
        if not module.training:
            return None
        x = inputs[0]  # (rows, hidden), or (rows, tokens, hidden), of which the first token is read
        last = x.dim() == 3 and isinstance(module, nn.Linear)
        refuse((last, f"mixup: {anatomy.kind_of(model)}'s head reads the last token of each row, not the first"))
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        mixed.extend((share, int(torch.randint(1, max(len(x), 2), ()))))
        return share * x + (1 - share) * x.roll(mixed[1], 0), *inputs[1:]

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not mixed:
            return own(logits, labels)
        share, turn = mixed
        return share * own(logits, labels) + (1 - share) * own(logits, labels.roll(turn, 0))

    hook = head.register_forward_pre_hook(mix)
    try:
        yield loss
    finally:
        hook.remove()
