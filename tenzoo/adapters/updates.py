"""Updates ΔW of a frozen weight, reconstructed from cores."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.adapters.matrices import FactorizedMatrix, check_r, used_rank
from tenzoo.adapters.modes import check_modes, network_modes
from tenzoo.cores import CoreGroup, CoreProvider
from tenzoo.factorizations import Factorization, Rank, factorization_class
from tenzoo.layers import TensorizedEmbedding, TensorizedLinear
from tenzoo.layers.tensorization import layer_modes

Modes = Mapping[int, Sequence[int]]
"""Maps a width to the modes of what it is split into."""

FLORA_STD = 0.02
"""Standard deviation of A and B of FLoRA at initialization, as published."""


class Adapter(nn.Module, CoreProvider, ABC):
    """What is trained for one layer.

    Attributes:
        in_features: Width of the input.
        out_features: Width of the output.
    """

    in_features: int
    out_features: int

    @abstractmethod
    def cores(self) -> tuple[nn.Parameter, ...]:
        """All parameters. The first one starts at zero, and the output with it."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``."""

    def start_at_zero_(self) -> None:
        """Make the output zero: the first core is."""
        with torch.no_grad():
            self.cores()[0].zero_()


class Update(Adapter):
    """A matrix ``ΔW (out_features, in_features)`` that is multilinear in its cores, one group: ``x ΔWᵀ``."""

    encloses_groups: ClassVar[bool] = True

    @abstractmethod
    def matrix(self) -> Tensor:
        """ΔW, ``(out_features, in_features)``."""

    @abstractmethod
    def look_up(self, index: Tensor) -> Tensor:
        """Columns of ΔW, ``(*index.shape, out_features)``: the update of rows of an embedding."""

    def core_groups(self) -> list[CoreGroup]:
        """One group."""
        return [CoreGroup("", self.cores())]


class LowRankUpdate(Update):
    """``ΔW = B A`` with dense factors: LoRA (Hu et al. 2022, arXiv:2106.09685).

    It is initialized as PEFT's: B is zero and A has the variance ``1 / (3 in_features)``; for an embedding A is zero
    and B has the variance 1.

    Args:
        in_features: Columns of ΔW, or rows of the table of an embedding.
        out_features: Rows of ΔW, or columns of the table of an embedding.
        r: Rows of A, and columns of B.
        is_table: Whether the update is one of an embedding.

    Raises:
        ValueError: If ``r`` is larger than the larger side of ΔW.
    """

    def __init__(self, in_features: int, out_features: int, r: int, *, is_table: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.is_table = is_table
        check_r(r, in_features, out_features)
        self.b, self.a = nn.Parameter(torch.empty(out_features, r)), nn.Parameter(torch.empty(r, in_features))
        if not self.a.is_meta:
            for factor in (self.a, self.b):
                nn.init.normal_(factor) if is_table else nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    @override
    def cores(self) -> tuple[nn.Parameter, ...]:
        return (self.a, self.b) if self.is_table else (self.b, self.a)

    @override
    def matrix(self) -> Tensor:
        return self.b @ self.a

    @override
    def look_up(self, index: Tensor) -> Tensor:
        return F.linear(F.embedding(index, self.a.t()), self.b)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b)


