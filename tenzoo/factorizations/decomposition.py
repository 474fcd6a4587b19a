"""What all decompositions share: the checks of the tensor, the memory limit and TensorLy's backend."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import tensorly as tl
import torch
from tensorly.tenalg.svd import randomized_svd
from tensorly.tenalg.svd import truncated_svd as exact_svd
from torch import Tensor

_LARGE, _OVERSAMPLES, _POWERS = 512, 10, 4
"""Smaller side of a matrix from which on a randomized decomposition is thought of; columns beyond the rank, and power
iterations, in it."""

MAX_DECOMPOSITION_BYTES = 8 * 2**30
"""Decompositions that would take more memory than this, the tensor itself not counted, are refused."""

_SAFE_EXPONENT = 32
"""Tensors whose largest magnitude is from 2^-32 to 2^32 have squares and sums of squares well within float32."""


@contextmanager
def tensorly_on_torch() -> Iterator[None]:
    """Let TensorLy work on torch's tensors in this thread, and give the thread its former backend back.

    Example:
        >>> before = tl.get_backend()
        >>> with tensorly_on_torch():
        ...     tl.get_backend()
        'pytorch'
        >>> tl.get_backend() == before
        True
    """
    previous = tl.get_backend()
    tl.set_backend("pytorch", local_threadsafe=True)
    try:
        yield
    finally:
        tl.set_backend(previous, local_threadsafe=True)


@contextmanager
def full_precision() -> Iterator[None]:
    """Without the casts of an autocast around it, which also keeps those of weights that have changed since.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device in {"cpu", accelerator.type if accelerator else "cpu"}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def check_memory(num_bytes: int) -> None:
    """Refuse a decomposition whose estimated peak memory is above :data:`MAX_DECOMPOSITION_BYTES`.

    Raises:
        MemoryError: With the estimate and the limit.

    Example:
        >>> check_memory(2**20)
    """
    if num_bytes > MAX_DECOMPOSITION_BYTES:
        raise MemoryError(
            f"expected a decomposition within {MAX_DECOMPOSITION_BYTES / 2**30:.1f} GiB, got an estimated peak of "
            f"{num_bytes / 2**30:.1f} GiB; lower `rank`, or split the tensor"
        )


def check_finite(tensor: Tensor) -> None:
    """Refuse NaN and infinities.

    Raises:
        ValueError: If there is one.

    Example:
        >>> check_finite(torch.ones(3))
    """
    # Both are NaN if any number is; nothing as large as the tensor is made.
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise ValueError("expected finite numbers in `tensor`, got NaN or infinity")


