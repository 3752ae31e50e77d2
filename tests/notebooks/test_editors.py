"""A notebook that JupyterLab opens and saves stays the same: under the Python of CI; by `make lab` under any."""

import asyncio
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import cells
import ipykernel.kernelspec
import pytest
from ipykernel.ipkernel import IPythonKernel

LESSON = cells.NOTEBOOKS / "01_attention.ipynb"
OTHER = {"language_info": IPythonKernel.language_info | {"version": "3.99.0"}}


@pytest.fixture
def copy(tmp_path):
    (tmp_path / "notebooks").mkdir()
    return Path(shutil.copy(LESSON, tmp_path / "notebooks"))


def open_and_save(path, hook=None, **metadata) -> None:
    """What JupyterLab 4.6 does: it gets the file, puts the kernel's own description into it, and saves it."""
    manager = pytest.importorskip("jupyter_server.services.contents.largefilemanager").AsyncLargeFileManager

    async def save():
        files, name = manager(root_dir=str(path.parents[1])), f"{path.parent.name}/{path.name}"
        if hook:
            files.register_pre_save_hook(hook)
        content = (await files.get(name))["content"]
        assert "trusted" in content["cells"][1]["metadata"]  # what the browser gets, and sends back
        spec = ipykernel.kernelspec.get_kernel_dict()
        kernel = {"name": "python3", "display_name": spec["display_name"], "language": spec["language"]}
        content["metadata"] = {"kernelspec": kernel, "language_info": IPythonKernel.language_info} | metadata
        await files.save({"type": "notebook", "format": "json", "content": content}, name)

    asyncio.run(save())


def test_opening_and_saving_changes_the_version_of_python_at_most(copy):
    open_and_save(copy)
    version = cells.METADATA["language_info"]["version"]
    own = LESSON.read_bytes().replace(f'"{version}"'.encode(), f'"{platform.python_version()}"'.encode())
    assert copy.read_bytes() == own


def test_by_make_lab_not_even_that(copy):
    open_and_save(copy, cells.before_saving, **OTHER, widgets={})
    assert copy.read_bytes() == LESSON.read_bytes()


def test_a_kernel_of_the_readers_choice_and_other_notebooks_stay(copy):
    kernel = {"name": "mine", "display_name": "Mine", "language": "python"}
    open_and_save(copy, cells.before_saving, kernelspec=kernel)
    assert cells.read(copy)["metadata"]["kernelspec"] == kernel
    other = copy.parents[1] / "own" / copy.name
    other.parent.mkdir()
    shutil.copy(LESSON, other)
    open_and_save(other, cells.before_saving, **OTHER)
    assert cells.read(other)["metadata"]["language_info"]["version"] == "3.99.0"


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_lab_names_the_hook():
    shown = subprocess.run(["make", "-n", "-o", "data", "lab"], cwd=cells.ROOT, capture_output=True, text=True).stdout
    [hook] = [word.split("=")[1] for word in shown.split() if word.startswith("--ContentsManager.pre_save_hook=")]
    code = f"from traitlets import import_item; print(import_item({hook!r}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=cells.ROOT, capture_output=True, text=True)
    assert done.stdout == "before_saving\n", done.stderr
