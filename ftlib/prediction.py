"""Run a trained model: logits, predictions, metrics.

Rows are sorted by length, so that padding stays low, and results come back in the order given.
To copy this module you need: prediction.py, batching.py, losses.py, torch (metrics.py for `evaluate`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ftlib import losses
from ftlib.batching import IGNORE, checked_rows, collate, encode_texts, split_by_size, to_device, to_rows

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
    limits = {"vocab_size": getattr(config, "vocab_size", None), "max_positions": max_positions(config)}
    if isinstance(dataset, dict) and not hasattr(dataset, "column_names"):
        return [row for part in parts_for(dataset, model, name=name).values() for row in part]
    return checked_rows(to_rows(dataset, name), tasks, name=name, labels_needed=labels_needed, **limits)


def parts_for(dataset: Any, model: nn.Module, *, name: str) -> dict[str, list[dict]]:
    """{name: checked rows} from {name: dataset}; plain labels under a task's name become {task: label}."""
    if not isinstance(dataset, dict) or hasattr(dataset, "column_names"):
        return {"": rows_for(dataset, model, name=name)}
    if not dataset:
        raise ValueError(f"{name} is empty; pass {{task name: dataset}}")
    tasks = tasks_of(model)
    parts = {}
    for key, part in dataset.items():
        rows = to_rows(part, f"{name}[{key!r}]")
        if not all(isinstance(row.get("labels"), dict) for row in rows):
            if key not in tasks:
                raise ValueError(f"{name}[{key!r}]: unknown task; the model has {', '.join(map(repr, tasks))}")
            rows = [{**row, "labels": {key: row["labels"]}} if row.get("labels") is not None else row for row in rows]
        parts[key] = rows_for(rows, model, name=f"{name}[{key!r}]")
    return parts


