"""The runner executes, measures, reports a failure by its cell, and cleans what it writes back."""

import os
import shutil
import subprocess
import sys

import cells
import nbformat
import pytest
import run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


@pytest.fixture
def series(tmp_path, monkeypatch):
    """An empty series; the function it gives writes one notebook from the source of its code cells."""
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.setattr(cells, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(cells.find_notebooks, "__defaults__", (tmp_path / "notebooks",))
    monkeypatch.setattr(run, "BUILD", tmp_path / "build" / "notebooks")

    def write(name, *sources, tags=()):
        code = [new_code_cell(text, metadata={"tags": list(tags), "editable": True}) for text in sources]
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=[new_markdown_cell("# 01 T"), *code]), path)
        return path

    return write


def test_refresh_writes_back_a_clean_executed_notebook(series, capsys):
    noisy = "import sys, os\nprint('loss'); print(len(os.listdir()))\nprint('careful', file=sys.stderr)\n1 + 1"
    bar = "print('100%|███| 3/3 [00:01<00:00,  3.1it/s]')"
    path = series("01_one", noisy, bar)
    assert run.main(["--refresh"]) == 0
    notebook = cells.read(path)
    first, second = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert [cells.output_text(output) for output in first["outputs"]] == ["loss\n0\n", "2"]  # an empty folder
    assert second["outputs"] == []
    assert (first["execution_count"], second["execution_count"]) == (1, 2)
    assert first["metadata"] == {} and notebook["metadata"] == cells.METADATA
    nbformat.validate(nbformat.read(path, as_version=4))
    once = path.read_bytes()
    assert run.main(["--refresh"]) == 0
    assert path.read_bytes() == once
    out = capsys.readouterr().out
    assert "01_one" in out and "peak MB" in out and "Executed copies: build/notebooks/" in out
    assert (run.BUILD / "01_one.ipynb").exists()


def test_a_failing_cell_is_named_and_nothing_is_written_back(series, capsys):
    path = series("01_one", "x = 1", "raise ValueError('too few rows')")
    series("02_two", "y = 2")
    before = path.read_bytes()
    assert run.main(["--refresh"]) == 1
    out = capsys.readouterr().out
    assert "cell 3 failed" in out and "raise ValueError('too few rows')" in out
    assert "ValueError: too few rows" in out
    assert "02_two" in out and " ok" in out  # the rest of the series still ran
    assert path.read_bytes() == before


def test_a_cell_that_should_raise_must_raise(series, capsys):
    series("01_one", "1 / 1", tags=["raises-exception"])
    assert run.main([]) == 1
    assert "cell 2 is tagged raises-exception but raised nothing" in capsys.readouterr().out


def test_what_is_compared_must_be_the_same_the_second_time(series, tmp_path, capsys):
    count = f"import pathlib\nfile = pathlib.Path({str(tmp_path / 'count')!r})\nfile.open('a').write('x')\n"
    series("01_one", count + "print('runs:', len(file.read_text()))")
    assert run.main(["--twice"]) == 0  # not compared
    series("02_two", "print('the same')", count + "print('runs:', len(file.read_text()))", tags=[cells.COMPARED])
    assert run.main(["--twice", "02"]) == 1
    out = capsys.readouterr().out
    assert "02_two: cell 3 gives another output the second time" in out and "runs: 3" in out and "runs: 4" in out
    series("02_two", "print('the same')", tags=[cells.COMPARED])
    assert run.main(["--twice", "02"]) == 0


def test_names_choose_notebooks(series, capsys):
    series("01_one"), series("02_two"), series("solutions/02_two")
    assert [path.stem for path in run.choose(["02"], solutions=False)] == ["02_two"]
    assert len(run.choose(["02"], solutions=True)) == 2
    assert len(run.choose([], solutions=True)) == 3
    for unknown in ("07", "2", "0", "02_tow"):
        with pytest.raises(SystemExit):
            run.main(["02", unknown])
        assert f"no notebook starts with '{unknown}'; there are: 01_one, 02_two" in capsys.readouterr().err


def test_a_number_is_one_notebook(series, capsys):
    series("03_a"), series("03b_b"), series("03b_c"), series("05_d"), series("solutions/03_a"), series("12_e")
    for names, expected in (
        (["03"], ["03_a"]), (["03b"], ["03b_b", "03b_c"]), (["03", "05"], ["03_a", "05_d"]), (["12"], ["12_e"]),
        (["03b_c"], ["03b_c"]), (["03_a.ipynb"], ["03_a"]), (["notebooks/05_d.ipynb"], ["05_d"]), (["05_"], ["05_d"]),
    ):  # fmt: skip
        assert [path.stem for path in run.choose(names, solutions=False)] == expected, names
    assert run.main(["--list", "--solutions", "03"]) == 0
    assert capsys.readouterr().out == "notebooks/03_a.ipynb notebooks/solutions/03_a.ipynb\n"


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_checkout_that_was_moved_is_installed_again(tmp_path):
    """Into a folder with a space, too; programs of .venv get the new folder in their first line."""
    folder = tmp_path / "my checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(cells.ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$@"\n')
    python.chmod(0o755)
    heads = {
        "pytest": "#!/old/checkout/.venv/bin/python3.11", "other": "#!/usr/bin/env bash",
        "long": "#!/bin/sh\n'''exec' \"/old/my checkout/.venv/bin/python\" \"$0\" \"$@\"",
    }  # fmt: skip
    for name, head in heads.items():
        (folder / ".venv" / "bin" / name).write_text(f"{head}\nimport x\n")

    def install(folder):
        command = ["make", "install", "PYTHON=true"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return "pip install" in done.stdout

    (folder / ".venv" / ".installed").touch()  # of an older checkout, which did not say its folder
    assert install(folder) and not install(folder)
    assert (folder / ".venv" / ".installed").read_text().strip() == str(folder.resolve())
    assert (folder / ".venv" / "bin" / "pytest").read_text() == f"#!{sys.executable}\nimport x\n"
    assert (folder / ".venv" / "bin" / "other").read_text() == f"{heads['other']}\nimport x\n"
    assert f'"{sys.executable}" "$0"' in (folder / ".venv" / "bin" / "long").read_text()
    moved = folder.rename(tmp_path / "other")
    assert install(moved) and not install(moved)
    os.utime(moved / ".venv" / ".installed", (1, 1))  # older than pyproject.toml, however coarse the clock
    assert install(moved) and not install(moved)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("File /home/ann/.venv/lib/python3.11/site-packages/torch/nn/x.py:3", "File torch/nn/x.py:3"),
        ("File ~/.venv/lib/python3.12/site-packages/torch/x.py:3", "File torch/x.py:3"),
        ("/usr/lib/python3.11/json/decoder.py", "json/decoder.py"),
        ("a/b and 3/4 and http://x.org/lib/y", "a/b and 3/4 and http://x.org/lib/y"),
        (f"File {cells.ROOT}/ftlib/losses.py:12", "File ftlib/losses.py:12"),
    ],
)
def test_tracebacks_show_no_folder_of_this_machine(shown, expected):
    assert run.portable(shown) == expected
