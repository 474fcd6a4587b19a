"""Train the decoder of block tensor trains with Adam, SAM and DAS, and draw what becomes of the norms of its cores.

    python docs/language_model_study.py TEXT FOLDER [--figure docs/language_model_norms.png] [--steps 1000]

Three seeds, with the weight decay of the recipe and without one: 18 runs of configs/btt_picogpt.yaml. Those that
FOLDER has already are not run again, and one that was interrupted goes on. Prints a table, and draws perplexity, norm
deviation and covariance against the steps, mean and range over the seeds.
"""

import argparse
import csv
import itertools
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

METHODS = {
    "adam": [],
    "das": ["--config", "configs/methods/das.yaml", "--trainer.callbacks.alpha", "0.05"],
    "sam": ["--model.init_args.sam.rho", "0.05"],
}
DECAYS, SEEDS = ("0", "0.1"), (0, 1, 2)
PEAK, EVERY = 0.016, 20
"""The highest learning rate of the recipe, and steps between two logged ones."""
LABELS = {"adam": "AdamW", "das": "DAS", "sam": "SAM"}
CURVES = {
    "val/perplexity": "perplexity, validation",
    "norms/total/deviation": "Q, sum over the 28 groups",
    "norms/total/normalized_deviation": "Q / s̄²",
    "norms/total/covariance": "Cov of norms and gradient norms",
}
Points = dict[int, float]


def run(folder: Path, text: str, method: str, decay: str, seed: int, steps: int) -> None:
    """Train, unless the run is there."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "data.init_args.train": text,
        "data.init_args.seed": seed,
        "seed_everything": seed,
        "trainer.default_root_dir": folder,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps // 4,
        "trainer.log_every_n_steps": EVERY,
        "trainer.enable_progress_bar": "false",
        "model.init_args.optimizer.init_args.weight_decay": decay,
    }
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    kept = sorted(folder.glob("**/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed = ["--ckpt_path", str(kept[-1])] if kept else []
    command = [sys.executable, "-m", "tenzoo", "fit", "--config", "configs/btt_picogpt.yaml", *METHODS[method]]
    with (folder / "log.txt").open("a") as log:
        subprocess.run([*command, *given, *resumed], check=True, stdout=log, stderr=log)
    (folder / "done").touch()


def curve(folder: Path, name: str) -> Points:
    """A logged quantity by the step."""
    points = {}
    for path in sorted(folder.glob("**/metrics.csv")):
        with path.open(newline="") as file:
            points |= {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}
    return points


def predicted(folder: Path, steps: int) -> float:
    """What the logged rates of the theory make of Q: their sum over the steps, times the learning rates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps)
    rates = curve(folder, "norms/total/predicted_rate")
    total = 0.0
    for step in range(steps):
        total += EVERY * schedule.get_last_lr()[0] * rates.get(step, 0.0)
        optimizer.step()
        if step < steps - 1:
            schedule.step()
    return total


def common(curves: Sequence[Points]) -> tuple[list[int], list[list[float]]]:
    """The steps that all curves have, and the values there."""
    steps = sorted(set.intersection(*(set(points) for points in curves)))
    return steps, [[points[step] for points in curves] for step in steps]


def draw(folder: Path, figure: Path) -> None:
    """One column for each decay."""
    mpl.use("agg")
    axes = plt.subplots(len(CURVES), len(DECAYS), figsize=(9, 11), sharex=True, squeeze=False)[1]
    for (row, (name, label)), (column, decay) in itertools.product(enumerate(CURVES.items()), enumerate(DECAYS)):
        own = axes[row][column]
        for method in METHODS:
            steps, values = common([curve(folder / f"{method}_wd{decay}_s{seed}", name) for seed in SEEDS])
            line = own.plot(steps, [statistics.mean(each) for each in values], label=LABELS[method])[0]
            own.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color()
            )
        own.set_ylabel(label)
        if row == 0:
            own.set_title(f"weight decay {decay}")
        if row == len(CURVES) - 1:
            own.set_xlabel("step")
        own.grid(alpha=0.3)
    axes[0][0].legend()
    plt.tight_layout()
    plt.savefig(figure, dpi=130)


def main() -> None:
    """Run what is missing, print the table, draw the figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path, default=Path("docs/language_model_norms.png"))
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    for seed, decay, method in itertools.product(SEEDS, DECAYS, METHODS):
        folder = given.folder / f"{method}_wd{decay}_s{seed}"
        if not (folder / "done").exists():
            run(folder, given.text, method, decay, seed, given.steps)
    columns = ("weight decay", "method", "perplexity", "Q at the start", "at the end", "predicted change")
    print(f"| {' | '.join(columns)} | Q / s̄² at the end | Cov, median |\n|---|---|{'---:|' * 6}")
    for decay, method in itertools.product(DECAYS, METHODS):
        runs = [given.folder / f"{method}_wd{decay}_s{seed}" for seed in SEEDS]
        best = [min(curve(each, "val/perplexity").values()) for each in runs]
        deviation = [list(curve(each, "norms/total/deviation").values()) for each in runs]
        spread = [list(curve(each, "norms/total/normalized_deviation").values())[-1] for each in runs]
        covariance = [statistics.median(curve(each, "norms/total/covariance").values()) for each in runs]
        print(
            f"| {decay} | {LABELS[method]} | {statistics.mean(best):.3f} ± {statistics.stdev(best):.3f} "
            f"| {statistics.mean(each[0] for each in deviation):.3g} | {statistics.mean(e[-1] for e in deviation):.3g} "
            f"| {statistics.mean(predicted(each, given.steps) for each in runs):.2g} "
            f"| {statistics.mean(spread):.3g} | {statistics.mean(covariance):.2g} |"
        )
    draw(given.folder, given.figure)


if __name__ == "__main__":
    main()
