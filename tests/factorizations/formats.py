"""Independent einsum oracles, and Hypothesis strategies of small formats."""

import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tenzoo.factorizations import FACTORIZATIONS, Factorization, factorization_class
from tests.conformance import CoreProviderConformance

NAMES = sorted(FACTORIZATIONS)


def dense_oracle(name: str, cores: Sequence[Tensor]) -> Tensor:
    """The tensor of a format by one einsum over all cores."""
    letters, ranks = string.ascii_lowercase, string.ascii_uppercase
    match name:
        case "cp":
            order = len(cores)
            terms, out = [f"{letters[k]}R" for k in range(order)], letters[:order]
        case "tucker":
            order = len(cores) - 1
            terms = [ranks[:order], *(f"{letters[k]}{ranks[k]}" for k in range(order))]
            out = letters[:order]
        case "tt" | "tr":
            order = len(cores)
            last = ranks[0] if name == "tr" else ranks[order]
            ends = [*ranks[1:order], last]
            terms, out = [f"{ranks[k]}{letters[k]}{ends[k]}" for k in range(order)], letters[:order]
        case "btt":
            order = len(cores)
            terms = [f"{ranks[k]}{letters[k]}{letters[order + k]}{ranks[k + 1]}" for k in range(order)]
            out = letters[: 2 * order]
        case "ht":  # the tree of four modes or fewer, read off the definition
            terms, out = {
                2: (["AB", "aA", "bB"], "ab"),
                3: (["AB", "ACD", "aC", "bD", "cB"], "abc"),
                4: (["AB", "ACD", "aC", "bD", "BEF", "cE", "dF"], "abcd"),
                5: (["AB", "ACD", "CEF", "aE", "bF", "cD", "BGH", "dG", "eH"], "abcde"),
                6: (["AB", "ACD", "CEF", "aE", "bF", "cD", "BGH", "GIJ", "dI", "eJ", "fH"], "abcdef"),
            }[(len(cores) + 1) // 2]
        case "btd":
            order = len(cores) - 1
            terms = [f"Z{ranks[:order]}", *(f"{letters[k]}Z{ranks[k]}" for k in range(order))]
            out = letters[:order]
        case _:
            return torch.einsum(name, *cores)
    return torch.einsum(f"{','.join(terms)}->{out}", *cores)


def full_index(shape: Sequence[int]) -> Tensor:
    """All indices of a tensor, in order."""
    return torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape))


@st.composite
def small_cases(draw: st.DrawFn, names: Sequence[str] = NAMES) -> tuple[type[Factorization], tuple[int, ...], Any]:
    """A format, a shape and a rank: an int, or a list of the right length."""
    name = draw(st.sampled_from(names))
    order = draw(st.sampled_from([2, 4, 6] if name == "btt" else [2, 3, 4, 5]))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=order, max_size=order)))
    length = {
        **{"cp": 1, "tucker": order, "tt": order - 1, "tr": order, "btt": order // 2 - 1},
        **{"ht": 2 * order - 2, "btd": order + 1},
    }[name]
    ranks = st.lists(st.integers(1, 4), min_size=length, max_size=length)
    return FACTORIZATIONS[name], shape, draw(st.one_of(st.integers(1, 4), ranks))


class FactorizationConformance(CoreProviderConformance):
    """The provider's contract for one format; a subclass names it."""

    name: ClassVar[str]
    shape: ClassVar[tuple[int, ...]]
    rank: ClassVar[Any]

    def make(self) -> Factorization:
        return factorization_class(self.name)(self.shape, self.rank, dtype=torch.float64)

    def output(self, provider: nn.Module) -> Tensor:
        assert isinstance(provider, Factorization)
        return provider.reconstruct()

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        return dense_oracle(self.name, list(parameters.values()))


class EntriesConformance(FactorizationConformance):
    """The same contract for the entries at given indices, some of them repeated."""

    @property
    def index(self) -> Tensor:
        index = full_index(self.shape)
        return torch.cat([index.flip(0)[::2], index[:3], index[:3]])

    def output(self, provider: nn.Module) -> Tensor:
        assert isinstance(provider, Factorization)
        return provider.entries(self.index)

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        return dense_oracle(self.name, list(parameters.values()))[self.index.unbind(1)]
