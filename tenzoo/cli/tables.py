"""The tables of ``tenzoo list`` and ``tenzoo describe``."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from tenzoo.zoo.description import Layer, totals
from tenzoo.zoo.models import ModelInfo
from tenzoo.zoo.results import headline

_WITH_DATA = 110
"""Columns of a terminal from which on the list has one for the data."""

_TEXTS = frozenset({"config", "model", "data"})
"""Columns of words; all others are numbers."""

_NAME = 25
"""Characters of the longest name that is shown whole."""

_MIN_WIDTH = 120
"""Columns of a terminal that the tables need."""


def print_layers(layers: Sequence[Layer], batch_size: int | None, *, as_json: bool) -> None:
    """Print what :func:`describe` found."""
    if as_json:
        print(json.dumps([{**asdict(layer), "compression": layer.compression} for layer in layers], indent=1))
        return
    per_batch = "" if batch_size is None else f" for a batch of {batch_size}"
    table = Table(title=f"Layers; millions of multiplications{per_batch}, estimated ms of each way in a training step")
    for column in ("layer", "weight", "cores", "core group"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "÷", "mult.", "way", "reconstruct", "contract"):
        table.add_column(column, justify="right", no_wrap=True)
    weights = [layer for layer in layers if len(layer.shape) > 1]
    for layer in weights:
        made = "" if layer.rank is None or layer.modes is None else f"{layer.factorization} {_ranks(layer.rank)}"
        modes = "" if layer.modes is None or tuple(layer.modes) == tuple(layer.shape) else f" of {_times(layer.modes)}"
        times = layer.milliseconds or {}
        table.add_row(
            layer.name or layer.kind,
            _times(layer.shape),
            made + modes,
            layer.core_group or "",
            f"{layer.parameters:,}",
            f"{layer.compression:.1f}" if layer.rank else "",
            "" if layer.multiplications is None else f"{layer.multiplications / 1e6:,.2f}",
            layer.contraction or "",
            *(f"{times[key]:.2f}" if key in times else "" for key in ("reconstruct", "contract")),
        )
    number, dense = totals(layers)
    multiplications = [layer.multiplications for layer in layers if layer.multiplications is not None]
    others = sum(layer.parameters for layer in layers if len(layer.shape) <= 1)
    if others:
        table.add_row("norms", "", "", "", f"{others:,}", "", "", "", "", "")
    table.add_section()
    table.add_row(
        "total", "", "", "", f"{number:,}", f"{dense / number:.1f}", f"{sum(multiplications) / 1e6:,.2f}", "", "", ""
    )
    _wide_console().print(table)


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _ranks(rank: Sequence[int]) -> str:
    return f"rank {rank[0]}" if len(set(rank)) == 1 else f"ranks {', '.join(map(str, rank))}"


def print_models(models: Sequence[ModelInfo], *, as_json: bool) -> None:
    """Print the models of the zoo, one line each; of one alone, all that is known of its results."""
    if as_json:
        print(json.dumps([asdict(model) for model in models], indent=1))
        return
    console = Console()
    table = Table(
        title="The zoo; ÷ is how many times fewer parameters than dense",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    shows_data = console.width >= _WITH_DATA
    titles = ("config", "model", *(("data",) if shows_data else ()), "parameters", "÷", "published", "measured")
    rows = [
        (
            elided(model.name, _NAME),
            model.model,
            *((model.data,) if shows_data else ()),
            *_size(model),
            *(headline(results) for results in (model.published, model.measured)),
        )
        for model in models
    ]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    widths[1] = min(widths[1], max(_NAME // 2, console.width - sum(widths) + widths[1] - len(widths) + 1))
    for title, width in zip(titles, widths, strict=True):
        side: Literal["left", "right"] = "left" if title in _TEXTS else "right"
        table.add_column(title, justify=side, no_wrap=True, width=width)
    for name, model, *others in rows:
        table.add_row(name, elided(model, widths[1]), *others)
    console.print(table)
    if len(models) == 1:
        _print_results(models[0], console)


def _size(model: ModelInfo) -> tuple[str, str]:
    """Parameters, and how many times fewer than dense."""
    if model.parameters is None or model.compression is None:
        return "", ""
    ratio = f"{model.compression:.1e}" if model.compression >= 1e5 else f"{model.compression:,.1f}"
    return f"{model.parameters:,}", ratio


def elided(name: str, width: int) -> str:
    """A name without its middle, if it is longer than a width.

    Example:
        >>> elided("minilm_sst2_loretta", 11), elided("das", 11)
        ('minil…retta', 'das')
    """
    return name if len(name) <= width else f"{name[: width // 2]}…{name[len(name) - (width - 1) // 2 :]}"


def _print_results(model: ModelInfo, console: Console) -> None:
    """Where each number is from."""
    console.print(f"config: {model.config}\ndata: {model.data}", highlight=False, soft_wrap=True)
    for kind, results in (("published", model.published), ("measured", model.measured)):
        for result in results:
            words = (
                result.method,
                result.protocol,
                f"seeds {', '.join(map(str, result.seeds))}" if result.seeds else "",
            )
            said = ", ".join(word for word in words if word)
            console.print(f"{kind}: {result.metric} {result.split} {result}: {said}", highlight=False, soft_wrap=True)
            console.print(f"    {result.command or result.source}", highlight=False, soft_wrap=True)


def print_parts(names: Sequence[str]) -> None:
    """Print the names of configs that are composed over others."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    table = Table(title="To compose over a model: --config NAME --config methods/das", box=None, show_header=False)
    for folder, found in folders.items():
        table.add_row(f"{folder}/", " ".join(found))
    Console().print(table)


def _wide_console() -> Console:
    """In a narrow terminal, or in none, columns would shrink to nothing."""
    console = Console()
    return console if console.width >= _MIN_WIDTH else Console(width=_MIN_WIDTH)
