"""The arguments of a task's constructors, which its checkpoints keep."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typing_extensions import Unpack

from tenzoo.tasks.sam import SAM


def note_arguments(cls: type) -> None:
    """Replace the constructor of a class by one that also notes its arguments in the new object.

    Arguments that are not builtins are left out, such as an optimizer or a network: a checkpoint that loads with
    ``weights_only=True`` holds no code. Where the constructors of a class and its base class have an argument of the
    same name, that of the class is noted.

    Args:
        cls: Is changed if it defines a constructor of its own.

    Example:
        >>> class Scale:
        ...     def __init__(self, factor, *, offset=0.0, **kwargs):
        ...         pass
        >>> note_arguments(Scale)
        >>> noted_arguments(Scale(2, name="a", optimizer=print))
        {'factor': 2, 'offset': 0.0, 'name': 'a'}
    """
    constructor = vars(cls).get("__init__")
    if constructor is not None:
        _forget_typed_dict(constructor)
        cls.__init__ = _noting(constructor)  # type: ignore[misc]


def noted_arguments(instance: object) -> dict[str, Any]:
    """The arguments that the constructors of an object have noted, by name."""
    noted: dict[str, Any] = instance.__dict__.setdefault("_constructor_arguments", {})
    return noted


def own_arguments(instance: object) -> dict[str, Any]:
    """The noted arguments of the constructor of its class, without those that it passes to its base class itself."""
    noted = noted_arguments(instance)
    return {name: noted[name] for name in instance.__dict__.get("_names_of_own_arguments", ()) if name in noted}


def only_plain(values: Mapping[str, Any], *, ignore: str | Sequence[str] | None) -> dict[str, Any]:
    """The values that consist of builtins, without those of some names; the settings of SAM become a dict."""
    left_out = [ignore] if isinstance(ignore, str) else ignore or ()
    plain = {key: dataclasses.asdict(value) if isinstance(value, SAM) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if key not in left_out and is_plain(value)}


def is_plain(value: object) -> bool:
    """Whether a value consists of builtins, which a checkpoint that runs no code can hold."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _forget_typed_dict(constructor: Callable[..., None]) -> None:
    """Replace the annotation ``Unpack[…]`` of ``**kwargs``, which is for type checkers.

    The command line would take the arguments from the ``TypedDict``, which has no defaults. Without it, they come from
    the constructor that they are passed on to.
    """
    for name, annotation in constructor.__annotations__.items():
        if isinstance(annotation, type(Unpack[Any])):
            constructor.__annotations__[name] = Any


def _noting(constructor: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def __init__(self: object, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        named = _by_name(signature, self, *args, **kwargs)
        self.__dict__.setdefault("_names_of_own_arguments", tuple(named))
        noted = noted_arguments(self)
        for name, value in only_plain(named, ignore=None).items():
            # The constructor of a subclass has begun earlier. A list may change after it.
            noted.setdefault(name, copy.deepcopy(value))
        constructor(self, *args, **kwargs)

    __init__.__signature__ = signature  # type: ignore[attr-defined]  # Lightning looks at it without unwrapping
    return __init__


def _by_name(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, with defaults and without ``self``; none of a call that Python will refuse."""
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError:
        return {}
    call.apply_defaults()
    named: dict[str, Any] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind == parameter.VAR_KEYWORD:
            named.update(call.arguments[name])
        elif parameter.kind != parameter.VAR_POSITIONAL:
            named[name] = call.arguments[name]
    return named
