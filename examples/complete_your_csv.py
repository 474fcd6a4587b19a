"""Completing a table of one's own: a CSV file with one known entry per line, its indices (from 0) and then its value.

Its first line names the columns. A tenth of the known entries is held out; R² on them says how far the completed ones
can be trusted: 1 is perfect, 0 no better than the mean. Without a path, ratings of 40 films by 60 users in 12 months
are made up, 15 % of them known.

    python examples/complete_your_csv.py [ratings.csv]
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer

from tenzoo.data import CompletionDataModule
from tenzoo.tasks import CompletionTask

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def write_ratings(path: Path) -> Path:
    """Ratings of rank two with some noise, rounded to half stars."""
    rng = np.random.default_rng(0)
    taste = np.einsum("ur,fr,mr->ufm", *(rng.normal(size=(size, 2)) for size in (60, 40, 12)))
    stars = np.clip(3 + taste / taste.std() + rng.normal(scale=0.3, size=taste.shape), 0.5, 5)
    rows = [(*index, np.round(2 * stars[index]) / 2) for index in np.ndindex(stars.shape) if rng.random() < 0.15]
    np.savetxt(path, rows, ["%d", "%d", "%d", "%.1f"], ",", header="user,film,month,stars", comments="")
    return path


def complete(path: Path) -> None:
    """Fit, judge on the held-out entries, and predict what is unknown."""
    torch.manual_seed(0)
    split = {"observed_fraction": 0.9, "validation_fraction": 0}
    data = CompletionDataModule(str(path), batch_size=512, standardize=True, **split)
    task = CompletionTask("cp", rank=3, init_std=0.3, optimizer=lambda cores: torch.optim.Adam(cores, lr=0.01))
    trainer = Trainer(max_steps=1000, devices=1, **QUIET)
    trainer.fit(task, data)
    metrics = {name: value for row in trainer.test(task, data, verbose=False) for name, value in row.items()}
    for split_name, entries in data.splits.items():
        print(f"R² on {len(entries):>6} entries of {split_name:<10}{metrics[f'{split_name}/r2']:>8.3f}")
    completed = trainer.predict(task, data)  # all cells that were not trained on
    index, value = (torch.cat(parts) for parts in zip(*completed, strict=True))
    unknown = torch.cat([batch.value for batch in data.predict_dataloader()]).isnan()
    print(f"completed {int(unknown.sum())} cells of {' × '.join(map(str, data.shape))}, the first of them:")
    for cell, predicted in zip(index[unknown][:5].tolist(), value[unknown][:5].tolist(), strict=True):
        print(f"{','.join(map(str, cell)):>12}{predicted:>8.2f}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        complete(Path(sys.argv[1]) if len(sys.argv) > 1 else write_ratings(Path(folder) / "ratings.csv"))