def scaled_to_safety(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor divided by a power of two, so that squares of its numbers neither overflow nor vanish.

    Args:
        tensor: Finite.

    Returns:
        The tensor itself and 0 if there is no need, else ``T / 2^e``, whose largest magnitude is in [1/2, 1), and e.

    Example:
        >>> scaled_to_safety(torch.tensor([2.0**100, 2.0**99]))
        (tensor([0.5000, 0.2500]), 101)
    """
    if tensor.numel() == 0:
        return tensor, 0
    exponent = math.frexp(max(abs(float(extreme)) for extreme in torch.aminmax(tensor)))[1]
    if abs(exponent) <= _SAFE_EXPONENT:
        return tensor, 0
    half = -exponent // 2  # the whole power may itself be out of range
    return tensor * 2.0**half * 2.0 ** (-exponent - half), exponent


def relative_norm(difference: Tensor, tensor: Tensor) -> float:
    """``‖D‖ / ‖T‖`` in float64, at any scale; 0 where both are zero.

    Example:
        >>> huge = torch.tensor([3e200, 4e200], dtype=torch.float64)
        >>> round(relative_norm(huge, 2 * huge), 12)
        0.5
    """
    (part, below), (whole, above) = scaled_to_safety(difference.double()), scaled_to_safety(tensor.double())
    norms = [float(torch.linalg.vector_norm(scaled)) for scaled in (part, whole)]
    if norms[1] == 0:
        return 0.0 if norms[0] == 0 else math.inf
    return math.ldexp(norms[0] / norms[1], below - above)


def wide_modes(shape: Sequence[int]) -> list[int]:
    """Modes of more than one index; a tensor with two of them is a matrix, whatever its order.

    Example:
        >>> wide_modes((64, 1, 32))
        [0, 2]
    """
    return [mode for mode, size in enumerate(shape) if size > 1]


def truncated_svd(matrix: Tensor, n_eigenvecs: int, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular values and vectors of a matrix, for TensorLy's ``svd=``.

    A large matrix of which few are wanted goes through a randomized decomposition (Halko et al. 2011, arXiv:0909.4061,
    algorithm 4.4), which takes a fraction of the time and the memory; its error is a few percent above the least
    possible at worst, where singular values hardly decay. The same matrix always gives the same result.

    Args:
        matrix: ``(m, n)``.
        n_eigenvecs: How many, r.

    Returns:
        ``(m, r)``, ``(r,)`` and ``(r, n)``.

    Example:
        >>> matrix = torch.ones(3, 2)
        >>> with tensorly_on_torch():
        ...     left, values, right = truncated_svd(matrix, 1)
        >>> torch.allclose(left * values @ right, matrix)
        True
    """
    rows, columns = matrix.shape
    if _is_randomized(rows, columns, n_eigenvecs):
        return randomized_svd(  # type: ignore[no-any-return]
            matrix, n_eigenvecs, n_oversamples=_OVERSAMPLES, n_iter=_POWERS, random_state=0
        )
    return exact_svd(matrix, n_eigenvecs)  # type: ignore[no-any-return]


def _is_randomized(rows: int, columns: int, rank: int) -> bool:
    small = min(rows, columns)
    return small >= _LARGE and 4 * (rank + _OVERSAMPLES) <= small


def svd_size(rows: int, columns: int, rank: int) -> int:
    """Numbers held at the peak of :func:`truncated_svd`, the matrix itself not counted.

    The factors of the economy-size decomposition, LAPACK's copy of the matrix and its workspace, and the kept columns;
    of a randomized one the sketches on either side.

    Example:
        >>> svd_size(1000, 10, 5) < 4 * 1000 * 10
        True
    """
    small = min(rows, columns)
    if _is_randomized(rows, columns, rank):
        return 5 * (rank + _OVERSAMPLES) * (rows + columns)
    return rows * columns + small * (rows + columns) + 4 * small**2 + rank * (rows + columns)


def chain_svd_size(modes: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers held at the peak of the successive decompositions of a chain, the tensor itself not counted.

    Args:
        modes: Sizes n_1, …, n_d.
        ranks: Ranks r_0, …, r_d; a ring has r_0 above 1, and its first decomposition the rank ``r_0 r_1``.

    Example:
        >>> chain_svd_size([10, 10, 10], [1, 5, 5, 1]) == svd_size(10, 100, 5)
        True
    """
    ring, peak, remainder = ranks[0], 0, 0
    for k in range(len(modes) - 1):
        rows = modes[0] if k == 0 else ranks[k] * modes[k]
        columns = math.prod(modes[k + 1 :]) * (1 if k == 0 else ring)
        rank = ranks[1] * ring if k == 0 else ranks[k + 1]
        peak = max(peak, remainder + svd_size(rows, columns, rank))
        remainder = 2 * rank * columns
    return max(peak, remainder)


def multiply_modes(tensor: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
    """Multiply modes of a tensor by matrices, ``T ×_k S_k`` for every k.

    Args:
        tensor: Shape ``(n_1, …, n_d)``.
        matrices: From modes, counted from 0, to matrices ``(m_k, n_k)``, or to the diagonals ``(n_k,)`` of such.

    Example:
        >>> multiply_modes(torch.ones(2, 3), {1: torch.ones(4, 3)}).shape
        torch.Size([2, 4])
    """
    for mode, matrix in matrices.items():
        if matrix.ndim == 1:
            tensor = tensor * matrix.to(tensor).view(-1, *(1,) * (tensor.ndim - mode - 1))
        else:
            tensor = torch.tensordot(matrix.to(tensor), tensor, dims=([1], [mode])).movedim(0, mode)
    return tensor


def check_metric(metric: Mapping[int, Tensor], shape: Sequence[int]) -> None:
    """Refuse matrices that do not fit a tensor.

    Raises:
        ValueError: If a mode does not exist, or its matrix has another shape, NaN or infinity.

    Example:
        >>> check_metric({1: torch.eye(3)}, (2, 3))
    """
    for mode, matrix in metric.items():
        if not 0 <= mode < len(shape):
            raise ValueError(f"expected modes from 0 to {len(shape) - 1} in `metric`, got {mode}")
        size = shape[mode]
        if tuple(matrix.shape) not in ((size, size), (size,)):
            raise ValueError(
                f"expected shape {(size, size)} or {(size,)} for mode {mode} in `metric`, got {tuple(matrix.shape)}"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"expected finite numbers for mode {mode} in `metric`, got NaN or infinity")
