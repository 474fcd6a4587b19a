"""Scaling the cores of a tensor: Deviation-Aware Scaling, its bound, and one-shot balancing.

Notation as in :mod:`tenzoo.dynamics.norms`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tenzoo.dynamics.norms import squared_norms as _squared_norms
from tenzoo.dynamics.shards import own_part


def deviation_aware_factors(
    squared_norms: Tensor,
    squared_grad_norms: Tensor,
    *,
    lr: float | Tensor,
    alpha: float | Tensor,
    gauge_fixed: bool = False,
    grad_norm: Tensor | float | None = None,
) -> Tensor:
    """DAS's relative change of each core, ``λ_k = η α u (γ_k − γ̄) / s_k`` (Algorithm 2).

    Scaling ``G_k`` by ``1 + λ_k`` moves Q, to first order, as a step of SAM with ``ρ = α`` does (Theorem 3):
    ``Σ_k λ_k s_k = 0`` and ``2 Σ_k (s_k − s̄)·2 λ_k s_k = 4ηαuK·Cov``.

    The *gauge-fixed* form replaces γ̄ by ``γ* = (Σ w_k γ_k)/(Σ w_k)`` with ``w_k = η_k α_k/s_k``. Differences of squared
    norms move alike, but now ``Σ_k λ_k = 0``: scaling by ``exp(λ_k)`` does not change the tensor.

    The result is always finite. A core with ``s_k = 0`` gets ``λ_k = 0`` and does not count in γ*. A group whose
    gradients are all zero, or not all finite, gets zeros.

    Args:
        squared_norms: ``s``, shape ``(…, K)``.
        squared_grad_norms: ``γ`` before the step, shape ``(…, K)``.
        lr: Learning rate η, one number or one per core, shape ``(…, K)``.
        alpha: Strength α, comparable with SAM's ρ; one number, or one per core.
        gauge_fixed: Whether to make ``Σ_k λ_k = 0``.
        grad_norm: ``‖g‖`` over all layers, which replaces that of the group; shape ``(…)``.

    Returns:
        λ, shape ``(…, K)``; the linear factor in both forms.

    Example:
        >>> s, gamma = torch.tensor([1.0, 4.0]), torch.tensor([7.0, 9.0])
        >>> factors = deviation_aware_factors(s, gamma, lr=0.1, alpha=0.4)
        >>> factors, (factors * s).sum()
        (tensor([-0.0100,  0.0025]), tensor(0.))
        >>> deviation_aware_factors(s, gamma, lr=0.1, alpha=0.4, gauge_fixed=True)
        tensor([-0.0040,  0.0040])
    """
    strength = lr * alpha
    total = squared_grad_norms.sum(-1, keepdim=True)
    if gauge_fixed:
        weight = (strength / squared_norms).nan_to_num(0.0, 0.0, 0.0)  # the weight of a zero core is 0
        center = (weight * squared_grad_norms).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
    else:
        center = total * (1 / squared_norms.shape[-1])
    if grad_norm is None:
        norm = total.sqrt()
    else:
        norm = torch.as_tensor(grad_norm, dtype=total.dtype, device=total.device).unsqueeze(-1)
    factors = (squared_grad_norms - center) / (squared_norms * norm) * strength
    # Where nothing is to be scaled, the factor is infinite or NaN. Masks would double the cost.
    return torch.nan_to_num(factors, 0.0, 0.0, 0.0)


def bound_factors(factors: Tensor, max_scale: float) -> Tensor:
    """Shrink the λ of each group by one common factor, so that ``max_k |λ_k| ≤ max_scale``.

    A common factor preserves ``Σ λ_k s_k = 0``, or the gauge-fixed ``Σ λ_k = 0``. Clipping each λ would not.

    Args:
        factors: λ, shape ``(…, K)``.
        max_scale: Largest relative change of a core in one step, positive.

    Returns:
        λ, shape ``(…, K)``.

    Example:
        >>> bound_factors(torch.tensor([[-0.2, 0.1], [0.05, -0.05]]), max_scale=0.1)
        tensor([[-0.1000,  0.0500],
                [ 0.0500, -0.0500]])
    """
    groups = factors.reshape(-1, factors.shape[-1])
    return groups.renorm(math.inf, 0, max_scale).view_as(factors)


@torch.no_grad()
def rebalance_(cores: Sequence[Tensor]) -> None:
    """Give all cores the same norm, in place, without a change of their tensor.

    Each core is multiplied by ``(∏_j ‖G_j‖)^{1/K} / ‖G_k‖``. The product of these factors is 1. This is the control for
    claims about DAS.

    Raises:
        ValueError: If a core is zero or not finite, because no factors can make the norms equal then.

    Example:
        >>> a, b = torch.tensor([3.0, 4.0]), torch.tensor([20.0])
        >>> rebalance_([a, b])
        >>> a, b
        (tensor([6., 8.]), tensor([10.]))
    """
    log_norms = _squared_norms(cores).double().log() / 2
    if not bool(log_norms.isfinite().all()):
        norms = [float(norm) for norm in log_norms.exp()]
        raise ValueError(f"expected finite, non-zero cores in `cores`, got norms {norms}; train without rebalancing")
    for core, factor in zip(cores, (log_norms.mean() - log_norms).exp(), strict=True):
        part = own_part(core)
        part.mul_(factor.to(part))
