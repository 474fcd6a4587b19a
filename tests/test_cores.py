import pytest
import torch
from torch import nn

from tenzoo import CoreContainer, CoreGroup, CoreProvider, find_core_groups, register_core_groups
from tenzoo.models import TensorCompletion
from tenzoo.tasks import Task


class LowRank(nn.Module, CoreProvider):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def core_groups(self):
        return [CoreGroup("weight", (self.a, self.b))]


class Delegate(nn.Module, CoreProvider):
    """As a task does: its groups are its model's, with the model's name in front."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def core_groups(self):
        return [CoreGroup(f"model.{group.name}", group.cores) for group in find_core_groups(self.model)]


def names(module: nn.Module) -> list[str]:
    return [group.name for group in find_core_groups(module)]


def test_names_are_qualified_from_the_module_that_was_walked():
    model = nn.Sequential(LowRank(), nn.Sequential(nn.Linear(4, 4), LowRank()))
    assert names(model) == ["0.weight", "1.1.weight"]
    assert names(model[1]) == ["1.weight"]
    assert find_core_groups(model)[1].cores == (model[1][1].a, model[1][1].b)


def test_a_provider_without_core_groups_fails_when_it_is_built():
    class Incomplete(nn.Module, CoreProvider):
        pass

    with pytest.raises(TypeError, match="core_groups"):
        Incomplete()


def test_a_group_met_again_is_listed_once():
    layer = LowRank()
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]
    assert names(Delegate(nn.Sequential(layer, LowRank()))) == ["model.0.weight", "model.1.weight"]


def test_a_container_lists_the_groups_of_its_submodules():
    class Container(nn.Module, CoreContainer):
        def __init__(self, *children):
            super().__init__()
            self.inner = nn.Sequential(*children)
            self.own = nn.Parameter(torch.zeros(2))

    layer = LowRank()
    container = Container(layer, Container(LowRank(), layer))
    expected = ["inner.0.weight", "inner.1.inner.0.weight"]
    assert [group.name for group in container.core_groups()] == expected
    assert names(container) == expected
    assert names(nn.Sequential(container)) == [f"0.{name}" for name in expected]
    assert Container(nn.ReLU()).core_groups() == []


@pytest.mark.parametrize("kind", [Task, TensorCompletion])
def test_core_groups_are_written_where_the_cores_are(kind):
    assert issubclass(kind, CoreProvider)
    assert kind.core_groups is CoreContainer.core_groups


def test_an_empty_name_stands_for_the_module_itself():
    class Tensor(LowRank):
        def core_groups(self):
            return [CoreGroup("", (self.a, self.b))]

    assert names(nn.Sequential(Tensor())) == ["0"]
    assert names(Tensor()) == ["Tensor"]


@pytest.mark.parametrize("pick", [lambda a: (a.a,), lambda a: (a.a, a.bias), lambda a: (a.a, a.b, a.bias)])
def test_groups_that_overlap_in_part_are_refused(pick):
    class Thief(nn.Module, CoreProvider):
        def __init__(self, victim):
            super().__init__()
            self.victim = victim

        def core_groups(self):
            return [CoreGroup("stolen", pick(self.victim))]

    with pytest.raises(ValueError, match=r"disjoint core groups, got 'stolen' and 'weight'"):
        find_core_groups(Thief(LowRank()))


def test_groups_of_submodules_can_be_parts_of_an_enclosing_one():
    class Product(nn.Module, CoreProvider):
        encloses_groups = True

        def __init__(self):
            super().__init__()
            self.left, self.right = LowRank(), LowRank()

        def core_groups(self):
            return [CoreGroup("weight", (self.left.a, self.left.b, self.right.a, self.right.b))]

    assert names(nn.Sequential(Product(), LowRank())) == ["0.weight", "1.weight"]
    assert names(Delegate(nn.Sequential(LowRank(), Product()))) == ["model.0.weight", "model.1.weight"]
    both = nn.Module()
    both.product, both.again = Product(), LowRank()
    both.again.a = both.product.left.a
    with pytest.raises(ValueError, match=r"disjoint core groups, got 'product.weight' and 'weight'"):
        find_core_groups(both)


def test_a_core_twice_in_a_group_is_refused():
    core = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="distinct parameters in `cores` of core group 'w'"):
        CoreGroup("w", (core, core))


def test_cores_must_be_parameters():
    with pytest.raises(TypeError, match=r"nn\.Parameter objects"):
        CoreGroup("w", (torch.ones(2),))
    with pytest.raises(ValueError, match="at least one core"):
        CoreGroup("w", ())


def test_a_foreign_class_and_its_subclasses_can_be_registered(monkeypatch):
    monkeypatch.setattr("tenzoo.cores._registry", {})

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(1, 2))

    class Child(Foreign):
        pass

    assert names(nn.Sequential(Child())) == []
    register_core_groups(Foreign, lambda module: [CoreGroup("w", (module.left, module.right))])
    assert names(nn.Sequential(Child(), LowRank(), Foreign())) == ["0.w", "1.weight", "2.w"]
    register_core_groups(Child, lambda module: [CoreGroup("child", (module.left, module.right))])
    assert names(nn.Sequential(Child(), Foreign())) == ["0.child", "1.w"]


def test_only_foreign_module_classes_can_be_registered():
    with pytest.raises(TypeError, match=r"subclass of nn\.Module"):
        register_core_groups(int, lambda module: [])
    with pytest.raises(TypeError, match="foreign class in `module_type`, got the CoreProvider LowRank"):
        register_core_groups(LowRank, lambda module: [])
