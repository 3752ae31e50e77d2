"""Run a trained model: logits, predictions, metrics.

Rows are sorted by length, so that padding stays low, and results come back in the order given.
To copy this module you need: prediction.py, speedups.py, rows.py, batching.py, losses.py, distributed.py and torch
(metrics.py with scikit-learn, and seqeval for tags, for `evaluate`).
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ..inputs.rows import IGNORE, checked_rows, max_positions, to_rows, token_limit
from ..inputs.tokenizing import collate, encode_texts, evaluating, split_by_size, to_device
from ..methods import losses
from ..methods.speedups import shortcuts
from . import distributed

OUTPUTS = ("labels", "names", "probabilities", "logits")


def tasks_of(model: nn.Module) -> dict[str, tuple[str, int]]:
    """{task name: (kind, number of labels)}; the name is "" for a stock model with one task.

    Raises ValueError for a model without a task head that ftlib knows.
    """
    if hasattr(model, "tasks"):  # MultiTaskModel
        return model.tasks
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    count = getattr(getattr(model, "config", None), "num_labels", 0)
    if kind.endswith("ForTokenClassification"):
        return {"": ("token-classification", count)}
    if kind.endswith("ForSequenceClassification"):
        problem = getattr(model.config, "problem_type", None)
        if problem == "regression" or (problem is None and count == 1):
            return {"": ("regression", count)}
        many = problem == "multi_label_classification"
        return {"": ("multi-label-classification" if many else "sequence-classification", count)}
    raise ValueError(
        f"{kind} has no classification head; load the model with task=..., e.g. "
        "ftlib.load_model(name, task='sequence-classification', num_labels=2)"
    )


def rows_for(dataset: Any, model: nn.Module, *, name: str, labels_needed: bool = True) -> list[dict]:
    """Checked rows from a dataset, or from {task or mixture name: dataset} for a MultiTaskModel."""
    tasks = tasks_of(model)
    config = model.config
    limits = {
        "vocab_size": getattr(config, "vocab_size", None), "max_positions": max_positions(config),
        "type_vocab_size": getattr(config, "type_vocab_size", None) or None,
    }  # fmt: skip
    if isinstance(dataset, dict) and not hasattr(dataset, "column_names"):
        return [row for part in parts_for(dataset, model, name=name).values() for row in part]
    return checked_rows(to_rows(dataset, name), tasks, name=name, labels_needed=labels_needed, **limits)


def parts_for(dataset: Any, model: nn.Module, *, name: str) -> dict[str, list[dict]]:
    """{name: checked rows} from {name: dataset}; plain labels under a task's name become {task: label}."""
    tasks = tasks_of(model)
    if not isinstance(dataset, dict) or hasattr(dataset, "column_names"):
        return {"": rows_for(dataset, model, name=name)}
    if not dataset:
        raise ValueError(f"{name} is empty; pass {{task name: dataset}}")
    if "" in tasks:
        raise ValueError(f"{name} has {', '.join(map(repr, dataset))}, but the model has one task; pass one dataset")
    parts = {}
    for key, part in dataset.items():
        rows = to_rows(part, f"{name}[{key!r}]")
        if not all(isinstance(row.get("labels"), dict) for row in rows):
            if key not in tasks:
                raise ValueError(f"{name}[{key!r}]: unknown task; the model has {', '.join(map(repr, tasks))}")
            rows = [{**row, "labels": {key: row["labels"]}} if row.get("labels") is not None else row for row in rows]
        parts[key] = rows_for(rows, model, name=f"{name}[{key!r}]")
    return parts