def max_positions(config: Any) -> int | None:
    """Longest row the model takes, in tokens; RoBERTa's position numbers start after the padding id."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        return limit - config.pad_token_id - 1
    return limit


@torch.no_grad()
def logits_of(
    model: nn.Module,
    rows: list[dict],
    *,
    task: str = "",
    batch_size: int = 64,
    pad_token_id: int | None = None,
    autocast: Any = None,
    progress: bool = False,
) -> list[np.ndarray]:
    """The logits of every row, float32, in order; for tags (tokens, classes), else (classes,).

    The model's train or eval mode is as before afterwards.
    """
    from contextlib import nullcontext

    pad = pad_token_id if pad_token_id is not None else getattr(model.config, "pad_token_id", None) or 0
    lengths = [len(row["input_ids"]) for row in rows]
    device = next(model.parameters()).device
    per_token = tasks_of(model)[task][0] == "token-classification"
    plan = split_by_size(range(len(rows)), lengths, batch_size=batch_size)
    if progress:
        from tqdm.auto import tqdm

        plan = tqdm(plan, desc="predict", unit="batch", leave=False)
    out: list[Any] = [None] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for indices in plan:
            inputs = [{k: v for k, v in rows[i].items() if k in ("input_ids", "token_type_ids")} for i in indices]
            batch = to_device(collate(inputs, pad_token_id=pad), device)
            with autocast or nullcontext():
                output = model(**batch, task=task) if task else model(**batch).logits
            values = output.float().cpu().numpy()  # (batch, classes) or (batch, tokens, classes)
            for place, i in enumerate(indices):
                out[i] = values[place, : lengths[i]] if per_token else values[place]
    finally:
        model.train(was_training)
    return out


def evaluate(
    model: nn.Module, dataset: Any, *, tokenizer: Any = None, batch_size: int = 64, autocast: Any = None,
    progress: bool = False,
) -> dict[str, float]:  # fmt: skip
    """The loss and the metrics that fit the task, over a tokenized dataset with labels.

    For a MultiTaskModel `dataset` is {task: dataset} (or rows with a dict of labels) and the names are "task/metric".
    `loss` is the mean over labelled items, without label smoothing.  See `metrics.compute_metrics` for the rest.
    Raises ValueError or TypeError naming the row for labels that do not fit the model.
    """
    from ftlib.metrics import compute_metrics

    rows = rows_for(dataset, model, name="dataset")
    pad = getattr(tokenizer, "pad_token_id", None)
    results: dict[str, float] = {}
    for task, (kind, _) in tasks_of(model).items():
        own = [({**row, "labels": row["labels"][task]} if task else row) for row in rows if not task or task in row["labels"]]
        if not own:
            continue
        logits = logits_of(model, own, task=task, batch_size=batch_size, pad_token_id=pad, autocast=autocast, progress=progress)
        labels = [row["labels"] for row in own]
        prefix = f"{task}/" if task else ""
        results[prefix + "loss"] = _mean_loss(kind, logits, labels)
        predictions = [_decide(kind, values) for values in logits]
        if kind != "token-classification":
            kept = [i for i, label in enumerate(labels) if label != IGNORE]
            predictions, labels = np.array([predictions[i] for i in kept]), np.array([labels[i] for i in kept])
        names = _label_names(model, task)
        for key, value in compute_metrics(kind, predictions, labels, label_names=names).items():
            results[prefix + key] = value
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


def _label_names(model: nn.Module, task: str) -> list[str] | None:
    config = model.heads[task].config if task else model.config
    names = [config.id2label[i] for i in sorted(config.id2label)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def predict(
    model: nn.Module,
    data: Sequence[Any] | Any,
    *,
    tokenizer: Any = None,
    task: str | None = None,
    output: str = "labels",
    batch_size: int = 64,
    max_length: int | None = None,
    progress: bool = False,
) -> Any:
    """Predictions for texts, or for a tokenized dataset, in the order given.

    Args:
        data: strings, (text, text_pair) tuples, lists of words; or a tokenized dataset.  For tags a string is split at
            white space, and there is one prediction a word (-100 for words cut off by `max_length`).
        tokenizer: needed for texts; default: found by the model's name.
        task: which one, for a MultiTaskModel.
        output: "labels": class ids int64 (n,), 0/1 int64 (n, labels), or numbers float32 (n,); "names": the names of
            these; "probabilities": float32 (n, classes); "logits".  For tags a list with one entry per text.
    """
    if output not in OUTPUTS:
        raise ValueError(f"unknown output {output!r}; choose one of {', '.join(OUTPUTS)}")
    tasks = tasks_of(model)
    if task is None:
        if list(tasks) != [""] and len(tasks) != 1:
            raise ValueError(f"say which task: task=..., one of {', '.join(tasks)}")
        task = next(iter(tasks))
    elif task not in tasks:
        raise ValueError(f"unknown task {task!r}; the model has {', '.join(map(repr, tasks))}")
    kind = tasks[task][0]
    if hasattr(data, "column_names") or (len(data) and isinstance(data[0], dict)):
        rows = to_rows(data)
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
        rows = rows_for(rows, model, name="data", labels_needed=False)
    else:
        if tokenizer is None:
            from ftlib.pretrained import load_tokenizer

            tokenizer = load_tokenizer(model.config._name_or_path)
        texts = list(data)
        if kind == "token-classification":
            texts = [text.split() if isinstance(text, str) else text for text in texts]
        limit = min(filter(None, (max_length, max_positions(model.config))), default=None)
        rows = encode_texts(texts, tokenizer, max_length=limit)
    pad = getattr(tokenizer, "pad_token_id", None)
    logits = logits_of(model, rows, task=task, batch_size=batch_size, pad_token_id=pad, progress=progress)
    if kind == "token-classification":
        return [_token_output(values, row, output, model, task) for values, row in zip(logits, rows, strict=True)]
    stacked = np.stack(logits) if logits else np.empty((0, tasks[task][1]), dtype=np.float32)
    if output == "logits" or (kind == "regression" and output != "labels"):
        return stacked
    if output == "probabilities":
        scores = torch.from_numpy(stacked)
        return (scores.sigmoid() if kind == "multi-label-classification" else scores.softmax(-1)).numpy()
    decided = [_decide(kind, values) for values in logits]
    if output == "labels":
        return np.array(decided)
    names = model.heads[task].config.id2label if task else model.config.id2label
    if kind == "multi-label-classification":
        return [[names[i] for i in np.flatnonzero(values)] for values in decided]
    return [names[int(value)] for value in decided]


def _token_output(values: np.ndarray, row: dict, output: str, model: nn.Module, task: str) -> Any:
    if output == "logits":
        return values
    if output == "probabilities":
        return torch.from_numpy(values).softmax(-1).numpy()
    ids = values.argmax(-1)  # (tokens,)
    if "word_starts" in row:  # texts: one label per word
        ids = np.array([ids[place] if place is not None else IGNORE for place in row["word_starts"]], dtype=np.int64)
    if output == "labels":
        return ids
    names = model.heads[task].config.id2label if task else model.config.id2label
    return [names[int(i)] if i != IGNORE else None for i in ids]
