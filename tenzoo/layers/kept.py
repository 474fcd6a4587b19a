"""A dense weight made of cores: how it is rebuilt, and how long it is kept."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from tenzoo.cores import CoreGroup, CoreProvider
from tenzoo.factorizations import Factorization


class MadeOfCores(nn.Module, CoreProvider):
    """A module with a dense weight that is made of cores.

    Abstract: a subclass says how the weight is laid out.

    While gradients are disabled in evaluation mode, the dense weight is kept between calls. It is built anew after
    ``train()``, ``eval()``, ``to()``, ``load_state_dict()``, a forward pass with gradients, and any change of a core
    that torch counts. Writing to ``core.data`` between two such calls is not counted: call ``eval()`` after it.

    Attributes:
        weight: The factorization.
    """

    weight: Factorization

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[tuple[Tensor, ...], tuple[int, ...], Tensor] | None = None

    def core_groups(self) -> list[CoreGroup]:
        """One group, ``"weight"``."""
        return [CoreGroup("weight", tuple(self.weight.cores))]

    @abstractmethod
    def _laid_out(self, tensor: Tensor) -> Tensor:
        """A tensor of the factorization's shape in the layout of torch's weight, as a view where possible."""

    @abstractmethod
    def _tensorized(self, dense: Tensor) -> Tensor:
        """The inverse of :meth:`_laid_out`."""

    def dense_weight(self) -> Tensor:
        """The weight as torch's layer holds it, rebuilt from the cores in their own precision, also under autocast."""
        if not self._may_keep():
            if self._kept is not None:  # a compiler would take note of any assignment
                self._kept = None
            return self._rebuild()
        cores = tuple(self.weight.cores)
        versions = tuple(core._version for core in cores)
        if self._kept is not None:
            same = all(core is kept for core, kept in zip(cores, self._kept[0], strict=True))
            if same and versions == self._kept[1]:
                return self._kept[2]
        # An inference tensor could not take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            weight = self._rebuild()
        self._kept = cores, versions, weight
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

    def _may_keep(self) -> bool:
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or any(core.is_inference() for core in self.weight.cores)
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
