import math
from itertools import pairwise

import pytest
import torch

from tenzoo.dynamics import (
    effective_rho,
    exact_sam_deviation_rate,
    norm_deviation,
    norm_gradient_covariance,
    sam_deviation_rate,
    squared_norms,
)
from tests.dynamics.problems import gradients, moved, tucker_problem


def perturbed_gradients(cores, loss, rho):
    grads = gradients(cores, loss)
    u = squared_norms(grads).sum().rsqrt()
    return grads, gradients(moved(cores, grads, rho * u), loss)


def test_squared_norms_of_dense_sparse_and_half_tensors():
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), values, check_invariants=True)
    assert squared_norms([sparse, torch.full((4,), 0.5)]).tolist() == [25.0, 1.0]
    half = torch.full((4096,), 10.0, dtype=torch.float16)  # 409600 is beyond float16
    assert squared_norms([half]).dtype == torch.float64
    assert squared_norms([torch.tensor([1e20]), torch.tensor([1e-25])]).tolist() == pytest.approx([1e40, 1e-50])
    assert squared_norms([half]).item() == pytest.approx(409600)
    mixed = squared_norms([half, torch.ones(3, dtype=torch.float64)])
    assert mixed.dtype == torch.float64
    assert mixed.tolist() == pytest.approx([409600, 3])
    with pytest.raises(ValueError, match="at least one tensor in `tensors`"):
        squared_norms([])


def test_norm_deviation_is_the_mean_over_ordered_pairs():
    s = torch.rand(3, 5, dtype=torch.float64)
    pairs = (s[:, :, None] - s[:, None, :]).square().sum((1, 2)) / (2 * 5)
    torch.testing.assert_close(norm_deviation(s), pairs)


def test_covariance_is_the_population_covariance():
    s, gamma = torch.rand(2, 6, dtype=torch.float64)
    expected = torch.cov(torch.stack([s, gamma]), correction=0)[0, 1]
    torch.testing.assert_close(norm_gradient_covariance(s, gamma), expected)


def test_gradient_flow_keeps_the_deviation():
    """Theorem 1 and Corollary 1: ⟨G_k, g_k⟩ is the same for every core, so dQ/dt = 0."""
    cores, loss = tucker_problem()
    inner = torch.stack([(core * grad).sum() for core, grad in zip(cores, gradients(cores, loss), strict=True)])
    torch.testing.assert_close(inner.detach(), inner[0].detach().expand(4), rtol=1e-12, atol=1e-12)


def test_exact_rate_is_the_derivative_of_q_along_sams_flow():
    cores, loss = tucker_problem()
    for rho in (0.01, 0.1, 1.0):
        grads, perturbed = perturbed_gradients(cores, loss, rho)
        s = squared_norms(cores)
        ds = torch.stack([-2 * (core * grad).sum() for core, grad in zip(cores, perturbed, strict=True)])
        dq = 2 * ((s - s.mean()) * ds).sum()  # d/dt of Σ (s − s̄)² with dG/dt = −g̃
        rate = exact_sam_deviation_rate(cores, grads, perturbed, rho)
        assert rate.dtype == torch.float64
        assert abs(rate - dq) <= 1e-11 * abs(dq)


def test_theorem_3_has_a_residual_of_second_order_in_rho():
    cores, loss = tucker_problem()
    cores = [core.detach() for core in cores]
    residuals = []
    for rho in (1e-2, 1e-3, 1e-4):
        grads, perturbed = perturbed_gradients(cores, loss, rho)
        exact = exact_sam_deviation_rate(cores, grads, perturbed, rho)
        first_order = sam_deviation_rate(squared_norms(cores), squared_norms(grads), rho)
        assert abs(exact - first_order) < 10 * rho * abs(first_order)
        residuals.append(float(abs(exact - first_order)))
    orders = [math.log10(a / b) for a, b in pairwise(residuals)]
    assert orders == pytest.approx([2, 2], abs=0.1)


def test_theorem_2_gives_the_difference_of_two_cores():
    cores, loss = tucker_problem()
    rho = 1e-5
    grads, perturbed = perturbed_gradients(cores, loss, rho)
    ds = torch.stack([-2 * (core * grad).sum() for core, grad in zip(cores, perturbed, strict=True)])
    gamma = squared_norms(grads)
    u = gamma.sum().rsqrt()
    torch.testing.assert_close((ds[0] - ds[1]).detach(), 2 * rho * u * (gamma[0] - gamma[1]), rtol=1e-3, atol=0)


