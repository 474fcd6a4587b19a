"""The block-term format: a sum of Tucker terms."""

import math
from collections.abc import Sequence
from typing import ClassVar, final

from torch import Tensor

from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.network import Leg
from tenzoo.factorizations.tucker import Tucker


@final
class BlockTerm(Factorization):
    """Block-term format, ``T = Σ_b G_b ×_1 U_{1,b} ×_2 ⋯ ×_d U_{d,b}``.

    The cores are the core tensors of all terms in one, ``G (B, r_1, …, r_d)``, first, and the d factors
    ``U_k (n_k, B, r_k)``; ``rank`` is ``(B, r_1, …, r_d)``, the number of terms and the ranks of each. A rank r_k above
    ``min(n_k, ∏_{j≠k} n_j)`` is clipped to it. Source: De Lathauwer 2008, SIAM J. Matrix Anal. Appl. 30(3), part II,
    definition 2.1; for layers Ye et al. 2018, arXiv:1712.05134.

    A decomposition is found by alternating least squares from the better of two random starts; that of one term is a
    Tucker decomposition.

    Example:
        >>> import torch
        >>> weight = BlockTerm((4, 5, 6), rank=[2, 3, 3, 3])
        >>> dense = torch.einsum("xabc,ixa,jxb,kxc->ijk", *weight.cores)
        >>> torch.allclose(weight.reconstruct(), dense, atol=1e-5)
        True
    """

    name: ClassVar[str] = "btd"

    @staticmethod
    def legs(order: int) -> list[tuple[Leg, ...]]:
        """The core tensors, and a factor per mode, which all share the bond of the terms."""
        return [("terms", *map(str, range(order))), *((mode, "terms", str(mode)) for mode in range(order))]

    @classmethod
    def usable_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks, clipped to those of a Tucker, and to as many terms as blocks of these ranks fill a tensor."""
        full = Tucker.admitted_rank(shape, (math.prod(shape),) * len(shape))
        ranks = Tucker.usable_rank(shape, rank[1:])
        blocks = math.prod(-(-size // r) for size, r in zip(full, ranks, strict=True))
        return min(rank[0], blocks), *ranks

    @classmethod
    def fit(cls, tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        """Cores by alternating least squares; of one term by Tucker's decomposition."""
        if rank[0] > 1:
            return super().fit(tensor, rank)
        core, *factors = Tucker.fit(tensor, rank[1:])
        return [core.unsqueeze(0), *(factor.unsqueeze(1) for factor in factors)]
