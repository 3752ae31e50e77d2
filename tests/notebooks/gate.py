"""Static checks of the notebooks: what nbval says nothing about, found in seconds and without torch.

python tests/notebooks/gate.py [notebook ...]      no names: the whole series and its solutions

Each finding reads `file: cell N: what is wrong: what to do`. N counts all cells from 1, markdown cells too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import cells
from exercises import Finding, check_exercises, check_solutions
from names import Source, missing_names, read_package

SECTIONS = ("## What goes wrong", "## On a GPU", "## Exercises", "## Recap")
MAX_LINES = 25
MAX_BYTES = 1_000_000
KNOWN_TAGS = {
    "setup",
    cells.COMPARED,
    "nbval-ignore-output",
    "raises-exception",
    "exercise",
    "exercise-check",
    "solution",
    "wrong-answer",
}
MACHINE_PATH = re.compile(r"(?<![\w./~:])/(?:home|root|Users|tmp|opt|mnt|content|var|usr)/[\w.]|\b[A-Z]:\\\w")
INDEX_HOST = re.compile(r"--(?:extra-)?index-url|--find-links|https?://\S+/simple\b")
NOT_MEASURED = "not measured yet"  # a row or cell without a measurement is left out, or shows a dash
NO_GPU = "no gpu has been measured so far"
GPU_DAY = "tests/benchmarks/README.md#the-gpu-day"
TIMING = re.compile(r"\d\s?(?:s|ms|µs|us|ns|sec|secs|seconds?|min|minutes?|it/s|examples/s|tokens/s)\b")


def check_code(tree: ast.Module, text: str, tagged: set[str]) -> Iterator[tuple[str, str]]:
    """What a code cell says: magics, seeds, installs, paths."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not node.args and not node.keywords:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("default_rng", "Random", "RandomState"):
                yield f"{name}() without a seed", f"write {name}(0)"
    if "setup" not in tagged and re.search(r"(?m)^\s*[%!]|\bpip3? install\b|get_ipython\(", text):
        yield (
            "a magic or an install outside the set-up cell",
            "use plain Python; the set-up cell alone installs",
        )
    if re.search(r"(?m)^\s*#\s*(NBVAL_|PYTEST_VALIDATE)", text):
        yield "an NBVAL comment", "use the cell tag instead (nbval-check-output, raises-exception)"


def check_text(text: str) -> Iterator[tuple[str, str]]:
    """What neither a cell nor an output may name."""
    if found := MACHINE_PATH.search(text):
        yield f"the machine path {found.group()}…", "show a relative path, or nothing"
    if found := INDEX_HOST.search(text):
        yield f"a package index ({found.group()})", "leave the index to the reader's own pip settings"
    if NOT_MEASURED in text.lower():
        yield f"the words `{NOT_MEASURED}`", "leave the row or the cell out, or show a dash"


def check_outputs(cell: dict) -> Iterator[tuple[str, str]]:
    """Stored outputs: only what a page can show, and for a compared cell only what is the same everywhere."""
    tagged, outputs, refresh = cells.tags(cell), cell.get("outputs", []), "run `make refresh`"
    errors = [output for output in outputs if output["output_type"] == "error"]
    if errors and "raises-exception" not in tagged:
        yield (
            f"an error output ({errors[0]['ename']})",
            "mend the cell, or tag it raises-exception if it must fail",
        )
    if "raises-exception" in tagged and not errors:
        yield "tagged raises-exception, but it raised nothing", "make it fail, or drop the tag"
    for output in outputs:
        text, data = cells.output_text(output), output.get("data", {})
        yield from check_text(cells.ANSI.sub("", "\n".join(output.get("traceback", ())) + text))
        if output["output_type"] == "stream" and output["name"] == "stderr":
            yield "a stderr output", refresh
        if any("widget" in mime for mime in data):
            yield "a widget output", refresh
        elif cells.is_progress_bar(text):
            yield "a progress bar in the output", refresh
        if re.match(r'<img\b(?![^>]*\bsrc="data:image/png;base64,)', "".join(data.get("text/html", ""))):
            yield "an <img> that is no PNG inside the notebook", "show figures with ftlib.show_figure"
        if figures := {mime for mime in data if mime.startswith(("image/", "application/pdf"))} - {
            "image/png"
        }:
            yield f"a figure as {', '.join(sorted(figures))}", "show figures as PNG (matplotlib's default)"
        if "<Figure" in "".join(data.get("text/plain", "")) and not any(mime.startswith("image/") for mime in data):
            yield "a figure without its picture", "unset MPLBACKEND and run `make refresh`"
        if data and "text/plain" not in data:
            yield (
                f"an output without a text form ({', '.join(sorted(data))})",
                "add text/plain to what is displayed",
            )
        if found := re.search(r"\bat 0x[0-9a-fA-F]{4,}", text):
            yield (
                f"a memory address ({found.group()}) in an output",
                "end the cell with plt.show(), or print a name",
            )
        if any("javascript" in mime for mime in data):
            yield "a JavaScript output", "show a PNG figure instead"
    if cells.COMPARED in tagged:
        yield from check_compared(outputs)


