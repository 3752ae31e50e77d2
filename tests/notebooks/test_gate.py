"""The gate catches one broken notebook for each rule and says where; `make url` changes what it should."""

import copy
import json
import re
import textwrap

import cells
import gate
import pytest
import url

URL = "https://github.com/OWNER/ftlib"
FIGURE = {
    "output_type": "display_data",
    "metadata": {},
    "data": {"image/png": "iVBOR", "text/plain": "<Figure>"},
}


def html_figure(alt):
    """A figure as ftlib.show_figure shows it."""
    html = f'<img alt="{alt}" width="9" src="data:image/png;base64,iVBOR">'
    return {"output_type": "display_data", "metadata": {}, "data": {"text/html": html, "text/plain": alt}}


def markdown(text):
    return {"cell_type": "markdown", "metadata": {}, "source": textwrap.dedent(text).strip()}


def code(text, *tags, printed=None, outputs=()):
    outputs = list(outputs) or ([stream(printed)] if printed is not None else [])
    metadata = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code",
        "metadata": metadata,
        "outputs": outputs,
        "source": textwrap.dedent(text).strip(),
    }


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def error(name="ZeroDivisionError", trace=()):
    return {"output_type": "error", "ename": name, "evalue": "no", "traceback": list(trace)}


def check_cell(number, result):
    text = f"""
        def check_{number}(answer):
            if answer is ...:
                return "not answered yet"
            assert answer == {number}, "count again"
            return "correct"


        print("Exercise {number}:", check_{number}(answer_{number}))"""
    return code(text, "exercise-check", "nbval-check-output", printed=f"Exercise {number}: {result}\n")


def wrong_cell(number):
    text = f"""
        try:
            check_{number}(7)
        except AssertionError as hint:
            print("caught:", hint)
        else:
            raise AssertionError("check_{number} accepts 7")"""
    return code(text, "wrong-answer", printed="caught: count again\n")


def lesson():
    title = f"""
        # 01 Counting

        Count to three.

        **You need:** fingers.

        **Time and memory:** 2 min 3 s and 1.2 GB on 2 CPU cores.

        {cells.badge(URL, "notebooks/01_counting.ipynb")}"""
    exercises = [
        cell
        for number in (1, 2, 3)
        for cell in (
            markdown(f"### Exercise {number}: count"),
            code(f"answer_{number} = ...", "exercise"),
            check_cell(number, "not answered yet"),
        )
    ]
    return numbered(
        markdown(title),
        code(cells.setup_cell(URL), "setup", printed="torch 2.13.0\n"),
        code("data = ftlib.load_corpus('numbers')\nprint(len(data))", "nbval-check-output", printed="3\n"),
        code("plt.show()", outputs=[FIGURE]),
        markdown("*Figure 1. A line.*"),
        markdown("## What goes wrong: dividing"),
        code("1 / 0", "raises-exception", outputs=[error()]),
        markdown(f"## On a GPU\n\nNo GPU has been measured so far: [how](../{gate.GPU_DAY})"),
        code("if env.size == 'full':\n    print(1)"),
        markdown("## Exercises"),
        *exercises,
        markdown("## Recap"),
    )


def solutions():
    title = f"# 01 Counting: solutions\n\n{cells.badge(URL, 'notebooks/solutions/01_counting.ipynb')}"
    blocks = [
        cell
        for number in (1, 2, 3)
        for cell in (
            markdown(f"### Exercise {number}: count"),
            code(f"answer_{number} = {number}", "solution"),
            check_cell(number, "correct"),
            wrong_cell(number),
        )
    ]
    return numbered(markdown(title), code(cells.setup_cell(URL), "setup"), *blocks)


def numbered(*some_cells):
    count = 0
    for cell in some_cells:
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"] = count
    notebook = {"cells": list(some_cells), "metadata": cells.METADATA, "nbformat": 4, "nbformat_minor": 5}
    cells.add_contents(notebook)
    cells.name_cells(notebook)
    return copy.deepcopy(notebook)


