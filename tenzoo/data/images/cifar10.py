"""CIFAR-10, from the official binary files."""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from typing_extensions import override

from tenzoo.data.checks import check_bool
from tenzoo.data.images.batches import Images
from tenzoo.data.images.cifar10_files import fetch, read
from tenzoo.data.images.datamodule import ImageDataModule
from tenzoo.data.images.label_noise import LabelNoise

Normalization = Literal["cifar10", "imagenet"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The names of the classes, in the order of their labels."""

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of red, green and blue, in [0, 1]."""


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images, 32 × 32, of 10 classes.

    See :class:`~tenzoo.data.ImageDataModule` for batches, splits, label noise and checkpoints. The images take 184 MB
    of memory.

    The files are ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin`` of the official
    ``cifar-10-binary.tar.gz``, checked by SHA-1; there is no pickle in them. Source:
    https://www.cs.toronto.edu/~kriz/cifar.html; its authors state no license and ask to cite «Learning Multiple Layers
    of Features from Tiny Images».

    Args:
        root: Folder of the files, of a folder ``cifar-10-batches-bin`` with them, or of the archive.
        batch_size: Images per optimizer step, over all processes together.
        validation_size: Images of the training set that are held out for validation; 0 means no validation.
        seed: Chooses the split, the noise, and the order and augmentation of batches. Independent of global generators.
        augment: Whether training images are cropped and mirrored.
        normalization: Mean and deviation: those of CIFAR-10's own training set, or those of ImageNet, which some
            published weights for CIFAR-10 expect.
        noise: A :class:`LabelNoise`, or the rate of a :class:`SymmetricNoise`; ``None`` leaves the labels as they are.
        noisy_validation: Whether ``val`` has noisy labels too.
        download: Whether ``prepare_data`` may download the archive, 170 MB, if the files are not there.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or unknown; from ``setup``, if a file is not the official one, the
            validation set leaves nothing to train on, or the noise does not fit the labels.
        FileNotFoundError: From ``prepare_data`` and ``setup``, if there is no such file.

    Example:
        >>> data = CIFAR10DataModule("data/cifar10", noise=0.4)
        >>> data.num_classes, data.image_size, data.hparams.noise["init_args"]
        (10, 32, {'rate': 0.4})
    """

    dataset = "cifar10"
    num_classes = len(CLASSES)
    num_channels = 3
    image_size = 32

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
        super().__init__(
            root,
            batch_size=batch_size,
            validation_size=validation_size,
            seed=seed,
            augment=augment,
            noise=noise,
            noisy_validation=noisy_validation,
        )
        if normalization not in get_args(Normalization):
            raise ValueError(
                f"expected one of {', '.join(get_args(Normalization))} in `normalization`, got {normalization!r}"
            )
        self._normalization = normalization
        self.mean, self.std = NORMALIZATIONS[normalization]
        self._download = check_bool(download, arg="download")

    @override
    def prepare_data(self) -> None:
        """Downloads and unpacks what is missing.

        Raises:
            FileNotFoundError: If something is missing and cannot be downloaded.
            ValueError: If the archive in ``root`` is not the official one.
        """
        fetch(self._root, download=self._download)

    @override
    def read_images(self) -> tuple[Images, Images]:
        return read(self._root)

    @override
    def _fingerprint(self, splits: Mapping[str, Images]) -> dict[str, Any]:
        return {**super()._fingerprint(splits), "normalization": self._normalization}

    @override
    def _checksum(self, images: Images) -> str:
        # Of the labels alone: the images have passed their SHA-1, and the split follows from the seed.
        return hashlib.blake2b(images.label.numpy().tobytes(), digest_size=16).hexdigest()
