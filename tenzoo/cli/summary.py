"""The table of a network that ``fit`` prints before it trains."""

from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from tenzoo.messages import elided

_WORDS = ("Name", "Type")
"""Columns of names, which lose their middle in a narrow terminal; numbers do not."""


class NetworkSummary(ModelSummary):
    """Lightning's table without what says nothing: parts without parameters, operations that nobody counted."""

    @staticmethod
    @override
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print it."""
        columns = dict(summary_data)
        hidden = {" ", *(() if total_training_modes["eval"] else ("Mode",)), *(() if total_flops else ("FLOPs",))}
        rows = [number for number, count in enumerate(columns["Params"]) if count.strip() != "0"]
        shown = {
            title: [cells[number].strip() for number in rows] for title, cells in summary_data if title not in hidden
        }
        console = Console()
        if rows:
            console.print(_table(shown, console.width))
        total, trained = (get_human_readable_count(int(n)).strip() for n in (total_parameters, trainable_parameters))
        frozen = "" if trainable_parameters == total_parameters else f", {trained} of them trained"
        console.print(f"{total} parameters{frozen}; {model_size:,.3f} MB", highlight=False)


def _table(columns: dict[str, list[str]], width: int) -> Table:
    """The columns by their titles, in a terminal of this width."""
    widths = {title: max(map(len, [title, *cells])) for title, cells in columns.items()}
    room = width - sum(widths[title] for title in columns if title not in _WORDS) - 3 * len(columns) - 1
    names, types = (widths[title] for title in _WORDS)
    widths["Name"] = min(names, max(room - types, room // 2))
    widths["Type"] = min(types, room - widths["Name"])
    table = Table()
    for title in columns:
        table.add_column(title, justify="left" if title in (*_WORDS, "Mode") else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(elided(cell, widths[title]) for title, cell in zip(columns, cells, strict=True)))
    return table
