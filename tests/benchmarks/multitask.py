"""Results of notebooks 05 and 05b: several tasks on one encoder against one each, balancing methods, transfer.

    python tests/benchmarks/multitask.py    # writes results/multitask.json; resumes; two trainings at a time

Every way to train has its own learning rate, searched with a seed of its own by the mean validation score of its
tasks until the best is inside; then five seeds, tested on up to 1,000 rows of the corpora's own test splits.  Parts:
- atis: intent and slots of all training sentences, one encoder each or one for both; as many updates for all.
- transfer: three tasks of 300 rows, batches of 16.  Alone; every two together, for twice the updates, so that a task
  makes as many passes over its rows with a partner as alone; and two controls, alone for as many updates as a pair: on
  half batches (what a task gets in a pair) and on whole ones (as many rows as the pair).
- balancing: 300 rows of each of the three together, three times the updates of one alone, tasks drawn alike, every
  method, at the rate of fixed weights.
Intents are the first ten of banking77.  Similarity is standardized: its labels have mean 0 and standard deviation 1 in
the training split.  All is computed in bf16, with float32 weights.
Without a pack of its own (part 5 of the GPU day, gpu_day.py) the corpora come from data/cache.
"""

import functools
import itertools
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from record import Job, Table, side_by_side, started, subset

import ftlib

ABOUT = "MiniLM, several tasks on one encoder"
MODEL: str | None = "minilm"  # or a folder with its weights; None: a tiny random one
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
RATES = (1e-4, 2.5e-4, 6e-4)
METHODS: dict[str, dict[str, Any]] = {  # of TrainConfig
    "fixed": {},
    **{how: {"task_weighting": how} for how in ("uncertainty", "gradnorm", "dwa", "random", "famo")},
    **{how: {"task_gradients": how} for how in ("pcgrad", "cagrad", "mgda")},
}
CORPORA = {"sentiment": "rotten-tomatoes", "similarity": "stsb", "intents": "banking77"}
INTENTS = 10  # the first of banking77's 77
SCORE = {"similarity": "pearson", "slots": "f1"}  # accuracy for the others
PARTS = ("atis", "transfer", "balancing")
ATIS = ("intent", "slots")
ROWS, BATCH = 300, 16  # training rows of a task, and of an update; of atis all in 32
STEPS, ATIS_STEPS = 100, 600  # updates: of a task alone, of every model on atis
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TEST: int | None = 1000  # rows of the other splits; None: all
TOY = {"SEEDS": (0,), "RATES": (1e-4,), "ROWS": 8, "STEPS": 2, "ATIS_STEPS": 2, "TEST": 8, "MODEL": None}  # fmt: skip


class Way(NamedTuple):
    """One way to train: the tasks of one encoder, rows of each (None: all), updates, and settings of TrainConfig."""

    rows: dict[str, int | None]
    steps: int
    options: Any = types.MappingProxyType({})
    rate_of: str | None = None  # the way whose rate it takes; None: its own


