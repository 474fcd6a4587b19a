"""Alternating least squares: how far they come, and in how many sweeps."""

import pytest
import torch

from tenzoo.factorizations import CP, TensorRing, als, cp, tensor_ring
from tenzoo.factorizations.decomposition import tensorly_on_torch


def weight(shape=(24, 9, 20)):
    """A tensor whose singular values decay, as those of trained weights do."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, dtype=torch.float64, generator=generator)
    for mode, size in enumerate(shape):
        scale = torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
        turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
        tensor = torch.tensordot(tensor, scale[:, None] * turn, dims=([mode], [0])).movedim(-1, mode)
    return tensor / tensor.norm()


def plain_sweeps(tensor, cores, number, einsum):
    """Alternating least squares in the plainest way: each core from the pseudo-inverse of what the others make."""
    cores = list(cores)
    for _ in range(number):
        for k in range(len(cores)):
            others = [core for m, core in enumerate(cores) if m != k]
            design = torch.func.jacrev(lambda x, k=k, others=others: einsum([*others[:k], x, *others[k:]]))(cores[k])
            design = design.reshape(tensor.numel(), -1)
            cores[k] = torch.linalg.lstsq(design, tensor.flatten()).solution.reshape(cores[k].shape)
    return cores, float((einsum(cores) - tensor).norm() / tensor.norm())


def cases(tensor):
    with tensorly_on_torch():
        ring = tensor_ring._start(tensor, (3, 3, 3))
    factors = [factor.double() for factor in cp._noisy_start(tensor, 6)]
    return {
        "cp": (als.fit_cp, factors, lambda cores: torch.einsum("ir,jr,kr->ijk", *cores)),
        "tr": (als.fit_ring, ring, lambda cores: torch.einsum("aib,bjc,cka->ijk", *cores)),
    }


@pytest.mark.parametrize("shape", [(5, 4, 6), (6, 4, 5), (4, 6, 5)])
@pytest.mark.parametrize("name", ["cp", "tr"])
def test_one_sweep_is_that_of_plain_least_squares(name, shape, monkeypatch):
    monkeypatch.setattr(als, "_RIDGE", 0.0)
    tensor = weight(shape)
    fit, start, einsum = cases(tensor)[name]
    found, error = fit(tensor, start, sweeps=1)
    assert error == pytest.approx(float((einsum(found) - tensor).norm()), rel=1e-6)
    # The longest mode comes last, as the mode before the first of a ring that is turned, and after all others of a CP.
    last = max(range(3), key=lambda k: shape[k])
    order = [*(k for k in range(3) if k != last), last] if name == "cp" else [(last + 1 + k) % 3 for k in range(3)]
    turned = tensor.permute(order).contiguous()
    _, expected = plain_sweeps(turned, [start[k] for k in order], 1, einsum)
    assert error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["cp", "tr"])
def test_carrying_on_takes_less_than_half_of_the_sweeps(name):
    tensor = weight((8, 5, 7))
    fit, start, einsum = cases(tensor)[name]
    _, plain = plain_sweeps(tensor, start, 50, einsum)
    assert fit(tensor, start, sweeps=25)[1] < plain


@pytest.mark.parametrize(("kind", "rank"), [(CP, 8), (CP, 30), (TensorRing, 3), (TensorRing, 5)])
def test_terms_that_cancel_each_other_stay_small_at_the_same_error(kind, rank, monkeypatch):
    """Core norms of the tensor's own size: a step of training moves the tensor by the product of all but one."""
    tensor, found = weight(), []
    for ridge in (als._RIDGE, 0.0):
        monkeypatch.setattr(als, "_RIDGE", ridge)
        made = kind.decompose(tensor, rank)
        with torch.no_grad():
            rebuilt = made.reconstruct()
        norms = torch.stack([core.detach().square().sum() for core in made.cores])
        found.append((float(torch.dist(rebuilt, tensor)), float(norms.prod() / rebuilt.square().sum())))
    (error, size), (plain_error, plain_size) = found
    assert error < 1.025 * plain_error
    assert size < 0.1 * plain_size


@pytest.mark.parametrize("kind", [CP, TensorRing])
def test_the_quick_error_is_near_that_of_the_decomposition(kind):
    tensor = weight()
    for fraction in (0.1, 0.3, 0.6):
        rank = kind.clipped_rank(tuple(tensor.shape), fraction)
        error = float(torch.dist(kind.decompose(tensor, rank).reconstruct().detach(), tensor))
        assert error <= kind.quick_error(tensor, rank) <= 1.1 * error + 0.03
