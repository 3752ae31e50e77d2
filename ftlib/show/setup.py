"""What a notebook asks of the machine it runs on, and how it shows measured numbers.

`setup` seeds and says where the notebook runs; `stored_results` reads a table that a committed program
measured; `results_table`, `mean_std` and `tie` show
numbers honestly.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Environment:
    """What `setup` found; `device` is a torch.device, `reason` says why `precision` was chosen."""

    versions: dict[str, str]
    device: Any
    precision: str
    reason: str
    size: str
    seed: int

    def pick(self, *, small: Any, full: Any) -> Any:
        """The value for the size in use: `env.pick(small=500, full=8530)`."""
        return small if self.size == "small" else full


def setup(seed: int = 0) -> Environment:
    """Seed torch, numpy and random; print and return versions, device, precision with its reason, and size.

    The size of the experiments is "small" or, with the environment variable FTLIB_SIZE, "full". Raises
    ValueError for another FTLIB_SIZE and for a seed outside 0 … 2**32 - 1 (numpy's range).

    >>> env = setup(seed=1)  # doctest: +ELLIPSIS
    Python ...
    >>> env.pick(small="few", full="all") in ("few", "all")
    True
    """
    import platform
    import random

    import numpy as np
    import torch

    from .. import __version__ as ftlib_version
    from ..engine.fit import choose_device, choose_precision

    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}: expected a whole number from 0 to 2**32 - 1")
    size = os.environ.get("FTLIB_SIZE") or "small"
    if size not in ("small", "full"):
        raise ValueError(f"FTLIB_SIZE is {size!r}: expected 'small' or 'full'")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    device = choose_device()
    precision, reason = choose_precision(device)
    versions = {name: _version(name) for name in ("torch", "transformers", "datasets")}
    versions = {"Python": platform.python_version(), **versions, "ftlib": ftlib_version}
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    other = "full" if size == "small" else "small"
    print(", ".join(f"{package} {number}" for package, number in versions.items()))
    print(f"device      {device}{name}, CPU threads: {torch.get_num_threads()}")
    print(f"precision   {precision}: {reason}")
    print(f"size        {size} (for the other: %env FTLIB_SIZE={other} above this cell, then run all again)")
    print(f"seed        {seed}")
    return Environment(versions, device, precision, reason, size, seed)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def stored_results(name: str) -> dict:
    """The table results/<name>.json that a program in tests/benchmarks wrote; checkout or installed package.

    Raises ValueError for a name that is a path, FileNotFoundError (with the names there are) for a missing
    one.
    """
    from ..inputs import assets

    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"stored_results takes a plain name such as 'fine_tuning', got {name!r}")
    root = assets._checkout()
    folder = (root / "tests/benchmarks/results") if root else (assets._PACKAGE / "_shipped/results")
    path = folder / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "none yet"
        raise FileNotFoundError(
            f"no stored results {name!r} (there are: {known}); in a checkout, "
            f"`python tests/benchmarks/{name}.py` measures and writes them"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 in the denominator); nan for the latter of a single value.

    >>> mean_std([0.5, 1.0, 1.5])
    (1.0, 0.5)
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("mean_std needs one value or more, got none")
    mean = statistics.fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(values)


def tie(a: Sequence[float], b: Sequence[float], digits: int = 3) -> tuple[bool, str]:
    """Whether two sets of scores over seeds are too close to call, and the sentence that says so.

    The rule: a tie when the means differ by no more than sqrt(std_a² + std_b²), the standard deviation of the
    difference between one run of each. It says whether one more pair of runs could easily come out the other
    way round; it is not a significance test. With a single value on a side there is no spread: a tie.

    >>> tie([0.80, 0.82], [0.81, 0.83])[0], tie([0.80, 0.81], [0.90, 0.91])[0]
    (True, False)
    """
    (mean_a, std_a), (mean_b, std_b) = mean_std(a), mean_std(b)
    both = f"{format_cell((mean_a, std_a), digits)} and {format_cell((mean_b, std_b), digits)}"
    gap, spread = abs(mean_a - mean_b), math.hypot(std_a, std_b)
    if not math.isfinite(gap + spread):
        return True, f"{both}: no spread to judge by, so call it a tie until there are more seeds"
    verdict, where = ("a tie", "within") if gap <= spread else ("no tie", "beyond")
    gap_text, spread_text = f"{gap:.{digits}f}", f"{spread:.{digits}f}"
    return (
        gap <= spread,
        f"{both}: {verdict}, the means differ by {gap_text}, {where} the spread {spread_text}",
    )


def format_cell(value: Any, digits: int = 3) -> str:
    """A table cell: numbers rounded, pairs as mean ± std, None as "not measured yet".

    >>> format_cell((0.785, 0.0062)), format_cell((0.785, float("nan"))), format_cell(22713216)
    ('0.785 ± 0.006', '0.785 (one seed)', '22,713,216')
    """
    if value is None:
        return "not measured yet"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return "undefined" if math.isnan(value) else f"{value:,.{digits}f}"
    if isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], Real):
        std = math.nan if value[1] is None else value[1]
        spread = " (one seed)" if math.isnan(std) else f" ± {std:,.{digits}f}"
        return format_cell(float(value[0]), digits) + ("" if math.isnan(value[0]) else spread)
    return str(value)


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of text that show as HTML or Markdown in a notebook and as aligned text in a terminal."""

    headings: list[str]
    rows: list[list[str]]
    numeric: list[bool]  # these columns are set flush right

    def _aligned(self) -> list[list[str]]:
        widths = [max(3, *map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        sides = [str.rjust if right else str.ljust for right in self.numeric]
        rows = [zip(row, widths, sides, strict=True) for row in (self.headings, *self.rows)]
        return [[side(cell, width) for cell, width, side in row] for row in rows]

    def __str__(self) -> str:
        head, *body = self._aligned()
        return "\n".join("  ".join(row).rstrip() for row in (head, ["-" * len(c) for c in head], *body))

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        def clean(row):
            return [cell.replace("|", "\\|").replace("\n", " ") for cell in row]

        head, *body = Table(clean(self.headings), [clean(row) for row in self.rows], self.numeric)._aligned()
        rule = ["-" * (len(c) - 1) + ("-:"[right]) for c, right in zip(head, self.numeric, strict=True)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))

    def _repr_html_(self) -> str:
        def line(row, tag):
            sides = ["right" if right else "left" for right in self.numeric]
            cells = zip(row, sides, strict=True)
            return "".join(f'<{tag} style="text-align:{side}">{escape(c)}</{tag}>' for c, side in cells)

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return f"<table><thead><tr>{line(self.headings, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def results_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | Mapping[str, str] | None = None,
    *,
    digits: int | Mapping[str, int] = 3,
) -> Table:
    """Rows of numbers as a `Table`; `columns` picks and orders keys, or maps them to headings.

    Pairs (mean, std) read "0.785 ± 0.006", None "not measured yet". `digits` after the point: one number, or
    {key: number} (3 for the rest). Raises ValueError for no rows and for a row without one of the columns.

    >>> print(results_table([{"method": "probe", "accuracy": (0.744, 0.004)}]))
    method       accuracy
    ------  -------------
    probe   0.744 ± 0.004
    """
    if not rows:
        raise ValueError("results_table got no rows")
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns or rows[0]}
    for i, row in enumerate(rows):
        missing = [key for key in headings if key not in row]
        if missing:
            raise ValueError(
                f"row {i} has no {missing[0]!r} (only {', '.join(row)}); None means not measured"
            )
    places = {key: digits if isinstance(digits, int) else digits.get(key, 3) for key in headings}
    cells = [[format_cell(row[key], places[key]) for key in headings] for row in rows]
    numeric = [all(not isinstance(row[key], str | bool) for row in rows) for key in headings]
    return Table([str(heading) for heading in headings.values()], cells, numeric)