def alt_text(output: dict) -> str | None:
    """What a figure says to those who can't see it, "" where it says nothing; None for an output that is no figure."""
    data = output.get("data", {})
    if (html := "".join(data.get("text/html", ""))).startswith("<img"):  # as ftlib.show_figure shows one
        found = re.match(r'<img alt="([^"]*)"', html)
        return found[1].strip() if found else ""
    return output.get("metadata", {}).get("image/png", {}).get("alt", "").strip() if "image/png" in data else None


def check_compared(outputs: list[dict]) -> Iterator[tuple[str, str]]:
    """An output that CI compares letter by letter."""
    text = "\n".join(cells.output_text(output) for output in outputs)
    if not text.strip():
        yield "a compared cell without output", "print what is to be compared, or drop nbval-check-output"
    if any(alt_text(output) is not None for output in outputs):
        yield "a figure in a compared output", "compare text in a cell of its own"
    if found := re.search(r"0x[0-9a-fA-F]{4,}", text):
        yield f"a memory address ({found.group()}) in a compared output", "print a name or a shape instead"
    if found := re.search(r"\d+\.\d{5,}|\d\.?\d*e[-+]?\d+", text):
        yield (
            f"the float {found.group()} in a compared output",
            "round to 4 decimals or fewer, or assert with a tolerance",
        )
    if found := TIMING.search(text):
        yield f"a time ({found.group()}) in a compared output", "print times in a cell that is not compared"
    if found := re.search(r"\w*Warning\b|\bwarning:", text):
        yield f"a warning ({found.group()}) in a compared output", "mend what it warns about"


def check_title(notebook: dict, path: Path, relative: str, url: str, is_solution: bool) -> Iterator[Finding]:
    """The first cell: number and title, promise, what it needs, time and memory, badge."""
    first = notebook["cells"][0] if notebook["cells"] else {"cell_type": "", "source": ""}
    text, number = cells.source(first), path.name.split("_")[0]
    if not re.fullmatch(r"\d\d[a-z]?_[a-z0-9_]+\.ipynb", path.name):
        yield None, f"the name {path.name}", "name it NN_topic.ipynb"
    if first["cell_type"] != "markdown" or not re.match(rf"# {number} \S", text):
        yield 1, "no title", f"start the first markdown cell with `# {number} Title`"
        return
    badges = [line for line in text.splitlines() if line.startswith(cells.BADGE_START)]
    if badges != [cells.badge(url, relative)] * bool(url):
        what = "is missing or has another address than pyproject.toml" if url else "leads nowhere, no address is set"
        yield 1, f"the Colab badge {what}", "run `make url`"
    written = [part for part in text.split("\n\n") if part not in cells.without_contents(text).split("\n\n")]
    if "\n\n".join(written) != cells.contents(notebook):
        yield 1, "the contents differ from the headings, or their time from the length", "run `make url`"
    for heading in cells.headings(notebook):
        if not heading.isascii() or set(heading) & set("$[]%"):
            yield None, f"the heading `{heading}`, to which no link leads in JupyterLab", "write it in plain letters"
    if is_solution:
        if not text.splitlines()[0].endswith(": solutions"):
            yield 1, "the title does not end in `: solutions`", f"write `# {number} Title: solutions`"
        return
    if not re.search(r"\A#[^\n]*\n\n[^\s*#\[|-][^\n]*", text):
        yield 1, "no promise after the title", "say in one sentence what the reader will be able to do"
    if "\n**You need:**" not in text:
        yield 1, "no line `**You need:** …`", "say what the reader should know"
    measured = re.search(r"(?m)^\*\*Time and memory:\*\*.*", text)
    if not measured or not re.search(r"\d\s?(s|min)\b.*\d\s?[MG]B\b.*CPU", measured.group()):
        yield (
            1,
            "no line `**Time and memory:** …` with a time, MB or GB, and CPU",
            "take the numbers from the table of `make notebooks`",
        )


