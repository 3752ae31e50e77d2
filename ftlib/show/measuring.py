"""Time and peak memory of a block of code.  To copy: this file alone."""

import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(eq=False)
class Measurement:
    """Filled in when the block ends; 1 MB = 2**20 bytes. `how` says where `peak_mb` comes from."""

    seconds: float = math.nan
    peak_mb: float = 0.0
    peak_gpu_mb: float | None = None
    how: str = ""

    def __str__(self) -> str:
        gpu = "" if self.peak_gpu_mb is None else f", on the GPU {self.peak_gpu_mb:,.0f} MB"
        return f"{self.seconds:.1f} s, peak memory {self.peak_mb:,.0f} MB{gpu}"


_KERNEL = "high-water mark of the kernel, set back at the start of the block"
_SAMPLED = "largest resident memory of readings every 5 ms"
_running: list[Measurement] = []  # measurements whose block has not ended, outermost first


@contextmanager
def measure() -> Iterator[Measurement]:
    """Wall-clock seconds of a block and the peak memory of the process while it ran.

    `peak_mb` is the largest resident memory of this whole process during the block: models loaded before it count,
    child processes don't. Linux keeps that maximum, and writing 5 to /proc/self/clear_refs sets it back; where that
    isn't allowed a thread reads the memory every 5 ms, which can miss a short peak (outside Linux with psutil; nan
    without it). `peak_gpu_mb` is of tensors on CUDA, and the clock waits for the GPU. Blocks may be nested.
    """
    cuda = torch.cuda.is_available()
    _note_peaks(cuda)  # before the marks go back, so that an outer block keeps what it has seen
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    result, done = Measurement(how=_KERNEL if _reset_peak() else _SAMPLED), threading.Event()
    sampler = threading.Thread(target=_sample, args=(result, done), daemon=True)
    sampler.start()
    _running.append(result)
    start = time.perf_counter()
    try:
        yield result
    finally:
        if cuda:
            torch.cuda.synchronize()
        result.seconds = time.perf_counter() - start
        done.set()
        sampler.join()
        _note_peaks(cuda)
        _running.remove(result)


def _status_mb(key: str) -> float:
    """VmRSS or VmHWM of this process from Linux, else nan."""
    try:
        return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024
    except (OSError, TypeError):  # no such file, or no such line in it
        return math.nan


def _reset_peak() -> bool:
    """Set the kernel's high-water mark back to the present; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status_mb("VmHWM") < _status_mb("VmRSS") + 8  # some sandboxes accept the write and do nothing


def _resident_mb() -> float:
    with suppress(ImportError):
        import psutil

        return psutil.Process().memory_info().rss / 2**20
    return _status_mb("VmRSS")


def _sample(result: Measurement, done: threading.Event) -> None:
    while not math.isnan(now := _resident_mb()):
        result.peak_mb = max(result.peak_mb, now)
        if result.how == _KERNEL or done.wait(0.005):
            return
    result.peak_mb = math.nan


def _note_peaks(cuda: bool) -> None:
    """Carry the marks since the last reset into every running measurement."""
    for result in _running:
        if result.how == _KERNEL:
            result.peak_mb = max(result.peak_mb, _status_mb("VmHWM"))
        if cuda:
            result.peak_gpu_mb = max(result.peak_gpu_mb or 0.0, torch.cuda.max_memory_allocated() / 2**20)
