"""A smooth volume of which a fifth is known, completed by Tucker with and without the penalty of roughness.

    python docs/smooth_volume.py [--size 256] [--rank 96] [--steps 100] [--smoothness 0.1]

The volume has twelve ellipsoids of random places, axes and values, blurred by a Gaussian of a 64th of its size. The
control is the known values, blurred by a Gaussian and divided by the blurred mask, at the best of five widths. R² is
that of all missing voxels.
"""

import argparse
import logging
import time
import warnings

import numpy as np
import torch
from lightning.pytorch import Trainer
from movielens import QUIET
from scipy.ndimage import gaussian_filter

from tenzoo.data import CompletionDataModule
from tenzoo.tasks import CompletionTask


def phantom(size: int) -> np.ndarray:
    """The volume, float32."""
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32)] * 3, indexing="ij"))
    volume = np.zeros((size,) * 3, dtype=np.float32)
    for _ in range(12):
        center, axes = random.uniform(-0.5, 0.5, 3), random.uniform(0.12, 0.55, 3)
        turn = np.linalg.qr(random.normal(size=(3, 3)))[0].astype(np.float32)
        shift, scale = (vector[:, None, None, None].astype(np.float32) for vector in (center, axes))
        inside = (np.tensordot(turn, grid - shift, 1) / scale) ** 2
        volume += random.uniform(-1, 1) * (inside.sum(0) < 1)
    return gaussian_filter(volume, size / 64)


def explained(found: np.ndarray, truth: np.ndarray) -> float:
    """R²."""
    return float(1 - np.mean((found - truth) ** 2, dtype=float) / np.var(truth, dtype=float))


def completed(volume: np.ndarray, rank: int, steps: int, smoothness: float) -> np.ndarray:
    """The tensor of a Tucker completion after full-batch steps of Adam."""
    torch.manual_seed(0)
    data = CompletionDataModule(volume, standardize=True, steps_per_epoch=steps)
    task = CompletionTask(
        "tucker",
        rank,
        init_std=0.5,
        smoothness=[smoothness] * 3,
        optimizer=lambda cores: torch.optim.Adam(cores, lr=0.03),
        lr_scheduler="one_cycle",
    )
    Trainer(max_epochs=1, accelerator="cpu", limit_val_batches=0, **QUIET).fit(task, data)
    model = task.eval().model
    with torch.no_grad():
        return (model.tensor.reconstruct() * model.scale + model.location).numpy()


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rank", type=int, default=96)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--smoothness", type=float, default=0.1)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    truth = phantom(given.size)
    known = np.random.default_rng(1).random(truth.shape) < 0.2
    volume = np.where(known, truth, np.nan).astype(np.float32)
    blurred = {
        width: explained(
            (
                gaussian_filter(np.where(known, truth, 0), width)
                / np.maximum(gaussian_filter(known.astype(np.float32), width), 1e-9)
            )[~known],
            truth[~known],
        )
        for width in (0.6, 0.8, 1.0, 1.5, 2.0)
    }
    width = max(blurred, key=lambda each: blurred[each])
    print(f"Gaussian of {width} voxels: R² {blurred[width]:.4f}", flush=True)
    for smoothness in (0.0, given.smoothness):
        start = time.process_time()
        found = completed(volume, given.rank, given.steps, smoothness)
        seconds = time.process_time() - start
        name = f"Tucker, rank {given.rank}, smoothness {smoothness:g}"
        print(f"{name}: R² {explained(found[~known], truth[~known]):.4f}  ({seconds:.0f} s CPU)", flush=True)


if __name__ == "__main__":
    main()
