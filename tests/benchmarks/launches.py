"""A step too small for its GPU (batches of 32 sentences of 27 tokens): where the time goes, and who waits for whom.

    python tests/benchmarks/launches.py    # part 3 of the GPU day; needs a GPU (--toy: runs anywhere)

BERT-base's size, bf16, random weights, real lengths.  Seconds a step are taken without the profiler.  Everything else
is counted under it in a long and in a short run and divided by the difference in steps, so what is done once is in no
number: kernels launched, seconds they take on the GPU (their share of the step is how busy the GPU is), calls that wait
for the GPU and copies from it, operators by the time Python spends in them.  Where the waits are in the source is what
torch.cuda.set_sync_debug_mode says of a run of its own.  Where the machine does not let the profiler see the GPU (CUPTI
asks for privileges) the numbers of kernels and calls are left out.
"""

import argparse
import collections
import functools
import itertools
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import methods
import torch
from bert_base import TOY, device, make_model, token_rows, why
from lengths import measured_lengths
from record import RESULTS, GpuTable
from torch.profiler import ProfilerActivity, profile

import ftlib
from ftlib.core.batches import collate

BATCH = 32
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
Run = Callable[[int], float]  # trains so many steps; returns seconds a step


def trainer(toy: bool, steps: int) -> float:
    work = work_of(toy, steps)
    return methods.trainer(work, train_sampling_strategy="group_by_length")()["seconds"] / steps


def fit(toy: bool, steps: int, *, unpad: bool = False, **options: Any) -> float:
    work, model = work_of(toy, steps), kept_model(toy, unpad)
    config = ftlib.TrainConfig(epochs=1, batch_size=work.batch, precision="bf16", progress=False, **options)
    run = ftlib.fit(model, work.rows, config=config)
    marks = [record["seconds"] for record in run.history]
    return statistics.median(b - a for a, b in itertools.pairwise(marks))


@functools.cache
def kept_model(toy: bool, unpad: bool) -> torch.nn.Module:
    """One model object, so that what was compiled for it stays good."""
    model = work_of(toy, 1).make_model()
    return ftlib.unpad(model) if unpad else model


def work_of(toy: bool, steps: int) -> methods.Work:
    batch = 4 if toy else BATCH
    make = functools.partial(make_model, "BertForSequenceClassification", **(TOY if toy else {}))
    return methods.Work(make, token_rows(measured_lengths()[: batch * steps]), collate, batch, "bf16")


WAYS: dict[str, Callable[[bool, int], float]] = {
    "ftlib.fit, unpad": functools.partial(fit, unpad=True),
    "ftlib.fit": fit,
    "Trainer, bf16, grouped by length": trainer,
    "ftlib.fit, unpad, compile": functools.partial(fit, unpad=True, compile=True),
}


def counted(run: Run, steps: int) -> dict[str, collections.Counter]:
    """What happens in a run of so many steps: {"calls", "gpu", "python": seconds, "operators": {name: ...}}."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        run(steps)
    found: dict[str, collections.Counter] = {key: collections.Counter() for key in ("calls", "gpu", "self", "times")}
    for event in profiler.key_averages():
        found["self"][event.key] += event.self_cpu_time_total / 1e6
        found["times"][event.key] += event.count
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(path := Path(folder, "trace.json")))
        events = json.loads(path.read_text())["traceEvents"]
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if kind in ("cuda_runtime", "cuda_driver"):
            found["calls"]["waits"] += name in WAITS
            found["calls"]["launches"] += name in LAUNCHES
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            found["gpu"][name.split("<")[0][:80]] += event["dur"] / 1e6
            found["calls"]["copies from the GPU"] += name.startswith("Memcpy DtoH")
    return found


def waiting_lines(run: Run, steps: int) -> dict[str, float]:
    """{file:line of the source: waits a step}, the most frequent first."""
    if not torch.cuda.is_available():
        return {}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = (f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in seen if "synchronizing" in str(w.message))
    return {place: count / steps for place, count in collections.Counter(places).most_common(8)}


def measured(run: Run, toy: bool) -> dict[str, Any]:
    short, long = (2, 4) if toy else (4, 10)
    run(short)  # compiles, warms up
    seconds = run(6 if toy else 40)
    few, many = counted(run, short), counted(run, long)

    def a_step(kind: str) -> dict[str, float]:
        return {name: max(many[kind][name] - few[kind][name], 0) / (long - short) for name in many[kind]}

    gpu, own, times = a_step("gpu"), a_step("self"), a_step("times")
    slowest = sorted(own, key=own.__getitem__, reverse=True)[:15]
    seen = {"gpu_seconds_a_step": sum(gpu.values()), "busy": sum(gpu.values()) / seconds} if gpu else {}
    return {
        "seconds_a_step": seconds, **seen, "a_step": a_step("calls"),
        "kernels": dict(sorted(gpu.items(), key=lambda item: -item[1])[:15]),
        "operators": [{"name": name, "seconds": own[name], "times": times[name]} for name in slowest],
        "waiting": waiting_lines(run, 6 if toy else 20),
    }  # fmt: skip


def all_ways(table: GpuTable, toy: bool = False, until: float = math.inf) -> None:
    """A row a way to train, stored at once."""
    what = "toy" if toy else f"BERT-base-sized, batch {BATCH}, bf16, sentences of rotten-tomatoes"
    rows = []
    for name, way in WAYS.items():
        row: dict[str, Any] = {"work": what, "method": name}
        if toy and name not in ("ftlib.fit, unpad", "Trainer, bf16, grouped by length"):
            continue
        if time.monotonic() > until:
            row["missing"] = "no time was left"
        else:
            try:
                row |= measured(functools.partial(way, toy), toy)
            except Exception as error:
                row["missing"] = why(error)
        table.replace({"part": "launches"}, rows := [*rows, row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny model, on any device: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    if device().type != "cuda" and not args.toy:
        print("no GPU: the rows stay as they were last measured, with their date")
        return
    all_ways(GpuTable(3, "python tests/benchmarks/launches.py", args.results), args.toy)


if __name__ == "__main__":
    main()
