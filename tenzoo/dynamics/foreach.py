"""Tensors in groups for torch's ``_foreach`` functions, which are fast for one device and one dtype at a time."""

from collections.abc import Sequence

from torch import Tensor


def by_device_and_dtype(*columns: Sequence[Tensor]) -> list[tuple[list[Tensor], ...]]:
    """Group tensors by device and dtype.

    Tensors at the same position of several lists stay together: for parameters and gradients, each group is a list
    of parameters and a list of their gradients. A sparse tensor is in a group of its own.

    Example:
        >>> import torch
        >>> single, double, other = torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(4)
        >>> [[len(tensor) for tensor in tensors] for (tensors,) in by_device_and_dtype([single, double, other])]
        [[2, 4], [3]]
    """
    groups: dict[object, tuple[list[Tensor], ...]] = {}
    for position, row in enumerate(zip(*columns, strict=True)):
        sparse = True in [tensor.is_sparse for tensor in row]
        kind: object = position if sparse else (row[0].device, *[tensor.dtype for tensor in row])
        group = groups.get(kind)
        if group is None:
            group = groups[kind] = tuple([] for _ in row)
        for tensors, tensor in zip(group, row, strict=True):
            tensors.append(tensor)
    return list(groups.values())
