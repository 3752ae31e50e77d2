"""Tables, means with their spread, stored results.  To copy: this file and show/comparing.py."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .comparing import Difference


def stored_results(name: str) -> dict:
    """The table results/<name>.json that a program in tests/benchmarks wrote; checkout or installed package.

    A name that ends in * gives {"rows": those of all files whose names begin so}, e.g. "speed-*" of every device.
    Raises ValueError for a name that is a path, FileNotFoundError (with the names there are) for a missing one.
    """
    if not re.fullmatch(r"[\w-]+\*?", name):
        raise ValueError(f"stored_results takes a plain name such as 'fine_tuning', got {name!r}")
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_shipped" / "results"  # in an installed package; a checkout has none
    folder = shipped if shipped.is_dir() else package.parent / "tests" / "benchmarks" / "results"
    found = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if name.endswith("*"):
        return {"rows": [row for key in found if key.startswith(name[:-1]) for row in stored_results(key)["rows"]]}
    if name not in found:
        known = ", ".join(found) or "none yet"
        raise FileNotFoundError(f"no stored results {name!r} (there are: {known}); python tests/benchmarks/{name}.py")
    return json.loads(found[name].read_text(encoding="utf-8"))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (over n - 1), nan for a single value; ValueError for none."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else math.nan


def format_cell(value: Any, digits: int = 3) -> str:
    """A table cell: numbers rounded, pairs as mean ± std, None (not measured) as a dash.

    >>> format_cell((0.785, 0.0062)), format_cell((0.785, float("nan"))), format_cell(22713216)
    ('0.785 ± 0.006', '0.785 (one seed)', '22,713,216')
    """
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, Difference):
        return f"{value:.{digits}f}"
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return "undefined" if math.isnan(value) else f"{value:,.{digits}f}"
    if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], Real)):
        return str(value)
    mean, std = float(value[0]), math.nan if value[1] is None else value[1]
    spread = " (one seed)" if math.isnan(std) else f" ± {std:,.{digits}f}"
    return format_cell(mean, digits) + ("" if math.isnan(mean) else spread)


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of text that show as HTML or Markdown in a notebook and as aligned text in a terminal."""

    headings: list[str]
    rows: list[list[str]]
    numeric: list[bool]  # these columns are set flush right

    def _aligned(self, end: str = "-", clean=str) -> list[list[str]]:
        """Headings, rule and rows, every column of one width; a numeric column's rule ends in `end`."""
        rows = [[clean(cell) for cell in row] for row in (self.headings, *self.rows)]
        columns = [(right, max(3, *map(len, cells))) for right, *cells in zip(self.numeric, *rows, strict=True)]
        rule = ["-" * (width - 1) + (end if right else "-") for right, width in columns]
        sides = [f"{'>' if right else '<'}{width}" for right, width in columns]
        head, *body = [[format(cell, side) for cell, side in zip(row, sides, strict=True)] for row in rows]
        return [head, rule, *body]

    def __str__(self) -> str:
        return "\n".join("  ".join(row).rstrip() for row in self._aligned())

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        rows = self._aligned(":", lambda cell: cell.replace("|", "\\|").replace("\n", " "))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _repr_html_(self) -> str:
        def line(row, tag):
            cells = zip(row, ("right" if right else "left" for right in self.numeric), strict=True)
            return "".join(f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in cells)

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return f"<table><thead><tr>{line(self.headings, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def results_table(rows: Sequence[Mapping[str, Any]], columns: Any = None, *, digits: Any = 3) -> Table:
    """Rows of numbers as a `Table`; columns: a list that picks and orders keys, or {key: heading}.

    Cells are as `format_cell` makes them; digits: one number, or {key: number} (3 for the rest).
    Raises ValueError for no rows and for a row without one of the columns.

    >>> print(results_table([{"method": "probe", "accuracy": (0.744, 0.004)}]))
    method       accuracy
    ------  -------------
    probe   0.744 ± 0.004
    """
    if not rows:
        raise ValueError("results_table got no rows")
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns or rows[0]}
    for i, row in enumerate(rows):
        if missing := [key for key in headings if key not in row]:
            raise ValueError(f"row {i} has no {missing[0]!r} (only {', '.join(row)}); None means not measured")
    places = {key: digits if isinstance(digits, int) else digits.get(key, 3) for key in headings}
    cells = [[format_cell(row[key], places[key]) for key in headings] for row in rows]
    numeric = [all(not isinstance(row[key], str | bool) for row in rows) for key in headings]
    return Table([str(heading) for heading in headings.values()], cells, numeric)


def show_tokens(row: Mapping[str, Any], tokenizer: Any, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
    """A tokenized row of a language model as text, what is trained between marks, of text to text behind the source.

    Look at a row before a training that costs something: a prompt inside the marks is trained to be said, and an end
    token outside them never.  row: `input_ids` and `labels`, -100 where nothing is trained.
    """
    ids, labels = row["input_ids"], [-100, *row["labels"], -100]
    if len(labels) - 2 != len(ids) or any(one not in (-100, own) for one, own in zip(labels[1:], ids, strict=False)):
        return f"{tokenizer.decode(ids)} {marks[0]}{tokenizer.decode([one for one in labels if one != -100])}{marks[1]}"
    edges = [i for i, (a, b) in enumerate(pairwise(labels)) if (a == -100) != (b == -100)]
    parts = [tokenizer.decode(row["input_ids"][a:b]) for a, b in pairwise([0, *edges, len(row["labels"])])]
    return "".join(f"{marks[0]}{part}{marks[1]}" if i % 2 else part for i, part in enumerate(parts))
