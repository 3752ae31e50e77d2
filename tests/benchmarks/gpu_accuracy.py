"""Part 5 of the GPU day: the tables of strategies and of several tasks, at full size, with five seeds.

    python tests/benchmarks/gpu_accuracy.py --pack    # on a machine with data/cache: writes build/gpu-day (under 60 MB)
    python tests/benchmarks/gpu_day.py --part 5       # on the GPU, with what was packed; goes on where it stopped

The pack is what a machine without a network and without `datasets` lacks: MiniLM's weights in float16 with its
tokenizer, the tokenized corpora as gzipped JSON, and seqeval, which is a few files of Python.  A step of these sizes
keeps a GPU busy for a fraction of the time, so several processes train at once; one, which they send their rows to,
writes them down as they come.
"""

import argparse
import gzip
import heapq
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import multitask
import strategies
import torch
from bert_base import TOY, why
from record import GpuTable

import ftlib

PACK = Path(__file__).parents[2] / "build" / "gpu-day"
SEEDS = 5
LIMIT = 60 * 10**6  # bytes


# ------------------------------------------------------------------------------------------------------ the pack


def _write(folder: Path, name: str, splits: dict[str, Any], **about: Any) -> None:
    rows = {split: [dict(row) for row in part] for split, part in splits.items()}
    with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
        json.dump({"rows": rows, **about}, file)


def _read(folder: Path, name: str) -> dict[str, Any]:
    with gzip.open(folder / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def _heads(heads: dict[str, ftlib.Head]) -> dict[str, list]:
    return {name: [head.task, head.num_labels, head.label_names] for name, head in heads.items()}


def _seqeval(folder: Path) -> None:
    """Beside the data: the F1 of slots is seqeval's."""
    if found := importlib.util.find_spec("seqeval"):
        source = Path(found.origin).parent
        shutil.copytree(source, folder / "packages" / "seqeval", ignore=shutil.ignore_patterns("__pycache__"))


def pack(folder: Path = PACK) -> Path:
    """Write all of it, in a folder aside that then takes the place of the old one."""
    from ftlib.inputs import assets

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = Path(work, "made")
        ftlib.load_model("minilm").half().save_pretrained(made / "model")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(assets.path("minilm") / name, made / "model" / name)
        for corpus in strategies.SIZES:
            _write(made, f"strategies-{corpus}", strategies.tokenized(corpus))
        heads, tokens = multitask.atis()
        _write(made, "atis", tokens, heads=_heads(heads))
        heads, tokens = multitask.classes(multitask.CORPORA)
        for name, splits in tokens.items():
            _write(made, f"task-{name}", {s: splits[s] for s in ("train", "test")}, heads=_heads({name: heads[name]}))
        _seqeval(made)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if size > LIMIT:
            raise ValueError(f"the pack has {size / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f}")
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    print(f"{folder}: {size / 1e6:.1f} MB", flush=True)
    return folder


def toy_pack(folder: Path) -> Path:
    """The same files, tiny and random."""
    import transformers

    torch.manual_seed(0)
    sizes = TOY | {"vocab_size": 64, "max_position_embeddings": 40}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder / "model")
    for corpus in strategies.SIZES:
        rows = [{"input_ids": [2, 5 + i % 50, 7 + i % 9, 3], "labels": i % 2} for i in range(48)]
        _write(folder, f"strategies-{corpus}", {"train": rows, "validation": rows[:8], "test": rows[:8]})
    heads, rows = multitask.toy(("intent", "slots"))
    _write(folder, "atis", {"train": rows * 5, "test": rows}, heads=_heads(heads))
    heads, rows = multitask.toy(tuple(multitask.CORPORA))
    for name, head in heads.items():
        own = multitask.picked(rows, [name]) * 5
        _write(folder, f"task-{name}", {"train": own, "test": own[:8]}, heads=_heads({name: head}))
    _seqeval(folder)
    return folder


class Packed:
    """The data of a pack, read when asked for."""

    def __init__(self, folder: Path):
        self.folder, self.read = folder, {}
        strategies.MODEL = multitask.MODEL = str(folder / "model")
        if str(folder / "packages") not in sys.path:
            sys.path.append(str(folder / "packages"))

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.read:
            self.read[name] = _read(self.folder, name)
        return self.read[name]

    def strategies(self, corpus: str) -> dict[str, list]:
        return self[f"strategies-{corpus}"]["rows"]

    def tasks(self, part: str) -> tuple[dict[str, ftlib.Head], Any]:
        """(heads, tokens), as `multitask.atis` and `multitask.classes` return them."""
        names = ["atis"] if part == "methods-atis" else [f"task-{name}" for name in multitask.CORPORA]
        heads = {
            name: ftlib.Head(task, count, labels and tuple(labels))
            for file in names
            for name, (task, count, labels) in self[file]["heads"].items()
        }
        if part == "methods-atis":
            return heads, self["atis"]["rows"]
        return heads, {name: self[f"task-{name}"]["rows"] for name in multitask.CORPORA}


# ---------------------------------------------------------------------------------------------- what is to be done


class Item(NamedTuple):
    """A few rows of a table, made one after the other in one process; smaller ranks come first."""

    rank: tuple[int, int, int]
    table: str  # "strategies-<corpus>", or the part of multitask.py
    seed: int
    what: Any  # a strategy, a method, or pairs of tasks: () for the single tasks


