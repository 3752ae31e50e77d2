"""Text for pretraining: a stream cut into rows of equal length, pairs of sentences, spans to be filled in.

To copy: this file, inputs/{agreement,rows}.py, core/{anatomy,batches}.py and tasks/.
Source: Devlin et al. 2019 (BERT, arXiv:1810.04805); Lan et al. 2020 (ALBERT, arXiv:1909.11942); Raffel et al. 2020 (T5,
arXiv:1910.10683).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..core.batches import Row, number, one_of, refuse, short, whole
from ..tasks.masked import PAIRS
from ..tasks.task import TASKS
from .rows import text_iterator

CHUNK = 64  # texts tokenized at a time


class PackedText:
    """A text of any size as rows of exactly `length` tokens, made as they are asked for; `fit` takes it as a stream.

    texts: strings, or dicts with `column`: a Dataset, an IterableDataset, any iterable; blank ones are left out.  Each
    is what its `task` makes of it, special tokens and end token included; one follows the other, rows are cut
    anywhere, and the tokens left at the end are dropped.  options: of the task, whole_words=True say.

    Every iteration begins anew; a resumed `fit` reads up to its place.  In a loop of your own `state_dict` after a row,
    and `load_state_dict` before the next iteration, go on behind that row, without tokenizing what comes before.
    Raises ValueError or TypeError, naming the text by its number, for what is none, when it comes.
    """

    def __init__(
        self, texts: Iterable[Any], tokenizer: Any, length: int, *, task: str, column: str = "text", **options: Any
    ):
        record = TASKS[one_of("task", task, [kind for kind, one in TASKS.items() if ("text",) in one.forms])]
        odd = [name for name in options if name not in record.options]
        refuse((odd, f"{', '.join(odd)}: {task} takes {', '.join(record.options) or 'no options'}"))
        text_iterator(texts if not hasattr(texts, "column_names") else [])  # refuses one text alone
        self.texts, self.tokenizer, self.length, self.column = texts, tokenizer, whole("length", length, 2), column
        self.record, self.options, self.begin = record, options, (0, {}, 0)
        self.alike = {name: own[0] for name, own in self._made(["a"], ["a text"]).items() if name == "masking"}
        self.state: tuple[int, dict[str, list], int] = self.begin  # texts read, their tokens, those that rows have

    def _made(self, texts: list, wheres: list[str]) -> dict[str, list]:
        return self.record.rows(self.tokenizer, {"text": texts}, wheres, 2**31 - 1, True, **self.options)

    def state_dict(self) -> dict[str, Any]:
        """How many texts were read, and the tokens of them that no row has yet, {column: numbers}."""
        texts, rest, start = self.state
        return {"texts": texts, "rest": {name: own[start:] for name, own in rest.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.begin = self.state = (state["texts"], {name: list(own) for name, own in state["rest"].items()}, 0)

    def __iter__(self) -> Iterator[Row]:
        (read, rest, start), self.begin, source = self.begin, (0, {}, 0), iter(self.texts)
        next(islice(source, read, read), None)
        while True:
            while len(rest.get("input_ids", ())) - start >= self.length:
                row = {name: own[start : start + self.length] for name, own in rest.items()}
                start += self.length
                if self.record.items(np.asarray(row["labels"])):  # else nothing would be learned
                    self.state = read, rest, start
                    yield {**row, **self.alike}
            rest, start = {name: own[start:] for name, own in rest.items()}, 0
            texts = list(islice(source, CHUNK))
            if not texts:
                return
            texts = [text[self.column] if isinstance(text, Mapping) else text for text in texts]
            places = [(f"text {i}", text) for i, text in enumerate(texts, read) if str(text).strip()]
            read += len(texts)
            if places:
                wheres, kept = map(list, zip(*places, strict=True))
                made = self._made(kept, wheres)
                for name in sorted({"input_ids", "labels", "begins"} & made.keys()):
                    rest[name] = [*rest.get(name, ()), *(token for row in made[name] for token in row)]


def sentence_pairs(
    documents: Sequence[Sequence[str]], tokenizer: Any, *, label: str, max_length: int = 128, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of `text`, `text_pair` and a label for `tokenize(..., task="masked-lm")`, of documents, lists of sentences.

    Sentences follow each other until they have `max_length` tokens with the special ones; a cut at random makes two
    texts of them.  label "next_sentence_label": half of the second texts come from another document (1), and what they
    replace is used again; "sentence_order_label": half of the pairs change places (1).  A document's last sentence
    alone makes a pair for the former only.
    Raises ValueError naming document and sentence for what is no text, and for fewer than two documents.
    """
    one_of("label", label, PAIRS)
    refuse(
        (len(documents) < 2 and label == PAIRS[0], f"{len(documents)} documents; another one is needed for a text"),
        *((isinstance(d, str) or not len(d), f"document {i}: {short(d)}; a list of sentences, at least one")
          for i, d in enumerate(documents)),
        *((not isinstance(s, str) or not s.strip(), f"document {i}, sentence {k}: {short(s)} is no text")
          for i, document in enumerate(documents) for k, s in enumerate(document)),
    )  # fmt: skip
    rng, rows = np.random.default_rng(seed), []
    most = whole("max_length", max_length, 8) - tokenizer.num_special_tokens_to_add(True)
    sizes = [[len(ids) for ids in tokenizer(list(d), add_special_tokens=False)["input_ids"]] for d in documents]
    for own, document in enumerate(documents):
        place = 0
        while place < len(document):
            end = _until(sizes[own], place, most)
            cut = int(rng.integers(place + 1, end)) if end - place > 1 else end
            first, second, odd = document[place:cut], document[cut:end], int(rng.random() < 0.5)
            room, place = most - sum(sizes[own][place:cut]), end
            if label == PAIRS[0] and (odd or not second):
                other = (own + 1 + int(rng.integers(len(documents) - 1))) % len(documents)
                begin = int(rng.integers(len(documents[other])))
                second, odd, place = documents[other][begin : _until(sizes[other], begin, room)], 1, cut
            elif label == PAIRS[1] and odd:
                first, second = second, first
            if first and second:
                rows.append({"text": " ".join(first), "text_pair": " ".join(second), label: odd})
    return rows


