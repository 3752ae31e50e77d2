"""What the README pages show is what was measured, what they name exists, and no option is left out."""

import ast
import dataclasses
import importlib.util
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import ftlib
from ftlib.engine.runfile import read_run
from ftlib.engine.settings import TrainConfig

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "notebooks/README.md", "ftlib/README.md", "tests/benchmarks/README.md")
PAGES = {name: (ROOT / name).read_text("utf8") for name in NAMES}
GUIDE = PAGES["ftlib/README.md"]


def anchors(text: str) -> set[str]:
    """The targets of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tables_are_the_stored_ones():
    spec = importlib.util.spec_from_file_location("report", ROOT / "tests/benchmarks/report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    for name, parts in report.sections().items():
        for part in parts:
            assert part in PAGES[name], f"{name}: run python tests/benchmarks/report.py"


@pytest.mark.parametrize("name", ["README.md", "ftlib/README.md"])
def test_names_in_code_exist(name):
    blocks = re.findall(r"```python\n(.*?)```", PAGES[name], re.DOTALL)
    assert blocks and all("ftlib" in block for block in blocks)
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ftlib":
            assert hasattr(ftlib, node.attr), node.attr
        if isinstance(node, ast.ImportFrom) and node.module.startswith("ftlib"):
            exec(ast.unparse(node))


def test_the_guide_has_every_option_with_its_default():
    [section] = re.findall(r"\n## Options\n(.*?)\n## ", GUIDE, re.DOTALL)
    cells = re.findall(r"^\|(.*?)\|", section, re.MULTILINE)
    shown = [option for cell in cells for option in re.findall(r"`(\w+=[^`]*)`", cell)]
    assert sorted(shown) == sorted(f"{field.name}={field.default!r}" for field in dataclasses.fields(TrainConfig))


def test_the_guide_has_every_file_in_its_room():
    for room in ("core", "tasks", "show", "inputs", "methods", "engine"):
        [files] = re.findall(rf"^\| `{room}` \| (.*?) \|", GUIDE, re.MULTILINE)
        there = {path.stem for path in (ROOT / "ftlib" / room).glob("*.py")} - {"__init__"}
        assert set(re.findall(r"`(\w+)`", files)) == there, room


def test_files_to_copy_exist():
    for name in re.findall(r"`((?:core|tasks|show|inputs|methods|engine)/\w+\.py)`", GUIDE):
        assert (ROOT / "ftlib" / name).exists(), name


def test_the_loop_of_the_guide_runs(tiny_model):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE[GUIDE.index("\n## The loop") :], re.DOTALL)[:2]
    rows = [{"input_ids": [5, 6, 7 + i % 9], "labels": i % 2} for i in range(70)]
    space = {"ftlib": ftlib, "model": tiny_model("sequence-classification"), "train": rows, "test": rows}
    for block in blocks:
        exec(compile(block, "ftlib/README.md", "exec"), space)
    assert space["record"]["step"] == 1 and space["record"]["loss"] > 0


def test_the_comparison_of_the_guide_is_what_it_says():
    [block] = re.findall(r"```python\n(.*?)```", GUIDE.split("\n## Is it better?")[1].split("\n## ")[0], re.DOTALL)
    space = {"ftlib": ftlib, "np": np}
    for line in block.splitlines():
        code, _, said = line.partition("#")
        exec(code, space)
        if re.match(r" [+-]", said):
            found = space["gap"] if "gap =" in code else eval(code, space)
            assert said.strip().startswith(str(found))
    assert space["gap"].verdict == "tie"


def test_run_toml_is_accepted(tmp_path):
    [block] = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "run.toml").write_text(block)
    run = read_run(tmp_path / "run.toml")
    assert TrainConfig(checkpoint_dir="out", **run["train"]).epochs == 3


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            there = (ROOT / name).parent / path if path else ROOT / name
            assert there.exists(), target
            assert not anchor or anchor in anchors(there.read_text("utf8")), target


def test_every_notebook_is_a_row_of_both_tables_in_order():
    there = sorted(notebook.name for notebook in (ROOT / "notebooks").glob("*.ipynb"))
    for name, folder in (("README.md", "notebooks/"), ("notebooks/README.md", "")):
        assert re.findall(rf"^\|.*\]\({folder}(\w+\.ipynb)\)", PAGES[name], re.MULTILINE) == there, name


def test_the_front_page_is_short_and_says_what_it_takes():
    page = PAGES["README.md"]
    assert page.count("\n") <= 150
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    bounds = [text.split(">=") for text in [f"Python{project['requires-python']}", *project["dependencies"][:2]]]
    assert ", ".join(f"{package} {least}" for package, least in bounds) + " or newer" in page
    assert ftlib.assets.manifest()["minilm"]["hub"] in page and project["license"] in page
    for names, megabytes in ((None, "573 MB of texts"), (["minilm", "rotten-tomatoes"], "97 MB for notebook 03")):
        sizes = {row["package"]: row["megabytes"] for row in ftlib.assets.describe(names) if not row["optional"]}
        assert megabytes in page and megabytes.startswith(f"{sum(sizes.values()):.0f} MB")


def test_the_front_page_runs_on_a_csv(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, capsys):
    """With a small model of random weights in the place of MiniLM."""
    tiny_model("encoder").save_pretrained(tmp_path / "tiny")
    load_model, made = ftlib.load_model, []

    def load_tiny(name, **options):
        made.append(load_model(tmp_path / name.replace("minilm", "tiny"), **options))
        return made[0]

    monkeypatch.setattr(ftlib, "load_tokenizer", lambda name: tiny_tokenizer)
    monkeypatch.setattr(ftlib, "load_model", load_tiny)
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{'dull' if i % 2 else 'a joy'} {i},{'bad' if i % 2 else 'good'}\n" for i in range(40))
    Path("reviews.csv").write_text("text,label\n" + rows)
    [block] = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)
    space = {}
    with pytest.warns(UserWarning, match="numbered 0 'bad', 1 'good'"):
        exec(compile(block, "README.md", "exec"), space)
    assert (len(space["train"]), len(space["test"]), space["names"]) == (32, 8, ["bad", "good"])
    said = capsys.readouterr().out
    assert "'accuracy': " in said and re.search(r"\['(bad|good)'\]", said)
    opened = transformers.AutoModelForSequenceClassification.from_pretrained("my-model")
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), made[0].parameters(), strict=True))
