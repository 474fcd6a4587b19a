"""Weights that torch parametrizes become groups of cores."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from tenzoo import CoreGroup, CoreProvider, find_core_groups
from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.guests import register_multilinear_parametrization
from tenzoo.layers import TensorizedLinear
from tenzoo.tasks import SAM, Task
from tests.conformance import CoreProviderConformance
from tests.tasks.toy import Batches, assert_same_weights, sgd, trainer


class LowRank(nn.Module):
    """Not a provider: a plain parametrization, with a parameter of its own that is no core."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.gain.exp() * a @ b

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(weight / self.gain.exp(), full_matrices=False)
        return u[:, :2] * s[:2], vh[:2]


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenzoo.cores._registry", {})
    monkeypatch.setattr("tenzoo.guests._multilinear", set())
    register_multilinear_parametrization(LowRank)


def low_rank(layer: nn.Module, name: str = "weight") -> nn.Module:
    return register_parametrization(layer, name, LowRank())


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = parametrizations.weight_norm(nn.Linear(6, 5))
        self.linear = low_rank(nn.Linear(5, 4))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.orthogonal(self.linear(self.norm(x).tanh()).tanh())


class Parametrized(Task):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder = Encoder()

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.encoder(x) - y).square().mean()


class ParametrizedHost(nn.Module, CoreProvider):
    """Gives a parametrized layer what the conformance suite asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = low_rank(nn.Linear(4, 3))

    def core_groups(self) -> list[CoreGroup]:
        return [CoreGroup("weight", group.cores) for group in find_core_groups(self.layer)]


@pytest.mark.usefixtures("_registered")
class TestParametrizedLayer(CoreProviderConformance):
    non_core = frozenset({"layer.bias", "layer.parametrizations.weight.0.gain"})

    def make(self) -> nn.Module:
        host = ParametrizedHost().double()
        with torch.no_grad():
            for parameter in host.parameters():
                parameter.normal_()
        return host

    def output(self, provider: nn.Module) -> Tensor:
        return provider.layer(torch.eye(4, dtype=torch.float64))

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        bias, a, b, gain = parameters.values()
        return torch.einsum("ir,rj->ji", a, b) * gain.exp() + bias


@pytest.mark.usefixtures("_registered")
def test_a_parametrized_weight_is_found_by_name_beside_other_parametrizations():
    model = Parametrized()
    (group,) = find_core_groups(model)
    originals = model.encoder.linear.parametrizations.weight
    assert group.name == "encoder.linear.parametrizations.weight"
    assert group.cores == (originals.original0, originals.original1)


@pytest.mark.usefixtures("_registered")
def test_a_copy_has_cores_of_its_own():
    model = Parametrized()
    (group,), (copied,) = find_core_groups(model), find_core_groups(copy.deepcopy(model))
    assert copied.name == group.name
    assert not {id(core) for core in copied.cores} & {id(core) for core in group.cores}


@pytest.mark.usefixtures("_registered")
def test_every_parametrized_weight_is_a_group_and_layers_of_tenzoo_are_found_beside_them():
    recurrent = low_rank(low_rank(nn.LSTM(3, 4), "weight_ih_l0"), "weight_hh_l0")
    model = nn.Sequential(recurrent, TensorizedLinear(4, 4, factorization="cp", rank=2))
    names = ["0.parametrizations.weight_ih_l0", "0.parametrizations.weight_hh_l0", "1.weight"]
    assert [group.name for group in find_core_groups(model)] == names


@pytest.mark.usefixtures("_registered")
def test_subclasses_and_classes_that_are_registered_later_are_recognized():
    class Child(LowRank):
        pass

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    register_parametrization(model[0], "weight", Child())
    register_parametrization(model[1], "weight", Double())
    assert [group.name for group in find_core_groups(model)] == ["0.parametrizations.weight"]
    register_multilinear_parametrization(Double)
    assert [len(group.cores) for group in find_core_groups(model)] == [2, 1]


@pytest.mark.usefixtures("_registered")
def test_a_weight_with_a_second_parametrization_is_no_group():
    layer = low_rank(nn.Linear(4, 3))
    assert len(find_core_groups(layer)) == 1
    register_parametrization(layer, "weight", Double())
    assert not find_core_groups(layer)


@pytest.mark.usefixtures("_registered")
def test_a_parametrized_buffer_has_no_cores():
    layer = nn.Module()
    layer.register_buffer("table", torch.randn(4, 3))
    assert not find_core_groups(low_rank(layer, "table"))


@pytest.mark.parametrize("wrong", [int, LowRank(), "LowRank"])
def test_only_module_classes_can_be_registered_as_parametrizations(wrong: Any):
    with pytest.raises(TypeError, match=r"^expected a subclass of nn\.Module in `parametrization_type`, got "):
        register_multilinear_parametrization(wrong)


def _fitted(*callbacks: Any, steps: int = 40, **task: Any) -> Parametrized:
    torch.manual_seed(0)
    model = Parametrized(optimizer=sgd(0.1), **task)
    trainer(max_epochs=steps, callbacks=list(callbacks)).fit(model, Batches(count=1))
    return model


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("method", ["sam", "das"])
def test_a_parametrized_weight_trains_under_every_method(method: str):
    batch = Batches(count=1).batches[0]
    callbacks = [DeviationAwareScaling(0.1)] if method == "das" else []
    sam = SAM(rho=0.05, scope="cores") if method == "sam" else None
    trained, plain, start = _fitted(*callbacks, sam=sam), _fitted(), _fitted(steps=0)
    loss, plain_loss, start_loss = (model.loss(batch, 0).item() for model in (trained, plain, start))
    assert loss < 0.8 * start_loss
    assert loss != plain_loss


@pytest.mark.usefixtures("_registered")
def test_das_and_sam_at_zero_are_the_plain_optimizer():
    plain = _fitted(steps=5)
    assert_same_weights(_fitted(DeviationAwareScaling(0.0), steps=5), plain)
    assert_same_weights(_fitted(steps=5, sam=SAM(rho=0.0)), plain)
