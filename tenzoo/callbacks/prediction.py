"""Writing what a completion predicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class CompletedEntriesWriter(BasePredictionWriter):
    """Write the completed entries to ``completed.npz`` in the log directory: ``indices`` (n, order), ``values`` (n,).

    An existing file is never overwritten: a number is appended to the name. Under DDP every rank predicts all entries
    and the first one writes.

    Args:
        name: File name, or a path of your own. ``.csv`` writes a text file of indices and values.

    Raises:
        ValueError: For a name that ends in neither ``.npz`` nor ``.csv``.

    Example:
        >>> CompletedEntriesWriter("completed.txt")
        Traceback (most recent call last):
        ...
        ValueError: expected a file name ending in .npz or .csv in `name`, got 'completed.txt'
    """

    def __init__(self, name: str = "completed.npz") -> None:
        super().__init__(write_interval="epoch")
        if Path(name).suffix not in (".npz", ".csv"):
            raise ValueError(f"expected a file name ending in .npz or .csv in `name`, got {name!r}")
        self.name = name

    @override
    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        directory = trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero:
            return
        path = _unused(Path(directory) / self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        indices = torch.cat([batch.index for batch in predictions]).cpu().numpy()
        values = torch.cat([batch.value for batch in predictions]).cpu().numpy()
        if path.suffix == ".npz":
            np.savez(path, indices=indices, values=values)
        else:
            columns = [*(f"i{mode}" for mode in range(indices.shape[1])), "value"]
            form = ["%d"] * indices.shape[1] + ["%.9g"]
            np.savetxt(path, np.column_stack([indices, values]), form, ",", header=",".join(columns), comments="")
        rank_zero_info(f"wrote {len(values)} completed entries to {path}")


def _unused(path: Path) -> Path:
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
