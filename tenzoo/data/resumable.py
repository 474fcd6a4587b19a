"""The base of all data modules: data that is prepared once, and training batches that a checkpoint resumes."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from tenzoo.data.checks import check_int
from tenzoo.data.loader import Share, ShuffledLoader
from tenzoo.data.transfer import storage_device


class Prepared(Protocol):
    """All that is known once the data is loaded."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Builtins that tell this data from any other."""


P = TypeVar("P", bound=Prepared)
L = TypeVar("L", bound=ShuffledLoader[Any])


class ResumableDataModule(pl.LightningDataModule, Generic[P, L]):
    """Prepares its data once, and resumes the training batches of a checkpoint, in mid-epoch too.

    Abstract: a subclass prepares the data and makes the loader of training batches. A checkpoint can only be loaded
    with its own data.
    """

    _mismatch_reason: ClassVar[str]
    """Why a checkpoint of other data is refused, for the error."""

    def __init__(self) -> None:
        super().__init__()
        self._prepared: P | None = None
        self._train_loader: L | None = None
        self.batch_weight = 1.0
        """The factor of a mean over the current batch: with it all items of a batch that several processes share count
        alike (see :class:`~tenzoo.data.loader.Share`)."""
        self.batch_items: float | None = None
        """Average number of items per process of a batch that several processes share; None for any other batch."""

    @property
    def batch_size(self) -> int | None:
        """Items per optimizer step, over all processes together; None means all. Setting it begins a new stream."""
        size: int | None = self.hparams["batch_size"]
        return size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.hparams["batch_size"] = check_int(size, arg="batch_size", least=1)
        self._train_loader = None

    @abstractmethod
    def _prepare(self) -> P:
        """Load, check and split the data."""

    @abstractmethod
    def _make_train_loader(self, **process: Any) -> L:
        """The loader of training batches, with the arguments ``rank``, ``world_size`` and ``in_flight``."""

    @override
    def setup(self, stage: str | None = None) -> None:
        """Loads, checks and splits the data, once; begins a new stream of training batches."""
        self._train_loader = None
        if self._prepared is None:
            self._prepared = self._prepare()

    @override
    def train_dataloader(self) -> L:
        """The loader of training batches: the same object until the next ``setup``, so reloading continues it."""
        if self._train_loader is None:
            self._train_loader = self._make_train_loader(
                rank=0 if self.trainer is None else self.trainer.global_rank,
                world_size=1 if self.trainer is None else self.trainer.world_size,
                in_flight=self._in_flight,
            )
            repeated: int | float = getattr(self.trainer, "overfit_batches", 0)
            if repeated:
                share = isinstance(repeated, float)
                self._train_loader.num_repeated = int(repeated * len(self._train_loader)) if share else int(repeated)
        return self._train_loader

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch without Lightning's search through nested collections, and notes its weight."""
        self.batch_weight, self.batch_items = 1.0, None
        if isinstance(batch, Share):
            batch, self.batch_weight, self.batch_items = batch
        return self._move(batch, device, dataloader_idx)

    def _move(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The fingerprint of the data, and the place in the stream of training batches; empty before ``setup``."""
        if self._prepared is None:
            return {}  # as in a checkpoint that is written because setup failed
        stream = {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}
        return {**self._prepared.fingerprint, **stream}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses the state of other data, and moves to the place in the stream of training batches.

        Lightning restores the loader too, but not from a checkpoint written at the end of an epoch.

        Raises:
            ValueError: If the state belongs to other data, or to another split.
        """
        if self._prepared is None:
            self.setup()  # load_from_checkpoint comes here with a new object
        for field, value in self._data.fingerprint.items():
            if state_dict.get(field) != value:
                raise ValueError(
                    f"expected the `{field}` of the checkpoint, {_difference(state_dict.get(field), value)}: "
                    f"{self._mismatch_reason}; set the data up as in the checkpoint, or load the model's weights alone"
                )
        if "train_loader" in state_dict:
            self.train_dataloader().load_state_dict(state_dict["train_loader"])
        elif self._train_loader is not None:  # saved before the first batch, as Lightning's tuner does
            self._train_loader.load_state_dict({"permutation": 0, "batch": 0})

    @property
    def _data(self) -> P:
        if self._prepared is None:
            raise RuntimeError("expected data that is set up, got none yet; call setup() first")
        return self._prepared

    def _storage_device(self, *data: Tensor) -> torch.device:
        """The device that stores the training data."""
        return torch.device("cpu") if self.trainer is None else storage_device(data, self.trainer.strategy.root_device)

    def _in_flight(self) -> int:
        # 1 in a checkpoint that is written because a training step raised: that batch must come again.
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.ready - progress.processed)


def _difference(saved: Any, value: Any) -> str:
    """Two values of a field; of checksums of splits, the names of those that differ."""
    if not isinstance(saved, dict) or not isinstance(value, dict):
        return f"{saved!r}, got {value!r}"
    splits = [name for name in sorted({*saved, *value}) if saved.get(name) != value.get(name)]
    return f"got another one of {' and '.join(map(repr, splits))}"


class PreparedSplits(Prepared, Protocol):
    """Data with splits by name, of which ``val`` may be missing."""

    @property
    def splits(self) -> Mapping[str, Any]:
        """The splits that there are."""


S = TypeVar("S", bound=PreparedSplits)


class ValidatedDataModule(ResumableDataModule[S, L], Generic[S, L]):
    """Validates with the split ``val``, if there is one, and reports once what was read.

    Abstract, as its base class.
    """

    @property
    def eval_split_names(self) -> tuple[str, ...]:
        """The names of the validation loaders, in order: ``("val",)``, or none. The test loader is ``test``."""
        return ("val",) if "val" in self._data.splits else ()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Loads, checks and splits the data, once; begins a new stream of training batches."""
        first = self._prepared is None
        super().setup(stage)
        if not self.eval_split_names and self.trainer is not None:
            self.trainer.limit_val_batches = 0  # Lightning warns of an empty list of loaders
        if first:
            self._report()

    @abstractmethod
    def _report(self) -> None:
        """Say what was read, in one line or none."""
