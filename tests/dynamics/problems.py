"""Small multilinear problems in float64 for the identities of norm dynamics."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[list[Tensor]], Tensor]


def tucker_problem(seed: int = 0, scale: float = 1.0) -> tuple[list[Tensor], Loss]:
    """A Tucker tensor (5, 4, 3) of rank (2, 3, 2), K = 4 cores of unlike norms, and a loss that is not homogeneous."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    target = normal(5, 4, 3)
    cores = [
        (scale * size * normal(*shape)).requires_grad_()
        for size, shape in zip((0.6, 1.3, 0.8, 1.1), ((2, 3, 2), (5, 2), (4, 3), (3, 2)), strict=True)
    ]

    def loss(cores: list[Tensor]) -> Tensor:
        rebuilt = torch.einsum("abc,ia,jb,kc->ijk", *cores)
        return (rebuilt - target).square().sum() + rebuilt.sin().sum()

    return cores, loss


def gradients(cores: list[Tensor], loss: Loss) -> list[Tensor]:
    points = [core.detach().requires_grad_() for core in cores]
    return list(torch.autograd.grad(loss(points), points))


def moved(cores: list[Tensor], directions: list[Tensor], step: float | Tensor) -> list[Tensor]:
    return [core.detach() + step * direction for core, direction in zip(cores, directions, strict=True)]
