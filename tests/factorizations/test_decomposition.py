import math
import os
import pathlib
import subprocess
import sys
import threading
import warnings

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenzoo.factorizations import FACTORIZATIONS, BlockTT
from tenzoo.factorizations.decomposition import (
    MAX_DECOMPOSITION_BYTES,
    check_memory,
    multiply_modes,
    relative_norm,
    tensorly_on_torch,
)
from tests.factorizations.formats import NAMES, small_cases


def relative_error(factorization, tensor):
    with torch.no_grad():
        return float((factorization.reconstruct() - tensor).norm() / tensor.norm())


@settings(deadline=None, max_examples=60)
@given(case=small_cases(), seed=st.integers(0, 100))
def test_a_rank_above_every_bound_is_lossless(case, seed):
    cls, shape, _ = case
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorization = cls.decompose(tensor, 10_000)
    assert factorization.reconstruct().shape == shape
    assert relative_error(factorization, tensor) < 1e-10


@settings(deadline=None, max_examples=40)
@given(case=small_cases(), seed=st.integers(0, 100))
def test_a_truncated_rank_is_at_least_as_good_as_zero(case, seed):
    cls, shape, rank = case
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorization = cls.decompose(tensor, rank)
    assert relative_error(factorization, tensor) <= 1 + 1e-9
    assert all(r <= bound for r, bound in zip(factorization.rank, cls(shape, rank).rank, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_rank_one_is_found(name):
    torch.manual_seed(0)
    tensor = FACTORIZATIONS[name]((5, 4, 3, 6), 1, dtype=torch.float64).reconstruct()
    assert relative_error(FACTORIZATIONS[name].decompose(tensor, 1), tensor) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_the_tensor_detached(name, dtype):
    tensor = torch.linspace(-1, 1, 120).view(2, 3, 4, 5).to(dtype).requires_grad_()
    factorization = FACTORIZATIONS[name].decompose(tensor, 3)
    assert all(core.dtype == dtype and core.is_leaf and core.requires_grad for core in factorization.cores)
    assert relative_error(factorization.double(), tensor.detach().double()) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_and_without_touching_any_global_state(name):
    tensor = torch.randn(4, 3, 5, 2)
    backend, state = tl.get_backend(), torch.get_rng_state()
    first = FACTORIZATIONS[name].decompose(tensor, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert tl.get_backend() == backend
    torch.manual_seed(99)
    assert torch.equal(first.reconstruct(), FACTORIZATIONS[name].decompose(tensor, 2).reconstruct())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_zero_and_extreme_tensors(name, scale):
    torch.manual_seed(0)
    tensor = scale * torch.randn(3, 4, 2, 3, dtype=torch.float64)
    for rank in (2, 100):
        rebuilt = FACTORIZATIONS[name].decompose(tensor, rank).reconstruct()
        assert torch.isfinite(rebuilt).all()
        assert (rebuilt - tensor).norm() <= tensor.norm() * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_tensors(name):
    torch.manual_seed(0)
    tensor = torch.randn(3, 4, 2, 3, dtype=torch.float64).permute(2, 0, 3, 1)
    assert relative_error(FACTORIZATIONS[name].decompose(tensor, 100), tensor) < 1e-10


def test_cores_do_not_share_memory_with_the_tensor():
    tensor = torch.randn(3, 4)
    factorization = BlockTT.decompose(tensor, 1)
    before = tensor.clone()
    with torch.no_grad():
        factorization.cores[0].zero_()
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("name", NAMES)
def test_rejected_tensors(name):
    cls = FACTORIZATIONS[name]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected finite numbers in `tensor`"):
            cls.decompose(torch.full((2, 2), value), 1)
    for tensor in (torch.ones(2, 2, dtype=torch.int64), [[1.0, 2.0]], torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=r"floating-point torch\.Tensor in `tensor`"):
            cls.decompose(tensor, 1)
    with pytest.raises(ValueError, match="`rank`"):
        cls.decompose(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match="`shape`"):
        cls.decompose(torch.ones(2), 1)


@pytest.mark.parametrize("name", NAMES)
def test_too_much_memory_is_refused_before_any_is_taken(name):
    tensor = torch.zeros(()).expand(100_000, 100_000)
    if name == "btt":
        tensor = torch.zeros(()).expand(300, 300, 300, 300)
    with pytest.raises(MemoryError, match=r"within 8.0 GiB, got an estimated peak of \d+\.\d GiB"):
        FACTORIZATIONS[name].decompose(tensor, 10 if name == "btt" else 30_000)


def test_large_rank_of_cp_is_refused():
    tensor = torch.zeros(()).expand(1000, 1000, 1000)
    with pytest.raises(MemoryError, match="lower `rank`"):
        FACTORIZATIONS["cp"].decompose(tensor, 900_000)


# VmHWM, since ru_maxrss begins with what the parent process had at the fork. What the linear algebra library takes for
# itself at first use is taken before; then the peak is set back to what is in use.
MEASURE = """
import pathlib, re, sys, torch
from tenzoo.factorizations import FACTORIZATIONS
name, shape, rank = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3])
cls = FACTORIZATIONS[name]
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
for kind in (torch.float32, torch.float64):
    square = torch.randn(600, 600, dtype=kind)
    square = square @ square.t()
    for function in (torch.linalg.eigh, torch.linalg.qr, torch.linalg.svd, torch.linalg.inv):
        function(square)
cls.decompose(torch.randn((4,) * len(shape)), 2)
del square
tensor = torch.randn(shape)
cls.decompose(tensor, rank)  # takes the library's buffers for matrices of these sizes
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak()
made = cls.decompose(tensor, rank)
taken = peak() - before
print(taken / (4 * cls.fit_size(shape, made.rank)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize(
    ("name", "shape", "rank"),
    [
        ("cp", (60, 50, 1500), 40),
        ("cp", (2000, 1500), 50),
        ("cp", (2000, 1500), 500),
        ("cp", (200, 9, 200), 150),
        ("tt", (3000, 3000), 60),
        ("tucker", (1000, 9, 1000), [100, 9, 100]),
        ("tr", (200, 9, 200), 12),
        ("tucker", (150, 100, 200), 20),
        ("tucker", (1500, 1500, 2), 400),
        ("tt", (40, 50, 60, 70), 20),
        ("tt", (1500, 2000), 500),
        ("tr", (40, 50, 60, 70), 6),
        ("btt", (20, 10, 10, 20, 10, 20), 20),
        ("btt", (40, 50, 50, 40), 300),
    ],
)
def test_memory_taken_is_about_the_estimate(name, shape, rank):
    command = [sys.executable, "-c", MEASURE, name, repr(shape), repr(rank)]
    # Freed memory goes back to the system at once, so that fragmentation of the heap is not counted.
    # So it is with buffers that the library keeps for each thread.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert 0.6 < ratio < 1.15


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("shape", [(16, 9, 16), (64, 9, 64), (256, 9, 128), (512, 9, 512), (1000, 512), (4096, 4096)])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "btd"])  # of which no multiple is stated
def test_a_stated_multiple_of_the_weights_memory_is_not_exceeded(name, shape, fraction):
    if name == "btt":
        shape = {2: (10, 10, 10, 8, 8, 8), 3: (4, 4, 4, 9, 4, 4, 4, 1)}[len(shape)]
    kind = FACTORIZATIONS[name]
    ranks = kind.clipped_rank(shape, fraction)
    size, dense = kind.fit_size(shape, ranks), math.prod(shape)
    assert size <= (25 if name in ("cp", "tr") else 9) * dense


@pytest.mark.parametrize("name", ["tt", "tucker", "cp", "tr"])
def test_a_large_matrix_goes_through_a_randomized_decomposition(name):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(600, 600, generator=generator)).Q for _ in range(2))
    values = torch.arange(1, 601).float() ** -0.7
    matrix = (left * values) @ right
    kind = FACTORIZATIONS[name]
    rank = [5, 8] if name == "tr" else 40
    before = torch.get_rng_state()
    made, again = kind.decompose(matrix, rank), kind.decompose(matrix, rank)
    error = torch.dist(made.reconstruct(), matrix).item()
    least = values[40:].norm().item()
    assert least * (1 - 1e-4) <= error <= 1.02 * least
    assert all(first.equal(second) for first, second in zip(made.cores, again.cores, strict=True))
    assert torch.get_rng_state().equal(before)


def test_half_precision_cores_that_would_overflow_are_refused(monkeypatch):
    # Balanced cores hardly ever overflow.
    monkeypatch.setattr("tenzoo.factorizations.base.balanced", lambda cores, network: list(cores))
    tensor = torch.full((4000, 4), 60_000.0, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"finite in torch\.float16"):
        FACTORIZATIONS["tt"].decompose(tensor, 1)


def test_memory_limit():
    check_memory(MAX_DECOMPOSITION_BYTES)
    with pytest.raises(MemoryError, match=r"8\.0 GiB"):
        check_memory(MAX_DECOMPOSITION_BYTES + 1)


def test_backend_is_set_in_this_thread_alone():
    seen = []
    with tensorly_on_torch():
        thread = threading.Thread(target=lambda: seen.append(tl.get_backend()))
        thread.start()
        thread.join()
    assert seen == [tl.get_backend()]


def test_backend_comes_back_after_an_error():
    before = tl.get_backend()
    with pytest.raises(KeyError), tensorly_on_torch():
        raise KeyError
    assert tl.get_backend() == before


SCALES = [
    (torch.float32, 1e18),
    (torch.float32, 1e37),
    (torch.float32, 1e-30),
    (torch.float32, 1e-40),  # denormal
    (torch.bfloat16, 1e30),
    (torch.float64, 1e200),
    (torch.float64, 1e-200),
    (torch.float64, 1e-310),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("shape", [(12, 10), (4, 2, 3, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_the_scale_of_a_tensor_changes_nothing_but_the_scale(name, shape, dtype, scale):
    torch.manual_seed(0)
    unit = torch.randn(shape, dtype=torch.float64).to(dtype)
    kind, tensor = FACTORIZATIONS[name], (unit.double() * scale).to(dtype)
    metric = {1: torch.randn(shape[1], shape[1], dtype=torch.float64)}
    scaled = {1: scale * metric[1]} if scale > 1 else metric
    for usual, own in ((None, None), (metric, scaled)) if scale in (1e18, 1e-310, 1e200) else ((None, None),):
        errors = []
        for made, dense in (
            (kind.decompose(unit, 2, metric=usual), unit),
            (kind.decompose(tensor, 2, metric=own), tensor),
        ):
            parts = (made.double().reconstruct().detach() - dense.double(), dense.double())
            errors.append(relative_norm(*(multiply_modes(part, usual or {}) for part in parts)))
        # Least squares magnify rounding, and denormal numbers have few digits.
        assert errors[1] == pytest.approx(errors[0], abs=0.02)
        sizes = [float(core.detach().double().abs().max()) for core in made.cores]
        assert max(sizes) < 100 * min(sizes)  # each has its part of the scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_one_huge_entry_is_kept(name, dtype):
    torch.manual_seed(0)
    tensor = torch.randn(6, 5, 4, 7, dtype=dtype)
    tensor[1, 2, 3, 4] = 1e30 if dtype is torch.float32 else 1e200
    rebuilt = FACTORIZATIONS[name].decompose(tensor, 2).reconstruct()
    assert relative_norm(rebuilt.detach() - tensor, tensor) < 1e-5


def test_norms_are_relative_at_any_scale():
    assert relative_norm(torch.zeros(3), torch.zeros(2)) == 0
    assert relative_norm(torch.ones(3), torch.zeros(2)) == math.inf
    small = torch.full((4,), 1e-310, dtype=torch.float64)
    assert relative_norm(small, 2 * small) == pytest.approx(0.5)
    assert relative_norm(small, torch.full((4,), 1e300, dtype=torch.float64)) == 0
    assert relative_norm(torch.full((4,), 3e38), torch.full((16,), 3e38)) == pytest.approx(0.5)