def test_a_wider_gradient_norm_replaces_the_groups_own():
    s, gamma = torch.rand(2, 4, dtype=torch.float64)
    own = gamma.sum().sqrt()
    torch.testing.assert_close(
        sam_deviation_rate(s, gamma, 0.1, grad_norm=3 * own), sam_deviation_rate(s, gamma, 0.1) / 3
    )
    torch.testing.assert_close(effective_rho(gamma, 0.1, grad_norm=3 * own), 3 * effective_rho(gamma, 0.1))
    cores, loss = tucker_problem()
    grads, perturbed = perturbed_gradients(cores, loss, 0.1)
    norm = squared_norms(grads).sum().sqrt()
    torch.testing.assert_close(
        exact_sam_deviation_rate(cores, grads, perturbed, 0.1, grad_norm=2 * norm),
        exact_sam_deviation_rate(cores, grads, perturbed, 0.1) / 2,
    )


def test_zero_gradients_have_rate_zero():
    s, zero = torch.rand(3), torch.zeros(3)
    assert sam_deviation_rate(s, zero, 0.1) == 0
    assert effective_rho(zero, 0.1) == 0
    with pytest.raises(ValueError, match="as many `grads`"):
        exact_sam_deviation_rate([s], [zero, zero], [zero], 0.1)


@pytest.mark.parametrize("lr", [1e-4, 1e-3, 1e-2])
def test_sgd_moves_q_exactly_by_its_effective_rho(lr):
    """ΔQ = 2η²K·Cov + η⁴K·Var(γ) for one step of plain SGD at any step size."""
    cores, loss = tucker_problem()
    grads = gradients(cores, loss)
    s, gamma = squared_norms(cores).detach(), squared_norms(grads)
    change = norm_deviation(squared_norms(moved(cores, grads, -lr))) - norm_deviation(s)
    covariance = norm_gradient_covariance(s, gamma)
    expected = 2 * lr**2 * 4 * covariance + lr**4 * 4 * gamma.var(correction=0)
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-13)
    as_sam = lr * sam_deviation_rate(s, gamma, float(effective_rho(gamma, lr)))
    torch.testing.assert_close(as_sam, 2 * lr**2 * 4 * covariance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_shrinks_q_at_rate_four(optimizer):
    """dQ/dt = −4·wd·Q where decay acts alone: L2 in SGD, decoupled in AdamW, without a loss."""
    wd, lr = 0.1, 1e-5
    cores, _ = tucker_problem()
    q = norm_deviation(squared_norms(cores)).item()
    for core in cores:
        core.grad = torch.zeros_like(core)
    optimizer(cores, lr=lr, weight_decay=wd).step()
    rate = (norm_deviation(squared_norms(cores)).item() - q) / lr
    assert rate == pytest.approx(-4 * wd * q, rel=1e-5)


def test_momentum_balances_differences_exactly():
    """Δ(J_i − J_j) = δw_{t+1} + (2β/(1−β)) δw_t with J = s + (2β/(1−β)) a, over 500 steps with noisy targets."""
    beta, lr = 0.9, 1e-3
    generator = torch.Generator().manual_seed(3)
    cores, _ = tucker_problem(seed=2, scale=0.7)
    weights = [core.detach().clone() for core in cores]
    velocity = [torch.zeros_like(weight) for weight in weights]
    factor = 2 * beta / (1 - beta)
    invariant = previous = None
    for _ in range(500):
        noise = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator)

        def loss(cores, noise=noise):
            return (torch.einsum("abc,ia,jb,kc->ijk", *cores) - noise).square().sum()

        grads = gradients(weights, loss)
        velocity = [beta * v - lr * g for v, g in zip(velocity, grads, strict=True)]
        a = torch.stack([(weight * v).sum() for weight, v in zip(weights, velocity, strict=True)])
        weights = [weight + v for weight, v in zip(weights, velocity, strict=True)]
        w = squared_norms(velocity)
        j = squared_norms(weights) + factor * a
        if invariant is not None:
            change = (j - j[0]) - (invariant - invariant[0])
            expected = (w - w[0]) + factor * (previous - previous[0])
            torch.testing.assert_close(change, expected, rtol=0, atol=1e-11)
        invariant, previous = j, w
    assert abs(j - j[0]).max() > 1e-3  # the cores did part: the identity was not tried on zeros
