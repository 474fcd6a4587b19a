"""Every format × layer × implementation in float64, against the dense weight that one einsum makes of the cores."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tests.conformance import CoreProviderConformance
from tests.factorizations.formats import NAMES, dense_oracle
from tests.layers.makers import transposed


def cores_in(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [value for name, value in parameters.items() if name.startswith("factorization.cores.")]


def conv_kernel(layer: TensorizedConv2d, cores: list[Tensor]) -> Tensor:
    """``(O, I/groups, k_h, k_w)``, read off the definition: output, kernel, input, each of them split."""
    dense = dense_oracle(layer.factorization.name, cores)
    return dense.reshape(layer.out_channels, *layer.kernel_size, -1).movedim(3, 1)


class LayerConformance(CoreProviderConformance):
    name: ClassVar[str]
    implementation: ClassVar[Any]
    non_core = frozenset({"bias"})


class ConvConformance(LayerConformance):
    arguments: ClassVar[Mapping[str, Any]]
    image = (2, 6, 5, 4)

    def make(self) -> nn.Module:
        return TensorizedConv2d(
            6,
            4,
            **self.arguments,
            factorization=self.name,
            rank=2,
            implementation=self.implementation,
            dtype=torch.float64,
        )

    def image_for(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(self.image, generator=generator, dtype=torch.float64)

    def output(self, provider: nn.Module) -> Tensor:
        return provider(self.image_for())

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        assert isinstance(provider, TensorizedConv2d)
        dense = nn.Conv2d(6, 4, **self.arguments, device="meta", dtype=torch.float64)
        values = {"weight": conv_kernel(provider, cores_in(parameters)), "bias": parameters["bias"]}
        return torch.func.functional_call(dense, values, self.image_for())


class LinearConformance(LayerConformance):
    def make(self) -> nn.Module:
        return TensorizedLinear(
            12, 8, factorization=self.name, rank=2, implementation=self.implementation, dtype=torch.float64
        )

    def rows(self) -> Tensor:
        return torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def output(self, provider: nn.Module) -> Tensor:
        return provider(self.rows())

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        weight = dense_oracle(self.name, cores_in(parameters)).reshape(8, 12)
        return torch.einsum("abi,oi->abo", self.rows(), weight) + parameters["bias"]


class TransposedLinearConformance(LinearConformance):
    """Hugging Face's layout of the matrix."""

    def make(self) -> nn.Module:
        return transposed(self.name, implementation=self.implementation, dtype=torch.float64)

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        assert provider.weight.shape == (12, 8)
        torch.testing.assert_close(self.rows() @ provider.weight + parameters["bias"], provider(self.rows()))
        return super().oracle(provider, parameters)


class EmbeddingConformance(LayerConformance):
    non_core = frozenset()
    index = torch.tensor([[0, 10, 3], [5, 10, 2]])

    def make(self) -> nn.Module:
        return TensorizedEmbedding(
            11,
            6,
            padding_idx=5,
            tensorization=[[3, 4], [3, 2]],
            factorization=self.name,
            rank=2,
            implementation=self.implementation,
            dtype=torch.float64,
        )

    def output(self, provider: nn.Module) -> Tensor:
        return provider(self.index)

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        table = dense_oracle(self.name, cores_in(parameters)).reshape(12, 6)
        keep = torch.ones(12, 1, dtype=torch.float64)
        keep[5] = 0
        return (table * keep)[self.index]


CONVOLUTIONS = {
    "Plain": {"kernel_size": 3, "padding": 1},
    "Strided": {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2), "padding": (2, 0)},
    "Grouped": {"kernel_size": 3, "groups": 2, "padding": "same"},
    "Pixel": {"kernel_size": 1, "stride": 2, "padding": 1},
    "GroupedPixel": {"kernel_size": 1, "groups": 2},
    "Circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "SameReflected": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect"},
}

# pytest collects classes by their names; here they are made, one for each combination.
for name in NAMES:
    for implementation in ("reconstruct", "contract"):
        settings = {"name": name, "implementation": implementation}
        suffix = f"{name.title()}{implementation.title()}"
        for kind, arguments in CONVOLUTIONS.items():
            if name in ("btd", "ht") and kind != "Plain":
                continue  # they contract as all networks do, which test_convolutions.py draws at random
            made = f"Test{kind}Conv{suffix}"
            globals()[made] = type(made, (ConvConformance,), {**settings, "arguments": arguments})
        for base in (LinearConformance, TransposedLinearConformance, EmbeddingConformance):
            made = f"Test{base.__name__.removesuffix('Conformance')}{suffix}"
            globals()[made] = type(made, (base,), dict(settings))
del made, name, base, kind  # else the last one is a test class or a fixture by accident


@pytest.mark.parametrize("padding", [[1, 1], [2, 2]])
def test_oracles_are_those_of_torch(padding):
    """The kernel's layout, on a kernel in which every entry is another number."""
    layer = TensorizedConv2d(3, 2, (2, 3), padding=padding[0], factorization="tt", rank=9, dtype=torch.float64)
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    expected = torch.zeros(1, 2, 4 + 2 * padding[0] - 1, 5 + 2 * padding[0] - 2, dtype=torch.float64)
    kernel = dense_oracle("tt", list(layer.factorization.cores)).detach()
    padded = F.pad(x, [padding[0]] * 4)
    for o in range(2):
        for high in range(2):
            for wide in range(3):
                for i in range(3):
                    shifted = padded[0, i, high : high + expected.shape[2], wide : wide + expected.shape[3]]
                    expected[0, o] += kernel[o, 3 * high + wide, i] * shifted
    torch.testing.assert_close(layer(x) - layer.bias[:, None, None], expected)
