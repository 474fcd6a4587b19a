"""Linear maps of tensors to tensors: of all modes at once, or of each mode by itself."""

import math
import string
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.factorizations import Factorization, FactorizationName, Rank, factorization_class
from tenzoo.layers.cost import Positions
from tenzoo.layers.implementation import FactorizedLayer, Implementation
from tenzoo.layers.networks import contract_rows_of_inputs
from tenzoo.layers.tensorization import check_sizes

_LETTERS = len(string.ascii_letters)
"""Modes that an einsum can have."""


class TensorRegression(FactorizedLayer):
    """``Y = ⟨X, W⟩ + b`` over all modes of the input, with W of shape ``(*output_shape, *input_shape)`` made of cores.

    It is a linear layer on tensors that keep their modes. At initialization W has mean 0 and variance ``2/I``, with I
    the number of entries of an input (He et al. 2015, arXiv:1502.01852, eq. 10), and the bias is that of a linear
    layer. Source: Kossaifi et al. 2020, "Tensor Regression Networks", JMLR 21(123), section 4; the modes of the output
    come first here.

    Args:
        input_shape: Sizes of the modes of an input, without those of the batch.
        output_shape: Sizes of the modes of an output.
        bias: Whether b, of shape ``output_shape``, is added.
        device: Where the parameters are made.
        dtype: Their floating-point type.
        factorization: Name of a format, such as ``"tucker"``, or an einsum whose modes are those of W.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters.
        implementation: Reconstruct W, contract the input with the cores, or take the cheaper.

    Attributes:
        bias: b, or None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, or a size or the rank does not fit.

    Example:
        >>> layer = TensorRegression((8, 7, 7), (10,), factorization="tucker", rank=[5, 4, 3, 3])
        >>> layer(torch.randn(2, 8, 7, 7)).shape, layer.weight.shape
        (torch.Size([2, 10]), torch.Size([10, 8, 7, 7]))
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        factorization: FactorizationName,
        rank: Rank,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation)
        self.input_shape = _checked("input_shape", input_shape)
        self.output_shape = _checked("output_shape", output_shape)
        self.factorization = factorization_class(factorization)(
            (*self.output_shape, *self.input_shape),
            rank,
            init_std=math.sqrt(2 / math.prod(self.input_shape)),
            device=device,
            dtype=dtype,
        )
        self.bias = nn.Parameter(torch.empty(self.output_shape, device=device, dtype=dtype)) if bias else None
        self._count_costs()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw cores and bias anew."""
        self.factorization.reset_parameters()
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.input_shape))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(…, *input_shape)``.

        Returns:
            ``(…, *output_shape)``.

        Raises:
            ValueError: If the last sizes of the input are others.
        """
        order = len(self.input_shape)
        if x.shape[-order:] != self.input_shape:
            raise ValueError(f"expected shape (…, {str(self.input_shape)[1:]} in `x`, got {tuple(x.shape)}")
        rows = x.reshape(-1, *self.input_shape)
        if self.choose(self.positions(x)) == "contract":
            y = self._contract(self.factorization, rows)
        else:
            y = self._apply_dense(rows, self.dense_weight())
        y = y.reshape(*x.shape[: x.ndim - order], *self.output_shape)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def positions(self, x: Tensor) -> Positions:
        """Samples."""
        rows = x.numel() // math.prod(self.input_shape)
        return Positions(rows, rows)

    def _contract(self, weight: Factorization, x: Tensor) -> Tensor:
        return contract_rows_of_inputs(weight, x, len(self.output_shape))

    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.flatten(1), weight.reshape(math.prod(self.output_shape), -1))

    @override
    def as_weight(self, tensor: Tensor) -> Tensor:
        return tensor

    @override
    def as_tensor(self, dense: Tensor) -> Tensor:
        return dense

    def _example_inputs(self) -> Sequence[Tensor]:
        return [torch.empty(rows, *self.input_shape, device="meta") for rows in (64, 512)]

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return f"{self.input_shape}, {self.output_shape}, bias={self.bias is not None}, {self._implementation}"

    @property
    def _implementation(self) -> str:
        return f"implementation={self.implementation}"


class TensorContraction(TensorRegression):
    """Multiply each mode k of the input by a factor matrix ``U_k (r_k, n_k)``, ``Y = X ×_1 U_1 ×_2 ⋯ ×_d U_d + b``.

    The factors are the cores, and W is their outer product, of shape ``(*rank, *input_shape)``. At initialization W has
    mean 0 and variance ``2/I``, as in :class:`TensorRegression`. Source: Kossaifi et al. 2017, "Tensor Contraction
    Layers for Parsimonious Deep Nets", arXiv:1706.00439, section 3.

    Args:
        input_shape: Sizes ``n_k`` of the modes of an input, without those of the batch.
        rank: Sizes ``r_k`` of the modes of an output, one number for all or a list.
        bias: Whether b, of the shape of an output, is added.
        device: Where the parameters are made.
        dtype: Their floating-point type.
        implementation: Reconstruct W, contract the input with the cores, or take the cheaper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size or a rank is below 1, or there are too few or too many ranks.

    Example:
        >>> layer = TensorContraction((8, 7, 7), rank=[4, 3, 3])
        >>> layer(torch.randn(2, 8, 7, 7)).shape, [tuple(core.shape) for core in layer.factorization.cores]
        (torch.Size([2, 4, 3, 3]), [(4, 8), (3, 7), (3, 7)])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        rank: int | Sequence[int],
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        implementation: Implementation = "auto",
    ) -> None:
        order = len(_checked("input_shape", input_shape))
        ranks = _checked("rank", rank if isinstance(rank, Sequence) else [rank] * order)
        if order > _LETTERS // 2:
            raise ValueError(f"expected {_LETTERS // 2} sizes or fewer in `input_shape`, got {order}")
        if len(ranks) != order:
            raise ValueError(f"expected {order} ints in `rank`, one for each mode of the input, got {len(ranks)}")
        super().__init__(
            input_shape,
            ranks,
            bias,
            device,
            dtype,
            factorization=_outer_product(order),
            rank=1,
            implementation=implementation,
        )

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return f"{self.input_shape}, rank={self.output_shape}, bias={self.bias is not None}, {self._implementation}"


def _outer_product(order: int) -> str:
    """The einsum of an outer product of matrices.

    Example:
        >>> _outer_product(2)
        'ac,bd->abcd'
    """
    letters = string.ascii_letters[: 2 * order]
    rows, columns = letters[:order], letters[order:]
    return f"{','.join(map(''.join, zip(rows, columns, strict=True)))}->{letters}"


def _checked(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes of one mode or more."""
    if isinstance(sizes, str | bytes) or not isinstance(sizes, Sequence):
        raise TypeError(f"expected a sequence of ints in `{name}`, got {sizes!r}")
    if not sizes:
        raise ValueError(f"expected one size or more in `{name}`, got none")
    for size in sizes:
        check_sizes(**{name: size})
    return tuple(int(size) for size in sizes)
