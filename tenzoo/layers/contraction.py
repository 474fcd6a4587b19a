"""A layer's output computed from the cores, without reconstructing its weight.

Each function has the dense computation as its meaning, and multiplies by the modes of the input first, those of the
output last, so that what lies between is as narrow as the ranks.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tenzoo.factorizations import CP, BlockTT, Factorization, Tucker
from tenzoo.factorizations.chain import Chain, multiply_batch
from tenzoo.factorizations.gather import gather_slices
from tenzoo.layers.networks import Convolve, contract_image, contract_rows_of_inputs, contract_table

_POINTWISE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def contract_linear(weight: Factorization, x: Tensor, num_out: int, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for a weight whose first ``num_out`` modes are the output's.

    Args:
        weight: Of shape ``(*out, *in)``.
        x: ``(…, I)``.
        num_out: How many modes ``out`` has.
        bias: ``(O,)``.

    Returns:
        ``(…, O)``.
    """
    counts = num_out, len(weight.shape) - num_out
    match weight:
        case CP():
            outer, inner = weight.merged(*counts)
            return F.linear(F.linear(x, inner.t()), outer, bias)
        case Tucker():
            core, outer, inner = weight.merged(*counts)
            return F.linear(F.linear(F.linear(x, inner.t()), core), outer, bias)
        case Chain():
            outer, inner = weight.merged(*counts)
            return F.linear(F.linear(x, _input_matrix(inner)), _output_matrix(outer), bias)
        case BlockTT():
            y = _through_pairs(weight.operands, _rows(x).unsqueeze(2))
        case _:
            y = contract_rows_of_inputs(weight, _rows(x), num_out)
    y = y.reshape(*x.shape[:-1], y.shape[1])
    return y if bias is None else y + bias.to(y.dtype)


