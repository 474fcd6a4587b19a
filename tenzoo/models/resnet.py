"""Residual networks for small images, with dense or with tensorized convolutions."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.factorizations import FactorizationName, Rank
from tenzoo.layers import Implementation, Tensorization, TensorizedConv2d, TensorizedLayer
from tenzoo.layers.implementation import check_implementation
from tenzoo.layers.tensorization import check_sizes
from tenzoo.weight_files import load_weights_, read_weights

_DEPTHS = (20, 32, 44, 56)
_WIDTHS = (16, 32, 64)
_MIN_SIDE = 4


class CIFARResNet(nn.Module):
    """The residual network for 32 × 32 images of He et al. (2016, arXiv:1512.03385, section 4.2).

    A 3 × 3 convolution, three stages of ``(depth − 2)/6`` blocks that are 16, 32 and 64 channels wide, each on half
    the side length of the one before, the mean over all pixels, and a linear layer. Where a block changes the shape,
    its shortcut takes every second pixel and adds channels of zeros, half of them in front and half behind (option A).

    With ``factorization`` every convolution, the first included, is a :class:`~tenzoo.layers.TensorizedConv2d`; the
    linear layer stays dense. Its cores are found by :func:`~tenzoo.cores.find_core_groups`, under names such as
    ``"layer1.0.conv1.weight"``. All weights start with mean 0 and variance ``2/fan_in`` (He et al. 2015,
    arXiv:1502.01852, eq. 10), also those reconstructed from cores, and all biases at 0.

    Args:
        depth: Layers with weights: 20, 32, 44 or 56.
        num_classes: Outputs.
        in_channels: Channels of an image: 3 for colour, 1 for grey.
        factorization: A name such as ``"tr"``, or an einsum; None is the dense network.
        rank: The rank of each convolution: one number, a list, or a fraction of the dense parameters.
        tensorization: Maps a number of channels (``in_channels``, 16, 32 or 64) to its factors. Missing numbers have
            the layer's default, which for a ring and a block TT is ``{3: [3], 16: [4, 2, 2], 32: [4, 4, 2], 64: [4, 4,
            4]}``.
        implementation: How the tensorized convolutions are computed.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: For another depth, or settings that contradict each other or do not fit a layer. The message names
            the layer.

    Example:
        >>> dense, ring = CIFARResNet(20), CIFARResNet(20, factorization="tr", rank=10)
        >>> [sum(p.numel() for p in network.parameters()) for network in (dense, ring)]
        [269722, 55826]
        >>> ring(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        factorization: FactorizationName | None = None,
        rank: Rank | None = None,
        tensorization: Mapping[int, Sequence[int]] | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if isinstance(depth, float) or depth not in _DEPTHS:
            raise ValueError(f"expected one of {list(_DEPTHS)} in `depth`, got {depth!r}")
        check_sizes(num_classes=num_classes, in_channels=in_channels)
        self.depth, self.in_channels = depth, in_channels
        convolutions = _Convolutions([in_channels, *_WIDTHS], factorization, rank, tensorization, implementation)
        convolutions.check()
        self.conv1 = convolutions.make("conv1", in_channels, _WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        num_blocks = (depth - 2) // 6
        self.layer1 = _stage(convolutions, "layer1", num_blocks, _WIDTHS[0], _WIDTHS[0])
        self.layer2 = _stage(convolutions, "layer2", num_blocks, _WIDTHS[0], _WIDTHS[1])
        self.layer3 = _stage(convolutions, "layer3", num_blocks, _WIDTHS[1], _WIDTHS[2])
        self.linear = nn.Linear(_WIDTHS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, TensorizedLayer):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: ``(N, in_channels, H, W)``, normalized as in training; H and W are at least 4.

        Returns:
            Logits, ``(N, num_classes)``.

        Raises:
            ValueError: For images of another shape.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < _MIN_SIDE:
            raise ValueError(
                f"expected shape (N, {self.in_channels}, H, W) with H and W >= {_MIN_SIDE} in `images`, "
                f"got {tuple(images.shape)}"
            )
        # The layout of reconstructed kernels, and the faster one. One conversion here saves one per layer.
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits

    def load_pretrained(self, path: str | Path) -> Self:
        """Load the weights of a published file of this network.

        It reads files of state dicts in all their forms (see :func:`~tenzoo.weight_files.load_weights_`), and runs no
        code from them.

        Args:
            path: Path of the file.

        Returns:
            The network itself.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is none of these, is for another depth or number of classes, or this network is
                tensorized.
        """
        if isinstance(self.conv1, TensorizedConv2d):
            raise ValueError(f"expected a dense network to load {str(path)!r} into, got a tensorized one")
        names = read_weights(path)
        depth = 2 + sum(bool(re.search(r"layer\d\.\d+\.conv\d\.weight$", name)) for name in names)
        if depth in _DEPTHS and depth != self.depth:
            raise ValueError(
                f"expected the weights of a ResNet-{self.depth} in {str(path)!r}, got those of a ResNet-{depth}"
            )
        return load_weights_(self, path)


class _Block(nn.Module):
    """``relu(x' + bn2(conv2(relu(bn1(conv1(x))))))``. The shortcut x' is x in the shape of the output."""

    def __init__(self, convolutions: "_Convolutions", name: str, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.padding = (out_channels - in_channels) // 2
        self.conv1 = convolutions.make(f"{name}.conv1", in_channels, out_channels, self.stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = convolutions.make(f"{name}.conv2", out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x, inplace=True)


def _stage(
    convolutions: "_Convolutions", name: str, num_blocks: int, in_channels: int, out_channels: int
) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * num_blocks
    return nn.Sequential(*(_Block(convolutions, f"{name}.{k}", widths[k], widths[k + 1]) for k in range(num_blocks)))


@dataclass(frozen=True)
class _Convolutions:
    """Builds the convolutions of a network, all with the same settings."""

    channels: Sequence[int]
    """Numbers of channels that occur."""
    factorization: FactorizationName | None
    rank: Rank | None
    tensorization: Mapping[int, Sequence[int]] | None
    implementation: Implementation

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        check_implementation(self.implementation)
        if self.factorization is None:
            for name, value in (("rank", self.rank), ("tensorization", self.tensorization)):
                if value is not None:
                    raise ValueError(f"expected a `factorization` with `{name}`, got {value!r} without one")
        elif self.rank is None:
            raise ValueError(f"expected a `rank` with `factorization`, got {self.factorization!r} without one")
        for key in self.tensorization or ():
            if key not in self.channels:
                raise ValueError(
                    f"expected numbers of channels of {self.channels} as keys of `tensorization`, got {key!r}"
                )

    def make(self, name: str, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        """A convolution of 3 × 3 pixels. The name is for errors."""
        if self.factorization is None or self.rank is None:
            return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        try:
            return TensorizedConv2d(
                in_channels,
                out_channels,
                3,
                stride,
                padding=1,
                bias=False,
                factorization=self.factorization,
                rank=self.rank,
                tensorization=self._tensorization(in_channels, out_channels),
                implementation=self.implementation,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} in {name}") from error

    def _tensorization(self, in_channels: int, out_channels: int) -> Tensorization | None:
        if self.tensorization is None:
            return None
        return self._factors(self.tensorization, out_channels), self._factors(self.tensorization, in_channels)

    def _factors(self, tensorization: Mapping[int, Sequence[int]], channels: int) -> Sequence[int]:
        if channels not in tensorization:
            return self._default_factors(channels)
        factors = tensorization[channels]
        if not isinstance(factors, Sequence) or not all(isinstance(factor, int) for factor in factors):
            raise TypeError(f"expected a list of ints in `tensorization` for {channels} channels, got {factors!r}")
        if math.prod(factors) != channels or min(factors) < 1:
            raise ValueError(
                f"expected factors of {channels} in `tensorization`, such as {list(self._default_factors(channels))}, "
                f"got {factors!r}"
            )
        return factors

    def _default_factors(self, channels: int) -> Sequence[int]:
        assert self.factorization is not None
        layer = TensorizedConv2d(channels, channels, 3, device="meta", factorization=self.factorization, rank=1)
        return layer.tensorization[0]
