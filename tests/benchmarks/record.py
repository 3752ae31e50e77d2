"""Results files: what was measured, on what, when, with which versions and by which command."""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "datasets", "scikit-learn", "accelerate", "sentence-transformers", "onnxruntime")


def subset(rows: Any, count: int | None, seed: int = 0) -> Any:
    """So many rows of a Dataset or a list, chosen by the seed; None: all, in its order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[:count]
    return rows.select(order) if hasattr(rows, "select") else [rows[place] for place in order]


FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # from the widest-spread to the one that tells most


def cpu() -> tuple[str, list[str]]:
    """The CPU's model, without its maker's decorations, and which of FLAGS it has; elsewhere than on Linux none."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    found = dict(re.findall(r"^(model name|flags)\s*: (.*)", text, re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\b(CPU|Processor|[\w-]+-Core)\b|@.*", " ", name)
    return " ".join(name.split()), [flag for flag in FLAGS if flag in found.get("flags", "").split()]


def device_name() -> str:
    """The GPU if there is one, else the CPU: "CPU, 2 cores, AMD EPYC (avx2, avx512f, avx512_bf16)"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model, flags = cpu()
    return f"CPU, {os.cpu_count()} cores, {model}" + (f" ({', '.join(flags)})" if flags else "")


def device_slug() -> str:
    """nvidia-h200, or cpu-2-cores-amd-epyc-avx512-bf16: the device as part of a file name, of the flags the last."""
    model, flags = cpu()
    name = f"cpu {os.cpu_count()} cores {model} {''.join(flags[-1:])}"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return found


class Table:
    """Rows of one results file, <folder>/<name>.json, keyed by what was varied."""

    def __init__(
        self, name: str, command: str, about: str, *, packages: tuple[str, ...] = PACKAGES[:4], folder: Path = RESULTS
    ):
        self.path = folder / f"{name}.json"
        self.content = json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}
        self.stamp = {
            "device": device_name(),
            "date": datetime.date.today().isoformat(),
            "versions": installed(packages),
        }
        self.content |= {"about": about, "command": command}

    def row(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row for `key`, measured now unless the file has it."""
        for row in self.content["rows"]:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {**key, **measure(), **self.stamp}
        self.add(row)
        return row

    def add(self, row: dict[str, Any]) -> None:
        """A row that has its stamp."""
        self._write([*self.content["rows"], row])
        self._show(row)

    def best_rate(self, key: dict[str, Any], rates: tuple, measure: Callable, value: Callable) -> float:
        """The learning rate whose row has the largest `value(row)`, none of the ends of what was tried.

        measure: of a rate.  At first `rates` are tried, then on by factors of two; a single one is taken as it is.
        """
        rates = list(rates)
        while True:
            rows = [self.row(key | {"rate": rate}, lambda rate=rate: measure(rate)) for rate in rates]
            best = max(rows, key=value)["rate"]
            if len(rates) == 1 or rates[0] < best < rates[-1]:
                return best
            rates = [rates[0] / 2, *rates] if best == rates[0] else [*rates, rates[-1] * 2]

    def replace(self, key: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Put `rows` in place of all rows of `key`: numbers of one comparison are measured together or not at all."""
        others = [r for r in self.content["rows"] if any(r.get(name) != value for name, value in key.items())]
        new = [{**key, **row, **self.stamp} for row in rows]
        self._write([*others, *new])
        for row in new:
            self._show(row)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.content["rows"] = rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps(self.content, indent=1) + "\n")
        aside.replace(self.path)

    def _show(self, row: dict[str, Any]) -> None:
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k not in self.stamp}
        print(shown, flush=True)


class Job(NamedTuple):
    """Something to do for a table: function(table, *arguments), once the job named `after` is done."""

    name: str
    call: tuple
    after: str | None = None


class _Sent(Table):
    """A table as a process that makes rows has it: it knows rows, and what it makes goes to the one who writes."""

    def __init__(self, rows: list[dict], send: Callable[[dict], Any]):
        self.content, self.stamp, self.send = {"rows": rows}, {}, send

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.content["rows"] = rows
        self.send(rows[-1])

    def _show(self, row: dict[str, Any]) -> None: ...


def _begin(start: tuple) -> None:
    torch.set_num_threads(1)
    if start:
        start[0](*start[1:])


def _do(call: tuple, rows: list[dict], send: Callable[[dict], Any]) -> None:
    call[0](_Sent(rows, send), *call[1:])


def side_by_side(
    table: Table, jobs: list[Job], *, workers: int = 2, until: float = math.inf, start: tuple = ()
) -> None:
    """Do all jobs, the first first and several at a time, in processes of one thread; rows are written as they come.

    workers: 0: one after the other, in this process.  until: (monotonic seconds) what is not done then is left.
    start: (function, *arguments) to call once in every process.  Of what fails the first error is raised at the end.
    """
    if not workers:
        for job in jobs:
            job.call[0](table, *job.call[1:])
        return
    waiting, running, undone, errors = [*jobs], {}, {job.name for job in jobs}, []
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(workers, context, _begin, (start,)) as pool:
        queue = manager.Queue()
        try:
            while (waiting or running) and time.monotonic() < until:
                ready = [job for job in waiting if job.after not in undone][: workers - len(running)]
                for job in ready:
                    running[pool.submit(_do, job.call, table.content["rows"], queue.put)] = job
                    waiting.remove(job)
                if not running:  # what the rest waits for has failed
                    break
                done: set[Future] = wait(running, 1.0, FIRST_COMPLETED)[0]
                while not queue.empty():
                    table.add({**queue.get(), **table.stamp})
                for future in done:
                    job = running.pop(future)
                    if error := future.exception():
                        errors.append(error)
                    else:
                        undone.remove(job.name)
        finally:
            for process in [*(pool._processes or {}).values()]:  # in the middle of a row that would come too late
                process.kill()
    if errors:
        raise errors[0]


def started(program: dict[str, Any], about: str) -> Table:
    """The table of a program that knows --toy, which puts its TOY in place of its own settings, and --results.

    program: the `globals()` of the file tests/benchmarks/<name>.py, whose rows are in <name>.json.
    """
    name = Path(program["__file__"]).stem
    parser = argparse.ArgumentParser(description=program["__doc__"].splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a few rows and steps, to see it run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results file")
    given = parser.parse_args()
    program.update(program["TOY"] if given.toy else {})
    return Table(name, f"python tests/benchmarks/{name}.py", about, folder=given.results)


class SpeedTable(Table):
    """results/speed-<device>.json: rows of all speed programs on one device; every row names its own command."""

    def __init__(self, command: str, folder: Path = RESULTS):
        about = "ftlib against the stock tools, same work, paired rounds"
        super().__init__(f"speed-{device_slug()}", "make bench", about, packages=PACKAGES, folder=folder)
        self.stamp |= {"command": command, "threads": torch.get_num_threads()}


PARTS = {1: "tests", 2: "speed", 3: "profile", 4: "memory", 5: "accuracy", 6: "decoders"}  # of the GPU day


class GpuTable(Table):
    """results/gpu-day-<part>-<what>-<device>.json: one part of the GPU day, however it was started."""

    def __init__(self, part: int, command: str, folder: Path = RESULTS):
        about = f"The GPU day, part {part}: {PARTS[part]}"
        name = f"gpu-day-{part}-{PARTS[part]}-{device_slug()}"
        super().__init__(name, command, about, packages=PACKAGES, folder=folder)
        self.stamp |= {"command": command, "threads": torch.get_num_threads()}
        self.shown: set[str] = set()

    def _show(self, row: dict[str, Any]) -> None:
        """Once, and without what is long."""
        text = json.dumps({k: v for k, v in row.items() if k not in self.stamp and not isinstance(v, (dict, list))})
        if text not in self.shown:
            self.shown.add(text)
            print(text, flush=True)