@pytest.fixture
def project(tmp_path):
    """A small project: its address, a package with lazy names, one notebook and its solutions."""
    (tmp_path / "ftlib").mkdir()
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{URL}"\n')
    (tmp_path / "ftlib/__init__.py").write_text(
        '_HOME = {"load_corpus": "corpora", "setup": "corpora", "gone": "x"}\n_ROOMS = {"show": ("plots", "setup")}'
    )
    (tmp_path / "ftlib/show").mkdir()
    (tmp_path / "ftlib/show/__init__.py").touch()
    (tmp_path / "ftlib/show/plots.py").write_text("PALETTE = ()\ndef heat_map(values): ...")
    (tmp_path / "ftlib/show/setup.py").write_text("def pick(): ...")
    (tmp_path / "ftlib/corpora.py").write_text(
        "def load_corpus(name): ...\ndef setup(seed): ...\ndef _hidden(): ..."
    )
    save(tmp_path, lesson(), solutions())
    return tmp_path


def save(root, first, second):
    cells.write(root / "notebooks/01_counting.ipynb", first)
    cells.write(root / "notebooks/solutions/01_counting.ipynb", second)


def findings(root, capsys):
    status = gate.main([], root)
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert status == bool(lines)
    return lines


def test_a_good_pair_passes(project, capsys):
    assert findings(project, capsys) == []


def test_every_way_to_a_name_in_a_room_passes(project, capsys):
    notebook = lesson()
    put(3, source="""import ftlib
import ftlib.show.plots as drawn
from ftlib import plots, setup, show
from ftlib.show import plots as same
from ftlib.show.plots import PALETTE, heat_map
from ftlib.show.setup import pick
ftlib.show.plots.heat_map, ftlib.plots.PALETTE, ftlib.show.setup.pick, plots.PALETTE.x, drawn.heat_map, same.PALETTE
ftlib.setup(seed=0).device  # a function and a module are called so
show.plots.heat_map""")(notebook)
    save(project, notebook, solutions())
    assert findings(project, capsys) == []


@pytest.mark.parametrize("place", ["text", "output"])
def test_a_table_of_a_gpu_passes(place, project, capsys):
    notebook, table = lesson(), "| device | ms |\n|---|---|\n| H200 | 12 |\n"
    text(7, "No GPU has been measured so far: [how]", table if place == "text" else "Measured [so]")(notebook)
    if place == "output":
        both = {"text/plain": "device  ms\n------  --\nH200    12", "text/markdown": table}
        shown(8, {"output_type": "display_data", "metadata": {}, "data": both})(notebook)
    save(project, notebook, solutions())
    (project / "tests/benchmarks/results").mkdir(parents=True)
    (project / "tests/benchmarks/results/gpu-day-2-speed-nvidia-h200.json").write_text("{}")
    assert findings(project, capsys) == []


def test_a_figure_of_show_figure_passes(project, capsys):
    notebook = lesson()
    shown(3, html_figure("A line that falls, &quot;slowly&quot;."))(notebook)
    save(project, notebook, solutions())
    assert findings(project, capsys) == []


def test_a_bare_png_passes_until_the_notebook_has_moved_to_show_figure(project, capsys):
    """The lesson's own PNG has no alt text, and passes; beside a figure of show_figure it does not."""
    notebook, bare = lesson(), "notebooks/01_counting.ipynb: cell 4: a figure without an alt text: say what it shows"
    notebook["cells"][3]["outputs"] = [FIGURE, html_figure("A line.")]
    save(project, notebook, solutions())
    assert [line[: len(bare)] for line in findings(project, capsys)] == [bare]
    with_alt = {**FIGURE, "metadata": {"image/png": {"alt": "A line."}}}
    notebook["cells"][3]["outputs"] = [with_alt, html_figure("A line.")]
    save(project, notebook, solutions())
    assert findings(project, capsys) == []


def test_results_of_a_gpu_belie_that_there_are_none(project, capsys):
    (project / "tests/benchmarks/results").mkdir(parents=True)
    (project / "tests/benchmarks/results/speed-cpu.json").write_text("{}")
    assert findings(project, capsys) == []
    (project / "tests/benchmarks/results/gpu-day-2-speed-nvidia-h200.json").write_text("{}")
    [line] = findings(project, capsys)
    assert "cell 8: it says that no GPU has been measured, and there are results of one" in line


