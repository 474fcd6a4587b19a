"""The one interface between tensorized models and the methods that train them.

A tensorized weight is a multilinear function of small *cores*, ``T = Φ(G_1, …, G_K)``. Scaling the cores by factors
whose product is 1 does not change T, so a training method is free to choose how the cores share the norm. A
:class:`CoreGroup` names the cores of one such weight, a :class:`CoreProvider` is a module that lists its groups, and
:func:`find_core_groups` collects the groups of a whole model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class CoreGroup:
    """The cores of one tensor, in order.

    A group holds only parameters that can be scaled against each other: no biases, and no parameters of normalization
    layers.

    Args:
        name: Qualified name of the tensor in the module that lists the group, such as ``"layer1.0.conv1.weight"``.
        cores: The K parameters from which the tensor is reconstructed.

    Raises:
        TypeError: If a core is not an ``nn.Parameter``.
        ValueError: If there is no core, or the same core twice.
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
    """A module that lists the cores from which its weights are reconstructed.

    Subclass it together with ``nn.Module`` and write one method. A provider never calls :func:`find_core_groups` on
    itself. A module whose cores all lie in its submodules is a :class:`CoreContainer`.

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

    encloses_groups: ClassVar[bool] = False
    """Whether the groups of submodules are parts of this module's own, as of factors that are themselves tensorized."""

    @abstractmethod
    def core_groups(self) -> Sequence[CoreGroup]:
        """The groups of this module. Names are relative to it, and an empty name stands for the module itself."""


class CoreContainer(CoreProvider):
    """A module whose cores all lie in its submodules: its groups are theirs.

    Example:
        >>> from tenzoo.factorizations import CP
        >>> class Sum(nn.Module, CoreContainer):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.left, self.right = CP((4, 5), 2), CP((4, 5), 3)
        >>> [group.name for group in Sum().core_groups()]
        ['left', 'right']
    """

    def core_groups(self) -> list[CoreGroup]:
        """The groups of all submodules."""
        assert isinstance(self, nn.Module)
        return _groups_of((name, module) for name, module in self.named_modules() if module is not self)


_registry: dict[type[nn.Module], Callable[[Any], Sequence[CoreGroup]]] = {}


def register_core_groups(module_type: type[M], function: Callable[[M], Sequence[CoreGroup]]) -> None:
    """Let :func:`find_core_groups` recognize a class of modules that are no :class:`CoreProvider`, and its subclasses.

    Args:
        module_type: The class. For a module of several registered classes the nearest one counts.
        function: Takes a module of that class, and returns its groups with names relative to it.

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
    """All core groups of a module and its submodules, each once, in the order of ``named_modules()``.

    A group that several modules list is found once, under its first name. The groups of submodules of a provider that
    ``encloses_groups`` may be parts of its own, which count.

    Args:
        module: The module. Names are relative to it.

    Raises:
        ValueError: If two groups share some of their cores. A core cannot be balanced within two tensors at once.
    """
    return _groups_of(module.named_modules())


def _groups_of(named_modules: Iterable[tuple[str, nn.Module]]) -> list[CoreGroup]:
    groups: list[CoreGroup] = []
    owner: dict[int, CoreGroup] = {}
    enclosing: dict[CoreGroup, str] = {}
    for prefix, submodule in named_modules:
        for group in _own_groups(submodule):
            owners = {id(owner.get(id(core))) for core in group.cores}
            if owners == {id(None)}:
                name = ".".join(part for part in (prefix, group.name) if part) or type(submodule).__name__
                found = CoreGroup(name, tuple(group.cores))
                groups.append(found)
                owner.update((id(core), found) for core in found.cores)
                owners = {id(found)}
            known = next(owner[id(core)] for core in group.cores if id(core) in owner)
            is_same = owners == {id(known)} and len(known.cores) == len(group.cores)
            if is_same and getattr(submodule, "encloses_groups", False):
                enclosing.setdefault(known, prefix)
            is_part = owners == {id(known)} and _lies_in(prefix, enclosing.get(known))
            if not is_same and not is_part:
                raise ValueError(
                    f"expected disjoint core groups, got {known.name!r} and {group.name or prefix!r} "
                    f"of {type(submodule).__name__} with some common cores; list each core in one group only"
                )
    return groups


def _lies_in(name: str, outer: str | None) -> bool:
    """Whether a module is a submodule of another one, by their names."""
    return outer is not None and name != outer and (not outer or name.startswith(f"{outer}."))