def logits_of(
    model: nn.Module,
    rows: list[dict],
    *,
    task: str = "",
    batch_size: int = 64,
    pad_token_id: int | None = None,
    autocast: Any = None,
    progress: bool = False,
    shared: bool = False,
) -> list[np.ndarray]:
    """The logits of every row, float32, in order; for tags (tokens, classes), else (classes,).

    shared: several processes were all given these rows; each computes a part of the batches, all get every row.
    Every module's train or eval mode is as before afterwards.
    """
    pad = pad_token_id if pad_token_id is not None else getattr(model.config, "pad_token_id", None) or 0
    lengths = [len(row["input_ids"]) for row in rows]
    device = next(model.parameters()).device
    per_token = tasks_of(model)[task][0] == "token-classification"
    batches = split_by_size(range(len(rows)), lengths, batch_size=batch_size)
    world = distributed.world_size() if shared and rows else 1
    plan: Any = [(batch, 1.0) for batch in batches]
    if world > 1:
        plan = distributed.evened([batches[i::world] for i in range(world)])
    if progress:
        from tqdm.auto import tqdm

        plan = tqdm(plan, desc="predict", unit="batch", leave=False)
    out: list[Any] = [None] * len(rows)
    with evaluating(model), shortcuts(model):
        for indices, counts in plan:
            inputs = [{k: v for k, v in rows[i].items() if k in ("input_ids", "token_type_ids")} for i in indices]
            batch = to_device(collate(inputs, pad_token_id=pad), device)
            with autocast or nullcontext():
                output = model(**batch, task=task) if task else model(**batch).logits
            values = output.float().cpu().numpy()  # (batch, classes) or (batch, tokens, classes)
            for place, i in enumerate(indices if counts else []):
                out[i] = values[place, : lengths[i]] if per_token else values[place]
    if world > 1:
        classes = values.shape[-1]
        sizes = [length * classes if per_token else classes for length in lengths]
        flat = torch.zeros(sum(sizes))  # every row in the one process that computed it, zeros in the others
        for piece, own in zip(flat.split(sizes), out, strict=True):
            if own is not None:
                piece.copy_(torch.from_numpy(own).flatten())
        flat = distributed.all_sum(flat.to(device)).cpu()
        out = [piece.view(-1, classes).numpy() if per_token else piece.numpy() for piece in flat.split(sizes)]
    return out


def evaluate(
    model: nn.Module, dataset: Any, *, tokenizer: Any = None, batch_size: int = 64, autocast: Any = None,
    progress: bool = False, shared: bool = False,
) -> dict[str, float]:  # fmt: skip
    """The loss and the metrics that fit the task, over a tokenized dataset with labels.

    For a MultiTaskModel `dataset` is {task: dataset} (or rows with a dict of labels) and the names are "task/metric".
    `loss` is the mean over labelled items, without label smoothing.  See `metrics.compute_metrics` for the rest;
    several numbers a row (regression) have only `mse`.  Under torchrun every process evaluates what it is given; with
    shared=True, where all are given the same, they share the work, and each gets the metrics over all rows.
    Raises ValueError or TypeError naming the row for labels that do not fit the model.
    """
    from ..tasks.metrics import compute_metrics, mse

    rows = rows_for(dataset, model, name="dataset")
    options = dict(batch_size=batch_size, autocast=autocast, progress=progress, shared=shared)
    options["pad_token_id"] = getattr(tokenizer, "pad_token_id", None)
    results: dict[str, float] = {}
    for task, (kind, count) in tasks_of(model).items():
        own = rows
        if task:
            own = [{**row, "labels": row["labels"][task]} for row in rows if task in row["labels"]]
        if not own:
            continue
        logits = logits_of(model, own, task=task, **options)
        labels = [row["labels"] for row in own]
        prefix = f"{task}/" if task else ""
        results[prefix + "loss"] = _mean_loss(kind, logits, labels)
        predictions = [_decide(kind, values) for values in logits]
        if kind != "token-classification":
            kept = [i for i, label in enumerate(labels) if kind == "regression" or label != IGNORE]
            if not kept:
                raise ValueError(f"every label is {IGNORE} (ignored): nothing to score")
            predictions, labels = np.array([predictions[i] for i in kept]), np.array([labels[i] for i in kept])
        if kind == "regression" and count > 1:
            found = {"mse": mse(predictions, labels)}
        else:
            found = compute_metrics(kind, predictions, labels, label_names=_label_names(model, task))
        results |= {prefix + key: value for key, value in found.items()}
    return results


def _mean_loss(kind: str, logits: list[np.ndarray], labels: list[Any]) -> float:
    per_token = kind == "token-classification"
    stacked = torch.from_numpy(np.concatenate(logits) if per_token else np.stack(logits)).double()
    flat = torch.tensor([x for row in labels for x in row] if per_token else labels)
    if flat.is_floating_point():
        flat = flat.double()
    count = int(losses.count_labelled(flat, kind))
    return float(losses.task_loss(kind)(stacked, flat)) / max(count, 1)


def _decide(kind: str, logits: np.ndarray) -> Any:
    """From logits to a decision: class id, 0/1 per label, or the number itself."""
    if kind == "regression":
        return logits[0] if logits.shape == (1,) else logits
    if kind == "multi-label-classification":
        return (logits > 0).astype(np.int64)  # probability above one half
    return logits.argmax(axis=-1)