def _until(sizes: Sequence[int], start: int, most: int) -> int:
    """Where sentences from `start` on, at least one, have no more than `most` tokens together."""
    end, total = start + 1, sizes[start]
    while end < len(sizes) and total + sizes[end] <= most:
        total, end = total + sizes[end], end + 1
    return end


def corrupt_spans(
    ids: Sequence[int], tokenizer: Any, key: Sequence[int], *, share: float = 0.15, mean_length: float = 3.0
) -> dict[str, list[int]]:
    """A row for "seq2seq-lm" by T5's objective: spans of a text are left out, and are to be written.

    ids: of a text, without end token.  `share` of them, in spans of `mean_length` on average, each replaced by the next
    of <extra_id_0>, <extra_id_1>, …; the label has these and what they stand for; both end with the end token.  The
    spans are a function of the key, numbers from 0, [seed, epoch, row] say; lengths are T5's: every way to cut the
    tokens left out, and those between, into that many parts is as likely.
    Raises ValueError for fewer than two tokens, and for a tokenizer that lacks such a token or an end token.
    """
    size, rng = len(ids), np.random.default_rng(key)
    share, mean_length = number("share", share, 0, 1, below=True), number("mean_length", mean_length, 1)
    noise = min(max(round(size * share), 1), size - 1)
    spans = min(max(round(noise / mean_length), 1), noise, size - noise)
    names = [f"<extra_id_{i}>" for i in range(max(spans, 1))]
    marks, end = tokenizer.convert_tokens_to_ids(names), tokenizer.eos_token_id
    refuse(
        (size < 2, f"{size} tokens; at least two are needed"),
        (end is None, "the tokenizer has no end token"),
        *((mark in (None, tokenizer.unk_token_id), f"the tokenizer has no {name}; load T5's, or use a shorter text")
          for name, mark in zip(names, marks, strict=True)),
    )  # fmt: skip
    kept, gone = (_cut(total, spans, rng) for total in (size - noise, noise))
    source, target, place = [], [], 0
    for mark, stay, leave in zip(marks, kept, gone, strict=True):
        source += [*ids[place : place + stay], mark]
        target += [mark, *ids[place + stay : place + stay + leave]]
        place += stay + leave
    return {"input_ids": [*source, end], "labels": [*target, end]}


def _cut(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """The lengths of `parts` parts of `total`, none of them 0; all ways are as likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()
