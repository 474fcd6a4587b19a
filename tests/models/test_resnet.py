from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.cores import CoreContainer, find_core_groups
from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.layers import TensorizedConv2d
from tenzoo.models import CIFARResNet
from tests.conformance import CoreProviderConformance
from tests.factorizations.formats import dense_oracle

NAMES = sorted(FACTORIZATIONS)
SLOW = ["btt", "tt", "tucker"]


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


# --- what it is ------------------------------------------------------------------------------------------------


def test_dense_parameters():
    assert count(CIFARResNet(20)) == 269_722
    assert count(CIFARResNet(32)) == 464_154


@pytest.mark.parametrize(
    ("rank", "parameters"), [(5, 15_476), (7, 28_388), (10, 55_826), (12, 79_498), (17, 157_508), (23, 286_628)]
)
def test_parameters_of_rings(rank, parameters):
    assert count(CIFARResNet(20, factorization="tr", rank=rank)) == parameters


def test_parameters_of_a_deeper_ring():
    factors = {3: [3], 16: [4, 2, 2], 32: [4, 4, 2], 64: [4, 4, 4]}
    assert count(CIFARResNet(32, factorization="tr", rank=15, tensorization=factors)) == 202_272
    assert count(CIFARResNet(32, factorization="tr", rank=15)) == 202_272


@pytest.mark.parametrize(("rank", "times"), [(10, 15.97), (20, 8.50), (50, 3.53), (100, 1.79), (200, 0.90)])
def test_compression_by_cp(rank, times):
    assert 269_722 / count(CIFARResNet(20, factorization="cp", rank=rank)) == pytest.approx(times, abs=0.005)


@pytest.mark.parametrize(
    "settings", [{}, {"factorization": "tr", "rank": 10}, {"factorization": "ar,br,cr,dr->abcd", "rank": 8}]
)
def test_grey_images_have_a_network(settings):
    grey, colour = CIFARResNet(20, in_channels=1, **settings), CIFARResNet(20, **settings)
    assert grey.conv1.weight.shape == (16, 1, 3, 3)
    assert [p.shape for p in grey.layer1.parameters()] == [p.shape for p in colour.layer1.parameters()]
    assert grey(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"^expected shape \(N, 1, H, W\) .* in `images`, got \(2, 3, 32, 32\)$"):
        grey(torch.randn(2, 3, 32, 32))


def test_names_are_those_of_the_published_files():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{name}" for name in norm)}
    for stage, block, k in np.ndindex(3, 5, 2):
        prefix = f"layer{stage + 1}.{block}"
        expected |= {f"{prefix}.conv{k + 1}.weight", *(f"{prefix}.bn{k + 1}.{name}" for name in norm)}
    assert set(CIFARResNet(32).state_dict()) == expected


def test_all_convolutions_are_made_of_cores():
    network = CIFARResNet(20, factorization="tr", rank=2, tensorization={16: [4, 4], 64: [2, 32]})
    assert not [module for module in network.modules() if type(module) is nn.Conv2d]
    names = [group.name for group in find_core_groups(network)]
    assert len(names) == 19
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer3.2.conv2.weight"} <= set(names)
    assert network.conv1.factorization.shape == (4, 4, 9, 3)
    assert network.layer2[0].conv1.factorization.shape == (4, 4, 2, 9, 4, 4)  # 32 channels take the default
    assert network.layer3[2].conv2.factorization.shape == (2, 32, 9, 2, 32)


def test_the_other_formats_take_their_own_defaults():
    assert CIFARResNet(20, factorization="cp", rank=2, tensorization={64: [64]}).conv1.factorization.shape == (16, 9, 3)
    mixed = CIFARResNet(20, factorization="btt", rank=2, tensorization={16: [16]}).layer2[0].conv1
    assert mixed.tensorization == ((4, 4, 2), (16, 1, 1))


# --- what it computes ------------------------------------------------------------------------------------------


