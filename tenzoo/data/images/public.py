"""Public sets of images that torchvision reads and checks."""

from typing import Any, ClassVar

import torch
from typing_extensions import override

from tenzoo.data.checks import check_bool
from tenzoo.data.images.batches import Images
from tenzoo.data.images.datamodule import ImageDataModule
from tenzoo.data.images.label_noise import LabelNoise


class _TorchvisionDataModule(ImageDataModule):
    """A set of ``torchvision.datasets`` with ``data`` and ``targets``.

    See :class:`~tenzoo.data.ImageDataModule` for batches, splits, label noise and checkpoints.

    Args:
        root: Folder in which torchvision keeps it.
        batch_size: Images per optimizer step, over all processes together.
        validation_size: Images of the training set that are held out for validation; 0 means no validation.
        seed: Chooses the split, the noise, and the order and augmentation of batches. Independent of global generators.
        augment: Whether training images are cropped and mirrored.
        noise: A :class:`LabelNoise`, or the rate of a :class:`SymmetricNoise`; ``None`` leaves the labels as they are.
        noisy_validation: Whether ``val`` has noisy labels too.
        download: Whether ``prepare_data`` may download it, if it is not there.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
        FileNotFoundError: From ``prepare_data`` and ``setup``, if the files are not there and are not downloaded.
    """

    _class: ClassVar[str]
    """Name of the class of torchvision."""

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 128,
        validation_size: int = 5000,
        seed: int = 0,
        augment: bool = True,
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
        self._download = check_bool(download, arg="download")

    @override
    def prepare_data(self) -> None:
        """Downloads what is missing.

        Raises:
            FileNotFoundError: If something is missing and cannot be downloaded.
        """
        self._open(train=True, download=self._download)

    @override
    def read_images(self) -> tuple[Images, Images]:
        whole, test = (self._images(self._open(train=train, download=False)) for train in (True, False))
        return whole, test

    def _open(self, *, train: bool, download: bool) -> Any:
        from torchvision import datasets  # a slow import, about 1 s

        try:
            return getattr(datasets, self._class)(self._root, train=train, download=download)
        except (OSError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise FileNotFoundError(
                f"expected {self._class} in `root`, got {str(self._root)!r} without it: {said}"
            ) from error

    def _images(self, read: Any) -> Images:
        pixels = torch.as_tensor(read.data)
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return Images(images.contiguous(), torch.as_tensor(read.targets).long())


class MNISTDataModule(_TorchvisionDataModule):
    """MNIST (LeCun et al., 1998): 60,000 training and 10,000 test images of digits, 28 × 28, one channel."""

    __doc__ += _TorchvisionDataModule.__doc__.partition("\n")[2]  # type: ignore[union-attr]
    dataset, _class = "mnist", "MNIST"
    num_classes, num_channels, image_size = 10, 1, 28
    mean, std = (0.1307,), (0.3081,)

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 128,
        validation_size: int = 5000,
        seed: int = 0,
        augment: bool = False,
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
            download=download,
        )


class CIFAR100DataModule(_TorchvisionDataModule):
    """CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images, 32 × 32, of 100 classes."""

    __doc__ += _TorchvisionDataModule.__doc__.partition("\n")[2]  # type: ignore[union-attr]
    dataset, _class = "cifar100", "CIFAR100"
    num_classes, num_channels, image_size = 100, 3, 32
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
