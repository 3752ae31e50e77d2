"""Stored results, and how numbers are shown."""

import json
import math

import numpy as np
import pytest

from ftlib.show import tables
from ftlib.show.tables import format_cell, mean_std, results_table, stored_results

# ----------------------------------------------------------------------------------------- stored results


@pytest.mark.parametrize("installed", [False, True])
def test_stored_results(installed, tmp_path, monkeypatch):
    folder = tmp_path / ("ftlib/_shipped/results" if installed else "tests/benchmarks/results")
    folder.mkdir(parents=True)
    (folder / "fine_tuning.json").write_text(json.dumps({"rows": [{"accuracy": 0.785}], "about": "θ"}))
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "ftlib/show/tables.py"))
    assert stored_results("fine_tuning") == {"rows": [{"accuracy": 0.785}], "about": "θ"}
    message = r"no stored results 'speed' \(there are: fine_tuning\).*python tests/benchmarks/speed.py"
    with pytest.raises(FileNotFoundError, match=message):
        stored_results("speed")
    for name in ("../secret", "a.json", "", "*", "a*b", "../*"):
        with pytest.raises(ValueError, match="plain name"):
            stored_results(name)


def test_stored_results_of_all_devices(tmp_path, monkeypatch):
    folder = tmp_path / "tests/benchmarks/results"
    folder.mkdir(parents=True)
    for name in ("speed-b", "speed-a", "speedy", "other"):
        (folder / f"{name}.json").write_text(json.dumps({"rows": [{"device": name}], "about": name}))
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "ftlib/show/tables.py"))
    assert stored_results("speed-*") == {"rows": [{"device": "speed-a"}, {"device": "speed-b"}]}
    assert stored_results("gpu-day-2-*") == {"rows": []}


def test_no_results_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "ftlib/show/tables.py"))
    with pytest.raises(FileNotFoundError, match="there are: none yet"):
        stored_results("speed")


# ---------------------------------------------------------------------------------------- shown as numbers


def test_mean_std_by_hand():
    assert mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)))
    values = np.random.default_rng(0).normal(size=9)
    assert mean_std(values) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))
    mean, std = mean_std([0.5])
    assert mean == 0.5 and math.isnan(std)
    assert math.isnan(mean_std([0.5, math.nan])[0])
    with pytest.raises(ValueError, match="at least one data point"):
        mean_std([])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.78549, "0.785"),
        (1234.5678, "1,234.568"),
        (22_700_000, "22,700,000"),
        (np.int64(7), "7"),
        (np.float32(0.5), "0.500"),
        (True, "yes"),
        (math.nan, "undefined"),
        ("full", "full"),
        ((0.785, 0.006), "0.785 ± 0.006"),
        ([0.785, None], "0.785 (one seed)"),
        ((math.nan, math.nan), "undefined"),
    ],
)
def test_cells(value, text):
    assert format_cell(value) == text


ROWS = [
    {"method": "head|only", "trainable": 770, "accuracy": (0.744, 0.004), "seconds": 3.21, "more": 1},
    {"method": "<full>", "trainable": 22_713_986, "accuracy": (0.785, math.nan), "seconds": None, "more": 1},
]


def test_table_as_text():
    table = results_table(ROWS, ["method", "trainable", "accuracy", "seconds"], digits={"seconds": 1})
    assert str(table).splitlines() == [
        "method      trainable          accuracy  seconds",
        "---------  ----------  ----------------  -------",
        "head|only         770     0.744 ± 0.004      3.2",
        "<full>     22,713,986  0.785 (one seed)        –",
    ]
    assert repr(table) == str(table)


def test_table_as_markdown():
    lines = results_table(ROWS, {"method": "method", "trainable": "trained parameters"})._repr_markdown_().splitlines()
    assert lines == [
        "| method     | trained parameters |",
        "| ---------- | -----------------: |",
        "| head\\|only |                770 |",
        "| <full>     |         22,713,986 |",
    ]


def test_table_as_html():
    html = results_table(ROWS, ["method", "trainable"])._repr_html_()
    assert '<td style="text-align:left">&lt;full&gt;</td><td style="text-align:right">22,713,986</td>' in html
    assert html.count("<tr>") == 3 and html.count("<th ") == 2
    assert html.startswith("<table>") and html.endswith("</table>")


def test_table_columns_default_to_the_first_row():
    assert results_table(ROWS).headings == ["method", "trainable", "accuracy", "seconds", "more"]


def test_table_refuses():
    with pytest.raises(ValueError, match="no rows"):
        results_table([])
    with pytest.raises(ValueError, match=r"row 1 has no 'b' \(only a\)"):
        results_table([{"a": 1, "b": 2}, {"a": 1}])
