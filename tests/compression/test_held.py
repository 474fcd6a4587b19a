"""A layer that the model reaches in another way than by its name stays what it is, whatever holds it."""

import copy
import functools
import types
import weakref
from collections import UserDict, UserList, deque
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.compression import apply_, fold_, plan
from tenzoo.compression.fold import not_foldable
from tenzoo.compression.replaceable import find_weights
from tenzoo.layers import TensorizedLinear
from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, adam, trainer

X = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


@dataclass
class Box:
    weight: Tensor
    box: "Box | None" = None


class Helper:
    """An object of a user's own class."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)

    def run(self, x):
        return self.layer(x)


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer


def boxed(layer):
    box = Box(layer.weight)
    box.box = box
    return box


def closure(layer):
    return lambda x: layer(x)


def default(layer):
    return lambda x, layer=layer: layer(x)


def keyword_default(layer):
    def run(x, *, layer=layer):
        return layer(x)

    return run


def cached(layer):
    return functools.lru_cache(closure(layer))


def with_attribute(layer):
    def run(x):
        return run.layer(x)

    run.layer = layer
    return run


def unregistered(layer):
    return [nn.Sequential(layer, nn.ReLU())]


def generator(layer):
    return (layer(x) for x in (X,))


HOLDERS = {
    "list": lambda layer: [layer.weight],
    "method": lambda layer: layer.forward,
    "methods": lambda layer: {"first": (layer.forward, 1)},
    "partial": lambda layer: functools.partial(nn.Linear.forward, layer),
    "dataclass": boxed,
    "closure": closure,
    "default": default,
    "keyword default": keyword_default,
    "attribute of a function": with_attribute,
    "object": Helper,
    "method of an object": lambda layer: Helper(layer).run,
    "slots": Slotted,
    "namespace": lambda layer: types.SimpleNamespace(layer=layer),
    "deque": lambda layer: deque([layer]),
    "user list": lambda layer: UserList([layer]),
    "user dict": lambda layer: UserDict(layer=layer),
    "proxy of a mapping": lambda layer: types.MappingProxyType({"layer": layer}),
    "key": lambda layer: {layer: 1},
    "cache": cached,
    "iterator": lambda layer: iter([layer]),
    "generator": generator,
    "module that is not registered": unregistered,
    "weak reference": weakref.ref,
    "weak set": lambda layer: weakref.WeakSet([layer]),
    "weak proxy": lambda layer: [weakref.proxy(layer)],
    "data": lambda layer: layer.weight.data,
    "detached": lambda layer: layer.weight.detach(),
    "transposed": lambda layer: layer.weight.mT,
    "row": lambda layer: [layer.weight.data[0]],
    "method of a tensor": lambda layer: layer.weight.t,
}


class Holding(nn.Module):
    """Keeps a layer, its matrix, or what it does in a way that torch does not know."""

    def __init__(self, hold):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(32, 32), nn.Linear(32, 10)
        self.held = hold(self.layer)

    def forward(self, x):
        return self.last(self.layer(x))


def reasons(model):
    return {weight.name: weight.reason for weight in find_weights(model)}


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_layer_that_is_held_elsewhere_stays_dense(kind):
    model = Holding(HOLDERS[kind])
    assert reasons(model) == {"layer": "is also held by the plain attribute 'held'", "last": None}
    made = plan(model, factorization="tt", ranks=2)
    apply_(model, made)
    assert type(model.layer) is nn.Linear
    assert type(model.last) is not nn.Linear


@pytest.mark.parametrize("kind", HOLDERS)
def test_cores_that_are_held_elsewhere_are_not_folded_away(kind):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    apply_(model, plan(model, factorization="tt", ranks=2))
    cores, layer = model[0].factorization.cores, model[0]
    takes_weight = kind in ("list", "dataclass", "data", "detached", "transposed", "row", "method of a tensor")
    model[1].held = HOLDERS[kind](types.SimpleNamespace(weight=cores[0]) if takes_weight else layer)
    with pytest.raises(ValueError, match=r"got '0', which is also held by the plain attribute '1\.held'"):
        fold_(model)
    assert model[0] is layer


def test_cores_of_a_recurrent_weight_are_not_folded_away():
    model = nn.Sequential(nn.GRU(32, 32))
    apply_(model, plan(model, factorization="tt", ranks=2))
    model.held = Helper(model[0].parametrizations["weight_ih_l0"][0].factorization.cores[0])
    with pytest.raises(ValueError, match=r"got '0\.weight_ih_l0', which is also held by the plain attribute 'held'"):
        fold_(model)


@pytest.mark.parametrize("alias", ["data", "transposed", "rows"])
def test_a_buffer_or_a_parameter_that_shares_memory_with_a_weight_keeps_it_dense(alias):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    match alias:
        case "data":
            model[1].register_buffer("matrix", model[0].weight.data)
        case "transposed":
            model[1].matrix = nn.Parameter(model[0].weight.data.t())
        case "rows":
            model[1].register_buffer("matrix", model[0].weight.data[5:9])
    assert reasons(model) == {"0": "shares its weight with 1.matrix", "2": None}


def test_weights_side_by_side_in_one_memory_share_nothing():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    flat = torch.randn(2, 32, 32)
    for layer, part in zip((model[0], model[2]), flat, strict=True):
        layer.weight = nn.Parameter(part)
    model.first = flat[0]
    assert reasons(model) == {"0": "is also held by the plain attribute 'first'", "2": None}


def test_a_hook_of_another_module_holds_a_layer():
    model = Holding(lambda layer: None)
    layer = model.layer
    model.last.register_forward_pre_hook(lambda module, args: layer(*args))
    assert reasons(model)["layer"] == "is also held by the plain attribute 'last._forward_pre_hooks'"


# --- what may refer to layers --------------------------------------------------------------------------------------


class Trained(nn.Module):
    """Refers to itself, to its own optimizer, and to the class and the globals of its code."""

    def __init__(self):
        super().__init__()
        self.layer, self.recurrent = nn.Linear(32, 32), nn.LSTM(32, 32, batch_first=True)
        self.optimizer = torch.optim.Adam(self.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.helper = Helper(self)
        self.parent = weakref.ref(self)
        self.kind, self.check = Trained, reasons
        self.last = None

    def forward(self, x):
        self.last = self.recurrent(self.layer(x))[0]
        return self.last


GLOBAL = Trained()


def test_optimizers_backward_references_and_globals_hold_nothing():
    model = GLOBAL
    local, listed = model.layer, [model.layer.weight]
    model(X).sum().backward()
    model.optimizer.step()
    found = reasons(model)
    assert len(found) == 3
    assert set(found.values()) == {None}
    assert local.weight is listed[0]


class Inner(Regression):
    """With a layer made of cores."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = TensorizedLinear(6, 5, factorization="tt", rank=2)


