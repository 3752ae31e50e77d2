"""The unit tests and the series with other versions of torch and transformers, or as on other CPUs.

    python tests/benchmarks/pins.py torch==2.11.0,transformers==5.17.0  # a pair an argument; rows of results/pins.json
    python tests/benchmarks/pins.py --notebooks 01 02 -- torch==2.11.0,transformers==5.17.0  # and these notebooks
    python tests/benchmarks/pins.py --tests tests/inputs/test_rows.py -- torch==2.11.0,transformers==5.17.0  # one file
    python tests/benchmarks/pins.py --cpus --notebooks                  # rows of results/cpus.json

Each pair is installed, with what it depends on, into build/pins, in front of the packages of the running Python; a
package that is installed in the version asked for is taken from there, so torch, which on Linux comes with 5 GB for
GPUs, is fetched only where it differs.  A pair that can't be installed gets a row that says so.

--cpus: one machine computes as those with narrower vectors do, whose sums come in another order: torch's own kernels,
oneDNN and MKL are told which instructions they may use, one setting after the other.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import RESULTS, Table

ROOT = Path(__file__).resolve().parents[2]
SEEN = "import json, torch, transformers; print(json.dumps([torch.__version__, transformers.__version__]))"
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"
INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
CPUS = {  # torch's name: what the variables above say
    "DEFAULT": ("default", "SSE41", "SSE4_2"),
    "AVX2": ("avx2", "AVX2", "AVX2"),
    "AVX512": ("avx512", "AVX512_CORE", "AVX512"),
}
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
    return surroundings([str(place)]), ""


def surroundings(packages: list[str]) -> dict[str, str]:
    """The environment of the tests; packages: folders that come before the installed ones."""
    settings = {"PYTHONPATH": os.pathsep.join([*packages, str(ROOT)]), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    settings |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | settings | {"IPYTHONDIR": str(ROOT / "build" / "ipython")}


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
    return counted(environment, tests)


def counted(environment: dict[str, str], tests: list[str]) -> dict[str, Any]:
    """What came of these tests in that environment."""
    report = ROOT / "build" / "pins" / "report.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={report}"]
    begin = time.perf_counter()
    status = subprocess.run([*command, *tests], env=environment, cwd=ROOT).returncode
    seconds = time.perf_counter() - begin
    suite = ElementTree.parse(report).getroot().find("testsuite")
    bad = [case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    found = {key: int(suite.get(key)) for key in ("tests", "skipped")} | {"failed": len(bad)}
    found["passed"] = found["tests"] - found["skipped"] - found["failed"]
    return {"outcome": "passed" if status == 0 else "failed", **found, "names": bad[:20], "seconds": seconds}


def as_on(cpu: str, tests: list[str]) -> dict[str, Any]:
    """The tests with the instructions of such a CPU, where this one has them."""
    bare = {name: value for name, value in os.environ.items() if name not in INSTRUCTIONS}
    settings = dict(zip(INSTRUCTIONS, CPUS[cpu], strict=True))
    row = {"cpu_model": cpu_model(), "settings": settings}
    own, order = capability(bare), list(CPUS)
    if cpu != "DEFAULT" and (own not in order or order.index(own) < order.index(cpu)):
        return row | {"outcome": "skipped", "why": f"this CPU has no {cpu} (torch finds {own})"}
    environment = surroundings([]) | settings
    if (got := capability(environment)) != cpu:
        raise RuntimeError(f"asked for {cpu}, but torch uses {got}")
    # the same examples on every one; the tables are those that this program is about to change
    same = ["--hypothesis-seed=0", "--deselect=tests/test_readme.py::test_tables_are_the_stored_ones"]
    return row | counted(environment, [*same, *tests])


def capability(environment: dict[str, str]) -> str:
    """The instructions that torch's own kernels use."""
    command = [sys.executable, "-c", CAPABILITY]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def cpu_model() -> str:
    about = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", about.read_text(), re.MULTILINE) if about.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pins", nargs="*", help="torch==VERSION,transformers==VERSION")
    parser.add_argument("--cpus", action="store_true", help="these versions, with the instructions of other CPUs")
    parser.add_argument("--tests", nargs="*", metavar="FILE", help="these unit tests; no name: none; default: all")
    parser.add_argument("--notebooks", nargs="*", metavar="NN", help="run these too; no name: all; cells are tests")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.cpus == bool(options.pins):
        parser.error("pass pairs of versions, or --cpus")
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
    if options.cpus:
        about = "Unit tests, and cells of notebooks whose output is compared, with the instructions of other CPUs"
        command = "python tests/benchmarks/pins.py --cpus"
        table = Table("cpus", command, about, folder=options.results)
    for one in CPUS if options.cpus else options.pins:
        if not options.cpus:
            table.stamp["versions"] = dict(pin.split("==") for pin in one.split(","))
        for name, tests in what.items():
            row = as_on(one, tests) if options.cpus else tried(one.split(","), tests)
            table.replace({"cpu" if options.cpus else "pins": one, "what": name}, [row])
            failed += row["outcome"] == "failed"
    return failed


if __name__ == "__main__":
    sys.exit(main())
