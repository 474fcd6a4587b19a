"""An embedding with a tensorized table."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.factorizations import Factorization, Rank, factorization_class
from tenzoo.layers.base import Implementation, TensorizedLayer
from tenzoo.layers.contraction import contract_rows
from tenzoo.layers.cost import Positions
from tenzoo.layers.tensorization import Tensorization, check_sizes, layer_modes


class TensorizedEmbedding(TensorizedLayer[nn.Embedding], nn.Embedding):
    """A table of vectors, as :class:`torch.nn.Embedding`, with ``W (num_embeddings, embedding_dim)`` made of cores.

    W is reshaped to ``(*rows, *columns)``, the factors of both sizes. The product of the row factors may be larger than
    ``num_embeddings``; what is beyond is never read. At initialization W has mean 0 and variance 1, as in torch.

    Three of torch's arguments are missing, for want of a row that could be changed by itself: ``max_norm`` with
    ``norm_type``, and ``scale_grad_by_freq``; so is ``sparse``, since the gradients are as small as the cores. The row
    ``padding_idx`` gives no gradient; it is no part of W, and kept as it is: 0, or that of the table it was made from.

    Args:
        num_embeddings: As in torch.
        embedding_dim: As in torch.
        padding_idx: As in torch.
        device: As in torch.
        dtype: As in torch.
        factorization: Name of a format, such as ``"tt"``, or an einsum.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters.
        tensorization: Factors of ``num_embeddings``, or of more, and of ``embedding_dim``. By default as
            in a linear layer, with a product near ``num_embeddings``.
        implementation: Rebuild W and look up its rows, compute the wanted rows alone, or take the cheaper.

    Attributes:
        padding_row: A buffer, what is read at ``padding_idx``; None without one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, rank or tensorization does not fit, or as torch does.

    Example:
        >>> layer = TensorizedEmbedding(50_000, 768, factorization="tt", rank=16)
        >>> layer(torch.tensor([[0, 49_999]])).shape, layer.factorization.shape
        (torch.Size([1, 2, 768]), (50, 40, 25, 12, 8, 8))
    """

    dense_class: ClassVar[type[nn.Module]] = nn.Embedding

    padding_row: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        factorization: str,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(implementation)
        kind = factorization_class(factorization)
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        try:
            torchs = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta")
        except AssertionError as error:  # torch's own check
            message = f"expected a row below num_embeddings ({num_embeddings}) in `padding_idx`, got {padding_idx}"
            raise ValueError(message) from error
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = torchs.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.tensorization, shape = layer_modes(kind, tensorization, self.sides(self), covers=True)
        ranks = kind.resolve_rank(
            shape, rank, num_embeddings * embedding_dim
        )  # a fraction of the table, not of its cover
        self.factorization = kind(shape, ranks, device=device, dtype=dtype)
        padding = self.factorization.cores[0].new_zeros(embedding_dim)
        self.register_buffer("padding_row", None if self.padding_idx is None else padding)
        self._count_costs()

    def reset_parameters(self) -> None:
        """Draw the cores anew; the padding becomes 0."""
        self.factorization.reset_parameters()
        if self.padding_row is not None:
            self.padding_row.zero_()

    def forward(self, index: Tensor) -> Tensor:
        """Look up rows.

        Args:
            index: Integers of any shape.

        Returns:
            ``(*index.shape, embedding_dim)``.

        Raises:
            IndexError: If an index on the CPU is out of range. Within ``torch.compile`` and ``torch.func`` an index
                that the row factors cover, though not ``num_embeddings``, goes unnoticed.
        """
        if index.is_cpu and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            self._check(index)
        if self.choose(self.positions(index)) == "contract":
            rows = self._contract(self.factorization, index)
        else:
            rows = F.embedding(index, super()._reconstruct())
        return self._padded(rows, index)

    def _padded(self, rows: Tensor, index: Tensor) -> Tensor:
        if self.padding_row is None:
            return rows
        assert self.padding_idx is not None
        return torch.where(index.eq(self.padding_idx).unsqueeze(-1), self.padding_row.to(rows.dtype), rows)

    def _reconstruct(self) -> Tensor:
        table = super()._reconstruct()
        return self._padded(table, torch.arange(self.num_embeddings, device=table.device))

    def _check(self, index: Tensor) -> None:
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_embeddings:
            raise IndexError(
                f"expected 0 to {self.num_embeddings - 1} in `index`, got values from {index.min()} to {index.max()}"
            )

    def positions(self, x: Tensor) -> Positions:
        """Indices."""
        return Positions(x.numel(), x.numel())

    def _contract(self, weight: Factorization, index: Tensor) -> Tensor:
        flat, columns = index.reshape(-1), []
        for size in reversed(self.tensorization[0][1:]):
            columns.append(flat % size)
            flat = flat // size
        columns.append(flat)  # not modulo its size, so that what is beyond all rows is out of range here too
        columns.reverse()
        with self._without_autocast():  # a look-up keeps the precision of its table
            rows = contract_rows(weight, columns)
        return rows.reshape(*index.shape, self.embedding_dim)

    @override
    def as_weight(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, self.embedding_dim)[: self.num_embeddings]

    @override
    def as_tensor(self, dense: Tensor) -> Tensor:
        if self.padding_idx is not None:
            dense = dense.index_fill(0, torch.tensor([self.padding_idx], device=dense.device), 0)
        missing = math.prod(self.tensorization[0]) - self.num_embeddings
        return F.pad(dense, (0, 0, 0, missing)).reshape(self.factorization.shape)

    def _may_cache(self) -> bool:
        return False  # a table is large, and a call reads little of it

    def _example_inputs(self) -> Sequence[Tensor]:
        return [torch.empty(count, dtype=torch.int64, device="meta") for count in (64, 512)]

    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight)

    @override
    @staticmethod
    def sides(layer: Any) -> dict[str, int]:
        return {"num_embeddings": layer.num_embeddings, "embedding_dim": layer.embedding_dim}

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(layer, name, None):
                raise ValueError(
                    f"expected a layer without `{name}`, got {getattr(layer, name)}: rows made of cores do not have it"
                )
        return {name: getattr(layer, name) for name in ("num_embeddings", "embedding_dim", "padding_idx")}

    def to_dense(self) -> nn.Embedding:
        """The torch layer that computes the same; a copy."""
        return self._filled(nn.Embedding(**self._arguments(self), device="meta"))

    def _copy_rest(self, layer: nn.Embedding) -> None:
        if layer.padding_idx is not None:
            self.padding_row = layer.weight.detach()[layer.padding_idx].clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.padding_row is not None:  # where a state dict has none, it was 0
            state_dict.setdefault(f"{prefix}padding_row", torch.zeros_like(self.padding_row, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, implementation={self.implementation}"
