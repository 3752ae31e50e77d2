"""Set-up, measuring, stored results, and how numbers are shown."""

import dataclasses
import json
import math
import random
import sys
import time
import types

import numpy as np
import pytest
import torch

from ftlib.inputs import assets
from ftlib.show import measuring as memory
from ftlib.show import setup as environment
from ftlib.show.measuring import measure
from ftlib.show.setup import format_cell, mean_std, results_table, setup, stored_results, tie


@pytest.fixture(autouse=True)
def size_not_set(monkeypatch):
    monkeypatch.delenv("FTLIB_SIZE", raising=False)


@pytest.fixture
def given_device(monkeypatch):
    """Stands in for the choices of ftlib.engine.fit."""
    chosen = types.ModuleType("ftlib.engine.settings")
    chosen.choose_device = lambda: torch.device("cpu")
    chosen.choose_precision = lambda device, requested="auto": ("fp32", f"because it is a {device.type}")
    monkeypatch.setitem(sys.modules, "ftlib.engine.settings", chosen)


# -------------------------------------------------------------------------------------------------- setup


def test_setup_prints_what_it_returns(given_device, capsys):
    env = setup(seed=3)
    printed = capsys.readouterr().out
    assert list(env.versions) == ["Python", "torch", "transformers", "datasets", "ftlib"]
    assert (
        env.versions["torch"] == torch.__version__.split("+")[0] or env.versions["torch"] == torch.__version__
    )
    for package, number in env.versions.items():
        assert f"{package} {number}" in printed
    assert (env.precision, env.reason, env.size, env.seed) == ("fp32", "because it is a cpu", "small", 3)
    assert "fp32: because it is a cpu" in printed
    assert f"cpu, CPU threads: {torch.get_num_threads()}" in printed
    assert "FTLIB_SIZE=full" in printed
    assert len(printed.splitlines()) == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        env.seed = 4


def test_setup_with_the_real_choices(capsys):
    env = setup()
    assert env.device.type in ("cpu", "cuda", "mps")
    assert env.precision in capsys.readouterr().out
    assert env.reason


