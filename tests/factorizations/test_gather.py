import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tenzoo.factorizations import CP, FACTORIZATIONS, Factorization
from tenzoo.factorizations.gather import gather_rows, gather_slices
from tests.factorizations.formats import NAMES, full_index

SHAPE = (7, 4, 3, 5)


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    """Torch checks the sparse tensors made here by itself, and does not warn that it does not."""
    with torch.sparse.check_sparse_tensor_invariants():
        yield


def make(name: str) -> tuple[Factorization, torch.Tensor]:
    torch.manual_seed(0)
    factorization = FACTORIZATIONS[name](SHAPE, 3, dtype=torch.float64)
    return factorization, torch.stack([torch.randint(size, (6,)) for size in SHAPE], dim=1)


def loss(factorization: Factorization, index: torch.Tensor, sparse_grad: bool) -> torch.Tensor:
    return (factorization.entries(index, sparse_grad=sparse_grad) - 0.3).square().sum()


@pytest.mark.parametrize("repeats", [1, 20])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients_equal_the_dense_ones(name, repeats):
    factorization, index = make(name)
    index = index.repeat(repeats, 1)
    dense = torch.autograd.grad(loss(factorization, index, False), list(factorization.cores))
    loss(factorization, index, True).backward()
    for core, legs, expected in zip(factorization.cores, factorization.legs_of_cores, dense, strict=True):
        assert core.grad.is_sparse
        assert core.grad.is_coalesced()
        assert core.grad.shape == core.shape
        sparse = [dim for dim, leg in enumerate(legs) if isinstance(leg, int)] or [core.ndim - 2]
        assert core.grad.sparse_dim() == max(sparse) + 1
        torch.testing.assert_close(core.grad.to_dense(), expected)
        flags = torch.sparse_coo_tensor(core.grad.indices(), core.grad.values(), core.shape).coalesce()
        assert torch.equal(flags.indices(), core.grad.indices())  # sorted and without repeats, as it claims
        core.grad = None


@pytest.mark.parametrize("name", NAMES)
def test_gradients_accumulate(name):
    factorization, index = make(name)
    expected = torch.autograd.grad(loss(factorization, index, False), list(factorization.cores))
    for part in (index[:2], index[2:]):
        loss(factorization, part, True).backward()
    for core, gradient in zip(factorization.cores, expected, strict=True):
        torch.testing.assert_close(core.grad.to_dense(), gradient)


@pytest.mark.parametrize("name", NAMES)
def test_untouched_rows_hold_no_gradient(name):
    factorization, index = make(name)
    loss(factorization, index[:1], True).backward()
    for core, legs in zip(factorization.cores, factorization.legs_of_cores, strict=True):
        if modes := [dim for dim, leg in enumerate(legs) if isinstance(leg, int)]:
            assert core.grad.values().numel() == core.numel() // math.prod(core.shape[dim] for dim in modes)


def step(
    factorization: Factorization, index: torch.Tensor, optimizer: torch.optim.Optimizer, sparse_grad: bool
) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        loss(factorization, index, sparse_grad).backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_sgd_takes_the_same_steps(name):
    dense, index = make(name)
    sparse = copy.deepcopy(dense)
    step(dense, index, torch.optim.SGD(dense.parameters(), lr=0.01), False)
    step(sparse, index, torch.optim.SGD(sparse.parameters(), lr=0.01), True)
    for a, b in zip(dense.cores, sparse.cores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_adam_is_adam_where_all_rows_are_touched(name):
    dense, _ = make(name)
    index, sparse = full_index(SHAPE), copy.deepcopy(dense)
    step(dense, index, torch.optim.Adam(dense.parameters(), lr=0.01, eps=1e-30), False)
    step(sparse, index, torch.optim.SparseAdam(list(sparse.parameters()), lr=0.01, eps=1e-30), True)
    for a, b in zip(dense.cores, sparse.cores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_step_does_not_grow_with_the_mode():
    factorization = CP((20_000_000, 3), 1)
    index = torch.tensor([[19_999_999, 1], [5, 2]])
    with torch.profiler.profile(profile_memory=True) as profile:
        factorization.entries(index, sparse_grad=True).sum().backward()
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 10_000
    assert factorization.cores[0].grad.indices().tolist() == [[5, 19_999_999]]


def test_rows_and_slices_of_plain_tensors():
    factor, core = torch.randn(5, 2), torch.randn(2, 3, 4, 5)
    index, other = torch.tensor([4, 0, 4]), torch.tensor([1, 2, 0])
    assert torch.equal(gather_rows(factor, index, sparse_grad=False), factor[index])
    slices = gather_slices(core, [other, index % 4], sparse_grad=False)
    assert torch.equal(slices, core[:, other, index % 4].transpose(0, 1))


def test_an_index_beyond_its_mode_is_not_folded_into_the_next():
    core = nn.Parameter(torch.randn(2, 3, 4, 5))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|DATA bounds)"):
        gather_slices(core, [torch.tensor([0]), torch.tensor([4])], sparse_grad=True)
