"""Adapters made of cores on a vision transformer of torchvision, in five lines and without PEFT.

A network that tells in which of four directions stripes run is given mirrored images. The script adds tensor trains to
the frozen layers, trains these alone, and prints their parameters and the accuracy on mirrored images.

    python examples/adapt_a_vit.py

With PEFT installed, `peft.inject_adapter_in_model(tenzoo.adapters.TensorAdapterConfig(…), network)` does the same.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models import VisionTransformer

from tenzoo.layers import TensorizedLinear


class Adapted(nn.Module):
    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        sizes = frozen.in_features, frozen.out_features
        self.frozen = frozen
        self.update = TensorizedLinear(*sizes, bias=False, factorization="tt", rank=4)
        nn.init.zeros_(self.update.factorization.cores[0])  # the update is zero at the start

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.update(x)


def adapt(network: nn.Module) -> None:
    network.requires_grad_(False)
    for block in network.encoder.layers:
        for name in ("0", "3"):
            block.mlp.set_submodule(name, Adapted(block.mlp.get_submodule(name)))


def stripes(count: int, *, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, 16, 16)`` and the direction of their stripes, in quarters of a half-turn."""
    direction = torch.randint(0, 4, (count,))
    angle = (direction * math.pi / 4)[:, None, None]
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = 2 * math.pi * torch.rand(count, 1, 1)
    images = torch.sin(row * angle.sin() + column * angle.cos() + phase) + 0.5 * torch.randn(count, 16, 16)
    images = images.flip(1) if mirrored else images
    return images[:, None].expand(-1, 3, -1, -1), direction


def train(network: nn.Module, *, mirrored: bool, lr: float, steps: int) -> None:
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        images, directions = stripes(64, mirrored=mirrored)
        optimizer.zero_grad()
        F.cross_entropy(network(images), directions).backward()
        optimizer.step()


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        images, directions = stripes(2000, mirrored=True)
        return (network(images).argmax(1) == directions).float().mean().item()


torch.manual_seed(0)
network = VisionTransformer(
    image_size=16, patch_size=4, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=4
)
train(network, mirrored=False, lr=1e-3, steps=300)
print("network     trained parameters  accuracy")
for name in ("frozen", "adapted"):
    if name == "adapted":
        adapt(network)
        train(network, mirrored=True, lr=3e-3, steps=200)
    number = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    print(f"{name:<12}{number if name == 'adapted' else 0:>18,}{accuracy(network):>10.3f}")
