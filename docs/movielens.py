"""Five-fold cross-validation of a completion of MovieLens-100k, users × films × weeks.

    python docs/movielens.py PATH [--members 5] [--rank 20]

PATH is the file of ratings: ``u.data`` of GroupLens, or ``ml-100k.inter``, which the package recbole 1.2.1 brings in
``dataset_example/ml-100k`` (``pip install --no-deps recbole==1.2.1``; its licence does not allow to redistribute it).
The folds are five parts of one random permutation. Of each, the other four fifths are trained on whole; nothing of the
fifth is looked at. The settings were chosen on the first fold's training entries alone, a tenth of them for validation.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tenzoo.data import CompletionDataModule
from tenzoo.tasks import CompletionTask

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
STEPS = 160


def ratings(path: Path) -> tuple[Tensor, Tensor]:
    """Users, films and weeks from 0 on, ``(100000, 3)``, and stars."""
    table = np.loadtxt(path, skiprows=int(path.suffix == ".inter"))
    week = (table[:, 3] - table[:, 3].min()) // (7 * 86400)
    columns = [np.unique(column, return_inverse=True)[1] for column in (table[:, 0], table[:, 1], week)]
    return torch.from_numpy(np.stack(columns, axis=1)), torch.from_numpy(table[:, 2]).float()


def completed(index: Tensor, stars: Tensor, shape: list[int], *, rank: int, members: int) -> CompletionTask:
    """A model of these ratings: of users and films, and a number for each user, film and week."""
    known = torch.sparse_coo_tensor(index.t(), stars, shape, check_invariants=True)
    data = CompletionDataModule(
        known, observed_fraction=1, validation_fraction=0, standardize=True, steps_per_epoch=STEPS
    )
    task = CompletionTask(
        "cp",
        rank,
        init_std=0.3,
        reduction="sum",
        biases=True,
        interactions=[[0, 1]],
        clip="data",
        ensemble=members,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02, weight_decay=26.0),
        bias_weight_decay=6.0,
        lr_scheduler="cosine",
    )
    Trainer(max_epochs=1, accelerator="cpu", **QUIET).fit(task, data)
    return task.eval()


def main() -> None:
    """Print the error of each fold, and their mean."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--rank", type=int, default=20)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    index, stars = ratings(given.path)
    shape = (index.amax(0) + 1).tolist()
    folds = torch.randperm(len(stars), generator=torch.Generator().manual_seed(0)).chunk(5)
    errors = []
    for number, fold in enumerate(folds):
        torch.manual_seed(number)
        kept = torch.cat([other for other in folds if other is not fold])
        start = time.process_time()
        task = completed(index[kept], stars[kept], shape, rank=given.rank, members=given.members)
        with torch.no_grad():
            errors.append(float((task(index[fold]) - stars[fold]).square().mean().sqrt()))
        print(f"fold {number + 1}: RMSE {errors[-1]:.4f}  ({time.process_time() - start:.0f} s CPU)", flush=True)
    print(f"mean: {np.mean(errors):.4f} ± {np.std(errors, ddof=1):.4f}")


if __name__ == "__main__":
    main()
