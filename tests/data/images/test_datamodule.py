"""A data set of images of another size, in other colors and classes than those of CIFAR-10."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tenzoo.data import AsymmetricNoise, ImageDataModule, Images, MatrixNoise
from tenzoo.tasks import ImageClassificationTask

COUNT = 40


def grey_images(count: int, size: int = 28) -> Images:
    pixels = np.random.default_rng(count).integers(256, size=(count, 1, size, size), dtype=np.uint8)
    return Images(torch.from_numpy(pixels), torch.arange(count) % 5)


class GreyDataModule(ImageDataModule):
    dataset = "grey"
    num_classes = 5
    num_channels = 1
    image_size = 28
    mean, std = (0.5,), (0.25,)

    def read_images(self):
        return grey_images(COUNT), grey_images(10)


class OtherGreyDataModule(GreyDataModule):
    """The same labels under one other pixel."""

    def read_images(self):
        train, test = super().read_images()
        train.image[0, 0, 0, 0] ^= 1
        return train, test


def ready(kind=GreyDataModule, **changes) -> ImageDataModule:
    data = kind("nowhere", **{"validation_size": 8, "batch_size": 10, **changes})
    data.prepare_data()
    data.setup()
    return data


def on_device(data, batch):
    return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, torch.device("cpu"), 0), 0)


def test_its_images_are_split_and_normalized():
    data = ready()
    assert {name: len(images) for name, images in data.splits.items()} == {"train": 32, "val": 8, "test": 10}
    image, label = on_device(data, next(iter(data.test_dataloader())))
    expected = (grey_images(10).image.double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-6)
    assert label.tolist() == [0, 1, 2, 3, 4] * 2
    image, _ = on_device(data, next(iter(data.train_dataloader())))
    assert image.shape == (10, 1, 28, 28)


def test_its_labels_get_the_noise_of_their_number_of_classes():
    flipped = MatrixNoise(np.roll(np.eye(5), 1, axis=1))
    data = ready(noise=flipped)
    assert data.noise_rate == 1
    assert torch.equal(data.splits["train"].label, (data.clean_train_labels + 1) % 5)
    with pytest.raises(ValueError, match="10 classes of CIFAR-10"):
        ready(noise=AsymmetricNoise(0.4))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (grey_images(9, size=32), r"\(n, 1, 28, 28\), .*uint8, from Wrong.read_images\(\), got \(9, 1, 32, 32\)"),
        (grey_images(0), r"n >= 1, .* got \(0, 1, 28, 28\)"),
        (Images(grey_images(9).image.float(), torch.arange(9) % 5), r"got \(9, 1, 28, 28\), torch.float32"),
        (Images(grey_images(9).image, torch.arange(9) % 6), r"labels from 0 to 4 from Wrong.* got 0 to 5"),
        (Images(grey_images(9).image, torch.arange(9) % 5 - 1), r"got -1 to 3"),
    ],
)
def test_images_that_are_not_as_promised_are_refused(images, message):
    class Wrong(GreyDataModule):
        def read_images(self):
            return grey_images(COUNT), images

    with pytest.raises(ValueError, match=message):
        ready(Wrong)


def train(tmp_path, data, max_steps, ckpt_path=None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 5))
    task = ImageClassificationTask(network, num_classes=5)
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=max_steps, callbacks=[saved], limit_val_batches=0, **quiet)
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return task.network[1].weight.detach()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_it_trains_and_resumes_in_mid_epoch_with_its_own_images_only(tmp_path):
    def data(kind=GreyDataModule):
        return kind("nowhere", validation_size=8, batch_size=10, noise=0.2)

    whole = train(tmp_path / "whole", data(), 7)
    stopped = tmp_path / "whole" / "step=3.ckpt"
    assert torch.equal(train(tmp_path / "rest", data(), 7, stopped), whole)
    loaded = GreyDataModule.load_from_checkpoint(stopped, weights_only=True)
    assert dict(loaded.hparams) == dict(data().hparams)
    with pytest.raises(ValueError, match="expected the `checksum` of the checkpoint"):
        train(tmp_path / "other", data(OtherGreyDataModule), 7, _renamed(stopped))


def _renamed(path):
    """Lightning files the state of a data module under the name of its class."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["OtherGreyDataModule"] = checkpoint.pop("GreyDataModule")
    torch.save(checkpoint, path)
    return path
