import pytest
import torch
from torch import nn

from tenzoo.dynamics import SharpnessWindow, sharpness_perturbation, squared_norms
from tests.dynamics.problems import tucker_problem


@pytest.fixture
def cores():
    cores, loss = tucker_problem()
    loss(cores).backward()
    return cores


def test_sam_moves_by_rho_along_the_gradient(cores):
    before = [core.detach().clone() for core in cores]
    with sharpness_perturbation(cores, rho=0.3) as state:
        moves = [core.detach() - old for core, old in zip(cores, before, strict=True)]
        norm = torch.sqrt(sum(core.grad.square().sum() for core in cores))
        for move, core in zip(moves, cores, strict=True):
            torch.testing.assert_close(move, 0.3 * core.grad / norm, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(squared_norms(moves).sum().sqrt().item(), 0.3, rtol=1e-9, atol=0)
    torch.testing.assert_close(state.grad_norm, norm)
    torch.testing.assert_close(state.squared_grad_norms_of(cores), squared_norms([core.grad for core in cores]))
    assert state.squared_grad_norms_of([nn.Parameter(torch.ones(1))]) is None


def test_asam_moves_relative_to_the_weights(cores):
    before = [core.detach().clone() for core in cores]
    with sharpness_perturbation(cores, rho=0.3, adaptive=True):
        scaled = [old.abs() * core.grad for old, core in zip(before, cores, strict=True)]
        norm = squared_norms(scaled).sum().sqrt()
        for core, old, direction in zip(cores, before, scaled, strict=True):
            torch.testing.assert_close(core.detach() - old, 0.3 * old.abs() * direction / norm)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("raises", [False, True])
def test_the_weights_come_back_bit_for_bit(adaptive, dtype, raises):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(50, 7).to(dtype)), nn.Parameter(torch.randn(3).to(dtype))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    before = [weight.detach().clone() for weight in weights]
    grads = [weight.grad.clone() for weight in weights]
    try:
        with sharpness_perturbation(weights, rho=7.3, adaptive=adaptive):
            assert not any(weight.equal(old) for weight, old in zip(weights, before, strict=True))
            if raises:
                raise KeyError("from the body")
    except KeyError:
        assert raises
    assert all(weight.equal(old) for weight, old in zip(weights, before, strict=True))
    assert all(weight.grad.equal(grad) for weight, grad in zip(weights, grads, strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
def test_sparse_gradients_move_their_rows_only(adaptive):
    torch.manual_seed(0)
    table, other = nn.Parameter(torch.randn(6, 2, dtype=torch.float64)), nn.Parameter(torch.randn(3).double())
    dense = [nn.Parameter(table.detach().clone()), nn.Parameter(other.detach().clone())]
    values = torch.randn(3, 2, dtype=torch.float64)
    table.grad = torch.sparse_coo_tensor(
        torch.tensor([[4, 1, 4]]), values, (6, 2), check_invariants=True
    )  # row 4 twice: not coalesced
    dense[0].grad = table.grad.to_dense()
    other.grad = dense[1].grad = torch.randn(3).double()
    before = table.detach().clone()
    with (
        sharpness_perturbation([table, other], rho=0.5, adaptive=adaptive) as state,
        sharpness_perturbation(dense, rho=0.5, adaptive=adaptive) as expected,
    ):
        torch.testing.assert_close(table, dense[0])
        torch.testing.assert_close(other, dense[1])
        assert (table != before).any(1).tolist() == [False, True, False, False, True, False]
        torch.testing.assert_close(state.grad_norm, expected.grad_norm)
    assert table.equal(before)


def test_only_a_part_may_be_moved(cores):
    before = [core.detach().clone() for core in cores]
    with sharpness_perturbation(cores, rho=0.3, perturbed=cores[:2]) as state:
        assert [core.equal(old) for core, old in zip(cores, before, strict=True)] == [False, False, True, True]
        moved = squared_norms([core.detach() - old for core, old in zip(cores, before, strict=True)])
        assert moved.sum().sqrt().item() == pytest.approx(0.3)
    torch.testing.assert_close(state.grad_norm, squared_norms([core.grad for core in cores[:2]]).sum().sqrt())
    assert len(state.squared_grad_norms_of(cores)) == 4


def test_a_zero_gradient_and_a_zero_radius_move_nothing(cores):
    before = [core.detach().clone() for core in cores]
    with sharpness_perturbation(cores, rho=0.0):
        assert all(core.equal(old) for core, old in zip(cores, before, strict=True))
    for core in cores:
        core.grad.zero_()
    with sharpness_perturbation(cores, rho=1.0):
        assert all(core.equal(old) for core, old in zip(cores, before, strict=True))


def test_what_cannot_be_perturbed(cores):
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number >= 0 in `rho`"), sharpness_perturbation(cores, rho=rho):
            pass
    for core in cores:
        core.grad = None
    with pytest.raises(ValueError, match="call backward"), sharpness_perturbation(cores, rho=0.1):
        pass
    cores[0].grad = torch.ones_like(cores[0])
    before = [core.detach().clone() for core in cores]
    with sharpness_perturbation(cores, rho=0.1):
        assert [core.equal(old) for core, old in zip(cores, before, strict=True)] == [False, True, True, True]


@pytest.mark.parametrize("adaptive", [False, True])
def test_parameters_that_share_memory_come_back(adaptive):
    first = nn.Parameter(torch.tensor([3.0, 4.0]))
    second, rows = nn.Parameter(first.data), nn.Parameter(first.data[1:])
    first.grad, second.grad, rows.grad = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]), torch.tensor([5.0])
    with sharpness_perturbation([first, second, rows], rho=1.0, adaptive=adaptive):
        assert first[0] > 3
    assert first.tolist() == [3, 4]


