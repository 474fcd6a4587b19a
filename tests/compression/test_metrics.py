"""Metrics: a change of a weight is as large in them as the change of the model's outputs."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tenzoo.compression import metrics
from tenzoo.compression.calls import Call
from tenzoo.compression.metrics import output_metrics
from tenzoo.factorizations import factorization_class
from tenzoo.factorizations.decomposition import multiply_modes
from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedEmbeddingBag, TensorizedLinear
from tenzoo.layers.tensorization import whole_modes

KINDS = {
    nn.Linear: TensorizedLinear,
    nn.Conv2d: TensorizedConv2d,
    nn.Embedding: TensorizedEmbedding,
    nn.EmbeddingBag: TensorizedEmbeddingBag,
}


def metrics_of(model, *inputs, factorization="tt"):
    """The metrics of whole modes, if the format has them."""
    layers = {}
    for name, module in model.named_modules():
        if type(module) in KINDS:
            kind = KINDS[type(module)]
            modes = whole_modes(factorization_class(factorization), kind.sides(module), None)
            layers[name] = kind.empty_like(module, factorization=factorization, rank=1, tensorization=modes)
    return output_metrics(model, layers, [Call((x,), {}) for x in inputs])


def size_of(change, roots):
    return float(multiply_modes(change, roots).norm())


def moved(model, weight, change, x):
    with torch.no_grad():
        before = model(x)
        weight += change
        distance = float((model(x) - before).norm())
        weight -= change
    return distance


@pytest.fixture
def exact(monkeypatch):
    """Without what is added to the moments."""
    monkeypatch.setattr(metrics, "_RIDGE", 0.0)
    monkeypatch.setattr(metrics, "_UNSEEN", 0.0)


@pytest.mark.parametrize("layer", [0, 1])
def test_one_row_and_one_output(layer, exact):
    """Then the approximation by a Kronecker product is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)).double()
    x = torch.randn(1, 6, dtype=torch.float64)
    roots, weight = metrics_of(model, x)[str(layer)], model[layer].weight
    ratios = []
    for _ in range(5):
        change = torch.randn_like(weight)
        ratios.append(moved(model, weight, change, x) / size_of(change, roots))
    assert ratios == pytest.approx([ratios[0]] * 5, rel=1e-5)


def test_a_direction_that_the_outputs_do_not_see(exact):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        model[1].weight[:, 2] = 0
    roots = metrics_of(model, torch.randn(40, 6, dtype=torch.float64))["0"]
    change = torch.zeros(5, 6, dtype=torch.float64)
    change[2] = 1.0
    assert size_of(change, roots) < 1e-6 < 0.1 < size_of(change.roll(1, 0), roots)


def test_rows_count_by_their_gradients(exact):
    """Rows that are masked do not count, whatever is in them."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x):
            return self.layer(x) * (x[..., :1] > 0)

    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(8, 7, 6, dtype=torch.float64)
    x[..., 0] = x[..., 0].abs()
    x[:, 4:, 0] *= -1
    one = metrics_of(model, x)["layer"]
    x[:, 4:, 1:] = 100 * torch.randn(8, 3, 5, dtype=torch.float64)
    other = metrics_of(model, x)["layer"]
    assert sorted(one) == [0, 1]
    torch.testing.assert_close(one, other)


def test_rows_of_a_table_count_by_their_gradients(exact):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def forward(self, index):
            return self.table(index) * torch.tensor([1.0, 2.0, 3.0, 0.0])[index].unsqueeze(-1)

    index = torch.tensor([[0, 0], [0, 1], [2, 3]])
    rows = metrics_of(Weighted(), index)["table"][0]
    torch.testing.assert_close(rows, torch.tensor([3.0, 4.0, 9.0, 0.0], dtype=torch.float64).div(4).sqrt())


def test_a_table_under_a_factorization_of_its_rows():
    """The diagonals of the factors are sums over the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 2))
    roots = metrics_of(model, torch.randint(0, 12, (5, 4)), factorization="btt")["0"]
    layer = TensorizedEmbedding.empty_like(model[0], factorization="btt", rank=1)
    rows = layer.tensorization[0]
    assert [root.shape for mode, root in sorted(roots.items())][: len(rows)] == [(size,) for size in rows]
    assert sorted(roots) == list(range(len(layer.factorization.shape)))


class Checkpointed(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.settings = nn.Linear(6, 5), nn.Linear(5, 4), settings

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return checkpoint(self.second, x, **self.settings) if self.settings else self.second(x)


def test_a_checkpoint_in_the_model():
    x = torch.randn(20, 6)
    found, expected = metrics_of(Checkpointed(use_reentrant=False), x), metrics_of(Checkpointed(), x)
    assert {name: sorted(roots) for name, roots in found.items()} == {"first": [0, 1], "second": [0, 1]}
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_checkpoint_that_gives_no_gradients(caplog):
    found = metrics_of(Checkpointed(use_reentrant=True), torch.randn(20, 6))
    assert {name: sorted(roots) for name, roots in found.items()} == {"first": [1], "second": [1]}
    assert "have no gradients" in caplog.text


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Quiet(nn.Module):
    def __init__(self, context):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.context = nn.Linear(6, 5), context

    def forward(self, x):
        with self.context():
            return self.layer(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_inputs_alone_count(context, exact):
    torch.manual_seed(1)
    x = torch.randn(40, 6)
    roots = metrics_of(Quiet(context), x)["layer"]
    assert sorted(roots) == [1]
    second = (x.double().t() @ x.double()) / x.double().square().sum() * 6
    torch.testing.assert_close(roots[1] @ roots[1], second, atol=1e-5, rtol=1e-5)


def test_a_layer_that_no_gradient_reaches_beside_one_that_it_reaches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), Detached(), nn.Linear(5, 4))
    found = metrics_of(model, torch.randn(40, 6))
    assert {name: sorted(roots) for name, roots in found.items()} == {"0": [1], "2": [0, 1]}


@pytest.mark.parametrize("factor", [1e-18, 1e18])
def test_the_unit_of_the_outputs_does_not_matter(factor):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.factor = nn.Conv2d(3, 4, 3), factor

        def forward(self, x):
            return self.layer(x) * self.factor

    x = torch.randn(20, 3, 5, 5)
    one, other = (metrics_of(Scaled(scale), x)["layer"] for scale in (1.0, factor))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_frozen_weights_and_layers_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 6).double()

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    x = torch.randn(40, 6, dtype=torch.float64)
    one = metrics_of(Twice(), x)
    other = metrics_of(Twice().requires_grad_(False), x)
    torch.testing.assert_close(one, other)
    assert sorted(one["layer"]) == [0, 1]


def test_grouped_convolutions_and_bags_have_metrics_of_their_inputs():
    torch.manual_seed(0)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 2))
    assert sorted(metrics_of(grouped, torch.randn(6, 4, 5, 5))["0"]) == [1, 2]
    bag = nn.Sequential(nn.EmbeddingBag(9, 6), nn.Linear(6, 2))
    assert sorted(metrics_of(bag, torch.randint(0, 9, (5, 4)))["0"]) == [0]


def test_in_place_operations_on_the_outputs_of_layers():
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 2, 3)) for inplace in (True, False))
    other.load_state_dict(one.state_dict())
    x = torch.randn(20, 3, 7, 7)
    torch.testing.assert_close(metrics_of(one, x), metrics_of(other, x))
