"""A resumable table: every finished row is written at once, and a row that is there is not measured again."""

import datetime
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


class Table:
    """Rows of one results file, results/<name>.json, keyed by what was varied."""

    def __init__(self, name: str, command: str, about: str):
        self.path = RESULTS / f"{name}.json"
        self.content = json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}
        gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores, {platform.machine()}"
        self.stamp = {
            "device": device,
            "date": datetime.date.today().isoformat(),
            "versions": {p: version(p).split("+")[0] for p in ("torch", "transformers", "datasets", "scikit-learn")},
        }
        self.content |= {"about": about, "command": command}

    def row(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row for `key`, measured now unless the file has it."""
        for row in self.content["rows"]:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {**key, **measure(), **self.stamp}
        self.content["rows"].append(row)
        self.path.parent.mkdir(exist_ok=True)
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps(self.content, indent=1) + "\n")
        aside.replace(self.path)
        print(
            {
                **key,
                **{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k not in self.stamp},
            },
            flush=True,
        )
        return row
