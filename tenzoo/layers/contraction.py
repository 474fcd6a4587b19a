"""A layer's output computed from the cores, without rebuilding its weight.

Each function has the dense computation as its meaning, and multiplies by the modes of the input first, those of the
output last, so that what lies between is as narrow as the ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tenzoo.factorizations import CP, BlockTT, Factorization, Tucker
from tenzoo.factorizations.chain import Chain, multiply_batch
from tenzoo.factorizations.gather import gather_slices

Convolve: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""Convolves an input with a weight in a number of groups, with the stride, padding and dilation of the layer."""


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
            rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1], 1)
            y = _through_pairs(list(weight.cores), rows)
            y = y.reshape(*x.shape[:-1], y.shape[1])
            return y if bias is None else y + bias.to(y.dtype)
    raise AssertionError(type(weight))


def contract_conv2d(
    weight: Factorization,
    x: Tensor,
    convolve: Convolve,
    kernel_size: tuple[int, int],
    counts: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    """A two-dimensional convolution as a sequence: into the ranks, over the image, out of the ranks.

    The image is convolved by the first of them where the kernel is a single pixel, and has no mode.

    Args:
        weight: Of shape ``(*out, k², *in)``, without ``k²`` if it is 1; ``(*out, k², *in, 1)`` for a block TT.
        x: ``(N, C_in, H, W)``, padded unless with zeros.
        convolve: The layer's own convolution.
        kernel_size: ``(k_h, k_w)``.
        counts: How many modes ``out``, the kernel (0 or 1) and ``in`` have.
        groups: Into how many groups the channels fall.
        bias: ``(C_out,)``.

    Returns:
        ``(N, C_out, H', W')``.
    """
    if isinstance(weight, BlockTT):
        y = _contract_block_tt(weight, x, convolve, kernel_size, counts, groups)
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]
    batch = x.shape[0]
    x = x.reshape(batch * groups, x.shape[1] // groups, *x.shape[2:])
    present = [count for count in counts if count]
    ring = spatial_groups = 1
    match weight:
        case CP():
            outer, *kernel, inner = weight.merged(*present)
            first, last = inner.t(), outer
            middle = kernel[0].t().reshape(-1, 1, *kernel_size) if kernel else None
            spatial_groups = len(first)
        case Tucker():
            core, outer, *kernel, inner = weight.merged(*present)
            first, last = inner.t(), outer
            if kernel:
                middle = (kernel[0] @ core).transpose(1, 2).reshape(len(core), -1, *kernel_size)
            else:
                first, middle = core @ first, None
        case Chain():
            outer, *kernel, inner = weight.merged(*present)
            ring = outer.shape[0]
            first, last = _input_matrix(inner), _output_matrix(outer)
            middle = kernel[0].transpose(1, 2).reshape(*kernel[0].shape[::2], *kernel_size) if kernel else None
        case _:
            raise AssertionError(type(weight))
    # Contiguous, since a kernel of one pixel with other strides would change the layout of the output.
    first, last = (matrix.contiguous()[:, :, None, None] for matrix in (first, last))
    if middle is None:
        x = convolve(x, first, 1)
    else:
        x = F.conv2d(x, first)
        x = x.reshape(batch * groups * ring, x.shape[1] // ring, *x.shape[2:])
        x = convolve(x, middle.contiguous(), spatial_groups)
    return F.conv2d(x.reshape(batch, groups * last.shape[1], *x.shape[2:]), last, bias, groups=groups)


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
                values = multiply_batch(row, values.reshape(column.shape[0], factor.shape[1], -1))
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
                for core, column in zip(weight.cores, columns, strict=True)
            )
            done = 1
            for core, matrices in zip(weight.cores, slices, strict=False):
                done *= core.shape[2]
                rows = multiply_batch(rows.reshape(matrices.shape[0], done, core.shape[3]), matrices)
            return rows.flatten(1)
    raise AssertionError(type(weight))


def _contract_block_tt(
    weight: BlockTT,
    x: Tensor,
    convolve: Convolve,
    kernel_size: tuple[int, int],
    counts: Sequence[int],
    groups: int,
) -> Tensor:
    cores = list(weight.cores)
    kernel = cores.pop() if counts[1] else None
    batch, channels, *image = x.shape
    y = _through_pairs(cores, x.reshape(batch * groups, channels // groups, math.prod(image)))
    out, rank = y.shape[1:3]
    if groups > 1:  # every group went through all outputs: keep its own
        own = torch.arange(groups, device=x.device)
        y = y.reshape(batch, groups, groups, out // groups, *y.shape[2:])[:, own, own]
    y = y.reshape(batch * out, rank, *image)
    spatial = y.new_ones(1, 1, 1, 1) if kernel is None else kernel.reshape(1, rank, *kernel_size)
    y = convolve(y, spatial, 1)
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


def _input_matrix(core: Tensor) -> Tensor:
    """``(r, I, r_0)`` to ``(r_0 r, I)``."""
    return core.permute(2, 0, 1).reshape(-1, core.shape[1])


def _output_matrix(core: Tensor) -> Tensor:
    """``(r_0, O, r)`` to ``(O, r_0 r)``."""
    return core.transpose(0, 1).reshape(core.shape[1], -1)
