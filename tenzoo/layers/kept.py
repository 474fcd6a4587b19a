"""A dense weight made of cores: how it is rebuilt, and how long it is kept."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tenzoo.cores import CoreGroup, CoreProvider
from tenzoo.factorizations import Factorization

_last_step = object()


def _note_step(*_: object) -> None:
    # Fused optimizers, and those that write to `.data`, change parameters without a trace in their versions, and so do
    # averages of weights that follow a step. A number that is counted up would have a step compiled anew each time.
    global _last_step
    _last_step = object()


register_optimizer_step_post_hook(_note_step)


class _Kept(NamedTuple):
    weight: Tensor
    version: int
    """Of the weight: what a caller writes into it is not what the cores make."""
    cores: tuple[Tensor, ...]
    states: tuple[object, ...]
    storages: tuple[object, ...]
    """Held, so that a core that is given other memory does not find it where the old one was."""

    def holds(self, cores: tuple[Tensor, ...], states: tuple[object, ...]) -> bool:
        """Whether it is still what these cores make."""
        return states == self.states and all(map(is_, cores, self.cores)) and self.weight._version == self.version


def _state(core: Tensor) -> object:
    return core._version, core.untyped_storage()._cdata, core.storage_offset(), core.stride()


class MadeOfCores(nn.Module, CoreProvider):
    """A module with a dense weight that is made of cores.

    Abstract: a subclass says how the weight is laid out.

    While gradients are disabled in evaluation mode, the dense weight is kept between calls. It is built anew after
    ``train()``, ``eval()``, ``to()``, ``load_state_dict()``, a forward pass with gradients, a step of any optimizer, an
    assignment of a core or of its ``data``, and any change that torch counts. Cores in shared memory, where another
    process may write, make a new one each time. Numbers that are written past torch are not noticed, into the tensor
    ``core.data``, an array of NumPy or a flat buffer that the cores are parts of, or by a replayed CUDA graph: call
    ``eval()`` after it.

    Attributes:
        weight: The factorization.
    """

    weight: Factorization

    def __init__(self) -> None:
        super().__init__()
        self._kept: _Kept | None = None

    def core_groups(self) -> list[CoreGroup]:
        """One group, ``"weight"``."""
        return [CoreGroup("weight", tuple(self.weight.cores))]

    @abstractmethod
    def _laid_out(self, tensor: Tensor) -> Tensor:
        """A tensor of the factorization's shape in the layout of torch's weight, as a view where possible."""

    @abstractmethod
    def _tensorized(self, dense: Tensor) -> Tensor:
        """The inverse of :meth:`_laid_out`."""

    def dense_weight(self, *, contiguous: bool = False) -> Tensor:
        """The weight as torch's layer holds it, rebuilt from the cores in their own precision, also under autocast.

        Args:
            contiguous: Whether its memory is to be in the order of its dimensions; a weight that is kept is then kept
                so, and is not laid out anew in each pass.
        """
        if not self._keeps():
            if self._kept is not None:  # a compiler would take note of any assignment
                self._kept = None
            weight = self._rebuild()
            return weight.contiguous() if contiguous else weight
        cores = tuple(self.weight.cores)
        states = (_last_step, *map(_state, cores))
        kept = self._kept
        found = kept.weight if kept is not None and kept.holds(cores, states) else None
        if found is not None and (found.is_contiguous() or not contiguous):
            return found
        # An inference tensor could not take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            weight = self._rebuild() if found is None else found
            weight = weight.contiguous() if contiguous else weight
        if any(core.is_cpu and core.is_shared() for core in cores):  # type: ignore[no-untyped-call]
            return weight
        self._kept = _Kept(weight, weight._version, cores, states, tuple(core.untyped_storage() for core in cores))
        return weight

    def _rebuild(self) -> Tensor:
        with self._without_autocast():
            return self._laid_out(self.weight.reconstruct())

    def _without_autocast(self) -> AbstractContextManager[object]:
        """What is computed within has the precision of the cores."""
        device = self.weight.cores[0].device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return torch.autocast(device, enabled=False)
        return nullcontext()

    def _keeps(self) -> bool:
        """Whether a weight that is made now may be kept."""
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or any(map(Tensor.is_inference, self.weight.cores))
        )

    def train(self, mode: bool = True) -> Self:
        """As every module, and drop the kept weight."""
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> Mapping[str, Any]:
        """Copies and pickles hold no kept weight."""
        return {**self.__dict__, "_kept": None}