def _names(model: nn.Module, task: str) -> dict[int, str]:
    return model.heads[task].config.id2label if task else model.config.id2label


def _label_names(model: nn.Module, task: str) -> list[str] | None:
    names = [name for _, name in sorted(_names(model, task).items())]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def predict(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    task: str | None = None,
    output: str = "labels",
    batch_size: int = 64,
    max_length: int | None = None,
    progress: bool = False,
    shared: bool = False,
) -> Any:
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
    if output not in OUTPUTS:
        raise ValueError(f"unknown output {output!r}; choose one of {', '.join(OUTPUTS)}")
    tasks = tasks_of(model)
    if task is None:
        if len(tasks) != 1:
            raise ValueError(f"say which task: task=..., one of {', '.join(tasks)}")
        task = next(iter(tasks))
    elif task not in tasks:
        has = "one task; leave task out" if "" in tasks else ", ".join(map(repr, tasks))
        raise ValueError(f"unknown task {task!r}; the model has {has}")
    kind, count = tasks[task]
    rows = _rows_to_predict(model, data, kind, tokenizer, max_length)
    pad = getattr(tokenizer, "pad_token_id", None)
    options = dict(batch_size=batch_size, pad_token_id=pad, progress=progress, shared=shared)
    logits = logits_of(model, rows, task=task, **options)
    if kind == "token-classification":
        names = _names(model, task)
        return [_token_output(values, row, output, names) for values, row in zip(logits, rows, strict=True)]
    stacked = np.stack(logits) if logits else np.empty((0, count), dtype=np.float32)
    if output == "logits" or (kind == "regression" and output != "labels"):
        return stacked
    if output == "probabilities":
        scores = torch.from_numpy(stacked)
        return (scores.sigmoid() if kind == "multi-label-classification" else scores.softmax(-1)).numpy()
    if kind == "regression":
        return stacked[:, 0] if count == 1 else stacked
    decided = _decide(kind, stacked)  # (n,) or (n, labels)
    if output == "labels":
        return decided
    names = _names(model, task)
    if kind == "multi-label-classification":
        return [[names[int(i)] for i in np.flatnonzero(values)] for values in decided]
    return [names[int(value)] for value in decided]


def _rows_to_predict(model: nn.Module, data: Any, kind: str, tokenizer: Any, max_length: int | None) -> list[dict]:
    if isinstance(data, (str, bytes, dict)) and not hasattr(data, "column_names"):
        raise TypeError(f"data is a {type(data).__name__}; pass a list of texts, even for one: [text]")
    if not hasattr(data, "column_names"):
        if not isinstance(data, Iterable):
            raise TypeError(f"data is a {type(data).__name__}; pass a list of texts or a tokenized dataset")
        data = list(data)
        if not (data and isinstance(data[0], dict)):
            return _encoded(model, data, kind, tokenizer, max_length)
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in to_rows(data, "data")]
    return rows_for(rows, model, name="data", labels_needed=False)


def _encoded(model: nn.Module, texts: list, kind: str, tokenizer: Any, max_length: int | None) -> list[dict]:
    if tokenizer is None:
        from ..inputs.pretrained import load_tokenizer

        if not getattr(model.config, "_name_or_path", None):
            raise ValueError("the model was not loaded by name, so its tokenizer is unknown; pass tokenizer=...")
        tokenizer = load_tokenizer(model.config._name_or_path)
    if kind == "token-classification":  # an empty string stays one, for encode_texts to refuse
        texts = [text.split() or text if isinstance(text, str) else text for text in texts]
    return encode_texts(texts, tokenizer, max_length=token_limit(max_length, tokenizer, model.config))


def _token_output(values: np.ndarray, row: dict, output: str, names: dict[int, str]) -> Any:
    if "word_starts" in row:  # texts: one prediction a word
        starts = row["word_starts"]
        absent = np.full_like(values[0], np.nan)
        values = np.stack([values[place] if place is not None else absent for place in starts])  # (words, classes)
    if output == "logits":
        return values
    if output == "probabilities":
        return torch.from_numpy(values).softmax(-1).numpy()
    ids = np.where(np.isnan(values).all(-1), IGNORE, values.argmax(-1))  # (words,) or (tokens,)
    if output == "labels":
        return ids
    return [names[int(i)] if i != IGNORE else None for i in ids]
