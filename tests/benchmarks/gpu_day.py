"""Everything that needs a GPU, in one call of at most nine minutes: one JSON a part, written as it goes.

    python tests/benchmarks/gpu_day.py                               # all parts, results into tests/benchmarks/results
    python tests/benchmarks/gpu_day.py --part 1,2 --results $OUT     # these parts, results into that folder
    python tests/benchmarks/gpu_day.py --toy --results /tmp/x        # every part with tiny models, on any machine

1 tests      the tests that need CUDA; failures are listed with their messages
2 speed      BERT-base's size in bf16 against the Trainer and `encode` (bert_base.py)
3 profile    a step too small for its GPU: where the time goes, and who waits (launches.py)
4 memory     the peak of every remedy (memory.py)
5 accuracy   several tasks, every way with its own rate and five seeds, into multitask.json (gpu_accuracy.py); needs
             its pack, goes on where it stopped: what an earlier call found is taken from --results or --earlier
6 decoders   a Llama of 1.2 billion parameters, LoRA and in full, against TRL and a plain loop (llama_1b.py)

Needs torch, transformers and ftlib's folder; accelerate, sentence-transformers, scikit-learn, scipy, pytest, hypothesis
and peft for what is compared with or tested by them, trl and `datasets` for TRL's rows.  No network.  Each part is a
process with its own limit of time, so none can take the others along; what a part leaves of its time the later ones
get.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
SHARES = {1: 85, 2: 220, 3: 70, 4: 40, 6: 75, 5: 35}  # seconds of TOTAL; what one leaves the later ones get
TOTAL = 525
TESTS = (
    "tests/test_cuda.py", "tests/engine/test_checkpoints.py", "tests/engine/test_compiling.py",
    "tests/engine/test_distributed.py", "tests/methods/test_features.py", "tests/methods/test_unpadding.py",
    "tests/methods/test_unpadding_decoders.py",
    "tests/show/test_setup.py",
)  # fmt: skip
NAMED = "cuda or gpu"


# ------------------------------------------------------------------------------------- the parts, in their processes


class Recorder:
    """A plugin of pytest that stores every test as it ends; an error while collecting counts as a failed test."""

    def __init__(self, table: Any):
        self.table, self.next = table, 0.0
        table.content["rows"] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            said = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else report.longreprtext
            self.add(report.nodeid, report.outcome, report.duration, said)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.add(report.nodeid, "failed", 0.0, report.longreprtext)

    def add(self, test: str, outcome: str, seconds: float, said: str) -> None:
        row = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "message": said[-2500:]}
        self.table.content["rows"].append(row | self.table.stamp)
        if outcome == "failed" or time.monotonic() > self.next:
            self.store()

    def store(self) -> None:
        self.table.replace({"test": ""}, [])  # writes what there is; no test has no name
        self.next = time.monotonic() + 1

    def pytest_sessionfinish(self) -> None:
        self.store()


def part_1(toy: bool, results: Path, until: float) -> None:
    import importlib.util

    import pytest
    from record import GpuTable

    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "2"  # of each of the processes below: as many threads as cores in all
    table = GpuTable(1, "python tests/benchmarks/gpu_day.py --part 1", results)
    several = ["-n", "8"] if importlib.util.find_spec("xdist") and not toy else []
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short", *several, "-k", NAMED]
    pytest.main([*TESTS, *options], plugins=[Recorder(table)])


def part_2(toy: bool, results: Path, until: float) -> None:
    import bert_base
    from record import GpuTable

    compiler = shutil.which("cc") or shutil.which("gcc")
    args = argparse.Namespace(toy=toy, rounds=1 if toy else 3, no_compile=compiler is None)
    works = {name: 1.0 for name in (*bert_base.WORKS,)[::3]} if toy else bert_base.WORKS
    for name, share in works.items():
        table = GpuTable(2, f'python tests/benchmarks/gpu_day.py --part 2 ("{name}")', results)
        bert_base.measure(name, args, table, time.monotonic() + share * max(until - time.monotonic(), 0))


def part_3(toy: bool, results: Path, until: float) -> None:
    import launches
    from record import GpuTable

    launches.all_ways(GpuTable(3, "python tests/benchmarks/gpu_day.py --part 3", results), toy, until)


def part_4(toy: bool, results: Path, until: float) -> None:
    import memory
    from record import GpuTable

    table = GpuTable(4, "python tests/benchmarks/gpu_day.py --part 4", results)
    memory.on_the_gpu(table, toy, 2 if toy else 4, until)


def part_5(toy: bool, results: Path, until: float) -> None:
    import gpu_accuracy

    gpu_accuracy.toy(results) if toy else gpu_accuracy.all_items(results, until=until)


def part_6(toy: bool, results: Path, until: float) -> None:
    import llama_1b
    from record import GpuTable

    table = GpuTable(6, "python tests/benchmarks/gpu_day.py --part 6", results)
    llama_1b.measure(table, toy, until, compiled=bool(shutil.which("cc") or shutil.which("gcc")))


PARTS = {1: part_1, 2: part_2, 3: part_3, 4: part_4, 6: part_6, 5: part_5}  # 5 last: it takes all the time there is


# ------------------------------------------------------------------------------------------------ all of it in turn


def alone(part: int, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run a part as a process of at most `limit` seconds: what came of it."""
    soft = str(max(limit - 8, 1))
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", str(part), "--seconds", soft]
    command += ["--results", str(args.results), *(["--toy"] if args.toy else [])]
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)}
    settings |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "FTLIB_PRECISION"} | settings
    begin = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stderr=said, start_new_session=True)
        try:
            outcome = "done" if process.wait(limit) == 0 else f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # it, and what it left running, is gone already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        said.seek(0)
        words = said.read().decode(errors="replace")[-4000:]
    row = {"part": part, "outcome": outcome, "seconds": round(time.monotonic() - begin, 1), "limit": round(limit)}
    return row | ({} if outcome == "done" else {"said": words})


