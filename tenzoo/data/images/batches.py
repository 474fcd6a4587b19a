"""Labelled images as bytes: their batches, and the augmentation and normalization of whole batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from tenzoo.data.loader import OrderedLoader, ShuffledLoader
from tenzoo.data.transfer import upload

PADDING = 4
"""Zeros on each side of an image, from which a crop of the image's own size is taken."""

EVALUATION_IMAGES = 500
"""Images per batch in evaluation, unless training batches are larger."""

_AUGMENTATION_STREAM = 0xC80F


class ImageBatch(NamedTuple):
    """Images as they are stored, and the random numbers that augment them.

    Args:
        image: Shape ``(B, C, H, W)``, uint8.
        label: Shape ``(B,)``, int64.
        crop: Row and column of each crop's corner in the padded image, shape ``(B, 2)``, int64, from 0 to 8;
            ``None`` crops nothing.
        flip: Which images are mirrored left to right, shape ``(B,)``, bool; ``None`` mirrors none.
    """

    image: Tensor
    label: Tensor
    crop: Tensor | None = None
    flip: Tensor | None = None

    def to(self, device: torch.device) -> "ImageBatch":
        """The batch on a device."""
        crop, flip = (None if part is None else upload(part, device) for part in self[2:])
        return ImageBatch(upload(self.image, device), upload(self.label, device), crop, flip)


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels.

    Args:
        image: Shape ``(n, C, H, W)``, uint8.
        label: Shape ``(n,)``, int64.
    """

    image: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor) -> "Images":
        """The images of these rows, shape ``(m,)``, int64, copied."""
        return Images(self.image[rows], self.label[rows])


def check_images(images: Images, shape: tuple[int, ...], num_classes: int, *, source: str) -> None:
    """Refuse no images, images of another shape or type, and labels that are not classes.

    Args:
        images: To be checked.
        shape: Of each image, ``(C, H, W)``.
        num_classes: Number of classes; labels count from 0.
        source: Where the images come from, for the errors.

    Raises:
        ValueError: If they are not as expected.

    Example:
        >>> images = Images(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 4]))
        >>> check_images(images, (1, 28, 28), 5, source="a file")
    """
    if len(images) == 0 or images.image.shape != (len(images), *shape) or images.image.dtype != torch.uint8:
        raise ValueError(
            f"expected images of shape (n, {', '.join(map(str, shape))}), n >= 1, uint8, from {source}, got "
            f"{tuple(images.image.shape)}, {images.image.dtype}"
        )
    smallest, largest = int(images.label.min()), int(images.label.max())
    if smallest < 0 or largest >= num_classes:
        raise ValueError(f"expected labels from 0 to {num_classes - 1} from {source}, got {smallest} to {largest}")


class ImageLoader(ShuffledLoader[ImageBatch]):
    """Training batches of images, an endless and resumable stream (see :class:`~tenzoo.data.loader.ShuffledLoader`).

    With ``augment`` each batch carries the corner of each crop and whether it is mirrored, drawn uniformly. The random
    generator depends only on the seed and on the place of the batch in the stream: a resumed run, or one with more
    processes, augments each image in the same way. The images stay bytes until :func:`augment_and_normalize`.

    Args:
        images: The images to draw from.
        batch_size: Images per batch over all ranks together.
        seed: Chooses the permutations, crops and flips.
        augment: Whether to draw crops and flips.
        rank: Number of this process.
        world_size: Number of processes.
        in_flight: Returns how many batches were yielded and are not trained on yet, when a state is read.
        device: Where the images are stored and batches are made; ``None`` is the CPU.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If there are no images, or a count is out of range.

    Example:
        >>> images = Images(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5))
        >>> loader = ImageLoader(images, batch_size=3, augment=True)
        >>> [batch.crop.shape for batch in loader]
        [torch.Size([3, 2]), torch.Size([2, 2])]
        >>> loader.state_dict()
        {'permutation': 1, 'batch': 0}
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        seed: int = 0,
        augment: bool = False,
        rank: int = 0,
        world_size: int = 1,
        in_flight: Callable[[], int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if len(images) == 0:
            raise ValueError("expected at least one image in `images`, got none")
        super().__init__(
            len(images),
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            in_flight=in_flight,
            device=device,
        )
        self._images = Images(upload(images.image, self._device), upload(images.label, self._device))
        self._augment = augment

    @override
    def _batch(self, step: int) -> ImageBatch:
        rows = self._rows(step)
        own = self._shard(rows)
        image, label = self._images.image[own], self._images.label[own]
        if not self._augment:
            return ImageBatch(image, label)
        generator = np.random.default_rng([self._seed, _AUGMENTATION_STREAM, *divmod(step, self._num_batches)])
        crop = torch.from_numpy(generator.integers(2 * PADDING + 1, size=(len(rows), 2)))
        flip = torch.from_numpy(generator.integers(2, size=len(rows)).astype(np.bool_))
        # Each rank takes the numbers of its own images.
        return ImageBatch(image, label, *(upload(self._shard(drawn), self._device) for drawn in (crop, flip)))


class SequentialImageLoader(OrderedLoader[ImageBatch]):
    """All images in their order, in each process, without augmentation.

    See :class:`~tenzoo.data.loader.OrderedLoader`.

    Args:
        images: The images to iterate over.
        batch_size: Images per batch.

    Raises:
        TypeError: If ``batch_size`` is not an integer.
        ValueError: If ``batch_size`` is below 1.

    Example:
        >>> images = Images(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5))
        >>> [batch.label.tolist() for batch in SequentialImageLoader(images, batch_size=3)]
        [[0, 1, 2], [3, 4]]
    """

    def __init__(self, images: Images, *, batch_size: int = EVALUATION_IMAGES) -> None:
        super().__init__(len(images), batch_size=batch_size)
        self._images = images

    @override
    def _batch(self, rows: slice) -> ImageBatch:
        return ImageBatch(self._images.image[rows], self._images.label[rows])


def augment_and_normalize(
    batch: ImageBatch, mean: Tensor, std: Tensor, *, memory_format: torch.memory_format = torch.channels_last
) -> tuple[Tensor, Tensor]:
    """Crops, mirrors and normalizes a whole batch on its device.

    An image x becomes ``(x / 255 - mean) / std`` per channel; the padding is 0 before that, as in He et al. (2016,
    arXiv:1512.03385, section 4.2). Images are cropped and mirrored as bytes, with a quarter of the memory traffic of
    float32.

    Args:
        batch: A batch of a loader. Without crops and flips the images are only normalized.
        mean: Per channel, shape ``(C,)``, of values in [0, 1]; on the batch's device.
        std: Per channel, shape ``(C,)``; on the batch's device.
        memory_format: The memory layout of the result. Convolutions on CPUs, and in half precision on GPUs, are
            fastest in ``channels_last``.

    Returns:
        Images, shape ``(B, C, H, W)``, float32, and labels, shape ``(B,)``, int64.

    Example:
        >>> batch = ImageBatch(torch.full((2, 3, 32, 32), 255, dtype=torch.uint8), torch.tensor([3, 7]))
        >>> image, label = augment_and_normalize(batch, torch.full((3,), 0.5), torch.full((3,), 0.25))
        >>> image.shape, round(image.mean().item(), 4), label.tolist()
        (torch.Size([2, 3, 32, 32]), 2.0, [3, 7])
    """
    image = batch.image
    if batch.crop is not None:
        image = _crop(image, batch.crop)
    if batch.flip is not None:
        image = torch.where(batch.flip[:, None, None, None], image.flip(3), image)
    scale, shift = 1 / (255 * std), -mean / std
    image = image.contiguous(memory_format=memory_format)
    return torch.addcmul(shift[:, None, None], image, scale[:, None, None]), batch.label


def _crop(image: Tensor, corner: Tensor) -> Tensor:
    height, width = image.shape[2:]
    padded = pad(image, (PADDING, PADDING, PADDING, PADDING))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of (B, C, 9, 9, H, W)
    return windows[torch.arange(len(image), device=image.device), :, corner[:, 0], corner[:, 1]]