class FactorizedLowRankUpdate(Update):
    """``ΔW = B Aᵀ`` with a tensor network for each of A and B: LoRETTA-rep (Yang et al. 2024, arXiv:2402.11417).

    A ``(in_features, r)`` has the variance of LoRA's. B ``(out_features, r)`` would have that of a layer with r inputs,
    but for its first core, which starts at zero. For an embedding both have the variance 1, and the zero core is A's.

    Args:
        in_features: Columns of ΔW, or rows of the table of an embedding.
        out_features: Rows of ΔW, or columns of the table of an embedding.
        r: Columns of A and B.
        factorization: Name of a format, or an einsum.
        rank: Of both networks, as :class:`FactorizedMatrix` takes it.
        modes: Maps a width to the modes of its factor, whose product is the width times r.
        is_table: Whether the update is one of an embedding.

    Raises:
        ValueError: If ``r`` is larger than the larger side of ΔW, or modes or rank do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        factorization: str,
        rank: Rank,
        modes: Modes | None = None,
        is_table: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.is_table = is_table
        check_r(r, in_features, out_features)
        modes = modes or {}

        def make(width: int, std: float) -> FactorizedMatrix:
            return FactorizedMatrix(width, r, factorization=factorization, rank=rank, modes=modes.get(width), std=std)

        self.b = make(out_features, 1 if is_table else 1 / math.sqrt(3 * r))
        self.a = make(in_features, 1 if is_table else 1 / math.sqrt(3 * in_features))

    @override
    def cores(self) -> tuple[nn.Parameter, ...]:
        first, second = (self.a, self.b) if self.is_table else (self.b, self.a)
        return *first.factorization.cores, *second.factorization.cores

    @override
    def matrix(self) -> Tensor:
        return F.linear(self.b(), self.a())

    @override
    def look_up(self, index: Tensor) -> Tensor:
        return F.linear(F.embedding(index, self.a()), self.b())

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.a(), self.b())


class NetworkUpdate(Update):
    """ΔW as one tensor network of any format.

    A width that does not split into factors that are alike is covered by a slightly larger one, whose surplus is not
    used. At the start ΔW would have the variance of a product of LoRA's factors at initialization, or that of a table,
    but for the first core, which is zero. ``A G Bᵀ`` (FLoRA, Si et al. 2024, arXiv:2405.14739) is a Tucker network.

    Args:
        in_features: Columns of ΔW, or rows of the table of an embedding.
        out_features: Rows of ΔW, or columns of the table of an embedding.
        factorization: Name of a format, or an einsum.
        rank: As the factorization takes it.
        modes: Maps a width to its factors.
        whole: Whether both widths stay whole by default.
        std: Standard deviation of all cores but the first; by default that of the format's initialization.
        is_table: Whether the update is one of an embedding.

    Raises:
        ValueError: If modes or rank do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        factorization: str,
        rank: Rank,
        modes: Modes | None = None,
        whole: bool = False,
        std: float | None = None,
        is_table: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        kind = factorization_class(factorization)
        widths = {"out_features": out_features, "in_features": in_features}
        if modes:
            for width in widths.values():
                check_modes(modes.get(width, [width]), width, str(width))
        chosen = tuple((width,) for width in widths.values()) if whole else network_modes(kind, widths)
        sides = [tuple((modes or {}).get(width, side)) for width, side in zip(widths.values(), chosen, strict=True)]
        sides = sides[::-1] if is_table else sides
        first, second = map(math.prod, sides)
        _, shape = layer_modes(kind, sides, {"first": first, "second": second})
        settings: dict[str, Any] = {
            "factorization": factorization,
            "rank": used_rank(kind, shape, rank),
            "tensorization": sides,
        }
        self.layer: TensorizedEmbedding | TensorizedLinear
        if is_table:
            self.layer = TensorizedEmbedding(first, second, **settings)
        else:
            self.layer = TensorizedLinear(second, first, bias=False, **settings)
        self._initialize(1 if is_table else 1 / (3 * math.sqrt(in_features)), std)

    def _initialize(self, init_std: float, std: float | None) -> None:
        network: Factorization = self.layer.factorization
        network.init_std = init_std
        network.reset_parameters()
        if std is not None:
            with torch.no_grad():
                for core in list(network.cores)[1:]:
                    core.normal_(0.0, std)

    @override
    def cores(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.layer.factorization.cores)

    @override
    def matrix(self) -> Tensor:
        weight = self.layer.weight
        if isinstance(self.layer, TensorizedEmbedding):
            weight = weight.t()
        return weight[: self.out_features, : self.in_features]

    @override
    def look_up(self, index: Tensor) -> Tensor:
        rows: Tensor = self.layer(index)
        return rows[..., : self.out_features]

    @override
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.layer, TensorizedLinear)
        surplus = self.layer.in_features - self.in_features
        y: Tensor = self.layer(F.pad(x, (0, surplus)) if surplus else x)
        return y[..., : self.out_features]