def reference(images, state, kernel: Callable, blocks: int):
    """The network in evaluation mode by plain functions, as the paper describes it, from a state dict."""

    def normalized_convolution(x, conv, bn, stride):
        y = F.conv2d(x, kernel(conv), stride=stride, padding=1)
        mean, var, weight, bias = (
            state[f"{bn}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / torch.sqrt(var + 1e-5) * weight + bias

    x = normalized_convolution(images, "conv1", "bn1", 1).clamp_min(0)
    for stage, block in np.ndindex(3, blocks):
        name, stride = f"layer{stage + 1}.{block}", 2 if stage > 0 and block == 0 else 1
        y = normalized_convolution(x, f"{name}.conv1", f"{name}.bn1", stride).clamp_min(0)
        y = normalized_convolution(y, f"{name}.conv2", f"{name}.bn2", 1)
        if stride == 2:
            even = x[..., torch.arange(0, x.shape[2], 2), :][..., torch.arange(0, x.shape[3], 2)]
            zeros = torch.zeros_like(even[:, : even.shape[1] // 2])
            x = torch.cat([zeros, even, zeros], dim=1)
        x = (x + y).clamp_min(0)
    return x.flatten(2).mean(2) @ state["linear.weight"].t() + state["linear.bias"]


def with_statistics(network):
    """In evaluation mode, with running statistics and norms that are not those of the start."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (7, 5)])
@pytest.mark.parametrize("depth", [20, 32])
def test_the_dense_network_is_that_of_the_paper(depth, size):
    torch.manual_seed(0)
    network = with_statistics(CIFARResNet(depth, num_classes=7).double())
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    state = network.state_dict()
    expected = reference(images, state, lambda name: state[f"{name}.weight"], (depth - 2) // 6)
    assert expected.shape == (3, 7)
    torch.testing.assert_close(network(images), expected)


class Container(nn.Module, CoreContainer):
    """Lists the groups of a network that is no provider itself."""

    def __init__(self, network):
        super().__init__()
        self.network = network


class NetworkConformance(CoreProviderConformance):
    factorization: ClassVar = ""
    tensorization: ClassVar = None
    non_core = frozenset(f"network.{name}" for name, _ in CIFARResNet(20).named_parameters() if "conv" not in name)

    def make(self):
        torch.manual_seed(0)
        network = CIFARResNet(
            20, num_classes=3, factorization=self.factorization, rank=2, tensorization=self.tensorization
        )
        return Container(with_statistics(network.double()))

    def output(self, provider):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return provider.network(images)

    def oracle(self, provider, parameters):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        state = {**provider.state_dict(), **parameters}
        state = {name.removeprefix("network."): value for name, value in state.items()}

        def kernel(name):
            cores = [value for key, value in state.items() if key.startswith(f"{name}.factorization.cores.")]
            tensor = dense_oracle(self.factorization, cores)
            out = state[name.replace("conv", "bn") + ".weight"].numel()
            return tensor.reshape(out, 3, 3, -1).permute(0, 3, 1, 2)

        return reference(images, state, kernel, 3)

    def test_gradcheck(self, provider):
        parameters = tuple(provider.parameters())
        assert torch.autograd.gradcheck(lambda *_: self.output(provider), parameters, fast_mode=True)


class TestRingConformance(NetworkConformance):
    factorization = "tr"
    tensorization: ClassVar = {16: [4, 4], 32: [8, 4], 64: [8, 8]}


class TestCPConformance(NetworkConformance):
    factorization = "cp"


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 3, 32), (2, 3, 32, 3), (2, 3, 32)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"expected shape \(N, 3, H, W\) with H and W >= 4 in `images`, got \("):
        CIFARResNet(20)(torch.zeros(shape))


@pytest.mark.parametrize("name", [None, *NAMES])
def test_all_that_runs_is_channels_last(name):
    network = CIFARResNet(
        20,
        factorization=name,
        rank=None if name is None else 2,
        implementation="auto" if name is None else "reconstruct",
    )
    images = torch.randn(2, 3, 16, 16)
    layouts = []
    for module in network.modules():
        if not list(module.children()) and not isinstance(module, nn.Linear | nn.ParameterList):
            module.register_forward_hook(
                lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    for block in (*network.layer1, *network.layer2, *network.layer3):
        block.register_forward_hook(
            lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    logits = network(images)
    assert len(layouts) >= 19 + 9
    assert all(layouts)
    torch.testing.assert_close(network(images.contiguous(memory_format=torch.channels_last)), logits)


@pytest.mark.parametrize("name", [None, "cp", "tr", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_it_compiles_without_a_graph_break(name):
    torch.manual_seed(0)
    rank = None if name is None else 2
    network = CIFARResNet(20, factorization=name, rank=rank)
    images = torch.randn(2, 3, 8, 8)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    compiled(images).sum().backward()  # of a network that never ran before
    network.eval()
    torch.testing.assert_close(compiled(images), network(images))


# --- how it starts ---------------------------------------------------------------------------------------------


def test_dense_weights_start_as_those_that_are_rebuilt():
    torch.manual_seed(0)
    network = CIFARResNet(20, num_classes=1000)
    kernel = network.layer3[1].conv2.weight
    assert kernel.square().mean().item() == pytest.approx(2 / (64 * 9), rel=0.03)
    assert network.linear.weight.square().mean().item() == pytest.approx(2 / 64, rel=0.03)
    assert not network.linear.bias.any()
    rings = [CIFARResNet(20, factorization="tr", rank=10).layer3[1].conv2 for _ in range(8)]
    squares = torch.stack([ring.dense_weight().square().mean() for ring in rings])
    assert squares.mean().item() == pytest.approx(2 / (64 * 9), rel=0.2)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "rank"), [("cp", 64), ("tucker", 24), ("tt", 24), ("tr", 10), ("btt", 8)])
@torch.no_grad()
def test_activations_neither_vanish_nor_explode(name, rank):
    """A gain of 0.8 per layer would come to 0.01 after 20, and that of torch's own initialization, 1/6, to 1e-16."""
    logs = []
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randn(2, 64, 6, 6)
        for _ in range(20):
            layer = TensorizedConv2d(
                64, 64, 3, padding=1, padding_mode="circular", bias=False, factorization=name, rank=rank
            )
            x = layer(x).relu()
        logs.append(x.square().mean().log())
    assert 1 / 30 < torch.stack(logs).mean().exp().item() < 30


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_core(name):
    torch.manual_seed(0)
    network = CIFARResNet(20, factorization=name, rank=4)
    F.cross_entropy(network(torch.randn(8, 3, 16, 16)), torch.arange(8)).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert 1e-8 < parameter.grad.norm() < 1e4, key


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"depth": 18}, r"expected one of \[20, 32, 44, 56\] in `depth`, got 18"),
        ({"depth": "20"}, r"`depth`, got '20'"),
        ({"num_classes": 0}, "int >= 1 in `num_classes`, got 0"),
        ({"rank": 5}, "expected a `factorization` with `rank`, got 5 without one"),
        ({"tensorization": {16: [4, 4]}}, "expected a `factorization` with `tensorization`, got {16"),
        ({"factorization": "tr"}, "expected a `rank` with `factorization`, got 'tr' without one"),
        ({"factorization": "tr", "rank": 0}, r"^expected an int >= 1.*`rank`, got 0 in conv1$"),
        ({"factorization": "tr", "rank": [2] * 5}, r"^expected 7 ints in `rank`.* in layer1\.0\.conv1$"),
        ({"factorization": "tr", "rank": 0.01}, r"^expected a fraction in `rank`.*use at least [\d.]+ in conv1$"),
        ({"factorization": "svd", "rank": 2}, r"^expected one of .*`factorization`, got 'svd' in conv1$"),
        (
            {"factorization": "tr", "rank": 2, "tensorization": {32: [4, 4]}},
            r"^expected factors of 32 in `tensorization`, such as \[4, 4, 2\], got \[4, 4\] in layer2\.0\.conv1$",
        ),
        (
            {"factorization": "tr", "rank": 2, "tensorization": {16: [-4, -4]}},
            r"^expected factors of 16 in `tensorization`, such as \[4, 2, 2\], got \[-4, -4\] in conv1$",
        ),
        (
            {"factorization": "tr", "rank": 2, "tensorization": {128: [4, 32]}},
            r"^expected numbers of channels of \[3, 16, 32, 64\] as keys of `tensorization`, got 128$",
        ),
        (
            {"factorization": "tr", "rank": 2, "implementation": "fast"},
            r"^expected one of .* in `implementation`, got 'fast'$",
        ),
        ({"implementation": "fast"}, r"^expected one of .* in `implementation`, got 'fast'$"),
        ({"depth": 20.0}, r"in `depth`, got 20\.0$"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match) as caught:
        CIFARResNet(**{"depth": 20, **kwargs})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rank": "2"}, r"`rank`, got '2' in conv1$"),
        ({"rank": 2, "num_classes": "10"}, r"`num_classes`, got '10'$"),
        ({"rank": 2, "num_classes": 2.5}, r"`num_classes`, got 2\.5$"),
        (
            {"rank": 2, "tensorization": {64: 64}},
            r"list of ints in `tensorization` for 64 channels.* in layer3\.0\.conv1$",
        ),
    ],
)
def test_arguments_of_another_type(kwargs, match):
    with pytest.raises(TypeError, match=match):
        CIFARResNet(20, factorization="tr", **kwargs)
