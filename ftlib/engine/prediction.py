"""Run a trained model: logits, predictions, metrics.

Rows are sorted by length, so that padding stays low, and results come back in the order given.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core import anatomy
from ..core.batches import IGNORE, collate, one_of, split_by_size, to_device
from ..inputs.rows import Door as _Door
from ..inputs.rows import Rows, checked, is_stream, rows_for, take, token_limit
from ..inputs.tokenizing import encode_texts
from ..methods.speedups import shortcuts
from ..tasks.task import TASKS, given_names, names_of, tasks_of
from . import distributed

OUTPUTS = ("labels", "names", "probabilities", "logits")


def batches_of(
    model: nn.Module, parts: list[Rows], *, task: str = "", batch_size: int = 64, pad_token_id: int | None = None,
    autocast: Callable | None = None, progress: bool = False, shared: bool = False,
) -> Iterator[tuple[list[int], list[dict], Any]]:  # fmt: skip
    """(numbers of the rows, the rows, their logits: a tensor, or {task: tensor}), a batch each, longest rows first.

    shared: several processes were all given these rows; each computes a part of the batches; what another computes
    comes too where there are too few, without numbers.  Every module's train or eval mode is as before afterwards.
    """
    pad = anatomy.pad_id(None, model.config) if pad_token_id is None else pad_token_id
    places = [(part, i) for part, rows in enumerate(parts) for i in range(len(rows))]
    lengths = np.concatenate([rows.lengths for rows in parts]) if places else []
    device = next(model.parameters()).device
    batches = split_by_size(range(len(places)), lengths, batch_size=batch_size)
    world = distributed.world_size() if shared and places else 1
    plan: Any = [(batch, 1.0) for batch in batches]
    if world > 1:
        plan = distributed.evened([batches[i::world] for i in range(world)])
    if progress:
        from tqdm.auto import tqdm

        plan = tqdm(plan, desc="predict", unit="batch", leave=False)
    several = hasattr(model, "tasks") and not task
    stack = {name: TASKS[kind].stack for name, (kind, _) in model.tasks.items()} if several else {}
    numbered, named = dict(enumerate(parts)), {"task": task} if task else {}
    with anatomy.evaluating(model), shortcuts(model):
        for indices, counts in plan:
            rows = take(numbered, [places[i] for i in indices])
            plain = rows if several else [{k: v for k, v in row.items() if k != "labels"} for row in rows]
            batch = collate(plain, pad_token_id=pad, stack=stack)
            batch.pop("labels", None)
            with (autocast or nullcontext)():
                output = model(**to_device(batch, device), **named)
            yield (indices if counts else []), rows, (output if several or task else output.logits)


def logits_of(model: nn.Module, rows: Rows | list, *, task: str = "", **options: Any) -> list[np.ndarray]:
    """The logits of every row, float32, in order; for tags (tokens, classes), else (classes,).

    options: those of `batches_of`.  With shared=True every process gets all of them.
    """
    if not len(rows):
        return []
    rows = rows if isinstance(rows, Rows) else checked(rows, _Door.of(model, "rows", labels_needed=False))
    a_token = TASKS[tasks_of(model)[task][0]].a_token
    out: dict[int, np.ndarray] = {}
    for indices, own, logits in batches_of(model, [rows], task=task, **options):
        values = logits.float().cpu().numpy()  # (batch, classes) or (batch, tokens, classes)
        for i, row, value in zip(indices, own, values, strict=False):
            out[i] = value[: len(row["input_ids"])].copy() if a_token else value
    if options.get("shared"):
        out = distributed.all_joined(out)
    return [out[i] for i in range(len(rows))]


def evaluate(
    model: nn.Module, dataset: Any, *, tokenizer: Any = None, batch_size: int = 64, autocast: Any = None,
    progress: bool = False, shared: bool = False,
) -> dict[str, float]:  # fmt: skip
    """The loss and the metrics that fit the task, over a tokenized dataset with labels.

    For a MultiTaskModel `dataset` is {task: dataset} (or rows with a dict of labels) and the names are "task/metric".
    `loss` is the mean over labelled items, without label smoothing.  See `metrics.compute_metrics` for the rest;
    several numbers a row (regression) have only `mse`.  Under torchrun every process evaluates what it is given; with
    shared=True, where all are given the same, they share the work, and each gets the metrics over all rows.
    autocast: a context manager for the forward passes.
    Raises ValueError or TypeError naming the row for labels that do not fit the model.
    """
    parts = rows_for(dataset, model, name="dataset")
    options = dict(batch_size=batch_size, progress=progress, shared=shared, autocast=autocast and (lambda: autocast))
    return scores(model, parts, pad_token_id=getattr(tokenizer, "pad_token_id", None), **options)


def scores(
    model: nn.Module, parts: list[Rows], *, loss: Callable | None = None, shared: bool = False, **options: Any
) -> dict[str, float]:
    """`evaluate` on checked rows: a pass in which only decisions and labels are kept.  loss: in place of the task's."""
    tasks = tasks_of(model)
    found: dict[str, dict[int, tuple]] = {task: {} for task in tasks}  # {row: (decision, label)}
    sums: dict[str, list[tuple[float, int]]] = {task: [] for task in tasks}  # (loss, items) of every batch
    for indices, rows, logits in batches_of(model, parts, shared=shared, **options):
        for task, (kind, _) in tasks.items() if indices else ():
            own = [i for i, row in enumerate(rows) if not task or task in row["labels"]]
            if own:
                labels = [rows[i]["labels"][task] if task else rows[i]["labels"] for i in own]
                values, lengths = logits[task] if task else logits, [len(rows[i]["input_ids"]) for i in own]
                summed, decided = _judged(TASKS[kind], values, labels, lengths, loss)
                sums[task].append(summed)
                found[task] |= zip((indices[i] for i in own), zip(decided, labels, strict=True), strict=True)
    results: dict[str, float] = {}
    for task, (kind, _) in tasks.items():
        pairs, every = found[task], {distributed.rank(): sums[task]}
        if shared:
            pairs, every = distributed.all_joined(pairs), distributed.all_joined(every)
        if pairs:
            losses, items = zip(*(batch for batches in every.values() for batch in batches), strict=True)
            # fsum: the same bits whoever computed which batch
            own = {"loss": math.fsum(losses) / max(sum(items), 1)} | _scored(TASKS[kind], pairs, names_of(model, task))
            results |= {f"{task}/{name}" if task else name: value for name, value in own.items()}
    return results


