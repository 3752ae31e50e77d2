"""Execute the notebooks in fresh kernels of this environment and say what each one took.

python tests/notebooks/run.py [--solutions] [--refresh] [--twice] [--list] [NN ...]
  NN           the notebook of this number (03, 03b), or those whose file name starts so (03_par); none: all of them
  --solutions  the notebooks of notebooks/solutions/ too
  --refresh    write the executed notebooks back into notebooks/, without what differs from machine to machine
  --twice      each a second time in a new kernel; outputs that the tests compare must be the same again
  --list       print the paths of the chosen ones, run nothing

Each runs in an empty working directory, as a reader may start it anywhere; build/notebooks/ gets the copies.
Ends with a table (notebook, seconds, peak memory, result), and with exit status 1 when a notebook fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import cells
import ipykernel.kernelspec
import nbformat
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

BUILD = cells.ROOT / "build" / "notebooks"
CELL_SECONDS = 1200


@dataclass
class Outcome:
    name: str
    seconds: float
    peak_mb: float
    result: str


class ThisPython(KernelSpecManager):
    """Every kernel name means the Python that runs this file, whatever kernels the user has registered."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=ipykernel.kernelspec.RESOURCES, **ipykernel.kernelspec.get_kernel_dict())


class ThisPythonManager(AsyncKernelManager):
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return ThisPython(parent=self)


class MemoryWatch(threading.Thread):
    """Samples the resident memory of all kernels below this process; `.peak_mb` is the most seen together."""

    def __init__(self, seconds_between: float = 0.1):
        super().__init__(daemon=True)
        self.peak_mb, self._between, self._stopped = 0.0, seconds_between, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._between):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it ended between the listing and the look
                    continue
            self.peak_mb = max(self.peak_mb, total / 2**20)

    def stop(self) -> float:
        self._stopped.set()
        self.join()
        return self.peak_mb


def progress(text: str, *, final: bool = False) -> None:
    """One line a notebook: rewritten in place on a terminal, printed once at the end elsewhere."""
    if sys.stdout.isatty():
        print(f"\r\x1b[2K{text}", end="\n" if final else "", flush=True)
    elif final:
        print(text, flush=True)