def test_an_empty_series_fails(tmp_path, capsys):
    assert gate.main([], tmp_path) == 1
    assert "needs one at least" in capsys.readouterr().err


def put(index, **fields):
    """Change fields of one cell; the execution counts and ids stay right."""
    return lambda notebook: notebook["cells"][index].update(fields)


def text(index, old, new):
    def change(notebook):
        cell = notebook["cells"][index]
        assert old in cells.source(cell)
        cell["source"] = cells.source(cell).replace(old, new)

    return change


def tag(index, *names):
    return put(index, metadata={"tags": list(names)})


def shown(index, output):
    return put(index, outputs=[output])


# Cells of the lesson: 0 title, 1 set-up, 2 compared, 3 figure, 4 caption, 5 what goes wrong, 6 raises,
# 7 GPU heading, 8 guarded, 9 exercises, 10-12 exercise 1, 13-15 exercise 2, 16-18 exercise 3, 19 recap.
LESSON = {
    "title number": (text(0, "# 01", "# 02"), "cell 1: no title"),
    "promise": (text(0, "Count to three.\n\n", ""), "cell 1: no promise"),
    "needs": (text(0, "**You need:**", "You need"), "cell 1: no line `**You need:** …`"),
    "time": (text(0, "2 min 3 s and", "soon and"), "cell 1: no line `**Time and memory:** …`"),
    "memory": (text(0, "1.2 GB", "little"), "cell 1: no line `**Time and memory:** …`"),
    "badge": (text(0, "OWNER", "SOMEONE"), "cell 1: the Colab badge"),
    "contents": (text(0, "- [Recap](#Recap)", "- [Recap](#recap)"), "cell 1: the contents differ"),
    "no contents": (lambda n: text(0, cells.contents(n), "")(n), "cell 1: the contents differ"),
    "contents by hand": (text(0, "Count to", "**Contents:** one · two\n\nCount to"), "cell 1: the contents differ"),
    "new heading": (text(9, "## Exercises", "## Exercises\n\n## More"), "cell 1: the contents differ"),
    "reading time": (text(0, "about 5 minutes", "about 10 minutes"), "cell 1: the contents differ"),
    "heading without a link": (text(5, "dividing", "÷"), "the heading `What goes wrong: ÷`, to which no link leads"),
    "long title": (text(0, "Count to three.", "Count to three." + "\n" * 26), "cell 1: 3"),
    "no set-up": (tag(1), "set-up cells at []"),
    "late set-up": (lambda n: (tag(1)(n), tag(2, "setup")(n)), "set-up cells at [3]"),
    "set-up text": (text(1, "seed=0", "seed=1"), "cell 2: the set-up cell differs"),
    "long cell": (put(3, source="\n".join(["x = 1"] * 26)), "cell 4: 26 lines"),
    "syntax": (put(3, source="x = ("), "cell 4: does not parse"),
    "magic": (put(3, source="%timeit 1"), "cell 4: does not parse"),
    "pip magic": (put(3, source="%pip install x"), "cell 4: a magic or an install"),
    "install": (put(3, source="run('pip install x')"), "cell 4: a magic or an install"),
    "nbval comment": (put(3, source="# NBVAL_SKIP\nx = 1"), "cell 4: an NBVAL comment"),
    "unknown tag": (tag(3, "nbval-skip"), "cell 4: unknown tag nbval-skip"),
    "seed": (put(3, source="np.random.default_rng()"), "cell 4: default_rng() without a seed"),
    "late global": (
        put(3, source="size = 1\n\n\ndef area():\n    return size**2\n\n\nfor size in (1, 2):\n    area()"),
        "cell 4: area() reads size, which cell 4 assigns later",
    ),
    "empty cell": (put(3, source=""), "cell 4: an empty code cell"),
    "index host": (put(4, source="*Figure* --index-url x"), "cell 5: a package index"),
    "path in source": (put(3, source="open('/home/ann/x')"), "cell 4: the machine path /home/a"),
    "path in output": (shown(8, stream("/tmp/x12/model")), "cell 9: the machine path /tmp/x"),
    "path in traceback": (
        shown(6, error(trace=["\x1b[32m/home/ann/x.py\x1b[39m"])),
        "cell 7: the machine path",
    ),
    "windows path": (shown(8, stream("C:\\Users\\ann")), "cell 9: the machine path C:"),
    "not executed": (put(3, execution_count=None), "cell 4: execution count None instead of 3"),
    "out of order": (put(3, execution_count=9), "cell 4: execution count 9 instead of 3"),
    "error output": (shown(8, error()), "cell 9: an error output (ZeroDivisionError)"),
    "nothing raised": (put(6, outputs=[]), "cell 7: tagged raises-exception, but it raised nothing"),
    "stderr": (shown(8, stream("hm", "stderr")), "cell 9: a stderr output"),
    "progress bar": (shown(8, stream(" 30%|███   | 3/10 [00:01<00:02,  3.1it/s]")), "cell 9: a progress bar"),
    "widget": (
        shown(8, {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}),
        "cell 9: a widget output",
    ),
    "svg": (
        shown(3, {**FIGURE, "data": {"image/svg+xml": "<svg/>", "text/plain": "<Figure>"}}),
        "cell 4: a figure as image/svg+xml",
    ),
    "no picture": (shown(3, {**FIGURE, "data": {"text/plain": "<Figure>"}}), "cell 4: a figure without its picture"),
    "no text form": (
        shown(3, {**FIGURE, "data": {"image/png": "iVBOR"}}),
        "cell 4: an output without a text form",
    ),
    "javascript": (
        shown(8, {"output_type": "display_data", "data": {"application/javascript": "", "text/plain": ""}}),
        "cell 9: a JavaScript output",
    ),
    "object address": (shown(8, stream("<Line2D at 0x7f12ab34cd56>")), "cell 9: a memory address"),
    "compared nothing": (put(2, outputs=[]), "cell 3: a compared cell without output"),
    "compared figure": (shown(2, FIGURE), "cell 3: a figure in a compared output"),
    "compared address": (shown(2, stream("0x7f12ab34")), "cell 3: a memory address"),
    "compared digits": (shown(2, stream("0.69314")), "cell 3: the float 0.69314"),
    "compared exponent": (shown(2, stream("1e-09")), "cell 3: the float 1e-09"),
    "compared time": (shown(2, stream("took 2.1 s")), "cell 3: a time (1 s)"),
    "compared warning": (shown(2, stream("UserWarning: hm")), "cell 3: a warning (UserWarning)"),
    "caption": (put(4, source="A line."), "cell 4: a figure without a caption"),
    "caption of an html figure": (
        lambda n: (shown(3, html_figure("A line."))(n), put(4, source="A line.")(n)),
        "cell 4: a figure without a caption",
    ),
    "empty alt text": (shown(3, html_figure("")), "cell 4: a figure without an alt text"),
    "blank alt text": (shown(3, html_figure(" ")), "cell 4: a figure without an alt text"),
    "no alt text": (
        shown(3, {**FIGURE, "data": {"text/html": html_figure("")["data"]["text/html"].replace('alt="" ', "")}}),
        "cell 4: a figure without an alt text",
    ),
    "bare PNG by show_figure": (put(3, source="ftlib.show_figure"), "cell 4: a figure without an alt text"),
    "remote image": (
        shown(3, {**FIGURE, "data": {"text/html": '<img alt="A line." src="https://x.org/a.png">', "text/plain": ""}}),
        "cell 4: an <img> that is no PNG inside the notebook",
    ),
    "compared html figure": (shown(2, html_figure("A line.")), "cell 3: a figure in a compared output"),
    "section": (text(5, "What goes wrong", "Trouble"), "0 cells that start with `## What goes wrong`"),
    "section twice": (text(9, "## Exercises", "## Recap"), "2 cells that start with `## Recap`"),
    "section order": (
        lambda n: (text(5, "What goes wrong", "Recap")(n), text(19, "Recap", "What goes wrong")(n)),
        "the closing sections are out of order",
    ),
    "guard": (put(8, source="print(1)"), "cell 8: no guarded code cell"),
    "measured": (text(7, "../tests/", "other/"), "cell 8: neither a measured table nor"),
    "old words in text": (text(4, "A line", "Not measured yet"), "cell 5: the words `not measured yet`"),
    "old words in an output": (shown(8, stream("not measured yet")), "cell 9: the words `not measured yet`"),
    "few exercises": (text(16, "### Exercise 3", "### Task 3"), "2 exercises"),
    "exercise order": (text(13, "Exercise 2", "Exercise 4"), "cell 14: exercise 4 comes where exercise 2"),
    "exercise cells": (tag(11), "cell 11: exercise 1 is not followed by its two cells"),
    "stray exercise": (tag(8, "exercise"), "4 cells tagged `exercise`"),
    "answer given away": (put(11, source="answer_1 = 1"), "cell 12: answer_1 is not left open"),
    "answer name": (put(11, source="answer = ..."), "cell 12: answer_1 is not left open"),
    "solution in lesson": (tag(8, "solution"), "cell 9: a cell tagged `solution`"),
    "no check function": (text(12, "def check_1", "def test_1"), "cell 13: no function check_1(answer)"),
    "check is silent": (
        text(12, '"not answered yet"', '"hm"'),
        'cell 13: check_1 does not tell "not answered',
    ),
    "no hint": (text(12, ', "count again"', ""), "cell 13: check_1 has no assert, or one without a hint"),
    "check not compared": (
        tag(12, "exercise-check"),
        "cell 13: an exercise-check whose output is not compared",
    ),
    "check output": (
        shown(12, stream("Exercise 1: correct")),
        "cell 13: the check shows 'Exercise 1: correct'",
    ),
    "cell metadata": (put(3, metadata={"execution": {}}), "cell 4: cell metadata execution"),
    "widget state": (
        lambda n: n.update(metadata={**cells.METADATA, "widgets": {}}),
        "metadata of one machine",
    ),
    "python version": (
        lambda n: n.update(
            metadata={**cells.METADATA, "language_info": {"name": "python", "version": "3.11.7"}}
        ),
        "metadata of one machine or editor (kernelspec or language_info)",
    ),
    "format": (lambda n: n.update(nbformat_minor=4), "format 4.4"),
    "same id": (lambda n: n["cells"][3].update(id=n["cells"][2]["id"]), "a cell without an id of its own"),
    "size": (shown(8, stream("x" * 1_000_000)), "1.01 MB"),
    "name": (put(3, source="ftlib.load_corpora('x')"), "cell 4: ftlib.load_corpora does not exist"),
    "name that no module defines": (put(3, source="ftlib.gone"), "cell 4: ftlib.gone does not exist"),
    "private module name": (put(3, source="ftlib.corpora.nothing"), "cell 4: ftlib.corpora.nothing does not"),
    "from import": (put(3, source="from ftlib import tun"), "cell 4: ftlib.tun does not exist"),
    "from module import": (
        put(3, source="from ftlib.corpora import tun"),
        "cell 4: ftlib.corpora.tun does not",
    ),
    "no module": (put(3, source="from ftlib.corpus import x"), "cell 4: ftlib.corpus does not exist"),
    "no module at all": (put(3, source="import ftlib.corpus"), "cell 4: ftlib.corpus does not exist"),
    "alias": (put(3, source="import ftlib as f\nf.lod"), "cell 4: ftlib.lod does not exist"),
    "room": (put(3, source="import ftlib\nftlib.show.plot.x"), "cell 4: ftlib.show.plot does not exist"),
    "name in a room": (put(3, source="ftlib.show.plots.line"), "cell 4: ftlib.show.plots.line does not exist"),
    "module handed out": (put(3, source="ftlib.plots.line"), "cell 4: ftlib.plots.line does not exist"),
    "from module in a room": (
        put(3, source="from ftlib.show.plots import heat_map, line"),
        "cell 4: ftlib.show.plots.line does not exist",
    ),
    "module of a room alias": (
        put(3, source="from ftlib.show import plots\nplots.line"),
        "cell 4: ftlib.show.plots.line does not exist",
    ),
    "module handed out is no path": (put(3, source="from ftlib.plots import PALETTE"), "cell 4: ftlib.plots does not"),
    "module alias": (
        put(3, source="from ftlib import corpora as c\nc.lod"),
        "cell 4: ftlib.corpora.lod does not",
    ),
}