def _judged(record: Any, logits: torch.Tensor, labels: list, lengths: list[int], loss: Any) -> tuple[tuple, list]:
    """A batch's summed loss and its items; and the decisions, one a row, trimmed to its tokens."""
    stacked = record.stack(labels, [*lengths, logits.shape[1] if record.a_token else 0])
    values = logits.float().cpu()
    if loss is None:
        exact = stacked.double() if stacked.is_floating_point() else stacked
        summed = record.loss(values.double(), exact)
    else:
        summed = loss(logits, stacked.to(logits.device))
    decided = list(record.decide(values).numpy())
    if record.a_token:
        decided = [d[:n].astype(np.int32) for d, n in zip(decided, lengths, strict=True)]
    return (float(summed), int(record.items(stacked))), decided


def _scored(record: Any, pairs: dict[int, tuple], names: dict[int, str]) -> dict[str, float]:
    ordered = [pairs[i] for i in sorted(pairs)]
    predictions, labels = map(list, zip(*ordered, strict=True))
    if not record.a_token:
        kept = [i for i, label in enumerate(labels) if record.items(np.asarray(label))]
        if not kept:
            raise ValueError(f"every label is {IGNORE} (ignored): nothing to score")
        predictions, labels = np.array([predictions[i] for i in kept]), np.array([labels[i] for i in kept])
    return record.score(predictions, labels, given_names(names))


def metric_names(model: nn.Module, parts: list[Rows]) -> list[str]:
    """What `scores` will name, without a forward pass: every class is scored against itself once.

    Raises ValueError where no row has a label to score, and for names of labels that can't be scored.
    """
    found = []
    for task, (kind, count) in tasks_of(model).items():
        record = TASKS[kind]
        labels = (row["labels"] if not task else row["labels"].get(task) for rows in parts for row in rows)
        if any(label is not None and record.items(np.asarray(label)) for label in labels):
            decided = record.decide(torch.eye(count) * 2 - 1).numpy()  # every class once
            decided = [decided] if record.a_token else decided
            names = ["loss", *record.score(decided, decided, given_names(names_of(model, task)))]
            found += [f"{task}/{name}" if task else name for name in names]
    if not found:
        raise ValueError(f"eval_dataset: every label is {IGNORE} (ignored), nothing to score; pass rows with labels")
    return found


