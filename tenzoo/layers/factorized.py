"""A dense weight that a factorization reconstructs: how other code reads it, and how long it is kept."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any, NamedTuple, Self, SupportsIndex

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from typing_extensions import override

from tenzoo.cores import CoreGroup, CoreProvider
from tenzoo.factorizations import Factorization
from tenzoo.state_dicts import FORMER_NAME, NAME

_last_step = object()


def _note_step(*_: object) -> None:
    # Fused optimizers, and those that write to `.data`, change parameters without a trace in their versions, and so do
    # averages of weights that follow a step. A number that is counted up would have a step compiled anew each time.
    global _last_step
    _last_step = object()


register_optimizer_step_post_hook(_note_step)


class _Cached(NamedTuple):
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


def without_autocast(factorization: Factorization) -> AbstractContextManager[object]:
    """What is computed within has the precision of the cores."""
    device = factorization.cores[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class ReconstructedWeight(Tensor):
    """A dense weight as code outside of its layer reads it.

    It is a tensor with a graph to the cores. Writing into it is refused, since what is written would be lost:
    initialization in place, assignment to its ``data``, freezing. Its ``data`` is a copy, and a pickle or file of it
    holds a plain tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = next(iter((*args, *kwargs.values())), None)  # torch.nn.init hands its tensor on by name
        written = first if _writes(func) or kwargs.get("inplace") else kwargs.get("out")
        own = [
            value for value in (written if isinstance(written, list | tuple) else [written]) if isinstance(value, cls)
        ]
        if own:
            raise RuntimeError(
                f"expected a weight of its own for {getattr(func, '__name__', func)}, got one that cores reconstruct; "
                "change `layer.factorization`, or call layer.reset_parameters()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") in _COPIED and isinstance(first, cls):
                args = (first.clone(), *args[1:])
            if getattr(func, "__self__", None) is Tensor.data and isinstance(first, cls):
                return first.detach().clone().as_subclass(cls)  # another tensor may be given its memory
            result = func(*args, **kwargs)
        return cls._guard(result, first) if isinstance(first, cls) else result

    @override
    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """A pickle has a plain tensor."""
        return self.detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def _guard(cls, result: Any, weight: Tensor) -> Any:
        """The result of a function, in this class where it is a part of the weight's memory."""
        if type(result) in (tuple, list):
            return type(result)(cls._guard(part, weight) for part in result)
        return result.as_subclass(cls) if isinstance(result, Tensor) and _shares_memory(result, weight) else result


_COPIED = ("detach", "numpy", "__array__", "__dlpack__", "__deepcopy__")
"""Functions whose result is the reader's own: a copy, which may be written to."""


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a function of torch changes its first argument."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.startswith("__")
    return in_place or name in ("__set__", "__setitem__") or name in _IN_PLACE


_OPERATORS = (
    "add",
    "and",
    "floordiv",
    "lshift",
    "matmul",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
)
_IN_PLACE = {f"__i{name}__" for name in _OPERATORS}


def _shares_memory(result: Tensor, weight: Tensor) -> bool:
    if result.layout != torch.strided or result.device != weight.device:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return bool(result.untyped_storage()._cdata == weight.untyped_storage()._cdata)


class FactorizedModule(nn.Module, CoreProvider):
    """A module with a dense weight that a factorization reconstructs.

    Abstract: a subclass says how the weight is laid out.

    While gradients are disabled in evaluation mode, the dense weight is kept between calls. It is reconstructed anew
    after ``train()``, ``eval()``, ``to()``, ``load_state_dict()``, a forward pass with gradients, a step of any
    optimizer, an assignment of a core or of its ``data``, and any change that torch counts. Cores in shared memory,
    where another process may write, make a new one each time. Numbers that are written past torch are not noticed,
    into the tensor ``core.data``, an array of NumPy or a flat buffer that the cores are parts of, or by a replayed CUDA
    graph: call ``eval()`` after it.

    Attributes:
        factorization: The cores.
    """

    factorization: Factorization

    def __init__(self) -> None:
        nn.Module.__init__(self)  # a layer is of torch's class as well, whose weight it does not have
        self._cached: _Cached | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight, of the shape that torch's layer has, with gradients to the cores.

        Each access reconstructs it, unless it is kept. It cannot be written to: what is written would be lost.
        """
        weight = self.dense_weight()
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return weight
        return weight.as_subclass(ReconstructedWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        self.register_parameter("weight", None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module, but for the weight.

        Raises:
            AttributeError: If it is the weight, which cores reconstruct.
        """
        if name == "weight":
            raise AttributeError(
                f"expected no assignment of `weight` of a {type(self).__name__}, which its cores reconstruct, got one; "
                "change `factorization`, or make a layer with from_dense()"
            )
        super().register_parameter(name, param)

    def core_groups(self) -> list[CoreGroup]:
        """One group, ``"weight"``."""
        return [CoreGroup("weight", tuple(self.factorization.cores))]

    @abstractmethod
    def as_weight(self, tensor: Tensor) -> Tensor:
        """A tensor of the factorization's shape in the layout of torch's weight, as a view where possible."""

    @abstractmethod
    def as_tensor(self, dense: Tensor) -> Tensor:
        """The inverse of :meth:`as_weight`."""

    def dense_weight(self, *, contiguous: bool = False) -> Tensor:
        """The weight, reconstructed from the cores in their own precision, also under autocast.

        Args:
            contiguous: Whether its memory is to be in the order of its dimensions; a weight that is kept is then kept
                so, and is not laid out anew in each pass.
        """
        if not self._may_cache():
            if self._cached is not None:  # a compiler would take note of any assignment
                self._cached = None
            weight = self._reconstruct()
            return weight.contiguous() if contiguous else weight
        cores = tuple(self.factorization.cores)
        states = (_last_step, *map(_state, cores))
        kept = self._cached
        found = kept.weight if kept is not None and kept.holds(cores, states) else None
        if found is not None and (found.is_contiguous() or not contiguous):
            return found
        # An inference tensor could not take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            weight = self._reconstruct() if found is None else found
            weight = weight.contiguous() if contiguous else weight
        if any(core.is_cpu and core.is_shared() for core in cores):  # type: ignore[no-untyped-call]
            return weight
        self._cached = _Cached(weight, weight._version, cores, states, tuple(core.untyped_storage() for core in cores))
        return weight

    def _reconstruct(self) -> Tensor:
        with without_autocast(self.factorization):
            return self.as_weight(self.factorization.reconstruct())

    def _may_cache(self) -> bool:
        """Whether a weight that is made now may be kept."""
        return not (
            self.training
            or self.factorization.drops
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or any(map(Tensor.is_inference, self.factorization.cores))
        )

    def train(self, mode: bool = True) -> Self:
        """As every module, and drop the kept weight."""
        self._cached = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._cached = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        for name in [name for name in state_dict if name.startswith(f"{prefix}{FORMER_NAME}")]:
            state_dict[f"{prefix}{NAME}{name.removeprefix(f'{prefix}{FORMER_NAME}')}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> Mapping[str, Any]:
        """Copies and pickles hold no kept weight."""
        return {**self.__dict__, "_cached": None}
