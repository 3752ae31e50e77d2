"""What a step costs against the number of tasks, 1 to 16, for losses that are added up and for gradients taken apart.

    python tests/benchmarks/task_growth.py    # writes results/task_growth.json, the rows of this device

A step is 32 rows; the encoder is of MiniLM's size (random weights), unpadded.  "one label a row": the tasks take turns,
so more tasks are not more rows.  "all labels": every row has a label of every task, as intents and slots have.
Seconds are compared in rounds, all methods in turn, as ratios to a stock model with one task on the same tokens; peak
memory is that of a process of its own (of all tensors on a GPU).
"""

import argparse
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from lengths import measured_lengths
from paired import alone, run_rounds, spread
from record import RESULTS, Table, device_name

import ftlib

COUNTS = (1, 2, 4, 8, 16)
STOCK = "stock model, one task"
METHODS: dict[str, dict[str, Any]] = {  # of TrainConfig; the others cost as much as one of these
    "added up": {},
    "gradnorm": {"task_weighting": "gradnorm"},
    "famo": {"task_weighting": "famo"},
    "pcgrad": {"task_gradients": "pcgrad"},
}
LABELS = ("one label a row", "all labels")


def cases(counts) -> dict[str, tuple[int, str, str]]:
    """{name: (tasks, method, labels)}; with one task there is nothing to compare."""
    found = {STOCK: (0, "added up", LABELS[0])}
    for count, labels, method in itertools.product(counts, LABELS, METHODS):
        if count > 1 or (method, labels) == ("added up", LABELS[0]):
            found[f"{count} tasks, {labels}, {method}"] = (count, method, labels)
    return found


def work(name: str, steps: int, toy: bool, counts=COUNTS):
    """The steps of a case: a function that makes them, and gives the median seconds of one after the first."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    count, method, labels = cases(counts)[name]
    sizes = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    if toy:
        sizes = dict(vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    names = [f"task{i}" for i in range(count)]
    if count:
        model = ftlib.MultiTaskModel(BertModel(BertConfig(**sizes)), dict.fromkeys(names, ftlib.Head()))
    else:
        model = BertForSequenceClassification(BertConfig(**sizes))
    model = ftlib.unpad(model)
    pick, rows = random.Random(0), []
    for place, length in enumerate(measured_lengths()[:32]):
        ids, label = pick.choices(range(1000, 2000), k=length), pick.randrange(2)
        if count:
            label = {n: label for n in (names if labels == LABELS[1] else [names[place % count]])}
        rows.append({"input_ids": ids, "labels": label})
    config = ftlib.TrainConfig(max_steps=steps + 1, batch_size=32, precision="fp32", progress=False, **METHODS[method])

    def run() -> dict[str, Any]:
        marks = [record["seconds"] for record in ftlib.fit(model, rows, config=config).history]
        return {"seconds": statistics.median(b - a for a, b in itertools.pairwise(marks))}

    return run


def peak(name: str, toy: bool) -> dict[str, Any]:
    run = work(name, 2, toy)
    with ftlib.measure() as cost:
        run()
    return {"peak_mb": cost.peak_mb, "peak_gpu_mb": cost.peak_gpu_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=cases(COUNTS), help="the peak memory of this case, in this process")
    parser.add_argument("--steps", type=int, default=2, help="steps a round, after one that warms up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="a tiny model, at most 2 tasks: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(peak(args.one, args.toy)))
        return
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    command = "python tests/benchmarks/task_growth.py"
    table = Table("task_growth", command, "The cost of a step by the number of tasks", folder=args.results)
    counts = (1, 2) if args.toy else COUNTS
    rows: list[dict[str, Any]] = []
    for count in counts:  # a comparison a number of tasks: few models in memory at a time
        chosen = {name: case for name, case in cases(counts).items() if case[0] in (0, count)}
        results = run_rounds({name: work(name, args.steps, args.toy) for name in chosen}, args.rounds)
        for name, (tasks, method, labels) in chosen.items():
            if tasks or not rows:
                measured = [r["seconds"] for r in results[name][1:]]
                base = [r["seconds"] for r in results[STOCK][1:]]
                row = {"tasks": tasks, "labels": labels, "method": method if tasks else STOCK}
                row |= {"seconds_a_step": spread(measured), "rounds": args.rounds, "threads": torch.get_num_threads()}
                row["against_stock"] = spread([own / stock for own, stock in zip(measured, base, strict=True)])
                rows.append(row | (peak(name, True) if args.toy else alone(__file__, "--one", name)))
    table.replace({"part": "growth", "device": device_name()}, rows)


if __name__ == "__main__":
    main()
