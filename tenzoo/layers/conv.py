"""Convolutions with a tensorized kernel."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.factorizations import FactorizationName, Rank
from tenzoo.layers.convolution import C, Sizes, TensorizedConvolution
from tenzoo.layers.implementation import Implementation
from tenzoo.layers.tensorization import Tensorization

_OPERATORS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _TensorizedConv(TensorizedConvolution[C]):
    """A convolution of any number of dimensions; a subclass says how many."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        factorization: FactorizationName,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation)
        self._make(
            {
                "in_channels": in_channels,
                "out_channels": out_channels,
                "kernel_size": kernel_size,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "groups": groups,
                "bias": bias,
                "padding_mode": padding_mode,
            },
            factorization=factorization,
            rank=rank,
            tensorization=tensorization,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: ``(N, C_in, …)`` or ``(C_in, …)``.

        Returns:
            ``(N, C_out, …)`` or ``(C_out, …)``.
        """
        return self._compute(x, ())

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, added: Sequence[int]) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return y

    def _operate(self, x: Tensor, kernel: Tensor, padding: Any, groups: int, added: Sequence[int]) -> Tensor:
        return _OPERATORS[self.dimensions](x, kernel, None, self.stride, padding, self.dilation, groups)

    @override
    @staticmethod
    def sides(layer: Any) -> dict[str, int]:
        return {"out_channels": layer.out_channels, "in_channels / groups": layer.in_channels // layer.groups}

    def _fan_in(self) -> float:
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def _output_sizes(self, sizes: Sequence[int]) -> list[int]:
        parts = zip(sizes, self._paddings(), self._reaches(), self.stride, strict=True)
        return [(size + more - reach) // step + 1 for size, more, reach, step in parts]

    def _many(self) -> Any:
        many = super()._many()
        return many._replace(inputs=many.inputs * math.prod(self.stride))

    @override
    def patches(self, x: Tensor) -> Tensor:
        x = x if x.ndim == self.dimensions + 2 else x.unsqueeze(0)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        for dim, (reach, step, apart) in enumerate(zip(self._reaches(), self.stride, self.dilation, strict=True)):
            x = x.unfold(dim + 2, reach, step)[..., ::apart]
        pixels = range(2, self.dimensions + 2)
        kernel = range(self.dimensions + 2, 2 * self.dimensions + 2)
        x = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])  # every dimension after it moves by one
        x = x.permute(0, *(dim + 1 for dim in pixels), 1, *(dim + 1 for dim in kernel), 2)
        rows = math.prod(x.shape[: self.dimensions + 2])
        return x.reshape(rows, *self.factorization.shape[len(self.tensorization[0]) :])

    @override
    def output_rows(self, y: Tensor) -> Tensor | None:
        if self.groups > 1:  # a row of the input belongs to one group, a row of the output to all
            return None
        y = y if y.ndim == self.dimensions + 2 else y.unsqueeze(0)
        return y.movedim(1, -1).reshape(-1, *self.tensorization[0])

    @override
    def as_weight(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.out_channels, *self.kernel_size, -1).movedim(-1, 1)

    @override
    def as_tensor(self, dense: Tensor) -> Tensor:
        return dense.movedim(1, -1).reshape(self.factorization.shape)


class TensorizedConv1d(_TensorizedConv[nn.Conv1d], nn.Conv1d):
    """As :class:`TensorizedConv2d`, of one dimension."""

    dense_class: ClassVar[type[nn.Module]] = nn.Conv1d
    dimensions: ClassVar[int] = 1


class TensorizedConv2d(_TensorizedConv[nn.Conv2d], nn.Conv2d):
    """A convolution, as :class:`torch.nn.Conv2d`, with a kernel ``W (O, I/groups, k_1, …)`` made of cores.

    W is reshaped to ``(*out, k_1 ⋯ k_n, *in)``, the factors of ``O`` and of ``I/groups`` (see
    :class:`~tenzoo.layers.convolution.TensorizedConvolution`). At initialization W has mean 0 and variance
    ``2/fan_in`` with ``fan_in = k_1 ⋯ k_n I/groups`` (He et al. 2015, arXiv:1502.01852, eq. 10) in every format, and
    the bias is torch's.

    Example:
        >>> layer = TensorizedConv2d(16, 32, 3, padding=1, factorization="tr", rank=5)
        >>> layer(torch.randn(2, 16, 8, 8)).shape, layer.factorization.shape
        (torch.Size([2, 32, 8, 8]), (4, 4, 2, 9, 4, 2, 2))

    Args:
        in_channels: As in torch.
        out_channels: As in torch.
        kernel_size: As in torch.
        stride: As in torch.
        padding: As in torch, ``"same"`` and ``"valid"`` included.
        dilation: As in torch.
        groups: As in torch.
        bias: As in torch.
        padding_mode: As in torch.
        device: As in torch.
        dtype: As in torch.
        factorization: Name of a format, such as ``"tr"``, or an einsum.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters.
        tensorization: Factors of ``out_channels`` and of ``in_channels / groups``. By default a format with a loop,
            such as a ring, and a block TT split each into up to three factors; the others take them whole.
        implementation: Reconstruct W and convolve once, convolve with the cores in sequence, or take the cheaper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, rank or tensorization does not fit, or as torch does.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.Conv2d
    dimensions: ClassVar[int] = 2


class TensorizedConv3d(_TensorizedConv[nn.Conv3d], nn.Conv3d):
    """As :class:`TensorizedConv2d`, of three dimensions."""

    dense_class: ClassVar[type[nn.Module]] = nn.Conv3d
    dimensions: ClassVar[int] = 3
