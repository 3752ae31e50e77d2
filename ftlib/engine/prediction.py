"""Run a trained model: logits, predictions, metrics; rows sorted by length, results in the order given."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..core import anatomy
from ..core.batches import IGNORE, collate, one_of, refuse, split_by_size, to_device
from ..core.loop import logits_of as read_logits
from ..inputs.agreement import Padding, agree
from ..inputs.pretrained import tokenizer_of
from ..inputs.reading import SUFFIXES, as_dataset
from ..inputs.rows import Door, Rows, checked, is_stream, listed, rows_for, take, token_limit
from ..inputs.tokenizing import encode_texts
from ..methods import token_losses
from ..methods.speedups import shortcuts
from ..tasks import language_modeling
from ..tasks.task import TASKS, formed, given_names, names_of, tasks_of
from . import answering, distributed, generation

OUTPUTS = ("labels", "names", "probabilities", "logits")


def batches_of(
    model: nn.Module, parts: list[Rows], *, task: str = "", batch_size: int = 64, padding: Padding | None = None,
    autocast: Callable | None = None, progress: bool = False, shared: bool = False, read: Callable | None = None,
) -> Iterator[tuple[list[int], list[dict], Any]]:  # fmt: skip
    """(numbers of the rows, the rows, their logits: a tensor, or {task: tensor}), a batch each, longest rows first.

    shared: each of several processes computes a part of the batches; where there are too few, another's, with no
    numbers.  Every module's train or eval mode is as before afterwards.  Of a language model, whose rows need labels,
    the summed loss comes in place of logits, or what `read` makes of model and batch.
    """
    pad = padding or agree(model)
    places = [(part, i) for part, rows in enumerate(parts) for i in range(len(rows))]
    lengths = np.concatenate([rows.lengths for rows in parts]) if places else []
    device = next(model.parameters()).device
    batches = split_by_size(range(len(places)), lengths, batch_size=batch_size, alike=pad.alike)
    world = distributed.world_size() if shared and places else 1
    plan = distributed.evened([batches[i::world] for i in range(world)]) if world > 1 else [(b, 1.0) for b in batches]
    several, record = hasattr(model, "tasks") and not task, _record(model)
    tokens = not record.labeled
    stack = {name: TASKS[kind].stack for name, (kind, _) in tasks_of(model).items()} if several or tokens else {}
    numbered, named = dict(enumerate(parts)), {"task": task} if task else {}
    summing = token_losses.in_chunks(model, counted=bool(record.measures)) if tokens and not read else nullcontext()
    with anatomy.evaluating(model), shortcuts(model), summing:
        for indices, counts in tqdm(plan, desc="predict", unit="batch", leave=False, disable=not progress):
            rows = take(numbered, [places[i] for i in indices])
            rows = record.draw(rows, [(0, *places[i]) for i in indices]) if record.draw else rows
            plain = rows if several or tokens else [{k: v for k, v in row.items() if k != "labels"} for row in rows]
            batch = collate(plain, pad_token_id=pad.id, padding_side=pad.side, stack=stack)
            if not tokens:
                batch.pop("labels", None)
            batch = to_device(batch, device)
            with (autocast or nullcontext)():
                found = read(model, batch) if read else model(**batch, **named)
            if not (read or several or task):
                found = found.loss if tokens else read_logits(found, batch)
            yield (indices if counts else []), rows, found


def _record(model: nn.Module) -> Any:
    """The first task's; a language model, whose labels are tokens, has one."""
    return next(TASKS[kind] for kind, _ in tasks_of(model).values())


def logits_of(model: nn.Module, rows: Rows | list, *, task: str = "", **options: Any) -> list[np.ndarray]:
    """Every row's logits, float32: (classes,), of tags and answers (tokens, classes); options: of `batches_of`."""
    if not len(rows):
        return []
    rows = rows if isinstance(rows, Rows) else checked(rows, Door.of(model, "rows", labels_needed=False))
    out: dict[int, np.ndarray] = {}
    for indices, own, logits in batches_of(model, [rows], task=task, **options):
        values = logits.float().cpu().numpy()  # (batch, classes) or (batch, tokens, classes)
        for i, row, value in zip(indices, own, values, strict=False):
            out[i] = value[: len(row["input_ids"])].copy() if value.ndim == 2 else value
    if options.get("shared"):
        out = distributed.all_joined(out)
    return [out[i] for i in range(len(rows))]


