"""What a comparison found, and how it is printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows."""


@dataclass(frozen=True)
class Ratio:
    """One quantity divided by another, once per round.

    Args:
        name: What is divided by what.
        values: The ratio of each round.
        target: What the median should not exceed, if there is such a bound.
    """

    name: str
    values: tuple[float, ...]
    target: float | None = None

    @classmethod
    def of(
        cls,
        times: Mapping[str, Sequence[float]],
        above: str,
        below: str,
        *,
        name: str | None = None,
        target: float | None = None,
    ) -> "Ratio":
        """The ratio of two variants, round by round; its name tells them apart where none is given.

        Example:
            >>> Ratio.of({"a": [2.0, 6.0, 3.0], "b": [1.0, 2.0, 3.0]}, "a", "b").median
            2.0
        """
        pairs = zip(times[above], times[below], strict=True)
        return cls(name or f"{above} / {below}", tuple(a / b for a, b in pairs), target)

    @property
    def median(self) -> float:
        """Over the rounds."""
        return median(self.values)

    @property
    def verdict(self) -> str:
        """The target, and whether the median meets it; empty without a target."""
        if self.target is None:
            return ""
        return f"≤ {self.target:g}: {'met' if self.median <= self.target else '**missed**'}"


@dataclass(frozen=True)
class Report:
    """The outcome of a comparison.

    Args:
        title: Its name and subject.
        note: What else to know of the conditions, in a sentence.
        unit: Unit of ``times``, and how many of it make a second.
        times: Seconds per step of each variant, one per round.
        ratios: What follows from them.
        tables: What was measured besides.
    """

    title: str
    note: str
    unit: tuple[str, float]
    times: Mapping[str, Sequence[float]]
    ratios: Sequence[Ratio]
    tables: Sequence[Table] = field(default=())

    def markdown(self) -> str:
        """Title, note and tables."""
        name, per_second = self.unit
        rounds = len(next(iter(self.times.values())))
        times = [[variant, spread([value * per_second for value in row])] for variant, row in self.times.items()]
        ratios = [[ratio.name, spread(ratio.values), ratio.verdict] for ratio in self.ratios]
        tables: list[Table] = [
            ((f"median of {rounds} rounds (min–max)", name), times),
            (("ratio within a round", f"median of {rounds} (min–max)", "target"), ratios),
            *self.tables,
        ]
        return "\n\n".join([f"### {self.title}", self.note, *(_markdown(table) for table in tables)])


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum, in three significant digits.

    Example:
        >>> spread([1.0, 3.0, 2.0])
        '2.00 (1.00–3.00)'
    """
    return f"{_digits(median(values))} ({_digits(min(values))}–{_digits(max(values))})"


def _digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _markdown(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
