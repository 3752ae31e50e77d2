"""Where to compute and how precisely, with the reason, for the caller to print.

To copy: this file alone.
"""

import functools
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


def choose_precision(device: torch.device, requested: str = "auto") -> tuple[str, str]:
    """The precision to compute in, and the reason: ("fp32" | "tf32" | "bf16" | "fp16", reason).

    Weights and optimizer state stay float32 in every case; only matrix products and the like run in half precision.
    tf32 is float32 whose matrix products round their inputs to 10 bits after the point, on GPUs from Ampere on.
    Raises ValueError for fp16 on a CPU, for bf16 on a GPU without it, and for tf32 elsewhere than on such a GPU.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    why_not = None
    if requested not in PRECISIONS:
        why_not = f"precision={requested!r}: choose one of {', '.join(PRECISIONS)}"
    elif requested == "tf32" and not has_bf16:  # both came with compute capability 8.0
        why_not = "precision='tf32' needs an NVIDIA GPU of compute capability 8.0 or more; use fp32"
    elif requested == "fp16" and device.type == "cpu":
        why_not = "precision='fp16' needs a GPU (a CPU gains nothing and overflows); use fp32"
    elif requested == "bf16" and device.type == "cuda" and not has_bf16:
        why_not = f"{torch.cuda.get_device_name(device)} has no bf16 units; use precision='fp16' or 'auto'"
    if why_not:
        raise ValueError(why_not)
    if requested != "auto":
        return requested, "as asked"
    if has_bf16:
        return "bf16", "this GPU multiplies bfloat16 fast, and its range equals float32's, so no loss scaling"
    if device.type == "cuda":
        return "fp16", "this GPU has no bfloat16 units; float16 with loss scaling"
    return "fp32", "on this device half precision brings no gain we rely on"


def computing(device: torch.device, precision: str) -> Callable:
    """What to call around a forward pass: autocast for bf16 and fp16, else nothing.

    >>> with computing(torch.device("cpu"), "bf16")():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    dtype = DTYPES[precision]
    return nullcontext if dtype == torch.float32 else functools.partial(torch.autocast, device.type, dtype)
