"""Out of memory: what each remedy saves and what it costs.

    python tests/benchmarks/memory.py    # adds rows to results/speed-<CPU>.json; on a GPU it is part 4 of the GPU day

Needs only torch, transformers and ftlib.  The model has random weights: of MiniLM's size on a CPU, of BERT-base's on
a GPU.  One step is 32 rows of 16 to 256 tokens on a CPU, 64 rows of 16 to 512 on a GPU (the lengths of
rotten-tomatoes, stretched so that the longest fills the row).  Every row changes one thing against the first.  Peak
memory is that of the whole process on a CPU (libraries included; a process a row), of all tensors on a GPU; the
seconds are the median step after the first.
"""

import argparse
import gc
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bert_base import device, why
from lengths import measured_lengths
from paired import alone
from record import RESULTS, GpuTable, SpeedTable
from torch import nn

import ftlib


def head_only(model: nn.Module) -> None:
    ftlib.tune(model, "head-only")


def lora(model: nn.Module) -> None:
    ftlib.tune(model, "lora")


# name: (what is done to the model, options of TrainConfig)
REMEDIES: dict[str, tuple[list[Callable[[nn.Module], Any]], dict[str, Any]]] = {
    "full fine-tuning, float32": ([], {}),
    "unpad": ([ftlib.unpad], {}),
    "micro-batches of 8": ([], {"micro_batch_size": 8}),
    "gradient checkpointing": ([], {"gradient_checkpointing": True}),
    "bf16": ([], {"precision": "bf16"}),
    "SGD in place of AdamW": ([], {"optimizer": "sgd", "learning_rate": 1e-3}),
    "LoRA": ([lora], {}),
    "head-only": ([head_only], {}),
    "unpad, micro-batches of 8": ([ftlib.unpad], {"micro_batch_size": 8}),
    "unpad, micro-batches of 8, LoRA": ([ftlib.unpad, lora], {"micro_batch_size": 8}),
    "unpad, micro-batches of 8, SGD": (
        [ftlib.unpad],
        {"micro_batch_size": 8, "optimizer": "sgd", "learning_rate": 1e-3},
    ),
}


def sizes(toy: bool) -> tuple[dict[str, Any], int, int, str]:
    """Options of the config, rows a step, the longest row, and these in words."""
    if toy:
        small = dict(vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        return small, 16, 64, "toy"
    if torch.cuda.is_available():
        return {}, 64, 512, "BERT-base-sized, 64 rows of up to 512 tokens a step"
    minilm = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return minilm, 32, 256, "MiniLM-sized, 32 rows of up to 256 tokens a step"


def stretched(count: int, longest: int) -> list[int]:
    """So many of the measured lengths, scaled until the longest has `longest` tokens; at least 16."""
    lengths = measured_lengths()[:count]
    return [max(16, length * longest // max(lengths)) for length in lengths]


def one(name: str, steps: int, toy: bool) -> dict[str, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    options, batch, longest, _ = sizes(toy)
    torch.manual_seed(0)
    with device():
        model = BertForSequenceClassification(BertConfig(**options))
    prepare, config = REMEDIES[name]
    for change in prepare:
        change(model)
    pick = random.Random(0)
    ids = range(1000, model.config.vocab_size)
    rows = [
        {"input_ids": pick.choices(ids, k=length), "labels": pick.randrange(2)} for length in stretched(batch, longest)
    ]
    base = {"max_steps": steps, "batch_size": batch, "precision": "fp32", "progress": False}
    with ftlib.measure() as cost:
        run = ftlib.fit(model, rows, config=ftlib.TrainConfig(**(base | config)))
    marks = [record["seconds"] for record in run.history]
    return {
        "peak_mb": cost.peak_mb,
        "peak_gpu_mb": cost.peak_gpu_mb,
        "seconds_a_step": statistics.median(b - a for a, b in itertools.pairwise(marks)),
        "steps": steps,
        "loss": run.history[-1]["loss"],
    }


def on_the_gpu(table: GpuTable, toy: bool = False, steps: int = 4, until: float = math.inf) -> None:
    """All rows in this process, whose tensors are what counts; each is stored at once, also one that can't be had."""
    rows = []
    for name in [*REMEDIES][:: 4 if toy else 1]:
        row = {"work": sizes(toy)[-1], "method": name}
        if time.monotonic() > until:
            row["missing"] = "no time was left"
        else:
            try:
                row |= one(name, steps, toy)
            except Exception as error:  # out of memory, say
                row["missing"] = why(error)
        gc.collect()
        torch.cuda.empty_cache()
        table.replace({"part": "memory"}, rows := [*rows, row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=REMEDIES, help="measure this row in this process")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--toy", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.steps, args.toy)))
        return
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    if torch.cuda.is_available():
        on_the_gpu(GpuTable(4, "python tests/benchmarks/memory.py", args.results), args.toy, args.steps)
        return
    table = SpeedTable("python tests/benchmarks/memory.py", args.results)
    given = ["--steps", str(args.steps), *(["--toy"] if args.toy else [])]
    names = list(REMEDIES)[-1:] if args.toy else list(REMEDIES)
    rows = [{"work": sizes(args.toy)[-1], "method": name} | alone(__file__, "--one", name, *given) for name in names]
    table.replace({"part": "memory"}, rows)


if __name__ == "__main__":
    main()
