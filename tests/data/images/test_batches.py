import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from tenzoo.data import ImageBatch, ImageLoader, Images, SequentialImageLoader
from tenzoo.data.images.batches import augment_and_normalize

MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def make_images(count: int, size: int = 32) -> Images:
    """The label is the number of the image."""
    pixels = np.random.default_rng(count).integers(256, size=(count, 3, size, size), dtype=np.uint8)
    return Images(torch.from_numpy(pixels), torch.arange(count))


def by_hand(batch: ImageBatch) -> np.ndarray:
    """One image after the other, in float64."""
    result = []
    for i, image in enumerate(batch.image.numpy()):
        size = image.shape[1]
        padded = np.zeros((3, size + 8, size + 8))
        padded[:, 4:-4, 4:-4] = image
        row, column = (4, 4) if batch.crop is None else batch.crop[i].tolist()
        crop = padded[:, row : row + size, column : column + size]
        if batch.flip is not None and batch.flip[i]:
            crop = crop[:, :, ::-1]
        result.append((crop / 255 - MEAN.double().numpy()[:, None, None]) / STD.double().numpy()[:, None, None])
    return np.stack(result)


@pytest.mark.parametrize("size", [32, 5])
def test_augmentation_of_a_batch_is_that_of_each_image(size):
    images = make_images(81, size)
    corners = torch.tensor(list(itertools.product(range(9), range(9))))
    batch = ImageBatch(images.image, images.label, corners, torch.arange(81) % 2 == 0)
    image, label = augment_and_normalize(batch, MEAN, STD)
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(image.numpy(), by_hand(batch), atol=2e-6)
    assert torch.equal(label, images.label)


@pytest.mark.parametrize("part", ["crop", "flip", "neither"])
def test_what_was_not_drawn_is_not_done(part):
    images = make_images(4)
    crop = torch.tensor([[0, 8], [1, 2], [8, 0], [4, 4]]) if part == "crop" else None
    flip = torch.tensor([True, False, True, True]) if part == "flip" else None
    batch = ImageBatch(images.image, images.label, crop, flip)
    image, _ = augment_and_normalize(batch, MEAN, STD, memory_format=torch.contiguous_format)
    assert image.is_contiguous()
    np.testing.assert_allclose(image.numpy(), by_hand(batch), atol=2e-6)


def test_the_images_are_left_as_they_are():
    images = make_images(6)
    before = images.image.clone()
    for batch in ImageLoader(images, batch_size=6, augment=True):
        augment_and_normalize(batch, MEAN, STD)
    assert torch.equal(images.image, before)


def test_each_epoch_has_every_image_once_and_keeps_the_last_batch():
    images = make_images(11)
    loader = ImageLoader(images, batch_size=4, augment=True, seed=2)
    orders = []
    for _ in range(3):
        batches = list(loader)
        assert [len(batch.label) for batch in batches] == [4, 4, 3] == [len(batch.crop) for batch in batches]
        assert all(torch.equal(batch.image, images.image[batch.label]) for batch in batches)
        orders.append([label for batch in batches for label in batch.label.tolist()])
        assert sorted(orders[-1]) == list(range(11))
    assert len(set(map(tuple, orders))) == 3


def test_a_single_batch_is_augmented_anew_in_each_epoch():
    loader = ImageLoader(make_images(30), batch_size=30, augment=True)
    (first,), (second,) = loader, loader
    assert not torch.equal(first.crop, second.crop)
    assert not torch.equal(first.label, second.label)


def test_crops_and_flips_are_uniform_and_independent():
    loader = ImageLoader(make_images(900, size=1), batch_size=90, augment=True)
    batches = [batch for _ in range(18) for batch in loader]
    crop = torch.cat([batch.crop for batch in batches])
    flip = torch.cat([batch.flip for batch in batches])
    assert crop.dtype == torch.int64
    assert flip.dtype == torch.bool
    counts = Counter(zip(*crop.T.tolist(), flip.tolist(), strict=True))
    assert len(counts) == 162
    expected = len(flip) / 162  # 100 each
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 161 + 5 * (2 * 161) ** 0.5
    assert len({tuple(batch.crop.flatten().tolist()) for batch in batches}) == len(batches)


def test_without_augmentation_the_order_is_the_same_and_nothing_is_drawn():
    images = make_images(10)
    for plain, drawn in zip(
        ImageLoader(images, batch_size=3, seed=1), ImageLoader(images, batch_size=3, seed=1, augment=True), strict=True
    ):
        assert torch.equal(plain.label, drawn.label)
        assert plain.crop is plain.flip is None


def test_batches_depend_on_seed_and_place_alone():
    def stream(seed):
        loader = ImageLoader(make_images(20), batch_size=8, augment=True, seed=seed)
        return [[part.tolist() for part in batch[1:]] for _ in range(2) for batch in loader]

    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = stream(1)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    torch.manual_seed(5)
    assert stream(1) == first
    assert stream(2) != first


@pytest.mark.parametrize("consumed", range(7))
def test_state_resumes_anywhere_with_the_same_augmentation(consumed):
    images = make_images(10)
    loader = ImageLoader(images, batch_size=4, augment=True, seed=3)
    stream = [batch for _ in range(4) for batch in loader]
    stopped = ImageLoader(images, batch_size=4, augment=True, seed=3)
    for _ in range(consumed):
        next(iter(stopped))
    resumed = ImageLoader(images, batch_size=4, augment=True, seed=3)
    resumed.load_state_dict(stopped.state_dict())
    for batch, expected in zip(resumed, stream[consumed : consumed + 3], strict=True):
        assert all(torch.equal(part, other) for part, other in zip(batch, expected, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_each_batch_and_its_augmentation(world_size):
    images = make_images(11)
    whole = ImageLoader(images, batch_size=4, augment=True)
    ranks = [
        ImageLoader(images, batch_size=4, augment=True, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        size = len(batch.label)
        for rank, (part, weight, items) in enumerate(parts):
            rows = list(range(size))[rank::world_size]
            assert weight == pytest.approx(len(rows) * world_size / size)
            assert items == size / world_size
            for mine, all_of_it in zip(part, batch, strict=True):
                rows = rows or [0]
                assert torch.equal(mine, all_of_it[rows])


def test_sequential_loader_goes_through_all_images_and_starts_anew():
    images = make_images(7)
    loader = SequentialImageLoader(images, batch_size=3)
    assert len(loader) == 3
    next(iter(loader))
    batches = list(loader)
    assert torch.equal(torch.cat([batch.image for batch in batches]), images.image)
    assert torch.equal(torch.cat([batch.label for batch in batches]), images.label)
    assert all(batch.crop is batch.flip is None for batch in batches)
    assert not hasattr(loader, "state_dict")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "at least 1 in `batch_size`"),
        ({"batch_size": 2.0}, TypeError, "integer in `batch_size`"),
        ({"batch_size": 2, "seed": -1}, ValueError, "at least 0 in `seed`"),
        ({"batch_size": 2, "rank": 1, "world_size": 1}, ValueError, "less than `world_size`"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ImageLoader(make_images(5), **options)


def test_no_images():
    with pytest.raises(ValueError, match="at least one image in `images`"):
        ImageLoader(make_images(0), batch_size=1)


def test_a_batch_moves_as_a_whole():
    batch = next(iter(ImageLoader(make_images(3), batch_size=2, augment=True)))
    assert all(part.device.type == "meta" for part in batch.to(torch.device("meta")))
    assert ImageBatch(batch.image, batch.label).to(torch.device("cpu")).crop is None
