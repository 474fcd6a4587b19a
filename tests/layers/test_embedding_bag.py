"""Embedding bags: against torch's layer with the dense table."""

import copy
import io
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tenzoo.compression import apply_, export, fold_, plan
from tenzoo.layers import TensorizedEmbedding, TensorizedEmbeddingBag
from tests.conformance import CoreProviderConformance
from tests.factorizations.formats import NAMES, dense_oracle
from tests.factorizations.test_networks import conforms, equations

MODES = ["sum", "mean", "max"]
FLAT = torch.tensor([0, 10, 3, 5, 10, 2, 5])
OFFSETS = torch.tensor([0, 3, 3, 6])


def bag(name: str = "tt", **kwargs: Any) -> TensorizedEmbeddingBag:
    return TensorizedEmbeddingBag(
        11, 6, **{"tensorization": [[3, 4], [3, 2]], "rank": 2, "dtype": torch.float64, **kwargs}, factorization=name
    )


def calls(layer: TensorizedEmbeddingBag) -> list[tuple[Tensor | None, ...]]:
    """All kinds of arguments: a matrix, and a vector with offsets, some bags empty; with factors of rows or without."""
    offsets = torch.cat([OFFSETS, torch.tensor([7])]) if layer.include_last_offset else OFFSETS
    found: list[tuple[Tensor | None, ...]] = [(FLAT[:6].view(2, 3),), (FLAT, offsets), (FLAT[:0], offsets[:1] * 0)]
    if layer.mode == "sum":
        found += [(FLAT, offsets, torch.rand(7).double()), (FLAT[:6].view(3, 2), None, torch.rand(3, 2).double())]
    return found


def agrees(layer: TensorizedEmbeddingBag) -> None:
    """The same by each implementation and by torch's layer; and so are the gradients."""
    dense = layer.to_dense()
    assert type(dense) is nn.EmbeddingBag
    assert isinstance(layer, nn.EmbeddingBag)
    torch.testing.assert_close(layer.weight, dense.weight.detach(), check_stride=False)
    for arguments in calls(layer):
        y = dense(*arguments)
        cotangent = torch.randn_like(y)
        (wanted,) = torch.autograd.grad(y, dense.weight, cotangent)
        # torch gives no gradient to the padding, and a layer with cores none to it either
        expected = torch.autograd.grad(layer.weight, list(layer.parameters()), wanted)
        for layer.implementation in ("reconstruct", "contract"):
            torch.testing.assert_close(layer(*arguments), y)
            grads = torch.autograd.grad(layer(*arguments), list(layer.parameters()), cotangent)
            torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("padding_idx", [None, 5, -1])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_torchs_layer_with_the_table(name, mode, last, padding_idx):
    torch.manual_seed(0)
    agrees(bag(name, mode=mode, include_last_offset=last, padding_idx=padding_idx))


@settings(deadline=None, max_examples=40)
@given(equations(), st.sampled_from(MODES), st.booleans(), st.sampled_from([None, 5]))
def test_any_network(equation, mode, last, padding_idx):
    torch.manual_seed(0)
    agrees(bag(equation, tensorization=None, mode=mode, include_last_offset=last, padding_idx=padding_idx))


class BagConformance(CoreProviderConformance):
    name: ClassVar[str]
    implementation: ClassVar[Any]

    def make(self) -> nn.Module:
        return bag(self.name, mode="sum", padding_idx=5, implementation=self.implementation)

    def output(self, provider: nn.Module) -> Tensor:
        return provider(FLAT, OFFSETS)

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        table = dense_oracle(self.name, list(parameters.values())).reshape(12, 6)
        bags = [[0, 10, 3], [], [10, 2], []]  # without the row of the padding
        return torch.stack([table[rows].sum(0) for rows in bags])


@pytest.mark.parametrize("implementation", ["reconstruct", "contract"])
@pytest.mark.parametrize("name", NAMES)
def test_the_conformance_suite(name, implementation):
    conforms(BagConformance, name=name, implementation=implementation)


def test_a_full_rank_gives_the_dense_layer_back():
    torch.manual_seed(0)
    dense = nn.EmbeddingBag(12, 6, mode="max", padding_idx=3, include_last_offset=True, dtype=torch.float64)
    made = TensorizedEmbeddingBag.from_dense(dense, factorization="tt", rank=1000)
    torch.testing.assert_close(made.to_dense().weight, dense.weight)
    assert type(made)._arguments(made) == type(made)._arguments(dense)
    expected = "TensorizedEmbeddingBag(\n  12, 6, padding_idx=3, mode='max', implementation=auto"
    assert str(made).startswith(expected)
    stored = io.BytesIO()
    torch.save(made.state_dict(), stored)
    stored.seek(0)
    other = TensorizedEmbeddingBag.empty_like(dense, factorization="tt", rank=made.factorization.rank).to_empty(
        device="cpu"
    )
    other.load_state_dict(torch.load(stored))
    torch.testing.assert_close(other(FLAT, torch.tensor([0, 7])), dense(FLAT, torch.tensor([0, 7])))


