"""What the monitor keeps of a run, in its figure and in checkpoints."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from tenzoo.callbacks import NormDynamicsMonitor
from tests.callbacks.test_monitor import Alternating, Many, monitored
from tests.tasks.toy import Batches, Regression, adam, fitted, sgd, trainer


def test_a_group_that_is_frozen_midway_keeps_its_place_in_the_figure():
    class Freeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                pl_module.weight.requires_grad_(False)

    monitor = NormDynamicsMonitor()
    torch.manual_seed(1)
    model = Many(optimizer=sgd())
    trainer(callbacks=[Freeze(), monitor], max_epochs=1).fit(model, Batches(), Batches())
    other = NormDynamicsMonitor()
    other.load_state_dict(monitor.state_dict())
    lines = {line.get_label(): list(line.get_xdata()) for line in other.figure().axes[0].get_lines()}
    assert lines["weight"] == [1, 2]
    assert lines["more.0"] == [1, 2, 3, 4]


def test_histories_of_older_checkpoints_are_read():
    monitor = NormDynamicsMonitor()
    monitor.load_state_dict({"steps": [1, 2, 3], "history": {"weight": [(1.0, 0.1), (2.0, 0.2)], "total": []}})
    assert monitor.state_dict() == {"history": {"weight": [(2, 1.0, 0.1), (3, 2.0, 0.2)], "total": []}}


def test_a_figure_is_drawn_at_the_end(tmp_path):
    monitored(tmp_path, optimizer=adam())
    assert (tmp_path / "norm_dynamics.png").stat().st_size > 10_000


def test_the_history_survives_a_checkpoint():
    monitor = NormDynamicsMonitor()
    fitted(callbacks=[monitor], optimizer=sgd(), fit={"max_epochs": 1})
    other = NormDynamicsMonitor()
    other.load_state_dict(monitor.state_dict())
    lines = other.figure().axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["weight"]
    assert list(lines[0].get_xdata()) == [1, 2, 3, 4]


@pytest.mark.parametrize("same_trainer", [False, True])
def test_a_new_fit_begins_a_new_history_and_a_trainer_that_goes_on_does_not(same_trainer):
    monitor = NormDynamicsMonitor()
    first = trainer(callbacks=[monitor], max_epochs=1)
    first.fit(Regression(optimizer=sgd()), Batches(), Batches())
    second = first if same_trainer else trainer(callbacks=[monitor], max_epochs=2)
    second.validate(Regression(), Batches(), verbose=False)
    assert len(monitor.state_dict()["history"]["weight"]) == 4
    second.fit_loop.max_epochs = 2
    second.fit(Regression(optimizer=sgd()), Batches(), Batches())
    assert [row[0] for row in monitor.state_dict()["history"]["weight"]] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_resume_goes_on_with_the_history_amid_freezing(tmp_path):
    def run(path, epochs, ckpt_path=None):
        torch.manual_seed(1)
        monitor, model = NormDynamicsMonitor(), Regression(optimizer=sgd())
        fit = trainer(
            path, callbacks=[Alternating(), monitor], logger=CSVLogger(path, name="", version=""), max_epochs=epochs
        )
        fit.fit(model, Batches(), Batches(), ckpt_path=ckpt_path)
        return fit, monitor.state_dict()

    first, _ = run(tmp_path / "first", 2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(tmp_path / "resumed", 4, tmp_path / "half.ckpt")
    _, whole = run(tmp_path / "whole", 4)
    assert len(whole["history"]["weight"]) == 16
    assert resumed == whole
