"""Plans as tables for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from tenzoo.compression.plans import Plan


def plan_table(plan: "Plan", columns: int) -> str:
    """A plan as text.

    Args:
        plan: The plan.
        columns: The largest width of the text.
    """
    console = Console(width=columns)
    with console.capture() as capture:
        console.print(_table(plan))
    return capture.get().rstrip()


def _table(plan: "Plan") -> Table:
    counted = plan.multiplications is not None
    judged = None
    if plan.output_error is not None:
        inputs = "inputs held back" if plan.held_back else "these very inputs, whose samples cannot be told apart"
        judged = f"keeps the {plan.keeps}; error of the network's outputs on {inputs}: {plan.output_error:.3f}"
    table = Table(*(Column(name, overflow="fold") for name in ("layer", "weight", "becomes")), caption=judged)
    for name in ("parameters", "dense", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    if counted:
        table.add_column("multiplications", justify="right", no_wrap=True)
        table.add_column("dense", justify="right", no_wrap=True)
    for layer in plan.layers:
        becomes = f"dense: {layer.reason}" if layer.rank is None else f"{layer.factorization} {_listed(layer.rank)}"
        error = "" if layer.rank is None else f"{layer.error:.3f}"
        row = [
            layer.name,
            _listed(layer.shape),
            becomes,
            f"{layer.parameters:,}",
            f"{layer.dense_parameters:,}",
            error,
        ]
        table.add_row(*row, *(_number(n) for n in (layer.multiplications, layer.dense_multiplications) if counted))
    rest = f"{plan.other_parameters:,}"
    table.add_row("everything else", "", "", rest, rest, end_section=True)
    total = ["total", "", "", f"{plan.parameters:,}", f"{plan.dense_parameters:,}", ""]
    table.add_row(*total, *(_number(n) for n in (plan.multiplications, plan.dense_multiplications) if counted))
    return table


def _listed(numbers: Sequence[int]) -> str:
    return " × ".join(str(number) for number in numbers)


def _number(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
