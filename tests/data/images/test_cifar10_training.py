import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from tenzoo.data import AsymmetricNoise, CIFAR10DataModule, MatrixNoise
from tests.data.small_cifar10 import make, ready


class Recorder(LightningModule):
    """Writes down each batch that it is given."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[tuple[list[int], float]] = []
        self.given: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if len(self.seen) == self.fail_at:
            raise ConnectionError("the machine went away")
        self.seen.append((labels.tolist(), images.double().square().sum().item()))
        self.given["train"].append(batch)
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        self.given["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.given["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        return batch[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(tmp_path, callbacks=(), **options) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {} if callbacks else {"enable_checkpointing": False}
    limits = {"num_sanity_val_steps": 0, "max_epochs": 1, **options}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet, **checkpoints, **limits)


def normalized(images: torch.Tensor, normalization: str = "cifar10") -> torch.Tensor:
    mean, std = {
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }[normalization]
    planes = [(images[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)]
    return torch.stack(planes, dim=1).float()


@pytest.mark.parametrize("normalization", ["cifar10", "imagenet"])
def test_what_steps_are_given(root, tmp_path, normalization):
    module, data = Recorder(), make(root, normalization=normalization, augment=False)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    splits = data.splits
    assert [len(label) for _, label in module.given["train"]] == [16, 16, 16, 16, 16, 10] * 2
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image, _ in module.given["train"])
    (image, label), *again = module.given["val"]
    assert len(again) == 1
    torch.testing.assert_close(image, normalized(splits["val"].image, normalization), atol=2e-6, rtol=0)
    assert torch.equal(label, splits["val"].label)
    ((image, label),) = module.given["test"]
    torch.testing.assert_close(image, normalized(splits["test"].image, normalization), atol=2e-6, rtol=0)
    assert torch.equal(label, splits["test"].label)
    first = module.given["train"][:6]
    whole = torch.cat([image for image, _ in first])
    expected = normalized(splits["train"].image, normalization)
    assert sorted(whole.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(expected.sum((1, 2, 3)).tolist()), abs=1e-2)
    (predicted,) = trainer.predict(module, data)
    assert torch.equal(predicted, image)


def test_only_training_images_are_augmented(root, tmp_path):
    plain, augmented = Recorder(), Recorder()
    make_trainer(tmp_path).fit(plain, make(root, augment=False))
    make_trainer(tmp_path).fit(augmented, make(root))
    for (image, label), (other, other_label) in zip(plain.given["train"], augmented.given["train"], strict=True):
        assert torch.equal(label, other_label)
        changed = [not torch.equal(a, b) for a, b in zip(image, other, strict=True)]
        assert sum(changed) >= len(changed) - 2  # 1 in 162 is left as it is
    assert torch.equal(plain.given["val"][0][0], augmented.given["val"][0][0])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)]
)
def test_images_have_the_precision_of_the_trainer(root, tmp_path, precision, dtype):
    module = Recorder()
    make_trainer(tmp_path, precision=precision, limit_train_batches=1).fit(module, make(root))
    for split in ("train", "val"):
        image, label = module.given[split][0]
        assert image.dtype == dtype
        assert label.dtype == torch.int64


def test_without_a_validation_set_nothing_is_validated(root, tmp_path):
    module, data = Recorder(), make(root, validation_size=0)
    trainer = make_trainer(tmp_path, num_sanity_val_steps=2)
    trainer.fit(module, data)
    assert trainer.validate(module, data, verbose=False) == []
    assert data.eval_split_names == ()
    assert data.val_dataloader() == []
    assert module.given["val"] == []
    assert sum(len(label) for _, label in module.given["train"]) == 100


def test_overfitting_a_batch_gives_no_warning(root, tmp_path):
    make_trainer(tmp_path, overfit_batches=1).fit(Recorder(), make(root))


def test_ranks_come_from_the_trainer(root):
    class OneOfTwo:
        global_rank = 1
        world_size = 2
        strategy = SimpleNamespace(root_device=torch.device("cpu"))

    whole, data = ready(root), ready(root)
    data.trainer = OneOfTwo()
    for batch, share in zip(whole.train_dataloader(), data.train_dataloader(), strict=True):
        assert all(torch.equal(mine, part[1::2]) for mine, part in zip(share.batch, batch, strict=True))
    assert len(next(iter(data.val_dataloader()[0])).label) == 10


def test_what_is_no_batch_of_images_passes_through(root):
    data = ready(root)
    batch = {"x": torch.ones(2)}
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["x"].device.type == "meta"
    assert data.on_after_batch_transfer(batch, 0) is batch


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("noise", [None, 0.5])
def test_a_resumed_run_sees_the_same_batches(root, tmp_path, noise):
    def checkpoints(**options):
        return ModelCheckpoint(tmp_path / "c", save_top_k=-1, **options)

    steps = checkpoints(filename="step-{step}", every_n_train_steps=1)
    epochs = checkpoints(filename="epoch-{step}", every_n_epochs=1)
    whole = Recorder()
    make_trainer(tmp_path, [steps, epochs], max_epochs=2).fit(whole, make(root, noise=noise))
    paths = sorted((tmp_path / "c").glob("*.ckpt"))
    assert len(paths) == 12 + 2
    assert len({total for _, total in whole.seen}) == 12
    for path in paths:
        rest = Recorder()
        trainer = make_trainer(tmp_path, max_epochs=2)
        trainer.fit(rest, make(root, noise=noise), ckpt_path=path, weights_only=True)
        assert rest.seen == whole.seen[torch.load(path, weights_only=True)["global_step"] :], path.name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("fail_at", [0, 4])
def test_the_batch_that_failed_comes_again(root, tmp_path, fail_at):
    class SaveOnException(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "on_exception.ckpt")

    whole, rest = Recorder(), Recorder()
    make_trainer(tmp_path).fit(whole, make(root))
    with pytest.raises(ConnectionError):
        make_trainer(tmp_path, [SaveOnException()]).fit(Recorder(fail_at), make(root))
    make_trainer(tmp_path).fit(rest, make(root), ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True)
    assert rest.seen == whole.seen[fail_at:]


@pytest.mark.parametrize("noise", [None, 0.5, AsymmetricNoise(0.5), MatrixNoise(np.full((10, 10), 0.1))])
def test_hyper_parameters_are_builtins_and_rebuild_the_data(root, tmp_path, noise):
    data, trainer = make(root, noise=noise), make_trainer(tmp_path)
    trainer.fit(Recorder(), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = CIFAR10DataModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.state_dict() == data.state_dict()
    assert again.noise_rate == data.noise_rate
    assert again.hparams == data.hparams


LIGHTNINGS_OWN = (
    "LightningCLI's args parameter",  # beside those that pytest was called with
    "(?s).*JsonargparseDeprecationWarning",
    "(?s).*was deprecated in v4",
)


def from_config(*arguments: str) -> LightningDataModule:
    with warnings.catch_warnings():
        for message in LIGHTNINGS_OWN:
            warnings.filterwarnings("ignore", message=message)
        return LightningCLI(
            Recorder,
            LightningDataModule,
            subclass_mode_data=True,
            run=False,
            seed_everything_default=False,
            save_config_callback=None,
            trainer_defaults={"logger": False, "accelerator": "cpu", "enable_checkpointing": False},
            parser_kwargs={"exit_on_error": False},
            args=["--data=tenzoo.data.CIFAR10DataModule", *arguments],
        ).datamodule


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "None"),
        (["--data.noise=0.4"], "SymmetricNoise(rate=0.4)"),
        (["--data.noise=1"], "SymmetricNoise(rate=1.0)"),
        (
            ['--data.noise={"class_path": "tenzoo.data.SymmetricNoise", "init_args": {"rate": 0.4}}'],
            "SymmetricNoise(rate=0.4)",
        ),
        (["--data.noise=AsymmetricNoise", "--data.noise.rate=0.2"], "AsymmetricNoise(rate=0.2)"),
        (["--data.noise=HumanNoise", "--data.noise.path=n.npz"], "HumanNoise(labels='worse_label')"),
        (
            ['--data.noise={"class_path": "tenzoo.data.MatrixNoise", "init_args": {"matrix": [[1, 0], [0.5, 0.5]]}}'],
            "MatrixNoise(2 × 2)",
        ),
    ],
)
def test_noise_from_a_config(arguments, expected):
    data = from_config("--data.batch_size=32", "--data.normalization=imagenet", *arguments)
    assert isinstance(data, CIFAR10DataModule)
    assert repr(data._noise) == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.noise=1.4", r"expected a number in \[0, 1\] in `noise`, got 1.4"),
        (
            '--data.noise={"class_path": "tenzoo.data.SymmetricNoise", "init_args": {"rate": 2}}',
            r"expected a number in \[0, 1\] in `rate`, got 2",
        ),
    ],
)
def test_bad_noise_from_a_config(argument, message):
    with pytest.raises(ValueError, match=message):
        from_config(argument)


def test_a_checkpoint_of_the_command_line_rebuilds_the_data(root, tmp_path):
    noise = '{"class_path": "tenzoo.data.SymmetricNoise", "init_args": {"rate": 0.4}}'
    data: Any = from_config(f"--data.root={root}", "--data.validation_size=10", f"--data.noise={noise}")
    trainer = make_trainer(tmp_path)
    trainer.fit(Recorder(), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = CIFAR10DataModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.state_dict() == data.state_dict()
