"""Which rows of the training file are trained on, and which are held out."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_SPLIT_STREAM = 0x7E871


def split_rows(
    labels: Tensor, names: Sequence[str] | None, *, per_class: int | None, fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows for validation, each in the order of the file.

    The rows of each class are permuted. Training takes the first ``per_class``, validation the last: ``fraction`` of
    the class, of what training leaves, and with ``per_class`` at most as many as are trained on.

    Args:
        labels: Of all rows, ``(n,)``.
        names: The names of the classes; ``None`` for regression, where all rows are of one kind.
        per_class: Rows of each class to train on; ``None`` takes all that are not held out.
        fraction: To hold out, in [0, 1).
        seed: Chooses the rows.

    Returns:
        Two tensors of rows, int64.

    Raises:
        ValueError: If a class has too few rows, or nothing is left to train on or to hold out.

    Example:
        >>> train, val = split_rows(torch.tensor([0, 0, 0, 1, 1, 1]), ["a", "b"], per_class=1, fraction=0.5, seed=0)
        >>> len(train), len(val)
        (2, 2)
    """
    generator = np.random.default_rng([seed, _SPLIT_STREAM])
    kinds = torch.zeros(len(labels), dtype=torch.int64) if names is None else labels
    train, held = [], []
    for kind in range(1 if names is None else len(names)):
        rows = torch.nonzero(kinds == kind)[:, 0]
        rows = rows[torch.from_numpy(generator.permutation(len(rows)))]
        count = round(fraction * len(rows))
        if per_class is not None:
            if len(rows) < per_class:
                of = "" if names is None else f" of class {names[kind]!r}"
                raise ValueError(
                    f"expected at most the {len(rows)} examples{of} in `train` in `per_class`, got {per_class}"
                )
            count = min(count, per_class, len(rows) - per_class)
        train.append(rows[: len(rows) - count if per_class is None else per_class])
        held.append(rows[len(rows) - count :])
    chosen, validation = torch.cat(train).sort().values, torch.cat(held).sort().values
    if fraction > 0 and len(validation) == 0:
        raise ValueError(
            f"expected a `validation_fraction` that holds something out of the {len(labels)} examples in `train`, got "
            f"{fraction}; give a larger one, a file in `validation`, or 0 for none"
        )
    if len(chosen) == 0:
        raise ValueError(f"expected a `validation_fraction` that leaves something to train on, got {fraction}")
    return chosen, validation
