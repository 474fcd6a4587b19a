"""The same cores in other libraries' layers give the same output."""

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterator, Sequence

import pytest
import tensorly as tl
import torch
from torch import Tensor, nn

from tenzoo.layers import TensorizedConv2d, TensorizedLayer, TensorizedLinear

WAYS = ["reconstruct", "contract"]


@pytest.fixture
def tltorch() -> Iterator:
    """TensorLy computes with torch meanwhile, as the import of tltorch sets it."""
    backend = tl.get_backend()
    pytest.importorskip("opt_einsum", reason="tltorch needs opt_einsum; pip install 'tenzoo[tltorch]'")
    library = pytest.importorskip("tltorch", reason="a peer to compare with; pip install 'tenzoo[tltorch]'")
    tl.set_backend("pytorch")
    yield library
    tl.set_backend(backend)


@pytest.fixture
def tednet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in its docstrings, when they are compiled
        return pytest.importorskip(
            "tednet.tnn.tensor_ring", reason="a peer to compare with; pip install 'tenzoo[bench]'"
        )


def randomize_(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@torch.no_grad()
def give_cores(layer: TensorizedLayer, cores: Sequence[Tensor], bias: Tensor) -> None:
    for own, core in zip(layer.factorization.cores, cores, strict=True):
        assert own.shape == core.shape
        own.copy_(core)
    layer.bias.copy_(bias)


def khatri_rao(first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("ir,jr->ijr", first, second).flatten(0, 1)


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("ia,jb->ijab", first, second).flatten(2).flatten(0, 1)


# --- tltorch ----------------------------------------------------------------------------------------------------------


def cores_of_conv(name: str, weight: nn.Module) -> list[Tensor]:
    """Theirs, of a kernel ``(out, in, k_h, k_w)``, as ours, of ``(out, k_h k_w, in)``.

    Their chain is ``(in, k_h, k_w, out)``: it is read backwards, so its cores are transposed.
    """
    factors = list(weight.factors)
    match name:
        case "cp":
            out, in_, high, wide = factors
            return [out * weight.weights, khatri_rao(high, wide), in_]
        case "tucker":
            out, in_, high, wide = factors
            core = weight.core.permute(0, 2, 3, 1).flatten(1, 2)
            return [core, out, kronecker(high, wide), in_]
        case "tt":
            in_, high, wide, out = factors
            kernel = torch.einsum("aib,bjc->aijc", high, wide).flatten(1, 2)
            return [core.permute(2, 1, 0) for core in (out, kernel, in_)]
    raise AssertionError(name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("their_way", ["factorized", "reconstructed"])
@pytest.mark.parametrize(
    ("name", "their_rank", "rank"),
    [("cp", 4, 4), ("tucker", [3, 4, 2, 3], [3, 6, 4]), ("tt", [1, 4, 5, 3, 1], [3, 4])],
)
def test_convolution_of_tltorch(tltorch, name, their_rank, rank, their_way, way):
    arguments = {"stride": 2, "padding": 1, "bias": True}
    theirs = tltorch.FactorizedConv(
        6, 8, (3, 3), **arguments, factorization=name, rank=their_rank, implementation=their_way, dtype=torch.float64
    )
    randomize_(theirs)
    ours = TensorizedConv2d(
        6, 8, 3, **arguments, factorization=name, rank=rank, implementation=way, dtype=torch.float64
    )
    give_cores(ours, cores_of_conv(name, theirs.weight), theirs.bias)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("their_way", ["factorized", "reconstructed"])
@pytest.mark.parametrize(
    ("name", "their_name", "rank"),
    [("cp", "cp", 4), ("tucker", "tucker", [2, 3, 4, 2]), ("btt", "blocktt", 3)],
)
def test_linear_layer_of_tltorch(tltorch, name, their_name, rank, their_way, way):
    in_, out = (4, 3), (2, 5)
    theirs = tltorch.FactorizedLinear(
        in_,
        out,
        factorization=their_name,
        rank=[1, rank, 1] if name == "btt" else rank,
        implementation=their_way,
        dtype=torch.float64,
    )
    randomize_(theirs)
    ours = TensorizedLinear(
        12, 10, factorization=name, rank=rank, tensorization=[out, in_], implementation=way, dtype=torch.float64
    )
    weight = theirs.weight
    match name:
        case "cp":
            first, *others = weight.factors
            cores = [first * weight.weights, *others]
        case "tucker":
            cores = [weight.core, *weight.factors]
        case "btt":
            cores = list(weight.factors)
    give_cores(ours, cores, theirs.bias)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


# --- TedNet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_ring_convolution_of_tednet(tednet, way):
    """Its ring is (*in, kernel, *out): ours backwards, with transposed cores, so that the factors of a size are turned.

    The channels are put into the other order on the way in and out.
    """
    in_, out, ranks = [3, 2], [2, 4, 3], [2, 3, 4, 5, 3, 2]
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = tednet.TRConv2D(in_, out, ranks, 3, stride=2, padding=1, bias=True)
    randomize_(theirs.double())
    chain = [
        *(getattr(theirs, f"in_node{k}") for k in range(len(in_))),
        theirs.kernel.weight.flatten(2).permute(1, 2, 0),
        *(getattr(theirs, f"out_node{k}") for k in range(len(out))),
    ]
    backwards = [core.permute(2, 1, 0) for core in chain[::-1]]
    ours = TensorizedConv2d(
        6,
        24,
        3,
        stride=2,
        padding=1,
        factorization="tr",
        rank=[core.shape[0] for core in backwards],
        tensorization=[out[::-1], in_[::-1]],
        implementation=way,
        dtype=torch.float64,
    )
    give_cores(ours, backwards, turned(theirs.bias, out, dim=0))
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    y = ours(turned(x, in_, dim=1))
    torch.testing.assert_close(turned(y, out[::-1], dim=1), theirs(x))


def turned(tensor: Tensor, factors: Sequence[int], dim: int) -> Tensor:
    """A dimension of channels, numbered by its factors, numbered by them in reverse."""
    end = dim + len(factors)
    order = [*range(dim), *range(dim, end)[::-1], *range(end, end + tensor.ndim - dim - 1)]
    return tensor.unflatten(dim, factors).permute(order).flatten(dim, dim + len(factors) - 1)


def test_channels_are_turned():
    expected = [3 * first + second for second, first in itertools.product(range(3), range(2))]
    assert turned(torch.arange(6), [2, 3], dim=0).tolist() == expected
