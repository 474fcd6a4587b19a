"""What a step of an optimizer does to the norms of cores, for several groups at once."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from tenzoo.cores import CoreGroup
from tenzoo.dynamics import (
    effective_rho,
    norm_deviation,
    norm_gradient_covariance,
    sam_deviation_rate,
    squared_norms,
)

QUANTITIES = (
    "deviation",
    "normalized_deviation",
    "covariance",
    "predicted_rate",
    "measured_rate",
    "effective_rho",
)
"""The logged quantities of each group: the first rows that :func:`step_rows` gives."""


@dataclass(frozen=True, eq=False)
class NormStep:
    """What is known of G groups of K cores each, just before the step of their optimizer.

    The groups are on one device and have the same settings of the optimizer. They are computed together, because each
    operation on an accelerator has a cost of its own.
    """

    groups: Sequence[CoreGroup]
    cores: Sequence[Tensor]
    """The trained cores of all groups, one group after another."""
    s: Tensor
    """Squared norms, shape ``(G, K)``."""
    gamma: Tensor
    """Squared norms of the gradients, shape ``(G, K)``."""
    by_sam: bool
    """Whether γ comes from SAM's first pass. Otherwise it comes from the gradients for the optimizer."""
    grad_norm: Tensor | None
    """Norms of the gradients for the optimizer before clipping, shape ``(G,)``; None where the optimizer unscales them
    itself, which excludes clipping."""
    sam_rate: Tensor
    """``dQ/dt`` of SAM, shape ``(G,)``."""
    callback_rate: Tensor
    """The sum of the rates that callbacks predict, shape ``(G,)``."""
    optimizer: Optimizer
    setting: dict[str, Any]
    """Settings of the optimizer in this step. A scheduler may change them right after it."""
    lr: float | None
    """None if the cores have different settings."""


def squared_grad_norms(cores: Sequence[Tensor]) -> Tensor:
    """The squared norms of ``.grad`` of the cores that have one."""
    return squared_norms([core.grad for core in cores if core.grad is not None])


def as_clipped(step: NormStep) -> NormStep:
    """The step with clipped gradients, as the optimizer takes them. Lightning clips after the callbacks have run."""
    if step.grad_norm is None or any(core.grad is None for core in step.cores):
        return step
    clipped = squared_grad_norms(step.cores).view_as(step.s)
    ratio = (clipped.sum(-1).sqrt() / step.grad_norm).nan_to_num(1.0, posinf=1.0)
    gamma = step.gamma * ratio.square().unsqueeze(-1) if step.by_sam else clipped
    return dataclasses.replace(step, gamma=gamma, sam_rate=step.sam_rate * ratio)


_DECOUPLED_DECAY = (SGD, torch.optim.Adafactor, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else []))
"""Optimizers of torch whose weight decay moves weights by ``−η·wd·w``. Others have a setting that says so, or transform
the decay together with the gradient."""


def _predicted_rate(step: NormStep) -> Tensor:
    sgd, setting = isinstance(step.optimizer, SGD), step.setting
    rate = step.sam_rate
    if sgd and not setting["momentum"]:
        rate = rate + sam_deviation_rate(step.s, step.gamma, effective_rho(step.gamma, setting["lr"]))
    if isinstance(step.optimizer, _DECOUPLED_DECAY) or setting.get("decoupled_weight_decay"):
        rate = rate - 4 * setting["weight_decay"] * norm_deviation(step.s)
    if sgd and setting["momentum"]:  # which multiplies, after some steps, whatever is part of the gradient
        rate = rate * ((1 - setting["dampening"]) / (1 - setting["momentum"]))
    return rate + step.callback_rate


def step_rows(step: NormStep, after: Tensor) -> Tensor:
    """A column for each group: the logged quantities, then ``s̄²`` and ``Σ γ`` for :func:`total_of`.

    Args:
        step: The step, with the gradients that the optimizer took.
        after: Squared norms of the cores after the step, shape ``(G, K)``.
    """
    deviation, mean_square = norm_deviation(step.s), step.s.mean(-1).square()
    rows = (
        deviation,
        deviation / mean_square,
        norm_gradient_covariance(step.s, step.gamma),
        _predicted_rate(step),
        (norm_deviation(after) - deviation) / step.setting["lr"],
        effective_rho(step.gamma, step.setting["lr"]),
        mean_square,
        step.gamma.sum(-1),
    )
    return torch.stack([row.to(deviation) for row in rows])


def total_of(table: Tensor, lr: float) -> Tensor:
    """The column of all groups together."""
    total = table.sum(1)
    *_, mean_square, gamma = total
    total[QUANTITIES.index("normalized_deviation")] = total[0] / mean_square
    total[QUANTITIES.index("effective_rho")] = gamma.sqrt() * (lr / 2)
    return total