def check_sections(notebook: dict, measured: bool) -> Iterator[Finding]:
    """The headings every notebook has, in order; under "On a GPU" a guarded cell, and what was measured or where it is.

    measured: whether there are results of a GPU in tests/benchmarks/results.
    """
    headings = [
        (number, cells.source(cell).lstrip())
        for number, cell in enumerate(notebook["cells"], 1)
        if cell["cell_type"] == "markdown" and cells.source(cell).lstrip().startswith("## ")
    ]
    places = []
    for section in SECTIONS:
        where = [number for number, text in headings if re.match(re.escape(section) + r"\b", text)]
        if len(where) != 1:
            yield (
                None,
                f"{len(where)} cells that start with `{section}`",
                "write one markdown cell with that heading",
            )
        places += where[:1]
    if places != sorted(places):
        yield None, "the closing sections are out of order", f"order them: {', '.join(SECTIONS)}"
    start = next((number for number, text in headings if text.startswith("## On a GPU")), None)
    if start is None:
        return
    end = next((number for number, _ in headings if number > start), len(notebook["cells"]) + 1)
    body = notebook["cells"][start - 1 : end - 1]
    guards = [
        cell
        for cell in body
        if cell["cell_type"] == "code"
        and any(isinstance(node, ast.If) for node in cells.try_parse(cells.source(cell)).body)
    ]
    if not guards:
        yield (
            start,
            "no guarded code cell under `## On a GPU`",
            "add the real-size run under a top-level `if`",
        )
    words = "\n".join(cells.source(cell) for cell in body if cell["cell_type"] == "markdown")
    outputs = [output for cell in body for output in cell.get("outputs", ())]
    tables = ["".join(output.get("data", {}).get("text/markdown", "")) for output in outputs]
    shown = "\n".join([*map(cells.output_text, outputs), *tables])
    none = NO_GPU in (words + shown).lower()
    if none and measured:
        yield start, "it says that no GPU has been measured, and there are results of one", "give the numbers"
    if GPU_DAY not in words and not re.search(r"(?m)^\|.*\d.*\|", words + shown):
        yield start, "neither a measured table nor a word on where the numbers are", f"link to {GPU_DAY}"


def check_figures(notebook: dict) -> Iterator[Finding]:
    """A markdown cell that starts with `*Figure` beside each cell that shows a figure, and alt texts.

    Where a notebook uses ftlib.show_figure, every one of its figures needs an alt text.
    """
    kinds, bare, moved = [], [], False
    for number, cell in enumerate(notebook["cells"], 1):
        figures = [output for output in cell.get("outputs", ()) if alt_text(output) is not None]
        caption = cell["cell_type"] == "markdown" and cells.source(cell).lstrip().startswith("*Figure")
        kinds.append("figure" if figures else "caption" if caption else "")
        bare += [number] * any(not alt_text(figure) for figure in figures)
        moved |= cell["cell_type"] == "code" and "show_figure" in cells.source(cell)
        moved |= any("text/html" in figure["data"] for figure in figures)
    for number in bare if moved else ():
        yield number, "a figure without an alt text", "say what it shows: ftlib.show_figure(figure, 'what it shows')"
    for index, kind in enumerate(kinds):
        if kind != "figure":
            continue
        before, after = index, index
        while before >= 0 and kinds[before] == "figure":
            before -= 1
        while after < len(kinds) and kinds[after] == "figure":
            after += 1
        if "caption" not in (
            kinds[before] if before >= 0 else "",
            kinds[after] if after < len(kinds) else "",
        ):
            yield (
                index + 1,
                "a figure without a caption",
                "add a markdown cell beside it that starts with `*Figure`",
            )


def check_file(path: Path, notebook: dict) -> Iterator[Finding]:
    """Size, format, metadata, ids."""
    if (size := path.stat().st_size) >= MAX_BYTES:
        yield None, f"{size / 1e6:.2f} MB", "fewer or smaller figures: a notebook stays under 1 MB"
    if notebook.get("nbformat_minor") != 5:
        yield None, f"format 4.{notebook.get('nbformat_minor')}", "run `make refresh`"
    if notebook.get("metadata") != cells.METADATA:
        extra = set(notebook.get("metadata", {})) - set(cells.METADATA) or {"kernelspec or language_info"}
        yield None, f"metadata of one machine or editor ({', '.join(sorted(extra))})", "run `make url`"
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) != len(ids):
        yield None, "a cell without an id of its own", "run `make refresh`"


def check_setup(notebook: dict, url: str) -> Iterator[Finding]:
    code = [(number, cell) for number, cell in enumerate(notebook["cells"], 1) if cell["cell_type"] == "code"]
    tagged = [number for number, cell in code if "setup" in cells.tags(cell)]
    if len(tagged) != 1 or tagged[0] != code[0][0]:
        yield None, f"set-up cells at {tagged}", "tag the first code cell, and no other, `setup`"
    for number, cell in code:
        if number in tagged and cells.source(cell) != cells.setup_cell(url):
            yield number, "the set-up cell differs from the common text", "run `make url`"