def test_asam_of_complex_weights_is_that_of_their_sizes():
    weight = nn.Parameter(torch.tensor([1j, 2j - 1], dtype=torch.complex128))

    def loss():
        return weight.abs().square().sum()

    loss().backward()
    before, size = weight.detach().clone(), weight.detach().abs()
    with sharpness_perturbation([weight], rho=0.1, adaptive=True):
        moved = weight.detach() - before
        assert loss() > 6
    expected = size.square() * weight.grad
    torch.testing.assert_close(moved, 0.1 * expected / (size * weight.grad).abs().square().sum().sqrt())


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_gradients_whose_squares_leave_float32_move_the_weights(adaptive, scale):
    cores, loss = tucker_problem()
    cores = [nn.Parameter(core.detach().float()) for core in cores]
    (loss(cores) * scale).backward()
    before = [core.detach().clone() for core in cores]
    with sharpness_perturbation(cores, rho=0.3, adaptive=adaptive):
        moves = [core.detach() - old for core, old in zip(cores, before, strict=True)]
    weights = [old.double().abs() if adaptive else torch.ones_like(old).double() for old in before]
    scaled = [weight * core.grad.double() for weight, core in zip(weights, cores, strict=True)]
    norm = squared_norms(scaled).sum().sqrt()
    for move, weight, direction in zip(moves, weights, scaled, strict=True):
        torch.testing.assert_close(move.double(), 0.3 * weight * direction / norm, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_of_a_window_the_gradient_is_the_mean_and_each_batch_steers_by_its_own(sparse):
    torch.manual_seed(0)
    table = nn.Embedding(6, 3, sparse=sparse).double()
    other, late = (nn.Parameter(torch.randn(4).double()) for _ in range(2))
    parameters, window, seen = [table.weight, other, late], SharpnessWindow(), []
    for number, rows in enumerate(([0, 1, 1], [1, 5], [2])):
        for parameter in parameters:
            parameter.grad = None
        loss = table(torch.tensor(rows)).exp().sum() + other.exp().sum() * number
        (loss if number == 0 else loss - late.exp().sum()).backward()
        seen.append([torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone() for p in parameters])
        with sharpness_perturbation(parameters, rho=0.1, perturbed=[table.weight, late]) as state:
            mean = window.add(state)
    sums = [sum(gradients) / 3 for gradients in zip(*seen, strict=True)]
    torch.testing.assert_close(mean.squared_grad_norms_of(parameters), squared_norms(sums))
    torch.testing.assert_close(mean.grad_norm, squared_norms([sums[0], sums[2]]).sum().sqrt())
    steering = [squared_norms(each) / squared_norms([each[0], each[2]]).sum().sqrt() for each in seen]
    torch.testing.assert_close(mean.steering_of(parameters), sum(steering) / 3)
