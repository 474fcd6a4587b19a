"""What a step of Sharpness-Aware Minimization needs around its two passes."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@dataclass(frozen=True)
class SAM:
    """Settings of SAM (Foret et al., 2021, arXiv:2010.01412) or ASAM (Kwon et al., 2021, arXiv:2102.11600).

    Args:
        rho: Radius ρ of the perturbation, at least 0; at 0 training equals that of the plain optimizer bit for bit.
        adaptive: ASAM: measure the neighborhood relative to the size of each weight.
        scope: Perturb ``"all"`` trainable parameters, or only the ``"cores"`` of tensorized weights.
        sync_ascent: Under DDP, average the ascent gradient over all ranks. False saves that communication and lets
            every rank climb by its own batch.

    Raises:
        ValueError: For a radius that is negative or not finite, or an unknown scope.

    Example:
        >>> SAM(rho=0.1, scope="cores")
        SAM(rho=0.1, adaptive=False, scope='cores', sync_ascent=True)
    """

    rho: float = 0.05
    adaptive: bool = False
    scope: Literal["all", "cores"] = "all"
    sync_ascent: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise ValueError(f"expected a finite number >= 0 in `sam.rho`, got {self.rho}")
        if self.scope not in ("all", "cores"):
            raise ValueError(f"expected 'all' or 'cores' in `sam.scope`, got {self.scope!r}")


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let normalization layers normalize by the batch, but leave running statistics and batch counts alone."""
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class RandomReplay:
    """Remembers the random state of the CPU and of one device, to draw the same dropout masks once more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind(self) -> None:
        """Go back to the remembered state."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def without_sync(strategy: Strategy, condition: bool) -> AbstractContextManager[None]:
    """Keep a backward pass to this rank where ``condition`` holds and there are several."""
    if condition and isinstance(strategy, ParallelStrategy):
        return strategy.block_backward_sync()
    return nullcontext()
