"""Results of notebook 05: multi-task against single-task models, and what each balancing method changes, with seeds.

    python tests/benchmarks/multitask.py                    # everything into results/multitask.json; resumes
    python tests/benchmarks/multitask.py --part transfer    # or atis, unlike, methods-atis, methods-four

Parts
- atis: intent and slots of the same sentences, one encoder or two; the joint model makes as many steps as each single
  model, half of what the two make together.
- unlike: sentiment (rotten-tomatoes), paraphrase pairs (mrpc) and bank intents (banking77), one encoder for all or one
  each; the joint model makes as many steps as the three single models together.
- methods-atis, methods-four: every weighting and balancing method on atis, and on four unlike tasks: the three of above
  and sentence similarity, a regression (stsb, labels from 0 to 1).  Same steps, rates and rows for all methods, tasks
  drawn alike.
- transfer: each of the four tasks alone, and every two of them together with the steps of both, so that a task makes
  as many passes over its rows with a partner as alone; "gain" is score together minus score alone, same seed.
The last three parts have a size: small, about an hour for three seeds on two CPU cores, and full, for a GPU: part 5 of
the GPU day (gpu_day.py), which has a file of its own.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, Table, subset

import ftlib

MODEL = "minilm"  # or a folder with its weights
PARTS = ("atis", "unlike", "methods-atis", "methods-four", "transfer")
RATE = {"atis": 6e-4, "unlike": 5e-4, "four": 1.5e-4}
METHODS: dict[str, dict[str, Any]] = {  # of TrainConfig
    "fixed": {},
    **{how: {"task_weighting": how} for how in ("uncertainty", "gradnorm", "dwa", "random", "famo")},
    **{how: {"task_gradients": how} for how in ("pcgrad", "cagrad", "mgda")},
    "upgrad (TorchJD)": {"task_gradients": "UPGrad"},
}
CORPORA = {"sentiment": "rotten-tomatoes", "similarity": "stsb", "pairs": "mrpc", "intents": "banking77"}
SCORE = {"similarity": "pearson", "slots": "f1"}  # accuracy for the others
SIZES = {  # training rows of each task, the first so many of banking77's intents, passes over the rows, test rows
    "small": {"atis": 1000, "sentiment": 400, "similarity": 300, "pairs": 300, "intents": 200, "kinds": 10, "passes": 4,
              "test": 300},
    "full": {"atis": 4000, "sentiment": 4000, "similarity": 4000, "pairs": 3000, "intents": 8000, "kinds": 77,
             "passes": 3, "test": 10**6},
    "dry": {"atis": 32, "sentiment": 32, "similarity": 32, "pairs": 32, "intents": 32, "passes": 1, "test": 8},
    "toy": {"atis": 8, "sentiment": 8, "similarity": 8, "pairs": 8, "intents": 8, "passes": 3, "test": 8},
}  # fmt: skip
Head = ftlib.Head


def train(heads: dict, datasets: dict, tests: dict, steps: int, rate: float, seed: int, **options: Any):
    encoder = options.pop("encoder", None) or ftlib.load_model(MODEL)
    model = ftlib.unpad(ftlib.MultiTaskModel(encoder, heads, seed=seed))
    config = ftlib.TrainConfig(max_steps=steps, learning_rate=rate, seed=seed, progress=False, **options)
    run = ftlib.fit(model, datasets, config=config)
    return {**ftlib.evaluate(model, tests), "seconds": run.seconds, "steps": run.steps}


def picked(rows, tasks) -> list[dict]:
    """Rows with the labels of these tasks only."""
    return [{**row, "labels": {task: row["labels"][task] for task in tasks}} for row in rows]


# ---------------------------------------------------------------------------------------------------- the data


def atis():
    """Heads, and rows of train and test with both labels."""
    data = ftlib.load_corpus("atis")
    intents, tags = data["train"].features["intent"].names, data["train"].features["tags"].feature.names
    heads = {
        "intent": Head("sequence-classification", len(intents), tuple(intents)),
        "slots": Head("token-classification", len(tags), tuple(tags)),
    }
    tokenizer = ftlib.load_tokenizer("minilm")
    return heads, ftlib.tokenize(data, tokenizer, text="tokens", label={"intent": "intent", "slots": "tags"})


def classes(names, kinds: int = 77):
    """Heads and tokenized corpora of these tasks; of the intents only the first `kinds`."""
    tokenizer = ftlib.load_tokenizer("minilm")
    heads, tokens = {}, {}
    for task in names:
        data = ftlib.load_corpus(CORPORA[task])
        label = data["train"].features["label"]
        count = getattr(label, "num_classes", None)
        if task == "intents" and kinds < count:
            data, count = data.filter(lambda row: row["label"] < kinds), kinds
        heads[task] = Head("sequence-classification", count) if count else Head("regression", 1)
        tokens[task] = ftlib.tokenize(data, tokenizer, max_length=96)
        if task == "similarity":  # 0 to 5 made 0 to 1: with squares of up to 25 it drowns the other tasks
            tokens[task] = {split: rows.map(_to_one) for split, rows in tokens[task].items()}
    return heads, tokens


def _to_one(row: dict) -> dict:
    return {"labels": row["labels"] / 5}


def toy(names):
    """The same tasks made of random tokens, and a tiny encoder."""
    pick = torch.Generator().manual_seed(0)
    kinds = {"intent": "sequence-classification", "slots": "token-classification", "similarity": "regression"}
    heads = {n: Head(kinds.get(n, "sequence-classification"), 1 if n == "similarity" else 3,
                     ("O", "B-x", "I-x") if n == "slots" else None) for n in names}  # fmt: skip

    def row(place):
        ids = torch.randint(5, 60, (3 + place % 5,), generator=pick).tolist()
        made = {"sequence-classification": place % 3, "token-classification": [i % 3 for i in ids]}
        return {"input_ids": ids, "labels": {n: made.get(head.task, place / 4) for n, head in heads.items()}}

    return heads, [row(place) for place in range(8)]


def tiny_encoder():
    import transformers

    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**sizes))


# --------------------------------------------------------------------------------------------------- the parts


def old_atis(table: Table, seeds: range) -> None:
    heads, tokens = atis()
    for seed in seeds:
        rows = subset(tokens["train"], 2000, seed)
        for tasks in (["intent"], ["slots"], ["intent", "slots"]):
            data, tests = {"atis": picked(rows, tasks)}, {"atis": picked(tokens["test"], tasks)}
            table.row(
                {"part": "atis", "tasks": "+".join(tasks), "seed": seed},
                partial(train, {n: heads[n] for n in tasks}, data, tests, 3 * 2000 // 32, RATE["atis"], seed),
            )


def old_unlike(table: Table, seeds: range) -> None:
    sizes = {"sentiment": 600, "pairs": 300, "intents": 1200}
    heads, tokens = classes(sizes)
    for seed in seeds:
        sets = {task: subset(tokens[task]["train"], size, seed) for task, size in sizes.items()}
        tests = {task: subset(tokens[task]["test"], 500, 0) for task in sizes}
        for t, size in sizes.items():
            table.row(
                {"part": "unlike", "tasks": t, "temperature": None, "seed": seed},
                partial(train, {t: heads[t]}, {t: sets[t]}, {t: tests[t]}, 2 * size // 32, RATE["unlike"], seed),
            )
        steps = 2 * sum(sizes.values()) // 32
        for temperature in (1.0, 5.0):
            table.row(
                {"part": "unlike", "tasks": "all", "temperature": temperature, "seed": seed},
                partial(train, heads, sets, tests, steps, RATE["unlike"], seed, temperature=temperature),
            )


def methods(table: Any, seeds: range, part: str, size: str, *, given=None, only=tuple(METHODS)) -> None:
    """Every method on atis (both labels in every row) or on the four tasks (one label a row).

    given: (heads, tokens) as `atis` and `classes` return them, where these can't be loaded.
    """
    from_atis, count = part == "methods-atis", SIZES[size]
    names = ("intent", "slots") if from_atis else tuple(CORPORA)
    heads, tokens = given or (toy(names) if size == "toy" else atis() if from_atis else classes(names, count["kinds"]))
    for seed in seeds:
        if size == "toy":
            data = {"atis": tokens} if from_atis else {n: picked(tokens, [n]) for n in names}
            tests = data
        elif from_atis:
            data, tests = ({"atis": subset(tokens[s], count[k], 0 if s == "test" else seed)}
                           for s, k in (("train", "atis"), ("test", "test")))  # fmt: skip
        else:
            data = {n: subset(tokens[n]["train"], count[n], seed) for n in names}
            tests = {n: subset(tokens[n]["test"], count["test"], 0) for n in names}
        steps = count["passes"] * sum(map(len, data.values())) // (4 if size == "toy" else 32)
        for name, options in ((name, METHODS[name]) for name in only):
            if "TorchJD" in name:
                try:
                    from torchjd.aggregation import UPGrad

                    options = {"task_gradients": UPGrad()}
                except ImportError as error:
                    print(f"no row for {name}: {error}", flush=True)
                    continue
            if not from_atis:
                options = {**options, "task_sampler": "uniform"}
            table.row(
                {"part": part, "method": name, "size": size, "seed": seed},
                lambda o=options, d=data, t=tests, n=steps, s=seed: scored(size, heads, d, t, n, part, s, **o),
            )


def transfer(table: Any, seeds: range, size: str, *, given=None, pairs: Any = None) -> None:
    """Each task alone, then in every pair, where each makes its own passes: exact counts, task_sampler="remaining".

    pairs: these alone, after the single tasks.
    """
    count = SIZES[size]
    heads, tokens = given or (toy(tuple(CORPORA)) if size == "toy" else classes(CORPORA, count["kinds"]))
    pairs = itertools.combinations(CORPORA, 2) if pairs is None else pairs
    every = [*((task,) for task in CORPORA), *pairs]
    for seed in seeds:
        alone: dict[str, float] = {}
        for tasks in every:
            if size == "toy":
                data = tests = {n: picked(tokens, [n]) for n in tasks}
            else:
                data = {n: subset(tokens[n]["train"], count[n], seed) for n in tasks}
                tests = {n: subset(tokens[n]["test"], count["test"], 0) for n in tasks}
            steps = count["passes"] * sum(map(len, data.values())) // (4 if size == "toy" else 32)
            row = table.row(
                {"part": "transfer", "tasks": "+".join(tasks), "size": size, "seed": seed},
                lambda h={n: heads[n] for n in tasks}, d=data, t=tests, n=steps, s=seed, a=dict(alone): scored(
                    size, h, d, t, n, "transfer", s, alone=a, task_sampler="remaining"
                ),
            )
            if len(tasks) == 1:
                alone[tasks[0]] = row["scores"][tasks[0]]


def scored(size: str, heads: dict, data: dict, tests: dict, steps: int, part: str, seed: int, alone=None, **options):
    """`train`, with one score a task, their mean, and the gain over `alone` where that is known."""
    if size == "toy":
        options |= {"encoder": tiny_encoder(), "batch_size": 4}
    row = train(heads, data, tests, steps, RATE["atis" if part == "methods-atis" else "four"], seed, **options)
    scores = {task: row[f"{task}/{SCORE.get(task, 'accuracy')}"] for task in heads}
    row |= {"scores": scores, "mean": sum(scores.values()) / len(scores)}
    if alone and len(heads) > 1:
        row["gain"] = {task: score - alone[task] for task, score in scores.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="this part alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", choices=("small", "full"), default="full" if torch.cuda.is_available() else "small")
    parser.add_argument("--toy", action="store_true", help="random tokens and a tiny model: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    about = "MiniLM, multi-task against single-task"
    table = Table("multitask", "python tests/benchmarks/multitask.py", about, folder=args.results)
    size, seeds = "toy" if args.toy else args.size, range(args.seeds)
    for part in [args.part] if args.part else PARTS[2:] if args.toy else PARTS:
        if part == "atis":
            old_atis(table, seeds)
        elif part == "unlike":
            old_unlike(table, seeds)
        elif part == "transfer":
            transfer(table, seeds, size)
        else:
            methods(table, seeds, part, size)


if __name__ == "__main__":
    main()
