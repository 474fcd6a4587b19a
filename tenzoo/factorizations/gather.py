"""Rows and slices of cores at many indices, with gradients that may be sparse.

The gradient of a gather is zero outside the rows that were asked for. For a mode of a million rows and a batch of a
thousand, the dense gradient is what a training step would spend its time on; the sparse one holds the touched rows
only. It is coalesced, so optimizers need not sort it again.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gather_rows(factor: Tensor, index: Tensor, *, sparse_grad: bool) -> Tensor:
    """Rows of a matrix.

    Args:
        factor: Matrix ``(n_k, r)``.
        index: Integers ``(n,)``.
        sparse_grad: Whether the gradient of ``factor`` is a coalesced COO tensor with one sparse dimension. It takes
            time and memory in proportion to n, whatever n_k is.

    Returns:
        Rows ``(n, r)``.

    Example:
        >>> factor = torch.randn(1000, 2, requires_grad=True)
        >>> gather_rows(factor, torch.tensor([7, 3, 7]), sparse_grad=True).sum().backward()
        >>> factor.grad.indices().tolist(), factor.grad.values().tolist()
        ([[3, 7]], [[1.0, 1.0], [2.0, 2.0]])
    """
    return gather_modes(factor, (0,), [index], sparse_grad=sparse_grad)


def gather_slices(core: Tensor, columns: Sequence[Tensor], *, sparse_grad: bool) -> Tensor:
    """Matrices of a chain's core.

    Args:
        core: Core ``(r, n_k, r')``, or ``(r, m_k, n_k, r')`` with two modes.
        columns: One index ``(n,)`` per mode.
        sparse_grad: Whether the gradient of ``core`` is a coalesced COO tensor, sparse in all dimensions but the last.

    Returns:
        Matrices ``(n, r, r')``.

    Example:
        >>> core = torch.randn(2, 5, 3)
        >>> torch.equal(gather_slices(core, [torch.tensor([4, 0])], sparse_grad=False)[0], core[:, 4])
        True
    """
    return gather_modes(core, range(1, core.ndim - 1), columns, sparse_grad=sparse_grad)


def gather_modes(core: Tensor, dims: Sequence[int], columns: Sequence[Tensor], *, sparse_grad: bool) -> Tensor:
    """Parts of a core at given indices of its modes.

    Args:
        core: Core of any shape.
        dims: Which of its dimensions are modes, in ascending order, one or more.
        columns: One index ``(n,)`` per mode.
        sparse_grad: Whether the gradient of ``core`` is a coalesced COO tensor, sparse in all dimensions up to the last
            mode.

    Returns:
        ``(n, …)``, the other dimensions in their order.

    Example:
        >>> core = torch.randn(4, 2, 5)
        >>> parts = gather_modes(core, [0, 2], [torch.tensor([3, 1]), torch.tensor([4, 0])], sparse_grad=False)
        >>> torch.equal(parts[0], core[3, :, 4])
        True
    """
    index = _flat_index([core.shape[dim] for dim in dims], columns)
    if sparse_grad:
        parts: Tensor = _SparseGather.apply(core, index, tuple(dims))
        return parts
    return _select(core, index, tuple(dims))


def whole_with_sparse_grad(core: Tensor) -> Tensor:
    """The core itself, with a gradient in COO form: every entry, under all of its leading indices.

    Optimizers for sparse gradients, such as ``SparseAdam``, take no dense one with them.

    Example:
        >>> core = torch.randn(2, 3, requires_grad=True)
        >>> whole_with_sparse_grad(core).sum().backward()
        >>> core.grad.is_coalesced(), core.grad.sparse_dim()
        (True, 1)
    """
    whole: Tensor = _SparseWhole.apply(core)
    return whole


def first_outside(columns: Sequence[Tensor], shape: Sequence[int]) -> str | None:
    """The message about the first mode with an index that is out of range, ``None`` if there is none.

    Example:
        >>> first_outside([torch.tensor([0, 2]), torch.tensor([1, 3])], (3, 3))
        'expected 0 to 2 in column 1 of `index` (mode 1 of size 3), got 3; count indices from 0'
    """
    for mode, (column, size) in enumerate(zip(columns, shape, strict=True)):
        outside = column[(column < 0) | (column >= size)]
        if len(outside):
            return (
                f"expected 0 to {size - 1} in column {mode} of `index` (mode {mode} of size {size}), "
                f"got {outside[0].item()}; count indices from 0"
            )
    return None


class _SparseGather(torch.autograd.Function):
    @staticmethod
    def forward(core: Tensor, index: Tensor, dims: tuple[int, ...]) -> Tensor:
        return _select(core, index, dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, tuple[int, ...]], output: Tensor) -> None:
        core, index, dims = inputs
        ctx.save_for_backward(index)
        ctx.shape, ctx.dims = core.shape, dims

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,), (grad,) = ctx.saved_tensors, grads
        shape, dims = ctx.shape, ctx.dims
        modes = [shape[dim] for dim in dims]
        rows, inverse = _unique(index, math.prod(modes))
        values = grad.new_zeros(len(rows), *grad.shape[1:]).index_add_(0, inverse, grad)
        indices = dict(zip(dims, torch.unravel_index(rows, modes), strict=True))
        between = [dim for dim in range(dims[-1]) if dim not in dims]  # sparse as well
        if between:
            sizes = [shape[dim] for dim in between]
            number = math.prod(sizes)
            places = torch.unravel_index(torch.arange(number, device=rows.device), sizes)
            indices = {dim: mode.repeat(number) for dim, mode in indices.items()}
            indices |= {dim: p.repeat_interleave(len(rows)) for dim, p in zip(between, places, strict=True)}
            values = values.flatten(1, len(between)).transpose(0, 1).flatten(0, 1)
            if between[-1] > dims[0]:  # else they are in order
                values, indices = _sorted(values, indices, shape)
        return _coalesced(ctx, [indices[dim] for dim in range(dims[-1] + 1)], values, shape), None, None


class _SparseWhole(torch.autograd.Function):
    @staticmethod
    def forward(core: Tensor) -> Tensor:
        return core.view_as(core)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        sparse = max(grad.ndim - 1, 1)
        leading = grad.shape[:sparse]
        indices = torch.unravel_index(torch.arange(math.prod(leading), device=grad.device), leading)
        return _coalesced(ctx, indices, grad.flatten(0, sparse - 1), grad.shape)


def _select(core: Tensor, index: Tensor, dims: tuple[int, ...]) -> Tensor:
    if dims[0] == 0 and len(dims) == 1:
        return core.index_select(0, index)
    first, last = dims[0], dims[-1]
    if last - first == len(dims) - 1:  # side by side
        core = core.flatten(first, last)
        # A copy of the core would cost more than a small batch. An exported program must not depend on its size.
        if torch.compiler.is_exporting() or core.shape[first] > index.shape[0]:
            return core.index_select(first, index).movedim(first, 0)
        # With the mode in front, whole matrices are copied and added, several times faster than rows of a middle mode.
        return core.movedim(first, 0).contiguous().index_select(0, index)
    return core.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1).index_select(0, index)


def _sorted(values: Tensor, indices: dict[int, Tensor], shape: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Elements of a sparse tensor in the order of its dimensions."""
    flat = torch.zeros_like(indices[0])
    for dim in range(len(indices)):
        flat = flat * shape[dim] + indices[dim]
    order = flat.argsort()
    return values.index_select(0, order), {dim: index.index_select(0, order) for dim, index in indices.items()}


def _unique(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The different values in an index below ``size``, sorted, and where each element of the index stands in them."""
    if size > len(index):
        rows, inverse = torch.unique(index, return_inverse=True)
        return rows.long(), inverse
    # Marking what is there takes no sort, and no more memory than the batch.
    present = torch.zeros(size, dtype=torch.bool, device=index.device).index_fill_(0, index.long(), True)
    return present.nonzero().squeeze(1), (present.cumsum(0) - 1).index_select(0, index)


def _flat_index(sizes: Sequence[int], columns: Sequence[Tensor]) -> Tensor:
    flat = columns[0]
    for size, column in zip(sizes[1:], columns[1:], strict=True):
        # An index beyond its own mode could be a valid flat index. Selecting from a zero that is expanded to the size
        # of the mode lets torch check the range, without memory and, on an accelerator, without waiting for it.
        checked = column + column.new_zeros(()).expand(size).index_select(0, column)
        flat = flat * size + checked
    return flat


def _coalesced(ctx: Any, indices: Sequence[Tensor], values: Tensor, shape: torch.Size) -> Tensor:
    coordinates = torch.stack(tuple(indices))
    values = values.reshape(-1).view(values.shape)  # torch reads no others than the usual strides, also of sizes of 1
    grad = torch.sparse_coo_tensor(coordinates, values, shape, check_invariants=False, is_coalesced=True)
    if not torch.is_grad_enabled():
        # A sparse gradient that nobody else holds becomes ``.grad`` by a shallow copy that forgets it is coalesced;
        # one that is held is cloned, and remembers.
        ctx.held = grad
    return grad


def constant(index: Tensor) -> Tensor:
    """An index whose numbers nobody will change: what follows from it may be remembered.

    Its version does not tell: memory that is shared with NumPy, and writes to ``.data``, leave it as it is.
    """
    index._never_changes = True  # type: ignore[attr-defined]
    return index


def never_changes(index: Tensor) -> bool:
    """Whether it is :func:`constant`.

    Example:
        >>> index = torch.zeros(2, 3, dtype=torch.int64)
        >>> never_changes(index), never_changes(constant(index)), never_changes(index + 1)
        (False, True, False)
    """
    return getattr(index, "_never_changes", False)
