"""Several completions of one tensor, from different starts: their mean, and how far they are apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenzoo.models.completion import TensorCompletion


class CompletionEnsemble(nn.Module):
    """Members that are trained on the same entries, and differ in their initialization (a deep ensemble).

    The prediction is their mean. Its deviation is ``√(spread² + noise²)``: the spread is the standard deviation of the
    members, which grows where nothing is known, and the noise is what their mean lacks where something is known
    (Lakshminarayanan et al. 2017, arXiv:1612.01474, with one noise for all cells).

    Args:
        number: Of members, at least 2.
        shape: As in :class:`~tenzoo.models.TensorCompletion`, as are all other arguments.
        factorization: A format.
        rank: Of each member.
        **kwargs: Further arguments of each member.

    Example:
        >>> model = CompletionEnsemble(3, (4, 3), "cp", 2)
        >>> index = torch.tensor([[0, 0], [3, 2]])
        >>> model(index).shape, model.deviation(index).shape
        (torch.Size([2]), torch.Size([2]))
    """

    noise: Tensor

    def __init__(self, number: int, shape: Sequence[int], factorization: str, rank: Any, **kwargs: Any) -> None:
        super().__init__()
        self.members = nn.ModuleList(TensorCompletion(shape, factorization, rank, **kwargs) for _ in range(number))
        self.register_buffer("noise", torch.tensor(0.0))

    def predictions(self, index: Tensor) -> Tensor:
        """Of each member, in the units of the data, ``(number, N)``."""
        return torch.stack([member(index) for member in self.members])

    def forward(self, index: Tensor) -> Tensor:
        """Mean of the predictions at an index ``(N, order)``; shape ``(N,)``."""
        return self.predictions(index).mean(0)

    def moments(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the predictions of the members, each of shape ``(N,)``."""
        variance, mean = torch.var_mean(self.predictions(index), 0)
        return mean, variance

    def with_deviation(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted, and its standard deviation, in the units of the data; each of shape ``(N,)``."""
        mean, variance = self.moments(index)
        return mean, (variance + self.noise.square()).sqrt()

    def deviation(self, index: Tensor) -> Tensor:
        """Standard deviation of what is predicted, in the units of the data; shape ``(N,)``."""
        return self.with_deviation(index)[1]
