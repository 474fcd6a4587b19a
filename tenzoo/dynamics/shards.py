"""Tensors that processes share: torch's DTensor, as in FSDP2 and tensor parallelism."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor.

    Example:
        >>> is_distributed(torch.zeros(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes 2 s, and without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor in this process, in the same memory: the whole tensor, unless it is sharded.

    Example:
        >>> x = torch.zeros(2)
        >>> own_part(x) is x
        True
    """
    return tensor.to_local() if is_distributed(tensor) else tensor


def of_parts(part: Tensor, other: Tensor) -> Tensor:
    """A tensor of which each process has its part, as of another tensor of its shape: the inverse of `own_part`.

    Example:
        >>> x = torch.zeros(2)
        >>> of_parts(x, torch.ones(2)) is x
        True
    """
    if not is_distributed(other):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = other.device_mesh, other.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=other.shape, stride=other.stride())


def reduced(tensor: Tensor) -> Tensor:
    """The tensor after all pending sums over processes; a collective if there are any."""
    if not is_distributed(tensor) or not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor, sharded like another one of its shape; a collective if it was sharded differently."""
    if is_distributed(tensor) and is_distributed(other) and tensor.placements != other.placements:
        return tensor.redistribute(placements=other.placements)
    return tensor


def sum_over_parts(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sum, over the processes that share a tensor, a value that each process computed for its own part.

    Tensors that are sharded alike take one all-reduce together.

    Args:
        values: A value for each tensor, shape ``(n,)``.
        tensors: The n tensors.

    Returns:
        Shape ``(n,)``, the same on all processes.

    Example:
        >>> sum_over_parts(torch.tensor([1.0, 2.0]), [torch.zeros(3), torch.zeros(4)])
        tensor([1., 2.])
    """
    kinds: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for position, tensor in enumerate(tensors):
        if is_distributed(tensor):
            sharded = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
            kinds.setdefault((tensor.device_mesh, sharded), []).append(position)
    for (mesh, dims), positions in kinds.items():
        part = torch.stack([values[position] for position in positions])
        for dim in dims:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        values = values.clone()
        for position, value in zip(positions, part, strict=True):
            values[position] = value
    return values
