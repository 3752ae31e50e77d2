"""Results of notebook 03: every strategy on two corpora at two training sizes, each with its own learning rate.

    python tests/benchmarks/strategies.py                           # everything; resumes where it stopped
    python tests/benchmarks/strategies.py --part rotten-tomatoes    # or banking77: the accuracies on one corpus
    python tests/benchmarks/strategies.py --part cost               # seconds a step, memory, bytes on disk

Every run starts from the same pretrained MiniLM; the seed changes the head's (and adapters') first weights, the choice
and order of the training texts, and dropout.  All strategies make the same number of updates.  Parts of a row:
- rates: the learning rate is searched for each corpus and size by validation accuracy: three rates by factors of about
  3; the two best with a second seed, which decides by their mean; and further while the best is at an edge.  Both seeds
  serve for nothing else.
- accuracy: the corpus's own test split, with every seed.
- twice: FINISHED with twice as many updates, to see whether validation accuracy has stopped rising.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import RESULTS, Table

import ftlib
from ftlib.inputs.pretrained import load_model, load_tokenizer

PARTS = ("rotten-tomatoes", "banking77", "cost")
# corpus -> {training texts: (batch size, updates, precision)}; banking77 has 77 classes, and as many texts of each
SIZES = {"rotten-tomatoes": {200: (16, 160, "fp32"), 1000: (32, 200, "bf16")}, "banking77": {1540: (32, 480, "bf16")}}
EVERY = 200  # training texts with which every strategy is measured; with more only SOME
SOME = ("full", "head-only", "bitfit", "lora")
FINISHED = ("full", "lora")
MODEL = "minilm"  # or a folder with its weights
LADDER = (7e-6, 2e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2)
SEARCH_SEEDS = (100, 101)
MANY, FEW, PROMPT = 1.5e-4, 1.5e-3, 5e-3  # where the search starts: all weights move, a few, a prompt
STRATEGIES = {  # name -> (what `tune` gets, where the search starts)
    "full": (("full", {}), MANY),
    "frozen-embeddings": (("frozen-embeddings", {}), MANY),
    "last-layers": (("last-layers", {}), 5e-4),
    "head-only": (("head-only", {}), FEW),
    "gradual-unfreezing": (("gradual-unfreezing", {}), MANY),
    "layer-decay": (("layer-decay", {}), MANY),
    "l2-sp": (("l2-sp", {}), MANY),
    "mixout": (("mixout", {}), MANY),
    "bitfit": (("bitfit", {}), FEW),
    "layer-norm": (("layer-norm", {}), FEW),
    "lora": (("lora", {}), FEW),
    "lora, all layers": (("lora", {"targets": "all-linear", "rank": 16, "rslora": True}), 5e-4),
    "houlsby": (("houlsby", {}), FEW),
    "pfeiffer": (("pfeiffer", {}), FEW),
    "DoRA (PEFT)": (("LoraConfig", {"r": 8, "lora_alpha": 16, "use_dora": True}), FEW),
    "(IA)³ (PEFT)": (("IA3Config", {}), PROMPT),
    "prompt (PEFT)": (("PromptTuningConfig", {"num_virtual_tokens": 20}), PROMPT),
}


def tuned(strategy: str, labels: int, seed: int):
    """A fresh MiniLM with a head, unpadded, the strategy applied; and the report."""
    (name, options), _ = STRATEGIES[strategy]
    model = load_model(MODEL, task="sequence-classification", num_labels=labels, seed=seed)
    ftlib.unpad(model)
    if name.endswith("Config"):
        import peft

        return model, ftlib.tune(model, getattr(peft, name)(**options), seed=seed)
    seeded = {"seed": seed} if name in ("lora", "houlsby", "pfeiffer") else {}
    return model, ftlib.tune(model, name, **options, **seeded)


def chosen(labels: list[int], count: int, seed: int) -> list[int]:
    """The rows of `count` training texts, as many of every class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    left = dict.fromkeys(labels, count // len(set(labels)))
    rows = []
    for row in order:
        if left[labels[row]]:
            left[labels[row]] -= 1
            rows.append(row)
    return rows


def tokenized(corpus: str):
    """{split: rows with input_ids and labels}."""
    return ftlib.tokenize(ftlib.load_corpus(corpus), load_tokenizer("minilm"), max_length=64)


def accuracies(
    seeds: tuple[int, ...], only: list[str], tokens: dict, table: Any, sizes: dict[int, tuple[int, int, str]]
) -> None:  # fmt: skip
    """Search the rate of each strategy, then train with every seed; `table` has `row(key, measure)`.

    tokens: {split: rows}, a Dataset or a list.  sizes: {training texts: (batch size, updates, precision)}.
    """
    labels = [row["labels"] for row in tokens["train"]]

    def train(strategy: str, rate: float, count: int, seed: int, split: str, steps: int) -> dict:
        model, report = tuned(strategy, len(set(labels)), seed)
        batch_size, _, precision = sizes[count]
        sizing = dict(max_steps=steps, batch_size=batch_size, precision=precision)
        config = ftlib.TrainConfig(**sizing, learning_rate=rate, seed=seed, progress=False)
        rows = [tokens["train"][place] for place in chosen(labels, count, seed)]
        run = ftlib.fit(model, rows, config=config)
        last = run.history[-10:]
        return {
            split: ftlib.evaluate(model, tokens[split])["accuracy"], "trainable": report.trainable,
            "loss_last": sum(record["loss"] for record in last) / len(last), "seconds_busy": run.seconds,
            "precision": precision,
        }  # fmt: skip

    def row(part: str, strategy: str, rate: float, count: int, steps: int, seed: int) -> dict:
        key = {"part": part, "strategy": strategy, "count": count, "rate": rate, "steps": steps, "seed": seed}
        split = "test" if part == "accuracy" else "validation"
        return table.row(key, partial(train, strategy, rate, count, seed, split, steps))

    def searched(strategy: str, count: int) -> float:
        steps, start = sizes[count][1], LADDER.index(STRATEGIES[strategy][1])
        tried: dict[int, float] = {}
        wanted = {start - 1, start, start + 1}

        def tried_at(place: int, seed: int) -> float:
            return row("rates", strategy, LADDER[place], count, steps, seed)["validation"]

        while wanted:
            tried |= {place: tried_at(place, SEARCH_SEEDS[0]) for place in sorted(wanted)}
            top = sorted(tried, key=lambda place: (-tried[place], -place))[:2]
            means = {place: (tried[place] + tried_at(place, SEARCH_SEEDS[1])) / 2 for place in top}
            best = max(means, key=lambda place: (means[place], place))
            wanted = {best - 1, best + 1} & set(range(len(LADDER))) - tried.keys()
        return LADDER[best]

    for count, (_, steps, _) in sizes.items():
        rates = {strategy: searched(strategy, count) for strategy in only}
        for seed in seeds:
            for strategy, rate in rates.items():
                row("accuracy", strategy, rate, count, steps, seed)
        for strategy, rate in rates.items():
            if strategy in FINISHED:
                row("twice", strategy, rate, count, 2 * steps, SEARCH_SEEDS[0])


# ---------------------------------------------------------------------------------------------------------- cost

ROUNDS, STEPS, BATCH = 2, 12, 32


def measure_one(strategy: str) -> None:
    """In a process of its own: seconds of a step, peak memory, bytes of what is saved, as JSON on the last line."""
    data, tokenizer = ftlib.load_corpus("rotten-tomatoes"), load_tokenizer("minilm")
    rows = ftlib.tokenize(data["train"].select(range(BATCH * STEPS)), tokenizer, max_length=64)
    model, report = tuned(strategy, 2, 0)
    config = ftlib.TrainConfig(epochs=1, batch_size=BATCH, learning_rate=1e-4, progress=False, shuffle=False)
    run = ftlib.fit(model, rows, tokenizer=tokenizer, config=config)
    times = [record["seconds"] for record in run.history]
    each = [after - before for before, after in itertools.pairwise(times[1:])]  # the first two steps warm up
    with tempfile.TemporaryDirectory() as folder:
        saved = ftlib.save(model, Path(folder) / "model")
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    found = {
        "seconds": median(each), "peak_mb": run.peak_memory_mb, "bytes": size, "trainable": report.trainable,
        "optimizer_mb": report.optimizer_bytes / 2**20,
    }  # fmt: skip
    print(json.dumps(found))


def costs(only: list[str]) -> None:
    """All strategies in turn, so that a busy moment of the machine does not fall on one of them, in rounds."""
    table = Table("strategies-cost", "python tests/benchmarks/strategies.py --part cost", "what a step costs")
    rounds: dict[str, list[dict]] = {strategy: [] for strategy in only}
    for _ in range(ROUNDS):
        for strategy in only:
            command = [sys.executable, __file__, "--measure", strategy]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds[strategy].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for strategy, found in rounds.items():
        against = [one["seconds"] / full["seconds"] for one, full in zip(found, rounds["full"], strict=True)]
        rows.append({
            "strategy": strategy, "seconds": min(one["seconds"] for one in found), "of_full": median(against),
            "of_full_low": min(against), "of_full_high": max(against),
            "peak_mb": max(one["peak_mb"] for one in found),
            **{key: found[0][key] for key in ("bytes", "trainable", "optimizer_mb")},
        })  # fmt: skip
    table.replace({"part": "cost", "batch_size": BATCH}, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one part; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds")
    parser.add_argument("--only", nargs="+", choices=[*STRATEGIES], default=[*STRATEGIES], help="some strategies")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write the accuracies to")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.measure:
        return measure_one(wanted.measure)
    for part in [wanted.part] if wanted.part else PARTS:
        if part == "cost":
            costs(wanted.only)
        else:
            command = f"python tests/benchmarks/strategies.py --part {part}"
            about = f"MiniLM on {part}, test accuracy of every strategy"
            table = Table(f"strategies-{part}", command, about, folder=wanted.results)
            tokens = tokenized(part)
            for count, size in SIZES[part].items():
                only = [name for name in wanted.only if count == EVERY or name in SOME]
                accuracies(tuple(range(wanted.seeds)), only, tokens, table, {count: size})


if __name__ == "__main__":
    main()
