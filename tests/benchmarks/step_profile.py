"""Where the time of a training step goes: matrix products, attention, dropout, normalization, optimizer, the rest.

    python tests/benchmarks/step_profile.py    # adds rows to results/speed-<device>.json; uses a GPU if there is one

On a CPU MiniLM's size, batches of 32 sentences, in the precision `fit` chooses; on a GPU BERT-base's size, batches of
256, bf16; random weights, real lengths, dropout on.  Each method's steps run once without the profiler (seconds a
step) and once with it (seconds of each group).  An operator's own time goes to the group of the nearest operator,
going outwards, that the list below knows; so a product inside the optimizer's step is the optimizer's.  "rest" is what
no operator claims: Python, the loader, and on a GPU the time it waits.
"""

import argparse
from pathlib import Path
from typing import Any

import methods
import torch
from bert_base import make_model, token_rows
from lengths import measured_lengths
from record import RESULTS, SpeedTable
from torch.profiler import ProfilerActivity, profile

from ftlib import choose_precision, collate

# The first group with a piece that is in the operator's name gets its time.
GROUPS = {
    "normalization and GELU": ("layer_norm", "gelu"),  # before dropout: aten::gelu begins as aten::ge does
    "dropout": ("dropout", "bernoulli", "aten::random_", "aten::ge"),
    "attention": ("scaled_dot_product", "bmm", "softmax", "flash", "efficient_attention", "varlen", "_Attend"),
    "matrix products": ("aten::mm", "aten::addmm", "AddmmBackward", "MmBackward", "linear_pointwise", "_Linear"),
    "optimizer and clipping": ("Optimizer.", "adamw", "_foreach_", "vector_norm"),
    "embeddings": ("embedding",),
    "copies and indexing": (
        "copy_",
        "clone",
        "index",
        "aten::cat",
        "aten::zero",
        "aten::fill",
        "scatter",
        "gather",
        "AccumulateGrad",
    ),
}


def group_of(event: Any) -> str | None:
    while event is not None:
        for group, pieces in GROUPS.items():
            if any(piece in event.name for piece in pieces):
                return group
        event = event.cpu_parent
    return None


def seconds_by_group(profiler: profile, on_gpu: bool) -> dict[str, float]:
    seconds = dict.fromkeys([*GROUPS, "other operators"], 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total  # microseconds
            seconds[group_of(event) or "other operators"] += own / 1e6
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    gpu = torch.cuda.is_available()
    options = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    if args.toy:
        options = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    elif gpu:
        options = {}
    batch = 256 if gpu and not args.toy else 32
    lengths = measured_lengths()[: batch * args.steps]
    work = methods.Work(
        make_model=lambda: make_model("BertForSequenceClassification", **options),
        rows=token_rows(lengths),
        collator=collate,
        batch=batch,
        precision=choose_precision(torch.device("cuda" if gpu else "cpu"))[0],
    )
    size = "toy" if args.toy else "BERT-base-sized" if gpu else "MiniLM-sized"
    what = f"{size}, batch {batch}, {work.precision}, {sum(lengths) // args.steps} real tokens a step"
    rows = []
    stock = {} if args.toy else methods.stock_methods(work, None)
    for name, run in (stock | methods.our_methods(work, compiled=False)).items():
        run()
        plain = run()["seconds"]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with profile(activities=activities) as profiler:
            profiled = run()["seconds"]
        groups = seconds_by_group(profiler, gpu)
        groups["rest"] = max(profiled - sum(groups.values()), 0.0)
        rows.append({
            "work": what, "method": name, "seconds_a_step": plain / args.steps,
            "profiled_seconds_a_step": profiled / args.steps,
            "groups": {group: seconds / args.steps for group, seconds in groups.items()},
        })  # fmt: skip
    SpeedTable("python tests/benchmarks/step_profile.py", args.results).replace({"part": "profile"}, rows)


if __name__ == "__main__":
    main()
