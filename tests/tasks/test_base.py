import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, adam, assert_same_weights, sgd, trainer


@pytest.mark.parametrize("sam", [None, SAM()])
@pytest.mark.parametrize(("name", "value"), [("gradient_clip_val", 1), ("accumulate_grad_batches", 2)])
def test_the_trainers_own_arguments_are_refused_with_the_tasks_named(sam, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` as an argument of the task, got {value} on the Trainer; write"):
        trainer(**{name: value}).fit(Regression(sam=sam), Batches(), Batches())


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"gradient_clip_val": 0.0}, "positive number or null in `gradient_clip_val`, got 0.0"),
        ({"gradient_clip_val": float("nan")}, "`gradient_clip_val`, got nan"),
        ({"gradient_clip_algorithm": "l3"}, "'norm' or 'value' in `gradient_clip_algorithm`, got 'l3'"),
        ({"accumulate_grad_batches": 0}, "int >= 1 in `accumulate_grad_batches`, got 0"),
        ({"accumulate_grad_batches": True}, "int >= 1 in `accumulate_grad_batches`, got True"),
        ({"lr_scheduler_interval": "week"}, "'epoch' or 'step' in `lr_scheduler_interval`, got 'week'"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Regression(**kwargs)


def test_clipping_bounds_what_the_optimizer_sees():
    class Norms(Regression):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            norms.append(torch.sqrt(sum(p.grad.square().sum() for p in self.parameters())).item())

    norms: list[float] = []
    for sam in (None, SAM(rho=0.1)):
        torch.manual_seed(1)
        trainer(max_epochs=1).fit(Norms(sam=sam, gradient_clip_val=0.01), Batches(), Batches())
    assert norms == pytest.approx([0.01] * 8, rel=1e-3)


def test_accumulation_leaves_the_trainer_as_it_was():
    fit = trainer(max_epochs=1)
    fit.fit(Regression(accumulate_grad_batches=4, optimizer=sgd()), Batches(), Batches())
    assert fit.global_step == 1
    assert fit.accumulate_grad_batches == 1


def test_a_plateau_scheduler_without_its_metric():
    model = Regression(
        optimizer=sgd(),
        sam=SAM(),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        lr_scheduler_monitor="val/los",
    )
    with pytest.raises(
        ValueError, match=r"logged metric in `lr_scheduler_monitor`, got 'val/los'; logged are \['train"
    ):
        trainer().fit(model, Batches(), Batches())


def test_clipping_a_fused_optimizer_under_float16_is_refused():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    model = Regression(optimizer=adam(fused=True), gradient_clip_val=1.0)
    with pytest.raises(ValueError, match="without fused=True with `gradient_clip_val`"):
        trainer(plugins=[plugin]).fit(model, Batches(), Batches())


def test_checkpoints_hold_tensors_and_builtins_only(tmp_path):
    model = Regression(sam=SAM(rho=0.2), optimizer=adam(), norm=True)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[DeviationAwareScaling(0.1)])
    fit.fit(model, Batches(), Batches())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["sam"] == {"rho": 0.2, "adaptive": False, "scope": "all", "sync_ascent": True}
    assert "optimizer" not in checkpoint["hyper_parameters"]
    again = Regression.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.sam == SAM(rho=0.2)
    assert_same_weights(model, again)
