"""A million rows of 128 tokens in bounded memory: `fit` on a Dataset on disk, and on a list of dicts for comparison.

    python tests/benchmarks/million_rows.py    # rows of results/million_rows.json

What is measured is what the rows cost, so the model is tiny: a BERT of 1 layer, hidden size 32, with random weights,
for 20 steps of 32 shuffled rows.  The ids are random, int32 in an Arrow file that is read memory-mapped; a process for
each kind.  The kernel counts a mapped file's pages as resident, but takes them back when it needs room, so there are
three peaks: `peak_gb`, all that is resident (the kernel's high-water mark), and, read every 10 ms, `own_gb`, what is
the process's own, and `file_gb`, pages of files.  `model_gb`, `own_model_gb`, `file_model_gb` are the same before there
are rows, `before_gb` before `fit`.  `bytes_a_row`: what `own_gb` grew by, a row.  `check_seconds`: the one pass of
`fit` over all rows; on a busy machine it counts the waiting too.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from record import RESULTS, Table
from transformers import BertConfig, BertForSequenceClassification

import ftlib
from ftlib.engine import fit as training

TOKENS, VOCABULARY, AT_A_TIME = 128, 30_000, 10_000


def now_gb() -> tuple[float, ...]:
    """All that is resident now, what is the process's own, and pages of files, in 10^9 bytes."""
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(said[key].split()[0]) * 1024 / 1e9 for key in ("VmRSS", "RssAnon", "RssFile"))


def written(path: Path, count: int) -> Path:
    """An Arrow file of random rows."""
    draw = np.random.default_rng(0)
    with ArrowWriter(path=str(path)) as writer:
        for start in range(0, count, AT_A_TIME):
            size = min(AT_A_TIME, count - start)
            ids = draw.integers(5, VOCABULARY, size * TOKENS, dtype=np.int32)
            lists = pyarrow.ListArray.from_arrays(np.arange(size + 1, dtype=np.int32) * TOKENS, ids)
            writer.write_table(pyarrow.table({"input_ids": lists, "labels": draw.integers(0, 2, size)}))
        writer.finalize()
    return path


def measured(kind: str, path: Path) -> dict[str, Any]:
    """`fit` in this process, on the rows of that file."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64))
    config = ftlib.TrainConfig(max_steps=20, batch_size=32, progress=False)
    ftlib.fit(model, [{"input_ids": [7] * TOKENS, "labels": 1}] * 32, config=config)  # loads what steps need
    model_gb, own_model_gb, file_model_gb = now_gb()
    rows = Dataset.from_file(str(path))
    if kind == "a list of dicts":
        rows = rows.to_list()
    (before_gb, *_), check, peaks, done = now_gb(), training.parts_for, [], threading.Event()
    training.parts_for = lambda *a, **k: [check(*a, **k), checked.append(time.perf_counter())][0]

    def sample() -> None:
        while not done.wait(0.01):
            peaks.append(now_gb())

    threading.Thread(target=sample, daemon=True).start()
    with ftlib.measure() as cost:
        checked = [time.perf_counter()]
        run = ftlib.fit(model, rows, config=config)
    done.set()
    _, own_gb, file_gb = (max(column) for column in zip(*peaks, strict=True))
    return {
        "model_gb": model_gb, "before_gb": before_gb, "peak_gb": cost.peak_mb * 2**20 / 1e9,
        "own_model_gb": own_model_gb, "own_gb": own_gb, "file_model_gb": file_model_gb, "file_gb": file_gb,
        "disk_gb": path.stat().st_size / 1e9, "bytes_a_row": (own_gb - own_model_gb) * 1e9 / len(rows),
        "check_seconds": checked[1] - checked[0], "seconds": cost.seconds, "steps": run.steps, "threads": 1,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the Dataset; of the list a tenth")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FILE"), help="this kind of rows, in this process")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = "Memory of fit on many rows of 128 tokens, with a tiny random BERT (1 layer, hidden 32)"
    table = Table("million_rows", "python tests/benchmarks/million_rows.py", about, folder=options.results)
    if options.one:
        kind, path = options.one
        return table.replace({"kind": kind, "rows": options.rows}, [measured(kind, Path(path))])
    (build := Path(__file__).parents[2] / "build").mkdir(exist_ok=True)
    for kind, count in {"a Dataset on disk": options.rows, "a list of dicts": options.rows // 10}.items():
        with tempfile.TemporaryDirectory(dir=build) as folder:
            path = str(written(Path(folder) / "rows.arrow", count))
            command = [__file__, "--rows", str(count), "--one", kind, path, "--results", str(options.results)]
            subprocess.run([sys.executable, *command], check=True)


if __name__ == "__main__":
    main()