@pytest.mark.parametrize("argument", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_what_needs_a_row_of_its_own_is_refused(argument):
    dense = nn.EmbeddingBag(4, 4, mode="sum", **{argument: 1.0 if argument == "max_norm" else True})
    with pytest.raises(ValueError, match=f"without `{argument}`"):
        TensorizedEmbeddingBag.from_dense(dense, factorization="tt", rank=2)
    found = plan(nn.Sequential(dense, nn.Linear(40, 40)), factorization="tt", budget=0.5)
    assert "has max_norm, scale_grad_by_freq or sparse gradients" in str(found)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"one of \['max', 'mean', 'sum'\] in `mode`, got 'median'"):
        bag(mode="median")
    with pytest.raises(ValueError, match="`padding_idx`, got 11"):
        bag(padding_idx=11)
    with pytest.raises(ValueError, match="`num_embeddings`, got 0"):
        TensorizedEmbeddingBag(0, 4, factorization="tt", rank=2)
    with pytest.raises(IndexError, match="0 to 10 in `index`"):
        bag()(torch.tensor([[3, 11]]))
    with pytest.raises(ValueError, match="offsets has to be a 1D Tensor"):
        bag()(FLAT)
    for implementation in ("reconstruct", "contract"):
        for padding_idx in (None, 5):
            layer = bag(mode="max", implementation=implementation, padding_idx=padding_idx)
            with pytest.raises(NotImplementedError, match="per_sample_weights"):
                layer(FLAT, OFFSETS, torch.rand(7).double())
    with pytest.raises(TypeError, match=r"torch.nn.EmbeddingBag in `layer`, got a Embedding"):
        TensorizedEmbeddingBag.from_dense(nn.Embedding(4, 4), factorization="tt", rank=2)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", ["auto", "reconstruct", "contract"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_and_exports(mode, implementation):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = bag(mode=mode, padding_idx=5, implementation=implementation)
    x = FLAT[:6].view(3, 2)
    for arguments in ((x,), (FLAT, OFFSETS)):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: batch},))
    many = torch.cat([x] * 50)
    torch.testing.assert_close(program.module()(many), layer(many))


@pytest.mark.parametrize("implementation", ["reconstruct", "contract"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype, implementation):
    torch.manual_seed(0)
    layer = bag(dtype=torch.float32, implementation=implementation)
    expected = layer(FLAT, OFFSETS)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(layer(FLAT, OFFSETS), expected)
    y = copy.deepcopy(layer).to(dtype)(FLAT, OFFSETS)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_either_type_of_index(dtype):
    for implementation in ("reconstruct", "contract"):
        layer = bag(implementation=implementation, padding_idx=5)
        torch.testing.assert_close(
            layer(FLAT.to(dtype), OFFSETS.to(dtype)), layer.to_dense()(FLAT.to(dtype), OFFSETS.to(dtype))
        )


def test_the_rows_are_those_of_an_embedding():
    torch.manual_seed(0)
    layer = bag(mode="sum")
    table = TensorizedEmbedding(11, 6, tensorization=[[3, 4], [3, 2]], factorization="tt", rank=2, dtype=torch.float64)
    table.load_state_dict(layer.state_dict())
    index = FLAT[:6].view(2, 3)
    torch.testing.assert_close(layer(index), table(index).sum(1))


class Words(nn.Module):
    """A classifier of bags of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(300, 48, mode="mean", padding_idx=0), nn.Linear(48, 20)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.words(index))


@pytest.mark.slow
def test_it_is_planned_applied_folded_and_exported(tmp_path):
    torch.manual_seed(0)
    model, index = Words().eval(), torch.randint(0, 300, (8, 5))
    with torch.no_grad():  # of low rank, so that a plan finds one
        low = TensorizedEmbeddingBag(300, 48, padding_idx=0, factorization="tt", rank=4)
        model.words.weight.copy_(low.weight)
    dense = copy.deepcopy(model)
    found = plan(model, factorization="tt", budget=0.5, example_input=index)
    assert "words" in str(found)
    apply_(model, found)
    assert type(model.words) is TensorizedEmbeddingBag
    torch.testing.assert_close(model(index), dense(index), rtol=1e-2, atol=1e-2)
    expected = model(index)
    for kind in ("pt2", "onnx"):  # each file runs on the example and on other batches
        for factors in (False, True):
            export(model, tmp_path / f"{factors}.{kind}", index, factors=factors)
    folded = fold_(copy.deepcopy(model))
    assert type(folded.words) is nn.EmbeddingBag
    torch.testing.assert_close(folded(index), expected)


@pytest.mark.parametrize("implementation", ["contract", "reconstruct"])
def test_a_mean_without_padding_has_the_precision_of_the_table(implementation):
    layer = bag(mode="mean", padding_idx=0, implementation=implementation)
    index = torch.tensor([[0, 1, 2, 3, 4, 5, 6]])
    torch.testing.assert_close(layer(index), layer.to_dense()(index), rtol=1e-14, atol=1e-15)
