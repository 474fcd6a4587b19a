"""A layer's output computed from the cores of any network, by the order of contraction that opt_einsum finds.

The order is found once, for many positions, and kept by the factorization.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tenzoo.factorizations import Factorization
from tenzoo.factorizations.gather import gather_modes
from tenzoo.factorizations.network import Leg

Convolve: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""Convolves an input with a weight in a number of groups, with the stride, padding and dilation of the layer."""

_ROW, _PIXEL = "#", "@"
"""Legs of an input that are no modes: samples, and pixels of an image."""

_SIZES = {_ROW: 64, _PIXEL: 256}
"""At which the order of a contraction is decided."""


def contract_rows_of_inputs(weight: Factorization, x: Tensor, num_out: int) -> Tensor:
    """``x W^T`` for a weight whose first ``num_out`` modes are the output's.

    Args:
        weight: Of shape ``(*out, *in)``.
        x: ``(n, I)``.
        num_out: How many modes ``out`` has.

    Returns:
        ``(n, O)``.
    """
    order = len(weight.shape)
    out, in_ = tuple(range(num_out)), tuple(range(num_out, order))
    found = weight.schedule("linear", ((_ROW, *in_), *weight.legs_of_cores), (_ROW, *out), **_SIZES)
    y = found([x.reshape(-1, *(weight.shape[mode] for mode in in_)), *weight.operands])
    return _as_autocast(y.reshape(x.shape[0], math.prod(weight.shape[:num_out])))


def contract_table(weight: Factorization, columns: Sequence[Tensor]) -> Tensor:
    """Rows of a matrix whose row index is split over the first modes of a tensor.

    Args:
        weight: Of shape ``(*rows, *columns)``.
        columns: One index ``(n,)`` per row mode.

    Returns:
        ``(n, D)``.
    """
    parts: list[Tensor] = []
    legs: list[tuple[Leg, ...]] = []
    for core, own in zip(weight.operands, weight.legs_of_cores, strict=True):
        dims = [dim for dim, leg in enumerate(own) if isinstance(leg, int) and leg < len(columns)]
        if dims:
            index = [columns[leg] for leg in own if isinstance(leg, int) and leg < len(columns)]
            parts.append(gather_modes(core, dims, index, sparse_grad=False))
            legs.append((_ROW, *(leg for dim, leg in enumerate(own) if dim not in dims)))
        else:
            parts.append(core)
            legs.append(own)
    output = _ROW, *range(len(columns), len(weight.shape))
    rows = weight.schedule("rows", tuple(legs), output, **_SIZES)(parts)
    return rows.reshape(columns[0].shape[0], math.prod(weight.shape[len(columns) :]))