# Cells of the solutions: 0 title, 1 set-up; then four an exercise: heading, solution, check, wrong answer.
SOLUTIONS = {
    "title": (text(0, ": solutions", ""), "cell 1: the title does not end in"),
    "badge": (text(0, "solutions/01", "01"), "cell 1: the Colab badge"),
    "no set-up": (tag(1), "set-up cells at []"),
    "missing": (text(10, "Exercise 3", "Exercise 4"), "solves exercises [1, 2, 4]"),
    "heading": (text(2, "count", "add"), "cell 3: the heading differs"),
    "no solution": (tag(3), "cell 3: no cell tagged `solution` gives answer_1"),
    "check differs": (text(4, "count again", "hm"), "cell 5: the check differs"),
    "check fails": (shown(4, stream("Exercise 1: not answered yet")), "cell 5: the check shows"),
    "no check": (tag(4, "nbval-check-output"), "cell 3: 0 check cells"),
    "no wrong answer": (tag(5), "cell 3: no cell tagged `wrong-answer`"),
    "wrong answer passes unseen": (
        text(5, 'raise AssertionError("check_1 accepts 7")', "pass"),
        "cell 6: a wrong answer",
    ),
    "wrong answer not checked": (
        text(5, "check_1(7)", "check_2(7)"),
        "cell 6: a wrong answer that would pass",
    ),
    "not caught": (put(5, outputs=[]), "cell 6: the wrong answer is not shown as caught"),
}


