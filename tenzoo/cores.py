"""The one interface between tensorized models and the methods that train them.

A tensorized weight is a multilinear function of small *cores*, ``T = Φ(G_1, …, G_K)``. Rescaling the cores by factors
whose product is 1 leaves T unchanged, so a training method is free to choose how the norm is shared among them. A
:class:`CoreGroup` names the cores of one such weight, a :class:`CoreProvider` is a module that knows its groups, and
:func:`find_core_groups` collects the groups of a whole model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class CoreGroup:
    """The cores of one scale-invariant tensor, in order.

    Biases, norms and every other parameter that cannot be rescaled against a core are never part of a group.

    Args:
        name: Qualified name of the tensor in the module that was asked, such as ``"layer1.0.conv1.weight"``.
        cores: The K parameters that the tensor is rebuilt from.

    Raises:
        TypeError: If a core is not an ``nn.Parameter``.
        ValueError: If there is no core, or one core stands in the group twice.
    """

    name: str
    cores: tuple[nn.Parameter, ...]

    def __post_init__(self) -> None:
        if not self.cores:
            raise ValueError(f"expected at least one core in `cores` of core group {self.name!r}, got none")
        for core in self.cores:
            if not isinstance(core, nn.Parameter):
                raise TypeError(
                    f"expected nn.Parameter objects in `cores` of core group {self.name!r}, got {type(core).__name__}"
                )
        if len({id(core) for core in self.cores}) != len(self.cores):
            raise ValueError(f"expected distinct parameters in `cores` of core group {self.name!r}, got one twice")


class CoreProvider(ABC):
    """A module that can name the cores its weights are rebuilt from.

    Subclass it together with ``nn.Module`` and write one method. A provider lists its own groups and may delegate to
    its submodules, but never calls :func:`find_core_groups` on itself.

    Example:
        >>> import torch
        >>> class LowRank(nn.Module, CoreProvider):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 4))
        ...     def core_groups(self):
        ...         return [CoreGroup("weight", (self.a, self.b))]
        >>> model = nn.Sequential(LowRank(), nn.ReLU(), LowRank())
        >>> [group.name for group in find_core_groups(model)]
        ['0.weight', '2.weight']
    """

    @abstractmethod
    def core_groups(self) -> Sequence[CoreGroup]:
        """The groups of this module, their names relative to it; an empty name stands for the module itself."""


_registry: dict[type[nn.Module], Callable[[Any], Sequence[CoreGroup]]] = {}


def register_core_groups(module_type: type[M], function: Callable[[M], Sequence[CoreGroup]]) -> None:
    """Teach :func:`find_core_groups` a module class that is not a :class:`CoreProvider`, and its subclasses.

    Args:
        module_type: The class to recognize. The nearest registered base class of a module decides.
        function: Takes a module of that class, returns its groups with names relative to it.

    Raises:
        TypeError: If ``module_type`` is not a subclass of ``nn.Module``, or is a :class:`CoreProvider` already.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"expected a subclass of nn.Module in `module_type`, got {module_type!r}")
    if issubclass(module_type, CoreProvider):
        raise TypeError(
            f"expected a foreign class in `module_type`, got the CoreProvider {module_type.__name__}; "
            "write its core_groups() instead"
        )
    _registry[module_type] = function


def _own_groups(module: nn.Module) -> Sequence[CoreGroup]:
    if isinstance(module, CoreProvider):
        return module.core_groups()
    for base in type(module).__mro__:
        if base in _registry:
            return _registry[base](module)
    return ()


def find_core_groups(module: nn.Module) -> list[CoreGroup]:
    """All core groups of a module tree, each once, in the order in which the tree is walked.

    A group that is met again (a task and the model it delegates to, a layer that is used twice) is listed once, under
    the first name.

    Args:
        module: The root of the tree. Names are qualified from here.

    Raises:
        ValueError: If two groups overlap in part: a core cannot be balanced within two tensors at once.
    """
    groups: list[CoreGroup] = []
    owner: dict[int, CoreGroup] = {}
    for prefix, submodule in module.named_modules():
        for group in _own_groups(submodule):
            owners = {id(owner.get(id(core))) for core in group.cores}
            if owners == {id(None)}:
                name = ".".join(part for part in (prefix, group.name) if part) or type(submodule).__name__
                found = CoreGroup(name, tuple(group.cores))
                groups.append(found)
                owner.update((id(core), found) for core in found.cores)
                continue
            known = next(owner[id(core)] for core in group.cores if id(core) in owner)
            if owners != {id(known)} or len(known.cores) != len(group.cores):
                raise ValueError(
                    f"expected disjoint core groups, got {known.name!r} and {group.name or prefix!r} "
                    f"of {type(submodule).__name__} sharing some cores; list a shared core in one group only"
                )
    return groups
