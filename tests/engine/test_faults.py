"""Runs that are killed, interrupted, out of disk or robbed of their newest checkpoint end as the undisturbed one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks/faults.py"
FAULTS = {
    "SIGKILL at a random moment": 3, "SIGKILL while a checkpoint is written": 3,
    "SIGKILL before each line of the writing": 8, "Ctrl-C at a random moment": 4, "a full disk": 3,
    "the newest checkpoint damaged": 4, "a loss or gradient that is NaN or infinite": 4,
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts its threads, and forks, as Linux does")
def test_nothing_is_lost(tmp_path):
    command = [sys.executable, str(PROGRAM), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["fault"]: row for row in json.loads((tmp_path / "faults.json").read_text())["rows"]}
    assert {fault: row["tried"] for fault, row in rows.items()} == FAULTS
    assert all(row["lost"] == 0 and row["survived"] == row["tried"] for row in rows.values())
    assert rows["SIGKILL before each line of the writing"]["lines"] > 100
