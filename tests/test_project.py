"""The project's own files agree with each other, and the package keeps the rules of its ground plan."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ftlib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ftlib"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

ROOMS = {"core": 0, "tasks": 1, "show": 1, "inputs": 2, "methods": 3, "engine": 4}
FILES = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.glob("*/*.py")) if p.name != "__init__.py"}
# What transformers itself brings along, so a machine with torch and transformers has it.
WITH_TRANSFORMERS = {"torch", "transformers", "numpy", "safetensors", "tqdm"}
SLOW = {"datasets", "evaluate", "sklearn", "matplotlib", "transformers", "seqeval", "pandas", "peft"}
SLOW |= {"sacrebleu", "rouge_score"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf8"))


def at_import(body) -> list[ast.stmt]:
    """The statements that run at import: no function bodies, nothing under `if TYPE_CHECKING:`."""
    found = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            found += at_import(node.orelse)
            continue
        found.append(node)
        for field in ("body", "orelse", "finalbody"):
            found += at_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            found += at_import(handler.body)
    return found


def outside(nodes) -> set[str]:
    """The packages that these nodes import, other than Python's own and ftlib."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def inside(path: Path, nodes) -> set[str]:
    """The files of ftlib that these nodes of a file import, as "room/module.py"."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            module = place.with_suffix(".py")
            files = [module] if node.module and module.is_file() else [place / f"{a.name}.py" for a in node.names]
            found |= {file.relative_to(PACKAGE).as_posix() for file in files}
    return found


def test_conda_environment_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (through_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert environment["name"] == PROJECT["name"]
    assert plain == [f"python{PROJECT['requires-python']}", "pip"]
    assert through_pip == [f"-e .[{','.join(EXTRAS)}]"]


def test_lock_file_pins_every_dependency_within_its_bounds():
    lines = (ROOT / "requirements.lock").read_text("utf8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    for pin in pins:
        assert len(pin.specifier) == 1 and str(pin.specifier).startswith("=="), f"{pin}: pin one exact version"
        assert "+" not in str(pin) and pin.url is None, f"{pin}: a local build or an address"
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert versions["torch"] == "2.13.0"
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        wanted = Requirement(text)
        assert str(wanted.specifier).startswith(">="), f"{text}: lower bounds only"
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} is missing from requirements.lock"
        assert wanted.specifier.contains(version), f"requirements.lock has {wanted.name} {version}, not {text}"


def test_version_stands_in_both_places():
    assert ftlib.__version__ == PROJECT["version"]


def test_every_public_name_resolves():
    missing = [name for name in ftlib.__all__ if getattr(ftlib, name, None) is None]
    assert not missing


def test_import_is_quick():
    code = "import sys, ftlib; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "ftlib" in loaded
    assert not loaded & (SLOW | {"torch", "numpy"})


def test_wheel_carries_the_manifest_and_the_measured_results(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    members = zipfile.ZipFile(wheel).namelist()
    results = {f"ftlib/_shipped/results/{p.name}" for p in (ROOT / "tests/benchmarks/results").glob("*.json")}
    assert {"ftlib/__init__.py", "ftlib/_shipped/sources.toml"} | results <= set(members)
    assert all(name.startswith(("ftlib/", "ftlib-")) for name in members)
    assert any(name.endswith("licenses/LICENSE") for name in members)


def test_every_module_is_an_attribute_of_the_package():
    for name in (*ftlib._MODULES, *ftlib._ROOMS):
        assert getattr(ftlib, name).__name__ == f"ftlib.{ftlib._MODULES.get(name, name)}"
    assert {*ftlib._HOME, *ftlib._MODULES} <= set(dir(ftlib))


# --------------------------------------------------------------------------------------------- the house


def test_every_file_stands_in_a_room():
    rooms = {path.name: path for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert set(rooms) == set(ROOMS) == set(ftlib._ROOMS)
    for room, path in rooms.items():
        modules = sorted(file.stem for file in path.glob("*.py") if file.name != "__init__.py")
        assert sorted(ftlib._ROOMS[room]) == modules, room
        assert (path / "__init__.py").read_text("utf8") == "", "a room's __init__ imports nothing"
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    for name, place in {**ftlib._HOME, **ftlib._MODULES}.items():
        assert f"{place.replace('.', '/')}.py" in FILES, name


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downward(name):
    """core < tasks, show < inputs < methods < engine: to a file's own room or a lower one, functions included."""
    path = FILES[name]
    nodes = list(ast.walk(tree(path)))
    assert "ftlib" not in outside(nodes), "imports are relative, so that a copy runs under any name"
    own = path.parent.name
    for other in inside(path, nodes):
        assert other in FILES, f"{name} imports {other}, which is not there"
        room = other.split("/")[0]
        assert room == own or ROOMS[room] < ROOMS[own], f"{name} reaches up to {other}"


def test_no_two_files_need_each_other():
    needs = {name: inside(path, at_import(tree(path).body)) for name, path in FILES.items()}
    while free := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, f"a circle among {sorted(needs)}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_needs_what_its_room_may(name):
    """What takes seconds to import, or is not everywhere, is imported where it is used."""
    path = FILES[name]
    needed = outside(at_import(tree(path).body))
    room = path.parent.name
    if room == "core":
        assert outside(ast.walk(tree(path))) <= {"torch", "numpy"}
    elif room in ("methods", "engine"):
        assert needed <= WITH_TRANSFORMERS
    else:
        assert not needed & SLOW, f"{name}: import {sorted(needed & SLOW)} where it is used"


# ---------------------------------------------------------------------------------------------- its size


def lines(path: Path) -> int:
    return path.read_text("utf8").count("\n")


def functions(path: Path):
    """(name, lines without the docstring) of every function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            said = ast.get_docstring(node, clean=False)
            yield node.name, node.end_lineno - node.lineno + 1 - (said.count("\n") + 1 if said else 0)


def test_files_are_short():
    long = {name: size for name, path in FILES.items() if (size := lines(path)) > 350}
    assert not long


def test_the_whole_is_compact():
    assert sum(map(lines, PACKAGE.rglob("*.py"))) <= 16_299  # 390 of them draw the diagrams


def test_the_core_is_read_in_one_go():
    assert sum(map(lines, (PACKAGE / "core").glob("*.py"))) <= 586


def test_functions_are_short():
    long = {(name, function): size for name, path in FILES.items() for function, size in functions(path) if size > 60}
    assert not long


@pytest.mark.parametrize("name", ["__init__.py", *FILES])
def test_kinds_of_tasks_are_named_in_their_own_room_alone(name):
    """Elsewhere a record is asked; docstrings may name them, and the command line does."""
    from ftlib.tasks.task import KINDS

    if name.startswith("tasks/"):
        return
    parsed = tree(PACKAGE / name)
    prose = {id(node.value) for node in ast.walk(parsed) if isinstance(node, ast.Expr)}
    words = [node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant) and id(node) not in prose]
    kinds = [kind for kind in KINDS if "-" in kind]  # "regression" is a word of English, and a problem_type
    found = {kind for kind in kinds for word in words if isinstance(word, str) and kind in word}
    assert not found, f"{name}: {sorted(found)}"