def test_setup_seeds_all_three_generators(given_device):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    setup(seed=5)
    first = draw()
    setup(seed=5)
    assert draw() == first
    setup(seed=6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_size_picks(given_device, monkeypatch):
    assert setup().pick(small=1, full=2) == 1
    monkeypatch.setenv("FTLIB_SIZE", "full")
    assert setup().pick(small=1, full=2) == 2
    monkeypatch.setenv("FTLIB_SIZE", "")
    assert setup().size == "small"


def test_setup_refuses(given_device, monkeypatch):
    for seed in (-1, 2**32, 0.5):
        with pytest.raises(ValueError, match="expected a whole number"):
            setup(seed=seed)
    monkeypatch.setenv("FTLIB_SIZE", "huge")
    with pytest.raises(ValueError, match="FTLIB_SIZE is 'huge': expected 'small' or 'full'"):
        setup()


def test_missing_package_is_said(given_device, monkeypatch):
    from importlib import metadata

    real = metadata.version

    def version(name):
        if name == "datasets":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert setup().versions["datasets"] == "not installed"


# ------------------------------------------------------------------------------------------------ measure


def use(megabytes):
    block = np.ones(megabytes * 2**17)  # 8 bytes each; ones, because untouched pages are not resident
    time.sleep(0.05)
    return block.sum()


def without_the_kernel(monkeypatch):
    monkeypatch.setattr(memory, "_reset_peak", lambda: False)


@pytest.mark.parametrize("way", ["kernel", "sampled", "psutil"])
def test_peak_is_of_the_block_alone(way, monkeypatch):
    if way == "kernel" and not memory._reset_peak():
        pytest.skip("this machine does not let a process reset its high-water mark")
    if way != "kernel":
        without_the_kernel(monkeypatch)
    if way == "psutil":
        pytest.importorskip("psutil")
        monkeypatch.setattr(memory, "_status_mb", lambda key: None)
    use(300)  # an earlier, higher peak that must not count
    with measure() as empty:
        time.sleep(0.02)
    with measure() as full:
        use(120)
    assert 90 < full.peak_mb - empty.peak_mb < 160
    assert full.seconds >= 0.05 and empty.seconds >= 0.02
    assert empty.how == full.how == (memory._KERNEL if way == "kernel" else memory._SAMPLED)


@pytest.mark.parametrize("way", ["kernel", "sampled"])
def test_an_outer_block_keeps_the_peak_from_before_an_inner_one(way, monkeypatch):
    if way == "sampled":
        without_the_kernel(monkeypatch)
    with measure() as outer:
        use(150)
        with measure() as inner:
            use(10)
    assert outer.peak_mb - inner.peak_mb > 80
    assert outer.seconds > inner.seconds
    assert memory._running == []


def test_measure_survives_an_error_and_reads_well():
    with pytest.raises(KeyError), measure() as cost:
        raise KeyError
    assert memory._running == []
    assert cost.seconds > 0 and cost.peak_mb > 1
    assert str(memory.Measurement(1.25, 1234.4)) == "1.2 s, peak memory 1,234 MB"
    assert str(memory.Measurement(2, 10, 5)) == "2.0 s, peak memory 10 MB, on the GPU 5 MB"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_peak():
    with measure() as cost:
        torch.ones(2**20, device="cuda")
    assert 4 <= cost.peak_gpu_mb < 400


def test_no_gpu_peak_without_a_gpu():
    with measure() as cost:
        pass
    assert (cost.peak_gpu_mb is None) == (not torch.cuda.is_available())


# ----------------------------------------------------------------------------------------- stored results


@pytest.mark.parametrize("installed", [False, True])
def test_stored_results(installed, tmp_path, monkeypatch):
    folder = tmp_path / ("_shipped/results" if installed else "tests/benchmarks/results")
    folder.mkdir(parents=True)
    (folder / "fine_tuning.json").write_text(json.dumps({"rows": [{"accuracy": 0.785}], "about": "θ"}))
    monkeypatch.setattr(assets, "_checkout", lambda: None if installed else tmp_path)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert stored_results("fine_tuning") == {"rows": [{"accuracy": 0.785}], "about": "θ"}
    message = r"no stored results 'speed' \(there are: fine_tuning\).*python tests/benchmarks/speed.py"
    with pytest.raises(FileNotFoundError, match=message):
        stored_results("speed")
    for name in ("../secret", "a.json", ""):
        with pytest.raises(ValueError, match="plain name"):
            stored_results(name)


def test_no_results_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "_checkout", lambda: tmp_path)
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
    with pytest.raises(ValueError, match="got none"):
        mean_std([])


def test_tie_rule():
    # means 1 and 2, both std 1: spread sqrt(2) > 1
    assert tie([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == (
        True,
        "1.000 ± 1.000 and 2.000 ± 1.000: a tie, the means differ by 1.000, within the spread 1.414",
    )
    tied, text = tie([0.0, 1.0, 2.0], [2.0, 3.0, 4.0])
    assert not tied and text.endswith("no tie, the means differ by 2.000, beyond the spread 1.414")
    assert tie([0.5, 0.5], [0.5, 0.5])[0]
    tied, text = tie([0.5], [0.9, 0.8])
    assert tied and "0.500 (one seed)" in text and "no spread to judge by" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured yet"),
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
        "method      trainable          accuracy           seconds",
        "---------  ----------  ----------------  ----------------",
        "head|only         770     0.744 ± 0.004               3.2",
        "<full>     22,713,986  0.785 (one seed)  not measured yet",
    ]
    assert repr(table) == str(table)


def test_table_as_markdown():
    lines = (
        results_table(ROWS, {"method": "method", "trainable": "trained parameters"})
        ._repr_markdown_()
        .splitlines()
    )
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
