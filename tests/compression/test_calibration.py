"""Calibration data: what they make better, and that the model does not notice them."""

import copy

import pytest
import torch
from torch import nn

from tenzoo.compression import Plan, apply_, plan
from tenzoo.compression.calls import Call
from tenzoo.compression.metrics import output_metrics
from tenzoo.compression.outputs import sensitivities
from tests.compression.test_plan import IMAGES, network
from tests.factorizations.formats import NAMES


def conv_and_linear(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, **kwargs), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 6)).double()


def varied(number=16):
    """Images that vary much more in some channels than in others."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, 4, dtype=torch.float64, generator=generator) * torch.tensor([3.0, 1.0, 0.1, 0.01])
    return torch.einsum("ij,njhw->nihw", mixed, torch.randn(number, 4, 8, 8, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("factor", [1e20, 1e-25])
@pytest.mark.parametrize("factorization", ["tt", "cp"])
def test_the_unit_of_the_inputs_does_not_matter(factorization, factor):
    """In float32, where squares of such numbers overflow or vanish."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 36, 6, bias=False))
    images = varied().float()
    one, other = (
        plan(model, factorization=factorization, budget=0.5, calibration=scale * images) for scale in (1.0, factor)
    )
    assert [layer.rank for layer in one.layers] == [layer.rank for layer in other.layers]
    assert one.keeps == other.keeps
    assert other.output_error == pytest.approx(one.output_error, rel=1e-2)


@pytest.mark.parametrize("factorization", NAMES)
def test_calibration_makes_the_outputs_better_and_the_weights_worse(factorization):
    model, images = conv_and_linear(padding=1), varied()
    ranks = {"0": 3 if factorization != "cp" else 5}
    made = {}
    for calibration in (None, images):
        chosen = plan(model, factorization=factorization, ranks=ranks, calibration=calibration)
        made[calibration is not None] = apply_(copy.deepcopy(model), chosen, calibration=calibration)
    fresh = varied(32)[16:]
    with torch.no_grad():
        outputs = {aware: (small[0](fresh) - model[0](fresh)).norm() for aware, small in made.items()}
        weights = {aware: (small[0].dense_weight() - model[0].weight).norm() for aware, small in made.items()}
    assert outputs[True] < 0.9 * outputs[False]
    assert weights[False] < weights[True]


def test_the_error_of_a_calibrated_linear_layer_is_that_of_its_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=False)).double()
    inputs = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    made = plan(model, factorization="tt", ranks=4, calibration=inputs)
    small = apply_(copy.deepcopy(model), made, calibration=inputs)
    with torch.no_grad():
        outputs = model(inputs)
        actual = float((small(inputs) - outputs).norm() / outputs.norm())
        least = float(torch.linalg.svdvals(outputs)[4:].norm() / outputs.norm())  # no rank-4 map comes closer
    assert made.layers[0].error == pytest.approx(actual, rel=0.05)
    assert least <= actual <= 1.05 * least


def test_a_plan_made_with_calibration_data_needs_them(tmp_path):
    model, images = conv_and_linear(padding=1), varied()
    aware = plan(model, factorization="tt", ranks=2, calibration=images)
    with pytest.raises(ValueError, match="`calibration` data as in `plan`, which was made with them, got none"):
        apply_(model, aware)
    plain = plan(model, factorization="tt", ranks=2)
    with pytest.raises(ValueError, match="which was made without them, got some"):
        apply_(model, plain, calibration=images)
    aware.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").data_aware