def predict(
    model: nn.Module, data: Any, *, tokenizer: Any = None, task: str | None = None, output: str = "labels",
    batch_size: int = 64, max_length: int | None = None, progress: bool = False, shared: bool = False,
) -> Any:  # fmt: skip
    """Predictions for texts, or for a tokenized dataset, in the order given.

    Args:
        data: strings, (text, text_pair) tuples, lists of words; or a tokenized dataset.
        tokenizer: needed for texts; default: found by the model's name.
        task: which one, for a MultiTaskModel.
        output: "labels": class ids int64 (n,), 0/1 int64 (n, labels), or numbers float32 (n,) or (n, k); "names": the
            names of these; "probabilities": float32 (n, classes); "logits".  Numbers have no names or probabilities:
            there both give the logits.
        shared: under torchrun every process predicts what it is given; with True, where all are given the same, they
            share the work, and each gets all predictions.

    For tags the result is a list with an entry a text, each with one prediction a word: a string is split at white
    space.  Words cut off by `max_length` get -100, the name None, or probabilities and logits of NaN.  A tokenized
    dataset gives one prediction a token.
    """
    one_of("output", output, OUTPUTS)
    tasks = tasks_of(model)
    if task is None and len(tasks) != 1:
        raise ValueError(f"say which task: task=..., one of {', '.join(tasks)}")
    if (task := next(iter(tasks)) if task is None else task) not in tasks:
        has = "one task; leave task out" if "" in tasks else ", ".join(map(repr, tasks))
        raise ValueError(f"unknown task {task!r}; the model has {has}")
    kind, count = tasks[task]
    record, names = TASKS[kind], names_of(model, task)
    rows = _rows_to_predict(model, data, record, tokenizer, max_length)
    pad = getattr(tokenizer, "pad_token_id", None)
    options = dict(batch_size=batch_size, pad_token_id=pad, progress=progress, shared=shared)
    logits = logits_of(model, rows, task=task, **options)
    if record.a_token:
        return [_of_tokens(values, rows[i], output, record, names) for i, values in enumerate(logits)]
    stacked = np.stack(logits) if logits else np.empty((0, count), dtype=np.float32)
    if output == "logits" or (record.probabilities is None and output != "labels"):
        return stacked
    if output == "probabilities":
        return record.probabilities(torch.from_numpy(stacked)).numpy()
    decided = record.decide(torch.from_numpy(stacked)).numpy()  # (n,) or (n, labels)
    return decided if output == "labels" else record.named(decided, names)


def _rows_to_predict(model: nn.Module, data: Any, record: Any, tokenizer: Any, max_length: int | None) -> Any:
    if hasattr(data, "column_names") and not is_stream(data):
        data = data.remove_columns([name for name in data.column_names if name == "labels"])
    elif isinstance(data, (str, bytes, dict)) or not isinstance(data, Iterable):
        remedy = "pass a list of texts, even for one: [text], or a tokenized dataset"
        raise TypeError(f"data is a {type(data).__name__}; {remedy}")
    else:
        if not (data := list(data)):
            return []
        if not isinstance(data[0], dict):
            data = _encoded(model, data, record, tokenizer, max_length)
        data = [{k: v for k, v in row.items() if k != "labels"} if isinstance(row, dict) else row for row in data]
    return checked(data, _Door.of(model, "data", labels_needed=False))


def _encoded(model: nn.Module, texts: list, record: Any, tokenizer: Any, max_length: int | None) -> list[dict]:
    if tokenizer is None:
        from ..inputs.pretrained import load_tokenizer

        if not (name := getattr(model.config, "_name_or_path", None)):
            raise ValueError("the model was not loaded by name, so its tokenizer is unknown; pass tokenizer=...")
        tokenizer = load_tokenizer(name)
    if record.columns:
        need = f"a dataset from tokenize(..., task=...), which reads {', '.join(record.columns)} beside the text"
        raise TypeError(f"data holds texts alone; pass {need}")
    if record.a_token:  # an empty string stays one, for encode_texts to refuse
        texts = [text.split() or text if isinstance(text, str) else text for text in texts]
    return encode_texts(texts, tokenizer, max_length=token_limit(max_length, tokenizer, model.config))


def _of_tokens(values: np.ndarray, row: dict, output: str, record: Any, names: dict[int, str]) -> Any:
    if "word_starts" in row:  # texts: one prediction a word
        absent = np.full_like(values[0], np.nan)
        values = np.stack([absent if i is None else values[i] for i in row["word_starts"]])  # (words, classes)
    if output == "logits":
        return values
    scored = torch.from_numpy(values)
    if output == "probabilities":
        return record.probabilities(scored).numpy()
    ids = np.where(np.isnan(values).all(-1), IGNORE, record.decide(scored).numpy())  # (words,) or (tokens,)
    return ids if output == "labels" else record.named(ids, names)
