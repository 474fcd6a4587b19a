"""What a tensorized weight can be made of: formats behind one interface, and any network of cores.

Example:
    >>> import torch
    >>> weight = factorization_class("tt")((4, 5, 6), rank=3)
    >>> index = torch.tensor([[0, 0, 0], [3, 4, 5]])
    >>> torch.allclose(weight.entries(index), weight.reconstruct()[index.unbind(1)], atol=1e-5)
    True
"""

from tenzoo.factorizations.base import FACTORIZATIONS, Factorization
from tenzoo.factorizations.block_term import BlockTerm
from tenzoo.factorizations.block_tt import BlockTT
from tenzoo.factorizations.cp import CP
from tenzoo.factorizations.dropout import tensor_dropout_, without_dropout
from tenzoo.factorizations.einsum import einsum_format
from tenzoo.factorizations.hierarchical_tucker import HierarchicalTucker
from tenzoo.factorizations.network import Leg
from tenzoo.factorizations.rank import Rank
from tenzoo.factorizations.tensor_ring import TensorRing
from tenzoo.factorizations.tensor_train import TensorTrain
from tenzoo.factorizations.tucker import Tucker


def factorization_class(name: str) -> type[Factorization]:
    """The format of a given name.

    Args:
        name: One of ``"btd"``, ``"btt"``, ``"cp"``, ``"ht"``, ``"tr"``, ``"tt"`` and ``"tucker"``, the name of a format
            of your own, or an einsum such as ``"ar,br,cr->abc"`` (see
            :func:`~tenzoo.factorizations.einsum.einsum_format`).

    Raises:
        ValueError: If there is no such format.

    Example:
        >>> factorization_class("tucker").__name__
        'Tucker'
    """
    if name in FACTORIZATIONS:
        return FACTORIZATIONS[name]
    if isinstance(name, str) and ("->" in name or "," in name):
        return einsum_format("".join(name.split()))
    known = sorted(FACTORIZATIONS)
    raise ValueError(f"expected one of {known} or an einsum such as 'ar,br,cr->abc' in `factorization`, got {name!r}")


__all__ = [
    "CP",
    "FACTORIZATIONS",
    "BlockTT",
    "BlockTerm",
    "Factorization",
    "HierarchicalTucker",
    "Leg",
    "Rank",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "einsum_format",
    "factorization_class",
    "tensor_dropout_",
    "without_dropout",
]
