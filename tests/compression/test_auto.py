"""The best format for each layer under one budget."""

import copy
import io

import pytest
import torch
from torch import nn

from tenzoo.compression import Plan, apply_, fold_, plan, restore_
from tenzoo.factorizations import CP, TensorRing, Tucker


def kernel(kind, rank):
    torch.manual_seed(0)
    weight = kind((24, 9, 24), rank, dtype=torch.float64, init_std=0.1).reconstruct().detach()
    return weight.reshape(24, 3, 3, 24).permute(0, 3, 1, 2).float()


@pytest.fixture
def model():
    """Layers whose kernels are a CP and a Tucker tensor exactly."""
    model = nn.Sequential(nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3))
    with torch.no_grad():
        model[0].weight.copy_(kernel(CP, 12))
        model[2].weight.copy_(kernel(Tucker, [6, 6, 6]))
    return model


def test_each_layer_gets_the_format_that_it_has(model):
    made = plan(model, factorization="auto", budget=0.13)
    assert [layer.factorization for layer in made.layers] == ["cp", "tucker"]
    assert made.parameters <= 0.13 * made.dense_parameters
    assert max(layer.error for layer in made.layers) < 1e-3
    for name in ("cp", "tucker", "tt", "tr"):
        single = plan(model, factorization=name, budget=0.13)
        assert sum(layer.error for layer in single.layers) > sum(layer.error for layer in made.layers)


def test_a_plan_with_several_formats_is_applied_saved_and_restored(model, tmp_path):
    made = plan(model, factorization="auto", budget=0.13)
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made
    x = torch.randn(2, 24, 8, 8)
    small = apply_(copy.deepcopy(model), made, example_input=x)
    assert [type(small[k].factorization) for k in (0, 2)] == [CP, Tucker]
    torch.testing.assert_close(apply_(copy.deepcopy(model), loaded)(x), small(x), rtol=1e-3, atol=1e-3)
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    torch.testing.assert_close(restore_(model, loaded, torch.load(buffer))(x), small(x))
    torch.testing.assert_close(fold_(small)(x), model(x))


def test_calibration_and_multiplications(model):
    images = torch.randn(16, 24, 8, 8)
    made = plan(model, factorization="auto", budget=0.14, calibration=images)
    assert made.output_error < 0.02
    assert {layer.factorization for layer in made.layers} == {"cp", "tucker"}
    fewer = plan(model, factorization="auto", budget=0.3, count="multiplications", example_input=images)
    assert fewer.multiplications <= 0.3 * fewer.dense_multiplications


def test_ranks_are_those_of_one_format(model):
    with pytest.raises(ValueError, match=r"expected a `budget` with factorization='auto', got ranks=3"):
        plan(model, factorization="auto", ranks=3)


@pytest.mark.parametrize("factorization", ["ar,br,cr->abc", "ars,bst,ctr->abc", "ht", "btd"])
def test_any_network_is_planned_under_a_budget(model, factorization):
    made = plan(model, factorization=factorization, budget=0.4)
    assert made.parameters <= 0.4 * made.dense_parameters
    x = torch.randn(2, 24, 8, 8)
    small = apply_(copy.deepcopy(model), made, example_input=x)
    assert {small[k].factorization.name for k in (0, 2)} == {factorization}
    if factorization in ("ar,br,cr->abc", "ht", "btd"):
        assert max(layer.error for layer in made.layers) < 0.2


def test_a_ring_found_by_auto_is_a_ring():
    model = nn.Sequential(nn.Conv2d(24, 24, 3))
    with torch.no_grad():
        model[0].weight.copy_(kernel(TensorRing, [3, 4, 3]))
    made = plan(nn.Sequential(model[0]), factorization="auto", budget=0.13)
    assert made.layers[0].factorization == "tr"
