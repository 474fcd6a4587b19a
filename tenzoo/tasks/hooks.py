"""Hooks of subclasses that do not call ``super()``: the parent's hook is called for them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from lightning.pytorch import Callback

ParentCall: TypeAlias = Callable[..., Any]
"""Takes the module, the parent's hook, the result of the own hook and its arguments. Returns the result of both."""


def call_after(module: Any, parent: Callable[..., Any], result: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the parent's hook after the own one, and return the result of the own one."""
    parent(module, *args, **kwargs)
    return result


def add_callbacks(
    task: Any, parent: Callable[..., list[Callback]], own: Callback | Iterable[Callback]
) -> list[Callback]:
    """The own callbacks, and those of the parent."""
    return [*([own] if isinstance(own, Callback) else own), *parent(task)]


def complete_window(task: Any, parent: Callable[..., None], result: None, *args: Any, **kwargs: Any) -> None:
    """Do what ``backward`` of a task does after the backward pass."""
    if task.automatic_optimization:
        task._complete_window()


def refuse_with_sam(task: Any, parent: Callable[..., Any], result: Any, *args: Any, **kwargs: Any) -> Any:
    """Accept an own ``training_step``, except with SAM, which would train nothing.

    Raises:
        ValueError: With SAM.
    """
    if task.sam is not None:
        raise ValueError(
            f"expected {type(task).__name__}.training_step() to call super().training_step(batch, batch_idx) with "
            "`sam`, which trains there, got one that does not; write loss() in its place"
        )
    return result


def record_monitors(task: Any, parent: Callable[..., Any], result: Any) -> Any:
    """In manual mode, move the metrics that schedulers monitor from the result to the task: Lightning drops them."""
    return result if task.automatic_optimization else _without_monitors(result, task._monitors)


def _without_monitors(value: Any, monitors: dict[int, Any]) -> Any:
    if isinstance(value, dict) and "scheduler" in value:
        monitors[id(value["scheduler"])] = value.get("monitor")
        return {key: each for key, each in value.items() if key not in ("monitor", "strict", "reduce_on_plateau")}
    if isinstance(value, dict):
        return {key: _without_monitors(each, monitors) for key, each in value.items()}
    return type(value)(_without_monitors(each, monitors) for each in value) if type(value) in (list, tuple) else value


def call_parent_hooks(cls: type, root: type, hooks: Mapping[str, ParentCall]) -> None:
    """Wrap the hooks of a class, so that the parent's hook is called where the own one does not call ``super()``.

    Args:
        cls: A new subclass of ``root``, or ``root`` itself. Its hooks are replaced by wrapped ones.
        root: The class that begins the chain of parents.
        hooks: For each hook, how the parent's one is called.

    Example:
        >>> class Base:
        ...     def setup(self, stage):
        ...         print("base", stage)
        >>> class Own(Base):
        ...     def setup(self, stage):
        ...         print("own", stage)
        >>> for each in (Base, Own):
        ...     call_parent_hooks(each, Base, {"setup": call_after})
        >>> Own().setup("fit")
        own fit
        base fit
    """
    parent = None if cls is root else next(each for each in cls.__mro__[1:] if issubclass(each, root))
    for name, parent_call in hooks.items():
        own = getattr(cls, name)
        if not hasattr(own, "_calls_parent"):  # else it is inherited from the parent
            setattr(cls, name, _wrapped(own, name, parent, parent_call))


def _wrapped(own: Callable[..., Any], name: str, parent: type | None, parent_call: ParentCall) -> Callable[..., Any]:
    counter = f"_calls_of_{name}"

    @functools.wraps(own)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        reached = self.__dict__.get(counter, 0) + 1
        self.__dict__[counter] = reached
        result = own(self, *args, **kwargs)
        if parent is None or self.__dict__[counter] > reached:
            return result
        return parent_call(self, getattr(parent, name), result, *args, **kwargs)

    hook._calls_parent = True  # type: ignore[attr-defined]
    return hook
