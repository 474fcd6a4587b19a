import csv
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.cores import CoreGroup, CoreProvider
from tenzoo.dynamics import deviation_aware_factors, norm_deviation, squared_norms
from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, adam, assert_same_weights, fitted, sgd, trainer


class Gradients(Callback):
    """Records cores and gradients just before DAS acts: to be listed ahead of it."""

    def __init__(self):
        self.cores, self.grads = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        cores = list(pl_module.weight.cores)
        self.cores.append([core.detach().clone() for core in cores])
        self.grads.append([None if core.grad is None else core.grad.clone() for core in cores])


class Two(LightningModule, CoreProvider):
    """Two tensors of two cores, one optimizer each (or a split of the first over both), stepped by hand."""

    def __init__(self, *, split=False, first=True, second=True, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b, self.c, self.d = (
            nn.Parameter(size * torch.randn(3, 3, generator=generator).to(dtype)) for size in (1.0, 2.0, 3.0, 0.5)
        )
        self.automatic_optimization = False
        self.split, self.first, self.second = split, first, second

    def core_groups(self):
        return [CoreGroup("first", (self.a, self.b)), CoreGroup("second", (self.c, self.d))]

    def configure_optimizers(self):
        if self.split:
            return [torch.optim.SGD([self.a], lr=0.01), torch.optim.SGD([self.b, self.c, self.d], lr=0.01)]
        return [torch.optim.SGD([self.a, self.b], lr=0.01), torch.optim.SGD([self.c, self.d], lr=0.01)]

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward((self.a @ self.b).square().sum() + (self.c @ self.d).square().sum())
        for wanted, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            if wanted:
                optimizer.step()


def expected_step(cores, grads, lr, alpha, scale=lambda factors: 1 + factors, **kwargs):
    factors = deviation_aware_factors(squared_norms(cores), squared_norms(grads), lr=lr, alpha=alpha, **kwargs)
    return [core * f - lr * grad for core, grad, f in zip(cores, grads, scale(factors), strict=True)]


@pytest.mark.parametrize("optimizer", [sgd(momentum=0.9), adam()])
@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_alpha_zero_is_no_callback_bit_for_bit(optimizer, gauge_fixed):
    """20 optimizer steps, with accumulation and clipping."""
    settings = {
        "optimizer": optimizer,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.05,
        "fit": {"max_epochs": 10},
    }
    das = DeviationAwareScaling(0.0, gauge_fixed=gauge_fixed)
    assert_same_weights(fitted(**settings), fitted(callbacks=[das], **settings))


@pytest.mark.parametrize("gauge_fixed", [False, True])
def test_a_step_scales_then_descends_by_the_unscaled_gradient(gauge_fixed):
    before = Gradients()
    das = DeviationAwareScaling(0.4, gauge_fixed=gauge_fixed)
    model = fitted(callbacks=[before, das], fit={"max_epochs": 1}, batches=Batches(count=1), optimizer=sgd())
    scale = torch.exp if gauge_fixed else (lambda factors: 1 + factors)
    expected = expected_step(before.cores[0], before.grads[0], 0.1, 0.4, scale, gauge_fixed=gauge_fixed)
    for core, value in zip(model.weight.cores, expected, strict=True):
        torch.testing.assert_close(core.detach(), value)


def test_gradients_are_accumulated_and_not_yet_clipped():
    before = Gradients()
    kwargs = {"optimizer": sgd(), "accumulate_grad_batches": 4, "gradient_clip_val": 1e-3}
    model = fitted(callbacks=[before, DeviationAwareScaling(4.0)], fit={"max_epochs": 1}, **kwargs)
    assert len(before.grads) == 1
    grads = before.grads[0]
    assert squared_norms(grads).sum().sqrt() > 1e-2
    factors = deviation_aware_factors(squared_norms(before.cores[0]), squared_norms(grads), lr=0.1, alpha=4.0)
    assert 5e-3 < factors.abs().max() < 0.1
    for core, old, factor in zip(model.weight.cores, before.cores[0], factors, strict=True):
        torch.testing.assert_close(core.detach(), old * (1 + factor), rtol=0, atol=1.1e-4)  # 0.1 × a gradient ≤ 1e-3


def test_each_core_uses_the_learning_rate_and_momentum_of_its_own_parameter_group():
    class Split(Regression):
        def configure_optimizers(self):
            cores = list(self.weight.cores)
            rest = [p for p in self.parameters() if all(p is not core for core in cores)]
            groups = [{"params": rest}, {"params": cores[:1], "lr": 0.2, "momentum": 0.5}, {"params": cores[1:]}]
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    before = Gradients()
    torch.manual_seed(1)
    model = Split()
    das = DeviationAwareScaling(0.4, momentum_correction=True)
    trainer(max_epochs=1, callbacks=[before, das]).fit(model, Batches(count=1), Batches())
    lr = torch.tensor([0.2, 0.1, 0.1])
    strength = torch.tensor([0.4 / 0.5, 0.4 / 0.1, 0.4 / 0.1])
    cores, grads = before.cores[0], before.grads[0]
    factors = deviation_aware_factors(squared_norms(cores), squared_norms(grads), lr=lr, alpha=strength)
    assert factors.abs().max() < 0.1
    for core, old, grad, factor, rate in zip(model.weight.cores, cores, grads, factors, lr, strict=True):
        torch.testing.assert_close(core.detach(), old * (1 + factor) - rate * grad)


def test_the_formula_is_given_the_rate_and_the_strength_by_name(monkeypatch):
    given = []

    def spy(s, gamma, **kwargs):
        given.append((kwargs["lr"], kwargs["alpha"]))
        return deviation_aware_factors(s, gamma, **kwargs)

    monkeypatch.setattr("tenzoo.callbacks.scaling.deviation_aware_factors", spy)
    fitted(callbacks=[DeviationAwareScaling(0.4)], optimizer=sgd(), fit={"max_epochs": 1}, batches=Batches(count=1))
    corrected = DeviationAwareScaling(0.04, momentum_correction=True)
    fitted(callbacks=[corrected], optimizer=sgd(momentum=0.5), fit={"max_epochs": 1}, batches=Batches(count=1))
    assert given == [(0.1, 0.4), (0.1, 0.08)]


def test_a_tensor_learning_rate():
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=torch.tensor(0.1))

    plain = fitted(callbacks=[DeviationAwareScaling(0.4)], optimizer=sgd(), fit={"max_epochs": 1})
    model = fitted(callbacks=[DeviationAwareScaling(0.4)], optimizer=optimizer, fit={"max_epochs": 1})
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_the_global_normalizer_divides_by_the_norm_over_all_parameters():
    norms = []

    class Norm(Gradients):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            norms.append(squared_norms([p.grad for p in pl_module.parameters()]).sum().sqrt())

    before = Norm()
    das = DeviationAwareScaling(0.4, normalizer="global")
    model = fitted(callbacks=[before, das], fit={"max_epochs": 1}, batches=Batches(count=1), optimizer=sgd())
    expected = expected_step(before.cores[0], before.grads[0], 0.1, 0.4, grad_norm=norms[0])
    for core, value in zip(model.weight.cores, expected, strict=True):
        torch.testing.assert_close(core.detach(), value)


