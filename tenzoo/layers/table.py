"""Tables of vectors made of cores: what an embedding and an embedding bag have in common."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.factorizations import Factorization, Rank, factorization_class
from tenzoo.layers.base import TensorizedLayer
from tenzoo.layers.contraction import contract_rows
from tenzoo.layers.cost import Positions
from tenzoo.layers.factorized import without_autocast
from tenzoo.layers.implementation import Implementation
from tenzoo.layers.tensorization import Tensorization, check_sizes, layer_modes

T = TypeVar("T", nn.Embedding, nn.EmbeddingBag)

_ARGUMENTS = ("num_embeddings", "embedding_dim", "padding_idx")
_REFUSED = ("max_norm", "scale_grad_by_freq", "sparse")


class TensorizedTable(TensorizedLayer[T]):
    """A layer that looks up rows of ``W (num_embeddings, embedding_dim)``.

    Abstract: a subclass says what becomes of the rows. W has the factors of both sizes as its modes; the product of the
    row factors may be larger than ``num_embeddings``.

    Attributes:
        padding_row: A buffer, the row ``padding_idx`` of the table; None without one.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    padding_row: Tensor | None

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        factorization: str,
        rank: Rank,
        tensorization: Tensorization | None,
        implementation: Implementation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(implementation)
        kind = factorization_class(factorization)
        rows, columns, padding_idx = (arguments[name] for name in _ARGUMENTS)
        check_sizes(num_embeddings=rows, embedding_dim=columns)
        try:
            torchs = self.dense_class(**arguments, device="meta")
        except AssertionError as error:  # torch's own check
            message = f"expected a row below num_embeddings ({rows}) in `padding_idx`, got {padding_idx}"
            raise ValueError(message) from error
        for name in (*arguments, *_REFUSED, "norm_type"):
            setattr(self, name, getattr(torchs, name))
        self.tensorization, shape = layer_modes(kind, tensorization, self.sides(self), covers=True)
        ranks = kind.resolve_rank(shape, rank, rows * columns)  # a fraction of the table, not of its cover
        self.factorization = kind(shape, ranks, device=device, dtype=dtype)
        padding = self.factorization.cores[0].new_zeros(columns)
        self.register_buffer("padding_row", None if self.padding_idx is None else padding)
        self._count_costs()

    def reset_parameters(self) -> None:
        """Draw the cores anew; the padding becomes 0."""
        self.factorization.reset_parameters()
        if self.padding_row is not None:
            self.padding_row.zero_()

    def _table(self) -> Tensor:
        """The table that is looked up in; the row of the padding is another one."""
        return super()._reconstruct()

    def _padded(self, rows: Tensor, index: Tensor) -> Tensor:
        if self.padding_row is None:
            return rows
        assert self.padding_idx is not None
        return torch.where(index.eq(self.padding_idx).unsqueeze(-1), self.padding_row.to(rows.dtype), rows)

    def _reconstruct(self) -> Tensor:
        table = self._table()
        return self._padded(table, torch.arange(self.num_embeddings, device=table.device))

    def _check(self, index: Tensor) -> None:
        """Refuse an index on the CPU that is out of range, where it can be read."""
        if not index.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_embeddings:
            raise IndexError(
                f"expected 0 to {self.num_embeddings - 1} in `index`, got values from {index.min()} to {index.max()}"
            )

    def positions(self, x: Tensor) -> Positions:
        """Indices."""
        return Positions(x.numel(), x.numel())

    def look_ups(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """A padding is not looked up: its row is another one."""
        factors = self.tensorization[0]
        numbers = torch.bincount(x.reshape(-1), weights, minlength=math.prod(factors))
        if self.padding_idx is not None:
            numbers[self.padding_idx] = 0
        return numbers.view(factors)

    def _rows(self, weight: Factorization, index: Tensor) -> Tensor:
        """The rows ``(*index.shape, embedding_dim)``, computed from the cores."""
        flat, columns = index.reshape(-1), []
        for size in reversed(self.tensorization[0][1:]):
            columns.append(flat % size)
            flat = flat // size
        columns.append(flat)  # not modulo its size, so that what is beyond all rows is out of range here too
        columns.reverse()
        with without_autocast(self.factorization):  # a look-up keeps the precision of its table
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
        return [torch.empty(count // 8, 8, dtype=torch.int64, device="meta") for count in (64, 512)]

    @override
    @staticmethod
    def sides(layer: Any) -> dict[str, int]:
        return {"num_embeddings": layer.num_embeddings, "embedding_dim": layer.embedding_dim}

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        for name in _REFUSED:
            if getattr(layer, name, None):
                raise ValueError(
                    f"expected a layer without `{name}`, got {getattr(layer, name)}: rows made of cores do not have it"
                )
        return {name: getattr(layer, name) for name in _ARGUMENTS}

    def to_dense(self) -> T:
        """The torch layer that computes the same; a copy."""
        return self._filled(self.dense_class(**self._arguments(self), device="meta"))  # type: ignore[arg-type]

    def _copy_rest(self, layer: T) -> None:
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
