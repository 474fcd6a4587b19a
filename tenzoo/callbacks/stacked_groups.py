"""Core groups that are scaled together, and the record of their factors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StackedGroups:
    """G groups of K cores each, on one device and of one dtype, which are scaled together."""

    cores: list[Tensor]
    settings: list[dict[str, Any]]
    """The parameter group of each core, in its optimizer."""
    group_size: int

    def with_gradients(self) -> "StackedGroups":
        """The groups in which all cores have a gradient."""
        kept = [
            position
            for start in range(0, len(self.cores), self.group_size)
            if all(core.grad is not None for core in self.cores[start : start + self.group_size])
            for position in range(start, start + self.group_size)
        ]
        return StackedGroups([self.cores[i] for i in kept], [self.settings[i] for i in kept], self.group_size)


class FactorRecord:
    """The λ before the bound, since the last log. They are reduced many at a time, to save a kernel in each step."""

    _CAPACITY = 256

    def __init__(self, max_scale: float) -> None:
        self._max_scale = max_scale
        self._rows: list[Tensor] = []
        self._largest: list[Tensor] = []

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last log."""
        return not self._rows and not self._largest

    def add(self, factors: Tensor) -> None:
        """Add the λ of a step, shape ``(G, K)``."""
        self._rows.append(factors)
        if len(self._rows) >= self._CAPACITY:
            self._reduce()

    def _reduce(self) -> None:
        device = self._rows[0].device
        self._largest.append(torch.cat([row.abs().amax(-1).to(device) for row in self._rows]))
        self._rows = []

    def flush(self) -> dict[str, float]:
        """The values to log, which waits for the device. The record is empty afterwards."""
        if self._rows:
            self._reduce()
        largest = torch.cat([part.to(self._largest[0].device) for part in self._largest])
        self._largest = []
        values = torch.stack([largest.max(), (largest > self._max_scale).to(largest).mean()]).tolist()
        return dict(zip(("das/max_abs_lambda", "das/bound_hit_rate"), values, strict=True))


def per_core(values: list[float | Tensor], like: Tensor) -> float | Tensor:
    """One number if all are equal, else a tensor of the shape of ``like``, filled on the device."""
    first = values[0]
    if not any(isinstance(value, Tensor) for value in values) and all(value == first for value in values):
        return first
    scalars = [
        value.to(like.device)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=like.dtype, device=like.device)
        for value in values
    ]
    return torch.stack(scalars).view_as(like)