@pytest.mark.parametrize("rule", LESSON)
def test_gate_catches_in_a_notebook(rule, project, capsys):
    change, expected = LESSON[rule]
    notebook = lesson()
    change(notebook)
    save(project, notebook, solutions())
    found = findings(project, capsys)
    assert any(line.startswith(f"notebooks/01_counting.ipynb: {expected}") for line in found), found


@pytest.mark.parametrize("rule", SOLUTIONS)
def test_gate_catches_in_solutions(rule, project, capsys):
    change, expected = SOLUTIONS[rule]
    notebook = solutions()
    change(notebook)
    save(project, lesson(), notebook)
    found = findings(project, capsys)
    assert any(line.startswith(f"notebooks/solutions/01_counting.ipynb: {expected}") for line in found), found


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "not a notebook (Expecting"), ("[]", "not a notebook (not a notebook of format 4)")],
)
def test_gate_catches_a_file_that_is_no_notebook(content, expected, project, capsys):
    (project / "notebooks/01_counting.ipynb").write_text(content)
    assert any(expected in line for line in findings(project, capsys))


def test_gate_catches_missing_solutions_and_missing_lessons(project, capsys):
    (project / "notebooks/solutions/01_counting.ipynb").rename(
        project / "notebooks/solutions/02_adding.ipynb"
    )
    found = findings(project, capsys)
    assert "notebooks/01_counting.ipynb: no solutions: write notebooks/solutions/01_counting.ipynb" in found
    assert any(
        line.startswith("notebooks/solutions/02_adding.ipynb: no readable notebook of this name")
        for line in found
    )


