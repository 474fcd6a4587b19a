"""Hooks that a subclass may write as for any LightningModule: the duties of the class above are done all the same."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from lightning.pytorch import Callback

Otherwise: TypeAlias = Callable[..., Any]
"""Takes the module, the hook of the class above, what the own one returned, and its arguments; gives what to return."""


def do_after(module: Any, above: Callable[..., Any], result: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the hook of the class above; what the own one returned stands."""
    above(module, *args, **kwargs)
    return result


def all_callbacks(
    task: Any, above: Callable[..., list[Callback]], own: Callback | Iterable[Callback]
) -> list[Callback]:
    """The own callbacks, and those of the class above."""
    return [*([own] if isinstance(own, Callback) else own), *above(task)]


def window_completed(task: Any, above: Callable[..., None], result: None, *args: Any, **kwargs: Any) -> None:
    """Of ``backward`` all but the pass itself, which the own one has made."""
    if task.automatic_optimization:
        task._complete_window()


def refuse_beside_sam(task: Any, above: Callable[..., Any], result: Any, *args: Any, **kwargs: Any) -> Any:
    """Let an own ``training_step`` stand, except with SAM, which would train nothing.

    Raises:
        ValueError: With SAM.
    """
    if task.sam is not None:
        raise ValueError(
            f"expected {type(task).__name__}.training_step() to call super().training_step(batch, batch_idx) beside "
            "`sam`, which trains there, got one that does not; write loss() in its place"
        )
    return result


def monitors_noted(task: Any, above: Callable[..., Any], result: Any) -> Any:
    """In manual mode, what schedulers monitor, which Lightning would drop there; the rest of ``result`` stands."""
    return result if task.automatic_optimization else _without_monitors(result, task._monitors)


def _without_monitors(value: Any, monitors: dict[int, Any]) -> Any:
    if isinstance(value, dict) and "scheduler" in value:
        monitors[id(value["scheduler"])] = value.get("monitor")
        return {key: each for key, each in value.items() if key not in ("monitor", "strict", "reduce_on_plateau")}
    if isinstance(value, dict):
        return {key: _without_monitors(each, monitors) for key, each in value.items()}
    return type(value)(_without_monitors(each, monitors) for each in value) if type(value) in (list, tuple) else value


def keep_duties(cls: type, root: type, hooks: Mapping[str, Otherwise]) -> None:
    """See to the duties of the class above wherever a hook of a class does not call that one by ``super()``.

    Args:
        cls: A new subclass of ``root``, or ``root``; its hooks are replaced.
        root: The class whose hooks have duties.
        hooks: What is done instead, by the names of hooks.

    Example:
        >>> class Base:
        ...     def setup(self, stage):
        ...         print("base", stage)
        >>> class Own(Base):
        ...     def setup(self, stage):
        ...         print("own", stage)
        >>> for each in (Base, Own):
        ...     keep_duties(each, Base, {"setup": do_after})
        >>> Own().setup("fit")
        own fit
        base fit
    """
    above = None if cls is root else next(each for each in cls.__mro__[1:] if issubclass(each, root))
    for name, otherwise in hooks.items():
        own = getattr(cls, name)
        if not hasattr(own, "_keeps_duties"):  # else it is that of the class above
            setattr(cls, name, _watched(own, name, above, otherwise))


def _watched(own: Callable[..., Any], name: str, above: type | None, otherwise: Otherwise) -> Callable[..., Any]:
    counter = f"_calls_of_{name}"

    @functools.wraps(own)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        reached = self.__dict__.get(counter, 0) + 1
        self.__dict__[counter] = reached
        result = own(self, *args, **kwargs)
        if above is None or self.__dict__[counter] > reached:
            return result
        return otherwise(self, getattr(above, name), result, *args, **kwargs)

    hook._keeps_duties = True  # type: ignore[attr-defined]
    return hook
