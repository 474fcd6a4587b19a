"""Matrices that are reconstructed from cores, and checks of their sizes."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from tenzoo.adapters.modes import check_modes, matrix_modes
from tenzoo.factorizations import Factorization, Rank, factorization_class
from tenzoo.layers.factorized import without_autocast


class FactorizedMatrix(nn.Module):
    """A matrix ``(rows, columns)``, the first of the entries of a tensor in their order.

    The modes of the tensor need not meet the border between rows and columns. Entries beyond the matrix are not used.

    Args:
        rows: Rows.
        columns: Columns.
        factorization: Name of a format, or an einsum.
        rank: As the format takes it; one number is cut to what the modes can use.
        modes: Of the tensor; None chooses them.
        std: Root mean square of the entries at initialization.

    Raises:
        ValueError: If the modes do not multiply to the size of the matrix, or the rank does not fit the format.

    Example:
        >>> matrix = FactorizedMatrix(4096, 8, factorization="tt", rank=16, modes=[16, 16, 8, 4, 4])
        >>> matrix().shape, sum(core.numel() for core in matrix.factorization.cores)
        (torch.Size([4096, 8]), 7488)
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        factorization: str,
        rank: Rank,
        modes: Sequence[int] | None = None,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        kind = factorization_class(factorization)
        if modes is None:
            modes = matrix_modes(kind, rows * columns)
        else:
            check_modes(modes, rows * columns, f"{rows} × {columns}")
        self.factorization = kind(modes, used_rank(kind, modes, rank), init_std=std)

    def forward(self) -> Tensor:
        """The matrix, in the precision of the cores."""
        with without_autocast(self.factorization):
            entries = self.factorization.reconstruct().reshape(-1)
        return entries[: self.rows * self.columns].view(self.rows, self.columns)


def check_r(r: int, in_features: int, out_features: int) -> None:
    """Refuse an inner width above the larger side.

    Raises:
        ValueError: Naming both.
    """
    largest = max(in_features, out_features)
    if r > largest:
        raise ValueError(
            f"expected an int of at most {largest} in `r` for a weight of {out_features} × {in_features}, got {r}"
        )


def largest_rank(kind: type[Factorization], shape: Sequence[int], rank: int) -> int:
    """The largest rank up to a uniform one that a bond of a format and a shape can use.

    Example:
        >>> largest_rank(factorization_class("tt"), (4, 4), 3), largest_rank(factorization_class("tt"), (4, 4), 100)
        (3, 4)
    """
    return min(rank, max(kind.clipped_rank(tuple(shape), rank)))


def used_rank(kind: type[Factorization], shape: Sequence[int], rank: Rank) -> Rank:
    """A rank for all weights, cut to what this one can use where it is uniform."""
    return largest_rank(kind, shape, rank) if isinstance(rank, int) and rank > 0 else rank


def check_uniform_rank(networks: Iterable[Factorization], rank: int) -> None:
    """Refuse a uniform rank that no tensor network of an adapter can use.

    Args:
        networks: All of the adapter.
        rank: For all of them.

    Raises:
        ValueError: Naming the largest that one of them can use.
    """
    largest = max((largest_rank(type(network), network.shape, rank) for network in networks), default=rank)
    if rank > largest:
        raise ValueError(
            f"expected an int of at most {largest} in `rank`, the largest that a layer can use, got {rank}"
        )