def test_the_bound_shrinks_a_group_by_one_factor_and_is_counted(tmp_path):
    before = Gradients()
    das = DeviationAwareScaling(1e4, max_scale=0.01)
    logger = CSVLogger(tmp_path, name="", version="")
    torch.manual_seed(1)
    model = Regression(optimizer=sgd(lr=0.1))
    trainer(tmp_path, max_epochs=1, callbacks=[before, das], logger=logger).fit(model, Batches(count=1), Batches())
    cores, grads = before.cores[0], before.grads[0]
    s = squared_norms(cores)
    factors = deviation_aware_factors(s, squared_norms(grads), lr=0.1, alpha=1e4)
    bounded = factors * 0.01 / factors.abs().max()
    assert (bounded * s).sum().abs() < 1e-6
    for core, old, grad, factor in zip(model.weight.cores, cores, grads, bounded, strict=True):
        torch.testing.assert_close(core.detach(), old * (1 + factor) - 0.1 * grad)
    with (tmp_path / "metrics.csv").open() as file:
        logged = next(row for row in csv.DictReader(file) if row["das/bound_hit_rate"])
    assert (logged["step"], float(logged["das/bound_hit_rate"])) == ("0", 1.0)
    assert float(logged["das/max_abs_lambda"]) == pytest.approx(factors.abs().max().item())


