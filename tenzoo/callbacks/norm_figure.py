"""The figure that the norm monitor draws."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Mapping[str, Sequence[tuple[int, float, float]]]
"""For each group its rows: step, Q and Cov."""


def draw_history(history: History) -> "Figure":
    """Q and Cov against optimizer steps, a line for each group."""
    from matplotlib.figure import Figure  # here, because training itself does not need it

    figure = Figure(figsize=(10, 4), layout="constrained")
    deviation, covariance = figure.subplots(1, 2)
    names = [name for name in history if name != "total" or len(history) > 2]
    for name in names:
        steps, deviations, covariances = zip(*history[name], strict=True)
        style: dict[str, Any] = {"color": "black", "linewidth": 2} if name == "total" else {"linewidth": 1.2}
        deviation.plot(steps, deviations, label=name, **style)
        covariance.plot(steps, covariances, label=name, **style)
    deviation.set(title="Norm Deviation  Q", xlabel="optimizer step", yscale="log")
    covariance.set(title="Covariance of squared norms and gradient norms", xlabel="optimizer step")
    largest = max((abs(row[2]) for name in names for row in history[name]), default=0.0)
    if largest > 0:
        covariance.set_yscale("symlog", linthresh=largest * 1e-6)
    covariance.axhline(0, color="gray", linewidth=0.8)
    for axes in (deviation, covariance):
        axes.grid(alpha=0.3)
    if len(names) <= 12:
        deviation.legend(fontsize="small")
    return figure
