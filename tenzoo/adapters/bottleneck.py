"""Bottlenecks of tensor networks, added to the output of a layer."""

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.adapters.matrices import FactorizedMatrix
from tenzoo.adapters.updates import Adapter, FactorizedLowRankUpdate, LowRankUpdate, Modes
from tenzoo.cores import CoreGroup
from tenzoo.factorizations import Rank


class Bottleneck(Adapter):
    """``U σ(D x)``, added to the output of a layer, with a tensor network for each of D and U: LoRETTA-adp.

    It is no update of a weight: it reads the layer's output, and cannot be merged. σ is GELU. U starts at zero. Source:
    Yang et al. 2024, arXiv:2402.11417, section 4.1; Houlsby et al. 2019, arXiv:1902.00751.

    Args:
        features: Width of the layer's output.
        r: Width of the bottleneck.
        factorization: Name of a format, or an einsum; None has dense factors.
        rank: Of both networks, as :class:`FactorizedMatrix` takes it.
        modes: Maps a width to the modes of its factors, whose product is the width times r.

    Raises:
        ValueError: If ``r`` is larger than ``features``, or modes or rank do not fit.
    """

    def __init__(
        self, features: int, r: int, *, factorization: str | None, rank: Rank, modes: Modes | None = None
    ) -> None:
        super().__init__()
        self.in_features = self.out_features = features
        update: LowRankUpdate | FactorizedLowRankUpdate
        if factorization is None:
            update = LowRankUpdate(features, features, r)
        else:
            update = FactorizedLowRankUpdate(features, features, r, factorization=factorization, rank=rank, modes=modes)
        self.up, self.down = update.b, update.a

    def core_groups(self) -> list[CoreGroup]:
        """One group for each factor that is made of cores: scaling one against the other changes the output."""
        factors = {"up": self.up, "down": self.down}
        return [
            CoreGroup(name, tuple(factor.factorization.cores))
            for name, factor in factors.items()
            if isinstance(factor, FactorizedMatrix)
        ]

    @override
    def cores(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.parameters())

    @override
    def forward(self, x: Tensor) -> Tensor:
        down = self.down() if isinstance(self.down, FactorizedMatrix) else self.down.t()
        up = self.up() if isinstance(self.up, FactorizedMatrix) else self.up
        return F.linear(F.gelu(x @ down), up)
