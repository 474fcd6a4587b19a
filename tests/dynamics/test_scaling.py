import math

import pytest
import torch

from tenzoo.dynamics import (
    bound_factors,
    deviation_aware_factors,
    norm_deviation,
    norm_gradient_covariance,
    rebalance_,
    sam_deviation_rate,
    squared_norms,
)
from tests.dynamics.problems import gradients, tucker_problem


def state(seed=0):
    cores, loss = tucker_problem(seed)
    return squared_norms(cores).detach(), squared_norms(gradients(cores, loss))


def test_factors_are_algorithm_2():
    s, gamma = state()
    expected = [
        0.01 * 0.3 / math.sqrt(sum(gamma.tolist())) * (g - sum(gamma.tolist()) / 4) / n
        for n, g in zip(s.tolist(), gamma.tolist(), strict=True)
    ]
    assert deviation_aware_factors(s, gamma, lr=0.01, alpha=0.3).tolist() == pytest.approx(expected, rel=1e-12)


def test_das_moves_q_as_sam_does():
    """ΔQ of the scaling alone is η times Theorem 3's rate at ρ = α, with a residual of second order in η."""
    s, gamma = state()
    residuals = []
    for lr in (1e-4, 1e-5):
        factors = deviation_aware_factors(s, gamma, lr=lr, alpha=0.05)
        change = norm_deviation(s * (1 + factors).square()) - norm_deviation(s)
        sam = lr * sam_deviation_rate(s, gamma, 0.05)
        residuals.append(float(abs(change - sam)))
        torch.testing.assert_close(change, sam, rtol=0.05, atol=0)
    assert math.log10(residuals[0] / residuals[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_pairwise_differences_match_sams(gauge_fixed):
    """Theorem 2: Δ(s_i − s_j) = 2ηρu(γ_i − γ_j), also where γ̄ is replaced by γ*."""
    s, gamma = state()
    factors = deviation_aware_factors(s, gamma, lr=1e-3, alpha=0.05, gauge_fixed=gauge_fixed)
    first_order = 2 * factors * s
    expected = 2 * 1e-3 * 0.05 * gamma.sum().rsqrt() * gamma
    torch.testing.assert_close(first_order - first_order[0], expected - expected[0], rtol=1e-10, atol=1e-14)


def test_what_each_form_conserves():
    s, gamma = state()
    plain = deviation_aware_factors(s, gamma, lr=0.1, alpha=0.5)
    gauge = deviation_aware_factors(s, gamma, lr=0.1, alpha=0.5, gauge_fixed=True)
    assert (plain * s).sum().abs() < 1e-15
    assert gauge.sum().abs() < 1e-15
    assert plain.sum().abs() > 1e-4
    torch.testing.assert_close(gauge.exp().prod(), torch.ones((), dtype=torch.float64), rtol=1e-14, atol=0)
    per_core = torch.tensor([0.1, 0.2, 0.0, 0.4], dtype=torch.float64)
    assert deviation_aware_factors(s, gamma, lr=per_core, alpha=0.5, gauge_fixed=True).sum().abs() < 1e-15
    assert deviation_aware_factors(s, gamma, lr=0.5, alpha=per_core, gauge_fixed=True).sum().abs() < 1e-15


def test_learning_rate_and_strength_may_differ_by_core():
    s, gamma = state()
    lr = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    single = deviation_aware_factors(s, gamma, lr=1.0, alpha=1.0)
    torch.testing.assert_close(deviation_aware_factors(s, gamma, lr=lr, alpha=0.5), single * lr * 0.5)
    torch.testing.assert_close(deviation_aware_factors(s, gamma, lr=1.0, alpha=lr), single * lr)


def test_groups_can_be_stacked():
    first, second = state(0), state(1)
    s, gamma = torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]])
    for gauge_fixed in (False, True):
        stacked = deviation_aware_factors(s, gamma, lr=0.1, alpha=0.5, gauge_fixed=gauge_fixed)
        for row, group in zip(stacked, (first, second), strict=True):
            alone = deviation_aware_factors(*group, lr=0.1, alpha=0.5, gauge_fixed=gauge_fixed)
            torch.testing.assert_close(row, alone, rtol=1e-13, atol=0)
    norms = torch.tensor([2.0, 4.0], dtype=torch.float64) * gamma.sum(-1).sqrt()
    wide = deviation_aware_factors(s, gamma, lr=0.1, alpha=0.5, grad_norm=norms)
    own = deviation_aware_factors(s, gamma, lr=0.1, alpha=0.5)
    torch.testing.assert_close(wide, own / torch.tensor([[2.0], [4.0]], dtype=torch.float64))


