"""What every callback that works on cores refuses."""

import pytest
from lightning.pytorch import LightningModule, Trainer

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor, Rebalance


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
