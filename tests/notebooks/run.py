"""Execute the notebooks in fresh kernels of this environment and say what each one took.

python tests/notebooks/run.py [--solutions] [--refresh] [--twice] [--jobs N] [--list] [NN ...]
  NN           the notebook of this number (03, 03b), or those whose file name starts so (03_par); none: all of them
  --solutions  the notebooks of notebooks/solutions/ too
  --refresh    write the executed notebooks back into notebooks/, without what differs from machine to machine
  --twice      each a second time in a new kernel; outputs that the tests compare must be the same again
  --jobs N     so many at a time; as it comes: one a core and one for each 4 GB of free memory, with --refresh one
  --list       print the paths of the chosen ones, run nothing

Fetches the corpora and weights that the chosen ones name. The longest begins first, by the times of the last run.
Each runs in an empty working directory, as a reader may start it anywhere; build/notebooks/ gets the copies.
Ends with a table (notebook, seconds, peak memory, result): exit status 1 when a notebook fails, 130 after Ctrl-C.
Started again after either, it goes on with those that have not ended well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cells
import ipykernel.kernelspec
import joblib
import nbformat
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

import ftlib
from ftlib.__main__ import announce

BUILD = cells.ROOT / "build" / "notebooks"
CELL_SECONDS = 1200


@dataclass
class Run:
    """One notebook of a series: how long it took the last time (0: not known), how far it is, how it ended."""

    path: Path
    digest: str = ""
    last: float = 0.0
    began: float = 0.0
    cell: str = "the start"
    seconds: float = 0.0
    peak_mb: float = 0.0
    result: str = "not run"

    @property
    def name(self) -> str:
        return self.path.relative_to(cells.NOTEBOOKS).with_suffix("").as_posix()

    @property
    def usual(self) -> float:
        return self.last or 60.0


class ThisPython(KernelSpecManager):
    """Every kernel name means the Python that runs this file, whatever kernels the user has registered."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=ipykernel.kernelspec.RESOURCES, **ipykernel.kernelspec.get_kernel_dict())


class ThisPythonManager(AsyncKernelManager):
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return ThisPython(parent=self)


def watch_memory(run: Run, kernel: psutil.Process, ended: threading.Event) -> None:
    """Keep in `run.peak_mb` the most resident memory that a kernel and the processes below it had together."""
    while not ended.wait(0.2):
        try:
            tree = [kernel, *kernel.children(recursive=True)]
            run.peak_mb = max(run.peak_mb, sum(process.memory_info().rss for process in tree) / 2**20)
        except psutil.Error:  # one ended between the listing and the look
            continue


def execute(run: Run, environment: dict[str, str]) -> nbformat.NotebookNode:
    """Run one notebook top to bottom; `run.result` becomes "ok" or what failed where."""
    notebook = nbformat.read(run.path, as_version=4)
    numbers = {id(cell): number for number, cell in enumerate(notebook.cells, 1)}
    current = notebook.cells[0] if notebook.cells else None
    ended = threading.Event()

    def on_start(notebook):
        kernel = psutil.Process(client.km.provisioner.pid)
        threading.Thread(target=watch_memory, args=(run, kernel, ended), daemon=True).start()

    def on_cell(cell, cell_index):
        nonlocal current
        current, run.cell = cell, f"cell {cell_index + 1} of {len(notebook.cells)}"

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        client = NotebookClient(
            notebook,
            kernel_manager_class=ThisPythonManager,
            timeout=CELL_SECONDS,
            startup_timeout=120,
            store_widget_state=False,
            record_timing=False,
            resources={"metadata": {"path": scratch}},
            on_notebook_start=on_start,
            on_cell_execute=on_cell,
        )
        try:
            client.execute(stderr=subprocess.DEVNULL, env=environment)  # the kernel's own log, not the cells' output
            run.result = unraised(notebook) or "ok"
        except (CellExecutionError, CellTimeoutError, RuntimeError) as error:  # RuntimeError: the kernel died
            run.result = describe(error, current, numbers.get(id(current), 0))
        finally:
            ended.set()
    return notebook


