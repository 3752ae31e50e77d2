"""Where to compute and how precisely, with the reason, for the caller to print.  To copy: this file alone."""

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def asked(precision: str) -> str:
    """The environment's FTLIB_PRECISION, if set, in place of "auto"; what a caller chose stays."""
    return os.environ.get("FTLIB_PRECISION") or precision if precision == "auto" else precision


def fast_bf16() -> str | None:
    """The instructions by which this CPU, and torch on it, multiply bfloat16 faster than float32; None without."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):  # another processor, or made to play one
        return None
    has_avx = torch.cpu._is_avx512_bf16_supported()
    return "AMX" if torch.cpu._is_amx_tile_supported() else "AVX512_BF16" if has_avx else None


def choose_precision(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """The precision to compute in, and the reason: ("fp32" | "tf32" | "bf16" | "fp16", reason).

    "auto" is half precision where it pays, or what FTLIB_PRECISION in the environment says.
    Weights and optimizer state stay float32 in every case; only matrix products and the like run in half precision.
    tf32 is float32 whose matrix products round their inputs to 10 bits after the point, on GPUs from Ampere on.
    Raises ValueError for fp16 on a CPU, for bf16 on a GPU without it, and for tf32 elsewhere than on such a GPU.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    given, why_not = asked(requested), None
    said = f"precision={given!r}" if given == requested else f"FTLIB_PRECISION={given}"
    if given not in PRECISIONS:
        why_not = f": choose one of {', '.join(PRECISIONS)}"
    elif given == "tf32" and not has_bf16:  # both came with compute capability 8.0
        why_not = " needs an NVIDIA GPU of compute capability 8.0 or more; use fp32"
    elif given == "fp16" and device.type == "cpu":
        why_not = " needs a GPU (a CPU gains nothing and overflows); use fp32"
    elif given == "bf16" and device.type == "cuda" and not has_bf16:
        why_not = f": {torch.cuda.get_device_name(device)} has no bf16 units; use precision='fp16' or 'auto'"
    if why_not:
        raise ValueError(f"{said}{why_not}")
    if given != "auto":
        return given, "as asked" if given == requested else "as FTLIB_PRECISION says"
    if has_bf16:
        return "bf16", "this GPU multiplies bfloat16 fast, and its range equals float32's, so no loss scaling"
    if device.type == "cuda":
        return "fp16", "this GPU has no bfloat16 units; float16 with loss scaling"
    if device.type == "cpu" and (instructions := fast_bf16()):
        return "bf16", f"this CPU multiplies bfloat16 fast ({instructions}), and its range equals float32's"
    return "fp32", "on this device half precision brings no gain we rely on"


def computing(device: torch.device, precision: str) -> Callable:
    """What to call around a forward pass: autocast for bf16 and fp16, else nothing.

    >>> with computing(torch.device("cpu"), "bf16")():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    dtype = DTYPES[precision]
    return nullcontext if dtype == torch.float32 else functools.partial(torch.autocast, device.type, dtype)