def test_sensitivity_is_the_change_of_the_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Dropout(0.5), nn.Linear(5, 4, bias=False)).double()
    inputs, change = torch.randn(30, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        first, second = model[0].weight.clone(), model[2].weight.clone()
        moved = inputs @ change.t() @ second.t()
        outputs = inputs @ first.t() @ second.t()
    found = sensitivities(model, {"0.weight": (lambda: first + change, 0.25)}, [Call((inputs,), {})])
    assert found == {"0.weight": pytest.approx(float(moved.square().sum() / outputs.square().sum()) / 0.25)}
    assert model.training
    assert model[0].weight.equal(first)


def test_a_layer_that_hardly_matters_gets_few_parameters():
    class TwoPaths(nn.Module):
        """The same layer on both paths, of which one hardly reaches the output."""

        def __init__(self):
            super().__init__()
            self.loud, self.quiet = nn.Linear(16, 16), nn.Linear(16, 16)
            self.quiet.load_state_dict(self.loud.state_dict())

        def forward(self, x):
            return self.loud(x) + 0.01 * self.quiet(x)

    torch.manual_seed(0)
    model, x = TwoPaths(), torch.randn(64, 16)
    blind = plan(model, factorization="tt", budget=0.5)
    aware = plan(model, factorization="tt", budget=0.5, calibration=x)
    assert abs(blind.layers[0].parameters - blind.layers[1].parameters) <= 32  # one rank
    assert aware.layers[0].parameters > 2 * aware.layers[1].parameters
    assert aware.parameters <= 0.5 * aware.dense_parameters


def test_calibration_leaves_a_layer_that_is_used_twice_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second, self.head = self.first, nn.Linear(16, 4)

        def forward(self, x):
            return self.head(input=self.second(self.first(x).relu()).relu())  # one of them called by keyword

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(32, 16)
    weight, before, outputs = model.first.weight, model.first.weight.detach().clone(), model(x)
    made = plan(model, factorization="tt", budget=0.7, calibration=x)
    assert model.first.weight is model.second.weight is weight
    assert weight.equal(before)
    assert weight.requires_grad
    torch.testing.assert_close(model(x), outputs)
    assert made.layers[0].error > 1e-3


@pytest.fixture(scope="module")
def calibrated():
    """A plan that was made with calibration data."""
    return plan(network(), factorization="tt", budget=0.7, calibration=IMAGES)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "the arguments of the model in `calibration`, got none"),
        ("images.pt", "a tuple or list of the arguments of the model, .* in `calibration`, got a str"),
        (IMAGES[:0], r"with numbers in `calibration`, got an empty one of shape \(0, 3, 8, 8\)"),
        (IMAGES * torch.nan, "finite numbers in `calibration`, got NaN"),
        (
            IMAGES[:, :2],
            r"in `calibration`, got a tensor .* float64, with which it fails: RuntimeError: .* 2 channels",
        ),
        ((IMAGES, 3), "in `calibration`, got a tensor of shape .* and a int, with which it fails: TypeError: "),
    ],
)
def test_inputs_that_are_none(calibrated, inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plan(network(), factorization="tt", budget=0.7, calibration=inputs)
    with pytest.raises((TypeError, ValueError), match=f"{message}|that `plan` was made with, got others"):
        apply_(network(), calibrated, calibration=inputs)


def test_outputs_of_zero_make_all_layers_alike():
    model = conv_and_linear(padding=1)
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    made = plan(model, factorization="tt", budget=0.7, calibration=varied())
    assert made.parameters <= 0.7 * made.dense_parameters


@pytest.mark.parametrize(
    "settings",
    [{"ranks": {"0": 4}}, {"ranks": 4, "exclude": ["2", "4"]}, {"ranks": 18, "exclude": ["2"]}],
    ids=["ranks", "exclude", "too large a rank for the last"],
)
def test_inputs_are_measured_of_layers_that_may_become_cores(monkeypatch, settings):
    measured = []

    def recorded(model, layers, calls):
        measured.append(sorted(layers))
        return output_metrics(model, layers, calls)

    monkeypatch.setattr("tenzoo.compression.calibrate.output_metrics", recorded)
    monkeypatch.setattr("tenzoo.compression.apply.output_metrics", recorded)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(40, 32) * torch.logspace(0, -3, 32)
    made = plan(model, factorization="tt", calibration=x, **settings)
    assert made.keeps == "outputs"
    apply_(copy.deepcopy(model), made, calibration=x)
    assert measured == [["0"]]
    apply_(model, copy.copy(made), calibration=x)  # without what was decomposed
    assert measured == [["0"], ["0"]]


def test_a_layer_that_no_rank_makes_smaller_is_not_measured(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 1))
    inputs, sizes, eigh = torch.randn(40, 32), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda moment: (sizes.append(len(moment)), eigh(moment))[1])
    made = plan(model, factorization="tt", budget=0.8, calibration=inputs, example_input=inputs)
    assert sizes.count(32) == sizes.count(48) == 1  # both sides of the first; the others are ranks
    assert [layer.rank is None for layer in made.layers] == [False, True]
    assert made.dense_multiplications == 32 * 48 + 48


# --- tables --------------------------------------------------------------------------------------------------------


def texts(rows=512, size=64):
    """Indices of which few are frequent, as words are."""
    generator = torch.Generator().manual_seed(0)
    return (rows * torch.rand(size, 12, generator=generator) ** 6).long()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("factorization", ["tt", "cp"])
def test_rows_of_a_table_count_by_how_often_they_are_looked_up(kind, factorization):
    torch.manual_seed(0)
    model = nn.Sequential(kind(512, 32), nn.Linear(32, 32))
    model[0].weight.data.normal_()
    found = {}
    for calibration in (None, texts()):
        made = plan(model, factorization=factorization, ranks={"0": 8}, calibration=calibration)
        small = apply_(copy.deepcopy(model), made, calibration=calibration)
        with torch.no_grad():
            found[made.data_aware] = (
                (small(texts()) - model(texts())).norm(),
                (small[0].weight - model[0].weight).norm(),
            )
    assert made.keeps == "outputs"
    assert found[True][0] < 0.9 * found[False][0]
    assert found[True][1] > found[False][1]


def test_the_error_of_a_table_is_that_of_the_rows_that_are_looked_up():
    class Values(nn.Module):
        """Without gradients, all look-ups count alike."""

        def forward(self, x):
            return x.detach()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32, padding_idx=0), Values(), nn.Linear(32, 32))
    calibration = torch.cat([texts(64), torch.zeros(64, 20, dtype=torch.long)], dim=1)
    made = plan(model, factorization="tt", ranks={"0": 8}, calibration=calibration)
    small = apply_(copy.deepcopy(model), made, calibration=calibration)
    fitted = calibration[torch.tensor([k for k in range(64) if k % 4 != 3])]
    numbers = torch.bincount(fitted.flatten(), minlength=64)
    numbers[0] = 0  # the padding is no row
    weights = (numbers / numbers.float().mean() + 0.5).sqrt()[:, None]
    with torch.no_grad():
        rows = model[0].weight
        change = small[0].factorization.reconstruct() - rows
        expected = (change * weights).norm() / (rows * weights).norm()
    assert made.layers[0].error == pytest.approx(float(expected), rel=0.05)