class Series:
    """Notebooks, some at a time. On a terminal what runs is drawn in place; elsewhere begin and end are a line each."""

    def __init__(self, runs: list[Run], options: argparse.Namespace, times: dict[str, dict]):
        self.runs, self.options, self.times = runs, options, times
        self.environment = dict(os.environ)
        self.environment.pop("MPLBACKEND", None)  # Agg leaves no pictures
        if options.jobs > 1:
            self.environment.setdefault("OMP_NUM_THREADS", str(max(1, joblib.cpu_count() // options.jobs)))
        self.stopped, self.lock, self.drawn = threading.Event(), threading.Lock(), 0

    def go(self) -> None:
        """Run those that are not run yet. Ctrl-C kills the kernels, then goes up."""
        waiting = sorted((run for run in self.runs if not run.seconds), key=lambda run: -run.usual)
        print(f"To run: {len(waiting)}, {self.options.jobs} at a time, about {spoken(self.left())}", flush=True)
        with ThreadPoolExecutor(self.options.jobs) as pool:
            futures = [pool.submit(self.work, run) for run in waiting]
            try:
                while wait(futures, timeout=0.5).not_done:
                    self.draw()
            except BaseException:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(future.done() for future in futures):  # for wait, cancelled ones are not
                    for process in psutil.Process().children(recursive=True):
                        with suppress(psutil.Error):  # it is gone
                            process.kill()
                    time.sleep(0.1)
                raise
            finally:
                self.erase()
        for future in futures:
            future.result()

    def work(self, run: Run) -> None:
        run.began = time.perf_counter()
        if not sys.stdout.isatty():
            self.say(f"{run.name} begins" + f", about {spoken(run.last)}" * bool(run.last))
        notebook = execute(run, self.environment)
        if self.options.twice and run.result == "ok":
            again = execute(run, self.environment)
            if run.result == "ok":
                run.result = changed(notebook, again) or "ok"
        run.seconds = time.perf_counter() - run.began
        if self.stopped.is_set() and run.result != "ok":
            run.result = f"stopped in {run.cell}"
            return
        copy = BUILD / run.path.relative_to(cells.NOTEBOOKS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, copy)
        if run.result == "ok":
            if self.options.refresh:
                cells.write(run.path, clean(json.loads(json.dumps(notebook))))
                run.digest = digest(run.path, self.options.settings)
            self.note(run)
        self.say(f"{run.name}  {run.result.splitlines()[0]}  {run.seconds:.1f} s  {run.peak_mb:.0f} MB")

    def note(self, run: Run) -> None:
        with self.lock:
            seen = {"seconds": run.seconds, "peak_mb": run.peak_mb, "settings": self.options.settings}
            self.times[run.name] = seen | {"done": run.digest}
            write_times(self.times)

    def say(self, text: str) -> None:
        """A line that stays."""
        with self.lock:
            self.erase()
            print(f"[{sum(run.seconds > 0 for run in self.runs)} of {len(self.runs)}] {text}", flush=True)

    def draw(self) -> None:
        """A bar, and a line for each notebook that runs, in place of those drawn before."""
        if not sys.stdout.isatty():
            return
        done, now = sum(run.seconds > 0 for run in self.runs), time.perf_counter()
        filled = round(30 * (1 - sum(map(self.remaining, self.runs)) / sum(run.usual for run in self.runs)))
        lines = [f"{'█' * filled:░<30}  {done} of {len(self.runs)} done, about {spoken(self.left())} left"]
        running = [run for run in self.runs if run.began and not run.seconds]
        width = max((len(run.name) for run in running), default=0)
        for run in running:
            usual = f" of about {spoken(run.last)}" if run.last else ""
            lines.append(f"  {run.name:<{width}}  {run.cell:<15}  {spoken(now - run.began)}{usual}")
        columns = shutil.get_terminal_size().columns - 1
        with self.lock:
            self.erase()
            print(*(line[:columns] for line in lines), sep="\n", flush=True)
            self.drawn = len(lines)

    def erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
        self.drawn = 0

    def remaining(self, run: Run) -> float:
        spent = time.perf_counter() - run.began if run.began else 0.0
        return 0.0 if run.seconds else max(run.usual - spent, 0.0)

    def left(self) -> float:
        """Seconds until all are done, as far as the last times tell."""
        remaining = [self.remaining(run) for run in self.runs]
        return max(sum(remaining) / self.options.jobs, *remaining)


def unraised(notebook: nbformat.NotebookNode) -> str:
    """A cell tagged raises-exception that raised nothing is a failure too."""
    for number, cell in enumerate(notebook.cells, 1):
        raised = any(output.output_type == "error" for output in cell.get("outputs", ()))
        if "raises-exception" in cells.tags(cell) and not raised:
            return f"cell {number} is tagged raises-exception but raised nothing\n\n{indent(cell.source)}"
    return ""


def describe(error: Exception, cell: nbformat.NotebookNode, number: int) -> str:
    """The failing cell's number, source and error, without colors."""
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
    stderr, progress bars, the folders in tracebacks. The list of parts is renewed; cell ids come from the content."""
    notebook = cells.without_editor(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [tidy(output) for output in merge_streams(cell["outputs"]) if keeps(output)]
    cells.add_contents(notebook)
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


def table(runs: list[Run]) -> str:
    width = max(len("notebook"), *(len(run.name) for run in runs))
    rows = [f"{'notebook':<{width}}  {'seconds':>7}  {'peak MB':>7}  result"]
    for run in runs:
        numbers = f"{run.seconds:7.1f}  {run.peak_mb:7.0f}" if run.seconds else f"{'–':>7}  {'–':>7}"
        rows.append(f"{run.name:<{width}}  {numbers}  {run.result.splitlines()[0]}")
    rows.append(f"{'together':<{width}}  {sum(run.seconds for run in runs):7.1f}")
    return "\n".join(rows)


def spoken(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def stated(path: Path) -> float:
    """Seconds after "Time and memory:" in the first cell of a notebook, 0 where it says none."""
    first = next((cells.source(cell) for cell in cells.read(path)["cells"]), "")
    found = re.search(r"\*\*Time and memory:\*\* (?:(\d+) min)? ?(?:(\d+) s)?", first)
    return 60.0 * int(found[1] or 0) + int(found[2] or 0) if found else 0.0


def digest(path: Path, settings: str) -> str:
    """What a result belongs to: a notebook, the sources of ftlib, the settings."""
    parts = [path.read_bytes(), *(source.read_bytes() for source in sorted((cells.ROOT / "ftlib").rglob("*.py")))]
    return hashlib.sha256(b"\0".join([settings.encode(), *parts])).hexdigest()


def read_times() -> dict[str, dict]:
    """By notebook: seconds, peak memory and settings when it last ended well; "done" while its series has not."""
    return json.loads(path.read_text("utf8")) if (path := BUILD / "times.json").exists() else {}


def write_times(times: dict[str, dict]) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "times.tmp").write_text(json.dumps(times, indent=1), "utf8")
    os.replace(BUILD / "times.tmp", BUILD / "times.json")


def plan(paths: list[Path], settings: str, times: dict[str, dict]) -> list[Run]:
    """The runs of a series, and which of them ended well before it was stopped or failed; if all did, none counts."""
    runs = [Run(path, digest(path, settings), stated(path)) for path in paths]
    for run in runs:
        seen = times.get(run.name, {})
        if seen.get("settings") == settings:
            run.last = seen["seconds"]
        if seen.get("done") == run.digest:
            run.seconds, run.peak_mb, run.result = seen["seconds"], seen["peak_mb"], "ok, before"
    if all(run.seconds for run in runs):
        return plan(paths, settings, forget(runs, times))
    return runs


def forget(runs: list[Run], times: dict[str, dict]) -> dict[str, dict]:
    """A series that is through leaves its times, and nothing to go on with."""
    for run in runs:
        times.get(run.name, {}).pop("done", None)
    return times


def at_a_time(count: int) -> int:
    """One notebook a core and one for each 4 GB of free memory; one where they would share a GPU."""
    memory = psutil.virtual_memory().available // 2**32
    return 1 if shutil.which("nvidia-smi") else max(1, min(count, joblib.cpu_count(), memory))


def named(paths: list[Path]) -> list[str]:
    """The corpora and weights whose names stand in quotes in the code of these notebooks; optional ones aside."""
    code = [cells.source(cell) for path in paths for cell in cells.read(path)["cells"] if cell["cell_type"] == "code"]
    quoted = set(re.findall(r"""["']([\w-]+)["']""", "\n".join(code)))
    return [name for name, entry in ftlib.assets.manifest().items() if name in quoted and "optional" not in entry]


def fetch(names: list[str]) -> None:
    if names:
        announce(names)
        try:
            ftlib.assets.fetch(names)
        except (ValueError, OSError, RuntimeError) as error:
            sys.exit(f"error: {error}")


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
    parser.add_argument("--jobs", type=int, metavar="N")
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
    size = os.environ.get("FTLIB_SIZE") or "small"
    options.settings = f"size {size}, refresh {options.refresh}, twice {options.twice}"
    began, times, build, status = time.perf_counter(), read_times(), BUILD.relative_to(cells.ROOT), 0
    runs = plan(paths, options.settings, times)
    todo = [run.path for run in runs if not run.seconds]
    if before := len(runs) - len(todo):
        print(f"{before} of {len(runs)} ended well before, nothing changed since: not run again.", end=" ")
        print(f"From the beginning: rm {build}/times.json")
    options.jobs = options.jobs or (1 if options.refresh else at_a_time(len(todo)))
    try:
        fetch(named(todo))
        Series(runs, options, times).go()
    except KeyboardInterrupt:
        status = 130
    failed = [run for run in runs if run.seconds and not run.result.startswith(("ok", "stopped"))]
    for run in failed:
        print(f"\n{run.name}: {run.result}")
    print(f"\n{table(runs)}\n\nTook {spoken(time.perf_counter() - began)}. Executed copies: {build}/")
    ok = sum(run.result.startswith("ok") for run in runs)
    if options.refresh:
        print(f"Written back to notebooks/: {ok} of {len(runs)}")
    if ok < len(runs):
        print(f"Started again, it goes on with what has not ended well: {len(runs) - ok} of {len(runs)}")
    else:
        write_times(forget(runs, times))
    return status or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