@pytest.mark.parametrize(("schedule", "expected"), [("linear", [1, 0.75, 0.5, 0.25]), ("cosine", None)])
def test_alpha_falls_over_the_run(schedule, expected):
    das = DeviationAwareScaling(1.0, alpha_schedule=schedule)
    fitted(callbacks=[das], fit={"max_epochs": 1}, optimizer=sgd(lr=1e-3))
    expected = expected or [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [das.current_alpha(step) for step in range(4)] == pytest.approx(expected)
    assert das.current_alpha(4) == das.current_alpha(9) == 0


class Watch(DeviationAwareScaling):
    """Remembers the α of every scaling."""

    def __init__(self):
        super().__init__(1.0, alpha_schedule="linear")
        self.seen = []

    def current_alpha(self, step):
        self.seen.append(super().current_alpha(step))
        return self.seen[-1]


@pytest.mark.parametrize("sam", [None, SAM(rho=0.0)])
@pytest.mark.parametrize("bound", [{"max_epochs": 2}, {"max_steps": 4, "max_epochs": -1}])
def test_alpha_falls_by_optimizer_steps_under_accumulation(sam, bound):
    das = Watch()
    fitted(callbacks=[das], fit=bound, optimizer=sgd(lr=1e-3), sam=sam, accumulate_grad_batches=2)
    assert das.seen == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("bound", [{"max_epochs": 1}, {"max_steps": 8}])
def test_alpha_falls_alike_for_several_optimizers(bound):
    class Two(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.error(batch).backward()
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.weight, self.inner)]

    das = Watch()
    trainer(callbacks=[das], **bound).fit(Two(), Batches(), Batches())
    assert das.seen == pytest.approx([1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("damage", ["missing", "nan", "inf", "zero", "frozen"])
def test_a_group_without_proper_gradients_is_skipped(damage):
    class Damaged(Regression):
        def on_before_optimizer_step(self, optimizer):
            for core in self.weight.cores:  # the optimizer itself shall not move them either
                core.grad = None

    class Damage(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            core = pl_module.weight.cores[1]
            if damage == "missing":
                core.grad = None
            elif damage == "zero":
                for each in pl_module.weight.cores:
                    each.grad.zero_()
            elif damage != "frozen":
                core.grad[0] = float(damage)

    torch.manual_seed(1)
    model = Damaged(optimizer=sgd())
    if damage == "frozen":  # one trainable core is left: nothing to balance it against
        model.weight.cores[1].requires_grad_(False)
        model.weight.cores[2].requires_grad_(False)
    before = [core.detach().clone() for core in model.weight.cores]
    trainer(callbacks=[Damage(), DeviationAwareScaling(0.5)], max_epochs=1).fit(model, Batches(), Batches())
    assert all(core.equal(old) for core, old in zip(model.weight.cores, before, strict=True))


def test_only_trainable_cores_are_counted():
    before = Gradients()
    torch.manual_seed(1)
    model = Regression(optimizer=sgd())
    model.weight.cores[1].requires_grad_(False)
    trainer(callbacks=[before, DeviationAwareScaling(0.5)], max_epochs=1).fit(model, Batches(count=1), Batches())
    cores = [before.cores[0][0], before.cores[0][2]]
    grads = [before.grads[0][0], before.grads[0][2]]
    expected = expected_step(cores, grads, 0.1, 0.5)
    torch.testing.assert_close(model.weight.cores[0].detach(), expected[0])
    torch.testing.assert_close(model.weight.cores[2].detach(), expected[1])
    assert model.weight.cores[1].equal(before.cores[0][1])


def test_a_core_that_is_thawed_later_joins():
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.weight.cores[1].requires_grad_(True)

    before = Gradients()
    torch.manual_seed(1)
    model = Regression(optimizer=sgd())
    model.trainable_parameters = model.parameters
    model.weight.cores[1].requires_grad_(False)
    trainer(callbacks=[Thaw(), before, DeviationAwareScaling(0.5)], max_epochs=2).fit(
        model, Batches(count=1), Batches()
    )
    expected = expected_step(before.cores[1], before.grads[1], 0.1, 0.5)
    for core, value in zip(model.weight.cores, expected, strict=True):
        torch.testing.assert_close(core.detach(), value)


def test_freezing_in_turns_is_noticed_in_every_step():
    class Turns(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for number, core in enumerate(pl_module.weight.cores):
                core.requires_grad_(number != batch_idx % 3)

    class Frozen(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            cores = list(pl_module.weight.cores)
            self.seen = [(core, core.detach().clone(), core.requires_grad) for core in cores]
            trained = [core for core in cores if core.requires_grad]
            s, gamma = squared_norms([*trained, *(core.grad for core in trained)]).view(2, -1)
            self.factors = deviation_aware_factors(s, gamma, lr=0.1, alpha=0.05)

    class Check(Callback):
        checked = 0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            factors = iter((frozen.factors + 1).tolist())
            for core, before, trained in frozen.seen:
                expected = before * next(factors) if trained else before
                torch.testing.assert_close(core.detach(), expected)
                assert trained != core.detach().equal(before)
            Check.checked += 1

    frozen = Frozen()
    fitted(callbacks=[Turns(), frozen, DeviationAwareScaling(0.05), Check()], optimizer=sgd(), fit={"max_epochs": 2})
    assert Check.checked == 8


@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_gradients_whose_squares_leave_float32_count(scale):
    """The loss in another unit: λ of plain training grows with it, so α does not."""
    torch.manual_seed(0)
    target = torch.randn(5, 3)

    def scaled(dtype):
        torch.manual_seed(0)
        weight = Regression().weight.to(dtype)
        loss = (weight.reconstruct() - target.to(dtype)).square().sum() * scale
        loss.backward()
        s, gamma = squared_norms([*weight.cores, *(core.grad for core in weight.cores)]).view(2, -1)
        return deviation_aware_factors(s, gamma, lr=0.1, alpha=0.05 / scale)

    exact = scaled(torch.float64)
    assert exact.abs().max() > 1e-4
    torch.testing.assert_close(scaled(torch.float32), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_with_two_optimizers_only_the_one_that_steps_acts(first, second):
    model = Two(first=first, second=second)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {"a": 2 * old["a"] @ old["b"] @ old["b"].T, "b": 2 * old["a"].T @ old["a"] @ old["b"]}
    grads |= {"c": 2 * old["c"] @ old["d"] @ old["d"].T, "d": 2 * old["c"].T @ old["c"] @ old["d"]}
    trainer(callbacks=[DeviationAwareScaling(0.3)], max_epochs=1).fit(model, Batches(count=1))
    for names, stepped in (("ab", first), ("cd", second)):
        expected = [old[name] for name in names]
        if stepped:
            expected = expected_step(expected, [grads[name] for name in names], 0.01, 0.3)
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(getattr(model, name).detach(), value, rtol=1e-5, atol=1e-6)


def test_a_group_split_over_two_optimizers_is_refused():
    with pytest.raises(ValueError, match="cores of 'first' in one optimizer, got them in 2"):
        trainer(callbacks=[DeviationAwareScaling(0.3)]).fit(Two(split=True), Batches(count=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_cores_are_refused(dtype):
    name = str(dtype).replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"float32 or float64 cores for DeviationAwareScaling, got {name} in 'first'"):
        trainer(callbacks=[DeviationAwareScaling(0.3)]).fit(Two(dtype=dtype), Batches(count=1))


class Thawing(Callback):
    """Freezes some parameters, until the second batch."""

    def __init__(self, *names):
        self.names = names

    def setup(self, trainer, pl_module, stage):
        for name in self.names:
            pl_module.get_parameter(name).requires_grad_(False)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            for name in self.names:
                pl_module.get_parameter(name).requires_grad_(True)


def test_what_is_wrong_with_cores_that_are_thawed_is_refused_then():
    callbacks = [Thawing("a"), DeviationAwareScaling(0.3)]
    with pytest.raises(ValueError, match="cores of 'first' in one optimizer, got them in 2"):
        trainer(callbacks=callbacks, max_epochs=1).fit(Two(split=True), Batches(count=3))
    halved = Two()
    for parameter in (halved.a, halved.b):
        parameter.data = parameter.data.bfloat16()
    callbacks = [Thawing("a", "b"), DeviationAwareScaling(0.3)]
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 in 'first'"):
        trainer(callbacks=callbacks, max_epochs=1).fit(halved, Batches(count=3))


@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_gradients_beyond_the_range_of_float32_squares(scale):
    """As with the learning rate divided by what the gradients are multiplied by."""

    def scaled(factor):
        class Times(Two):
            def training_step(self, batch, batch_idx):
                self.zero_grad()
                self.manual_backward(factor * ((self.a @ self.b).square().sum() + (self.c @ self.d).square().sum()))
                for optimizer in self.optimizers():
                    for group in optimizer.param_groups:
                        group["lr"] = 1e-4 / factor
                    optimizer.step()

        model = Times()
        trainer(callbacks=[DeviationAwareScaling(0.3)], max_epochs=1).fit(model, Batches(count=2))
        return model

    plain, far = scaled(1.0), scaled(scale)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(far.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain.a, Two().a)


def test_what_is_refused_before_training():
    class Plain(Regression):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.weight = nn.Linear(3, 5)

    def refusal(model, match, das=None, **kwargs):
        with pytest.raises(ValueError, match=match):
            trainer(callbacks=[das or DeviationAwareScaling(0.3)], **kwargs).fit(model, Batches(), Batches())
        assert model.trainer.global_step == 0

    refusal(Plain(), "model with core groups for DeviationAwareScaling, found none in Plain")
    refusal(Regression(optimizer=torch.optim.LBFGS), "first-order optimizer for DeviationAwareScaling, got LBFGS")
    corrected = DeviationAwareScaling(0.3, momentum_correction=True)
    refusal(
        Regression(optimizer=sgd()), "SGD with momentum for `momentum_correction`, got SGD with momentum 0", corrected
    )
    refusal(Regression(optimizer=adam()), "`momentum_correction`, got Adam with momentum None", corrected)
    endless = DeviationAwareScaling(0.3, alpha_schedule="linear")
    refusal(
        Regression(), "max_steps or max_epochs on the Trainer for `alpha_schedule` 'linear'", endless, max_epochs=-1
    )


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"alpha": -0.1}, "`alpha`, got -0.1"),
        ({"alpha": math.nan}, "`alpha`, got nan"),
        ({"alpha": 1, "normalizer": "layer"}, "'group' or 'global' in `normalizer`, got 'layer'"),
        ({"alpha": 1, "alpha_schedule": "step"}, "`alpha_schedule`, got 'step'"),
        ({"alpha": 1, "max_scale": 0}, "`max_scale`, got 0"),
        ({"alpha": 1, "max_scale": 1.5}, "`max_scale`, got 1.5"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        DeviationAwareScaling(**kwargs)


def test_float16_gradients_count_without_the_loss_scale():
    """Fused optimizers unscale in their own step: the callback must divide by the scale itself."""
    results = []
    for fused in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        fit = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "max_epochs": 1}
        das = DeviationAwareScaling(0.5, normalizer="global")
        results.append(fitted(callbacks=[das], fit=fit, optimizer=adam(fused=fused)))
        assert scaler.get_scale() == 2.0**10
    for one, two in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_nothing_waits_for_the_device_in_a_step():
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read from the device"
            return func(*args, **(kwargs or {}))

    class Guarded(DeviationAwareScaling):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            with NoSync():
                super().on_before_optimizer_step(trainer, pl_module, optimizer)
            nonlocal calls
            calls += 1

    calls = 0
    settings = {"fit": {"log_every_n_steps": 100}, "optimizer": sgd(momentum=0.9)}
    for kwargs in ({}, {"gauge_fixed": True, "normalizer": "global", "momentum_correction": True}):
        fitted(callbacks=[Guarded(0.3, **kwargs)], **settings)
    assert calls == 40
    with pytest.raises(AssertionError, match="was read"), NoSync():
        torch.ones(1).item()


def test_it_moves_q_as_sam_does_over_a_run():
    """With a positive covariance both grow Q, beyond what the plain optimizer does."""
    settings = {"optimizer": sgd(lr=0.05), "fit": {"max_epochs": 20}, "batches": Batches(count=4, size=64)}

    def deviation(model):
        return norm_deviation(squared_norms([core.detach().double() for core in model.weight.cores])).item()

    plain = deviation(fitted(**settings))
    das = deviation(fitted(callbacks=[DeviationAwareScaling(0.1)], **settings))
    sam = deviation(fitted(sam={"rho": 0.1, "scope": "cores"}, **settings))
    assert (das - plain) * (sam - plain) > 0
    assert das - plain == pytest.approx(sam - plain, rel=0.5)