def contract_image(
    weight: Factorization, x: Tensor, convolve: Convolve, kernel_size: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """A convolution as a sequence: cores with modes of the input, the kernel, and the rest.

    Args:
        weight: Of shape ``(*out, k, *in)``, with the kernel as one mode or none.
        x: ``(N, C_in, …)``, padded unless with zeros.
        convolve: The layer's own convolution.
        kernel_size: Sizes of the kernel.
        counts: How many modes ``out``, the kernel (0 or 1) and ``in`` have.

    Returns:
        ``(N, C_out, …)``.
    """
    parts = _split(weight, *counts)
    batch, channels = x.shape[:2]
    modes = [weight.shape[mode] for mode in parts.input]
    if counts[1] == 0:  # a pixel by itself: stride and padding are left
        ones = x.new_ones(1, 1, *(1 for _ in kernel_size))
        x = convolve(x.reshape(batch * channels, 1, *x.shape[2:]), ones, 1)
    image: Sequence[int] = x.shape[2:]
    y = x.reshape(batch, *modes, math.prod(image))
    cores = weight.operands
    before, kernel, after = ([cores[k] for k in own] for own in (parts.before, parts.kernel, parts.after))
    y = _contracted(weight, "before the kernel", [y, *before], (*parts.input, _PIXEL), parts.before, parts.between)
    if counts[1]:
        y, image = _convolved(weight, [y, *kernel], image, convolve, kernel_size, parts)
    y = _contracted(weight, "after the kernel", [y, *after], (*parts.after_kernel, _PIXEL), parts.after, parts.output)
    return _as_autocast(y.reshape(batch, math.prod(weight.shape[: counts[0]]), *image).contiguous())


def _as_autocast(y: Tensor) -> Tensor:
    """The output in the precision of an autocast, which casts matrix products and not the outer ones."""
    device = y.device.type
    if device != "meta" and y.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return y.to(torch.get_autocast_dtype(device))
    return y


class _Parts(NamedTuple):
    """Which cores come before, in and after the convolution with the kernel, and the legs in between."""

    before: tuple[int, ...]
    kernel: tuple[int, ...]
    after: tuple[int, ...]
    input: tuple[int, ...]
    """Modes of the input."""
    between: tuple[Leg, ...]
    """Legs of the image before the kernel, but for rows and pixels."""
    summed: tuple[Leg, ...]
    along: tuple[Leg, ...]
    """Legs that the kernel has as well and that are needed after it: its groups."""
    passed: tuple[Leg, ...]
    new: tuple[Leg, ...]
    """Legs of the kernel that the image did not have."""
    mode: int | None
    output: tuple[int, ...]

    @property
    def after_kernel(self) -> tuple[Leg, ...]:
        """Legs of the image after the kernel."""
        return self.between if self.mode is None else (*self.passed, *self.along, *self.new)


def _split(weight: Factorization, num_out: int, num_kernel: int, num_in: int) -> _Parts:
    legs = weight.legs_of_cores
    output, input_ = tuple(range(num_out)), tuple(range(num_out + num_kernel, num_out + num_kernel + num_in))
    mode = num_out if num_kernel else None
    kernel = _cores_of_kernel(weight, mode)
    before = tuple(k for k, own in enumerate(legs) if k not in kernel and set(own) & set(input_))
    after = tuple(k for k in range(len(legs)) if k not in (*kernel, *before))
    of_image = dict.fromkeys([*input_, *(leg for k in before for leg in legs[k])])
    of_kernel = dict.fromkeys(leg for k in kernel for leg in legs[k] if leg != mode)
    later = {*output, *(leg for k in after for leg in legs[k])}
    alive = [leg for leg in of_image if leg in later or leg in of_kernel]
    summed = tuple(leg for leg in alive if leg in of_kernel and leg not in later)
    along = tuple(leg for leg in alive if leg in of_kernel and leg in later)
    passed = tuple(leg for leg in alive if leg not in of_kernel)
    new = tuple(leg for leg in of_kernel if leg in later and leg not in of_image)
    return _Parts(before, kernel, after, input_, (*passed, *along, *summed), summed, along, passed, new, mode, output)


def _cores_of_kernel(weight: Factorization, mode: int | None) -> tuple[int, ...]:
    """The core with the kernel's mode, and all cores without modes: they make one kernel between ranks."""
    if mode is None:
        return ()
    core = next(k for k, legs in enumerate(weight.legs_of_cores) if mode in legs)
    modeless = [k for k, legs in enumerate(weight.legs_of_cores) if not any(isinstance(leg, int) for leg in legs)]
    return (core, *modeless)


def _contracted(
    weight: Factorization,
    name: str,
    operands: Sequence[Tensor],
    legs: Sequence[Leg],
    cores: Sequence[int],
    output: Sequence[Leg],
) -> Tensor:
    """An image and cores, contracted."""
    of_cores = tuple(weight.legs_of_cores[k] for k in cores)
    return weight.schedule(name, ((_ROW, *legs), *of_cores), (_ROW, *output, _PIXEL), **_SIZES)(operands)


def _convolved(
    weight: Factorization,
    operands: Sequence[Tensor],
    image: Sequence[int],
    convolve: Convolve,
    kernel_size: Sequence[int],
    parts: _Parts,
) -> tuple[Tensor, Sequence[int]]:
    """The image ``(n, *passed, *along, *new, pixels)`` after the kernel, and its sizes."""
    assert parts.mode is not None
    y, *cores = operands
    of_cores = tuple(weight.legs_of_cores[k] for k in parts.kernel)
    kernel = weight.schedule("kernel", of_cores, (*parts.along, *parts.new, *parts.summed, parts.mode))(cores)
    sizes = {
        leg: size
        for legs, core in zip(weight.legs_of_cores, weight.cores, strict=True)
        for leg, size in zip(legs, core.shape, strict=True)
    }
    passed, along, new, summed = (
        [sizes[leg] for leg in legs] for legs in (parts.passed, parts.along, parts.new, parts.summed)
    )
    rows = y.shape[0]
    channels = math.prod(along) * math.prod(summed)
    y = y.reshape(rows * math.prod(passed), channels, *image)
    kernel = kernel.reshape(math.prod(along) * math.prod(new), math.prod(summed), *kernel_size)
    y = convolve(y, kernel.contiguous(), math.prod(along))
    image = y.shape[2:]
    return y.reshape(rows, *passed, *along, *new, math.prod(image)), image
