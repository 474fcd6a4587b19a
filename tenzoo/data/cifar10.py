"""CIFAR-10, from the official binary files to augmented batches, with or without label noise."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from tenzoo.data.checks import check_bool, check_int
from tenzoo.data.cifar10_files import fetch, read
from tenzoo.data.images import (
    EVALUATION_IMAGES,
    ImageBatch,
    ImageLoader,
    Images,
    SequentialImageLoader,
    augment_and_normalize,
)
from tenzoo.data.label_noise import LabelNoise, check_noise, noise_settings
from tenzoo.data.resumable import ResumableDataModule

Normalization = Literal["cifar10", "imagenet"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The names of the classes, in the order of their labels."""

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of red, green and blue, in [0, 1]."""

_SPLIT_STREAM = 0xC1FA5
_NOISE_STREAM = 0xC1FA7  # apart from the split's, so that neither depends on the other


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """All that is known once the data is loaded.

    Args:
        splits: ``train``, ``val`` (unless it is empty) and ``test``, with the labels that are used.
        clean_train_labels: The correct labels of ``train``, shape ``(n,)``, int64.
        fingerprint: Builtins that tell this data, split and noise from any other.
    """

    splits: dict[str, Images]
    clean_train_labels: Tensor
    fingerprint: dict[str, Any]

    @property
    def noise_rate(self) -> float:
        """The fraction of the labels of ``train`` that is wrong."""
        return (self.splits["train"].label != self.clean_train_labels).double().mean().item()


class CIFAR10DataModule(ResumableDataModule[PreparedImages, ImageLoader]):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images, 32 × 32, of 10 classes.

    The images stay bytes in memory, 184 MB; those for training on the GPU, if there is one. A batch is augmented and
    normalized as a whole, on the device (see :func:`~tenzoo.data.images.augment_and_normalize`); steps get
    ``(images, labels)``, float32 ``(B, 3, 32, 32)`` laid out in ``channels_last``, and int64 ``(B,)``. In training each
    image is padded by 4 zeros, cropped at random to its size and mirrored with probability 1/2; elsewhere it is only
    normalized.

    Training draws from ``train`` (see :class:`~tenzoo.data.images.ImageLoader`) and resumes exactly, in mid-epoch too.
    Validation goes through ``val``, test and prediction through ``test``; under several processes each of them sees
    all images. A checkpoint can only be loaded with the split and the noise it was made with.

    Label noise is drawn for the whole training set before it is split, so an image keeps its noisy label when
    ``validation_size`` changes. ``test`` is always clean, ``val`` unless ``noisy_validation``. ``setup`` reports the
    actual rate in one line; :attr:`noise_rate` has it too.

    The files are ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin`` of the official
    ``cifar-10-binary.tar.gz``, checked by SHA-1; there is no pickle in them. Source:
    https://www.cs.toronto.edu/~kriz/cifar.html; its authors state no license and ask to cite «Learning Multiple Layers
    of Features from Tiny Images».

    Args:
        root: Folder of the files, of a folder ``cifar-10-batches-bin`` with them, or of the archive.
        batch_size: Images per optimizer step, over all processes together.
        validation_size: Images of the training set that validate instead of being trained on; 0 means that there is no
            validation.
        seed: Chooses the split, the noise, and the order and augmentation of batches. Independent of global generators.
        augment: Whether training images are cropped and mirrored.
        normalization: Mean and deviation: those of CIFAR-10's own training set, or those of ImageNet, which some
            published weights for CIFAR-10 expect.
        noise: A :class:`LabelNoise`, or the rate of a :class:`SymmetricNoise`; ``None`` leaves the labels as they are.
        noisy_validation: Whether ``val`` has noisy labels too, as where no clean labels are to be had.
        download: Whether ``prepare_data`` may download the archive, 170 MB, if the files are not there.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or unknown; from ``setup``, if a file is not the official one, the
            validation set leaves nothing to train on, or the noise is not for these labels.
        FileNotFoundError: From ``prepare_data`` and ``setup``, if there is no such file.

    Example:
        >>> data = CIFAR10DataModule("data/cifar10", noise=0.4)
        >>> data.num_classes, data.image_shape, data.hparams.noise["init_args"]
        (10, (3, 32, 32), {'rate': 0.4})
    """

    _mismatch = "its numbers would not compare"

    def __init__(
        self,
        root: str = "data/cifar10",
        *,
        batch_size: int = 128,
        validation_size: int = 5000,
        seed: int = 0,
        augment: bool = True,
        normalization: Normalization = "cifar10",
        noise: LabelNoise | float | None = None,
        noisy_validation: bool = False,
        download: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(root, str):
            raise TypeError(f"expected a path as str in `root`, got {root!r}; give a string")
        check_int(batch_size, arg="batch_size", least=1)
        check_int(validation_size, arg="validation_size", least=0)
        check_int(seed, arg="seed", least=0)
        if normalization not in get_args(Normalization):
            raise ValueError(
                f"expected one of {', '.join(get_args(Normalization))} in `normalization`, got {normalization!r}; "
                "choose one of them"
            )
        for name, value in {
            "augment": augment,
            "noisy_validation": noisy_validation,
            "download": download,
        }.items():
            check_bool(value, arg=name)
        self._noise = check_noise(noise)
        noise = noise_settings(self._noise)
        # After the checks, which leave builtins only: checkpoints hold nothing else. Loggers are left out since they
        # refuse a task with an argument of the same name and another value.
        self.save_hyperparameters(logger=False)
        self._root, self._download = Path(root).expanduser(), download
        self._validation_size, self._seed = validation_size, seed
        self._augment, self._normalization, self._noisy_validation = augment, normalization, noisy_validation
        self._moments: tuple[Tensor, Tensor] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(CLASSES)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return 3, 32, 32

    @property
    def splits(self) -> dict[str, Images]:
        """``train``, ``val`` (unless it is empty) and ``test``, with the labels in use; known after ``setup``."""
        return self._data.splits

    @property
    def eval_split_names(self) -> tuple[str, ...]:
        """The names of the validation loaders, in order: ``("val",)``, or none. The test loader is ``test``."""
        return ("val",) if "val" in self.splits else ()

    @property
    def clean_train_labels(self) -> Tensor:
        """The correct labels of ``train``, in its order, shape ``(n,)``, int64; known after ``setup``."""
        return self._data.clean_train_labels

    @property
    def noise_rate(self) -> float:
        """The actual fraction of the labels of ``train`` that is wrong; known after ``setup``."""
        return self._data.noise_rate

    @override
    def prepare_data(self) -> None:
        """Downloads and unpacks what is missing.

        Raises:
            FileNotFoundError: If something is missing and cannot be downloaded.
            ValueError: If the archive in ``root`` is not the official one.
        """
        fetch(self._root, download=self._download)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Loads, checks and splits the data and draws the noise, once; begins a new stream of training batches."""
        if self._validation_size == 0 and self.trainer is not None:
            self.trainer.limit_val_batches = 0  # Lightning warns of an empty list of loaders, even if it is asked for
        first = self._prepared is None
        super().setup(stage)
        if first and self._noise is not None:
            rank_zero_info(
                f"label noise {self._noise!r}: {self.noise_rate:.2%} of {len(self.clean_train_labels)} training "
                f"labels are wrong; {'test labels are' if self._noisy_validation else 'all other labels are'} clean"
            )

    @override
    def _move(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device) if isinstance(batch, ImageBatch) else super()._move(batch, device, dataloader_idx)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments and normalizes a batch, in the precision of the trainer."""
        if not isinstance(batch, ImageBatch):
            return batch
        if self._moments is None or self._moments[0].device != batch.image.device:
            mean, std = NORMALIZATIONS[self._normalization]
            device = batch.image.device
            self._moments = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        images, labels = augment_and_normalize(batch, *self._moments)
        # Lightning has converted the batch to its precision before this hook, while the images were bytes.
        return images if self.trainer is None else self.trainer.precision_plugin.convert_input(images), labels

    @override
    def _make_train_loader(self, **process: Any) -> ImageLoader:
        images = self.splits["train"]
        return ImageLoader(
            images,
            batch_size=self.batch_size or len(self.splits["train"]),
            seed=self._seed,
            augment=self._augment,
            device=self._home_of(images.image, images.label),
            **process,
        )

    @override
    def val_dataloader(self) -> list[SequentialImageLoader]:
        """One loader per name of :attr:`eval_split_names`."""
        return [self._sequential(self.splits[name]) for name in self.eval_split_names]

    @override
    def test_dataloader(self) -> SequentialImageLoader:
        """The test set, with clean labels."""
        return self._sequential(self.splits["test"])

    @override
    def predict_dataloader(self) -> SequentialImageLoader:
        """The test set, with clean labels."""
        return self.test_dataloader()

    def _sequential(self, images: Images) -> SequentialImageLoader:
        return SequentialImageLoader(images, batch_size=max(self.batch_size or 0, EVALUATION_IMAGES))

    @override
    def _prepare(self) -> PreparedImages:
        whole, test = read(self._root)
        labels = whole.label
        if self._noise is not None:
            generator = np.random.default_rng([self._seed, _NOISE_STREAM])
            labels = self._noise.noisy(whole.label, num_classes=self.num_classes, generator=generator)
        size = self._validation_size
        if size >= len(whole):
            raise ValueError(
                f"expected less than the {len(whole)} training images in `validation_size`, got {size}; leave some to "
                "train on"
            )
        order = torch.from_numpy(np.random.default_rng([self._seed, _SPLIT_STREAM]).permutation(len(whole)))
        val, train = order[:size].sort().values, order[size:].sort().values
        splits = {"train": Images(whole.image, labels).take(train)}
        if size > 0:
            splits["val"] = Images(whole.image, labels if self._noisy_validation else whole.label).take(val)
        splits["test"] = test
        fingerprint = {
            "dataset": "cifar10",
            "seed": self._seed,
            "validation_size": size,
            "noise": None if self._noise is None else repr(self._noise),
            "noisy_validation": self._noisy_validation,
            "normalization": self._normalization,
            "checksum": {name: _checksum(split) for name, split in splits.items()},
        }
        return PreparedImages(splits, whole.label[train], fingerprint)


def _checksum(images: Images) -> str:
    """Of the labels alone: the images have passed their SHA-1, and which of them there are follows from the seed."""
    return hashlib.blake2b(images.label.numpy().tobytes(), digest_size=16).hexdigest()
