"""An embedding bag with a tensorized table."""

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.factorizations import Factorization, FactorizationName, Rank
from tenzoo.layers.implementation import Implementation
from tenzoo.layers.table import TensorizedTable
from tenzoo.layers.tensorization import Tensorization

_Mode = Literal["sum", "mean", "max"]


class TensorizedEmbeddingBag(TensorizedTable[nn.EmbeddingBag], nn.EmbeddingBag):
    """Sums, means or maxima of rows of a table, as :class:`torch.nn.EmbeddingBag`, with a table made of cores.

    The table is that of a :class:`~tenzoo.layers.TensorizedEmbedding`, without ``max_norm``, ``scale_grad_by_freq`` and
    ``sparse`` as there. The row ``padding_idx`` is left out of each bag.

    Example:
        >>> layer = TensorizedEmbeddingBag(50_000, 768, mode="sum", factorization="tt", rank=16)
        >>> layer(torch.tensor([0, 49_999, 7]), torch.tensor([0, 2])).shape
        torch.Size([2, 768])

    Args:
        num_embeddings: As in torch.
        embedding_dim: As in torch.
        mode: As in torch.
        include_last_offset: As in torch.
        padding_idx: As in torch.
        device: As in torch.
        dtype: As in torch.
        factorization: Name of a format, such as ``"tt"``, or an einsum.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters.
        tensorization: As in :class:`~tenzoo.layers.TensorizedEmbedding`.
        implementation: Reconstruct W and look up its rows, compute the wanted rows alone, or take the cheaper.

    Attributes:
        padding_row: A buffer, the row ``padding_idx`` of the table; None without one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format or the mode is unknown, rank or tensorization does not fit, or as torch does.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        factorization: FactorizationName,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in get_args(_Mode):
            raise ValueError(f"expected one of {sorted(get_args(_Mode))} in `mode`, got {mode!r}")
        super().__init__(
            {
                "num_embeddings": num_embeddings,
                "embedding_dim": embedding_dim,
                "padding_idx": padding_idx,
                "mode": mode,
                "include_last_offset": include_last_offset,
            },
            factorization=factorization,
            rank=rank,
            tensorization=tensorization,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up rows, and reduce those of each bag.

        Args:
            input: Integers ``(bags, n)``, or ``(n,)`` with offsets.
            offsets: Where each bag starts, and with ``include_last_offset`` where the last one ends.
            per_sample_weights: Factors of the rows, of the shape of the input; for the mode ``"sum"`` only.

        Returns:
            ``(bags, embedding_dim)``.

        Raises:
            IndexError: As :class:`~tenzoo.layers.TensorizedEmbedding`.
            ValueError: As torch does.
        """
        self._check(input)
        if self.choose(self.positions(input)) == "contract":
            return self._contract(self.factorization, input, offsets, per_sample_weights)
        return self._bags(input, self._table(), self.mode, offsets, per_sample_weights, self.padding_idx)

    def _contract(
        self,
        weight: Factorization,
        x: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Torch's reduction of a table that holds the wanted rows alone, in their order."""
        rows = self._rows(weight, x.reshape(-1))
        index = torch.arange(x.numel(), device=x.device, dtype=x.dtype).view(x.shape)
        if self.padding_idx is None:
            return self._bags(index, rows, self.mode, offsets, per_sample_weights)
        # Not by torch's padding, with which an exported program would have one size of the table.
        padded = (x == self.padding_idx).reshape(-1, 1)
        rows = rows.masked_fill(padded, -torch.inf if self.mode == "max" else 0)
        bags = self._bags(index, rows, self.mode, offsets, per_sample_weights)
        if self.mode == "sum":
            return bags
        exact = torch.promote_types(rows.dtype, torch.float32)  # half precision would round the shares
        shares = self._bags(index, (~padded).to(exact), "mean", offsets)  # of the rows of a bag that are no padding
        empty = shares == 0
        return (
            bags.masked_fill(empty, 0) if self.mode == "max" else (bags / shares.masked_fill(empty, 1)).to(bags.dtype)
        )

    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._bags(x, weight, self.mode, padding_idx=self.padding_idx)

    def _bags(
        self,
        index: Tensor,
        table: Tensor,
        mode: str,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        padding_idx: int | None = None,
    ) -> Tensor:
        return F.embedding_bag(
            index,
            table,
            offsets,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding_idx,
        )

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        more = {name: getattr(layer, name) for name in ("mode", "include_last_offset")}
        return {**TensorizedTable._arguments(layer), **more}

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        table, implementation = super().extra_repr().rsplit(", ", 1)
        return f"{table}, mode={self.mode!r}, {implementation}"
