"""The runner executes, measures, reports a failure by its cell, and cleans what it writes back."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cells
import nbformat
import psutil
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

    def write(name, *sources, tags=(), first="# 01 T"):
        code = [new_code_cell(text, metadata={"tags": list(tags), "editable": True}) for text in sources]
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=[new_markdown_cell(first), *code]), path)
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


def wait_for(path):
    """The source of a cell that ends when this file is there."""
    return f"""import pathlib, time
begun = time.monotonic()
while not pathlib.Path({str(path)!r}).exists():
    assert time.monotonic() < begun + 60
    time.sleep(0.01)"""


def test_two_run_at_a_time_each_with_its_own_memory(series, tmp_path, capsys):
    """Each ends only when the other has begun."""
    one, two = tmp_path / "one", tmp_path / "two"
    threads = "import os\nassert os.environ['OMP_NUM_THREADS'] == '1'"
    series("01_one", threads, f"held = b'x' * 300_000_000\nopen({str(one)!r}, 'w')", wait_for(two), "time.sleep(0.5)")
    series("02_two", threads, f"open({str(two)!r}, 'w')", wait_for(one), "time.sleep(0.5)")
    assert run.main(["--jobs", "2"]) == 0
    times = run.read_times()
    assert times["01_one"]["peak_mb"] > times["02_two"]["peak_mb"] + 200
    out = capsys.readouterr().out
    assert "To run: 2, 2 at a time" in out and out.index("01_one  ok") > out.index("02_two begins")


@pytest.mark.parametrize(
    ("count", "cores", "gigabytes", "gpu", "expected"),
    [(12, 2, 16, None, 2), (12, 8, 9, None, 2), (12, 2, 3, None, 1), (1, 8, 64, None, 1), (12, 8, 64, "nvidia-smi", 1)],
)
def test_as_many_at_a_time_as_the_machine_bears(count, cores, gigabytes, gpu, expected, monkeypatch):
    monkeypatch.setattr(run.joblib, "cpu_count", lambda: cores)
    memory = psutil.virtual_memory()._replace(available=gigabytes * 2**30)
    monkeypatch.setattr(run.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(run.shutil, "which", lambda name: gpu)
    assert run.at_a_time(count) == expected


def test_the_longest_begins_first_by_its_last_time_or_by_what_it_says(series, capsys):
    series("01_one", "1", first="# T\n\n**Time and memory:** 45 s and 1.2 GB on 2 CPU cores.")
    series("02_two", "2", first="# T\n\n**Time and memory:** 2 min 46 s and 2.8 GB on 2 CPU cores.")
    series("03_three", "3", first="# T\n\n**Time and memory:** 3 min and 2 GB")
    series("04_four", "4")

    def begun():
        assert run.main(["--jobs", "1"]) == 0
        return [line.split("] ")[1] for line in capsys.readouterr().out.splitlines() if " begins" in line]

    stated = ["03_three begins, about 3 min 0 s", "02_two begins, about 2 min 46 s", "04_four begins"]
    assert begun() == [*stated, "01_one begins, about 45 s"]
    times = run.read_times()
    assert times.keys() == {"01_one", "02_two", "03_three", "04_four"} and not any("done" in t for t in times.values())
    times["01_one"]["seconds"], times["03_three"]["settings"] = 999.0, "size full"  # times of another size say nothing
    run.write_times(times)
    assert [line.split()[0] for line in begun()][:2] == ["01_one", "03_three"]


def ran(capsys):
    return sorted(line.split()[3] for line in capsys.readouterr().out.splitlines() if " begins" in line)


def test_a_series_that_failed_goes_on_with_what_is_left(series, tmp_path, capsys):
    series("01_one", "1"), series("02_two", f"assert open({str(tmp_path / 'mended')!r})")
    assert run.main([]) == 1
    assert "Started again, it goes on with what has not ended well: 1 of 2\n" in capsys.readouterr().out
    assert run.main([]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 ended well before" in out and "rm build/notebooks/times.json" in out and "01_one begins" not in out
    assert [line.split()[-2:] for line in out.splitlines() if line.startswith("01_one ")] == [["ok,", "before"]]
    (tmp_path / "mended").touch()
    assert run.main([]) == 0 and ran(capsys) == ["02_two"]
    assert run.main([]) == 0 and ran(capsys) == ["01_one", "02_two"]  # that one ended well


def test_only_what_is_as_it_was_is_left_out(series, tmp_path):
    one, two = series("01_one", "1"), series("02_two", "2")
    done = {"seconds": 3.0, "peak_mb": 4.0, "settings": "small", "done": run.digest(one, "small")}

    def left(paths, settings="small"):
        return [each.name for each in run.plan(paths, settings, {"01_one": dict(done)}) if each.result == "not run"]

    assert left([one, two]) == ["02_two"]
    assert left([one, two], "full") == ["01_one", "02_two"]
    assert left([one]) == ["01_one"]  # nothing is left of this series, so it starts anew
    (tmp_path / "ftlib").mkdir()
    (tmp_path / "ftlib" / "losses.py").write_text("x = 1")
    assert left([one, two]) == ["01_one", "02_two"]
    (tmp_path / "ftlib" / "losses.py").unlink()
    assert left([one, two]) == ["02_two"]
    series("01_one", "11")
    assert left([one, two]) == ["01_one", "02_two"]


def test_a_refresh_that_failed_goes_on_with_what_is_left(series, tmp_path, capsys):
    path, _ = series("01_one", "1 + 1"), series("02_two", "1 / 0")
    assert run.main(["--refresh"]) == 1 and ran(capsys) == ["01_one", "02_two"]
    assert run.main(["--refresh"]) == 1 and ran(capsys) == ["02_two"]
    series("01_one", "1 + 1")  # without its output, as a checkout would leave it
    assert run.main(["--refresh"]) == 1 and ran(capsys) == ["01_one", "02_two"]
    assert 'execution_count": 1' in path.read_text()


def gone(pid):
    """Whether a process has ended; one that nobody has asked about its end is a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.skipif(os.name == "nt", reason="process groups")
