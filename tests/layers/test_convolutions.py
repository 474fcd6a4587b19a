"""Convolutions of one to three dimensions and transposed ones: against torch's layer with the dense kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenzoo import layers
from tenzoo.layers import TensorizedConv2d, TensorizedConvTranspose2d, TensorizedLayer
from tests.factorizations.formats import NAMES
from tests.factorizations.test_networks import equations

KINDS = {
    "Conv1d": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    "Conv2d": {"kernel_size": (3, 2), "stride": (2, 1), "padding": "valid"},
    "Conv3d": {"kernel_size": (2, 3, 1), "padding": (1, 0, 1), "padding_mode": "circular"},
    "ConvTranspose1d": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "ConvTranspose2d": {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)},
    "ConvTranspose3d": {"kernel_size": (2, 3, 1), "stride": 3, "output_padding": (0, 1, 2)},
}
PIXELS = {name: {"kernel_size": 1, "stride": 2} for name in KINDS}


def make(name, arguments, **more):
    torch.manual_seed(0)
    kind = getattr(layers, f"Tensorized{name}")
    return kind(8, 12, **arguments, rank=2, dtype=torch.float64, **more), torch.randn(
        2, 8, *(6, 5, 4)[: int(name[-2])]
    ).double()


def agrees(layer: TensorizedLayer, x: torch.Tensor) -> None:
    """The same by each implementation, with a batch and without, and by torch's layer; and so are the gradients."""
    dense = layer.to_dense()
    assert type(dense) is layer.dense_class
    assert isinstance(layer, layer.dense_class)
    torch.testing.assert_close(layer.weight, dense.weight.detach(), check_stride=False)
    y = dense(x)
    cotangent = torch.randn_like(y)
    grads = {}
    for layer.implementation in ("reconstruct", "contract"):
        torch.testing.assert_close(layer(x), y)
        torch.testing.assert_close(layer(x[0]), y[0])
        assert layer(x[:0]).shape == (0, *y.shape[1:])
        grads[layer.implementation] = torch.autograd.grad(layer(x), list(layer.parameters()), cotangent)
    torch.testing.assert_close(grads["contract"], grads["reconstruct"])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", ["pixels", "kernels"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_torchs_layer_with_the_kernel(name, kind, kernel, groups):
    arguments = (KINDS if kernel == "kernels" else PIXELS)[kind]
    agrees(*make(kind, arguments, factorization=name, groups=groups))


@settings(deadline=None, max_examples=40)
@given(equations(3), st.sampled_from(sorted(KINDS)), st.sampled_from([1, 2]))
def test_any_network(equation, kind, groups):
    agrees(*make(kind, KINDS[kind], factorization=equation, groups=groups))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_rank_gives_the_dense_layer_back(kind):
    torch.manual_seed(0)
    dense = getattr(nn, kind)(4, 6, **KINDS[kind], dtype=torch.float64)
    made = getattr(layers, f"Tensorized{kind}").from_dense(dense, factorization="tt", rank=1000)
    torch.testing.assert_close(made.to_dense().weight, dense.weight)
    torch.testing.assert_close(made.weight.detach(), dense.weight.detach(), check_stride=False)
    assert type(made)._arguments(made) == type(made)._arguments(dense)
    assert str(made).startswith(f"Tensorized{kind}(\n  4, 6, kernel_size=")


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_costs_are_those_of_the_output(kind):
    layer, x = make(kind, KINDS[kind], factorization="cp")
    y = layer(x)
    assert layer.positions(x).outputs == y.numel() // y.shape[1]
    dense = layer.costs.dense.at(layer.positions(x)).multiplications
    torchs = layer.to_dense()
    counted = torch.utils.flop_counter.FlopCounterMode(display=False)
    with counted:
        torchs(x)
    assert dense == pytest.approx(counted.get_total_flops() / 2, rel=0.02)


def test_an_output_size_is_that_of_torch():
    layer, x = make("ConvTranspose2d", {"kernel_size": 3, "stride": 2}, factorization="tr")
    for layer.implementation in ("reconstruct", "contract"):
        y = layer(x, output_size=[14, 12])
        torch.testing.assert_close(y, layer.to_dense()(x, output_size=[14, 12]))
        with pytest.raises(ValueError, match="requested an output size"):
            layer(x, output_size=[99, 12])


def test_the_variance_of_the_output_is_that_of_the_input():
    """Kaiming's variance is twice that of the input; an output of a transposed convolution sums fewer products."""
    torch.manual_seed(0)
    x = torch.randn(8, 64, 16, 16)
    for kind, stride in ((TensorizedConv2d, 1), (TensorizedConvTranspose2d, 1), (TensorizedConvTranspose2d, 2)):
        variances = [
            float(
                kind(64, 64, 4, stride=stride, bias=False, factorization="tr", rank=8)(x)[..., 4:-4, 4:-4]
                .detach()
                .var()
            )
            for _ in range(20)
        ]
        assert 1.4 < sum(variances) / len(variances) < 2.6


def test_channels_last_stays_so():
    layer, x = make("ConvTranspose2d", {"kernel_size": 3, "stride": 2}, factorization="tt")
    x = x.to(memory_format=torch.channels_last)
    for layer.implementation in ("reconstruct", "contract"):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
