"""What training ends with is saved, also where no validation came after its last step."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging

from tenzoo.data import CompletionDataModule
from tenzoo.tasks import SAM, CompletionTask
from tests.tasks.toy import adam, assert_same_weights, sgd, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning"),
]


def run(path, *, savers=(), callbacks=(), resume=None, **flags):
    torch.manual_seed(0)
    task = CompletionTask(
        "tucker", 2, shape=(13, 4, 12, 8), optimizer=flags.pop("optimizer", adam()), sam=flags.pop("sam", None)
    )
    data = CompletionDataModule("il2", observed_fraction=0.5, batch_size=500, seed=1)  # 5 steps an epoch
    fit = trainer(path, enable_checkpointing=True, callbacks=[*savers, *callbacks], **flags)
    fit.fit(task, data, ckpt_path=resume)
    return task


def last(path):
    return ModelCheckpoint(path, filename="last")


def best(path, **kwargs):
    return ModelCheckpoint(path, monitor="val/r2", mode="max", filename="best", **kwargs)


ENDS = {
    "between two validations": ({"check_val_every_n_epoch": 2, "max_epochs": 3}, 15),
    "before the first validation": ({"check_val_every_n_epoch": 4, "max_epochs": 2}, 10),
    "between validations by steps": ({"check_val_every_n_epoch": None, "val_check_interval": 7, "max_epochs": 2}, 10),
    "in an epoch": ({"max_steps": 8, "max_epochs": -1}, 8),
    "without validation": ({"limit_val_batches": 0, "max_epochs": 2}, 10),
    "after a validation": ({"max_epochs": 2}, 10),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "savers", [lambda path: [last(path)], lambda path: [best(path, save_last=True)]], ids=["own", "save_last"]
)
def test_the_last_state_is_saved_wherever_training_ends(tmp_path, end, savers):
    flags, steps = ENDS[end]
    task = run(tmp_path, savers=savers(tmp_path), **flags)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == steps
    for name, value in task.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value), name


@pytest.mark.parametrize(
    "method", [{}, {"sam": SAM(rho=0.1), "optimizer": sgd(1e-3, momentum=0.9)}], ids=["adam", "sam"]
)
@pytest.mark.parametrize("end", [name for name, (flags, _) in ENDS.items() if "max_steps" not in flags])
def test_a_run_goes_on_exactly_from_where_it_ended(tmp_path, end, method):
    flags, _ = ENDS[end]
    whole = run(tmp_path / "whole", savers=[last(tmp_path / "whole")], **method, **{**flags, "max_epochs": 6})
    run(tmp_path / "part", savers=[last(tmp_path / "part")], **method, **flags)
    resumed = run(
        tmp_path / "rest",
        savers=[last(tmp_path / "rest")],
        resume=tmp_path / "part" / "last.ckpt",
        **method,
        **{**flags, "max_epochs": 6},
    )
    assert_same_weights(whole, resumed)


def test_the_best_weights_stay_where_a_later_state_was_not_judged(tmp_path):
    run(tmp_path, savers=[best(tmp_path)], check_val_every_n_epoch=2, max_epochs=3)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["best.ckpt"]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 10


@pytest.mark.parametrize("flags", [{"check_val_every_n_epoch": 4}, {"limit_val_batches": 0}], ids=["too short", "none"])
def test_a_run_that_never_judged_its_weights_saves_them(tmp_path, flags):
    with pytest.warns(UserWarning, match=r"ended before any.*last\.ckpt"):
        task = run(tmp_path, savers=[best(tmp_path)], max_epochs=2, **flags)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in task.state_dict().items())


def test_an_older_checkpoint_stays_beside_one_that_nothing_was_chosen_for(tmp_path):
    (tmp_path / "last.ckpt").write_text("of another run")
    with pytest.warns(UserWarning, match=r"last-v1\.ckpt"):
        run(tmp_path, savers=[best(tmp_path)], check_val_every_n_epoch=4, max_epochs=2)
    assert (tmp_path / "last.ckpt").read_text() == "of another run"


def test_what_is_kept_by_a_schedule_is_kept_by_it_alone(tmp_path):
    run(
        tmp_path,
        savers=[ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")],
        max_epochs=2,
    )
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize("saver", [{"save_top_k": 0}, {"save_top_k": 0, "monitor": "val/r2", "mode": "max"}])
def test_a_callback_that_is_to_save_nothing_saves_nothing(tmp_path, saver):
    run(tmp_path, savers=[ModelCheckpoint(tmp_path, **saver)], check_val_every_n_epoch=2, max_epochs=3)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_trial_run_saves_nothing(tmp_path):
    run(tmp_path, savers=[last(tmp_path)], fast_dev_run=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_state_is_none_of_averages(tmp_path):
    flags = {"check_val_every_n_epoch": 4, "max_epochs": 3}
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    averaged = run(tmp_path / "swa", savers=[last(tmp_path / "swa")], callbacks=[average], **flags)
    saved = torch.load(tmp_path / "swa" / "last.ckpt", weights_only=True)["state_dict"]
    differing = [name for name, value in averaged.state_dict().items() if not torch.equal(saved[name], value)]
    assert any("core" in name for name in differing)


def test_a_later_fit_of_the_same_trainer_saves_its_own_end(tmp_path):
    task = CompletionTask("tucker", 2, shape=(13, 4, 12, 8), optimizer=adam())
    data = CompletionDataModule("il2", observed_fraction=0.5, batch_size=500, seed=1)
    fit = trainer(
        tmp_path, enable_checkpointing=True, callbacks=[last(tmp_path)], max_epochs=1, check_val_every_n_epoch=4
    )
    fit.fit(task, data)
    fit.fit_loop.max_epochs = 3
    fit.fit(task, data)
    assert torch.load(fit.checkpoint_callback.best_model_path, weights_only=True)["global_step"] == fit.global_step