def test_ctrl_c_ends_with_the_table_and_the_series_goes_on(series, tmp_path):
    (tmp_path / "tests" / "notebooks").mkdir(parents=True)
    for file in ("run.py", "cells.py"):
        shutil.copy(Path(__file__).with_name(file), tmp_path / "tests" / "notebooks")
    pids, gate = tmp_path / "pids", tmp_path / "gate"
    child = "import os, subprocess\nchild = subprocess.Popen(['sleep', '600'])"
    note = f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n')\n"
    series("01_one", "1", first="**Time and memory:** 1 min 40 s"), series("03_three", "3")
    series("02_two", child, note + wait_for(gate), first="**Time and memory:** 1 min 30 s")
    command = [sys.executable, tmp_path / "tests" / "notebooks" / "run.py", "--jobs", "1"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, start_new_session=True, **options)
    begun = time.monotonic()
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < begun + 60
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in out
    results = {line.split()[0]: line.split(maxsplit=3)[3] for line in out[out.index("peak MB") :].splitlines()[1:4]}
    assert results == {"01_one": "ok", "02_two": "stopped in cell 3 of 3", "03_three": "not run"}
    begun = time.monotonic()
    while not all(gone(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < begun + 10
        time.sleep(0.01)
    gate.touch()
    again = subprocess.run(command, **options)
    assert again.returncode == 0 and "1 of 3 ended well before" in again.stdout and "01_one begins" not in again.stdout


def test_what_runs_is_drawn_in_place_on_a_terminal(series, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    series("01_a_notebook_with_a_name_too_long_for_a_terminal", "import time; time.sleep(2)")
    assert run.main([]) == 0
    out = capsys.readouterr().out
    drawn = out[: out.index("[1 of 1]")].split("\x1b[2F\x1b[J")
    assert len(drawn) > 2 and "  0 of 1 done, about " in drawn[0] and "begins" not in out
    name, filled = "01_a_notebook_with_a_name_too_long_for_a_terminal", [part.count("█") for part in drawn[1:-1]]
    assert drawn[-2].splitlines()[1] == f"  {name}  {'cell 2 of 2':<15}"[:59]
    assert filled == sorted(filled)


def test_what_the_chosen_notebooks_name_is_fetched_first(series, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(run.ftlib.assets, "fetch", asked.append)
    series("01_one", "data = dict(name='stsb')\nscript = 'ftlib.load_model(\"minilm\")'", first='`imdb`, "imdb"')
    series("02_two", "x = ['smollm2', 'imdb']")
    assert run.main(["01"]) == 0 and asked == [["minilm", "stsb"]]
    assert "of 2 corpora and weights are in" in capsys.readouterr().err
    assert run.main(["02"]) == 0 and asked[1:] == [["smollm2", "imdb"]]


def test_the_series_needs_600_mb_of_downloads_at_most():
    assert run.named(run.choose(["03"], solutions=False)) == ["minilm", "rotten-tomatoes"]
    rows = run.ftlib.assets.describe(run.named(cells.find_notebooks()))
    assert 100 < sum({row["package"]: row["megabytes"] for row in rows}.values()) <= 600


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_core_runs_the_first_part(tmp_path):
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "-n", "-o", "install", "core"]
    done = subprocess.run(command, cwd=cells.ROOT, env=alone, capture_output=True, text=True)
    assert done.stdout.split() == [".venv/bin/python", "tests/notebooks/run.py", *"01 02 03 03b 04 05 05b".split()]


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
