"""Rounds of several methods in turn, and what is kept of them: medians, and ratios within a round.

A machine whose speed drifts treats all methods of a round alike, so the ratio of two of them carries over where
their seconds do not.  Right before each method the machine's matrix-product rate is taken.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from roofline import synchronize

Method = Callable[[], dict[str, Any]]  # does the work once: {"seconds": ..., and what else is to be kept}


def timed(work: Callable[[], Any], keep: str) -> dict[str, Any]:
    """Do the work once: {"seconds": ..., keep: what it returned}."""
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return {"seconds": time.perf_counter() - start, keep: result}


def run_rounds(methods: dict[str, Method], rounds: int, rate: Method | None = None) -> dict[str, list[dict[str, Any]]]:
    """All methods in turn, 1 + `rounds` times: {method: [first, ...]}; the first warms up and compiles.

    On a GPU each result gets "peak_gpu_mb": the largest allocation during the work, without what other methods keep
    ("own_bytes": what the method itself had before, its weights).
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for _ in range(rounds + 1):
        for name, method in methods.items():
            now = rate() if rate else {}
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            result = method()
            own = result.pop("own_bytes", 0)
            if torch.cuda.is_available():
                result["peak_gpu_mb"] = (torch.cuda.max_memory_allocated() - before + own) / 2**20
            results[name].append({**result, **{key: now[key] for key in ("rate", "shape", "rate_mm") if key in now}})
    return results


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(
    results: dict[str, list[dict[str, Any]]], *, count: int, against: list[str], flops: float | None = None
) -> list[dict[str, Any]]:
    """A row a method: examples a second, ratio to each method of `against`, utilisation, and the last other values.

    `flops` is the work of a whole run; with it the results need a "rate".
    """
    rows = []
    for name, (first, *measured) in results.items():
        seconds = [r["seconds"] for r in measured]
        row = {"method": name, "per_second": count / statistics.median(seconds), "rounds": len(measured)}
        row["against"] = {
            base: spread([b["seconds"] / s for b, s in zip(results[base][1:], seconds, strict=True)])
            for base in against
            if base in results
        }
        if flops:
            row["utilisation"] = spread([flops / (r["seconds"] * r["rate"]) for r in measured])
            if "rate_mm" in first:
                row["utilisation_mm"] = spread([flops / (r["seconds"] * r["rate_mm"]) for r in measured])
                row["gflops_mm"] = statistics.median(r["rate_mm"] for r in measured) / 1e9
            row["gflops_peak"] = statistics.median(r["rate"] for r in measured) / 1e9
            row["peak_shape"] = statistics.mode(r["shape"] for r in measured)
        skip = ("seconds", "rate", "shape", "rate_mm")
        rows.append({**row, "seconds": seconds, "first_seconds": first["seconds"],
                     **{key: value for key, value in measured[-1].items() if key not in skip}})  # fmt: skip
    return rows


def alone(script: str, *arguments: str) -> dict[str, Any]:
    """Run `script ARGUMENTS` in a process of its own and read the JSON of its last line.

    Peaks of resident memory are taken so: a method does not inherit what another one left in the process.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=dict(os.environ), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])
