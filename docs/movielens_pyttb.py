"""CP of MovieLens-100k, users × films × weeks, by tenzoo and by pyttb, in turns on one fold.

    python docs/movielens_pyttb.py PATH [--rank 5] [--rounds 3] [--iterations 20]

PATH is as in movielens.py. pyttb (``pip install pyttb``) has two ways. ``gcp_opt`` with a mask fits the known entries
alone, by L-BFGS on the dense tensor. ``cp_als`` takes what is not known for 0, which here is the mean of all ratings.
Neither has a penalty or biases; tenzoo is shown without and with them, all at the same rank. Processor seconds are
those of the fit alone, with one thread.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyttb
import torch
from lightning.pytorch import Trainer
from movielens import QUIET, ratings
from torch import Tensor

from tenzoo.data import CompletionDataModule
from tenzoo.tasks import CompletionTask

PENALTY = 3.0
"""Weight decay of the cores."""

PENALTY_WITH_BIASES = 26.0
"""What biases explain is not left to the cores."""

Predict = Callable[[Tensor], Tensor]


def by_tenzoo(index: Tensor, stars: Tensor, shape: list[int], rank: int, *, decay: float, biases: bool) -> Predict:
    """CP of all three modes, 160 steps of Adam over all entries."""
    known = torch.sparse_coo_tensor(index.t(), stars, shape, check_invariants=True)
    data = CompletionDataModule(
        known, observed_fraction=1, validation_fraction=0, standardize=True, steps_per_epoch=160
    )
    task = CompletionTask(
        "cp",
        rank,
        init_std=0.3,
        reduction="sum",
        biases=biases,
        bias_weight_decay=6.0 if biases else None,
        clip="data",
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02, weight_decay=decay),
        lr_scheduler="cosine",
    )
    Trainer(max_epochs=1, accelerator="cpu", **QUIET).fit(task, data)
    return task.eval()


def by_gcp(index: Tensor, stars: Tensor, shape: list[int], rank: int, *, iterations: int, seed: int) -> Predict:
    """Least squares over the known entries."""
    values, mask = np.zeros(shape), np.zeros(shape)
    mean = float(stars.mean())
    values[tuple(index.numpy().T)] = stars.numpy() - mean
    mask[tuple(index.numpy().T)] = 1
    start = [np.random.default_rng([seed, mode]).normal(size=(size, rank)) / 3 for mode, size in enumerate(shape)]
    solver = pyttb.gcp.optimizers.LBFGSB(maxiter=iterations)
    found, _, _ = pyttb.gcp_opt(
        pyttb.tensor(values, copy=False),
        rank,
        pyttb.gcp.handles.Objectives.GAUSSIAN,
        solver,
        init=pyttb.ktensor(start),
        mask=mask,
        printitn=0,
    )
    return predictor(found, mean)


def by_als(index: Tensor, stars: Tensor, shape: list[int], rank: int, *, iterations: int, seed: int) -> Predict:
    """Alternating least squares over all entries."""
    mean = float(stars.mean())
    known = pyttb.sptensor(index.numpy(), (stars - mean).double().numpy()[:, None], tuple(shape))
    np.random.seed(seed)  # noqa: NPY002  (pyttb draws from it)
    found, _, _ = pyttb.cp_als(known, rank, maxiters=iterations, printitn=0)
    return predictor(found, mean)


def predictor(found: pyttb.ktensor, mean: float) -> Predict:
    """Values of a CP at indices, in the range of the stars."""
    factors = [torch.from_numpy(factor) for factor in found.factor_matrices]
    weights = torch.from_numpy(found.weights)

    def predict(index: Tensor) -> Tensor:
        rows = [factor[column] for factor, column in zip(factors, index.unbind(1), strict=True)]
        return ((rows[0] * rows[1] * rows[2]) @ weights + mean).clamp(1, 5)

    return predict


def main() -> None:
    """Print seconds and errors, round by round, and their medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--rank", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    index, stars = ratings(given.path)
    shape = (index.amax(0) + 1).tolist()
    fold, *others = torch.randperm(len(stars), generator=torch.Generator().manual_seed(0)).chunk(5)
    kept = torch.cat(others)
    ways = {
        "tenzoo, no penalty": lambda *data, seed: by_tenzoo(*data, decay=0.0, biases=False),
        "tenzoo, penalty": lambda *data, seed: by_tenzoo(*data, decay=PENALTY, biases=False),
        "tenzoo, penalty and biases": lambda *data, seed: by_tenzoo(*data, decay=PENALTY_WITH_BIASES, biases=True),
        "pyttb.gcp_opt, mask": lambda *data, seed: by_gcp(*data, iterations=given.iterations, seed=seed),
        "pyttb.cp_als": lambda *data, seed: by_als(*data, iterations=given.iterations, seed=seed),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(given.rounds):
        for name, way in ways.items():
            torch.manual_seed(number)
            start = time.process_time()
            predict = way(index[kept], stars[kept], shape, given.rank, seed=number)
            seconds = time.process_time() - start
            with torch.no_grad():
                error = float((predict(index[fold]) - stars[fold]).double().square().mean().sqrt())
            found[name].append((seconds, error))
            print(f"round {number + 1}: {name}: {seconds:.1f} s, RMSE {error:.4f}", flush=True)
    for name, pairs in found.items():
        seconds, error = np.median(pairs, axis=0)
        print(f"| {name} | {seconds:.1f} | {error:.4f} |")


if __name__ == "__main__":
    main()