def check_cells(notebook: dict, source: Source) -> Iterator[Finding]:
    """Every cell by itself, and the execution counts."""
    aliases: dict[str, str] = {}
    expected = 0
    for number, cell in enumerate(notebook["cells"], 1):
        text, tagged = cells.source(cell), cells.tags(cell)
        for what, remedy in check_text(text):
            yield number, what, remedy
        if extra := set(cell.get("metadata", {})) - {"tags"}:
            yield number, f"cell metadata {', '.join(sorted(extra))}", "run `make url`"
        if unknown := tagged - KNOWN_TAGS:
            yield (
                number,
                f"unknown tag {', '.join(sorted(unknown))}",
                f"use one of {', '.join(sorted(KNOWN_TAGS))}",
            )
        if (lines := (cells.without_contents(text) if number == 1 else text).count("\n") + 1) > MAX_LINES:
            yield number, f"{lines} lines", f"split the cell: {MAX_LINES} lines at most"
        if cell["cell_type"] != "code":
            continue
        expected += 1
        if not text.strip():
            yield number, "an empty code cell", "delete it"
        if cell.get("execution_count") != expected:
            yield (
                number,
                f"execution count {cell.get('execution_count')} instead of {expected}",
                "run `make refresh`",
            )
        for what, remedy in check_outputs(cell):
            yield number, what, remedy
        try:
            tree = cells.parse(text)
        except (SyntaxError, ValueError) as error:
            yield (
                number,
                f"does not parse ({error})",
                "write plain Python; only the set-up cell has a %pip line",
            )
            continue
        for what, remedy in check_code(tree, text, tagged):
            yield number, what, remedy
        for name in missing_names(tree, source, aliases):
            yield number, f"{name} does not exist", "correct the name, or add it to ftlib"


def assigned(node: ast.AST) -> Iterator[ast.Name]:
    """The names that a cell assigns, in loops and `with` too, but not inside functions and comprehensions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)):
            yield from assigned(child)


def outside(function: ast.FunctionDef) -> set[str]:
    """The names that a function reads and does not make itself."""
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    own = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    return {name.id for name in names} - own - {name.id for name in names if isinstance(name.ctx, ast.Store)}


def check_globals(notebook: dict) -> Iterator[Finding]:
    """A function uses what it is given and what stands above it, so that no later line changes what it does."""
    last: dict[str, tuple[int, int]] = {}  # name -> (cell, line) of its last assignment
    functions = []
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] == "code":
            tree = cells.try_parse(cells.source(cell))
            last |= {name.id: (number, name.lineno) for name in assigned(tree)}
            functions += [((number, node.lineno), node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for place, function in functions:
        for name in sorted(outside(function)):
            if last.get(name, place) > place:
                what = f"{function.name}() reads {name}, which cell {last[name][0]} assigns later"
                yield place[0], what, "take it as an argument, or name the later one otherwise"


def read_lesson(path: Path) -> dict | None:
    """The notebook that solutions belong to; None when there is none, or none that can be read."""
    try:
        return cells.read(path) if path.exists() else None
    except ValueError:
        return None


def check(path: Path, root: Path, source: Source, url: str) -> list[str]:
    """All findings of one notebook as printable lines."""
    relative = path.relative_to(root).as_posix()
    try:
        notebook = cells.read(path)
    except ValueError as error:
        return [f"{relative}: not a notebook ({error}): write it with Jupyter or jupytext"]
    is_solution = path.parent.name == "solutions"
    findings = [
        *check_file(path, notebook),
        *check_title(notebook, path, relative, url, is_solution),
        *check_setup(notebook, url),
        *check_cells(notebook, source),
        *check_globals(notebook),
    ]
    if is_solution:
        findings += check_solutions(notebook, read_lesson(path.parents[1] / path.name))
    else:
        measured = any(root.glob("tests/benchmarks/results/gpu-day-2-*.json"))
        findings += [*check_sections(notebook, measured), *check_figures(notebook), *check_exercises(notebook)]
        if not (path.parent / "solutions" / path.name).exists():
            findings.append((None, "no solutions", f"write notebooks/solutions/{path.name}"))
    findings.sort(key=lambda finding: finding[0] or 0)
    return [
        f"{relative}: {f'cell {number}: ' if number else ''}{what}: {remedy}"
        for number, what, remedy in findings
    ]


def main(arguments: list[str], root: Path = cells.ROOT) -> int:
    paths = [Path(name).resolve() for name in arguments] or cells.find_notebooks(root / "notebooks")
    if not paths:
        print("notebooks/: no notebook: the series needs one at least", file=sys.stderr)
        return 1
    source, url = read_package(root / "ftlib"), cells.project_url(root / "pyproject.toml")
    findings = [line for path in paths for line in check(path, root, source, url)]
    for line in findings:
        print(line)
    print(f"static gate: {len(paths)} notebooks, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
