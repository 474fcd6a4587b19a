"""YAML that says one thing only, in bounded memory; what is wrong with a file is told with its name and the line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)

PARSER_MODE = "tenzoo"
"""Name of the loader, for jsonargparse."""

MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_CHARACTERS = 4 * 2**20, 100_000, 50, 4_000
"""Of a file; of its values, aliases resolved; of lists in lists; of one value. No config comes near."""

_MAX_SHOWN = 80
_ENDINGS = (".yaml", ".yml")
_TAGS = (None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")))


_KINDS = {type(None): "nothing", list: "a list", str: "words"}


class RefusedYAMLError(yaml.YAMLError):
    """What YAML allows and a config does not."""

    def __init__(self, expected: str, got: str, event: Event) -> None:
        got = got if len(got) <= _MAX_SHOWN else f"{got[:_MAX_SHOWN]}…"
        super().__init__(f"expected {expected}, got {got}{_line(event.start_mark)}")
        self.expected, self.got = expected, f"{got}{_line(event.start_mark)}"


@dataclass
class _Collection:
    """An open list or mapping: how many values it holds, and the keys seen so far."""

    anchor: str | None
    is_mapping: bool
    values: int = 1
    items: int = 0
    keys: set[str] = field(default_factory=set)


def check_configs(argv: Sequence[str]) -> None:
    """Refuse a broken YAML file of a command line, before its values are looked at.

    Args:
        argv: Of a command; files named in a config are looked at too.

    Raises:
        ValueError: Naming the file and the line.
    """
    pairs = [tuple(word.partition("=")[::2]) for word in argv if "=" in word] + list(pairwise(argv))
    pending = [Path(value) for option, value in pairs if option in ("-c", "--config") or value.endswith(_ENDINGS)]
    seen: set[Path] = set()
    while pending:
        path = pending.pop()
        if path in seen or not _is_file(path):
            continue
        seen.add(path)
        content = read_config(path)
        nested = [value for value in _strings(content) if value.endswith(_ENDINGS)]
        pending += [folder / value for value in nested for folder in (Path(), path.parent)]


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: If there is none, naming the file.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"expected a config of at most {MAX_BYTES // 2**20} MiB, got {str(path)!r} of {size:,} bytes")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        content = load(text)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"expected a text file in YAML in UTF-8, got {str(path)!r} with the byte 0x{error.object[error.start]:02x} "
            f"in line {line}"
        ) from error
    except RefusedYAMLError as error:
        raise ValueError(f"expected {error.expected} in {str(path)!r}, got {error.got}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML in {str(path)!r}, got {_problem(error)}") from error
    if not isinstance(content, dict):
        got = _KINDS.get(type(content), "a number")
        raise ValueError(f"expected a mapping in YAML in {str(path)!r}, got {got}")
    if not isinstance(content.get("config", []), list):  # which jsonargparse would take for its own
        raise ValueError(f"expected no key `config` in {str(path)!r}, got one; give several configs by --config")
    return content


def load(text: str) -> Any:
    """What jsonargparse's loader makes of a text, if it says one thing only.

    Raises:
        yaml.YAMLError: If it is no YAML, or has a key twice, aliases that multiply, or tags that name types.

    Example:
        >>> load("rank: [1, 2]")
        {'rank': [1, 2]}
        >>> load("{rank: 1, rank: 2}")
        Traceback (most recent call last):
            ...
        tenzoo.zoo.yaml_files.RefusedYAMLError: expected each key once, got 'rank' again in line 1
    """
    check(text)
    try:
        return get_loader("yaml")(text)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # the loaders' own, such as of `1e400:`
        raise yaml.YAMLError("a key or a number that cannot be read") from error
    except ValueError as error:  # of a tag that its value does not fit
        raise yaml.YAMLError(" ".join(str(error).split())) from error


def check(text: str) -> None:
    """Refuse what :func:`load` does, without making any value.

    Raises:
        yaml.YAMLError: As there.
    """
    anchors: dict[str, int] = {}
    opened: list[_Collection] = []
    documents = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise RefusedYAMLError("one document", "another", event)
        elif isinstance(event, CollectionEndEvent):
            closed = opened.pop()
            _count(closed.values, closed.anchor, opened, anchors, event)
        elif isinstance(event, NodeEvent):
            _check_node(event, opened, anchors)


def _check_node(event: NodeEvent, opened: list[_Collection], anchors: dict[str, int]) -> None:
    if opened:
        _check_key(event, opened[-1])
    if isinstance(event, AliasEvent):
        if event.anchor not in anchors:
            raise RefusedYAMLError("an alias of a value before it", f"*{event.anchor}", event)
        _count(anchors[event.anchor], None, opened, anchors, event)
        return
    tag = getattr(event, "tag", None)
    if tag not in _TAGS:
        raise RefusedYAMLError("no tag but those of plain YAML", repr(tag), event)
    if isinstance(event, MappingStartEvent | SequenceStartEvent):
        if len(opened) == MAX_DEPTH:
            raise RefusedYAMLError(f"at most {MAX_DEPTH} levels of lists and mappings", "more", event)
        opened.append(_Collection(event.anchor, isinstance(event, MappingStartEvent)))
    elif isinstance(event, ScalarEvent):
        if len(event.value) > MAX_CHARACTERS:
            got = f"one of {len(event.value):,}"
            raise RefusedYAMLError(f"values of at most {MAX_CHARACTERS:,} characters", got, event)
        _count(1, event.anchor, opened, anchors, event)


def _check_key(event: NodeEvent, mapping: _Collection) -> None:
    mapping.items += 1
    if not mapping.is_mapping or mapping.items % 2 == 0:
        return
    if not isinstance(event, ScalarEvent):
        raise RefusedYAMLError("names as keys", "another kind of key", event)
    if event.value in mapping.keys:
        raise RefusedYAMLError("each key once", f"{event.value!r} again", event)
    mapping.keys.add(event.value)


def _count(values: int, anchor: str | None, opened: list[_Collection], anchors: dict[str, int], event: Event) -> None:
    """Add the values of a node to those of what it is in."""
    if anchor is not None:
        anchors[anchor] = values
    if opened:
        opened[-1].values += values
        if opened[-1].values > MAX_VALUES:
            raise RefusedYAMLError(f"at most {MAX_VALUES:,} values with all aliases resolved", "more", event)


def _line(mark: Any) -> str:
    return "" if mark is None else f" in line {mark.line + 1}"


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"a fault{_line(getattr(error, 'problem_mark', None))}: {problem}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name of a file
        return False


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _strings(value)


set_loader(PARSER_MODE, load, (yaml.YAMLError,))

# Lightning's Timer has a default that is an enumeration's member, which no saved config could hold.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