def ways(part: str) -> dict[str, Way]:
    """{name: way} of a part, each behind the one whose rate it takes."""
    if part == "atis":
        return {"+".join(tasks): Way(dict.fromkeys(tasks), ATIS_STEPS) for tasks in (*zip(ATIS), ATIS)}
    if part == "balancing":
        even, rows = {"task_sampler": "uniform", "batch_size": BATCH}, dict.fromkeys(CORPORA, ROWS)
        rate_of = lambda method: None if method == "fixed" else "fixed"  # noqa: E731
        return {name: Way(rows, 3 * STEPS, how | even, rate_of(name)) for name, how in METHODS.items()}
    found = {}
    for task in CORPORA:
        found[task] = Way({task: ROWS}, STEPS, {"batch_size": BATCH})
        found[f"{task}, half batches"] = Way({task: ROWS}, 2 * STEPS, {"batch_size": BATCH // 2})
        found[f"{task}, twice as long"] = Way({task: ROWS}, 2 * STEPS, {"batch_size": BATCH})
    shared = {"task_sampler": "remaining", "batch_size": BATCH}
    for pair in itertools.combinations(CORPORA, 2):
        found["+".join(pair)] = Way(dict.fromkeys(pair, ROWS), 2 * STEPS, shared)
    return found


# ---------------------------------------------------------------------------------------------------- the data


@functools.cache
def heads_and_rows(corpus: str) -> tuple[dict[str, ftlib.Head], dict[str, Any]]:
    """({task: its head}, {split: rows with `input_ids` and {task: label}}) of "atis" or a task of CORPORA."""
    tokenizer = ftlib.load_tokenizer("minilm")
    data = ftlib.load_corpus(CORPORA.get(corpus, corpus))
    if corpus == "atis":
        intents, tags = data["train"].features["intent"].names, data["train"].features["tags"].feature.names
        heads = {
            "intent": ftlib.Head("sequence-classification", len(intents), tuple(intents)),
            "slots": ftlib.Head("token-classification", len(tags), tuple(tags)),
        }
        return heads, ftlib.tokenize(data, tokenizer, text="tokens", label={"intent": "intent", "slots": "tags"})
    count = getattr(data["train"].features["label"], "num_classes", None)
    if corpus == "intents":
        count = INTENTS
        data = {split: rows.filter(lambda row: row["label"] < INTENTS) for split, rows in data.items()}
    tokens = ftlib.tokenize(data, tokenizer, max_length=96)
    if not count:
        labels = torch.tensor(tokens["train"].with_format(None)["labels"][:], dtype=torch.float64)
        mean, std = labels.mean().item(), labels.std().item()
        tokens = {
            split: rows.map(lambda row: {"labels": (row["labels"] - mean) / std}) for split, rows in tokens.items()
        }
    head = ftlib.Head("sequence-classification", count) if count else ftlib.Head("regression", 1)
    return {corpus: head}, tokens


def datasets(way: Way, split: str, seed: int) -> dict[str, list[dict]]:
    """{corpus: rows of a split with the labels of the way's tasks}; training rows are drawn by the seed."""
    found: dict[str, list[dict]] = {}
    for task, count in way.rows.items():
        corpus = "atis" if task in ATIS else task
        if corpus not in found:
            rows = heads_and_rows(corpus)[1][split]
            drawn = subset(rows, count, seed) if split == "train" else subset(rows, TEST, 0)
            found[corpus] = [{"input_ids": row["input_ids"], "labels": _labels(row, task, way)} for row in drawn]
    return found


def _labels(row: dict, task: str, way: Way) -> dict[str, Any]:
    return {name: row["labels"][name] for name in way.rows} if task in ATIS else {task: row["labels"]}


# ------------------------------------------------------------------------------------------------- one training


def train(way: Way, rate: float, seed: int, split: str) -> dict[str, Any]:
    """The score of each task on a split, and their mean."""
    heads: dict[str, ftlib.Head] = {}
    for task in way.rows:
        heads[task] = heads_and_rows("atis" if task in ATIS else task)[0][task]
    encoder = ftlib.load_model(MODEL) if MODEL else transformers.BertModel(transformers.BertConfig(**TINY))
    model = ftlib.unpad(ftlib.MultiTaskModel(encoder, heads, seed=seed))
    sizing = dict(max_steps=way.steps, precision="bf16")
    config = ftlib.TrainConfig(**sizing, learning_rate=rate, seed=seed, progress=False, **way.options)
    run = ftlib.fit(model, datasets(way, "train", seed), config=config)
    half = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    metrics = ftlib.evaluate(model, datasets(way, split, 0), autocast=half)
    scores = {task: metrics[f"{task}/{SCORE.get(task, 'accuracy')}"] for task in heads}
    mean = sum(scores.values()) / len(scores)
    return {"scores": scores, "mean": mean, "seconds": run.seconds}


def searched(table: Any, part: str, name: str) -> float:
    """The rate of a way."""
    way = ways(part)[name]
    if way.rate_of:
        return searched(table, part, way.rate_of)
    key = {"part": f"{part}, rates", "way": name, "steps": way.steps, "seed": SEARCH_SEED}
    return table.best_rate(
        key, RATES, lambda rate: train(way, rate, SEARCH_SEED, "validation"), lambda row: row["mean"]
    )  # fmt: skip


def tested(table: Any, part: str, name: str, seed: int) -> None:
    way, rate = ways(part)[name], searched(table, part, name)
    key = {"part": part, "way": name, "rate": rate, "steps": way.steps, "seed": seed}
    table.row(key, lambda: train(way, rate, seed, "test"))


def jobs(parts: tuple[str, ...] = PARTS) -> list[Job]:
    """All rates, those of the longest trainings first; then part by part a seed after the other."""
    every = {(part, name): way for part in parts for name, way in ways(part).items()}
    own = sorted((key for key, way in every.items() if not way.rate_of), key=lambda key: -every[key].steps)
    found = [Job(f"{part} {name}", (searched, part, name)) for part, name in own]
    for part, seed in itertools.product(parts, SEEDS):
        for name, way in ways(part).items():
            call = (tested, part, name, seed)
            found.append(Job(f"{part} {name} {seed}", call, f"{part} {way.rate_of or name}"))
    return found


def table(folder: Path) -> Table:
    return Table("multitask", "python tests/benchmarks/multitask.py", ABOUT, folder=folder)


def main() -> None:
    table = started(globals(), ABOUT)
    side_by_side(table, jobs(), workers=0 if SEEDS == TOY["SEEDS"] else 2)


if __name__ == "__main__":
    main()
