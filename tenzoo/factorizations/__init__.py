"""What a tensorized weight can be made of: formats behind one interface, and any network of cores.

Example:
    >>> import torch
    >>> weight = factorization_class("tt")((4, 5, 6), rank=3)
    >>> index = torch.tensor([[0, 0, 0], [3, 4, 5]])
    >>> torch.allclose(weight.entries(index), weight.reconstruct()[index.unbind(1)], atol=1e-5)
    True
"""

import importlib

from tenzoo.factorizations.base import FACTORIZATIONS, Factorization
from tenzoo.factorizations.block_term import BlockTerm
from tenzoo.factorizations.block_tt import BlockTT
from tenzoo.factorizations.cp import CP
from tenzoo.factorizations.dropout import tensor_dropout_, without_dropout
from tenzoo.factorizations.einsum import einsum_format
from tenzoo.factorizations.hierarchical_tucker import HierarchicalTucker
from tenzoo.factorizations.names import FactorizationName
from tenzoo.factorizations.network import Leg, OrderError
from tenzoo.factorizations.rank import Rank
from tenzoo.factorizations.tensor_ring import TensorRing
from tenzoo.factorizations.tensor_train import TensorTrain
from tenzoo.factorizations.tucker import Tucker


def factorization_class(name: str) -> type[Factorization]:
    """The format of a given name.

    Args:
        name: One of ``"btd"``, ``"btt"``, ``"cp"``, ``"ht"``, ``"tr"``, ``"tt"`` and ``"tucker"``, the name of a format
            of your own, the path of its class such as ``"my_formats.UniformRing"``, which is imported, or an einsum
            such as ``"ar,br,cr->abc"`` (see :func:`~tenzoo.factorizations.einsum.einsum_format`).

    Raises:
        TypeError: If it is no string.
        ValueError: If there is no such format.

    Example:
        >>> factorization_class("tucker").__name__
        'Tucker'
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a format or an einsum in `factorization`, got {name!r}")
    if name in FACTORIZATIONS:
        return FACTORIZATIONS[name]
    if "->" in name or "," in name:
        return einsum_format("".join(name.split()))
    if "." in name:
        return _imported(name)
    known = sorted(FACTORIZATIONS)
    raise ValueError(f"expected one of {known} or an einsum such as 'ar,br,cr->abc' in `factorization`, got {name!r}")


def _imported(path: str) -> type[Factorization]:
    """A format by the path of its class."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # within the user's module
        found = None
    if not (isinstance(found, type) and issubclass(found, Factorization) and "name" in vars(found)):
        raise ValueError(
            "expected the path of a subclass of Factorization with a `name` of its own in `factorization`, got "
            f"{path!r}"
        )
    return found


__all__ = [
    "CP",
    "FACTORIZATIONS",
    "BlockTT",
    "BlockTerm",
    "Factorization",
    "FactorizationName",
    "HierarchicalTucker",
    "Leg",
    "OrderError",
    "Rank",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "einsum_format",
    "factorization_class",
    "tensor_dropout_",
    "without_dropout",
]
