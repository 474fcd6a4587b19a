"""The row of an embedding at ``padding_idx``, which torch reads as it is and does not train."""

import copy

import pytest
import torch
from torch import nn

from tenzoo.compression import apply_, fold_, plan, restore_
from tenzoo.layers import TensorizedEmbedding
from tests.factorizations.formats import NAMES

INDEX = torch.tensor([[3, 1, 1, 7], [1, 0, 12, 1]])


@pytest.fixture
def pretrained():
    torch.manual_seed(0)
    return nn.Embedding.from_pretrained(torch.randn(13, 6, dtype=torch.float64), padding_idx=1, freeze=False)


def like(dense, name, **kwargs):
    return TensorizedEmbedding.from_dense(dense, factorization=name, rank=10_000, **kwargs)


@pytest.mark.parametrize("implementation", ["reconstruct", "contract"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_not_zero_is_read_and_gives_no_gradient(pretrained, name, implementation):
    layer = like(pretrained, name, implementation=implementation)
    torch.testing.assert_close(layer(INDEX), pretrained(INDEX), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.dense_weight(), pretrained.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.to_dense().weight, pretrained.weight, rtol=1e-9, atol=1e-9)
    layer(INDEX).square().sum().backward()
    grads = [core.grad.clone() for core in layer.factorization.cores]
    layer.zero_grad()
    layer(INDEX[INDEX != 1]).square().sum().backward()
    torch.testing.assert_close(grads, [core.grad for core in layer.factorization.cores])
    with torch.no_grad():
        for core in layer.factorization.cores:
            core.mul_(2)
    assert layer(INDEX)[INDEX == 1].equal(pretrained(INDEX)[INDEX == 1])


@pytest.mark.parametrize("name", NAMES)
def test_no_rank_is_spent_on_the_padding(name):
    rows = torch.randn(13, 1, dtype=torch.float64) @ torch.randn(1, 6, dtype=torch.float64)
    rows[1] = 100 * torch.randn(6, dtype=torch.float64)
    dense = nn.Embedding.from_pretrained(rows, padding_idx=1)
    layer = TensorizedEmbedding.from_dense(dense, factorization=name, rank=1, tensorization=((13,), (6,)))
    torch.testing.assert_close(layer.dense_weight(), rows, rtol=1e-9, atol=1e-9)


def test_a_fresh_row_is_zero_and_a_state_dict_brings_its_own(pretrained):
    fresh = TensorizedEmbedding(13, 6, padding_idx=1, factorization="tt", rank=2, dtype=torch.float64)
    assert not fresh(INDEX)[INDEX == 1].any()
    made = TensorizedEmbedding.from_dense(pretrained, factorization="tt", rank=2)
    fresh.load_state_dict(made.state_dict())
    assert fresh(INDEX).equal(made(INDEX))
    without = {name: value for name, value in made.state_dict().items() if "padding" not in name}
    fresh.load_state_dict(without)
    assert not fresh(INDEX)[INDEX == 1].any()
    fresh.padding_row.fill_(1)
    fresh.reset_parameters()
    assert not fresh(INDEX)[INDEX == 1].any()


class Bag(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.emb = nn.Embedding.from_pretrained(rows, padding_idx=1, freeze=False)
        self.fc = nn.Linear(32, 3)

    def forward(self, index):
        return self.fc(self.emb(index).detach().mean(1))  # without gradients, all look-ups count alike


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_keeps_its_promises(name, zero):
    torch.manual_seed(0)
    rows = torch.randn(60, 32)
    rows[1] *= not zero
    model, index = Bag(rows), torch.randint(0, 60, (40, 12))
    index[:, 6:] = 1
    made = plan(model, factorization=name, ranks={"emb": 3}, calibration=index)
    small = apply_(copy.deepcopy(model), made, calibration=index)
    held = index[30:]
    with torch.no_grad():
        expected = model(held)
        error = torch.dist(small(held), expected) / expected.norm()
        torch.testing.assert_close(float(error), made.output_error, rtol=1e-3, atol=1e-6)
        counted = (torch.arange(60) != 1).float()  # the row of the padding is kept as it is
        if made.keeps == "outputs":  # the rows count by how often they are looked up
            numbers = torch.bincount(index[:30].flatten(), minlength=60) * counted
            counted = counted * (numbers / numbers.mean() + 0.5).sqrt()
        off = torch.dist(small.emb.dense_weight() * counted[:, None], rows * counted[:, None])
        off /= (rows * counted[:, None]).norm()
        torch.testing.assert_close(float(off), made.layers[0].error, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(restore_(Bag(torch.zeros(60, 32)), made, small.state_dict())(held), small(held))
        torch.testing.assert_close(fold_(copy.deepcopy(small))(held), small(held))


def test_cores_of_another_precision_keep_theirs(pretrained):
    layer = TensorizedEmbedding.from_dense(pretrained, factorization="tt", rank=2)
    layer.factorization.bfloat16()  # as where buffers keep their precision, and parameters do not
    assert layer(INDEX).dtype == layer.dense_weight().dtype == torch.bfloat16
    torch.testing.assert_close(layer(INDEX)[0, 1], pretrained.weight[1].bfloat16())
