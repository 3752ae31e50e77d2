"""Part 5 of the GPU day: the tables of several tasks (multitask.py), several trainings at a time.

    python tests/benchmarks/gpu_accuracy.py --pack    # on a machine with data/cache: writes build/gpu-day (under 60 MB)
    python tests/benchmarks/gpu_day.py --part 5       # on the GPU, with what was packed; goes on where it stopped

The pack is what a machine without a network and without `datasets` lacks: MiniLM's weights in float16 with its
tokenizer, the tokenized corpora as gzipped JSON, and seqeval, which is a few files of Python.  A step of these sizes
keeps a GPU busy for a fraction of the time, so several processes train at once.
"""

import argparse
import functools
import gzip
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import multitask
from record import RESULTS, side_by_side

import ftlib

PACK = Path(__file__).parents[2] / "build" / "gpu-day"
LIMIT = 60 * 10**6  # bytes
CORPORA = ("atis", *multitask.CORPORA)


def _seqeval(folder: Path) -> None:
    """Beside the data: the F1 of slots is seqeval's."""
    if found := importlib.util.find_spec("seqeval"):
        source = Path(found.origin).parent
        shutil.copytree(source, folder / "packages" / "seqeval", ignore=shutil.ignore_patterns("__pycache__"))


def _write(folder: Path, corpus: str, heads: dict[str, list], rows: dict[str, list[dict]]) -> None:
    with gzip.open(folder / f"{corpus}.json.gz", "wt", encoding="utf-8") as file:
        json.dump({"heads": heads, "rows": rows}, file)


def toy_pack(folder: Path) -> Path:
    """The same corpora as a few made-up rows, and no model."""
    kinds = {"slots": ["token-classification", 3, ["O", "B-x", "I-x"]], "similarity": ["regression", 1, None]}
    for corpus in CORPORA:
        tasks, rows = multitask.ATIS if corpus == "atis" else (corpus,), []
        for place in range(24):
            ids = [5 + (7 * place + k) % 50 for k in range(3 + place % 5)]
            labels = {"slots": [k % 3 for k in ids], "similarity": place / 4}
            labels = {task: labels.get(task, place % 3) for task in tasks}
            rows.append({"input_ids": ids, "labels": labels if corpus == "atis" else labels[corpus]})
        heads = {task: kinds.get(task, ["sequence-classification", 3, None]) for task in tasks}
        _write(folder, corpus, heads, dict.fromkeys(("train", "validation", "test"), rows))
    _seqeval(folder)
    return folder


def pack(folder: Path = PACK) -> Path:
    """Write all of it, in a folder aside that then takes the place of the old one."""
    from ftlib.inputs import assets

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = Path(work, "made")
        ftlib.load_model("minilm").half().save_pretrained(made / "model")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(assets.path("minilm") / name, made / "model" / name)
        for corpus in CORPORA:
            heads, tokens = multitask.heads_and_rows(corpus)
            described = {name: [head.task, head.num_labels, head.label_names] for name, head in heads.items()}
            _write(made, corpus, described, {split: [dict(row) for row in rows] for split, rows in tokens.items()})
        _seqeval(made)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if size > LIMIT:
            raise ValueError(f"the pack has {size / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f}")
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    print(f"{folder}: {size / 1e6:.1f} MB", flush=True)
    return folder


def use(folder: Path, settings: dict[str, Any] | None = None) -> None:
    """Let multitask.py take model and corpora from a pack, in this process."""

    @functools.cache
    def heads_and_rows(corpus: str) -> tuple[dict[str, ftlib.Head], dict[str, Any]]:
        with gzip.open(folder / f"{corpus}.json.gz", "rt", encoding="utf-8") as file:
            content = json.load(file)
        heads = {name: ftlib.Head(task, count, labels and tuple(labels)) for name, (task, count, labels) in
                 content["heads"].items()}  # fmt: skip
        return heads, content["rows"]

    for name, value in (
        {"MODEL": str(folder / "model")} | (settings or {}) | {"heads_and_rows": heads_and_rows}
    ).items():
        setattr(multitask, name, value)
    if str(folder / "packages") not in sys.path:
        sys.path.append(str(folder / "packages"))


def all_items(results: Path = RESULTS, *, folder: Path = PACK, until: float = math.inf) -> None:
    """Make what the table lacks until the time is over."""
    if not (folder / "model").is_dir():
        raise FileNotFoundError(
            f"no pack in {folder}: run python tests/benchmarks/gpu_accuracy.py --pack where data/cache is, bring it"
        )
    use(folder)
    workers = max(1, (os.cpu_count() or 2) - 2)
    side_by_side(multitask.table(results), multitask.jobs(), workers=workers, until=until, start=(use, folder))


def toy(results: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        use(toy_pack(Path(folder)), multitask.TOY)
        side_by_side(multitask.table(results), multitask.jobs(), workers=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", action="store_true", required=True, help="write build/gpu-day")
    parser.parse_args()
    pack()


if __name__ == "__main__":
    main()
