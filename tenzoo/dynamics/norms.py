"""How the norms of the cores of one tensor change during training.

Notation, for a group of K cores ``G_1 … G_K`` with gradients ``g_k = ∂L/∂G_k``: squared norms ``s_k = ‖G_k‖²_F``,
squared gradient norms ``γ_k = ‖g_k‖²_F``, means ``s̄`` and ``γ̄`` over k, and SAM's normalizer ``u = 1/‖g‖``. Theorem and
equation names are those of Cao, Atarashi and Kashima (2025), arXiv:2508.10435.

Every function takes the K values in the last dimension, so that groups with the same K can be stacked: shapes are
``(…, K)`` in and ``(…)`` out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tenzoo.dynamics.shards import is_distributed, own_part, reduced, sum_over_parts


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The squared Frobenius norm of each tensor, in one batched call.

    Computed in float64, because squares of float32 overflow or vanish and hide the change of Q in a step; in float32 on
    devices without float64. Sparse tensors are coalesced first, so that repeated indices add up before they are
    squared. The norm of a DTensor is that of the whole tensor, summed over the processes that share it.

    Args:
        tensors: K tensors of any shapes.

    Returns:
        Shape ``(K,)``, on the device of the first tensor.

    Raises:
        ValueError: If there is no tensor.

    Example:
        >>> squared_norms([torch.full((2, 2), 1.0), torch.tensor([3.0, 4.0])])
        tensor([ 4., 25.], dtype=torch.float64)
    """
    if not tensors:
        raise ValueError("expected at least one tensor in `tensors`, got none")
    if any(map(is_distributed, tensors)):
        parts = [reduced(tensor) for tensor in tensors]
        return sum_over_parts(squared_norms([own_part(part) for part in parts]), parts)
    dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    device = dense[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    if all(tensor.device == device and tensor.dtype == dense[0].dtype for tensor in dense):
        norms = list(torch._foreach_norm(dense, 2, dtype=torch.promote_types(dense[0].dtype, wide)))
    else:
        norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, wide)).to(device) for x in dense]
    return torch.stack(norms).square()


def norm_deviation(squared_norms: Tensor) -> Tensor:
    """Norm Deviation ``Q = Σ_k (s_k − s̄)²`` (Definition 1).

    It equals ``(1/2K) Σ_{i,j} (s_i − s_j)²`` over all ordered pairs, and is 0 if and only if all norms are equal.

    Example:
        >>> norm_deviation(torch.tensor([2.0, 5.0, 10.0]).square())
        tensor(5094.)
    """
    return (squared_norms - squared_norms.mean(-1, keepdim=True)).square().sum(-1)


def norm_gradient_covariance(squared_norms: Tensor, squared_grad_norms: Tensor) -> Tensor:
    """Population covariance ``Cov = (1/K) Σ_k (s_k − s̄)(γ_k − γ̄)`` of squared norms and squared gradient norms.

    If it is positive, SAM increases the Norm Deviation, else SAM decreases it (Theorem 3).

    Example:
        >>> norm_gradient_covariance(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 1.0]))
        tensor(-2.)
    """
    centered = squared_norms - squared_norms.mean(-1, keepdim=True)
    return (centered * squared_grad_norms).mean(-1)


def inverse_grad_norm(squared_grad_norms: Tensor, grad_norm: Tensor | float | None = None) -> Tensor:
    """SAM's normalizer ``u = 1/sqrt(Σ_k γ_k)``, or ``1/grad_norm`` if given; 0 for a gradient of 0."""
    if grad_norm is None:
        norm = squared_grad_norms.sum(-1).sqrt()
    else:
        norm = torch.as_tensor(grad_norm, dtype=squared_grad_norms.dtype, device=squared_grad_norms.device)
    return torch.where(norm > 0, 1 / norm, 0.0)


