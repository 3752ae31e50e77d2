"""The set-up cell finds ftlib where readers have it, and says what to do where it is not; nothing needs a network."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import cells
import pytest

URL = "https://github.com/me/ftlib"
COLAB = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n"
NO_NETWORK = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
SAY = "\nimport torch\nprint('ftlib is', ftlib.__file__)\nprint('torch is', torch.__file__)\nprint('ended', env.seed)\n"


@pytest.fixture
def python(tmp_path) -> Path:
    """The Python of an environment that has all that ftlib needs, and not ftlib."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # a folder on the path, whose own .pth files (one of them brings ftlib) are not read
    (own / "those.pth").write_text(sysconfig.get_path("purelib"))
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the repository, as far as its wheel needs it, in a folder with a space."""
    folder = tmp_path / "content" / "my ftlib"
    for name in ("ftlib", "tests/benchmarks/results"):
        shutil.copytree(cells.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "data/sources.toml"):
        shutil.copy(cells.ROOT / name, folder / name)
    (folder / "notebooks/solutions").mkdir(parents=True)
    return folder


def run(python: Path, cell: str, where: Path, **environment: str) -> tuple[int, str]:
    """Exit status and output of a cell, run by IPython in the working directory `where`."""
    where.mkdir(parents=True, exist_ok=True)
    (file := python.parent / "cell.ipy").write_text(cell)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", "IPython", "--no-banner", "--colors=NoColor", str(file)]
    kept |= {"IPYTHONDIR": str(python.parents[1] / "ipython")} | NO_NETWORK | environment
    done = subprocess.run(command, cwd=where, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_a_checkout_is_found_from_any_folder_in_it(python, checkout):
    status, out = run(python, cells.setup_cell("") + SAY, checkout / "notebooks/solutions")
    assert status == 0 and "ended 0" in out, out
    assert f"ftlib is {checkout / 'ftlib/__init__.py'}" in out


def test_an_installed_wheel_is_enough(python, checkout, tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=checkout)
    [wheel] = tmp_path.glob("*.whl")
    own = Path(sysconfig.get_path("purelib", vars={"base": str(python.parents[1])}))
    zipfile.ZipFile(wheel).extractall(own)  # what pip does with a wheel of Python files alone
    shutil.rmtree(checkout)
    status, out = run(python, cells.setup_cell("") + SAY + "print(len(ftlib.assets.manifest()))", tmp_path / "else")
    assert status == 0 and "ended 0" in out, out
    assert f"ftlib is {own / 'ftlib/__init__.py'}" in out


def test_in_colab_an_uploaded_folder_is_installed_and_torch_stays(python, checkout):
    own = Path(sysconfig.get_path("purelib", vars={"base": str(python.parents[1])}))
    status, out = run(python, COLAB + cells.setup_cell("") + SAY, checkout.parent)
    assert status == 0 and "ended 0" in out, out
    assert f"ftlib is {checkout / 'ftlib/__init__.py'}" in out
    assert f"torch is {sysconfig.get_path('purelib')}" in out
    installed = {path.name for path in own.glob("*.dist-info")}
    assert len(installed) == 1 and installed.pop().startswith("ftlib-")


@pytest.mark.parametrize("url", ["", URL])
@pytest.mark.parametrize("prelude", ["", COLAB])
def test_where_nothing_is_found_the_cell_ends_and_its_line_says_what_to_do(url, prelude, python, tmp_path):
    recorder = "get_ipython().register_magic_function(lambda line: print('pip', line), 'line', 'pip')\n"
    cell = cells.setup_cell(url)
    status, out = run(python, recorder + prelude + cell + SAY, tmp_path / "else")
    assert status == 1 and "ended" not in out, out
    # Its measured results, which an editable installation copies, are a module without `setup`.
    assert re.search("No module named 'ftlib'|module 'ftlib' has no attribute 'setup'", out.strip().splitlines()[-1])
    assert "import ftlib  # not found? %pip install FOLDER" in cell
    asked = [f'pip install -q "git+{URL}"'] if url and prelude else []
    assert [line for line in out.splitlines() if line.startswith("pip ")] == asked
