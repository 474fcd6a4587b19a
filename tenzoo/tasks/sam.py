"""Settings of Sharpness-Aware Minimization, and the state that its two passes must share."""

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn

from tenzoo.dynamics import by_device_and_dtype, own_part
from tenzoo.snapshot import Kinds, Row, Snapshot, put


@dataclass(frozen=True)
class SAM:
    """Settings of SAM (Foret et al., 2021, arXiv:2010.01412) or ASAM (Kwon et al., 2021, arXiv:2102.11600).

    Args:
        rho: Radius ρ of the perturbation, at least 0; at 0 training equals that of the plain optimizer bit for bit.
        adaptive: Use ASAM, which measures the neighborhood relative to the size of each weight.
        scope: Perturb ``"all"`` trainable parameters, or only the ``"cores"`` of tensorized weights.
        sync_ascent: Under DDP, average the ascent gradient over all ranks. False saves that communication, and every
            rank perturbs by its own batch.

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
    """The state that a forward pass changes: buffers, attributes, metrics, and random numbers.

    SAM makes two passes over a batch. The second starts from the same state as the first, with the same vectors of a
    spectral norm, dropout masks and shares of a mixup, and its changes are undone. Random numbers are those of torch,
    NumPy and Python, and of generators in attributes. Metrics are those of torchmetrics. Attributes are those of a
    user's modules, with the contents of lists, dicts, sets, arrays and tensors in them. If the task reads
    ``perturbed``, it handles its attributes itself: only metrics that the first pass has used are then restored.
    Objects of a user's own classes are not restored.

    Args:
        module: The module whose state is remembered, with that of all submodules.
        device: The device whose random numbers are replayed, besides those of the CPU.
        kinds: A table that is shared with the states of other batches, which saves time.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> state = ForwardState(norm, torch.device("cpu"))
        >>> first = norm(torch.rand(3, 1))
        >>> state.note(keep=False)
        >>> state.rewind()
        >>> second = norm(torch.rand(3, 1))
        >>> state.restore()
        >>> state.finish()
        >>> first.equal(second), norm.num_batches_tracked
        (True, tensor(1))
    """

    def __init__(self, module: nn.Module, device: torch.device, kinds: Kinds | None = None) -> None:
        self._module, self._modules = module, _all_modules(module)
        self._kinds = kinds = kinds or Kinds()
        self._before = _buffers_with_copies(self._modules)
        self._after: list[_Buffer] = []
        self._held = Snapshot(
            (each for each in self._modules if kinds.is_metric(each) or not type(each).__module__.startswith(_KNOWN)),
            kinds=kinds,
        )
        self._keep = False
        self._first: list[Row] = []
        self._tensors: list[Row] = []
        self._device = device
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        numpy: Any = np.random.get_state()  # noqa: NPY002  (the generator that most code uses)
        if isinstance(numpy, tuple):  # a list is restored in a fifth of the time of an array
            numpy = numpy[0], numpy[1].tolist(), *numpy[2:]
        self._numpy = numpy
        self._own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def note(self, *, keep: bool) -> None:
        """Note what the first forward pass has changed, right after it.

        Args:
            keep: Do not restore attributes: the passes may hand values to each other.
        """
        self._keep = keep
        self._first = self._changed(self._held)

    def rewind(self) -> None:
        """Restore the state from which the first pass started."""
        if self._keep:
            used = {id(thing) for thing, *_ in self._first}
            held = Snapshot(filter(self._kinds.is_metric, _all_modules(self._module)), used, kinds=self._kinds)
            held.rows = {key: row for key, row in held.rows.items() if key in used or key not in self._held.rows}
            self._held, self._first = held, []
        else:
            self._first = put(self._first)
            self._held.renew()
        self._after = _buffers_with_copies(self._modules)
        _put_back(self._before)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            torch.get_device_module(self._device).set_rng_state(self._own, self._device)

    def restore(self) -> None:
        """Undo the changes of the second forward pass, and restore those of the first.

        Tensors wait for :meth:`finish`: the backward pass may need them as they are.
        """
        rows = [*self._changed(self._held), *self._first]
        self._tensors = [row for row in rows if isinstance(row[0], Tensor)]
        put(row for row in rows if not isinstance(row[0], Tensor))

    def finish(self) -> None:
        """Restore tensors and buffers as the first pass left them, after the second backward pass."""
        put(self._tensors)
        _put_back(self._after)

    def _changed(self, held: Snapshot) -> list[Row]:
        """The objects that have changed, without tensors that share their memory with a weight."""
        rows = held.changed()
        if not any(isinstance(row[0], Tensor) for row in rows):
            return rows
        weights = {_memory(each) for owner in self._modules for each in owner._parameters.values() if each is not None}
        return [row for row in rows if not (isinstance(row[0], Tensor) and _memory(row[0]) in weights - {0})]


_KNOWN = ("torch.", "tenzoo.", "torchvision.", "lightning.")
"""Packages whose modules change only buffers in a forward pass."""


def _all_modules(module: nn.Module) -> list[nn.Module]:
    """Like ``module.modules()``, in a fifth of the time where there are metrics, which are slow to hash."""
    found, todo = {id(module): module}, [module]
    while todo:
        for each in todo.pop()._modules.values():
            if each is not None and id(each) not in found:
                found[id(each)] = each
                todo.append(each)
    return list(found.values())


def _memory(tensor: Tensor) -> int:
    return own_part(tensor).untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


class _Buffer(NamedTuple):
    owner: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor


def _buffers_with_copies(modules: Sequence[nn.Module]) -> list[_Buffer]:
    found = [(owner, *named) for owner in modules for named in owner._buffers.items()]
    rows = [_Buffer(owner, name, each, torch.empty_like(each)) for owner, name, each in found if each is not None]
    _copy([row.copy for row in rows], [row.tensor for row in rows])
    return rows


def _put_back(rows: list[_Buffer]) -> None:
    for owner, name, tensor, _ in rows:
        if getattr(owner, name) is not tensor:
            setattr(owner, name, tensor)
    _copy([row.tensor for row in rows], [row.copy for row in rows])


@torch.no_grad()
def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy each tensor of ``source`` into that of ``to``, in few kernels."""
    for targets, sources in by_device_and_dtype(to, source):
        torch._foreach_copy_(targets, sources)


def without_sync(strategy: Strategy, condition: bool) -> AbstractContextManager[None]:
    """Do not reduce gradients over ranks in a backward pass, if ``condition`` holds."""
    if condition and isinstance(strategy, ParallelStrategy):
        return strategy.block_backward_sync()
    return nullcontext()
