"""Set-up and measuring."""

import dataclasses
import mmap
import random
import sys
import time

import numpy as np
import pytest
import torch

from ftlib.show import measuring as memory
from ftlib.show.measuring import measure
from ftlib.show.setup import setup


@pytest.fixture(autouse=True)
def size_not_set(monkeypatch):
    monkeypatch.delenv("FTLIB_SIZE", raising=False)


@pytest.fixture
def given_device(monkeypatch):
    """Stands in for the choices of ftlib.core.device."""
    here = sys.modules["ftlib.show.setup"]
    monkeypatch.setattr(here, "choose_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(here, "choose_precision", lambda device: ("fp32", f"because it is a {device.type}"))


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
        with pytest.raises(ValueError, match="need a whole number"):
            setup(seed=seed)
    monkeypatch.setenv("FTLIB_SIZE", "huge")
    with pytest.raises(ValueError, match="FTLIB_SIZE='huge': choose one of small, full"):
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
    """Pages straight from the kernel: an array could lie in memory that earlier tests gave back to malloc alone."""
    block = np.frombuffer(mmap.mmap(-1, megabytes * 2**20), np.uint8)
    block[:] = 1  # untouched pages are not resident
    time.sleep(0.05)


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
        monkeypatch.setattr(memory, "_status_mb", lambda key: float("nan"))
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