@pytest.mark.parametrize("gauge_fixed", [False, True])
@pytest.mark.parametrize("grad_norm", [None, 2.0, 0.0])
def test_factors_are_always_finite(gauge_fixed, grad_norm):
    def factors(s, gamma):
        s, gamma = torch.tensor(s), torch.tensor(gamma)
        result = deviation_aware_factors(s, gamma, lr=0.1, alpha=1.0, gauge_fixed=gauge_fixed, grad_norm=grad_norm)
        assert result.isfinite().all()
        return result

    silent = grad_norm == 0.0
    assert factors([1.0, 2.0], [0.0, 0.0]).tolist() == [0, 0]
    assert factors([0.0, 0.0], [1.0, 2.0]).tolist() == [0, 0]
    assert factors([1.0, 2.0], [math.nan, 1.0]).tolist() == [0, 0]
    assert factors([1.0, 2.0], [math.inf, 1.0]).tolist() == [0, 0]
    assert factors([1.0, 2.0], [1e-42, 1e-45]).abs().max() < 1
    factors([1e-45, 1.0], [1.0, 2.0])
    dead = factors([0.0, 1.0, 4.0], [5.0, 1.0, 2.0])
    assert dead[0] == 0
    assert bool((dead[1:] != 0).all()) != silent
    if gauge_fixed:  # the dead core is left out: the others balance among themselves
        assert dead.sum().abs() < 1e-7


def test_one_common_factor_bounds_a_group():
    factors = torch.tensor([[9.0, -3.0, 0.3], [0.01, 0.02, -0.1]], dtype=torch.float64)
    bounded = bound_factors(factors, 0.1)
    torch.testing.assert_close(bounded[0], factors[0] * (0.1 / 9))
    assert bounded[1].equal(factors[1])
    assert bound_factors(torch.zeros(3), 0.1).equal(torch.zeros(3))


def test_rebalancing_equalizes_norms_and_keeps_the_tensor():
    cores, _ = tucker_problem()
    cores = [core.detach() for core in cores]
    before = torch.einsum("abc,ia,jb,kc->ijk", *cores)
    rebalance_(cores)
    s = squared_norms(cores)
    torch.testing.assert_close(s, s.mean().expand(4), rtol=1e-13, atol=0)
    assert norm_deviation(s) < 1e-20
    torch.testing.assert_close(torch.einsum("abc,ia,jb,kc->ijk", *cores), before, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_rebalancing_refuses_cores_that_no_factor_can_mend(value):
    cores = [torch.ones(3), torch.full((2,), value)]
    with pytest.raises(ValueError, match="finite, non-zero cores in `cores`, got norms"):
        rebalance_(cores)
    assert cores[0].equal(torch.ones(3))


@pytest.mark.slow
def test_where_the_large_core_has_the_large_gradient_sam_and_das_increase_q():
    """The positive-covariance recipe of T = AGB under noisy targets: Q .172 → SGD 3.3, SAM 75, DAS 81."""
    lr, strength, steps = 1e-3, 0.05, 40_000

    def run(method):
        generator = torch.Generator().manual_seed(0)

        def orthonormal(n, m):
            return torch.linalg.qr(torch.randn(n, m, dtype=torch.float64, generator=generator))[0]

        cores = [orthonormal(60, 3) * 1.05, orthonormal(3, 3) / 1.05, orthonormal(6, 3).T.contiguous()]
        target = cores[0] @ cores[1] @ cores[2]
        start = norm_deviation(squared_norms(cores)).item()

        def grads_at(a, g, b, noisy):
            residual = 2 * (a @ g @ b - noisy)
            return [residual @ (g @ b).T, a.T @ residual @ b.T, (a @ g).T @ residual]

        for _ in range(steps):
            noise = torch.randn(60, 6, dtype=torch.float64, generator=generator)
            noisy = target + 0.3 * noise
            grads = grads_at(*cores, noisy)
            gamma = squared_norms(grads)
            if method == "sam":
                u = gamma.sum().rsqrt()
                grads = grads_at(*(core + strength * u * grad for core, grad in zip(cores, grads, strict=True)), noisy)
            if method == "das":
                factors = deviation_aware_factors(squared_norms(cores), gamma, lr=lr, alpha=strength)
                cores = [core * (1 + factor) for core, factor in zip(cores, factors, strict=True)]
            cores = [core - lr * grad for core, grad in zip(cores, grads, strict=True)]
        return start, norm_deviation(squared_norms(cores)).item()

    start, sgd = run("sgd")
    _, sam = run("sam")
    _, das = run("das")
    assert start == pytest.approx(0.172, abs=1e-3)
    assert sgd == pytest.approx(3.3, rel=0.3)
    assert sam == pytest.approx(75, rel=0.1)
    assert das == pytest.approx(81, rel=0.1)


def test_the_positive_covariance_recipe_starts_with_a_positive_covariance():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64, generator=generator))[0] for n in (60, 6))
    cores = [a * 1.05, torch.eye(3, dtype=torch.float64) / 1.05, b.T]
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(200):
        residual = -0.6 * torch.randn(60, 6, dtype=torch.float64, generator=generator)
        grads = [
            residual @ (cores[1] @ cores[2]).T,
            cores[0].T @ residual @ cores[2].T,
            (cores[0] @ cores[1]).T @ residual,
        ]
        total += norm_gradient_covariance(squared_norms(cores), squared_norms(grads))
    assert total > 0
