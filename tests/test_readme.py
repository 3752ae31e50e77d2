"""What the README shows is what was measured, and what it names exists."""

import importlib.util
import re
from pathlib import Path

import ftlib
from ftlib.__main__ import read_run
from ftlib.engine.fit import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_are_the_stored_ones():
    spec = importlib.util.spec_from_file_location("report", ROOT / "tests/benchmarks/report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    shown = README[README.index(report.START) : README.index(report.END) + len(report.END)]
    assert shown == report.section(), "run python tests/benchmarks/report.py"
    assert report.memory_section() in README, "run python tests/benchmarks/report.py"
    assert report.faults_section() in README, "run python tests/benchmarks/report.py"


def test_names_in_code_exist():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")
        names = set(re.findall(r"\bftlib\.([A-Za-z_]+)", block))
        assert names and all(hasattr(ftlib, name) for name in names), names


def test_run_toml_is_accepted(tmp_path):
    [block] = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "run.toml").write_text(block)
    run = read_run(tmp_path / "run.toml")
    assert TrainConfig(checkpoint_dir="out", **run["train"]).epochs == 3


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_notebook_is_in_the_table():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.name}" in README, notebook.name
