"""Transposed convolutions with a tensorized kernel."""

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

_OPERATORS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _TensorizedConvTranspose(TensorizedConvolution[C]):
    """A transposed convolution of any number of dimensions; a subclass says how many."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
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
                "output_padding": output_padding,
                "groups": groups,
                "bias": bias,
                "dilation": dilation,
                "padding_mode": padding_mode,
            },
            factorization=factorization,
            rank=rank,
            tensorization=tensorization,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve.

        Args:
            x: ``(N, C_in, …)`` or ``(C_in, …)``.
            output_size: As in torch.

        Returns:
            ``(N, C_out, …)`` or ``(C_out, …)``.
        """
        added = self._output_padding(  # type: ignore[operator]
            x, output_size, self.stride, self.padding, self.kernel_size, self.dimensions, self.dilation
        )
        return self._compute(x, added)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, added: Sequence[int]) -> Tensor:
        return self._transpose(x, weight, bias, self.padding, self.groups, added)

    def _operate(self, x: Tensor, kernel: Tensor, padding: Any, groups: int, added: Sequence[int]) -> Tensor:
        # Torch has the inputs of all groups first, and the outputs of one after them.
        kernel = kernel.reshape(groups, -1, *kernel.shape[1:]).transpose(1, 2).flatten(0, 1)
        return self._transpose(x, kernel, None, padding, groups, added)

    def _transpose(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None, padding: Any, groups: int, added: Sequence[int]
    ) -> Tensor:
        operator = _OPERATORS[self.dimensions]
        return operator(x, kernel, bias, self.stride, padding, tuple(added), groups, self.dilation)

    @override
    @staticmethod
    def sides(layer: Any) -> dict[str, int]:
        return {"out_channels / groups": layer.out_channels // layer.groups, "in_channels": layer.in_channels}

    def _fan_in(self) -> float:
        return self.in_channels // self.groups * math.prod(self.kernel_size) / math.prod(self.stride)

    def _output_sizes(self, sizes: Sequence[int]) -> list[int]:
        # In torch's terms the padding is that of the convolution that this one is the transpose of.
        parts = zip(sizes, self.stride, self.padding, self._reaches(), self.output_padding, strict=True)
        return [(size - 1) * step - 2 * less + reach + more for size, step, less, reach, more in parts]

    @override
    def as_weight(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.out_channels // self.groups, *self.kernel_size, -1).movedim(-1, 0)

    @override
    def as_tensor(self, dense: Tensor) -> Tensor:
        return dense.movedim(0, -1).reshape(self.factorization.shape)


class TensorizedConvTranspose1d(_TensorizedConvTranspose[nn.ConvTranspose1d], nn.ConvTranspose1d):
    """As :class:`TensorizedConvTranspose2d`, of one dimension."""

    dense_class: ClassVar[type[nn.Module]] = nn.ConvTranspose1d
    dimensions: ClassVar[int] = 1


class TensorizedConvTranspose2d(_TensorizedConvTranspose[nn.ConvTranspose2d], nn.ConvTranspose2d):
    """A transposed convolution, as :class:`torch.nn.ConvTranspose2d`, with a kernel made of cores.

    The kernel is ``W (I, O/groups, k_1, …)``.

    W is reshaped to ``(*out, k_1 ⋯ k_n, *in)``, the factors of ``O/groups`` and of ``I`` (see
    :class:`~tenzoo.layers.convolution.TensorizedConvolution`). At initialization W has mean 0 and variance
    ``2/fan_in``, where ``fan_in = k_1 ⋯ k_n I/groups / (s_1 ⋯ s_n)`` is how many products an output is the sum of at
    strides s, on average (He et al. 2015, arXiv:1502.01852, eq. 10), in every format, and the bias is torch's.

    Example:
        >>> layer = TensorizedConvTranspose2d(32, 16, 3, stride=2, factorization="tr", rank=5)
        >>> layer(torch.randn(2, 32, 8, 8)).shape, layer.weight.shape, layer.factorization.shape
        (torch.Size([2, 16, 17, 17]), torch.Size([32, 16, 3, 3]), (4, 2, 2, 9, 4, 4, 2))

    Args:
        in_channels: As in torch.
        out_channels: As in torch.
        kernel_size: As in torch.
        stride: As in torch.
        padding: As in torch.
        output_padding: As in torch.
        groups: As in torch.
        bias: As in torch.
        dilation: As in torch.
        padding_mode: As in torch.
        device: As in torch.
        dtype: As in torch.
        factorization: Name of a format, such as ``"tr"``, or an einsum.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters.
        tensorization: Factors of ``out_channels / groups`` and of ``in_channels``, by default as in a convolution.
        implementation: Reconstruct W and convolve once, convolve with the cores in sequence, or take the cheaper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, rank or tensorization does not fit, or as torch does.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.ConvTranspose2d
    dimensions: ClassVar[int] = 2


class TensorizedConvTranspose3d(_TensorizedConvTranspose[nn.ConvTranspose3d], nn.ConvTranspose3d):
    """As :class:`TensorizedConvTranspose2d`, of three dimensions."""

    dense_class: ClassVar[type[nn.Module]] = nn.ConvTranspose3d
    dimensions: ClassVar[int] = 3
