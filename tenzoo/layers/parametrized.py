"""A weight made of cores for a module that owns its matrices."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from tenzoo.factorizations import FactorizationName, Rank, factorization_class
from tenzoo.layers.factorized import FactorizedModule
from tenzoo.layers.tensorization import Tensorization, check_sizes, layer_modes


class TensorizedWeight(FactorizedModule):
    """A parametrization that reconstructs a matrix ``W (out, in)`` from cores, which it holds itself.

    Attention and recurrent layers own their matrices themselves, so that no layer can replace one.
    ``torch.nn.utils.parametrize.register_parametrization`` replaces the parameter instead: it decomposes W, which is
    from then on reconstructed wherever the module reads it. Assigning to the parameter decomposes what is assigned. The
    bias and everything else stay as they are.

    Args:
        shape: ``(out, in)``.
        factorization: Name of a format, such as ``"tt"``, or an einsum.
        rank: As the factorization takes it: one number, a list, or a fraction of the dense parameters; clipped to what
            a decomposition can use.
        tensorization: Factors of both sizes, by default as in a linear layer.
        device: Of the cores.
        dtype: Of the cores.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the format is unknown, or rank or tensorization does not fit.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> attention = torch.nn.MultiheadAttention(32, 4)
        >>> cores = TensorizedWeight((96, 32), factorization="tt", rank=8)
        >>> _ = parametrize.register_parametrization(attention, "in_proj_weight", cores)
        >>> attention.in_proj_weight.shape, cores.factorization.shape
        (torch.Size([96, 32]), (6, 4, 4, 4, 4, 2))
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        factorization: FactorizationName,
        rank: Rank,
        tensorization: Tensorization | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = factorization_class(factorization)
        if len(shape) != 2:
            raise ValueError(f"expected two sizes in `shape`, got {tuple(shape)}")
        rows, columns = shape
        check_sizes(out=rows, **{"in": columns})
        self.tensorization, modes = layer_modes(kind, tensorization, {"out": rows, "in": columns})
        self.shape = (rows, columns)
        self.place: int | None = None
        """Among the parameters of the module that had it, when it became cores; None if that is not known."""
        self.factorization = kind(
            modes, kind.clipped_rank(modes, rank), init_std=math.sqrt(2 / columns), device=device, dtype=dtype
        )

    def forward(self) -> Tensor:
        """W."""
        return self.dense_weight()

    @torch.no_grad()
    def right_inverse(self, dense: Tensor) -> tuple[()]:
        """Decompose W; there are no parameters but the cores.

        Raises:
            ValueError: If W has another shape, or holds NaN or infinity.
        """
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"expected a weight of shape {self.shape}, got {tuple(dense.shape)}")
        made = type(self.factorization).decompose(self.as_tensor(dense), self.factorization.rank)
        for core, value in zip(self.factorization.cores, made.cores, strict=True):
            core.copy_(value)
        return ()

    @override
    def as_weight(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)

    @override
    def as_tensor(self, dense: Tensor) -> Tensor:
        return dense.reshape(self.factorization.shape)