def sam_deviation_rate(
    squared_norms: Tensor, squared_grad_norms: Tensor, rho: float | Tensor, *, grad_norm: Tensor | float | None = None
) -> Tensor:
    """``dQ/dt = 4ρuK·Cov`` under the flow of SAM (Theorem 3), up to O(ρ²).

    Args:
        squared_norms: ``s``, shape ``(…, K)``.
        squared_grad_norms: ``γ`` at the unperturbed point, shape ``(…, K)``.
        rho: Radius of SAM's perturbation.
        grad_norm: ``‖g‖`` over all perturbed parameters, if these are more than this group; shape ``(…)``.

    Returns:
        Shape ``(…)``. Per unit of flow time: one step at learning rate η moves Q by η times this.

    Example:
        >>> sam_deviation_rate(torch.tensor([1.0, 3.0]), torch.tensor([7.0, 9.0]), rho=0.1)
        tensor(0.2000)
    """
    u = inverse_grad_norm(squared_grad_norms, grad_norm)
    return 4 * rho * u * squared_norms.shape[-1] * norm_gradient_covariance(squared_norms, squared_grad_norms)


def exact_sam_deviation_rate(
    cores: Sequence[Tensor],
    grads: Sequence[Tensor],
    perturbed_grads: Sequence[Tensor],
    rho: float,
    *,
    grad_norm: Tensor | float | None = None,
) -> Tensor:
    """``dQ/dt = 4ρu Σ_k (s_k − s̄) ⟨g_k, g̃_k⟩`` under the flow of SAM, exact at any ρ.

    Theorem 3 is its first order: ``⟨g_k, g̃_k⟩ = γ_k + O(ρ)``.

    Args:
        cores: The K cores ``G_k``.
        grads: ``g_k`` at the cores, each of its core's shape.
        perturbed_grads: ``g̃_k`` at ``G_k + ρ·u·g_k``, each of its core's shape.
        rho: Radius of SAM's perturbation.
        grad_norm: ``‖g‖`` over all perturbed parameters, if these are more than this group; a scalar.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: If the three lists differ in length.

    Example:
        >>> a, b, u = torch.tensor(4.0), torch.tensor(3.0), 1 / 5  # L = ab, so g = (b, a) and ‖g‖ = 5
        >>> exact_sam_deviation_rate([a, b], [b, a], [b + u * a, a + u * b], rho=1.0)
        tensor(-19.6000, dtype=torch.float64)
        >>> sam_deviation_rate(torch.tensor([16.0, 9.0]), torch.tensor([9.0, 16.0]), rho=1.0)
        tensor(-19.6000)
    """
    if not len(cores) == len(grads) == len(perturbed_grads):
        raise ValueError(
            "expected as many `grads` and `perturbed_grads` as `cores`, "
            f"got {len(grads)}, {len(perturbed_grads)} and {len(cores)}"
        )
    s = squared_norms(cores)
    products = torch.stack([_inner(g, p).to(s) for g, p in zip(grads, perturbed_grads, strict=True)])
    u = inverse_grad_norm(squared_norms(grads), grad_norm)
    return 4 * rho * u * ((s - s.mean()) * products).sum()


def _inner(first: Tensor, second: Tensor) -> Tensor:
    product = (first * second).sum()
    return own_part(reduced(product))


def effective_rho(squared_grad_norms: Tensor, lr: float | Tensor, *, grad_norm: Tensor | float | None = None) -> Tensor:
    """The radius ``ρ_eff = η‖g‖/2`` at which SAM has the effect on norms that a finite step of plain SGD has.

    A step of SGD moves Q by ``2η²K·Cov + η⁴K·Var(γ)``; its first term is ``η·dQ/dt`` of Theorem 3 at this ρ.

    Args:
        squared_grad_norms: ``γ``, shape ``(…, K)``.
        lr: Learning rate η.
        grad_norm: ``‖g‖`` over all parameters, to compare with a SAM that perturbs more than this group.

    Returns:
        Shape ``(…)``.

    Example:
        >>> effective_rho(torch.tensor([9.0, 16.0]), lr=0.1)
        tensor(0.2500)
    """
    if grad_norm is None:
        return squared_grad_norms.sum(-1).sqrt() * (lr / 2)
    return torch.as_tensor(grad_norm, dtype=squared_grad_norms.dtype, device=squared_grad_norms.device) * (lr / 2)
