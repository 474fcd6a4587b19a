"""The tables of ``tenzoo list`` and ``tenzoo describe``."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from tenzoo.messages import elided, fitted
from tenzoo.zoo.description import Layer, totals
from tenzoo.zoo.models import ModelInfo
from tenzoo.zoo.results import headline

_WITH_DATA = 110
"""Columns of a terminal from which on the list has one for the data."""

_TEXTS = frozenset({"config", "model", "data"})
"""Columns of words; all others are numbers."""

_NAME = 25
"""Characters of the longest name that is shown whole."""

_WITH_TIMES = 120
"""Columns of a terminal from which on layers have one for their core group, and two for times."""

_NAMES = ("layer", "cores", "core group")
"""Columns of layers whose texts lose their middle where the terminal is narrow."""

_WAYS = ("reconstruct", "contract")


def print_layers(layers: Sequence[Layer], batch_size: int | None, *, as_json: bool) -> None:
    """Print what :func:`describe` found; in a narrow terminal without what is in the JSON alone."""
    if as_json:
        print(json.dumps([{**asdict(layer), "compression": layer.compression} for layer in layers], indent=1))
        return
    console = Console()
    wide = console.width >= _WITH_TIMES
    per_batch = "" if batch_size is None else f" for a batch of {batch_size}"
    times = ", estimated ms of each way in a training step" if wide else ""
    titles = ["layer", "weight", "cores", "parameters", "÷", "mult.", "way"]
    titles += ["core group", "reconstruct", "contract"] if wide else []
    number, dense = totals(layers)
    rows = [_row(layer, wide=wide) for layer in layers if len(layer.shape) > 1]
    if sum(fitted([titles, *rows], 10**6, shrink=[0])) + len(titles) - 1 > console.width:
        rows = [
            [cell.partition(" of ")[0] if title == "cores" else cell for title, cell in zip(titles, row, strict=True)]
            for row in rows
        ]
    others = sum(layer.parameters for layer in layers if len(layer.shape) <= 1)
    if others:
        rows.append(["norms", "", "", f"{others:,}"])
    millions = sum(layer.multiplications or 0 for layer in layers if len(layer.shape) > 1) / 1e6
    rows.append(["total", "", "", f"{number:,}", f"{dense / number:.1f}", f"{millions:,.2f}"])
    rows = [[*row, *[""] * (len(titles) - len(row))] for row in rows]
    widths = fitted([titles, *rows], console.width, shrink=[titles.index(name) for name in _NAMES if name in titles])
    table = Table(
        title=f"Layers; millions of multiplications{per_batch}{times}", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    for title, width in zip(titles, widths, strict=True):
        words = title in ("layer", "weight", "cores", "way", "core group")
        table.add_column(title, justify="left" if words else "right", no_wrap=True, width=width)
    for row in rows:
        if row[0] == "total":
            table.add_section()
        table.add_row(*(elided(cell, width) for cell, width in zip(row, widths, strict=True)))
    console.print(table)


def _row(layer: Layer, *, wide: bool) -> list[str]:
    made = "" if layer.rank is None or layer.modes is None else f"{layer.factorization} {_ranks(layer.rank)}"
    modes = "" if layer.modes is None or tuple(layer.modes) == tuple(layer.shape) else f" of {_times(layer.modes)}"
    times = layer.milliseconds or {}
    row = [
        layer.name or layer.kind,
        _times(layer.shape),
        made + (modes if wide else ""),
        f"{layer.parameters:,}",
        f"{layer.compression:.1f}" if layer.rank else "",
        "" if layer.multiplications is None else f"{layer.multiplications / 1e6:,.2f}",
        layer.contraction or "",
    ]
    if wide:
        row += [layer.core_group or "", *(f"{times[key]:.2f}" if key in times else "" for key in _WAYS)]
    return row


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
            console.print(f"{kind}: {result.metric} {result.split} {result}: {said}", highlight=False)
            for line in _command(result.command or result.source or "", console.width - 4):
                console.print(f"    {line}", highlight=False, soft_wrap=True)


def _command(command: str, width: int) -> list[str]:
    r"""A command in lines that a shell takes as one, divided before options.

    Example:
        >>> _command("tenzoo fit --config zoo:covid_tucker --seed_everything 3", 40)
        ['tenzoo fit --config zoo:covid_tucker \\', '  --seed_everything 3']
    """
    lines: list[str] = []
    for part in command.replace(" --", "\n--").split("\n"):
        if lines and len(lines[-1]) + 1 + len(part) <= width - 2:
            lines[-1] += f" {part}"
        else:
            lines.append(part if not lines else f"  {part}")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


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
