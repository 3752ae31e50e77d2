"""Several processes, one run: who am I, are we all in step, and who holds which weights.  Start them with `torchrun`.

To copy: this file and core/anatomy.py.
Source: Li et al. 2020 (PyTorch Distributed, arXiv:2006.15704); Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277).
"""

import copy
import gc
import inspect
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core import anatomy


def patience() -> timedelta:
    """How long to wait for the others, one of which may fetch a model or write a checkpoint: FTLIB_TIMEOUT seconds."""
    said = os.environ.get("FTLIB_TIMEOUT") or "600"
    if not (said.isdecimal() and int(said)):
        raise ValueError(f"FTLIB_TIMEOUT={said!r} must be a number of seconds")
    return timedelta(seconds=int(said))


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do when a process, a machine or the link between them is lost: the RuntimeErrors of gloo and NCCL."""
    try:
        yield
    except RuntimeError as error:
        known = re.search("(?i)gloo|nccl|timed? ?out|pair closure|connection", str(error))
        if world_size() == 1 or not known or "FTLIB_TIMEOUT" in str(error):
            raise
        wait = f"FTLIB_TIMEOUT={patience().total_seconds():.0f} seconds"
        lost = f"lost another process, or waited more than {wait} for it ({error}); its own output may say why"
        remedy = "start all again: with checkpoints and resume='auto' they go on from the last whole one"
        raise RuntimeError(f"{lost}. To go on, {remedy}") from error


def start() -> None:
    """Join the process group that torchrun announces, if any; ValueError for a process that would have no GPU."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or dist.is_initialized():
        return
    local, count, device = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count(), None
    if torch.cuda.is_available():
        if local >= count:
            raise ValueError(f"local process {local} has no GPU, there are {count}; use --nproc-per-node {count}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    where: dict[str, Any] = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives the processes: in a corner of its own, a restart finds no addresses of dead ones
        own, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, world, is_master=False, timeout=patience())
        corner = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        where = {"store": corner, "rank": own, "world_size": world}
    way = "nccl" if device else "gloo"
    try:  # device_id: it connects now, so that trouble shows now
        dist.init_process_group(way, timeout=patience(), device_id=device, **where)
    except RuntimeError as error:
        remedy = f"name the network interface by which the machines reach each other, {way.upper()}_SOCKET_IFNAME=eth0"
        raise RuntimeError(f"the processes can't reach each other ({error}); {remedy}") from error


def stop() -> None:
    """Leave the process group, if in one, once all are here.  After an error just end: torchrun stops the others."""
    with explained():
        barrier()
    if dist.is_initialized():
        gc.collect()  # what still holds the group, a wrapped model say, would end it later: its threads abort, or hang
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes run together, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def one_first() -> Iterator[None]:
    """One process of each machine goes in first, the others follow: what it fetches, they find."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield
    if first:
        barrier()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """Every process's value, a Python object or a tensor on the CPU, in the order of their ranks."""
    found: list[Any] = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def all_joined(parts: dict) -> dict:
    """The entries of every process's dict together, on every process."""
    return {key: value for one in gather(parts) for key, value in one.items()}


def evened(batches: list[list[Any]]) -> list[tuple[Any, float]]:
    """This process's batches, [(batch, weight)], from the batches of every process: as many for all.

    A spread model computes only when all processes run it: those with fewer batches get the first again, of weight 0.

    >>> evened([[[0, 2], [4]]])
    [([0, 2], 1.0), ([4], 1.0)]
    """
    own = [(batch, 1.0) for batch in batches[rank()]]
    return own + [(batch, 0.0) for batch in batches[0][:1]] * (max(map(len, batches)) - len(own))


@contextmanager
def spread(model: nn.Module, how: str, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """The model to train: with "fsdp" a sharded copy, whose weights come back at the end, but not after an error."""
    with explained():
        if how != "fsdp" or world_size() == 1:
            yield model
            return
        yield (shards := shard(model, device, dtype))
        own = model.to(device).state_dict()
        with torch.no_grad():
            for name, tensor in shards.state_dict().items():
                own[name].copy_(whole(tensor))


def wrap(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel when there are several processes; alone, or sharded, the model itself."""
    if world_size() == 1 or hasattr(model, "set_requires_gradient_sync"):  # `shard` made it
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    # buffers here are positions, alike everywhere; sent before every forward, they spoil the backward of the one before
    known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 has a new name for it
    unsent = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True, **unsent)


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model for training, its weights spread over all processes, those of process 0 at first.

    Every layer is a unit, the rest one more; the model given stays whole.  dtype: to compute and to send weights in,
    None for their own; gradients are summed up in float32.  Raises ValueError for a model with several heads.
    """
    if hasattr(model, "tasks"):  # of which the processes may use other heads, and would sum them up out of step
        raise ValueError("distributed='fsdp' trains models with one head; use distributed='ddp'")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # the logits of a token classifier are a view; nothing here changes them in place, which is what it warns of
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    shards = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*shards.parameters(), *shards.buffers()]:
            first = tensor.to(device)
            dist.broadcast(first, src=0)
            tensor.copy_(first)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()
    for module in [*(layer for stack in anatomy.stacks(shards) for layer in stack), shards]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return shards


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor put together from all processes, which must all ask; a plain tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cut(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, spread as `like` is; where that is a plain one, in its memory layout."""
    if not hasattr(like, "full_tensor"):
        if tensor.stride() == like.stride():
            return tensor  # in another layout the optimizer's numbers differ in the last bit
        return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def to_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors, on the CPU of process 0; the others take part, one tensor at a time, and get none."""
    each = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in each if rank() == 0}


@contextmanager
def hold_gradients(model: Any) -> Iterator[None]:
    """Inside, gradients add up without being exchanged: for all but a step's last micro-batch."""
    exchange = getattr(model, "set_requires_gradient_sync", lambda on: None)  # of a sharded one
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        exchange(False)
        try:
            yield
        finally:
            exchange(True)
