"""What all sets of labelled images share: the split, label noise, batches, and their augmentation."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from tenzoo.data.checks import check_bool, check_int
from tenzoo.data.images.batches import (
    EVALUATION_IMAGES,
    ImageBatch,
    ImageLoader,
    Images,
    SequentialImageLoader,
    augment_and_normalize,
    check_images,
)
from tenzoo.data.images.label_noise import LabelNoise, check_noise, noise_settings
from tenzoo.data.resumable import ValidatedDataModule

_SPLIT_STREAM = 0xC1FA5
_NOISE_STREAM = 0xC1FA7  # differs from the split's, so that neither depends on the other


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


class ImageDataModule(ValidatedDataModule[PreparedImages, ImageLoader]):
    """Labelled images: split by seed, with or without label noise, augmented and normalized in whole batches.

    A subclass is one data set. It sets the class attributes, reads its files in :meth:`read_images`, and fetches them
    in ``prepare_data`` if they can be downloaded.

    The images stay bytes in memory; those for training on the GPU, if there is one. A batch is augmented and
    normalized as a whole, on the device (see :func:`~tenzoo.data.images.augment_and_normalize`). Steps get
    ``(images, labels)``, float32 ``(B, num_channels, image_size, image_size)`` in ``channels_last`` layout, and int64
    ``(B,)``. In training each image is padded by 4 zeros, cropped at random to its size and mirrored with probability
    1/2; elsewhere it is only normalized.

    Training draws from ``train`` (see :class:`~tenzoo.data.ImageLoader`) and resumes exactly, in mid-epoch too.
    Validation goes through ``val``, test and prediction through ``test``; with several processes each of them sees
    all images. A checkpoint can only be loaded with its own split and noise.

    Label noise is drawn for the whole training set before the split, so an image keeps its noisy label when
    ``validation_size`` changes. ``test`` is always clean, ``val`` unless ``noisy_validation``. ``setup`` reports the
    actual rate in one line, and :attr:`noise_rate` has it.

    Args:
        root: Folder of the files.
        batch_size: Images per optimizer step, over all processes together.
        validation_size: Images of the training set that are held out for validation; 0 means no validation.
        seed: Chooses the split, the noise, and the order and augmentation of batches. Independent of global generators.
        augment: Whether training images are cropped and mirrored.
        noise: A :class:`LabelNoise`, or the rate of a :class:`SymmetricNoise`; ``None`` leaves the labels as they are.
        noisy_validation: Whether ``val`` has noisy labels too.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; from ``setup``, if the images do not have the promised shape, the
            validation set leaves nothing to train on, or the noise does not fit the labels.
    """

    _mismatch_reason = "its numbers would not compare"

    dataset: ClassVar[str]
    """Name of the data set, in checkpoints."""
    num_classes: ClassVar[int]
    """Number of classes. Labels count from 0."""
    num_channels: ClassVar[int]
    """Number of channels of an image."""
    image_size: ClassVar[int]
    """Height and width of an image, in pixels."""
    mean: tuple[float, ...]
    """Mean of each channel, of values in [0, 1]; those of the training images, where a class has none."""
    std: tuple[float, ...]
    """Standard deviation of each channel, of values in [0, 1]; likewise."""

    def __init__(
        self,
        root: str,
        *,
        batch_size: int = 128,
        validation_size: int = 0,
        seed: int = 0,
        augment: bool = True,
        noise: LabelNoise | float | None = None,
        noisy_validation: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(root, str):
            raise TypeError(f"expected a path as str in `root`, got {root!r}")
        check_int(batch_size, arg="batch_size", least=1)
        self._validation_size = check_int(validation_size, arg="validation_size", least=0)
        self._seed = check_int(seed, arg="seed", least=0)
        self._augment = check_bool(augment, arg="augment")
        self._noisy_validation = check_bool(noisy_validation, arg="noisy_validation")
        self._noise = check_noise(noise)
        self._root = Path(root).expanduser()
        # Loggers are left out since they refuse a task with an argument of the same name and another value.
        self.save_hyperparameters(logger=False)
        if self.hparams.get("noise") is not None:
            self.hparams["noise"] = noise_settings(self._noise)  # checkpoints hold builtins only
        self._moments: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def read_images(self) -> tuple[Images, Images]:
        """The training and the test set, from the files in ``root``.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is not valid.
        """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.num_channels, self.image_size, self.image_size

    @property
    def splits(self) -> dict[str, Images]:
        """``train``, ``val`` (unless it is empty) and ``test``, with the labels in use; known after ``setup``."""
        return self._data.splits

    @property
    def clean_train_labels(self) -> Tensor:
        """The correct labels of ``train``, in its order, shape ``(n,)``, int64; known after ``setup``."""
        return self._data.clean_train_labels

    @property
    def noise_rate(self) -> float:
        """The actual fraction of the labels of ``train`` that is wrong; known after ``setup``."""
        return self._data.noise_rate

    @override
    def _report(self) -> None:
        if self._noise is not None:
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
            device = batch.image.device
            self._moments = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
        images, labels = augment_and_normalize(batch, *self._moments)
        # Lightning converts the batch to its precision before this hook, while the images are bytes.
        return images if self.trainer is None else self.trainer.precision_plugin.convert_input(images), labels

    @override
    def _make_train_loader(self, **process: Any) -> ImageLoader:
        images = self.splits["train"]
        return ImageLoader(
            images,
            batch_size=self.batch_size or len(images),
            seed=self._seed,
            augment=self._augment,
            device=self._storage_device(images.image, images.label),
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
        whole, test = self.read_images()
        shape = (self.num_channels, self.image_size, self.image_size)
        for images in (whole, test):
            check_images(images, shape, self.num_classes, source=f"{type(self).__name__}.read_images()")
        labels = whole.label
        if self._noise is not None:
            generator = np.random.default_rng([self._seed, _NOISE_STREAM])
            labels = self._noise.noisy(whole.label, num_classes=self.num_classes, generator=generator)
        size = self._validation_size
        if size >= len(whole):
            raise ValueError(f"expected less than the {len(whole)} training images in `validation_size`, got {size}")
        order = torch.from_numpy(np.random.default_rng([self._seed, _SPLIT_STREAM]).permutation(len(whole)))
        val, train = order[:size].sort().values, order[size:].sort().values
        splits = {"train": Images(whole.image, labels).take(train)}
        if size > 0:
            splits["val"] = Images(whole.image, labels if self._noisy_validation else whole.label).take(val)
        splits["test"] = test
        if not hasattr(self, "mean"):
            self.mean, self.std = _moments(splits["train"].image)
        return PreparedImages(splits, whole.label[train], self._fingerprint(splits))

    def _fingerprint(self, splits: Mapping[str, Images]) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "seed": self._seed,
            "validation_size": self._validation_size,
            "noise": None if self._noise is None else repr(self._noise),
            "noisy_validation": self._noisy_validation,
            "checksum": {name: self._checksum(images) for name, images in splits.items()},
        }

    def _checksum(self, images: Images) -> str:
        digest = hashlib.blake2b(images.label.numpy().tobytes(), digest_size=16)
        digest.update(images.image.numpy().tobytes())
        return digest.hexdigest()


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, from how often each byte occurs; the least deviation is one step."""
    level = torch.arange(256, dtype=torch.float64) / 255
    channels = images.transpose(0, 1)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ level
    variance = (share * (level - mean[:, None]).square()).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1 / 255).tolist())