def whole(args: argparse.Namespace) -> int:
    """The chosen parts one after the other; how many did not come to their end."""
    begin, rows = time.monotonic(), []
    if args.earlier != args.results and not args.toy:
        path = args.earlier / "multitask.json"  # its rows need not be made again
        if path.exists() and not (args.results / path.name).exists():
            shutil.copy(path, args.results)
    for place, part in enumerate(args.part):
        left = args.seconds - (time.monotonic() - begin)
        limit = left * SHARES[part] / sum(SHARES[later] for later in args.part[place:])
        print(f"--- part {part}, {limit:.0f} s at most", flush=True)
        rows.append(alone(part, args, limit))
        print(json.dumps(rows[-1]), flush=True)
        command = " ".join(["python tests/benchmarks/gpu_day.py", *sys.argv[1:]])
        content = {"about": "What came of each part of the GPU day", "command": command, "rows": rows}
        (args.results / "gpu-day-log.json").write_text(json.dumps(content, indent=1) + "\n")
    return sum(row["outcome"] != "done" for row in rows)


def numbers(text: str) -> list[int]:
    return sorted({int(word) for word in text.split(",")})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=numbers, default=[*PARTS], help="parts by number, e.g. 1,2; default: all")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all parts together ({TOTAL})")
    parser.add_argument("--toy", action="store_true", help="tiny models, on any machine: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--earlier", type=Path, default=RESULTS, help="folder with part 5 of an earlier call")
    parser.add_argument("--alone", type=int, choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.part) - set(PARTS):
        parser.error(f"no part {unknown.pop()}; there are {', '.join(map(str, PARTS))}")
    if args.toy and args.results.resolve() == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    args.results.mkdir(parents=True, exist_ok=True)
    args.results, args.earlier = args.results.resolve(), args.earlier.resolve()
    if args.alone:
        PARTS[args.alone](args.toy, args.results, time.monotonic() + args.seconds)
        return 0
    import torch

    if not torch.cuda.is_available() and not args.toy:
        print("no GPU here, so nothing was measured; tests/benchmarks/README.md says how to run this on a rented one")
        return 0
    return whole(args)


if __name__ == "__main__":
    sys.exit(main())
