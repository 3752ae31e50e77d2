"""The book has every notebook once, in order; its links lead somewhere; the site needs nothing from the network."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import book
import cells
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGES = [book.FRONT, *(page for part in book.contents().values() for page in part)]
LOCAL = r'(?:src|href)="(?!\w+:|#)([^"#?]+)'


def source(page: str) -> Path:
    notebook = cells.ROOT / f"{page}.ipynb"
    return notebook if notebook.exists() else cells.ROOT / f"{page}.md"


def prose(path: Path) -> str:
    """The Markdown of a page, without code."""
    text = path.read_text("utf8")
    if path.suffix == ".ipynb":
        markdown = (cell for cell in cells.read(path)["cells"] if cell["cell_type"] == "markdown")
        text = "\n\n".join(map(cells.source, markdown))
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    return {book.anchor(heading) for heading in re.findall(r"(?m)^#+ (.*?)\s*$", prose(path))}


def test_every_notebook_is_in_the_book_once_and_in_order():
    parts = book.contents()
    assert PAGES[0] == "README" and len(set(PAGES)) == len(PAGES)
    for part, folder in (("The series", "notebooks"), ("Solutions", "notebooks/solutions")):
        there = sorted(path.name for path in (cells.ROOT / folder).glob("*.ipynb"))
        assert parts[part] == [f"{folder}/{name.removesuffix('.ipynb')}" for name in there]
    assert all(source(page).exists() for page in PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_page_or_a_file(page):
    path, pages = source(page), {source(page).resolve() for page in PAGES}
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)", book.markdown(prose(path))):
        target, _, fragment = link.partition("#")
        there = (path.parent / target).resolve() if target else path.resolve()
        assert there.is_file(), f"{link} is no file"
        assert there.suffix not in (".md", ".ipynb") or there in pages, f"{link} is no page of the book"
        assert not fragment or fragment in anchors(there), f"{link}: {there.name} has no such heading"


def test_markdown_of_the_repository_as_the_book_shows_it():
    badge = cells.badge("https://github.com/me/ftlib", "notebooks/01_attention.ipynb")
    assert book.markdown(f"# T\n\n{badge}\n") == "# T\n\n\n"
    assert book.markdown("![a](results/a.png)") == "![a](results/a.png)"
    assert book.markdown("in `solutions/01_a.ipynb`.") == "in [`solutions/01_a.ipynb`](solutions/01_a.ipynb)."
    for jupyter in ("#What-goes-wrong:-a-mask,-lost", "02.ipynb#What-goes-wrong%3A-a-mask%2C-lost"):
        assert book.markdown(f"[x]({jupyter})").endswith("#what-goes-wrong-a-mask-lost)")
    assert book.anchor("What goes wrong: a mask, lost") == "what-goes-wrong-a-mask-lost"
    assert book.markdown("[x](https://example.org/#Top)") == "[x](https://example.org/#Top)"


def test_pins_of_the_book_are_exact_and_not_in_the_lock_file():
    def pins(path: Path) -> dict[str, str]:
        lines = (line for line in path.read_text("utf8").splitlines() if not line.startswith("#"))
        return {canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, lines)}

    own = pins(Path(book.__file__).with_suffix(".lock"))
    assert {"sphinx", "myst-nb", "furo", "latex2mathml", "ziamath"} <= set(own)
    assert all(version.startswith("==") for version in own.values())
    assert not set(own) & set(pins(cells.ROOT / "requirements.lock"))


# --------------------------------------------------------------------------------- the site; built once for all checks


def needs_no_network(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text("utf8")
        tags = re.findall(r"<(?:script|link|img|source|iframe|video|audio|object|embed)\b[^>]*>", text)
        assert not [tag for tag in tags if re.search(r"""(?:src|href|srcset|data)=["'](?:https?:)?//""", tag)], path
        assert not [name for name in re.findall(LOCAL, text) if not (path.parent / html.unescape(name)).is_file()], path
    for path in site.rglob("*.css"):
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", path.read_text("utf8")), path
    assert (site / "_static/STIXTwoMath-Regular.ttf").exists()


def has_pages_formulas_figures_and_an_index(site: Path) -> None:
    assert all((site / f"{page}.html").exists() for page in ["index", *PAGES])
    front, attention = ((site / f"{page}.html").read_text("utf8") for page in ("index", "notebooks/01_attention"))
    order = [front.index(f'internal" href="{page}.html"') for page in PAGES[1:]]
    assert order == sorted(order)
    formulas = re.findall(r"<math.*?</math>", attention, re.DOTALL)
    assert len(formulas) > 30 and "<msqrt>" in "".join(formulas) and "\\" not in "".join(formulas)
    figures = re.findall(r'<img alt="([^"]*)"[^>]* src="data:image/png;base64,', attention)
    assert figures and all(len(alt) > 20 for alt in figures)
    assert "lora" in (site / "searchindex.js").read_text("utf8")


def can_be_searched(site: Path, browser: str, profile: Path) -> None:
    """As a file of the disk, in a browser that reaches no host."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    options += ["--virtual-time-budget=10000", f"--user-data-dir={profile}"]
    page = f"{(site / 'search.html').as_uri()}?q=lora"
    shown = subprocess.check_output([browser, *options, page], text=True)
    assert '<a href="notebooks/03b_which_parameters_move.html"' in shown


def test_the_site(tmp_path):
    for package in ("myst_nb", "furo", "latex2mathml", "ziamath"):
        pytest.importorskip(package, reason="make unit and make book install it")
    site = tmp_path / "build" / "book"
    assert book.build(site) == 0, "Sphinx warned"
    needs_no_network(site)
    has_pages_formulas_figures_and_an_index(site)
    if browser := shutil.which("chromium") or shutil.which("google-chrome"):
        can_be_searched(site, browser, tmp_path / "profile")
