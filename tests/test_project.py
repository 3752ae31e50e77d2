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
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Ground floor first. A module imports from earlier rows only: floors 2 and 4 have more than one row.
FLOORS = [
    {"attention", "balancing", "losses", "masking", "speedups"},
    {"files", "memory", "rows", "wheels"},
    {"assets"},
    {"corpora", "pretrained", "batching", "metrics"},
    {"adapters", "features", "multitask", "regularization", "unpadding"},
    {"optimizing"},
    {"tuning"},
    {"distributed", "saving"},
    {"checkpoints", "joint", "modes", "prediction", "settings", "steps"},
    {"training"},
    {"plots", "environment"},
    {"search"},
    {"__main__"},
]
TENSORS_METHODS_ENGINE = FLOORS[0].union(*FLOORS[4:10])
UPWARD = {("settings", "plots")}  # Run.plot() draws, and imports plots only then
# What transformers itself brings along, so a machine with torch and transformers has it.
WITH_TRANSFORMERS = {"torch", "transformers", "numpy", "safetensors", "tqdm"}
SLOW = {"datasets", "evaluate", "sklearn", "matplotlib", "transformers", "seqeval", "pandas"}
MODULES = sorted(path.stem for path in (ROOT / "ftlib").glob("*.py") if path.stem != "__init__")


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / "ftlib" / f"{module}.py").read_text("utf8"))


def imported(nodes) -> set[str]:
    """Dotted names imported by these nodes; `from ftlib import x` and `from . import x` count as ftlib.x."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                f"ftlib.{node.module}"
                if node.level and node.module
                else "ftlib"
                if node.level
                else node.module
            )
            names |= {f"ftlib.{alias.name}" for alias in node.names} if base == "ftlib" else {base}
    return names


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
        assert len(pin.specifier) == 1 and str(pin.specifier).startswith("=="), (
            f"{pin}: pin one exact version"
        )
        assert "+" not in str(pin) and pin.url is None, f"{pin}: a local build or an address"
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert versions["torch"] == "2.13.0"
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        wanted = Requirement(text)
        assert str(wanted.specifier).startswith(">="), f"{text}: lower bounds only"
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} is missing from requirements.lock"
        assert wanted.specifier.contains(version), (
            f"requirements.lock has {wanted.name} {version}, not {text}"
        )


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


def test_every_module_has_a_floor():
    assert set(MODULES) == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_floors_below(module):
    own = next(floor for floor, modules in enumerate(FLOORS) if module in modules)
    below = set().union(*FLOORS[:own])
    used = {name.split(".")[1] for name in imported(ast.walk(tree(module))) if name.startswith("ftlib.")}
    known = {name for name in used & set(MODULES) if name != module and (module, name) not in UPWARD}
    assert known <= below, f"{module}.py reaches up to {sorted(known - below)}"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_what_its_floor_may(module):
    names = {name.split(".")[0] for name in imported(at_import(tree(module).body))}
    outside = names - set(sys.stdlib_module_names) - {"ftlib"}
    if module in TENSORS_METHODS_ENGINE:
        assert outside <= WITH_TRANSFORMERS
    else:
        assert not outside & SLOW, f"{module}.py: import {sorted(outside & SLOW)} where it is used"


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
    assert sorted({*ftlib._MODULES, "__main__"}) == MODULES