def test_gate_catches_a_file_name_without_a_number(project, capsys):
    (project / "notebooks/01_counting.ipynb").rename(project / "notebooks/Counting.ipynb")
    assert any("the name Counting.ipynb" in line for line in findings(project, capsys))


def test_a_letter_belongs_to_the_number(project, capsys):
    for path in (project / "notebooks").rglob("01_counting.ipynb"):
        text = path.read_text().replace("# 01 Counting", "# 01b Counting").replace("01_counting", "01b_counting")
        path.write_text(text)
        path.rename(path.with_name("01b_counting.ipynb"))
    assert findings(project, capsys) == []


def test_a_function_may_be_the_answer(project, capsys):
    first, second = lesson(), solutions()
    first["cells"][11]["source"] = "def answer_1(x):\n    return ..."
    second["cells"][3]["source"] = "def answer_1(x):\n    return 1"
    for cell in (first["cells"][12], second["cells"][4]):
        cell["source"] = cells.source(cell).replace("answer is ...", "answer(1) is ...")
    save(project, first, second)
    assert findings(project, capsys) == []


def test_new_address_reaches_every_badge_and_setup_cell_and_nothing_else(project, capsys):
    new = "https://github.com/someone/lessons"
    (project / "README.md").write_text(
        f"{URL} {URL}-data {URL}/issues\n{cells.badge(URL, 'notebooks/01_counting.ipynb')}\n"
    )
    before = lesson()
    assert url.main([new + "/"], project) == 0
    assert cells.project_url(project / "pyproject.toml") == new
    badge = cells.badge(new, "notebooks/01_counting.ipynb")
    assert (project / "README.md").read_text() == f"{new} {URL}-data {new}/issues\n{badge}\n"
    capsys.readouterr()
    assert findings(project, capsys) == []
    after = cells.read(project / "notebooks/01_counting.ipynb")
    changed = [i for i, pair in enumerate(zip(before["cells"], after["cells"], strict=True))
               if cells.source(pair[0]) != cells.source(pair[1])]  # fmt: skip
    assert changed == [0, 1]


