"""Images of one's own in arrays."""

from functools import cached_property

import numpy as np
import torch
from typing_extensions import override

from tenzoo.data.arrays import Array, read_npz
from tenzoo.data.images.batches import Images
from tenzoo.data.images.datamodule import ImageDataModule

_NAMES = (("x_train", "y_train", "x_test", "y_test"), ("images", "labels", "test_images", "test_labels"))


class ImageArraysDataModule(ImageDataModule):
    """Images in one ``.npz`` file: ``x_train``, ``y_train``, ``x_test`` and ``y_test``, as Keras writes its data sets.

    See :class:`~tenzoo.data.ImageDataModule` for batches, splits, label noise and checkpoints. Images are bytes of
    shape ``(n, H, W)`` or ``(n, H, W, C)`` with H = W, and labels integers from 0 on; ``images``, ``labels``,
    ``test_images`` and ``test_labels`` are other names of them. Mean and deviation of each channel are those of the
    training set.

    Args:
        root: The file.
        batch_size: Images per optimizer step, over all processes together.
        validation_size: Images of the training set that are held out for validation; 0 means no validation.
        seed: Chooses the split, the noise, and the order and augmentation of batches. Independent of global generators.
        augment: Whether training images are cropped and mirrored.
        noise: A :class:`LabelNoise`, or the rate of a :class:`SymmetricNoise`; ``None`` leaves the labels as they are.
        noisy_validation: Whether ``val`` has noisy labels too.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; from the first use of the images, if the file is not valid.
        FileNotFoundError: Likewise, if there is no such file.
    """

    dataset = "image_arrays"

    @cached_property
    def _read(self) -> tuple[Images, Images]:
        if not self._root.is_file():
            raise FileNotFoundError(f"expected a .npz file in `root`, got {str(self._root)!r}")
        try:
            arrays = read_npz(self._root)
        except Exception as error:  # of NumPy, of the archive: each kind of damage has its own
            raise ValueError(f"expected a readable .npz file in `root`, got {str(self._root)!r}") from error
        for names in _NAMES:
            if set(names) <= set(arrays):
                images, labels, test_images, test_labels = (arrays[name] for name in names)
                return _images(images, labels, names[0]), _images(test_images, test_labels, names[2])
        raise ValueError(f"expected {', '.join(_NAMES[0])} in {str(self._root)!r}, got {', '.join(sorted(arrays))}")

    @override
    def read_images(self) -> tuple[Images, Images]:
        return self._read

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # of this object
        """The largest label, plus 1."""
        return 1 + max(int(images.label.max()) for images in self._read)

    @property
    def num_channels(self) -> int:  # type: ignore[override]
        """Of the training images."""
        return self._read[0].image.shape[1]

    @property
    def image_size(self) -> int:  # type: ignore[override]
        """Height of the training images."""
        return self._read[0].image.shape[2]


def _images(pixels: Array, labels: Array, name: str) -> Images:
    size = pixels.shape
    if pixels.dtype != np.uint8 or len(size) not in (3, 4) or not len(pixels) or size[1] != size[2]:
        raise ValueError(f"expected bytes of (n, H, H) or (n, H, H, C) in {name!r}, got {pixels.dtype} of {size}")
    if labels.dtype.kind not in "iu" or labels.size != len(pixels) or labels.min() < 0:
        got = f"{labels.dtype} of {labels.shape}"
        raise ValueError(f"expected {len(pixels)} integers from 0 on for {name!r}, got {got}")
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.from_numpy(labels.reshape(-1).astype(np.int64)))
