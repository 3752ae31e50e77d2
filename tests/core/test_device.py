"""Where to compute and how precisely."""

import pytest
import torch

from ftlib.core import device as device_module
from ftlib.core.device import DTYPES, PRECISIONS, choose_device, choose_precision, computing

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    """No FTLIB_PRECISION, and a CPU without fast bfloat16."""
    monkeypatch.delenv("FTLIB_PRECISION")
    monkeypatch.setattr(device_module, "fast_bf16", lambda: None)


@pytest.fixture
def capability(monkeypatch):
    """A GPU of this capability, on paper."""

    def of(*numbers):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: numbers)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")

    return of


def test_the_device_is_the_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device() == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, kind in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert choose_device() == torch.device(kind)


@pytest.mark.parametrize(
    ("numbers", "device", "requested", "expected"),
    [
        (None, CPU, "auto", "fp32"), (None, CPU, "bf16", "bf16"), (None, CPU, "fp32", "fp32"),
        ((8, 0), CUDA, "auto", "bf16"), ((9, 0), CUDA, "tf32", "tf32"), ((8, 6), CUDA, "fp16", "fp16"),
        ((7, 5), CUDA, "auto", "fp16"), ((7, 5), CUDA, "fp32", "fp32"),
    ],
)  # fmt: skip
def test_the_precision_and_why(capability, numbers, device, requested, expected):
    if numbers:
        capability(*numbers)
    word, reason = choose_precision(device, requested)
    assert word == expected and (reason == "as asked") == (requested != "auto")


@pytest.mark.parametrize(
    ("numbers", "device", "requested", "message"),
    [
        (None, CPU, "half", "precision='half': choose one of auto, fp32, tf32, bf16, fp16"),
        (None, CPU, "fp16", "precision='fp16' needs a GPU"),
        (None, CPU, "tf32", "precision='tf32' needs an NVIDIA GPU of compute capability 8.0"),
        ((7, 5), CUDA, "tf32", "precision='tf32' needs an NVIDIA GPU of compute capability 8.0"),
        ((7, 5), CUDA, "bf16", "Tesla T4 has no bf16 units; use precision='fp16' or 'auto'"),
    ],
)
def test_what_a_device_can_not(capability, numbers, device, requested, message):
    if numbers:
        capability(*numbers)
    with pytest.raises(ValueError, match=message):
        choose_precision(device, requested)


@pytest.mark.parametrize("word", ["fp32", "tf32", "bf16"])
def test_computing(word):
    dtype = torch.bfloat16 if word == "bf16" else torch.float32
    around = computing(CPU, word)
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for _ in range(2):  # a new context each time
        with around():
            assert linear(x).dtype == dtype == DTYPES[word]
    assert linear(x).dtype == torch.float32
    assert {DTYPES[word] for word in PRECISIONS[1:]} == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize(
    ("level", "amx", "avx", "found"),
    [
        ("AVX512", True, True, "AMX"), ("AVX512", False, True, "AVX512_BF16"), ("AVX512", False, False, None),
        ("AVX2", True, True, None), ("SVE256", False, False, None),
    ],
)  # fmt: skip
def test_auto_is_half_precision_on_a_cpu_that_multiplies_it_fast(monkeypatch, level, amx, avx, found):
    monkeypatch.undo()
    monkeypatch.delenv("FTLIB_PRECISION", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert device_module.fast_bf16() == found
    word, reason = choose_precision(CPU)
    assert word == ("bf16" if found else "fp32") and (found or "no gain") in reason
    assert choose_precision(torch.device("mps"))[0] == "fp32"


def test_the_environment_decides_what_nobody_chose(monkeypatch):
    monkeypatch.setenv("FTLIB_PRECISION", "bf16")
    assert choose_precision(CPU) == ("bf16", "as FTLIB_PRECISION says")
    assert choose_precision(CPU, "fp32") == ("fp32", "as asked")
    monkeypatch.setenv("FTLIB_PRECISION", "half")
    with pytest.raises(ValueError, match="FTLIB_PRECISION=half: choose one of auto, fp32"):
        choose_precision(CPU)
    monkeypatch.setenv("FTLIB_PRECISION", "")
    assert choose_precision(CPU)[0] == "fp32"