def test_present_address_mends_a_badge_and_changes_a_good_notebook_not_at_all(project, capsys):
    good = (project / "notebooks/01_counting.ipynb").read_bytes()
    assert url.main([], project) == 0
    assert (project / "notebooks/01_counting.ipynb").read_bytes() == good
    notebook = lesson()
    text(0, cells.badge(URL, "notebooks/01_counting.ipynb"), "")(notebook)
    put(1, source="import ftlib")(notebook)
    save(project, notebook, solutions())
    assert url.main([], project) == 0
    assert (project / "notebooks/01_counting.ipynb").read_bytes() == good


def test_without_an_address_nothing_shows_one_and_the_first_one_reaches_all(project, capsys):
    markers = "<!-- address: make url -->\n", "<!-- end of address -->\nmore\n"
    (project / "pyproject.toml").write_text("[project.urls]\n# the one place\n\n[tool.x]\n")
    (project / "README.md").write_text("".join(markers))
    assert len(findings(project, capsys)) == 4  # two badges that lead nowhere, two set-up cells
    assert url.main([], project) == 0
    assert "no address yet: 2 files changed" in capsys.readouterr().out
    assert findings(project, capsys) == []
    assert "github.com" not in (project / "notebooks/01_counting.ipynb").read_text()
    assert (project / "README.md").read_text() == "".join(markers)
    text(0, "Count to three.", f"Count.\n\n{cells.badge(URL, 'notebooks/01_counting.ipynb')}")(notebook := lesson())
    save(project, notebook, solutions())
    assert "cell 1: the Colab badge leads nowhere, no address is set: run `make url`" in findings(project, capsys)[0]

    new = "https://github.com/me/lessons"
    assert url.main([new], project) == 0
    assert (project / "pyproject.toml").read_text() == (
        f'[project.urls]\n# the one place\nRepository = "{new}"\n\n[tool.x]\n'
    )
    capsys.readouterr()
    assert findings(project, capsys) == []
    assert cells.badge(new, "notebooks/01_counting.ipynb") in (project / "notebooks/01_counting.ipynb").read_text()
    front = (project / "README.md").read_text()
    assert front.startswith(markers[0]) and front.endswith(markers[1])
    assert f"\ngit clone {new} && cd lessons\n" in front and "colab.research.google.com/github/me/lessons/blob" in front
    assert url.main([new + "2"], project) == 0
    assert (project / "README.md").read_text() == front.replace("lessons", "lessons2")


@pytest.mark.parametrize("address", ["https://example.org/ftlib", "github.com/a/b", "https://github.com/a"])
def test_an_address_colab_cannot_open_is_refused(address, project, capsys):
    assert url.main([address], project) == 2
    assert "Colab opens notebooks from https://github.com" in capsys.readouterr().err
    assert cells.project_url(project / "pyproject.toml") == URL


