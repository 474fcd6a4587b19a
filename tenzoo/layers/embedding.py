"""An embedding with a tensorized table."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.factorizations import Factorization, FactorizationName, Rank
from tenzoo.layers.implementation import Implementation
from tenzoo.layers.table import TensorizedTable
from tenzoo.layers.tensorization import Tensorization


class TensorizedEmbedding(TensorizedTable[nn.Embedding], nn.Embedding):
    """A table of vectors, as :class:`torch.nn.Embedding`, with ``W (num_embeddings, embedding_dim)`` made of cores.

    W is reshaped to ``(*rows, *columns)``, the factors of both sizes. The product of the row factors may be larger than
    ``num_embeddings``; what is beyond is never read. At initialization W has mean 0 and variance 1, as in torch.

    Three of torch's arguments are missing, for want of a row that could be changed by itself: ``max_norm`` with
    ``norm_type``, and ``scale_grad_by_freq``; so is ``sparse``, since the gradients are as small as the cores. The row
    ``padding_idx`` gives no gradient; it is no part of W, and kept as it is: 0, or that of the table it was made from.

    Example:
        >>> layer = TensorizedEmbedding(50_000, 768, factorization="tt", rank=16)
        >>> layer(torch.tensor([[0, 49_999]])).shape, layer.factorization.shape
        (torch.Size([1, 2, 768]), (50, 40, 25, 12, 8, 8))

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
        implementation: Reconstruct W and look up its rows, compute the wanted rows alone, or take the cheaper.

    Attributes:
        padding_row: A buffer, the row ``padding_idx`` of the table; None without one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, rank or tensorization does not fit, or as torch does.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        factorization: FactorizationName,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim, "padding_idx": padding_idx},
            factorization=factorization,
            rank=rank,
            tensorization=tensorization,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )

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
        self._check(index)
        if self.choose(self.positions(index)) == "contract":
            rows = self._contract(self.factorization, index)
        else:
            rows = F.embedding(index, self._table())
        return self._padded(rows, index)

    @override
    def output_rows(self, y: Tensor) -> Tensor:
        return y.reshape(-1, *self.tensorization[1])

    def _contract(self, weight: Factorization, x: Tensor) -> Tensor:
        return self._rows(weight, x)

    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight)
