"""What a step of Sharpness-Aware Minimization needs around its two passes."""

import copy
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torchmetrics import Metric


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
    """What a forward pass changes besides its result: buffers, attributes, metrics, and random numbers.

    SAM runs the network twice for a batch, and the two passes are to be one: the second begins where the first began,
    with the same vectors of a spectral norm, the same dropout masks and the same shares of a mixup, and leaves no
    trace. Random numbers are those of torch, NumPy and Python; metrics are those of torchmetrics; attributes are those
    that a user's module assigns, such as a counter of calls, unless the task asks for ``perturbed`` and so decides
    itself. Generators that somebody made for themselves, and lists and other objects that a pass changes in place, are
    out of reach.

    Args:
        module: What it holds is remembered, that of all submodules included.
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
        self._modules = list(module.modules())  # walked once: it takes a third of the time that all of this takes
        self._before = _buffers_with_copies(self._modules)
        self._after: list[_Buffer] = []
        self._attributes = _Attributes(self._modules)
        self._device = device
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        self._numpy = np.random.get_state()  # noqa: NPY002  (what most code draws from)
        self._own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def note(self, *, keep: bool) -> None:
        """The first pass forward is over: what is assigned from here on is not its doing.

        Args:
            keep: Leave all attributes to the passes: one that knows which one it is may hand values to the other.
        """
        self._attributes.note(keep=keep)

    def restore_attributes(self) -> None:
        """The second pass forward is over: undo what it has assigned, and do again what the first one has."""
        self._attributes.restore()

    def rewind(self) -> None:
        """Go back to where the first pass began."""
        self._attributes.rewind()
        self._after = _buffers_with_copies(self._modules)
        _put_back(self._before)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            torch.get_device_module(self._device).set_rng_state(self._own, self._device)

    def finish(self) -> None:
        """Leave the buffers as the first pass left them."""
        _put_back(self._after)


_MISSING = object()


class _Attributes:
    """What passes assign to attributes of modules that are not torch's or our own, and what they add to metrics."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._metrics = [each for each in modules if isinstance(each, Metric)]
        self._owners = [
            vars(each) for each in modules if not (isinstance(each, Metric) or type(each).__module__.startswith(_KNOWN))
        ]
        self._counts = [metric._update_count for metric in self._metrics]
        self._states: list[tuple[Metric, dict[str, Any]]] = []
        self._before = [dict(own) for own in self._owners]
        self._changed: list[dict[str, Any]] = [{} for _ in self._owners]

    def note(self, *, keep: bool) -> None:
        """The first pass is over."""
        if keep:
            self._owners, self._before, self._changed = [], [], []
        self._changed = self._since(self._before)

    def rewind(self) -> None:
        """Undo what the first pass has assigned."""
        used = [m for m, count in zip(self._metrics, self._counts, strict=True) if m._update_count != count]
        self._states = [(metric, _metric_state(metric)) for metric in used]
        for own, before, changed in zip(self._owners, self._before, self._changed, strict=True):
            _assign(own, {key: before.get(key, _MISSING) for key in changed})
        self._before = [dict(own) for own in self._owners]

    def restore(self) -> None:
        """Undo what the second pass has assigned or counted, and do again what the first one has assigned."""
        for metric, state in self._states:
            vars(metric).update(state)
        for own, before, changed, since in zip(
            self._owners, self._before, self._changed, self._since(self._before), strict=True
        ):
            _assign(own, {key: before.get(key, _MISSING) for key in since})
            _assign(own, changed)

    def _since(self, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The attributes that are others than before."""
        return [
            {
                key: own.get(key, _MISSING)
                for key in own.keys() | old.keys()
                if own.get(key, _MISSING) is not old.get(key, _MISSING)
            }
            for own, old in zip(self._owners, before, strict=True)
        ]


_KNOWN = ("torch.", "tenzoo.", "torchmetrics.", "torchvision.", "lightning.")
"""Packages whose modules assign nothing in a forward pass."""


def _assign(own: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if value is _MISSING:
            own.pop(key, None)
        else:
            own[key] = value


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache", "_update_called"]
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.copy(value)
        for name in names
        if (value := vars(metric).get(name, _MISSING)) is not _MISSING
    }


class _Buffer(NamedTuple):
    owner: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor


def _buffers_with_copies(modules: Sequence[nn.Module]) -> list[_Buffer]:
    found = [(owner, *named) for owner in modules for named in owner._buffers.items()]
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
