"""The unit tests with other versions of torch and transformers: which pairs were tried, and what came of it.

    python tests/benchmarks/pins.py torch==2.13.0,transformers==5.17.0  # a pair an argument; rows of results/pins.json
    python tests/benchmarks/pins.py --tests "tests/test_training.py" torch==2.11.0,transformers==5.17.0

Each pair is installed, with what it depends on, into build/pins, in front of the packages of the running Python; a
package that is installed in the version asked for is taken from there, so torch is fetched only where it differs.
"""

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import RESULTS, Table

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "batching", "checkpoints", "features", "losses", "multitask", "prediction", "pretrained", "training", "tuning",
    "unpadding",
)  # fmt: skip
SEEN = "import json, torch, transformers; print(json.dumps([torch.__version__, transformers.__version__]))"


def installed(pins: list[str]) -> dict[str, str]:
    """An environment in which the pins come first."""
    place = ROOT / "build" / "pins" / "_".join(pins)
    other = [pin for pin in pins if version(pin.split("==")[0]).split("+")[0] != pin.split("==")[1]]
    if other and not place.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), *other]
        subprocess.run(command, check=True)
    path = os.pathsep.join([str(place), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def tried(pins: list[str], tests: list[str]) -> dict[str, Any]:
    environment = installed(pins)
    done = subprocess.run([sys.executable, "-c", SEEN], env=environment, capture_output=True, text=True, check=True)
    found = dict(zip(("torch", "transformers"), json.loads(done.stdout), strict=True))
    for pin in pins:
        name, wanted = pin.split("==")
        if found[name].split("+")[0] != wanted:
            raise RuntimeError(f"asked for {pin}, but {name} {found[name]} is imported")
    report = ROOT / "build" / "pins" / "report.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    status = subprocess.run(command, env=environment, cwd=ROOT).returncode
    suite = ElementTree.parse(report).getroot().find("testsuite")
    bad = [case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    counts = {key: int(suite.get(key)) for key in ("tests", "skipped")}
    return {"outcome": "passed" if status == 0 else "failed", **counts, "failed": len(bad), "names": bad[:20]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pins", nargs="+", help="torch==VERSION,transformers==VERSION")
    parser.add_argument("--tests", default=" ".join(f"tests/test_{name}.py" for name in QUICK))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    command = f"python tests/benchmarks/pins.py {' '.join(options.pins)}"
    table = Table("pins", command, "Unit tests under pairs of versions", folder=options.results)
    failed = 0
    for pair in options.pins:
        row = tried(pair.split(","), options.tests.split())
        table.replace({"pins": pair}, [row])
        failed += row["outcome"] != "passed"
    return failed


if __name__ == "__main__":
    sys.exit(main())
