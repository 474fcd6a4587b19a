"""What an optimizer's step does to the norms of cores, of several groups at once."""

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
"""What is logged of each group, in the order of the rows that :func:`step_rows` gives first."""


@dataclass(frozen=True, eq=False)
class NormStep:
    """What is known just before the optimizer's step of G groups of K cores each.

    They are computed with together, since each operation has a price of its own on an accelerator. They lie on one
    device and have the same settings of one optimizer.
    """

    groups: Sequence[CoreGroup]
    cores: Sequence[Tensor]
    """Those that are trained, of one group after another."""
    s: Tensor
    """Shape ``(G, K)``, as γ."""
    gamma: Tensor
    by_sam: bool
    """Whether γ is that of SAM's first pass, and not of what the optimizer is given."""
    grad_norm: Tensor | None
    """Of what the optimizer is given, before it is clipped, shape ``(G,)`` as the rates; None where the optimizer
    unscales it itself, which rules out clipping."""
    sam_rate: Tensor
    callback_rate: Tensor
    """The sum of the rates that callbacks predict."""
    optimizer: Optimizer
    setting: dict[str, Any]
    """As it is in this step: a scheduler may change it right after."""
    lr: float | None
    """None if the cores have different settings."""


def squared_grad_norms(cores: Sequence[Tensor]) -> Tensor:
    """Of what is in ``.grad`` of each."""
    return squared_norms([core.grad for core in cores if core.grad is not None])


def as_clipped(step: NormStep) -> NormStep:
    """The step with the gradients as the optimizer saw them: they are clipped after the callbacks have run."""
    if step.grad_norm is None or any(core.grad is None for core in step.cores):
        return step
    clipped = squared_grad_norms(step.cores).view_as(step.s)
    kept = (clipped.sum(-1).sqrt() / step.grad_norm).nan_to_num(1.0, posinf=1.0)
    gamma = step.gamma * kept.square().unsqueeze(-1) if step.by_sam else clipped
    return dataclasses.replace(step, gamma=gamma, sam_rate=step.sam_rate * kept)


_SHRINKING = (SGD, torch.optim.Adafactor, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else []))
"""Optimizers of torch whose weight decay moves weights by ``−η·wd·w``. Others have a setting that says so, or do what
they do to gradients to it as well."""


def _predicted_rate(step: NormStep) -> Tensor:
    sgd, setting = isinstance(step.optimizer, SGD), step.setting
    rate = step.sam_rate
    if sgd and not setting["momentum"]:
        rate = rate + sam_deviation_rate(step.s, step.gamma, effective_rho(step.gamma, setting["lr"]))
    if isinstance(step.optimizer, _SHRINKING) or setting.get("decoupled_weight_decay"):
        rate = rate - 4 * setting["weight_decay"] * norm_deviation(step.s)
    if sgd and setting["momentum"]:  # which adds up what goes through the gradient, in the long run
        rate = rate * ((1 - setting["dampening"]) / (1 - setting["momentum"]))
    return rate + step.callback_rate


def step_rows(step: NormStep, after: Tensor) -> Tensor:
    """A column for each group: the quantities that are logged, then ``s̄²`` and ``Σ γ``, which the total needs.

    Args:
        step: With the gradients that the optimizer took.
        after: Squared norms of the cores after it, shape ``(G, K)``.
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
