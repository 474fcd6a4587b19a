"""Random masks of bonds."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tenzoo.factorizations.network import Holder, Network


def masked_dims(network: Network, shape: Sequence[int], rank: Sequence[int]) -> tuple[Holder, ...]:
    """For each bond larger than 1, the smallest core that has it, and the dimension of that core.

    A mask on one core is a mask on all cores of the bond: each term of the sum over the bond has an entry of each.

    Example:
        >>> matrix = Network([(0, "r"), ("r", 1)], 2, lambda rank, order: {"r": rank[0]})
        >>> masked_dims(matrix, (4, 3), (2,)), masked_dims(matrix, (4, 3), (1,))
        ((Holder(core=1, dim=0),), ())
    """
    sizes, shapes = network.sizes(shape, rank), network.core_shapes(shape, rank)
    return tuple(
        min(network.holders[bond], key=lambda holder: torch.Size(shapes[holder.core]).numel())
        for bond in network.bonds
        if sizes[bond] > 1
    )


def masked(cores: Sequence[Tensor], dims: Sequence[Holder], p: float) -> list[Tensor]:
    """The cores with a new mask on each of these dimensions."""
    made = list(cores)
    for core, dim in dims:
        shape = [size if k == dim else 1 for k, size in enumerate(made[core].shape)]
        made[core] = made[core] * draw_mask(shape, made[core], p)
    return made


def draw_mask(shape: Sequence[int], core: Tensor, p: float) -> Tensor:
    """Zeros with probability p, and else 1 / (1 − p)."""
    return F.dropout(core.new_ones(shape), p)
