"""Images of one's own: folders, arrays, and public sets that torchvision reads."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tenzoo.cli import main
from tenzoo.data import (
    CIFAR100DataModule,
    ImageArraysDataModule,
    ImageBatch,
    ImageFolderDataModule,
    MNISTDataModule,
)
from tests.runs import the_run

COLORS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def paint(folder, *, number=20, size=(20, 12), mode="RGB"):
    """Noisy images, a folder for each color."""
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name / "deeper").mkdir(parents=True)
        for place in range(number):
            pixels = np.clip(np.array(color) + generator.normal(0, 30, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / ("deeper" if place % 2 else "") / f"{place}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return paint(tmp_path / "images")


def test_a_folder_of_classes_is_split(folder):
    data = ImageFolderDataModule(str(folder), image_size=8, test_fraction=0.2, validation_fraction=0.25)
    data.setup()
    assert (data.class_names, data.num_classes, data.image_shape) == (("blue", "green", "red"), 3, (3, 8, 8))
    assert {name: len(images) for name, images in data.splits.items()} == {"train": 36, "val": 12, "test": 12}
    every = torch.cat([images.image.flatten(1) for images in data.splits.values()])
    assert len(every.unique(dim=0)) == 60
    for images in data.splits.values():
        strongest = images.image.float().mean((2, 3)).argmax(1)
        assert torch.equal(strongest, 2 - images.label)
    again = ImageFolderDataModule(str(folder), image_size=8, test_fraction=0.2, validation_fraction=0.25, seed=1)
    again.setup()
    assert not torch.equal(again.splits["test"].image, data.splits["test"].image)


def test_training_images_are_standardized_by_their_own_moments(folder):
    data = ImageFolderDataModule(str(folder), image_size=8, augment=False)
    data.setup()
    train = data.splits["train"].image.double() / 255
    assert data.mean == pytest.approx(train.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(train.transpose(0, 1).flatten(1).std(1, correction=0).tolist())
    images, _ = data.on_after_batch_transfer(ImageBatch(data.splits["train"].image, data.splits["train"].label), 0)
    assert images.mean((0, 2, 3)) == pytest.approx(torch.zeros(3), abs=1e-5)


def test_a_folder_of_splits(tmp_path):
    paint(tmp_path / "train")
    paint(tmp_path / "test", number=4)
    data = ImageFolderDataModule(str(tmp_path), image_size=8, validation_fraction=0)
    data.setup()
    assert {name: len(images) for name, images in data.splits.items()} == {"train": 60, "test": 12}
    (tmp_path / "test" / "yellow").mkdir()
    with pytest.raises(ValueError, match=r"the classes of .*train.* in .*test.*, got 'yellow'"):
        ImageFolderDataModule(str(tmp_path), image_size=8).setup()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
@pytest.mark.parametrize("grayscale", [False, True])
def test_any_mode_of_images(tmp_path, mode, grayscale):
    plain = Image.new("1", (9, 5), 1) if mode == "1" else Image.new("RGBA", (9, 5), (10, 200, 30, 255)).convert(mode)
    for name in "ab":
        (tmp_path / name).mkdir()
        for place in range(4):
            plain.save(tmp_path / name / f"{place}.png")
    data = ImageFolderDataModule(str(tmp_path), image_size=4, grayscale=grayscale, validation_fraction=0)
    data.setup()
    image = data.splits["test"].image[0]
    assert image.shape == (1 if grayscale else 3, 4, 4)
    expected = plain.convert("RGBA").convert("L" if grayscale else "RGB").getpixel((0, 0))
    assert image[:, 0, 0].tolist() == list(expected if isinstance(expected, tuple) else (expected,))
    assert image.flatten(1).unique(dim=1).shape[1] == 1


def test_an_image_that_lies_on_its_side_is_turned(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for place in range(3):
            image = Image.new("RGB", (8, 8))
            image.paste((255, 255, 255), (0, 0, 8, 4))
            exif = Image.Exif()
            exif[0x0112] = 3  # turned by 180 degrees
            image.save(tmp_path / name / f"{place}.png", exif=exif)
    data = ImageFolderDataModule(str(tmp_path), image_size=8)
    data.setup()
    assert data.splits["test"].image[0, 0, :, 0].tolist() == [0] * 4 + [255] * 4


def test_folders_that_are_refused(tmp_path, folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="a folder of images in `root`, got 'nowhere'"):
        ImageFolderDataModule("nowhere").setup()
    (tmp_path / "one" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"folders of two or more classes in .*, got \['class'\]"):
        ImageFolderDataModule(str(tmp_path / "one")).setup()
    (folder / "yellow").mkdir()
    with pytest.raises(ValueError, match="got none of 'yellow'"):
        ImageFolderDataModule(str(folder)).setup()
    (folder / "yellow" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"an image in '.*yellow/a.png', which cannot be read"):
        ImageFolderDataModule(str(folder)).setup()
    (folder / "yellow" / "a.png").unlink()
    (folder / "yellow").rmdir()
    monkeypatch.setattr("tenzoo.data.images.folder.free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="images that fit into memory, got 60 of 32 × 32"):
        ImageFolderDataModule(str(folder)).setup()


def test_a_checkpoint_of_other_classes_is_refused(folder):
    data = ImageFolderDataModule(str(folder), image_size=8)
    data.setup()
    state = data.state_dict()
    (folder / "red").rename(folder / "rose")
    other = ImageFolderDataModule(str(folder), image_size=8)
    other.setup()
    with pytest.raises(ValueError, match="class_names"):
        other.load_state_dict(state)


# --- arrays and public sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_arrays(tmp_path, channels):
    shape = (9, 9) if channels is None else (9, 9, channels)
    pixels = np.random.default_rng(0).integers(0, 256, (30, *shape), dtype=np.uint8)
    np.savez(
        tmp_path / "a.npz", x_train=pixels[:20], y_train=np.arange(20) % 4, x_test=pixels[20:], y_test=np.arange(10) % 4
    )
    data = ImageArraysDataModule(str(tmp_path / "a.npz"), validation_size=5)
    data.setup()
    assert (data.num_classes, data.image_shape) == (4, (channels or 1, 9, 9))
    assert {name: len(images) for name, images in data.splits.items()} == {"train": 15, "val": 5, "test": 10}
    assert np.array_equal(data.splits["test"].image.permute(0, 2, 3, 1).numpy().reshape(10, *shape), pixels[20:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x_train": np.zeros((4, 8, 8))}, "bytes of"),
        ({"x_train": np.zeros((4, 8, 9), np.uint8)}, "bytes of"),
        ({"y_train": np.zeros(4)}, "4 integers from 0 on for 'x_train'"),
        ({"y_train": np.zeros(3, int)}, "4 integers from 0 on for 'x_train'"),
        ({"y_test": -np.ones(4, int)}, "4 integers from 0 on for 'x_test'"),
        ({"other": np.zeros(3)}, "got other"),
    ],
)
def test_arrays_that_are_refused(tmp_path, change, said):
    pixels, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    arrays = {"x_train": pixels, "y_train": labels, "x_test": pixels, "y_test": labels} | change
    np.savez(tmp_path / "a.npz", **({"other": arrays["other"]} if "other" in arrays else arrays))
    with pytest.raises(ValueError, match=said):
        ImageArraysDataModule(str(tmp_path / "a.npz")).setup()
    (tmp_path / "a.npz").write_bytes(b"none")
    with pytest.raises(ValueError, match="a readable"):
        ImageArraysDataModule(str(tmp_path / "a.npz")).setup()


@pytest.mark.parametrize("kind", [MNISTDataModule, CIFAR100DataModule])
def test_public_sets_that_are_not_there(tmp_path, kind):
    data = kind(str(tmp_path), download=False)
    with pytest.raises(FileNotFoundError, match=rf"expected {data._class} in `root`, got .* without it"):
        data.prepare_data()


# --- from the command line -----------------------------------------------------------------------------------------


def test_a_network_of_the_zoo_gets_the_classes_and_channels_of_ones_own_images(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    for number, color in enumerate([*COLORS.values()][::-1]):
        Image.new("RGB", (30, 30), color).save(tmp_path / "new" / f"{number}.png")
    data = ["--data", "tenzoo.data.ImageFolderDataModule", "--data.init_args.root", str(folder)]
    few = ["--data.init_args.image_size=8", "--data.init_args.batch_size=8", "--trainer.log_every_n_steps=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    config = ["--config", "tr_resnet20_cifar10", *data, *few, *quiet]
    assert main(["fit", *config, "--trainer.max_epochs=1", "--model.init_args.lr_scheduler=one_cycle"]) == 0
    run = the_run(tmp_path / "runs")
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert (saved["num_classes"], saved["network"]["init_args"]["num_classes"]) == (3, 3)
    capsys.readouterr()
    words = ["--ckpt_path", "best", "--data.init_args.predict", str(tmp_path / "new")]
    writer = "{class_path: tenzoo.prediction.PredictedClassesWriter, init_args: {name: classes.csv}}"
    assert main(["predict", *config, *words, "--trainer.callbacks+", writer]) == 0
    (written,) = (tmp_path / "runs").rglob("classes.csv")
    header, *rows = [line.split(",") for line in written.read_text().splitlines()]
    assert header[:2] == ["file", "class"]
    assert [row[0] for row in rows] == ["0.png", "1.png", "2.png"]
    assert {row[1] for row in rows} <= set(COLORS)