def items(size: str, seeds: int) -> list[Item]:
    """Everything, the most valuable first: both tables of strategies, then several tasks, cheap parts first."""
    found = []
    for seed in range(seeds):
        for corpus in strategies.SIZES:
            names = list(strategies.STRATEGIES)[: 1 if size == "dry" else None]
            found += [Item((0, seed, i), f"strategies-{corpus}", seed, name) for i, name in enumerate(names)]
        for rank, part in ((1, "methods-atis"), (3, "methods-four")):
            names = [name for name in multitask.METHODS if "TorchJD" not in name][:: 4 if size == "dry" else 1]
            found += [Item((rank, seed, i), part, seed, name) for i, name in enumerate(names)]
        found.append(Item((2, seed, 0), "transfer", seed, ()))
        pairs = list(itertools.combinations(multitask.CORPORA, 2))[: 1 if size == "dry" else None]
        found += [Item((2, seed, 1 + i), "transfer", seed, (pair,)) for i, pair in enumerate(pairs)]
    return found


def needs(item: Item) -> Callable[[Item], bool]:
    """Which items must be done before: of a strategy the search for its rate, of a pair the tasks alone."""
    if item.table.startswith("strategies"):
        return lambda other: other.table == item.table and other.what == item.what and other.seed == 0 < item.seed
    pair = item.table == "transfer" and item.what
    return lambda other: bool(pair) and other.table == "transfer" and other.seed == item.seed and not other.what


class Rows:
    """Stands in for a results table: rows that are known are given, new ones are sent to the one who writes."""

    def __init__(self, table: str, known: list[dict], send: Callable[[dict], Any]):
        self.table, self.known, self.send = table, known, send

    def row(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = {"table": self.table, **key}
        for row in self.known:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = json.loads(json.dumps({**key, **measure()}))
        self.known.append(row)
        self.send(row)
        return row


_worker: dict[str, Any] = {}  # of this process


def begin(folder: Path, size: str, queue: Any) -> None:
    torch.set_num_threads(1)
    _worker.update(packed=Packed(folder), size=size, queue=queue)


def do(item: Item, known: list[dict]) -> None:
    """Make an item's rows, in a process that has begun; what fails becomes a row that says why."""
    packed, size, send = _worker["packed"], _worker["size"], _worker["queue"].put
    table, seeds = Rows(item.table, known, send), (item.seed,)
    try:
        if item.table.startswith("strategies"):
            corpus = item.table.removeprefix("strategies-")
            if size == "dry":
                strategies.SIZES[corpus] = {8: (4, 1), 16: (8, 1)}
            strategies.accuracies(corpus, seeds, [item.what], packed.strategies(corpus), table)
        elif item.table == "transfer":
            multitask.transfer(table, seeds, size, given=packed.tasks("transfer"), pairs=item.what)
        else:
            given = packed.tasks(item.table)
            multitask.methods(table, seeds, item.table, size, given=given, only=(item.what,))
    except Exception as error:
        send({"table": item.table, "seed": item.seed, "what": str(item.what), "missing": why(error)})


def all_items(
    table: GpuTable, *, folder: Path = PACK, workers: int | None = None, size: str = "full", seeds: int = SEEDS,
    until: float = float("inf"),
) -> None:  # fmt: skip
    """Make what the table lacks, several items at a time, until the time is over; rows are written as they come."""
    if not (folder / "model").is_dir():
        missing = "no pack: run python tests/benchmarks/gpu_accuracy.py --pack where data/cache is, bring build/gpu-day"
        table.replace({"table": "all"}, [{"missing": missing}])
        return
    workers = workers or max(1, min(8, (os.cpu_count() or 2) // 2))
    table.replace({"table": "all"}, [])
    known = [row for row in table.content["rows"] if "missing" not in row]
    table.content["rows"] = known
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        queue = manager.Queue()
        with ProcessPoolExecutor(workers, context, begin, (folder, size, queue)) as pool:
            try:
                schedule(items(size, seeds), pool, workers, known, queue, table, until)
            finally:
                for process in [*(pool._processes or {}).values()]:  # in the middle of a row that would come too late
                    process.kill()


def schedule(
    todo: list[Item], pool: Any, workers: int, known: list[dict], queue: Any, table: GpuTable, until: float
) -> None:
    """Give items to free processes in their order, each once what it needs is done."""
    heapq.heapify(todo)
    running: dict[Future, Item] = {}

    def drain() -> None:
        while not queue.empty():
            row = {**queue.get(), **table.stamp}
            known.append(row)
            table.add(row)

    while (todo or running) and time.monotonic() < until:
        blocked, waiting = [], [*running.values(), *todo]
        while todo and len(running) < workers:
            item = heapq.heappop(todo)
            if any(map(needs(item), waiting)):
                blocked.append(item)
                continue
            own = [row for row in known if row["table"] == item.table]
            running[pool.submit(do, item, own)] = item
        for item in blocked:
            heapq.heappush(todo, item)
        done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        drain()
        for future in done:
            del running[future]
            if error := future.exception():  # a process has died, and with it the pool
                table.add({"table": "all", "missing": why(error), **table.stamp})
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", action="store_true", required=True, help="write build/gpu-day")
    parser.parse_args()
    pack()


if __name__ == "__main__":
    main()
