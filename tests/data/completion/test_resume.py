"""Training that stops and resumes sees the same batches as training that never stopped."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tenzoo.data import CompletionDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


class Recorder(LightningModule):
    """Writes down the indices of each batch that it is trained on."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise ConnectionError("the machine went away")
        self.seen.append(batch.index.tolist())
        return self.weight.square() + 0 * batch.value.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_data(**changes) -> CompletionDataModule:
    return CompletionDataModule(
        "synthetic",
        **{"shape": [5, 6, 7], "num_entries": 60, "observed_fraction": 0.5, "batch_size": 8, "seed": 9, **changes},
    )


def make_trainer(tmp_path, callbacks=(), **options) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {} if callbacks else {"enable_checkpointing": False}
    limits = {"num_sanity_val_steps": 0, "limit_val_batches": 0, **options}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet, **checkpoints, **limits)


def every_step(tmp_path) -> ModelCheckpoint:
    return ModelCheckpoint(tmp_path / "step", filename="{step}", every_n_train_steps=1, save_top_k=-1)


def every_epoch(tmp_path, after_training: bool) -> ModelCheckpoint:
    return ModelCheckpoint(
        tmp_path / "epoch",
        filename="{step}",
        every_n_epochs=1,
        save_top_k=-1,
        save_on_train_epoch_end=after_training,
    )


def batches_before(path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


RUNS = {  # 27 training entries in batches of 8: four batches per permutation
    "epochs": ({}, {"max_epochs": 3}),
    "steps": ({}, {"max_steps": 11, "max_epochs": -1}),
    "validation": ({}, {"max_epochs": 3, "limit_val_batches": 1.0}),
    "validation within an epoch": ({}, {"max_epochs": 3, "limit_val_batches": 1.0, "val_check_interval": 2}),
    "short epochs": ({"steps_per_epoch": 3}, {"max_epochs": 4}),
    "long epochs": ({"steps_per_epoch": 7}, {"max_epochs": 2}),
    "limited epochs": ({}, {"max_epochs": 4, "limit_train_batches": 3}),
    "steps with limited epochs": ({}, {"max_steps": 11, "max_epochs": -1, "limit_train_batches": 3}),
    "full batch": ({"batch_size": None, "steps_per_epoch": 3}, {"max_epochs": 3}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", RUNS)
def test_resume_from_every_step(tmp_path, name):
    changes, options = RUNS[name]
    whole = Recorder()
    make_trainer(tmp_path, [every_step(tmp_path)], **options).fit(whole, make_data(**changes))
    paths = sorted((tmp_path / "step").glob("*.ckpt"))
    assert len(paths) == len(whole.seen) >= 9
    for path in paths:
        rest = Recorder()
        make_trainer(tmp_path, **options).fit(rest, make_data(**changes), ckpt_path=path, weights_only=True)
        assert rest.seen == whole.seen[batches_before(path) :], path.name


@pytest.mark.parametrize("after_training", [True, False])
@pytest.mark.parametrize("name", [name for name in RUNS if "full" not in name])
def test_resume_from_the_end_of_an_epoch(tmp_path, name, after_training):
    changes, options = RUNS[name]
    options = {**options, "limit_val_batches": 1.0}
    whole = Recorder()
    callback = every_epoch(tmp_path, after_training)
    make_trainer(tmp_path, [callback], **options).fit(whole, make_data(**changes))
    paths = sorted((tmp_path / "epoch").glob("*.ckpt"))
    assert len(paths) >= 2
    for path in paths:
        rest = Recorder()
        make_trainer(tmp_path, **options).fit(rest, make_data(**changes), ckpt_path=path, weights_only=True)
        assert rest.seen == whole.seen[batches_before(path) :], path.name


@pytest.mark.parametrize(("first", "second"), [(3, 5), (2, 8), (4, 6), (8, 11), (8, 12)])
def test_resume_twice(tmp_path, first, second):
    options = {"max_epochs": 4}
    whole = Recorder()
    make_trainer(tmp_path, [every_step(tmp_path)], **options).fit(whole, make_data())
    again = tmp_path / "again"
    make_trainer(tmp_path, [every_step(again)], **options).fit(
        Recorder(), make_data(), ckpt_path=tmp_path / "step" / f"step={first}.ckpt", weights_only=True
    )
    rest = Recorder()
    path = again / "step" / f"step={second}.ckpt"
    make_trainer(tmp_path, **options).fit(rest, make_data(), ckpt_path=path, weights_only=True)
    expected = whole.seen[second:]
    # Lightning 2.6 itself loses count of the epochs, with any loader, if the first resume is from the last step of one.
    assert rest.seen[: len(expected)] == expected
    assert len(rest.seen) == len(expected) or first % 4 == 0


@pytest.mark.parametrize("fail_at", [0, 1, 3, 4, 6])
def test_the_batch_that_failed_comes_again(tmp_path, fail_at):
    whole = Recorder()
    make_trainer(tmp_path, max_epochs=2).fit(whole, make_data())

    class SaveOnException(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "on_exception.ckpt")

    with pytest.raises(ConnectionError):
        make_trainer(tmp_path, [SaveOnException()], max_epochs=2).fit(Recorder(fail_at), make_data())
    rest = Recorder()
    make_trainer(tmp_path, max_epochs=2).fit(
        rest, make_data(), ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True
    )
    assert rest.seen == whole.seen[fail_at:]


def test_fine_tuning_another_split_from_a_checkpoint_is_refused(tmp_path):
    make_trainer(tmp_path, [every_step(tmp_path)], max_epochs=1).fit(Recorder(), make_data())
    with pytest.raises(ValueError, match="expected the `seed` of the checkpoint, 9, got 8"):
        make_trainer(tmp_path, max_epochs=1).fit(
            Recorder(), make_data(seed=8), ckpt_path=tmp_path / "step" / "step=2.ckpt", weights_only=True
        )


def test_a_fit_after_a_test_begins_at_the_beginning(tmp_path):
    class Tested(Recorder):
        def test_step(self, batch, batch_idx, dataloader_idx=0):  # noqa: PT028
            pass

    first, second, data = Recorder(), Tested(), make_data()
    make_trainer(tmp_path, [every_step(tmp_path)], max_epochs=1).fit(first, make_data())
    path = tmp_path / "step" / "step=2.ckpt"
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.test(second, data, ckpt_path=path, weights_only=True, verbose=False)
    trainer.fit(second, data)
    assert second.seen == first.seen


def test_reloading_the_loader_goes_on_with_the_stream(tmp_path):
    whole, reloaded = Recorder(), Recorder()
    make_trainer(tmp_path, max_epochs=3).fit(whole, make_data())
    make_trainer(tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(reloaded, make_data())
    assert reloaded.seen == whole.seen
