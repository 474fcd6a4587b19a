"""The contract of every CoreProvider, as a test class to inherit.

A subclass named ``Test…`` says how to make a small provider in float64 and what its output is, by an independent dense
computation; it inherits the tests.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tenzoo.cores import CoreProvider, find_core_groups


class CoreProviderConformance(ABC):
    """Tests that hold for every provider; pytest collects the subclasses only."""

    non_core: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters that belong to no group, such as biases."""

    @abstractmethod
    def make(self) -> nn.Module:
        """A small provider in float64, with random parameters; it is called under a fixed seed."""

    @abstractmethod
    def output(self, provider: nn.Module) -> Tensor:
        """What the provider computes, deterministic and differentiable in its parameters."""

    @abstractmethod
    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        """The same output by a dense computation of the test's own, from the named parameters."""

    @pytest.fixture
    def provider(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def test_output_is_that_of_the_dense_computation(self, provider: nn.Module) -> None:
        torch.testing.assert_close(self.output(provider), self.oracle(provider, dict(provider.named_parameters())))

    def test_groups_are_disjoint_and_complete(self, provider: nn.Module) -> None:
        assert isinstance(provider, CoreProvider)
        grouped = [id(core) for group in find_core_groups(provider) for core in group.cores]
        expected = [id(p) for name, p in provider.named_parameters() if name not in self.non_core]
        assert sorted(grouped) == sorted(expected)
        assert self.non_core <= {name for name, _ in provider.named_parameters()}

    def test_group_names_are_unique_and_stable(self, provider: nn.Module) -> None:
        names = [group.name for group in find_core_groups(provider)]
        assert len(set(names)) == len(names) > 0
        assert names == [group.name for group in find_core_groups(provider)]

    def test_rescaling_within_a_group_leaves_the_output_unchanged(self, provider: nn.Module) -> None:
        before = self.output(provider).detach().clone()
        for group in find_core_groups(provider):
            factors = torch.empty(len(group.cores), dtype=torch.float64).uniform_(0.5, 2.0)
            factors[0::2] *= -1
            factors[-1] /= factors.prod()
            with torch.no_grad():
                for core, factor in zip(group.cores, factors, strict=True):
                    core.mul_(factor)
        torch.testing.assert_close(self.output(provider).detach(), before, rtol=1e-9, atol=1e-9)

    def test_gradients_are_the_dense_gradient_pulled_back(self, provider: nn.Module) -> None:
        output = self.output(provider)
        cotangent = torch.randn_like(output)
        torch.autograd.backward(output, cotangent)
        copies = {name: p.detach().clone().requires_grad_() for name, p in provider.named_parameters()}
        expected = torch.autograd.grad(self.oracle(provider, copies), list(copies.values()), cotangent)
        for parameter, gradient in zip(provider.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    def test_state_dict_round_trips(self, provider: nn.Module) -> None:
        stored = io.BytesIO()
        torch.save(provider.state_dict(), stored)
        stored.seek(0)
        other = self.make()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.fill_(0.5)
        other.load_state_dict(torch.load(stored, weights_only=True))
        assert torch.equal(self.output(other), self.output(provider))

    def test_gradcheck(self, provider: nn.Module) -> None:
        parameters = tuple(provider.parameters())
        assert torch.autograd.gradcheck(lambda *_: self.output(provider), parameters)
