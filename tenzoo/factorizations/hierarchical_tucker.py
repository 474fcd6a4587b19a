"""The hierarchical Tucker format: a balanced binary tree over the modes."""

from typing import ClassVar, final

from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.network import Leg


@final
class HierarchicalTucker(Factorization):
    """Hierarchical Tucker format: the modes are the leaves of a balanced binary tree.

    The cores are the root ``(r, r')``, a core ``(r, r', r'')`` for every other inner node, whose first rank leads to
    the root, and a factor ``U_k (n_k, r)`` for every mode. They come in the order in which the tree is walked from the
    root, left before right; ``rank`` holds the ranks of the bonds in the same order, two per inner node. A rank above
    what the unfolding at its bond can have is clipped to it. Source: Hackbusch and Kühn 2009, J. Fourier Anal. Appl.
    15(5); Grasedyck 2010, SIAM J. Matrix Anal. Appl. 31(4), definitions 3.3 and 3.6.

    A decomposition is computed by singular value decompositions from the leaves to the root. Its squared error is at
    most 2d - 2 times that of the best approximation of the same ranks.

    Example:
        >>> import torch
        >>> weight = HierarchicalTucker((4, 5, 6), rank=3)
        >>> dense = torch.einsum("ab,acd,ic,jd,kb->ijk", *weight.cores)
        >>> torch.allclose(weight.reconstruct(), dense, atol=1e-5)
        True
    """

    name: ClassVar[str] = "ht"

    @staticmethod
    def legs(order: int) -> list[tuple[Leg, ...]]:
        """The inner nodes and leaves of the tree; a bond has the name of the modes below it."""
        found: list[tuple[Leg, ...]] = []

        def walk(first: int, last: int, above: tuple[Leg, ...]) -> None:
            if last - first == 1:
                found.append((first, *above))
                return
            middle = (first + last + 1) // 2
            below = f"{first}:{middle}", f"{middle}:{last}"
            found.append((*above, *below))
            walk(first, middle, below[:1])
            walk(middle, last, below[1:])

        walk(0, order, ())
        return found
