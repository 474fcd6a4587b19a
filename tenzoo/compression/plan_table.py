"""Plans as tables for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from tenzoo.messages import elided, fitted

if TYPE_CHECKING:
    from tenzoo.compression.plans import LayerPlan, Plan

_SHORTEST = 16
"""Columns for what a layer becomes, in any terminal."""


def plan_table(plan: "Plan", columns: int) -> str:
    """A plan as text.

    Args:
        plan: The plan.
        columns: The largest width of the text.
    """
    console = Console(width=columns)
    with console.capture() as capture:
        console.print(_table(plan, columns))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _table(plan: "Plan", columns: int) -> Table:
    counted = plan.multiplications is not None
    judged = None
    if plan.output_error is not None:
        inputs = "inputs held back" if plan.held_back else "these very inputs, whose samples cannot be told apart"
        judged = f"keeps the {plan.keeps}; error of the network's outputs on {inputs}: {plan.output_error:.3f}"
    titles = ["layer", "weight", "parameters", "dense", "error", *(("mult.", "dense") if counted else ())]
    rows = [_row(layer, counted=counted) for layer in plan.layers]
    rest = f"{plan.other_parameters:,}"
    rows.append(["everything else", "", rest, rest])
    total = ["total", "", f"{plan.parameters:,}", f"{plan.dense_parameters:,}", ""]
    rows.append([*total, *(_number(n) for n in (plan.multiplications, plan.dense_multiplications) if counted)])
    rows = [[*row, *[""] * (len(titles) - len(row))] for row in rows]
    becomes = [_becomes(layer) for layer in plan.layers]
    room = min(max(map(len, ["becomes", *becomes])), max(_SHORTEST, columns // 4))
    widths = fitted([titles, *rows], columns - room - 1, shrink=[0])
    table = Table(caption=judged, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for number, (title, width) in enumerate(zip(titles, widths, strict=True)):
        table.add_column(title, justify="left" if number < 2 else "right", no_wrap=True, width=width)
        if title == "weight":
            table.add_column("becomes", min_width=room)  # a reason takes several lines
    for number, row in enumerate(rows):
        cells = [elided(cell, width) for cell, width in zip(row, widths, strict=True)]
        cells.insert(2, becomes[number] if number < len(becomes) else "")
        table.add_row(*cells, end_section=row[0] == "everything else")
    return table


def _row(layer: "LayerPlan", *, counted: bool) -> list[str]:
    error = "" if layer.rank is None else f"{layer.error:.3f}"
    row = [layer.name, _listed(layer.shape), f"{layer.parameters:,}", f"{layer.dense_parameters:,}", error]
    return [*row, *(_number(n) for n in (layer.multiplications, layer.dense_multiplications) if counted)]


def _becomes(layer: "LayerPlan") -> str:
    return f"dense: {layer.reason}" if layer.rank is None else f"{layer.factorization} {_listed(layer.rank)}"


def _listed(numbers: Sequence[int]) -> str:
    return "×".join(str(number) for number in numbers)


def _number(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
