"""What was published of a config, and what was measured with it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "results.json"
"""Beside the configs: from the name of a config to its results, as they are given to :class:`Result`."""

_KINDS = ("published", "measured")
_PERCENT = frozenset({"accuracy"})
_SYMBOLS = {"r2": "R²", "rmse": "RMSE"}


@dataclass(frozen=True)
class Result:
    """One number.

    Args:
        metric: As the task names it: ``"r2"``, ``"accuracy"``.
        split: What it is of: ``"observed"``, ``"held out"``, ``"val"`` or ``"test"``.
        value: Accuracies are fractions. The mean, where there are several seeds.
        std: Standard deviation over the seeds; None for one.
        method: How the cores were trained: ``"SGD"``, ``"Adam"``, ``"SAM"``, ``"DAS"``.
        protocol: What differs from the config as it is, and what else a reader must know.
        command: What measures it; None if it was published.
        seeds: Of the runs; empty if it was published.
        source: The publication; None if it was measured.
    """

    metric: str
    split: str
    value: float
    std: float | None = None
    method: str | None = None
    protocol: str = ""
    command: str | None = None
    seeds: tuple[int, ...] = ()
    source: str | None = None

    def __str__(self) -> str:
        percent = self.metric in _PERCENT
        scale, digits, unit = (100, 2, " %") if percent else (1, 4 if abs(self.value) < 10 else 0, "")
        spread = "" if self.std is None else f" ± {self.std * scale:.{digits}f}"
        return f"{self.value * scale:.{digits}f}{spread}{unit}"


@dataclass(frozen=True)
class Results:
    """Those of a config.

    Args:
        published: By others.
        measured: By the commands that they name.
    """

    published: tuple[Result, ...] = ()
    measured: tuple[Result, ...] = ()


def headline(results: Sequence[Result]) -> str:
    """The first of several, in a word or two; nothing of none.

    Example:
        >>> headline([Result("accuracy", "test", 0.9), Result("accuracy", "val", 0.91)])
        '90.00 %'
        >>> headline([Result("r2", "val", 0.76)])
        'R² 0.7600'
    """
    if not results:
        return ""
    symbol = "" if results[0].metric in _PERCENT else f"{_SYMBOLS.get(results[0].metric, results[0].metric)} "
    return f"{symbol}{results[0]}"


def read_results(folder: Path) -> dict[str, Results]:
    """Results by name of a config; none if there is no such file.

    Raises:
        ValueError: If the file holds something else.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {str(path)!r}, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected names of configs in {str(path)!r}, got {type(content).__name__}")
    return {name: _results(name, value, path) for name, value in content.items()}


def _results(name: str, value: Any, path: Path) -> Results:
    if not isinstance(value, Mapping) or not set(value) <= set(_KINDS):
        raise ValueError(f"expected lists `published` and `measured` for {name!r} in {str(path)!r}, got {value!r:.80}")
    return Results(**{kind: tuple(_made(name, value.get(kind, ()), path)) for kind in _KINDS})


def _made(name: str, values: Any, path: Path) -> Iterable[Result]:
    known = {field.name for field in fields(Result)}
    needed = {field.name for field in fields(Result) if field.default is MISSING}
    for value in values if isinstance(values, list | tuple) else [values]:
        if not isinstance(value, Mapping) or not needed <= set(value) <= known or not _fits(value):
            raise ValueError(
                f"expected results with {', '.join(sorted(needed))} for {name!r} in {str(path)!r}, got {value!r:.80}"
            )
        yield Result(**{**value, "seeds": tuple(value.get("seeds", ()))})


def _fits(value: Mapping[str, Any]) -> bool:
    """Whether each value has the type of its field."""
    numbers = [value["value"], *([value["std"]] if value.get("std") is not None else [])]
    texts = [value[name] for name in ("metric", "split", "method", "protocol", "command", "source") if value.get(name)]
    seeds = value.get("seeds", [])
    return (
        all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and isinstance(seeds, list)
        and all(isinstance(seed, int) for seed in seeds)
    )
