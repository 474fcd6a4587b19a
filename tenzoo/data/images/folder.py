"""Images of one's own: a folder for each class."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from tenzoo.data.checks import check_bool, check_fraction, check_int, check_path
from tenzoo.data.images.batches import Images, SequentialImageLoader
from tenzoo.data.images.datamodule import ImageDataModule
from tenzoo.data.images.label_noise import LabelNoise
from tenzoo.memory import free_memory, in_gigabytes

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Files that are images, in small or capital letters."""

_TEST_STREAM = 0xC1FA9


class ImageFolderDataModule(ImageDataModule):
    """Images in folders: ``root/CLASS/…``, or ``root/train/CLASS/…`` and ``root/test/CLASS/…``.

    See :class:`~tenzoo.data.ImageDataModule` for batches, splits, label noise and checkpoints. Classes are the names of
    the folders, in the order of the alphabet, and files are taken from any depth in them. An image is scaled so that
    its shorter side has ``image_size`` pixels, and its middle is cut out. All images are kept in memory, as bytes.
    Mean and deviation of each channel are those of the training images.

    Args:
        root: The folder.
        image_size: Height and width of an image, in pixels.
        grayscale: Whether an image has one channel, and not three.
        batch_size: Images per optimizer step, over all processes together.
        validation_fraction: The part of the training images that is held out for validation; 0 means no validation.
        test_fraction: The part of all images that is held out for the test where there is no folder ``test``.
        seed: Chooses the splits, the noise, and the order and augmentation of batches.
        augment: Whether training images are cropped and mirrored.
        noise: A :class:`LabelNoise`, or the rate of a :class:`SymmetricNoise`; ``None`` leaves the labels as they are.
        noisy_validation: Whether ``val`` has noisy labels too.
        predict: A folder of images to predict, without classes, in the order of their paths; ``None`` predicts the test
            images.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; from ``setup``, if there are not two classes, a class is empty, a
            file cannot be read, a split is too small, or the images do not fit into memory.
        FileNotFoundError: From ``setup``, if there is no such folder.
    """

    dataset = "image_folder"

    def __init__(
        self,
        root: str,
        *,
        image_size: int = 32,
        grayscale: bool = False,
        batch_size: int = 128,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        augment: bool = True,
        noise: LabelNoise | float | None = None,
        noisy_validation: bool = False,
        predict: str | None = None,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            seed=seed,
            augment=augment,
            noise=noise,
            noisy_validation=noisy_validation,
        )
        self.image_size = check_int(image_size, arg="image_size", least=1)  # type: ignore[misc]  # of this object
        self.num_channels = 1 if check_bool(grayscale, arg="grayscale") else 3  # type: ignore[misc]
        self._validation_fraction = check_fraction(validation_fraction, arg="validation_fraction", below_one=True)
        self._test_fraction = check_fraction(test_fraction, arg="test_fraction", positive=True, below_one=True)
        self._predict = check_path(predict, arg="predict", what="a folder", optional=True)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If there are not two classes.
        """
        if not self._root.is_dir():
            raise FileNotFoundError(f"expected a folder of images in `root`, got {str(self._root)!r}")
        folders = [path.name for path in self._training.iterdir() if path.is_dir()]
        names = sorted(name for name in folders if not name.startswith("."))
        if len(names) < 2:
            raise ValueError(f"expected folders of two or more classes in {str(self._training)!r}, got {names}")
        return tuple(names)

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # of this object
        """Number of classes; reads the names of folders."""
        return len(self.class_names)

    @property
    def _training(self) -> Path:
        train = self._root / "train"
        return train if train.is_dir() else self._root

    @override
    def read_images(self) -> tuple[Images, Images]:
        whole = self._read(self._training)
        test = self._root / "test"
        if self._training != self._root and test.is_dir():
            other = sorted({path.name for path in test.iterdir() if path.is_dir()} - set(self.class_names))
            if other:
                raise ValueError(f"expected the classes of {str(self._training)!r} in {str(test)!r}, got {other[0]!r}")
            splits = whole, self._read(test)
        else:
            order = torch.from_numpy(np.random.default_rng([self._seed, _TEST_STREAM]).permutation(len(whole)))
            size = max(1, round(self._test_fraction * len(whole)))
            splits = whole.take(order[size:].sort().values), whole.take(order[:size].sort().values)
        self._validation_size = round(self._validation_fraction * len(splits[0]))
        return splits

    def _read(self, folder: Path) -> Images:
        files = [images_in(folder / name) for name in self.class_names]
        if folder == self._training and [] in files:
            name = self.class_names[files.index([])]
            raise ValueError(f"expected images of every class, such as {', '.join(ENDINGS[:3])}, got none of {name!r}")
        if not any(files):
            raise ValueError(f"expected images in {str(folder)!r}, such as {', '.join(ENDINGS[:3])}, got none")
        images = read_files(list(chain.from_iterable(files)), self.num_channels, self.image_size)
        return Images(images, torch.arange(len(files)).repeat_interleave(torch.tensor(list(map(len, files)))))

    @override
    def _fingerprint(self, splits: Mapping[str, Images]) -> dict[str, Any]:
        return {**super()._fingerprint(splits), "class_names": list(self.class_names)}

    @override
    def predict_dataloader(self) -> SequentialImageLoader:
        """The images of ``predict``, or the test set."""
        if self._predict is None:
            return self.test_dataloader()
        files = images_in(Path(self._predict))
        if not files:
            raise ValueError(f"expected images in the folder in `predict`, got none in {self._predict!r}")
        images = read_files(files, self.num_channels, self.image_size)
        return self._sequential(Images(images, torch.zeros(len(images), dtype=torch.int64)))

    @property
    def predicted_names(self) -> list[str]:
        """The paths of the images of ``predict`` below it, in the order of their predictions; empty without it."""
        if self._predict is None:
            return []
        return [path.relative_to(self._predict).as_posix() for path in images_in(Path(self._predict))]


def images_in(folder: Path) -> list[Path]:
    """The files of images in a folder, at any depth, in the order of their paths."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def read_files(paths: Sequence[Path], num_channels: int, size: int) -> Tensor:
    """Images of files, scaled and cut to a square.

    Args:
        paths: The files.
        num_channels: 1 or 3.
        size: Height and width.

    Returns:
        Shape ``(n, C, size, size)``, uint8.

    Raises:
        ValueError: If a file cannot be read, or all together do not fit into memory.
    """
    from PIL import Image, ImageOps

    needed, there = len(paths) * num_channels * size**2, free_memory()
    if there is not None and 3 * needed > there:  # the splits are copies
        raise ValueError(
            f"expected images that fit into memory, got {len(paths):,} of {size} × {size}, {in_gigabytes(3 * needed)} "
            f"where {in_gigabytes(there)} are free; give a smaller `image_size`"
        )
    images = torch.empty(len(paths), num_channels, size, size, dtype=torch.uint8)
    for number, path in enumerate(paths):
        try:
            with Image.open(path) as file:
                plain = file.convert("RGBA") if "transparency" in file.info else file
                upright = ImageOps.exif_transpose(plain).convert("L" if num_channels == 1 else "RGB")
                square = ImageOps.fit(upright, (size, size), method=Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            said = " ".join(str(error).split())[:120]
            raise ValueError(f"expected an image in {str(path)!r}, which cannot be read: {said}") from error
        pixels = torch.from_numpy(np.array(square))
        images[number] = pixels if num_channels == 1 else pixels.permute(2, 0, 1)
    rank_zero_info(f"images: {len(paths):,} read")
    return images
