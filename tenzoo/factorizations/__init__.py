"""What a tensorized weight can be made of: five formats behind one interface.

Example:
    >>> import torch
    >>> weight = factorization_class("tt")((4, 5, 6), rank=3)
    >>> index = torch.tensor([[0, 0, 0], [3, 4, 5]])
    >>> torch.allclose(weight.entries(index), weight.reconstruct()[index.unbind(1)], atol=1e-5)
    True
"""

from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.block_tt import BlockTT
from tenzoo.factorizations.cp import CP
from tenzoo.factorizations.rank import Rank
from tenzoo.factorizations.tensor_ring import TensorRing
from tenzoo.factorizations.tensor_train import TensorTrain
from tenzoo.factorizations.tucker import Tucker

FACTORIZATIONS: dict[str, type[Factorization]] = {
    factorization.name: factorization for factorization in (CP, Tucker, TensorTrain, TensorRing, BlockTT)
}


def factorization_class(name: str) -> type[Factorization]:
    """The format of a given name.

    Args:
        name: One of ``"btt"``, ``"cp"``, ``"tr"``, ``"tt"`` and ``"tucker"``.

    Raises:
        ValueError: If there is no such format.

    Example:
        >>> factorization_class("tucker").__name__
        'Tucker'
    """
    if name not in FACTORIZATIONS:
        raise ValueError(f"expected one of {sorted(FACTORIZATIONS)} in `factorization`, got {name!r}")
    return FACTORIZATIONS[name]


__all__ = [
    "CP",
    "FACTORIZATIONS",
    "BlockTT",
    "Factorization",
    "Rank",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "factorization_class",
]
