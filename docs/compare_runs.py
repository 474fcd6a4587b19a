"""Draw the norm dynamics of several runs in one figure, from the CSV logs of NormDynamicsMonitor.

PAPER="tenzoo fit --config covid_tucker_paper --trainer.max_epochs 2 --trainer.log_every_n_steps 1"
$PAPER && $PAPER --config methods/sam && $PAPER --config methods/das
RUNS=runs/covid_tucker_paper
python docs/compare_runs.py docs/norm_dynamics.png Adam=$RUN SAM=$OTHER DAS=$THIRD
"""

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

QUANTITIES = {
    "norms/total/normalized_deviation": ("Norm Deviation  $Q/\\bar{s}^2$", "log"),
    "norms/total/covariance": ("Covariance of squared norms and gradient norms", "symlog"),
}


def read(directory: Path, quantity: str) -> tuple[list[int], list[float]]:
    """Steps, from 1, and values of one logged quantity."""
    with (directory / "metrics.csv").open() as file:
        rows = [(int(row["step"]) + 1, float(row[quantity])) for row in csv.DictReader(file) if row.get(quantity)]
    return [step for step, _ in rows], [value for _, value in rows]


def main(target: str, *runs: str) -> None:
    """Write a figure of all runs, each given as ``name=directory``."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (quantity, (title, scale)) in zip(figure.subplots(1, 2), QUANTITIES.items(), strict=True):
        for number, run in enumerate(runs):
            name, _, directory = run.partition("=")
            steps, values = read(Path(directory), quantity)
            axes.plot(steps, values, label=name, linewidth=1.4 if number else 4)  # the first may lie below others
        axes.set(title=title, xlabel="optimizer step", xscale="log", yscale=scale)
        if scale == "symlog":
            axes.set_yscale(scale, linthresh=1e9)
            axes.yaxis.set_major_locator(SymmetricalLogLocator(base=1e3, linthresh=1e9))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
