"""Build the book: one static site of the series in build/book, from the notebooks as they are stored; nothing is run.

python tests/notebooks/book.py

Sphinx with MyST-NB and the theme Furo reads every page where it lies, so links hold as they stand. Formulas become
MathML, and the search index, the fonts and the scripts are files of the site: it needs no network and no server.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import cells

BUILD = cells.ROOT / "build"
FRONT = "README"
READMES = ("notebooks/README", "ftlib/README", "tests/benchmarks/README", "data/README")
REMOTE_IMAGE = re.compile(r"\[?!\[[^\]]*\]\(https?://[^)]*\)(?:\]\([^)]*\))?")
SETTINGS = {
    "project": "ftlib",
    "html_title": "ftlib",
    "root_doc": FRONT,
    "extensions": ["myst_nb", "book"],  # the second is this file: `setup` below
    "exclude_patterns": [".*", "build", "data/cache"],
    "suppress_warnings": ["myst.header"],  # the headings of solutions stand two levels below the title
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 6,
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # they would come from the network
    "html_theme": "furo",
    "html_math_renderer": "mathml",
    "html_copy_source": False,
    "html_show_sourcelink": False,
    "html_use_index": False,
    "html_show_copyright": False,
}


def contents() -> dict[str, list[str]]:
    """The pages after the front page, in reading order: {part: paths from the repository root, without suffix}."""
    pages = [path.relative_to(cells.ROOT).with_suffix("").as_posix() for path in cells.find_notebooks()]
    solutions = [page for page in pages if "/solutions/" in page]
    series = [page for page in pages if page not in solutions]
    return {"The series": series, "Solutions": solutions, "Guides, measurements, data": list(READMES)}


def anchor(fragment: str) -> str:
    """A heading, or a fragment as JupyterLab makes it of a heading, as the fragment that the book has for it."""
    return re.sub(r"[^\w\- ]", "", unquote(fragment).lower()).replace(" ", "-")


def markdown(text: str) -> str:
    """Markdown of the repository as the book shows it: no badges, solutions linked where they are named."""
    text = re.sub(r"(?<!\[)`(solutions/\w+\.ipynb)`", r"[`\1`](\1)", REMOTE_IMAGE.sub("", text))
    return re.sub(r"(\]\((?!\w+:)[^)#]*#)([^)]+)", lambda link: link[1] + anchor(link[2]), text)


def read_page(app, page: str, source: list[str]) -> None:
    """Sphinx's event `source-read`: change the text of a page before it is parsed."""
    if page in (FRONT, *READMES):
        source[0] = markdown(source[0])
    else:
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = markdown(cells.source(cell))
            for output in cell.get("outputs", ()):
                if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                    cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
        source[0] = json.dumps(notebook)
    if page == FRONT:
        for part, pages in contents().items():
            entries = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {part}\n\n{entries}\n```\n"


def write_formula(writer, node) -> None:
    """A formula in LaTeX as MathML, which browsers draw themselves."""
    from docutils import nodes
    from latex2mathml.converter import convert

    if isinstance(node, nodes.math_block):
        writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    else:
        writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def setup(app) -> None:
    app.connect("source-read", read_page)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.add_css_file("book.css")


def build(folder: Path) -> int:
    """Write the site into `folder`, which it replaces; 1 where Sphinx warned, for example of a link to nowhere."""
    from sphinx.application import Sphinx

    pages = [FRONT, *(page for part in contents().values() for page in part)]
    font = Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    settings = SETTINGS | {
        "include_patterns": [f"{page}.*" for page in pages],
        "html_static_path": [str(font), str(Path(__file__).with_suffix(".css"))],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        site, trees = Path(scratch, "site"), Path(scratch, "trees")
        app = Sphinx(cells.ROOT, None, site, trees, "html", settings, status=None, warningiserror=True)
        app.build()
        shutil.copy(site / f"{FRONT}.html", site / "index.html")
        shutil.rmtree(folder, ignore_errors=True)
        site.rename(folder)
    return app.statuscode


if __name__ == "__main__":
    status = build(BUILD / "book")
    print("Open build/book/index.html")
    sys.exit(status)