def execute(path: Path, label: str) -> tuple[nbformat.NotebookNode, Outcome]:
    """Run one notebook top to bottom; the outcome's `result` is "ok" or what failed where."""
    notebook = nbformat.read(path, as_version=4)
    numbers = {id(cell): number for number, cell in enumerate(notebook.cells, 1)}
    started, watch, result = time.perf_counter(), MemoryWatch(), "ok"
    current = notebook.cells[0] if notebook.cells else None

    def on_cell(cell, cell_index):
        nonlocal current
        current = cell
        spent = time.perf_counter() - started
        progress(f"{label}  cell {cell_index + 1} of {len(notebook.cells)}  {spent:.0f} s")

    if not sys.stdout.isatty():
        print(f"{label}  …", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(
            notebook,
            kernel_manager_class=ThisPythonManager,
            timeout=CELL_SECONDS,
            startup_timeout=120,
            store_widget_state=False,
            record_timing=False,
            resources={"metadata": {"path": scratch}},
            on_cell_execute=on_cell,
        )
        watch.start()
        try:
            seen = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # Agg leaves no pictures
            client.execute(stderr=subprocess.DEVNULL, env=seen)  # the kernel's own log, not the cells' output
            result = unraised(notebook) or result
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            result = describe(error, current, numbers.get(id(current), 0))
        finally:
            peak = watch.stop()
    return notebook, Outcome(path.stem, time.perf_counter() - started, peak, result)


def unraised(notebook: nbformat.NotebookNode) -> str:
    """A cell tagged raises-exception that raised nothing is a failure too."""
    for number, cell in enumerate(notebook.cells, 1):
        raised = any(output.output_type == "error" for output in cell.get("outputs", ()))
        if "raises-exception" in cells.tags(cell) and not raised:
            return f"cell {number} is tagged raises-exception but raised nothing\n\n{indent(cell.source)}"
    return ""


def describe(error: Exception, cell: nbformat.NotebookNode, number: int) -> str:
    """The failing cell's number, source and error, without colours."""
    traces = [output.traceback for output in cell.get("outputs", ()) if output.output_type == "error"]
    if isinstance(error, CellExecutionError) and traces:
        what = "\n".join(cells.ANSI.sub("", "\n".join(traces[-1])).splitlines()[-25:])
    else:
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"cell {number} failed\n\n{indent(cell.source)}\n\n{indent(what)}"


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def clean(notebook: dict) -> dict:
    """A notebook without what differs from machine to machine or from run to run: editor metadata, widgets,
    stderr, progress bars, the folders in tracebacks. Cell ids come from the cells' content."""
    notebook = dict(notebook, metadata=cells.METADATA, nbformat=4, nbformat_minor=5)
    for cell in notebook["cells"]:
        kept = cell.get("metadata", {}).get("tags")
        cell["metadata"] = {"tags": kept} if kept else {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [tidy(output) for output in merge_streams(cell["outputs"]) if keeps(output)]
    cells.name_cells(notebook)
    return notebook


def merge_streams(outputs: list[dict]) -> list[dict]:
    """Join consecutive prints, which a kernel sends in pieces of any size."""
    merged: list[dict] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            last["text"] += output["text"]
        else:
            merged.append(dict(output))
    return merged


def keeps(output: dict) -> bool:
    if output["output_type"] == "stream" and output["name"] == "stderr":
        return False
    widget = any("widget" in mime for mime in output.get("data", ()))
    return not widget and not cells.is_progress_bar(cells.output_text(output))


def tidy(output: dict) -> dict:
    """Show library files by their place in the library: no reader has this machine's folders."""
    if output["output_type"] == "stream":
        output["text"] = portable(output["text"]).splitlines(keepends=True)
    if output["output_type"] == "error":
        output["traceback"] = [portable(line) for line in output["traceback"]]
        output["evalue"] = portable(output["evalue"])
    if "data" in output:
        kept = {mime: own.get("alt") for mime, own in output.get("metadata", {}).items() if isinstance(own, dict)}
        output["metadata"] = {mime: {"alt": text} for mime, text in kept.items() if text}  # for screen readers
        output["data"] = {
            mime: body.splitlines(keepends=True) if mime.startswith("text/") else body
            for mime, body in output["data"].items()
        }
    return output


def portable(text: str) -> str:
    text = re.sub(r"(?:~|/|[A-Z]:\\)[^\s:'\"()]*(?:site-packages|lib[/\\]python3\.\d+)[/\\]", "", text)
    return text.replace(f"{cells.ROOT}/", "").replace(str(Path.home()), "~")


def changed(first: nbformat.NotebookNode, second: nbformat.NotebookNode) -> str:
    """The first cell whose output is compared by the tests and is another the second time, "" where there is none."""
    shown = [
        [
            "".join(map(cells.output_text, cell["outputs"])) if cells.COMPARED in cells.tags(cell) else ""
            for cell in clean(json.loads(json.dumps(notebook)))["cells"]
        ]
        for notebook in (first, second)
    ]
    for number, (before, after) in enumerate(zip(*shown, strict=True), 1):
        if before != after:
            return f"cell {number} gives another output the second time\n\n{indent(before)}\n\n{indent(after)}"
    return ""


def table(outcomes: list[Outcome]) -> str:
    width = max(len("notebook"), *(len(outcome.name) for outcome in outcomes))
    rows = [f"{'notebook':<{width}}  {'seconds':>7}  {'peak MB':>7}  result"]
    for outcome in outcomes:
        result = outcome.result.splitlines()[0]
        rows.append(f"{outcome.name:<{width}}  {outcome.seconds:7.1f}  {outcome.peak_mb:7.0f}  {result}")
    rows.append(f"{'together':<{width}}  {sum(outcome.seconds for outcome in outcomes):7.1f}")
    return "\n".join(rows)


def choose(names: list[str], solutions: bool) -> list[Path]:
    """The notebooks of these numbers, or whose names start so; ValueError for a name that fits none.

    A number is a whole one: 03 is not 03b, and 3 is none of them.
    """
    found = cells.find_notebooks(solutions=solutions)

    def fits(path: Path, name: str) -> bool:
        name = Path(name).name.removesuffix(".ipynb")
        number = re.fullmatch(r"\d+[a-z]?", name)
        return path.stem == name or path.stem.startswith(f"{name}_" if number else name)

    for name in names:
        if not any(fits(path, name) for path in found):
            have = ", ".join(path.stem for path in cells.find_notebooks(solutions=False)) or "none"
            raise ValueError(f"no notebook starts with {name!r}; there are: {have}")
    return [path for path in found if not names or any(fits(path, name) for name in names)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NN")
    parser.add_argument("--solutions", action="store_true")
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    try:
        paths = choose(options.names, options.solutions)
    except ValueError as error:
        parser.error(str(error))
    if not paths:
        parser.error("notebooks/ holds no notebook")
    if options.list:
        print(*(path.relative_to(cells.ROOT) for path in paths))
        return 0
    outcomes = []
    for place, path in enumerate(paths, 1):
        relative = path.relative_to(cells.NOTEBOOKS)
        label = f"[{place}/{len(paths)}] {relative.with_suffix('').as_posix()}"
        notebook, outcome = execute(path, label)
        if options.twice and outcome.result == "ok":
            again, second = execute(path, f"{label}, again")
            outcome.result = second.result if second.result != "ok" else changed(notebook, again) or "ok"
            outcome.seconds, outcome.peak_mb = outcome.seconds + second.seconds, max(outcome.peak_mb, second.peak_mb)
        outcome.name = relative.with_suffix("").as_posix()
        outcomes.append(outcome)
        progress(f"{label}  {outcome.result.splitlines()[0]}  {outcome.seconds:.1f} s", final=True)
        (BUILD / relative).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, BUILD / relative)
        if options.refresh and outcome.result == "ok":
            cells.write(path, clean(json.loads(json.dumps(notebook))))
    failed = [outcome for outcome in outcomes if outcome.result != "ok"]
    for outcome in failed:
        print(f"\n{outcome.name}: {outcome.result}")
    print(f"\n{table(outcomes)}\n\nExecuted copies: {BUILD.relative_to(cells.ROOT)}/")
    if options.refresh:
        print(f"Written back to notebooks/: {len(outcomes) - len(failed)} of {len(outcomes)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
