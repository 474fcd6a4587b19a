"""What a step of Sharpness-Aware Minimization needs around its two passes."""

import math
import random
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn


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


class ForwardState:
    """What a forward pass changes besides its result: buffers, and the random numbers of torch, NumPy and Python.

    SAM runs the network twice for a batch, and the two passes are to be one: the second begins where the first began,
    with the same vectors of a spectral norm, the same dropout masks and the same shares of a mixup, and leaves no
    trace. Generators that somebody made for themselves are out of reach.

    Args:
        module: Its buffers are remembered, those of all submodules included.
        device: Whose random numbers are replayed beside those of the CPU.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> state = ForwardState(norm, torch.device("cpu"))
        >>> first = norm(torch.rand(3, 1))
        >>> state.rewind()
        >>> second = norm(torch.rand(3, 1))
        >>> state.finish()
        >>> first.equal(second), norm.num_batches_tracked
        (True, tensor(1))
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._before = _buffers_with_copies(module)
        self._after: list[_Buffer] = []
        self._device = device
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        self._numpy = np.random.get_state()  # noqa: NPY002  (what most code draws from)
        self._own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def rewind(self) -> None:
        """Go back to where the first pass began."""
        self._after = _buffers_with_copies(self._module)
        _put_back(self._before)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            torch.get_device_module(self._device).set_rng_state(self._own, self._device)

    def finish(self) -> None:
        """Leave the buffers as the first pass left them."""
        _put_back(self._after)


class _Buffer(NamedTuple):
    owner: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor


def _buffers_with_copies(module: nn.Module) -> list[_Buffer]:
    # named_buffers() would take a third of the time that all of this takes.
    found = [(owner, *named) for owner in module.modules() for named in owner._buffers.items()]
    rows = [_Buffer(owner, name, each, torch.empty_like(each)) for owner, name, each in found if each is not None]
    _copy((row.copy, row.tensor) for row in rows)
    return rows


def _put_back(rows: list[_Buffer]) -> None:
    for owner, name, tensor, _ in rows:
        if getattr(owner, name) is not tensor:
            setattr(owner, name, tensor)
    _copy((row.tensor, row.copy) for row in rows)


@torch.no_grad()
def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, in few kernels."""
    kinds: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for to, source in pairs:
        targets, sources = kinds.setdefault((to.device, to.dtype), ([], []))
        targets.append(to)
        sources.append(source)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources)


def without_sync(strategy: Strategy, condition: bool) -> AbstractContextManager[None]:
    """Keep a backward pass to this rank where ``condition`` holds and there are several."""
    if condition and isinstance(strategy, ParallelStrategy):
        return strategy.block_backward_sync()
    return nullcontext()
