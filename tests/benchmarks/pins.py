"""The unit tests and the series with other versions of torch and transformers: what was tried, and what came of it.

    python tests/benchmarks/pins.py torch==2.11.0,transformers==5.17.0  # a pair an argument; rows of results/pins.json
    python tests/benchmarks/pins.py --notebooks 01 02 -- torch==2.11.0,transformers==5.17.0    # and these notebooks
    python tests/benchmarks/pins.py --tests tests/inputs/test_rows.py -- torch==2.11.0,transformers==5.17.0    # one file

Each pair is installed, with what it depends on, into build/pins, in front of the packages of the running Python; a
package that is installed in the version asked for is taken from there, so torch, which on Linux comes with 5 GB for
GPUs, is fetched only where it differs.  A pair that can't be installed gets a row that says so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import RESULTS, Table

ROOT = Path(__file__).resolve().parents[2]
SEEN = "import json, torch, transformers; print(json.dumps([torch.__version__, transformers.__version__]))"
SERIES = ["-o", "addopts=", "-p", "tests.notebooks.nbval_strict", "--nbval-lax", "--nbval-current-env"]
SERIES += ["--nbval-cell-timeout", "1200", "--nbval-kernel-startup-timeout", "180", "--dist", "loadfile"]


def installed(pins: list[str]) -> tuple[dict[str, str], str]:
    """An environment in which the pins come first, and why there is none."""
    place = ROOT / "build" / "pins" / "_".join(pins)
    other = [pin for pin in pins if version(pin.split("==")[0]).split("+")[0] != pin.split("==")[1]]
    if other and not place.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), *other]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(place, ignore_errors=True)
            return {}, next(line for line in done.stderr.splitlines() if line.startswith("ERROR:"))
    path = os.pathsep.join([str(place), str(ROOT)])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return os.environ | settings | {"IPYTHONDIR": str(ROOT / "build" / "ipython")}, ""


def tried(pins: list[str], tests: list[str]) -> dict[str, Any]:
    environment, problem = installed(pins)
    if problem:
        return {"outcome": "not installed", "why": problem}
    done = subprocess.run([sys.executable, "-c", SEEN], env=environment, capture_output=True, text=True, check=True)
    found = dict(zip(("torch", "transformers"), json.loads(done.stdout), strict=True))
    for pin in pins:
        name, wanted = pin.split("==")
        if found[name].split("+")[0] != wanted:
            raise RuntimeError(f"asked for {pin}, but {name} {found[name]} is imported")
    report = ROOT / "build" / "pins" / "report.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={report}"]
    status = subprocess.run([*command, *tests], env=environment, cwd=ROOT).returncode
    suite = ElementTree.parse(report).getroot().find("testsuite")
    bad = [case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    counts = {key: int(suite.get(key)) for key in ("tests", "skipped")}
    return {"outcome": "passed" if status == 0 else "failed", **counts, "failed": len(bad), "names": bad[:20]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pins", nargs="+", help="torch==VERSION,transformers==VERSION")
    parser.add_argument("--tests", nargs="*", metavar="FILE", help="these unit tests; no name: none; default: all")
    parser.add_argument("--notebooks", nargs="*", metavar="NN", help="run these too; no name: all; cells are tests")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    about = "Unit tests, and cells of notebooks whose output is compared, under pairs of versions"
    table = Table("pins", "python tests/benchmarks/pins.py --notebooks -- PINS", about, folder=options.results)
    what = {}
    if options.tests is None or options.tests:
        names = [Path(test).stem.removeprefix("test_") for test in options.tests or []]
        what["unit tests and doctests" + f" of {', '.join(names)}" * bool(names)] = options.tests or []
    if options.notebooks is not None:
        folder = ROOT / "notebooks"
        paths = [next(folder.glob(f"{name}*.ipynb")) for name in options.notebooks] or [folder]
        what[f"cells of notebooks {' '.join(options.notebooks) or '(all)'}"] = [*SERIES, *map(str, paths)]
    failed = 0
    for pair in options.pins:
        table.stamp["versions"] = dict(pin.split("==") for pin in pair.split(","))
        for name, tests in what.items():
            row = tried(pair.split(","), tests)
            table.replace({"pins": pair, "what": name}, [row])
            failed += row["outcome"] == "failed"
    return failed


if __name__ == "__main__":
    sys.exit(main())
