"""Builds notebook 08b and its solutions from lesson.py and solutions.py: python build.py [WORKTREE]"""
import json, re, sys, textwrap
from pathlib import Path
tree = Path(sys.argv[1] if len(sys.argv) > 1 and sys.argv[0].endswith("build.py") else "/work/w08b")
here = Path(__file__).parent
sys.path.insert(0, str(tree / "tests/notebooks"))
import cells

NAME = "08b_sequence_to_sequence.ipynb"
url = cells.project_url(tree / "pyproject.toml")

def wrapped(text, width=128):
    out = []
    for part in text.split("\n\n"):
        lines = part.split("\n")
        if re.match(r"[#$|]|\[!\[|BADGE", part):
            out.append(part); continue
        items, item = [], []
        for line in lines:  # a list: each item by itself
            if re.match(r"\* ", line) and item:
                items.append(" ".join(item)); item = []
            item.append(line.strip() if item else line)
        items.append(" ".join(item))
        made = []
        for one in items:
            made += textwrap.wrap(one, width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  " if one.startswith("* ") else "")
        for line in made[1:]:
            assert not re.match(r"\s*([-+] |\d+[.)] |#)", line), line
        out.append("\n".join(made))
    return "\n\n".join(out)

def load(file):
    found = []
    def md(text): found.append(("markdown", wrapped(text.strip("\n")), []))
    def code(text, *tags): found.append(("code", text.strip("\n"), list(tags)))
    scope = {"load": load, "md": md, "code": code, "SETUP": cells.setup_cell(url)}
    for part in sorted(here.glob("parts/p*.py")) if file == "lesson.py" else [here / file]:
        exec(compile(part.read_text("utf8"), str(part), "exec"), scope)
    return found

def notebook(found, relative):
    made = []
    for kind, text, tags in found:
        text = re.sub(r"\n{3,}", "\n\n\n", text.replace("BADGE", cells.badge(url, relative))).rstrip("\n")
        cell = {"cell_type": kind, "metadata": {"tags": tags} if tags else {}, "source": text.splitlines(keepends=True)}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    nb = {"cells": made, "metadata": cells.METADATA, "nbformat": 4, "nbformat_minor": 5}
    if "solutions" not in relative:
        cells.add_contents(nb)
    for cell in nb["cells"]:
        cell["source"] = cells.source(cell).splitlines(keepends=True)
    cells.name_cells(nb)
    return nb

if __name__ == "__main__":
    for file, relative in (("lesson.py", f"notebooks/{NAME}"), ("solutions.py", f"notebooks/solutions/{NAME}")):
        if file != "lesson.py" and not (here / file).exists():
            continue
        found = load(file)
        path = tree / relative
        old = {}
        if path.exists():  # keep the outputs of cells that have not changed
            for cell in cells.read(path)["cells"]:
                if cell["cell_type"] == "code":
                    old[cells.source(cell)] = cell
        nb = notebook(found, relative)
        cells.write(path, nb)
        print(path, len(nb["cells"]), "cells")
