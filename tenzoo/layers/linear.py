"""Linear layers with a tensorized weight."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tenzoo.factorizations import Factorization, FactorizationName, Rank, factorization_class
from tenzoo.layers.base import L, TensorizedLayer
from tenzoo.layers.contraction import contract_linear
from tenzoo.layers.cost import Positions
from tenzoo.layers.implementation import Implementation
from tenzoo.layers.tensorization import Tensorization, check_sizes, layer_modes


class LinearLayer(TensorizedLayer[L]):
    """A layer that multiplies rows by a matrix ``W (out_features, in_features)`` made of cores.

    Abstract: a layer says by which names it knows its sizes, and how torch or another library lays W out.
    """

    in_features: int
    out_features: int

    def _make_cores(
        self,
        factorization: FactorizationName,
        rank: Rank,
        tensorization: Tensorization | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        bias: bool,
    ) -> None:
        kind = factorization_class(factorization)
        check_sizes(**self.sides(self))
        self.out_features, self.in_features = self.sides(self).values()
        self.tensorization, shape = layer_modes(kind, tensorization, self.sides(self))
        self.factorization = kind(shape, rank, init_std=math.sqrt(2 / self.in_features), device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self._count_costs()
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(…, in_features)``.

        Returns:
            ``(…, out_features)``.
        """
        if not x.is_nested and self.choose(self.positions(x)) == "contract":
            return self._contract(self.factorization, x, self.bias)
        return self._multiply(x, self.dense_weight(), self.bias)

    def positions(self, x: Tensor) -> Positions:
        """Rows."""
        rows = x.numel() // self.in_features
        return Positions(rows, rows)

    @override
    def patches(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.tensorization[1])

    @override
    def output_rows(self, y: Tensor) -> Tensor:
        return y.reshape(-1, *self.tensorization[0])

    def _contract(self, weight: Factorization, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return contract_linear(weight, x, len(self.tensorization[0]), bias)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw cores and bias anew."""

    @staticmethod
    @abstractmethod
    def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of rows and the dense weight, in the layout of the layer that this class replaces."""

    def _example_inputs(self) -> Sequence[Tensor]:
        return [torch.empty(rows, self.in_features, device="meta") for rows in (64, 512)]

    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._multiply(x, weight, None)


class TensorizedLinear(LinearLayer[nn.Linear], nn.Linear):
    """``y = x W^T + b``, as :class:`torch.nn.Linear`, with ``W (out_features, in_features)`` made of cores.

    W is reshaped to ``(*out, *in)``, the factors of both sizes. At initialization W has mean 0 and variance
    ``2/in_features`` (He et al. 2015, arXiv:1502.01852, eq. 10) in every format, and the bias is torch's.

    Example:
        >>> layer = TensorizedLinear(64, 10, factorization="tt", rank=4)
        >>> layer(torch.randn(7, 64)).shape, layer.weight.shape, layer.factorization.shape
        (torch.Size([7, 10]), torch.Size([10, 64]), (5, 2, 4, 4, 4))

    Args:
        in_features: As in torch.
        out_features: As in torch.
        bias: As in torch.
        device: As in torch.
        dtype: As in torch.
        factorization: Name of a format, such as ``"tt"``, or an einsum.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters.
        tensorization: Factors of ``out_features`` and of ``in_features``. By default a format with a factor per mode,
            such as CP and Tucker, takes both sizes whole; the others split each into up to three factors. In a block TT
            the shorter list is filled up with 1.
        implementation: Reconstruct W and call torch's operator, contract the input with the cores, or take the cheaper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, or rank or tensorization does not fit.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        factorization: FactorizationName,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(implementation)
        self.in_features, self.out_features = in_features, out_features
        self._make_cores(factorization, rank, tensorization, device, dtype, bias=bias)

    def reset_parameters(self) -> None:
        """Draw cores and bias anew."""
        self.factorization.reset_parameters()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @override
    def as_weight(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.out_features, self.in_features)

    @override
    def as_tensor(self, dense: Tensor) -> Tensor:
        return dense.reshape(self.factorization.shape)

    @staticmethod
    def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @override
    @staticmethod
    def sides(layer: Any) -> dict[str, int]:
        return {"out_features": layer.out_features, "in_features": layer.in_features}

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        names = ("in_features", "out_features")
        return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}

    def to_dense(self) -> nn.Linear:
        """The torch layer that computes the same; a copy."""
        return self._filled(nn.Linear(**self._arguments(self), device="meta"))

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return f"{nn.Linear.extra_repr(self)}, implementation={self.implementation}"
