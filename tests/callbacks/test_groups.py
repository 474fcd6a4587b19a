"""What every callback that works on cores refuses."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, Rebalance
from tests.callbacks.test_scaling import Thawing, Two
from tests.tasks.toy import Batches, trainer


class OwnScaling(DeviationAwareScaling):
    """A user's."""


def setup(*callbacks):
    trainer = Trainer(callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False)
    for callback in callbacks:
        callback.setup(trainer, LightningModule(), "fit")


@pytest.mark.parametrize(
    ("callbacks", "name"),
    [
        ([DeviationAwareScaling(1.0), DeviationAwareScaling(1.0)], "DeviationAwareScaling"),
        ([DeviationAwareScaling(1.0), DeviationAwareScaling(2.0, gauge_fixed=True)], "DeviationAwareScaling"),
        ([OwnScaling(1.0), DeviationAwareScaling(1.0)], "DeviationAwareScaling"),
        ([Rebalance(), Rebalance()], "Rebalance"),
    ],
)
def test_two_of_a_kind_are_refused(callbacks, name):
    with pytest.raises(ValueError, match=f"^expected one {name} in `trainer.callbacks`, got 2"):
        setup(*callbacks)


def test_one_of_each_kind_is_not():
    setup(DeviationAwareScaling(1.0), NormDynamicsMonitor(), Rebalance())


class Toggling(Two):
    """Trains the parameters of one optimizer at a time, as Lightning's users do."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward((self.a @ self.b).square().sum() + (self.c @ self.d).square().sum())
            optimizer.step()
            self.untoggle_optimizer(optimizer)


BOTH = pytest.mark.parametrize(
    "make", [lambda: DeviationAwareScaling(0.3), NormDynamicsMonitor], ids=["das", "monitor"]
)


@BOTH
@pytest.mark.parametrize("kind", [Two, Toggling])
def test_a_group_that_is_split_over_two_optimizers_is_refused(make, kind):
    model = kind(split=True)
    with pytest.raises(ValueError, match=r"^expected the cores of 'first' in one optimizer, got them in 2"):
        trainer(callbacks=[make()]).fit(model, Batches(count=1))
    assert model.a.equal(Two().a)


@BOTH
def test_a_split_that_shows_when_a_core_is_thawed_is_refused_then(make):
    with pytest.raises(ValueError, match=r"^expected the cores of 'first' in one optimizer, got them in 2"):
        trainer(callbacks=[Thawing("a"), make()], max_epochs=1).fit(Two(split=True), Batches(count=3))


@BOTH
def test_groups_of_one_optimizer_each_may_be_toggled(make):
    trainer(callbacks=[make()], max_epochs=1).fit(Toggling(), Batches(count=2))


@BOTH
def test_two_optimizers_may_have_the_same_cores(make):
    class Twice(Two):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=lr) for lr in (0.01, 0.001)]

    trainer(callbacks=[make()], max_epochs=1).fit(Twice(), Batches(count=2))