def test_contents_have_every_heading_and_the_time_to_read():
    first = "# 01 T\n\nDo it.\n\n**Contents:** one · two ·\nthree\n\n" + cells.badge(URL, "notebooks/01_t.ipynb")
    body = f"## A, b: `c`?\n\n{'word ' * 993}\n\n| table | 1 |\n\n$$x y z$$\n\n```bash\n## no heading\n```\n\n## 2. D"
    lines = "\n\n".join(["x = 1"] * 99)
    notebook = numbered(markdown(first), code(cells.setup_cell(""), "setup"), markdown(body), code(lines))
    # words: T, Do, it, A, b, c, D and 993 of the body; 1,000 / 200 + 99 / 20 minutes is 9.95
    assert cells.source(notebook["cells"][0]) == (
        "# 01 T\n\nDo it.\n\n**Contents**, about 10 minutes to read:\n\n"
        "- [A, b: `c`?](#A,-b:-c?)\n- [2. D](#2.-D)\n\n" + cells.badge(URL, "notebooks/01_t.ipynb")
    )
    before = copy.deepcopy(notebook)
    cells.add_contents(notebook)
    assert notebook == before


def vs_code_fragment(text):
    """What VS Code makes of a heading, and of the fragment of a link (extensions/markdown-language-features)."""
    return re.sub(r"""[][!/'"#$%&()*+,.:;<=>?@\\^{|}~`]""", "", re.sub(r"\s+", "-", text.strip().lower())).strip("-")


@pytest.mark.parametrize("path", cells.find_notebooks(solutions=False), ids=lambda path: path.stem)
def test_links_of_the_contents_lead_to_their_headings(path):
    """In nbconvert's HTML by its own function; in VS Code by the rule above; in JupyterLab the text with hyphens."""
    strings = pytest.importorskip("nbconvert.filters.strings")
    headings = cells.headings(cells.read(path))
    assert len(set(map(vs_code_fragment, headings))) == len(headings)
    for heading in headings:
        shown, fragment = heading.replace("`", ""), cells.anchor(heading)
        assert f'id="{fragment}"' in strings.add_anchor(f"<h2>{shown}</h2>")
        assert vs_code_fragment(shown) == vs_code_fragment(fragment)
        assert fragment == shown.replace(" ", "-")


def test_the_table_of_notebooks_says_their_times(tmp_path):
    def notebook(name, time):
        cells.write(tmp_path / name, {"cells": [markdown(f"# T\n\n**Time and memory:** {time}.")], "nbformat": 4})

    notebook("01_a.ipynb", "45 s and 1.2 GB on 2 CPU cores")
    notebook("02_b.ipynb", "5 min 14 s and 900 MB on 2 busy CPU cores")
    notebook("03_c.ipynb", "soon")
    rows = "| [A](01_a.ipynb) | x | {} |\n| [B](02_b.ipynb) | y | {} |\n| [C](03_c.ipynb) | 1 s |\n| [D](04.ipynb) | |"
    times = "45 s, 1.2 GB", "5 min 14 s (busy machine), 900 MB"
    assert url.with_times(rows.format("9 s, 9 GB", "?"), tmp_path) == rows.format(*times)
    page = (cells.NOTEBOOKS / "README.md").read_text("utf8")
    assert url.with_times(page, cells.NOTEBOOKS) == page, "run `make url`"


def test_ids_come_from_content_and_differ():
    notebook = {"cells": [markdown("a"), markdown("a"), markdown("b")]}
    cells.name_cells(notebook)
    first = [cell["id"] for cell in notebook["cells"]]
    cells.name_cells(notebook)
    assert first == [cell["id"] for cell in notebook["cells"]]
    assert len(set(first)) == 3 and first[1] == first[0] + "-2"


def test_written_notebook_is_what_jupyter_reads(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    cells.write(tmp_path / "01_counting.ipynb", lesson())
    nbformat.validate(nbformat.read(tmp_path / "01_counting.ipynb", as_version=4))
    assert (
        json.loads((tmp_path / "01_counting.ipynb").read_text())["cells"][0]["source"][0] == "# 01 Counting\n"
    )
