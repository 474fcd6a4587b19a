"""A two-dimensional convolution with a tensorized kernel."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.factorizations import BlockTT, Factorization, Rank, TensorRing, factorization_class
from tenzoo.layers.base import Implementation, TensorizedLayer
from tenzoo.layers.contraction import contract_conv2d
from tenzoo.layers.cost import Positions, independence
from tenzoo.layers.tensorization import (
    Tensorization,
    check_sizes,
    check_tensorization,
    paired,
    split_size,
    whole_size,
)


class TensorizedConv2d(TensorizedLayer[nn.Conv2d]):
    """A convolution, as :class:`torch.nn.Conv2d`, with a kernel ``W (O, I/groups, k_h, k_w)`` made of cores.

    With its input channels last, W is reshaped to ``(*out, k_h k_w, *in)``, the factors of ``O`` and of ``I/groups``
    with both directions of the kernel as one mode between them; a kernel of one pixel has no such mode. A block TT
    pairs the factors, and the kernel with 1. At initialization W has mean 0 and variance ``2/fan_in`` with
    ``fan_in = k_h k_w I/groups`` (He et al. 2015, arXiv:1502.01852, eq. 10) in every format, and the bias is torch's.

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
        factorization: ``"cp"``, ``"tucker"``, ``"tt"``, ``"tr"`` or ``"btt"``.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters.
        tensorization: Factors of ``out_channels`` and of ``in_channels / groups``. By default a ring and a block TT
            split each into up to three factors, the others take them whole.
        implementation: Rebuild W and convolve once, convolve with the cores in sequence, or take the cheaper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, rank or tensorization does not fit, or as torch does.

    Example:
        >>> layer = TensorizedConv2d(16, 32, 3, padding=1, factorization="tr", rank=5)
        >>> layer(torch.randn(2, 16, 8, 8)).shape, layer.weight.shape
        (torch.Size([2, 32, 8, 8]), (4, 4, 2, 9, 4, 2, 2))
    """

    _torchs: ClassVar[type[nn.Module]] = nn.Conv2d

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        factorization: str,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation)
        kind = factorization_class(factorization)
        check_sizes(in_channels=in_channels, out_channels=out_channels, groups=groups)
        for name, pair in {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}.items():
            _check_pair(name, pair)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"expected a divisor of in_channels ({in_channels}) and out_channels ({out_channels}) in `groups`, "
                f"got {groups}"
            )
        # Torch's own layer checks the other arguments, and says what they come to.
        settings = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        torchs = nn.Conv2d(*settings, device="meta")  # type: ignore[arg-type]
        for name in (*torchs.__constants__, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(torchs, name))
        split = split_size if kind in (TensorRing, BlockTT) else whole_size
        per_group = in_channels // groups
        out, in_ = check_tensorization(
            tensorization,
            {"out_channels": out_channels, "in_channels / groups": per_group},
            (split(out_channels), split(per_group)),
        )
        kernel = (math.prod(self.kernel_size),) if math.prod(self.kernel_size) > 1 else ()
        if kind is BlockTT:
            out, in_ = paired(out, in_)
            shape = (*out, *kernel, *in_, *(1 for _ in kernel))
        else:
            shape = (*out, *kernel, *in_)
        self.tensorization = out, in_
        std = math.sqrt(2 / (per_group * math.prod(self.kernel_size)))
        self.weight = kind(shape, rank, init_std=std, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self._count_costs()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw cores and bias anew."""
        self.weight.reset_parameters()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels // self.groups * math.prod(self.kernel_size))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: ``(N, C_in, H, W)`` or ``(C_in, H, W)``.

        Returns:
            ``(N, C_out, H', W')`` or ``(C_out, H', W')``.
        """
        if self.choose(self.positions(x)) == "contract":
            if x.ndim == 3:
                return self._contract(self.weight, x.unsqueeze(0), self.bias).squeeze(0)
            y = self._contract(self.weight, x, self.bias)
            last = _channels_last(x).is_contiguous() and not x.is_contiguous()
            return _channels_last(y).contiguous().permute(0, 3, 1, 2) if last else y
        # The layout of the output follows from those of input and weight.
        plain = x.ndim == 3 or not _channels_last(x).is_contiguous()
        weight = self.dense_weight(contiguous=plain)
        return self._conv_forward(x, weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = nn.Conv2d._conv_forward(self, x, weight, bias)  # type: ignore[arg-type]
        return y

    def positions(self, x: Tensor) -> Positions:
        """Pixels of the whole batch."""
        (high, wide), (down, across) = x.shape[-2:], self.stride
        (more, wider), (reach, span) = self._paddings(), self._reaches()
        outputs = ((high + more - reach) // down + 1) * ((wide + wider - span) // across + 1)
        inputs = high * wide if self.padding_mode == "zeros" else (high + more) * (wide + wider)
        images = x.shape[0] if x.ndim == 4 else 1
        return Positions(images * outputs, images * inputs)

    def _many(self) -> Positions:
        many = super()._many()
        return Positions(many.outputs, many.inputs * self.stride[0] * self.stride[1])

    def _paddings(self) -> tuple[int, int]:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return top + bottom, left + right

    def _reaches(self) -> tuple[int, int]:
        (high, wide), (down, across) = self.kernel_size, self.dilation
        return (high - 1) * down + 1, (wide - 1) * across + 1

    @override
    def patches(self, x: Tensor) -> Tensor:
        x = x if x.ndim == 4 else x.unsqueeze(0)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        columns = F.unfold(x, self.kernel_size, self.dilation, stride=self.stride).transpose(1, 2)
        rows = columns.reshape(-1, self.in_channels // self.groups, math.prod(self.kernel_size))
        return rows.transpose(1, 2).reshape(len(rows), *self.weight.shape[len(self.tensorization[0]) :])

    def _contract(self, weight: Factorization, x: Tensor, bias: Tensor | None = None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)

        def convolve(x: Tensor, kernel: Tensor, groups: int) -> Tensor:
            return F.conv2d(x, kernel, None, self.stride, padding, self.dilation, groups)

        out, in_ = self.tensorization
        counts = len(out), len(weight.shape) > len(out) + len(in_), len(in_)
        return contract_conv2d(weight, x, convolve, self.kernel_size, counts, self.groups, bias)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        if isinstance(self.weight, BlockTT) and tensor.ndim > sum(map(len, self.tensorization)):
            tensor = tensor.squeeze(-1)
        return tensor.reshape(self.out_channels, *self.kernel_size, -1).permute(0, 3, 1, 2)

    def _tensorized(self, dense: Tensor) -> Tensor:
        return dense.permute(0, 2, 3, 1).reshape(self.weight.shape)

    def _samples(self) -> Sequence[Tensor]:
        # From the smallest image on that has an output, and can be padded by parts of itself.
        margin = max(self._reversed_padding_repeated_twice)
        (down, across), (more, wider), (reach, span) = self.stride, self._paddings(), self._reaches()
        high, wide = max(reach - more, margin) + 1, max(span - wider, margin) + 1
        small, large = ((high + steps * down, wide + steps * across) for steps in (7, 23))
        # With a row or column over: a stride as wide as the kernel leaves what is read and written in proportion else.
        sides = [small, large, *((small[0] + row, large[1] + column) for row, column in ((0, 0), (0, 1), (1, 0)))]
        images = [torch.empty(2, self.in_channels, *side, device="meta") for side in sides]
        one, other, *thirds = (image.to(memory_format=torch.channels_last) for image in images)
        apart = [independence(*map(self.positions, (one, other, third))) for third in thirds]
        best = max(range(len(thirds)), key=lambda k: abs(apart[k]))
        return [one, other, thirds[best]] if apart[best] else [one, other]

    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, None)

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        sizes = ("in_channels", "out_channels", "kernel_size")
        names = (*sizes, "stride", "padding", "dilation", "groups", "padding_mode")
        return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}

    def to_dense(self) -> nn.Conv2d:
        """The torch layer that computes the same; a copy."""
        return self._hand_over(nn.Conv2d(**self._arguments(self), device="meta"))

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return f"{nn.Conv2d.extra_repr(self)}, implementation={self.implementation}"  # type: ignore[arg-type, no-untyped-call]


def _check_pair(name: str, pair: object) -> None:
    sizes = pair if isinstance(pair, Sequence) and not isinstance(pair, str) else (pair, pair)
    if len(sizes) != 2:
        raise ValueError(f"expected an int >= 1, or two of them, in `{name}`, got {pair!r}")
    for size in sizes:
        check_sizes(**{name: size})


def _channels_last(x: Tensor) -> Tensor:
    """A view that is contiguous where a batch of images is so in torch's channels_last, which vmap does not tell."""
    return x.permute(0, 2, 3, 1)
