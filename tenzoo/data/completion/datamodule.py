"""Tensor completion: some entries of a tensor are observed, the rest is to be predicted."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from tenzoo.data.checks import check_bool, check_fraction, check_int
from tenzoo.data.completion.entries import CompletionBatch, Entries, look_up
from tenzoo.data.completion.loaders import EVALUATION_BATCH_SIZE, EntryLoader, SequentialLoader
from tenzoo.data.completion.preparation import PreparedData, check_predict_index, prepare
from tenzoo.data.completion.sources import called, check_missing_values, check_source, check_table, is_public
from tenzoo.data.completion.splits import SPLIT_NAMES
from tenzoo.data.completion.summary import summary
from tenzoo.data.completion.unseen import UnseenLoader
from tenzoo.data.resumable import ResumableDataModule
from tenzoo.data.transfer import upload

MAX_PREDICTED_CELLS = 1_000_000_000
"""Most cells that are completed without a list of indices; their file takes about 30 GB."""


class CompletionDataModule(ResumableDataModule[PreparedData, EntryLoader]):
    """A tensor of which some entries are observed, split for training, validation and a held-out test.

    Every split holds index-value pairs, so the cost grows with the known entries and not with the tensor. Values are
    raw, in float32: with ``standardize`` the task subtracts :attr:`location`, divides by :attr:`scale` and undoes both.
    Values with an offset so large that float32 cannot tell them apart are refused.

    Training draws from ``train`` (see :class:`EntryLoader`) and resumes exactly, in mid-epoch too. Validation and test
    use all splits that exist, one loader each, in the order of :attr:`eval_split_names`; with several processes each of
    them sees all entries. A checkpoint can only be loaded with its own data and split.

    Args:
        dataset: ``"covid"``, ``"il2"``, ``"indian_pines"``, ``"kinetic"``, ``"synthetic"``, or the path of a ``.npy``,
            ``.npz``, ``.pt``, ``.mat``, ``.nc`` or ``.csv`` file, dense with NaN for missing entries or a list of
            entries; in Python also an array of NumPy (which may be masked), torch (which may be sparse: what it does
            not hold is missing) or xarray, or a data frame. Its dimensions and coordinates name modes and labels.
        observed_fraction: Fraction in (0, 1] of the known entries that is observed; the rest is held out. 1 is allowed
            where the tensor has unknown cells. ``None`` means 0.9 for a file, and 0.3 for the data sets with a name.
        validation_fraction: Fraction in [0, 1) of the observed entries that is held out for validation. ``None`` means
            a tenth, and of a file with ``observed_fraction`` ``None`` a ninth, so that 80 % are trained on, 10 % are
            for validation and 10 % are held out.
        seed: Chooses the splits, the order of batches, and the synthetic tensor. Independent of global generators.
        batch_size: Observed entries per optimizer step, over all processes together; ``None`` means all.
        steps_per_epoch: Batches per epoch; ``None`` means one pass over ``train``.
        standardize: Whether ``location`` and ``scale`` are mean and standard deviation of the ``train`` values.
        shape: Mode sizes, for ``"synthetic"`` (required) and for lists of entries.
        num_entries: Number of known entries of ``"synthetic"``.
        predict_index: The cells to predict: ``None`` means all cells that are not in ``train``, up to a billion;
            ``"held_out"`` means that split; else the path of a ``.csv`` or ``.npz`` file with indices, whose columns
            have the names of the data where both have names. Of a table with labels, it has labels, too.
        index_columns: Names of the columns of a table that say where an entry is, one for each mode; they may hold any
            labels. The table is a data frame, or a ``.csv``, ``.tsv``, ``.csv.gz``, ``.parquet``, ``.feather`` or
            ``.arrow`` file.
        value_column: Name of the column of its values.
        missing_values: Numbers in a file that mean a missing value, such as −999.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, unknown, or has no meaning for this dataset; from ``setup``, if a
            file cannot be read or is not valid, or a split has fewer than 2 entries.
        FileNotFoundError: From ``setup``, if there is no such file.

    Example:
        >>> data = CompletionDataModule("covid", validation_fraction=0.0)
        >>> data.setup()
        >>> data.shape, {name: len(split) for name, split in data.splits.items()}
        ((438, 6, 11), {'train': 8672, 'held_out': 20236})
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.index.shape, batch.value.shape
        (torch.Size([8672, 3]), torch.Size([8672]))
    """

    _mismatch_reason = "its held-out numbers would be wrong"

    def __init__(
        self,
        dataset: Any,
        *,
        observed_fraction: float | None = None,
        validation_fraction: float | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        standardize: bool = False,
        shape: Sequence[int] | None = None,
        num_entries: int | None = None,
        predict_index: str | None = None,
        index_columns: Sequence[str] | None = None,
        value_column: str | None = None,
        missing_values: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        dataset = data = os.fspath(dataset) if isinstance(dataset, os.PathLike) else dataset
        columns = check_table(dataset, index_columns, value_column, shape)
        sizes = None if columns is not None else check_source(dataset, shape=shape, num_entries=num_entries)
        index_columns = None if columns is None else list(columns.index)
        known_missing = check_missing_values(missing_values)
        missing_values = None if missing_values is None else list(known_missing)
        if known_missing and is_public(dataset):
            raise ValueError(f"expected `missing_values` only for a file, got {missing_values} with {dataset!r}")
        shape = None if sizes is None else list(sizes)
        if observed_fraction is not None:
            observed_fraction = check_fraction(observed_fraction, arg="observed_fraction", positive=True)
        if validation_fraction is not None:
            validation_fraction = check_fraction(validation_fraction, arg="validation_fraction", below_one=True)
        check_int(seed, arg="seed", least=0)
        check_int(1 if batch_size is None else batch_size, arg="batch_size", least=1)
        check_int(1 if steps_per_epoch is None else steps_per_epoch, arg="steps_per_epoch", least=1)
        check_bool(standardize, arg="standardize")
        check_predict_index(predict_index)
        dataset = called(data)
        # After the checks, which leave builtins only: checkpoints hold nothing else. Loggers are left out since they
        # refuse a task with an argument of the same name (`shape`) and another value.
        self.save_hyperparameters(logger=False)
        self._dataset, self._seed, self._steps_per_epoch = dataset, seed, steps_per_epoch
        self._load = functools.partial(
            prepare,
            data,
            observed_fraction=observed_fraction,
            validation_fraction=validation_fraction,
            seed=seed,
            standardize=standardize,
            shape=shape,
            num_entries=num_entries,
            predict_index=predict_index,
            columns=columns,
            missing_values=known_missing,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's mode sizes, known after ``setup``."""
        return self._data.shape

    @property
    def mode_names(self) -> tuple[str, ...] | None:
        """The names of the modes, if the data has any; known after ``setup``."""
        return self._data.known.mode_names

    @property
    def labels(self) -> tuple[tuple[str | int, ...], ...] | None:
        """What each index of each mode stands for, if the data says so; known after ``setup``."""
        return self._data.known.labels

    @property
    def known(self) -> Entries:
        """All known entries; known after ``setup``."""
        return self._data.known

    def split_of(self, index: Tensor) -> Tensor:
        """Where cells lie: 0 in none of the splits since they are missing, 1 to 3 in ``train``, ``val``, ``held_out``.

        Args:
            index: Shape ``(n, order)``, int64.

        Returns:
            Shape ``(n,)``, int8.
        """
        return self._data.places.of(index)

    @property
    def num_known(self) -> int:
        """Number of the tensor's known entries, in all splits; known after ``setup``."""
        return len(self._data.known)

    @property
    def splits(self) -> dict[str, Entries]:
        """The entries of ``train``, ``val`` and ``held_out``, without those that are empty; known after ``setup``."""
        return self._data.splits

    @property
    def location(self) -> float:
        """What a task subtracts from values: the mean of ``train`` with ``standardize``, else 0."""
        return self._data.location

    @property
    def scale(self) -> float:
        """What a task divides values by: the population deviation of ``train``, or 1 without ``standardize``."""
        return self._data.scale

    @property
    def eval_split_names(self) -> tuple[str, ...]:
        """The names of the validation and test loaders, in order."""
        return tuple(name for name in SPLIT_NAMES if name in self.splits)

    @override
    def _prepare(self) -> PreparedData:
        data = self._load()
        if not is_public(self._dataset):
            rank_zero_info(summary(self._dataset, data.known, data.shape, data.splits))
        return data

    @override
    def _move(self, batch: CompletionBatch, device: torch.device, dataloader_idx: int) -> CompletionBatch:
        return CompletionBatch(*(upload(part, device) for part in batch))

    @override
    def _make_train_loader(self, **process: Any) -> EntryLoader:
        entries = self.splits["train"]
        return self._entry_loader(device=self._storage_device(entries.index, entries.value), **process)

    def _entry_loader(self, **where: Any) -> EntryLoader:
        return EntryLoader(
            self.splits["train"],
            batch_size=self.batch_size,
            steps_per_epoch=self._steps_per_epoch,
            seed=self._seed,
            **where,
        )

    def one_process_loader(self, device: torch.device) -> EntryLoader:
        """A stream of training batches of its own, as one process sees them, on a device."""
        return self._entry_loader(device=device)

    def loader_of(self, split: str) -> SequentialLoader:
        """All entries of a split."""
        return self._sequential(self.splits[split])

    @override
    def val_dataloader(self) -> list[SequentialLoader]:
        """One loader per name of :attr:`eval_split_names`."""
        return [self.loader_of(name) for name in self.eval_split_names]

    @override
    def test_dataloader(self) -> list[SequentialLoader]:
        """One loader per name of :attr:`eval_split_names`."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> SequentialLoader | UnseenLoader:
        """The indices to predict, with the values that are known and NaN for the others.

        Raises:
            ValueError: If there are too many cells to predict all of them.
        """
        data = self._data
        if data.predict_index is not None:
            return self._sequential(Entries(data.predict_index, look_up(data.known, data.predict_index)))
        train = data.splits["train"]
        cells = math.prod(data.shape) - len(train)
        if cells > MAX_PREDICTED_CELLS:
            held_out = ", or 'held_out'" if "held_out" in data.splits else ""
            raise ValueError(
                f"expected a choice of cells in `predict_index` for a tensor with {cells} that are not trained on, got "
                f"None, which means all, up to {MAX_PREDICTED_CELLS}; give the path of a .csv or .npz file of "
                f"indices{held_out}"
            )
        return UnseenLoader(data.shape, train, data.known, batch_size=self._evaluation_size)

    def _sequential(self, entries: Entries) -> SequentialLoader:
        return SequentialLoader(entries, batch_size=self._evaluation_size)

    @property
    def _evaluation_size(self) -> int:
        return max(self.batch_size or 0, EVALUATION_BATCH_SIZE)
