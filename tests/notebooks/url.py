"""Write what all notebooks share: the list of parts, the set-up cell, and the repository's public address.

python tests/notebooks/url.py                               with the address that pyproject.toml holds, or none
python tests/notebooks/url.py https://github.com/NAME/ftlib changes it everywhere, pyproject.toml included

The address goes into badges, set-up cells and the line of README.md that clones; until one is set, nothing that needs
it is shown. The times in the table of notebooks/README.md are those of the notebooks' first cells.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cells

PLAIN_FILES = ("pyproject.toml", "README.md", "environment.yml", "data/README.md", "notebooks/README.md")
TIME = r"\*\*Time and memory:\*\* (.+?) and ([\d.]+ [MG]B) on 2 (busy )?CPU cores"
MARKED = r"(<!-- address: make url -->\n).*?(<!-- end of address -->)"


def normalize(url: str) -> str:
    """The address without a trailing slash or .git. ValueError when Colab can't open a notebook from it."""
    url = url.strip().rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(
            f"{url!r}: Colab opens notebooks from https://github.com/OWNER/NAME only; give such an address"
        )
    return url


def update_notebook(notebook: dict, relative_path: str, old: str, new: str) -> None:
    """Badge and contents into the first cell, the set-up text into its own, elsewhere new address for old."""
    for index, cell in enumerate(notebook["cells"]):
        text = replace(cells.source(cell), old, new)
        if "setup" in cells.tags(cell):
            text = cells.setup_cell(new)
        elif index == 0:
            lines = [line for line in text.rstrip().splitlines() if not line.startswith(cells.BADGE_START)]
            text = "\n".join([*lines, "", cells.badge(new, relative_path)]).rstrip()
            text = re.sub(r"\n{3,}", "\n\n", text)
        cell["source"] = text
    cells.add_contents(notebook)


def replace(text: str, old: str, new: str) -> str:
    """New address for old; where there was none, into the table of pyproject.toml; between the markers of a page."""
    colab = "https://colab.research.google.com/github/"
    old_name, new_name = (url.removeprefix("https://github.com/") for url in (old, new))
    # whole addresses only: github.com/me/ftlib must leave github.com/me/ftlib-data alone
    for start in ("https://github.com/", colab) if old else ():
        text = re.sub(re.escape(start + old_name) + r"(?![\w-])", start + new_name, text)
    if new and not old:
        text = re.sub(r"(?m)^\[project\.urls\]\n(?:#.*\n)*", rf'\g<0>Repository = "{new}"\n', text)
    return re.sub(MARKED, rf"\1{front(new)}\2", text, flags=re.DOTALL)


def front(url: str) -> str:
    """What README.md shows between its markers: a badge and how to get the repository; "" without an address."""
    if not url:
        return ""
    first = cells.badge(url, "notebooks/01_attention.ipynb")
    return f"\n{first}\n\n```bash\ngit clone {url} && cd {url.rsplit('/', 1)[1]}\n```\n\n"


def with_times(table: str, folder: Path) -> str:
    """The table of notebooks, with what each one's first cell says of time and memory in the last column."""

    def row(found: re.Match) -> str:
        path = folder / found[2]
        if not (path.exists() and (measured := re.search(TIME, cells.source(cells.read(path)["cells"][0])))):
            return found[0]
        return f"{found[1]} {measured[1]}{' (busy machine)' * bool(measured[3])}, {measured[2]} |"

    return re.sub(r"(?m)^(\|.*\]\((\w+\.ipynb)\).*\|)[^|\n]*\|$", row, table)


def main(arguments: list[str], root: Path = cells.ROOT) -> int:
    old = cells.project_url(root / "pyproject.toml")
    try:
        new = normalize(arguments[0]) if arguments else old
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    changed = []
    for path in (root / name for name in PLAIN_FILES):
        if not path.exists():
            continue
        before = path.read_text("utf8")
        text = replace(before, old, new)
        if path == root / "notebooks/README.md":
            text = with_times(text, path.parent)
        if text != before:
            path.write_text(text, "utf8")
            changed.append(path)
    for path in cells.find_notebooks(root / "notebooks"):
        before = path.read_bytes()
        notebook = cells.without_editor(cells.read(path))
        update_notebook(notebook, path.relative_to(root).as_posix(), old, new)
        cells.name_cells(notebook)
        cells.write(path, notebook)
        if path.read_bytes() != before:
            changed.append(path)
    names = (path.relative_to(root) for path in changed)
    print(f"{new or 'no address yet'}: {len(changed)} files changed", *names, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
