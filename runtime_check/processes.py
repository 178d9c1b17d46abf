"""More than one process at one piece of work, as torchrun starts them."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qnpu.compiler.process import process_count, process_index

T = TypeVar("T")


def join() -> None:
    """Meets the other processes, once; where there are none, does nothing."""
    if process_count() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(_leave)


def wait() -> None:
    """Until every process is here."""
    if process_count() > 1:
        join()
        dist.barrier()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def own_share(items: Sequence[T]) -> Sequence[T]:
    """What of all work is this process's."""
    return items[process_index() :: process_count()]


def agreed(value: T) -> T:
    """What the first process has, which all get."""
    if process_count() == 1:
        return value
    join()
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(share: Mapping[str, T]) -> dict[str, T]:
    """The shares of all processes in one."""
    if process_count() == 1:
        return dict(share)
    join()
    shares: list[Mapping[str, T]] = [{}] * process_count()
    dist.all_gather_object(shares, share)
    return {name: value for each in shares for name, value in each.items()}


def shard(modules: Iterable[torch.nn.Module]) -> None:
    """Leaves each process a part of each module's parameters, and of their gradients and moments.

    A module's parameters come together, by torch's FSDP, while it is called.
    """
    mesh = init_device_mesh("cpu", (process_count(),))
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def same_start(parameters: Iterable[Tensor]) -> None:
    """Gives every process the parameters of the first."""
    if process_count() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces each gradient by the mean over all processes; of shared-out ones FSDP did so."""
    if process_count() == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= process_count()


def mean_of(value: float) -> float:
    """The mean over all processes, so that each decides alike."""
    if process_count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / process_count()


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter or moment, in main memory; every process has to ask at the same time."""
    data = tensor.detach()
    return (data.full_tensor() if isinstance(data, DTensor) else data).cpu()


def fill(tensor: Tensor, array: NDArray[np.generic]) -> None:
    """Writes all of a parameter or moment, of which this process may hold a part."""
    source = torch.from_numpy(np.array(array))
    if isinstance(tensor, DTensor):
        source = distribute_tensor(source, tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        tensor.copy_(source)
