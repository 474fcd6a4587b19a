"""The configs that come with the package, by name."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

import tenzoo

PREFIX = "zoo:"
"""What marks a name of the zoo where a file may have the same name."""

PARTS = ("adapters", "few_shot", "methods", "schedules", "compress")
"""Folders of configs that are composed over others, or serve another command than ``fit``."""

_OPTIONS = ("-c", "--config")
_PACKAGE = Path(tenzoo.__file__).parent


def folder() -> Path:
    """The folder of the configs: ``configs`` in the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: If the package lost them.
    """
    for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (place / "covid_tucker.yaml").is_file():
            return place
    raise FileNotFoundError(f"expected the configs of tenzoo in {str(_PACKAGE / 'configs')!r}, got none; install again")


def names(pattern: str = "*", root: Path | None = None) -> list[str]:
    """The names of all configs of a folder that match a pattern of the shell, in the order of the alphabet.

    Args:
        pattern: Such as ``"tr_*"``.
        root: The folder; None is that of the zoo.

    Example:
        >>> names("covid*"), names("*gauge*")
        (['covid_tucker', 'covid_tucker_paper'], ['methods/das_gauge_fixed'])
    """
    root = root or folder()
    every = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in every if fnmatch(name, pattern))


def is_part(name: str) -> bool:
    """Whether a config is no model: it is composed over one, or for another command."""
    return name.rpartition("/")[0] in PARTS


def find(name: str) -> Path:
    """The file of a name.

    Args:
        name: Such as ``covid_tucker`` or ``methods/das``; ``zoo:`` before it is left out.

    Raises:
        ValueError: If the zoo has no such name.

    Example:
        >>> find("zoo:methods/das").name
        'das.yaml'
        >>> find("das")
        Traceback (most recent call last):
            ...
        ValueError: expected a name of the zoo (see `tenzoo list`), got 'das'; did you mean 'methods/das'?
    """
    bare = name.removeprefix(PREFIX)
    if bare in names():
        return folder() / f"{bare}.yaml"
    raise ValueError(f"expected a name of the zoo (see `tenzoo list`), got {name!r}{_similar(bare)}")


def model_of(configs: Iterable[str]) -> str | None:
    """The name of the first model of the zoo among the paths of configs.

    Example:
        >>> model_of([str(find("methods/das")), str(find("covid_tucker"))])
        'covid_tucker'
    """
    root = folder()
    paths = [Path(config).resolve() for config in configs]
    names = [path.relative_to(root).with_suffix("").as_posix() for path in paths if root in path.parents]
    return next((name for name in names if not is_part(name)), None)


def with_paths(argv: Sequence[str]) -> list[str]:
    """A command line in which names of the zoo that follow ``--config`` are replaced by the paths of their files.

    A file of that name comes first, unless ``zoo:`` is before the name.

    Raises:
        ValueError: If there is neither such a file nor such a name.
    """
    words: list[str] = []
    for word in argv:
        option, equals, value = word.partition("=")
        if equals and option in _OPTIONS:
            words.append(f"{option}={_path(value)}")
        else:
            words.append(_path(word) if words and words[-1] in _OPTIONS else word)
    return words


def _path(value: str) -> str:
    if value.startswith(PREFIX):
        return str(find(value))
    path = Path(value)
    if value in names() and not path.is_file():
        return str(folder() / f"{value}.yaml")
    if not value or any(sign in value for sign in " \n:{") or path.exists():
        return value  # a file, or YAML itself
    bare = path.with_suffix("").as_posix().removeprefix("configs/")
    raise ValueError(
        f"expected a file or a name of the zoo (see `tenzoo list`) in `--config`, got {value!r}, which "
        f"does not exist{_similar(bare)}"
    )


def _similar(name: str) -> str:
    known = names()
    last = [each for each in known if each.rpartition("/")[2] == name.rpartition("/")[2]]
    found = last or get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
