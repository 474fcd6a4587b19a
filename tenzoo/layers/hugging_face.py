"""The linear layer of GPT-2 in Hugging Face's transformers, with a tensorized weight; the module needs transformers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from tenzoo.factorizations import FactorizationName, Rank
from tenzoo.layers.implementation import Implementation
from tenzoo.layers.linear import LinearLayer
from tenzoo.layers.tensorization import Tensorization


class TensorizedTransposedLinear(LinearLayer[Any], Conv1D):  # type: ignore[misc]
    """``y = x W + b``, as ``transformers.pytorch_utils.Conv1D``, with ``W (nx, nf)`` made of cores.

    ``W^T`` is reshaped to ``(*out, *in)``, the factors of both sizes. At initialization W has mean 0 and variance
    ``2/nx`` (He et al. 2015, arXiv:1502.01852, eq. 10) in every format, and the bias is 0.

    Args:
        nf: Number of output features.
        nx: Number of input features.
        device: As in torch.
        dtype: As in torch.
        factorization: Name of a format, such as ``"tt"``, or an einsum.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters.
        tensorization: Factors of ``nf`` and of ``nx``; by default as in
            :class:`~tenzoo.layers.TensorizedLinear`.
        implementation: Reconstruct W and multiply, contract the input with the cores, or take the cheaper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, or rank or tensorization does not fit.

    Example:
        >>> layer = TensorizedTransposedLinear(10, 64, factorization="tt", rank=4)
        >>> layer(torch.randn(7, 64)).shape, layer.weight.shape, layer.factorization.shape
        (torch.Size([7, 10]), torch.Size([64, 10]), (5, 2, 4, 4, 4))
    """

    dense_class: ClassVar[type[nn.Module]] = Conv1D

    def __init__(
        self,
        nf: int,
        nx: int,
        *,
        factorization: FactorizationName,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(implementation)
        self.nf, self.nx = nf, nx
        self._make_cores(factorization, rank, tensorization, device, dtype, bias=True)

    def reset_parameters(self) -> None:
        """Draw the cores anew; the bias becomes 0."""
        self.factorization.reset_parameters()
        nn.init.zeros_(self.bias)

    @override
    def as_weight(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.nf, self.nx).t()

    @override
    def as_tensor(self, dense: Tensor) -> Tensor:
        return dense.t().reshape(self.factorization.shape)

    @staticmethod
    def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t(), bias)

    @override
    @staticmethod
    def sides(layer: Any) -> dict[str, int]:
        return {"nf": layer.nf, "nx": layer.nx}

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        return {"nf": layer.nf, "nx": layer.nx}

    @override
    def to_dense(self) -> nn.Module:
        """The layer of transformers that computes the same; a copy."""
        with torch.device("meta"):
            dense: nn.Module = Conv1D(**self._arguments(self))
        self._filled(dense)
        return dense

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return f"nf={self.nf}, nx={self.nx}, implementation={self.implementation}"

    __repr__ = nn.Module.__repr__
