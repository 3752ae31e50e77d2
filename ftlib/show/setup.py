"""Seed, and say where a notebook runs: `setup`.  To copy: this file, core/batches.py, core/device.py and torch."""

import os
import platform
import random
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import numpy as np
import torch

from ..core.batches import one_of, whole
from ..core.device import choose_device, choose_precision


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

    The size of the experiments is "small" or, with the environment variable FTLIB_SIZE, "full".
    Raises ValueError for another FTLIB_SIZE and for a seed outside 0 … 2**31 - 1.
    """
    size = one_of("FTLIB_SIZE", os.environ.get("FTLIB_SIZE") or "small", ("small", "full"))
    whole("seed", seed, 0)
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    device = choose_device()
    precision, reason = choose_precision(device)
    versions = {"Python": platform.python_version()}
    for package in ("torch", "transformers", "datasets"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["ftlib"] = getattr(import_module("..", __package__), "__version__", "a copy")
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    other = "full" if size == "small" else "small"
    print(", ".join(f"{package} {number}" for package, number in versions.items()))
    print(f"device      {device}{name}, CPU threads: {torch.get_num_threads()}")
    print(f"precision   {precision}: {reason}")
    print(f"size        {size} (for the other: %env FTLIB_SIZE={other} above this cell, then run all again)")
    print(f"seed        {seed}")
    return Environment(versions, device, precision, reason, size, seed)
