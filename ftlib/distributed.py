"""Several processes, one run: who am I, and are we all in step.  Start them with `torchrun`.

To copy this module you need: distributed.py and torch.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def start() -> None:
    """Join the process group that torchrun announces in the environment; alone, do nothing."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes run together, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(tensor: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """Every process's tensor (one shape and dtype), on the CPU, in the order of their ranks."""
    if not dist.is_initialized():
        return [tensor.cpu()]
    parts = [torch.empty_like(tensor, device=device) for _ in range(world_size())]
    dist.all_gather(parts, tensor.to(device))
    return [part.cpu() for part in parts]


def from_first(value: float, device: torch.device) -> float:
    """Process 0's number, so that all decide alike."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(tensor, src=0)
    return float(tensor)


def wrap(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel when there are several processes, otherwise the model itself."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def hold_gradients(model: Any) -> AbstractContextManager:
    """Inside, a wrapped model adds gradients up without exchanging them: for all but a step's last micro-batch."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
