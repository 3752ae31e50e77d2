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
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import multitask
from record import RESULTS, Table, side_by_side

import ftlib

PACK = Path(__file__).parents[2] / "build" / "gpu-day"
LIMIT = 60 * 10**6  # bytes
CORPORA = ("atis", *multitask.CORPORA)


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
        for corpus in CORPORA:
            heads, tokens = multitask.heads_and_rows(corpus)
            content = {
                "heads": {name: [head.task, head.num_labels, head.label_names] for name, head in heads.items()},
                "rows": {split: [dict(row) for row in rows] for split, rows in tokens.items()},
            }
            with gzip.open(made / f"{corpus}.json.gz", "wt", encoding="utf-8") as file:
                json.dump(content, file)
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


def all_items(toy: bool, results: Path = RESULTS, *, folder: Path = PACK, until: float = float("inf")) -> None:
    """Make what the table lacks until the time is over."""
    if not (folder / "model").is_dir():
        raise FileNotFoundError(
            f"no pack in {folder}: run python tests/benchmarks/gpu_accuracy.py --pack where data/cache is, bring it"
        )
    settings = multitask.TOY if toy else {}
    use(folder, settings)
    table = Table("multitask", "python tests/benchmarks/multitask.py", multitask.ABOUT, folder=results)
    workers = 0 if toy else max(1, (os.cpu_count() or 2) - 2)
    side_by_side(table, multitask.jobs(), workers=workers, until=until, start=(use, folder, settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", action="store_true", required=True, help="write build/gpu-day")
    parser.parse_args()
    pack()


if __name__ == "__main__":
    main()
