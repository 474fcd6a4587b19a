"""What only an accelerator would notice, seen on a stand-in."""

import pytest
import torch

from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tests.accelerator import Calls, fake_cuda
from tests.factorizations.formats import NAMES

SHAPES = [(6, 5, 4, 8), (5, 4, 6, 7, 3, 2)]
EMBEDDINGS = [None, ((4, 4, 4), (2, 3)), ((1, 60), (3, 2)), ((60, 1), (1, 6))]


@pytest.mark.parametrize("rank", [1, 20])
@pytest.mark.parametrize("name", NAMES)
def test_formats_make_no_batches_of_outer_products(name, rank):
    """Torch on CUDA computes those by Triton, which takes a C compiler at run time."""
    with fake_cuda() as device, Calls() as calls:
        for shape in SHAPES:
            weight = FACTORIZATIONS[name](shape, rank, device=device)
            weight.entries(torch.zeros(9, len(shape), dtype=torch.int64, device=device))
            weight.reconstruct()
    assert calls.seen
    assert calls.outer_products() == []


@pytest.mark.parametrize("rank", [1, 20])
@pytest.mark.parametrize("name", NAMES)
def test_layers_make_no_batches_of_outer_products(name, rank):
    with fake_cuda() as device, Calls() as calls:
        for implementation in ("contract", "reconstruct"):
            kind = {"factorization": name, "rank": rank, "implementation": implementation, "device": device}
            TensorizedLinear(24, 32, **kind)(torch.zeros(5, 3, 24, device=device))
            for channels, groups, kernel in ((8, 1, 3), (8, 2, 1), (8, 8, 3), (1, 1, 3)):
                layer = TensorizedConv2d(channels, 8, kernel, groups=groups, **kind)
                layer(torch.zeros(2, channels, 5, 5, device=device))
            for tensorization in EMBEDDINGS:
                layer = TensorizedEmbedding(60, 6, tensorization=tensorization, **kind)
                layer(torch.zeros(4, 3, dtype=torch.int64, device=device))
    assert calls.seen
    assert calls.outer_products() == []
