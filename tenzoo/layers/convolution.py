"""What convolutions of one, two and three dimensions, and transposed ones, have in common."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.conv import _ConvNd

from tenzoo.factorizations import Factorization, Rank, factorization_class
from tenzoo.layers.base import TensorizedLayer
from tenzoo.layers.contraction import contract_conv, contract_transposed_conv
from tenzoo.layers.cost import Positions, independence
from tenzoo.layers.tensorization import Tensorization, check_sizes, layer_modes

C = TypeVar("C", bound=_ConvNd)

Sizes: TypeAlias = int | tuple[int, ...]
"""One number for all dimensions, or one for each."""


class TensorizedConvolution(TensorizedLayer[C]):
    """A convolution of any number of dimensions.

    Abstract: a subclass is of torch's class as well, and has its arguments.

    With its input channels last, the kernel is reshaped to ``(*out, k_1 ⋯ k_n, *in)``, the factors of its output and of
    its input channels with all directions of the kernel as one mode between them; a kernel of one pixel has no such
    mode. A block TT pairs the factors, and the kernel with 1.
    """

    dimensions: ClassVar[int]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: Any
    bias: Any
    transposed: bool
    _reversed_padding_repeated_twice: list[int]

    def _make(
        self,
        settings: dict[str, Any],
        *,
        factorization: str,
        rank: Rank,
        tensorization: Tensorization | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Check torch's arguments, and make the cores and the bias."""
        kind = factorization_class(factorization)
        in_channels, out_channels, groups = (settings[name] for name in ("in_channels", "out_channels", "groups"))
        check_sizes(in_channels=in_channels, out_channels=out_channels, groups=groups)
        for name in ("kernel_size", "stride", "dilation"):
            _check_sizes(name, settings[name], self.dimensions)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"expected a divisor of in_channels ({in_channels}) and out_channels ({out_channels}) in `groups`, "
                f"got {groups}"
            )
        # Torch's own layer checks the other arguments, and says what they come to.
        dense: Any = self.dense_class(**settings, device="meta")
        for name in (*dense.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(dense, name))
        pixels = math.prod(self.kernel_size)
        self.tensorization, shape = layer_modes(kind, tensorization, self.sides(self), kernel=pixels)
        std = math.sqrt(2 / self._fan_in())
        self.factorization = kind(shape, rank, init_std=std, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if settings["bias"] else None
        self._count_costs()
        self.reset_parameters()

    @abstractmethod
    def _fan_in(self) -> float:
        """Number of products that an output is the sum of."""

    def reset_parameters(self) -> None:
        """Draw cores and bias anew."""
        self.factorization.reset_parameters()
        if self.bias is not None:
            per_group = (self.out_channels if self.transposed else self.in_channels) // self.groups
            bound = 1 / math.sqrt(per_group * math.prod(self.kernel_size))
            nn.init.uniform_(self.bias, -bound, bound)

    def positions(self, x: Tensor) -> Positions:
        """Pixels of the whole batch."""
        sizes = x.shape[-self.dimensions :]
        inputs = sizes
        if self.padding_mode != "zeros":
            inputs = torch.Size([size + more for size, more in zip(sizes, self._paddings(), strict=True)])
        images = x.shape[0] if x.ndim == self.dimensions + 2 else 1
        return Positions(images * math.prod(self._output_sizes(sizes)), images * math.prod(inputs))

    @abstractmethod
    def _output_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Sizes of the output of an image."""

    def _paddings(self) -> list[int]:
        """Pixels that are added to each dimension, on both sides together."""
        ends = self._reversed_padding_repeated_twice
        return [ends[k] + ends[k + 1] for k in range(len(ends) - 2, -1, -2)]

    def _reaches(self) -> list[int]:
        """Pixels between the ends of the kernel, in each dimension."""
        return [(size - 1) * step + 1 for size, step in zip(self.kernel_size, self.dilation, strict=True)]

    def _compute(self, x: Tensor, added: Sequence[int]) -> Tensor:
        """The output for a batch of images or a single one; ``added`` as in :meth:`_operate`."""
        batched = x.ndim == self.dimensions + 2
        if self.choose(self.positions(x)) == "contract":
            y = self._contract(self.factorization, x if batched else x.unsqueeze(0), self.bias, added)
            return _in_layout_of(y, x) if batched else y.squeeze(0)
        # The layout of the output follows from those of input and weight.
        weight = self.dense_weight(contiguous=not (batched and _has_channels_last(x)))
        return self._convolve(x, weight, self.bias, added)

    @abstractmethod
    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, added: Sequence[int]) -> Tensor:
        """Torch's layer with a dense weight; ``added`` as in :meth:`_operate`."""

    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(x, weight, None, self.output_padding)

    def _contract(
        self, weight: Factorization, x: Tensor, bias: Tensor | None = None, output_padding: Sequence[int] = ()
    ) -> Tensor:
        out, has_kernel = len(self.tensorization[0]), int(math.prod(self.kernel_size) > 1)
        counts = out, has_kernel, len(weight.shape) - out - has_kernel
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0

        def convolve(x: Tensor, kernel: Tensor, groups: int) -> Tensor:
            return self._operate(x, kernel, padding, groups, output_padding or self.output_padding)

        contract = contract_transposed_conv if self.transposed else contract_conv
        return contract(weight, x, convolve, self.kernel_size, counts, self.groups, bias)

    @abstractmethod
    def _operate(self, x: Tensor, kernel: Tensor, padding: Any, groups: int, added: Sequence[int]) -> Tensor:
        """Torch's function with the stride and the dilation of the layer, without a bias.

        Args:
            x: ``(N, groups · I, …)``.
            kernel: ``(groups · O, I, …)``, also of a transposed convolution.
            padding: Of the input.
            groups: Into how many groups the channels fall.
            added: Pixels that a transposed convolution adds to each dimension of the output.
        """

    def _example_inputs(self) -> Sequence[Tensor]:
        # From the smallest image on that has an output, and can be padded by parts of itself.
        margin = max(self._reversed_padding_repeated_twice)
        least = [
            1 if self.transposed else max(reach - more, margin) + 1
            for reach, more in zip(self._reaches(), self._paddings(), strict=True)
        ]
        small, large = (
            [size + steps * step for size, step in zip(least, self.stride, strict=True)] for steps in (7, 23)
        )
        # With a row or a column more: with a stride as wide as the kernel what is read is in proportion to what is
        # written else.
        more = [[int(k == dim) for k in range(self.dimensions)] for dim in range(self.dimensions)]
        thirds = [small, *([side + one for side, one in zip(small, ones, strict=True)] for ones in more)]
        sides = [small, large, *thirds]
        if self.dimensions == 2:
            sides = [small, large, small, [small[0], large[1] + 1], [small[0] + 1, large[1]]]
        images = [_laid_out(torch.empty(2, self.in_channels, *side, device="meta")) for side in sides]
        one, other, *rest = images
        apart = [independence(*map(self.positions, (one, other, third))) for third in rest]
        best = max(range(len(rest)), key=lambda k: abs(apart[k]))
        return [one, other, rest[best]] if apart[best] else [one, other]

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        names = [
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
            *(["output_padding"] if layer.transposed else []),
        ]
        return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}

    def to_dense(self) -> C:
        """The torch layer that computes the same; a copy."""
        made: Any = self.dense_class(**self._arguments(self), device="meta")
        return self._filled(made)

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return f"{_ConvNd.extra_repr(self)}, implementation={self.implementation}"  # type: ignore[arg-type, no-untyped-call]


def _in_layout_of(y: Tensor, x: Tensor) -> Tensor:
    """A batch of images with its channels last in memory if those of another batch are."""
    if _has_channels_last(x) and not x.is_contiguous():
        return _channels_last(y).contiguous().movedim(-1, 1)
    return y


def _has_channels_last(x: Tensor) -> bool:
    """Whether a batch of images has its channels last in memory, which vmap does not tell by a memory format."""
    return x.ndim > 3 and _channels_last(x).is_contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _laid_out(images: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return images.to(memory_format=formats[images.ndim]) if images.ndim in formats else images


def _check_sizes(name: str, given: object, number: int) -> None:
    sizes = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,) * number
    if len(sizes) != number:
        several = {1: "one of them in a tuple", 2: "two of them"}.get(number, f"{number} of them")
        raise ValueError(f"expected an int >= 1, or {several}, in `{name}`, got {given!r}")
    for size in sizes:
        check_sizes(**{name: size})
