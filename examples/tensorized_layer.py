"""Tensorized layers in a network of one's own: torch's arguments, and two more.

The network tells in which of four directions noisy stripes run. The script trains it dense and tensorized, and prints
parameters and accuracy of both.

    python examples/tensorized_layer.py
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tenzoo.layers import TensorizedConv2d, TensorizedLinear


def dense() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 4),
    )


def tensorized() -> nn.Sequential:
    network = dense()
    network[2] = TensorizedConv2d(32, 64, 3, stride=2, factorization="tucker", rank=8)
    network[5] = TensorizedLinear(576, 4, factorization="tt", rank=4)
    return network


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 16, 16)`` and the direction of their stripes, in quarters of a half-turn."""
    direction = torch.randint(0, 4, (count,))
    angle = (direction * math.pi / 4)[:, None, None]
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = 2 * math.pi * torch.rand(count, 1, 1)
    image = torch.sin(row * angle.sin() + column * angle.cos() + phase) + torch.randn(count, 16, 16)
    return image[:, None], direction


def accuracy(network: nn.Module, steps: int = 150) -> float:
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        images, directions = stripes(64)
        optimizer.zero_grad()
        F.cross_entropy(network(images), directions).backward()
        optimizer.step()
    with torch.no_grad():
        images, directions = stripes(2000)
        return (network.eval()(images).argmax(1) == directions).float().mean().item()


print("network     parameters  accuracy")
for make in (dense, tensorized):
    torch.manual_seed(0)
    network = make()
    number = sum(parameter.numel() for parameter in network.parameters())
    print(f"{make.__name__:<12}{number:>10,}{accuracy(network):>10.3f}")
