"""Where to compute and how precisely."""

import pytest
import torch

from ftlib.core.device import DTYPES, PRECISIONS, choose_device, choose_precision, computing

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


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
