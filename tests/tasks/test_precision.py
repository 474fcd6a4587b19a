"""Mixed precision, fused and foreach optimizers: what SAM and DAS do is what they do in float32."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.cores import find_core_groups
from tenzoo.data import CompletionDataModule
from tenzoo.dynamics import norm_deviation, squared_norms
from tenzoo.tasks import SAM, CompletionTask
from tests.tasks.test_sam_state import Indices, Layers, plugins
from tests.tasks.toy import adam, assert_same_weights, sgd, trainer

IMPLEMENTATIONS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


class Observed(Callback):
    """Cores before and after what stands between two of these in the list of callbacks."""

    def __init__(self):
        self.cores = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.cores.append([core.detach().clone() for group in find_core_groups(pl_module) for core in group.cores])


class Moved(Layers):
    """Remembers how far SAM moves the weights."""

    def loss(self, batch, batch_idx):
        now = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])
        if self.perturbed:
            self.radii.append((now - self.start).norm().item())
        else:
            self.start = now
        return super().loss(batch, batch_idx)


def step(precision, implementation, *, make=sgd, sam=None):
    """One step of a network with every kind of tensorized layer: λ, ρ, Q, Cov and γ, and the network."""
    torch.manual_seed(1)
    model = Moved("tt", "reconstruct", optimizer=make(lr=0.05, **IMPLEMENTATIONS[implementation]), sam=sam)
    model.radii = []
    before, after, monitor = Observed(), Observed(), NormDynamicsMonitor()
    das = DeviationAwareScaling(20.0, max_scale=0.9)
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[before, das, after, monitor], **plugins(precision))
    fit.fit(model, Indices())
    pairs = zip(before.cores[0], after.cores[0], strict=True)
    factors = torch.stack([new.double().norm() / old.double().norm() - 1 for old, new in pairs])
    _, *history = monitor._history["total"][0]
    gamma = None if sam is None else model.sharpness_state.squared_grad_norms
    return {"factors": factors, "radii": model.radii, "deviation": history[0], "covariance": history[1], "gamma": gamma}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("sam", [None, SAM(rho=0.1)])
def test_every_precision_and_optimizer_scales_and_moves_as_float32(precision, implementation, sam):
    reference, observed = step("64-true", "loop", sam=sam), step(precision, implementation, sam=sam)
    tolerance = 1e-4 if precision == "32-true" else 0.06  # gradients in bfloat16 are good to three digits at best
    largest = reference["factors"].abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(
        observed["factors"].double(), reference["factors"], rtol=tolerance, atol=largest * tolerance
    )
    assert observed["deviation"] == pytest.approx(reference["deviation"], rel=1e-5)  # of the weights, which are float32
    assert observed["covariance"] == pytest.approx(reference["covariance"], rel=tolerance)
    if sam is not None:
        assert observed["radii"] == pytest.approx([0.1], rel=1e-3)
        assert observed["gamma"].sum().item() == pytest.approx(reference["gamma"].sum().item(), rel=tolerance)


def test_q_is_that_of_the_cores():
    """The monitor's deviation above, by its definition."""
    torch.manual_seed(1)
    model = Layers("tt", "reconstruct")
    groups = [torch.stack([core.detach().double().square().sum() for core in g.cores]) for g in find_core_groups(model)]
    q = sum(norm_deviation(s).item() for s in groups)
    assert step("16-mixed", "fused")["deviation"] == pytest.approx(q, rel=1e-5)
    assert squared_norms([torch.ones(3)]).item() == pytest.approx(3, rel=1e-15)


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sam", [None, SAM(rho=0.1)])
def test_an_overflow_changes_no_core(implementation, sam, make):
    kwargs = {"momentum": 0.9} if make is sgd else {}
    torch.manual_seed(1)
    model = Layers("tr", "reconstruct", optimizer=make(lr=0.05, **kwargs, **IMPLEMENTATIONS[implementation]), sam=sam)
    old = [parameter.detach().clone() for parameter in model.parameters()]
    settings = plugins("16-mixed")
    scaler = settings["plugins"][0].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    monitor = NormDynamicsMonitor()
    trainer(max_epochs=1, callbacks=[DeviationAwareScaling(0.3), monitor], **settings).fit(model, Indices())
    assert scaler.get_scale() < 2.0**60
    assert all(parameter.equal(before) for parameter, before in zip(model.parameters(), old, strict=True))
    deviations = [row[1] for row in monitor._history.get("total", [])]
    assert all(math.isfinite(deviation) for deviation in deviations)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("method", ["sam", "das"])
def test_strength_zero_is_plain_with_every_implementation(implementation, method):
    ends = []
    for zero in (False, True):
        torch.manual_seed(1)
        sam = SAM(rho=0) if zero and method == "sam" else None
        made = adam(lr=0.01, **IMPLEMENTATIONS[implementation])
        model = Layers("cp", "contract", optimizer=made, sam=sam, gradient_clip_val=0.5)
        callbacks = [DeviationAwareScaling(0.0)] if zero and method == "das" else []
        trainer(max_epochs=2, callbacks=callbacks, **plugins("bf16-mixed")).fit(model, Indices())
        ends.append(model)
    assert_same_weights(*ends)


def test_values_far_from_zero_are_not_rounded_in_mixed_precision(tmp_path):
    """Beside a location of 1,000 and a scale of 1 the numbers of a half type are 4 apart."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.normal(size=(n, 2)) for n in (8, 7, 6))
    np.save(tmp_path / "far.npy", 1000 + np.einsum("ir,jr,kr->ijk", a, b, c))
    torch.manual_seed(0)
    data = CompletionDataModule(str(tmp_path / "far.npy"), observed_fraction=0.8, standardize=True, seed=1)
    task = CompletionTask("cp", 3, init_std=0.5, optimizer=adam(0.05))
    fit = trainer(max_epochs=150, precision="bf16-mixed")
    fit.fit(task, data)
    fit.validate(task, data, verbose=False)
    cores = [core.detach().double() for core in task.model.tensor.cores]
    values = torch.einsum("ar,br,cr->abc", *cores) * data.scale + data.location
    entries = data.splits["train"]
    wrong = values[tuple(entries.index.T)] - entries.value.double()
    exact = 1 - wrong.square().sum() / (entries.value - entries.value.mean()).double().square().sum()
    assert exact > 0.8
    assert float(fit.logged_metrics["train/r2"]) == pytest.approx(float(exact), abs=5e-3)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_values_are_not_rounded_to_true_half_precision(precision):
    task, data = CompletionTask("cp", 3, optimizer=adam()), CompletionDataModule("il2", observed_fraction=0.5)
    with pytest.raises(ValueError, match=f"float32 or float64 weights for CompletionTask, got '{precision}'"):
        trainer(precision=precision).fit(task, data)