def test_a_trainer_and_its_callbacks_hold_nothing():
    task = Inner(optimizer=adam(), sam=SAM(rho=0.01))
    run = trainer(callbacks=[DeviationAwareScaling(alpha=0.1)], max_epochs=1)
    run.fit(task, Batches(), Batches(seed=9))
    assert task.trainer is run
    assert list(not_foldable(task)) == []
    assert type(fold_(task).inner) is nn.Linear
    assert reasons(task) == {"inner": None}


def test_what_torch_keeps_of_a_model_as_a_whole_holds_nothing():
    extractor = create_feature_extractor(torchvision.models.resnet18(), ["layer1"])
    assert set(reasons(extractor).values()) == {None}
    model = Holding(lambda layer: None)
    model.held = functools.wraps(model)(lambda x: model(x))
    assert set(reasons(model).values()) == {None}


def test_the_search_goes_through_large_attributes_once():
    model = Holding(lambda layer: None)
    deep = []
    for _ in range(10_000):
        deep = [deep]
    model.deep, model.many = deep, {str(k): [k, (k,)] for k in range(10_000)}
    model.ring = model.deep
    deep.append(model)
    assert set(reasons(model).values()) == {None}


def test_a_copy_is_planned_as_the_model():
    model = Holding(Helper)
    assert reasons(copy.deepcopy(model)) == reasons(model)