def contract_conv(
    weight: Factorization,
    x: Tensor,
    convolve: Convolve,
    kernel_size: Sequence[int],
    counts: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    """A convolution as a sequence: into the ranks, over the image, out of the ranks.

    The image is convolved by the first of them where the kernel is a single pixel, and has no mode.

    Args:
        weight: Of shape ``(*out, k, *in)``, without ``k`` if it is 1; ``(*out, k, *in, 1)`` for a block TT.
        x: ``(N, C_in, …)``, padded unless with zeros.
        convolve: The layer's own convolution.
        kernel_size: Sizes of the kernel, whose product is k.
        counts: How many modes ``out``, the kernel (0 or 1) and ``in`` have.
        groups: Into how many groups the channels fall; each has the modes ``in`` and a part of ``out``.
        bias: ``(C_out,)``.

    Returns:
        ``(N, C_out, …)``.
    """
    batch = x.shape[0]
    if not isinstance(weight, CP | Tucker | Chain):
        y = _contract_others(weight, x, convolve, kernel_size, counts, groups)
        if groups > 1:  # every group went through all outputs: keep its own
            own = torch.arange(groups, device=x.device)
            y = y.reshape(batch, groups, groups, y.shape[1] // groups**2, *y.shape[2:])[:, own, own]
            y = y.flatten(1, 2)
        return _with_bias(y, bias)
    first, middle, last = _matrices(weight, kernel_size, counts)
    x = x.reshape(batch * groups, x.shape[1] // groups, *x.shape[2:])
    y = _through(x, convolve, first, middle, kernel_size)
    pointwise = _POINTWISE[len(kernel_size)]
    return pointwise(
        y.reshape(batch, groups * last.shape[1], *y.shape[2:]), _pixel(last, kernel_size), bias, groups=groups
    )


def contract_transposed_conv(
    weight: Factorization,
    x: Tensor,
    convolve: Convolve,
    kernel_size: Sequence[int],
    counts: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    """A transposed convolution as a sequence; arguments and result as in :func:`contract_conv`.

    Each group has the modes ``out`` and a part of ``in``.
    """
    batch, channels, *image = x.shape
    pointwise = _POINTWISE[len(kernel_size)]
    if not isinstance(weight, CP | Tucker | Chain):
        if groups > 1:  # every group has the inputs of the others as zeros
            own = torch.eye(groups, dtype=x.dtype, device=x.device).view(groups, groups, 1, *(1 for _ in image))
            x = x.reshape(batch, 1, groups, channels // groups, *image) * own
            x = x.reshape(batch * groups, channels, *image)
        y = _contract_others(weight, x, convolve, kernel_size, counts, 1)
    else:
        first, middle, last = _matrices(weight, kernel_size, counts)
        if groups > 1:
            first = first.reshape(first.shape[0], groups, -1).transpose(0, 1).flatten(0, 1)
            x = pointwise(x, _pixel(first, kernel_size), groups=groups)
            x = x.reshape(batch * groups, first.shape[0] // groups, *image)
            first = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        y = _through(x, convolve, first, middle, kernel_size)
        y = pointwise(y.reshape(batch * groups, last.shape[1], *y.shape[2:]), _pixel(last, kernel_size))
    return _with_bias(y.reshape(batch, groups * y.shape[1], *y.shape[2:]), bias)


def _contract_others(
    weight: Factorization,
    x: Tensor,
    convolve: Convolve,
    kernel_size: Sequence[int],
    counts: Sequence[int],
    groups: int,
) -> Tensor:
    """Each group through all outputs, ``(N, groups · O, …)``."""
    x = x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])
    if isinstance(weight, BlockTT):
        y = _contract_block_tt(weight, x, convolve, kernel_size, counts)
    else:
        y = contract_image(weight, x, convolve, kernel_size, counts)
    return y.reshape(y.shape[0] // groups, groups * y.shape[1], *y.shape[2:])


def _matrices(
    weight: CP | Tucker | Chain, kernel_size: Sequence[int], counts: Sequence[int]
) -> tuple[Tensor, tuple[Tensor, int, int] | None, Tensor]:
    """Into the ranks; a kernel between ranks, its groups, and the ring rank that runs along; out of the ranks."""
    present = [count for count in counts if count]
    match weight:
        case CP():
            outer, *kernel, inner = weight.merged(*present)
            middle = (kernel[0].t().reshape(-1, 1, *kernel_size), inner.shape[1], 1) if kernel else None
            return inner.t(), middle, outer
        case Tucker():
            core, outer, *kernel, inner = weight.merged(*present)
            if not kernel:
                return core @ inner.t(), None, outer
            mixed = (kernel[0] @ core).transpose(1, 2).reshape(len(core), -1, *kernel_size)
            return inner.t(), (mixed, 1, 1), outer
        case Chain():
            outer, *kernel, inner = weight.merged(*present)
            first, last = _input_matrix(inner), _output_matrix(outer)
            if not kernel:
                return first, None, last
            left, _, right = kernel[0].shape
            return first, (kernel[0].transpose(1, 2).reshape(left, right, *kernel_size), 1, outer.shape[0]), last


def _through(
    x: Tensor,
    convolve: Convolve,
    first: Tensor,
    middle: tuple[Tensor, int, int] | None,
    kernel_size: Sequence[int],
) -> Tensor:
    """Into the ranks and over the image."""
    if middle is None:
        return convolve(x, _pixel(first, kernel_size), 1)
    kernel, groups, ring = middle
    x = _POINTWISE[len(kernel_size)](x, _pixel(first, kernel_size))
    x = x.reshape(x.shape[0] * ring, x.shape[1] // ring, *x.shape[2:])
    return convolve(x, kernel.contiguous(), groups)


def _pixel(matrix: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """A kernel of one pixel, contiguous, since other strides would change the layout of the output."""
    return matrix.contiguous().view(*matrix.shape, *(1 for _ in kernel_size))


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype).view(-1, *(1 for _ in y.shape[2:]))


def contract_rows(weight: Factorization, columns: Sequence[Tensor]) -> Tensor:
    """Rows of a matrix whose row index is split over the first modes of a tensor.

    Args:
        weight: Of shape ``(*rows, *columns)``.
        columns: One index ``(n,)`` per row mode.

    Returns:
        ``(n, D)``.
    """
    counts = [1] * len(columns), len(weight.shape) - len(columns)
    match weight:
        case CP():
            *factors, last = weight.merged(*counts[0], counts[1])
            product = factors[0].index_select(0, columns[0])
            for factor, column in zip(factors[1:], columns[1:], strict=True):
                product = product * factor.index_select(0, column)
            return F.linear(product, last)
        case Tucker():
            core, *factors, last = weight.merged(*counts[0], counts[1])
            values = (factors[0].index_select(0, columns[0]) @ core.flatten(1)).unsqueeze(1)
            for factor, column in zip(factors[1:], columns[1:], strict=True):
                row = factor.index_select(0, column).unsqueeze(1)
                rank = factor.shape[1]
                values = multiply_batch(row, values.reshape(column.shape[0], rank, values.shape[2] // rank))
            return F.linear(values.squeeze(1), last)
        case Chain():
            *cores, last = weight.merged(*counts[0], counts[1])
            product = gather_slices(cores[0], columns[:1], sparse_grad=False)
            for core, column in zip(cores[1:], columns[1:], strict=True):
                product = multiply_batch(product, gather_slices(core, [column], sparse_grad=False))
            return F.linear(product.flatten(1), last.permute(1, 2, 0).flatten(1))
        case BlockTT():
            rows, *slices = (  # with the column mode and the next rank in one
                gather_slices(core.flatten(2), [column], sparse_grad=False)
                for core, column in zip(weight.operands, columns, strict=True)
            )
            done = 1
            for core, matrices in zip(weight.cores, slices, strict=False):
                done *= core.shape[2]
                rows = multiply_batch(rows.reshape(matrices.shape[0], done, core.shape[3]), matrices)
            return rows.flatten(1)
    return contract_table(weight, columns)


def _contract_block_tt(
    weight: BlockTT, x: Tensor, convolve: Convolve, kernel_size: Sequence[int], counts: Sequence[int]
) -> Tensor:
    cores = weight.operands
    kernel = cores.pop() if counts[1] else None
    batch, _, *image = x.shape
    y = _through_pairs(cores, x.flatten(2))
    out, rank = y.shape[1:3]
    y = y.reshape(batch * out, rank, *image)
    pixel = y.new_ones(1, 1, *(1 for _ in kernel_size)) if kernel is None else kernel.reshape(1, rank, *kernel_size)
    y = convolve(y, pixel, 1)
    return y.reshape(batch, out, *y.shape[2:])


def _through_pairs(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Multiply ``(B, n_1 ⋯ n_d, L)`` by cores ``(r_{k-1}, m_k, n_k, r_k)``; gives ``(B, m_1 ⋯ m_d, r_d, L)``."""
    batch, _, length = x.shape
    done, rest = 1, x.shape[1] * length
    y = x.reshape(batch, 1, rest)
    for core in cores:
        left, m, n, right = core.shape
        rest //= n
        y = core.permute(1, 3, 0, 2).reshape(m * right, left * n) @ y.reshape(batch * done, left * n, rest)
        done *= m
    return y.reshape(batch, done, cores[-1].shape[3], length)


def _rows(x: Tensor) -> Tensor:
    """``(…, I)`` to ``(n, I)``, also where n is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _input_matrix(core: Tensor) -> Tensor:
    """``(r, I, r_0)`` to ``(r_0 r, I)``."""
    return core.permute(2, 0, 1).reshape(-1, core.shape[1])


def _output_matrix(core: Tensor) -> Tensor:
    """``(r_0, O, r)`` to ``(O, r_0 r)``."""
    return core.transpose(0, 1).reshape(core.shape[1], -1)
