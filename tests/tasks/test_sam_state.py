"""What SAM's two passes may not change: the precision of backward passes, and state that a forward pass moves."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torchmetrics import MeanSquaredError, Metric

from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear
from tenzoo.tasks import SAM, Task
from tests.tasks.toy import Batches, Regression, assert_same_weights, fitted, sgd, trainer

WAYS = [
    ("32-true", "contract"),
    ("64-true", "reconstruct"),
    ("bf16-mixed", "reconstruct"),
    ("bf16-mixed", "contract"),
    ("16-mixed", "reconstruct"),
    ("16-mixed", "contract"),
]


def plugins(precision):
    """As the Trainer's ``precision``, and float16 on a CPU, which Lightning leaves out."""
    if precision == "16-mixed":
        return {"plugins": [MixedPrecision(precision, "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))]}
    return {"precision": precision}


class Layers(Task):
    """Tensorized layers of every kind in one format, a batch norm, and a dense head that autocast casts."""

    def __init__(self, factorization, contraction, **kwargs):
        super().__init__(**kwargs)
        made = {"factorization": factorization, "rank": 3, "implementation": contraction}
        self.embedding = TensorizedEmbedding(16, 16, factorization=factorization, rank=3)
        self.conv = TensorizedConv2d(4, 8, 3, padding=1, **made)
        self.norm = nn.BatchNorm2d(8)
        self.linear = TensorizedLinear(8, 8, **made)
        self.head = nn.Linear(8, 3)

    def loss(self, batch, batch_idx):
        indices, labels = batch
        images = self.embedding(indices).view(-1, 4, 4, 16)[..., :4].permute(0, 3, 1, 2)
        hidden = self.norm(self.conv(images)).relu().mean((2, 3))
        return nn.functional.cross_entropy(self.head(self.linear(hidden).tanh()), labels)


class Indices(Batches):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randint(16, (6, 16), generator=generator), torch.randint(3, (6,), generator=generator))
            for _ in range(3)
        ]


def layers(factorization, contraction, precision, sam):
    torch.manual_seed(1)
    model = Layers(factorization, contraction, optimizer=sgd(momentum=0.9), accumulate_grad_batches=2, sam=sam)
    trainer(max_epochs=1, **plugins(precision)).fit(model, Indices())
    return model


@pytest.mark.sampled(6)
@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt", "tr", "btt"])
@pytest.mark.parametrize(("precision", "contraction"), WAYS)
def test_rho_zero_is_plain_with_every_format_and_precision(factorization, contraction, precision):
    plain = layers(factorization, contraction, precision, None)
    assert_same_weights(plain, layers(factorization, contraction, precision, SAM(rho=0)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_second_pass_sees_the_perturbed_weights_under_autocast(precision):
    """A task's own autocast keeps the casts of weights until the outermost one ends: SAM moves them before."""

    class Head(Task):
        def __init__(self, sam):
            super().__init__(optimizer=sgd(), sam=sam)
            self.head = nn.Linear(6, 3)

        def loss(self, batch, batch_idx):
            with torch.autocast("cpu", torch.bfloat16):
                output = self.head(batch[0])
            loss = (output.float() - batch[1]).square().mean()
            losses.append(loss.item())
            return loss

    losses = []
    torch.manual_seed(1)
    trainer(max_epochs=1, **plugins(precision)).fit(Head(SAM(rho=0.5)), Batches())
    pairs = list(zip(losses[::2], losses[1::2], strict=True))
    assert len(pairs) == 4
    assert all(second > first * 1.1 for first, second in pairs)  # uphill by half a unit


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_half_precision_is_refused(precision):
    """There most weights are too coarse to be moved by ρ."""
    with pytest.raises(ValueError, match=r"expected float32 or float64 weights with `sam`, got torch\.\w*float16 in"):
        trainer(precision=precision).fit(Regression(optimizer=sgd(), sam=SAM()), Batches(), Batches())


class Drifting(Regression):
    """With state of every kind that a forward pass moves, or replaces."""

    def __init__(self, shares=None, **kwargs):
        super().__init__(norm=True, dropout=0.2, **kwargs)
        self.share = ([] if shares is None else shares).append  # out of SAM's reach: both passes are seen
        self.inner = nn.utils.parametrizations.spectral_norm(self.inner)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("smoothed", torch.zeros(5), persistent=False)

    def error(self, batch):
        x, y = batch
        if self.training:
            share = np.random.rand() + random.random()  # noqa: NPY002  (what most mixups draw from)
            self.share(share)
            x = x * share + torch.rand(())
            self.count += 1
            self.smoothed = 0.9 * self.smoothed + 0.1 * x.detach()[0, :5]
        hidden = self.dropout(self.norm(self.inner(x) + self.smoothed + self.count / 10).tanh())
        return (hidden @ self.weight.reconstruct() - y).square().mean()


def drifting(sam):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    shares = []
    model = Drifting(shares, optimizer=sgd(), accumulate_grad_batches=2, sam=sam)
    trainer(max_epochs=2).fit(model, Batches(count=5), Batches())
    return model, shares, (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002


class Totals(Metric):
    """A metric of the user's, with states that it changes in place."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values):
        self.total += values.sum()
        self.values.append(values)

    def compute(self):
        return self.total


class Counting(Regression):
    """With attributes that a pass assigns, here and in a module of the user's, and a metric that counts in the loss."""

    class Smoothed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.calls = None, 0

        def forward(self, x):
            self.calls += 1
            self.mean = x.detach().mean(0) if self.mean is None else 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean * self.calls / 10

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.smoothed, self.mse, self.totals = self.Smoothed(), MeanSquaredError(), Totals()
        self.batches, self.backward_passes = 0, 0

    def error(self, batch):
        x, y = batch
        output = self.inner(self.smoothed(x) if self.training else x).tanh() @ self.weight.reconstruct()
        if self.training:
            self.batches = self.batches + 1
            self.mse(output, y)
            self.totals.update(output.detach())
        return (output - y).square().mean()

    def on_after_backward(self):
        self.backward_passes += 1


def test_attributes_and_metrics_change_once():
    def counting(sam):
        torch.manual_seed(1)
        model = Counting(optimizer=sgd(), accumulate_grad_batches=2, sam=sam)
        trainer(max_epochs=2).fit(model, Batches(count=5), Batches())
        return model

    plain, sam = counting(None), counting(SAM(rho=0))
    assert_same_weights(plain, sam)
    assert (sam.batches, sam.smoothed.calls, sam.mse._update_count) == (10, 10, 10)
    assert sam.smoothed.mean.equal(plain.smoothed.mean)
    assert sam.mse.compute().equal(plain.mse.compute())
    assert sam.totals.compute().equal(plain.totals.compute())
    assert len(sam.totals.values) == len(plain.totals.values) == 10
    assert sam.backward_passes == plain.backward_passes == 10


def test_a_loss_that_asks_which_pass_it_is_may_hand_values_to_the_second():
    class Handing(Regression):
        def loss(self, batch, batch_idx):
            if not self.perturbed:
                self.factor = 1.0 + batch_idx
                self.used = []
            self.used = [*self.used, self.factor]
            return self.factor * super().loss(batch, batch_idx)

    class Check(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert pl_module.used == [1.0 + batch_idx] * 2

    trainer(max_epochs=2, callbacks=[Check()]).fit(Handing(optimizer=sgd(), sam=SAM(rho=0.01)), Batches(), Batches())


def test_state_that_a_forward_pass_changes_changes_once():
    (plain, shares, draws), (sam, sam_shares, sam_draws) = drifting(None), drifting(SAM(rho=0))
    assert_same_weights(plain, sam)
    assert dict(plain.named_buffers())["smoothed"].equal(sam.smoothed)
    assert sam.count == 10
    assert draws == sam_draws
    assert sam_shares[::2] == sam_shares[1::2] == shares


def test_buffers_are_put_back_when_the_second_pass_raises():
    class Broken(Drifting):
        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            if self.perturbed:
                raise KeyError("second pass")
            return loss

    model = Broken(optimizer=sgd(), sam=SAM(rho=1.0))
    with pytest.raises(KeyError, match="second pass"):
        trainer().fit(model, Batches(), Batches())
    assert model.count == 1
    assert model.norm.num_batches_tracked == 1


def test_a_step_of_accumulation_does_not_lose_what_ddp_keeps_in_its_bucket():
    """Gradients that are views of one memory, which every backward pass overwrites: as with gradient_as_bucket_view."""

    class Bucketed(Regression):
        def backward(self, loss, *args, **kwargs):
            kept = [p.grad for p in self.parameters()]
            for p in self.parameters():
                p.grad = None
            super().backward(loss, *args, **kwargs)
            for p, bucket, old in zip(self.parameters(), self.buckets(), kept, strict=True):
                total = p.grad if old is None else p.grad + old
                p.grad = bucket.copy_(total)

        def buckets(self):
            if not hasattr(self, "_buckets"):
                self._buckets = [torch.empty_like(p) for p in self.parameters()]
            return self._buckets

    torch.manual_seed(1)
    model = Bucketed(optimizer=sgd(), accumulate_grad_batches=2, sam=SAM(rho=0.3))
    trainer().fit(model, Batches(), Batches())
    plain = fitted(optimizer=sgd(), accumulate_grad_batches=2, sam=SAM(rho=0.3))
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
