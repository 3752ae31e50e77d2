"""What programs write in every notebook, in its title and set-up cells, and how they read and write one.

Needs the standard library alone, so that the checks run before anything is installed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import tomllib
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
BADGE_START = "[![Open in Colab]"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
COMPARED = "nbval-check-output"  # the tag of cells whose output the tests compare
# What JupyterLab writes when it opens a notebook, so that nothing changes. The version is that of the Python in CI;
# under another one JupyterLab writes its own, which `before_saving` takes back.
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": "3.11.7",
    },
}


def project_url(pyproject: Path = ROOT / "pyproject.toml") -> str:
    """The repository's public address, from the one place that holds it; "" until `make url` has set one."""
    return tomllib.loads(pyproject.read_text("utf8"))["project"]["urls"].get("Repository", "")


def badge(url: str, relative_path: str) -> str:
    """The Colab badge of a notebook, given its path from the repository root (with /); "" without a url."""
    if not url:
        return ""
    repository = url.removeprefix("https://github.com/")
    target = f"https://colab.research.google.com/github/{repository}/blob/main/{relative_path}"
    return f"{BADGE_START}(https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def setup_cell(url: str) -> str:
    """The set-up cell, the same in every notebook: it finds ftlib in a copy of the repository, or installed.

    It looks in the folder where the notebook runs, in those above it, and in those beside the notebook: in Colab the
    last were uploaded, or lie in a mounted Drive, and pip adds what is missing, by lower bounds only.
    """
    where, source = ("", f'"{{home or \'git+{url}\'}}"') if url else ("home and ", '"{home}"')
    return f"""\
import sys
from pathlib import Path

here = Path.cwd()
around = [here, *here.parents, *here.glob("*"), *here.glob("drive/MyDrive/*")]
home = next((str(place) for place in around if (place / "ftlib/__init__.py").is_file()), None)
if home:  # a copy of the repository
    sys.path.insert(0, home)
if {where}"google.colab" in sys.modules:  # brings what Colab lacks; torch stays Colab's own
    %pip install -q {source}

import ftlib  # not found? %pip install FOLDER, with the path of the folder that holds pyproject.toml

env = ftlib.setup(seed=0)"""


def prose(notebook: dict) -> str:
    """The markdown of a notebook, without blocks of code and without the list of parts."""
    texts = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return re.sub(r"(?ms)^```.*?^```", "", "\n\n".join([*map(without_contents, texts[:1]), *texts[1:]]))


def headings(notebook: dict) -> list[str]:
    """The headings of level 2, in order, as they stand in markdown."""
    return re.findall(r"(?m)^## +(.*?) *$", prose(notebook))


def anchor(heading: str) -> str:
    """The fragment of a heading in JupyterLab and in nbconvert's HTML; VS Code makes its own of it, the same way."""
    return quote(re.sub("[`*]", "", heading).replace(" ", "-"), safe="?/:@!$&'()*+,;=")


def contents(notebook: dict) -> str:
    """The list of a notebook's parts, "" where there are none, and how long it takes to read.

    That is, 200 words of prose a minute and 20 lines of code a minute, to 5 minutes. Formulas and tables don't count.
    """
    code = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code" and "setup" not in tags(cell)]
    lines = len(re.findall(r"(?m)^.*\S", "\n".join(code)))
    text = re.sub(r"(?ms)\$\$.*?\$\$|^\|[^\n]*|\]\([^)]*\)", "", prose(notebook))
    minutes = len(re.findall(r"[^\W\d_][\w'’-]*", text)) / 200 + lines / 20
    parts = [f"- [{heading}](#{anchor(heading)})" for heading in headings(notebook)]
    title = f"**Contents**, about {max(5 * round(minutes / 5), 5)} minutes to read:"
    return "\n".join([title, "", *parts]) if parts else ""


def without_contents(text: str) -> str:
    """The text of a title cell without the list of parts."""
    return "\n\n".join(part for part in text.split("\n\n") if not part.startswith(("**Contents", "- [")))


def add_contents(notebook: dict) -> None:
    """Write the list of parts into the first cell, before its badge, in the place of the one that was there."""
    first, block = notebook["cells"][0], contents(notebook)
    *parts, last = without_contents(source(first)).split("\n\n")
    parts += [block, last] if last.startswith(BADGE_START) else [last, block]
    first["source"] = "\n\n".join(part for part in parts if part)


def find_notebooks(folder: Path = NOTEBOOKS, *, solutions: bool = True) -> list[Path]:
    """Notebooks of the series in reading order, then their solutions."""
    found = sorted(folder.glob("*.ipynb"))
    return found + sorted(folder.glob("solutions/*.ipynb")) if solutions else found


def read(path: Path) -> dict:
    """A notebook as a dictionary. ValueError when the file is not JSON or not a notebook of format 4."""
    notebook = json.loads(path.read_text("utf8"))
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4 or "cells" not in notebook:
        raise ValueError("not a notebook of format 4")
    return notebook


def dump(notebook: dict) -> str:
    """A notebook as Jupyter writes it (one-space indent, sorted keys), so that diffs stay small."""
    for cell in notebook["cells"]:
        cell["source"] = source(cell).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write(path: Path, notebook: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(notebook), "utf8")


def without_editor(notebook: dict) -> dict:
    """A notebook without what an editor adds: the Python of one machine, which parts are folded, times of cells."""
    notebook = dict(notebook, metadata=METADATA, nbformat=4, nbformat_minor=5)
    for cell in notebook["cells"]:
        kept = cell.get("metadata", {}).get("tags")
        cell["metadata"] = {"tags": kept} if kept else {}
    return notebook


def before_saving(path: str, model: dict, **_) -> None:
    """What `make lab` has Jupyter do: a notebook of the series is saved with the metadata it is stored with.

    With another kernel than `python3`, which is then the reader's choice, all stays.
    """
    if model["type"] == "notebook" and path.startswith("notebooks/"):
        if model["content"]["metadata"].get("kernelspec", {}).get("name") == "python3":
            model["content"]["metadata"] = METADATA


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> set[str]:
    return set(cell.get("metadata", {}).get("tags", ()))


def output_text(output: dict) -> str:
    """One output as text: the stream's, the text/plain form, or the error's last line."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}"
    return "".join(output.get("data", {}).get("text/plain", ""))


def name_cells(notebook: dict) -> None:
    """Give each cell an id made from its content, so that a second conversion or refresh changes no line."""
    seen: dict[str, int] = {}
    for cell in notebook["cells"]:
        digest = hashlib.sha256(f"{cell['cell_type']}\n{source(cell)}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def is_progress_bar(text: str) -> bool:
    """True for a tqdm bar, drawn as text or as the text form of a widget."""
    return bool(
        re.search(r"\d+%\|| \d+/(\d+|\?) \[\d+:\d+|it/s\]|s/it\]|HBox\(children|FloatProgress\(", text)
    )


def parse(text: str) -> ast.Module:
    """A code cell's syntax tree; the set-up cell's `%pip` line counts as `pass`."""
    return ast.parse(re.sub(r"(?m)^(\s*)%pip .*$", r"\1pass", text))


def try_parse(text: str) -> ast.Module:
    """The same, and an empty tree for a cell that does not parse: the gate reports that elsewhere."""
    try:
        return parse(text)
    except (SyntaxError, ValueError):
        return ast.Module([], [])