def evaluate(
    model: nn.Module, dataset: Any, *, tokenizer: Any = None, batch_size: int = 64, autocast: Any = None,
    progress: bool = False, shared: bool = False, generate: dict[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """The loss and the metrics that fit the task, over a tokenized dataset with labels.

    For a MultiTaskModel `dataset` is {task: dataset} (or rows with a dict of labels) and the names are "task/metric".
    `loss` is the mean over labeled items, without label smoothing.  See `metrics.compute_metrics` for the rest;
    several numbers a row (regression) have only `mse`.  With shared=True processes that are all given the same share
    the work, and each gets the metrics over all rows.  autocast: a context manager for the forward passes.
    Of a language model: `perplexity`, exp(loss); with a tokenizer `bits_per_byte` of the trained text (UTF-8), which
    compares models of different vocabularies; with generate={"max_new_tokens": 32, ...}, options of `ftlib.generate`,
    answers are made to what stands before each row's last trained tokens and compared with these: `exact_match`, `f1`
    and `valid_json`; of text to text to each source: `bleu`, `chrf`, `rouge1`, `rouge2`, `rougeL`.
    Raises ValueError or TypeError naming the row for labels that do not fit the model.
    """
    parts = rows_for(dataset, model, name="dataset")
    padding = agree(model, tokenizer, batch_size != 1 and sum(map(len, parts)) > 1)
    options = dict(batch_size=batch_size, progress=progress, shared=shared, autocast=autocast and (lambda: autocast))
    found = scores(model, parts, padding=padding, **options)
    record = _record(model)
    if generate is not None and (tokenizer is None or not record.prompt):
        raise ValueError("generate= needs tokenizer=" if record.prompt else "generate= is for language models")
    if record.prompt and tokenizer is not None:
        skipped = 0 if record.encoder_decoder else 1
        predicted = (row["labels"][skipped:] for row in parts[0])
        found["bits_per_byte"] = found["loss"] / math.log(2) * language_modeling.tokens_a_byte(tokenizer, predicted)
    options = {"progress": progress, "autocast": autocast, **(generate or {})}
    return found if generate is None else found | generation.answered(model, parts[0], tokenizer, options)


def scores(
    model: nn.Module, parts: list[Rows], *, loss: Callable | None = None, shared: bool = False, **options: Any
) -> dict[str, float]:
    """`evaluate` on checked rows: a pass in which only decisions and labels are kept.  loss: in place of the task's."""
    tasks = tasks_of(model)
    found: dict[str, dict[int, tuple]] = {task: {} for task in tasks}  # {row: (decision, label)}
    sums: dict[str, list[tuple[float, int]]] = {task: [] for task in tasks}  # (loss, items) of every batch
    tokens = not (record := _record(model)).labeled
    more = record.measures(parts[0][0]) if tokens and record.measures and parts else ()
    sums |= {name: [] for name in more}
    for indices, rows, logits in batches_of(model, parts, shared=shared, **options):
        if indices and tokens:  # the logits are the summed loss, and what is counted beside it
            count = sum(int(record.items(np.asarray(row["labels"]))) for row in rows)
            counts = (count, count, len(rows), len(rows))
            for name, value, n in zip(("", *more), logits.reshape(-1).tolist(), counts, strict=False):
                sums[name].append((value, n))
        for task, (kind, _) in tasks.items() if indices and not tokens else ():
            own = [i for i, row in enumerate(rows) if not task or task in row["labels"]]
            if own:
                labels = [rows[i]["labels"][task] if task else rows[i]["labels"] for i in own]
                values, lengths = logits[task] if task else logits, [len(rows[i]["input_ids"]) for i in own]
                summed, decided = _judged(TASKS[kind], values, labels, lengths, loss)
                sums[task].append(summed)
                found[task] |= zip((indices[i] for i in own), zip(decided, labels, strict=True), strict=True)
    results: dict[str, float] = {}
    for task, (kind, _) in tasks.items():
        pairs, mean = distributed.all_joined(found[task]) if shared else found[task], _mean(sums[task], shared)
        if mean is not None:
            exp = math.exp(mean) if mean < 700 else math.inf
            scored = {"perplexity": exp} if tokens else _scored(TASKS[kind], pairs, names_of(model, task))
            own = {"loss": mean} | scored
            results |= {f"{task}/{name}" if task else name: value for name, value in own.items()}
    if not results and parts:
        raise ValueError(f"every label is {IGNORE} (ignored): nothing to score")
    results |= {name: _mean(sums[name], shared) for name in more}
    if "pair_loss" in more:  # what is trained is their sum
        results["loss"] += results["pair_loss"]
    return results


def _mean(batches: list[tuple[float, int]], shared: bool) -> float | None:
    """Of (sum, items) of batches, by fsum: the same bits whoever computed which; None without items."""
    every = {distributed.rank(): batches}
    every = distributed.all_joined(every) if shared else every
    sums, items = zip((0.0, 0), *(batch for own in every.values() for batch in own), strict=True)
    return math.fsum(sums) / sum(items) if sum(items) else None


def _judged(record: Any, logits: torch.Tensor, labels: list, lengths: list[int], loss: Any) -> tuple[tuple, list]:
    """A batch's summed loss and its items; and the decisions, one a row, trimmed to its tokens."""
    stacked = record.stack(labels, [*lengths, logits.shape[1] if record.a_token else 0])
    values = logits.float().cpu()
    exact = stacked.double() if stacked.is_floating_point() else stacked
    summed = loss(logits.float(), stacked.to(logits.device)) if loss else record.loss(values.double(), exact)
    decided = list(record.decide(values).numpy())
    if record.a_token:
        decided = [d[:n].astype(np.int32) for d, n in zip(decided, lengths, strict=True)]
    return (float(summed), int(record.items(stacked))), decided


def _scored(record: Any, pairs: dict[int, tuple], names: dict[int, str]) -> dict[str, float]:
    ordered = [pairs[i] for i in sorted(pairs)]
    predictions, labels = map(list, zip(*ordered, strict=True))
    if not record.a_token:
        kept = [i for i, label in enumerate(labels) if record.items(np.asarray(label))]
        predictions, labels = np.array([predictions[i] for i in kept]), np.array([labels[i] for i in kept])
    return record.score(predictions, labels, given_names(names))


def labeled(model: nn.Module, parts: list[Rows]) -> dict[str, tuple[str, int]]:
    """The tasks for which a row has a label."""
    found = {}
    for task, (kind, count) in tasks_of(model).items():
        first = sorted(parts, key=lambda rows: rows.door.under != task)  # its own rows, or all are read in vain
        labels = (row["labels"] if not task else row["labels"].get(task) for rows in first for row in rows)
        if any(label is not None and TASKS[kind].items(np.asarray(label)) for label in labels):
            found[task] = kind, count
    return found


def metric_names(model: nn.Module, parts: list[Rows]) -> list[str]:
    """What `scores` will name, by scoring every class against itself; ValueError where there is nothing to score."""
    more = record.measures(parts[0][0]) if (record := _record(model)).measures else ()
    found = [] if record.labeled and not more else ["loss", *(() if record.labeled else ("perplexity",)), *more]
    for task, (kind, count) in labeled(model, parts).items() if not found else ():
        decided = TASKS[kind].decide(torch.eye(count) * 2 - 1).numpy()  # every class once
        decided = [decided] if TASKS[kind].a_token else decided
        names = ["loss", *TASKS[kind].score(decided, decided, given_names(names_of(model, task)))]
        found += [f"{task}/{name}" if task else name for name in names]
    if not found:
        raise ValueError(f"eval_dataset: every label is {IGNORE} (ignored), nothing to score; pass rows with labels")
    return found


def predict(
    model: nn.Module, data: Any, *, tokenizer: Any = None, task: str | None = None, output: str = "labels",
    batch_size: int = 64, max_length: int | None = None, progress: bool = False, shared: bool = False,
    stride: int | None = None, max_answer: int | None = None, no_answer: float | None = None, top_k: int = 5,
) -> Any:  # fmt: skip
    """Predictions for texts, or for a tokenized dataset, in the order given.

    Args:
        data: strings, (text, text_pair) tuples, lists of words; a table with a column `text` (and `text_pair`) or
            `tokens`, of any kind that `tokenize` takes; or a tokenized dataset.
        tokenizer: needed for texts; default: found by the model's name.
        task: which one, for a MultiTaskModel.
        output: "labels": class ids int64 (n,), 0/1 int64 (n, labels), or numbers float32 (n,) or (n, k); "names": the
            names of these; "probabilities": float32 (n, classes); "logits".  Numbers have no names or probabilities:
            there both give the logits.
        shared: processes that are all given the same share the work, and each gets all predictions.

    For tags the result is a list with an entry a text, each with one prediction a word (a string is split at white
    space), of a tokenized dataset one a token.  Words cut off by `max_length` get -100, the name None, or NaN.

    Of a table with `question` and `context` the result is a list of {"answer": str, "start", "end": characters of the
    context, end excluded, both None for no answer, "score", "no_answer_score"}.  Candidates are all stretches of up to
    `max_answer` (30) tokens in all windows (`max_length` 384 tokens, `stride` 128, as in `tokenize`); each counts
    start's plus end's logit, no answer the least such sum of a window's token for none (tasks/answers.py).  "score" is
    the best one's probability, a softmax over all and no answer, which is given where it counts more than `no_answer`
    (0.0) above the best: math.inf asks for an answer always.
    Of tokenized windows "labels" are [start, end], "probabilities" and "logits" float32 (tokens, 2).
    Of texts with masked tokens: for every text a list with an entry a mask, the `top_k` likeliest tokens there,
    [{"token", "text", "score"}, ...], each mask by itself.
    """
    one_of("output", output, OUTPUTS)
    tasks = tasks_of(model)
    if task is None and len(tasks) != 1:
        raise ValueError(f"say which task: task=..., one of {', '.join(tasks)}")
    if (task := next(iter(tasks)) if task is None else task) not in tasks:
        has = "one task; leave task out" if "" in tasks else ", ".join(map(repr, tasks))
        raise ValueError(f"unknown task {task!r}; the model has {has}")
    kind, count = tasks[task]
    if TASKS[kind].draw:
        from .filling import fill

        given = _listed(data, TASKS[kind])
        return fill(model, given, tokenizer or tokenizer_of(model), top_k, max_length, batch_size, progress)
    if not TASKS[kind].labeled:
        raise ValueError("predict is for classes and numbers; a language model goes on: ftlib.generate(model, prompts)")
    record, names = TASKS[kind], names_of(model, task)
    data, read = _listed(data, record), None
    table = record.windows and {*record.forms[-1]} <= {*getattr(data, "column_names", ())}
    given = {"stride": stride, "max_answer": max_answer, "no_answer": no_answer}
    given = {name: value for name, value in given.items() if value is not None}
    refuse(
        (given and not table, f"{', '.join(given)}: only for a table of questions and contexts, to a model for these"),
        (table and output != "labels", f"output={output!r}: to questions there are answers; leave it out"),
    )
    if tokenizer is None and (table or _are_texts(data)):
        tokenizer = tokenizer_of(model)
    if table:
        rows, read = answering.questions(model, data, tokenizer, max_length=max_length, **given)
    else:
        rows = _rows_to_predict(model, data, kind, tokenizer, max_length)
    padding = agree(model, tokenizer, batch_size != 1 and len(rows) > 1) if len(rows) else None
    options = dict(batch_size=batch_size, padding=padding, progress=progress, shared=shared)
    logits = logits_of(model, rows, task=task, **options)
    if read:
        return read(logits)
    if not record.a_token and not record.windows:
        stacked = np.stack(logits) if logits else np.empty((0, count), dtype=np.float32)
        return formed(stacked, output, record, names)
    for i, (values, row) in enumerate(zip(logits, rows, strict=True)):
        if "word_starts" in row:  # texts: one prediction a word
            absent = np.full_like(values[0], np.nan)
            logits[i] = np.stack([absent if k is None else values[k] for k in row["word_starts"]])  # (words, classes)
    return [formed(values, output, record, names) for values in logits]


def _listed(data: Any, record: Any) -> Any:
    """A list of texts or of rows, or a Dataset of rows, out of whatever holds them."""
    table = isinstance(data, (os.PathLike, Mapping)) or hasattr(data, "column_names") or hasattr(data, "columns")
    table = table or (isinstance(data, str) and data.endswith(SUFFIXES))
    if is_stream(data) or not table:
        data = listed(data)
        if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
            remedy = "pass a list of texts, even for one: [text], or what ftlib.tokenize takes or gives"
            raise TypeError(f"data is a {type(data).__name__}; {remedy}")
        data = list(data)
        table = bool(data and isinstance(data[0], Mapping) and data[0] and "input_ids" not in data[0])
    data = as_dataset(data) if table else data
    names = data.column_names if table else {}  # of a DatasetDict a dict
    columns = [name for name in ("tokens", "text") if name in names][:: 1 if record.a_token else -1]
    if "input_ids" in names or isinstance(names, dict) or not columns or record.windows:
        return data
    pairs = columns[0] == "text" and "text_pair" in names
    return list(zip(data["text"], data["text_pair"], strict=True)) if pairs else list(data[columns[0]])


def _are_texts(data: Any) -> bool:
    return isinstance(data, list) and bool(data) and not isinstance(data[0], Mapping)


def _rows_to_predict(model: nn.Module, data: Any, kind: str, tokenizer: Any, max_length: int | None) -> Any:
    """The checked rows of what `_listed` gives."""
    record = TASKS[kind]
    if _are_texts(data):
        if record.columns or record.windows:
            need = f"a dataset from tokenize(..., task=...), which reads {', '.join(record.columns)} beside the text"
            need = f"a table with {' and '.join(record.forms[-1])}" if record.windows else need
            raise TypeError(f"data holds texts alone; pass {need}")
        if record.vectors and isinstance(data[0], tuple):
            raise TypeError("data holds pairs, but each text is a vector: pass texts, or pairs as rows from tokenize")
        if record.a_token:  # an empty string stays one, for encode_texts to refuse
            data = [text.split() or text if isinstance(text, str) else text for text in data]
        data = encode_texts(data, tokenizer, max_length=token_limit(max_length, tokenizer, model.config))
    return checked(data, Door.of(model, "data", labels_needed=False)) if len(data) else []
