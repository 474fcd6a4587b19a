"""What a loss changes in place counts once under SAM, and stays the same object."""

import copy
import gc
import pickle
import random
import weakref
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from tenzoo.snapshot import Kinds, Snapshot, put
from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, assert_same_weights, sgd, trainer


class Changing(Regression):
    """A loss that changes objects of every kind, and depends on most of them."""

    def __init__(self, history, **kwargs):
        super().__init__(**kwargs)
        self.total, self.mean = torch.zeros(()), torch.zeros(5)
        self.losses, self.history, self.recent = [], history, deque(maxlen=2)
        self.named, self.kept, self.counts = {"sums": [torch.zeros(2), {"n": 0}]}, OrderedDict(), Counter()
        self.groups, self.seen, self.pair = defaultdict(list), set(), (torch.zeros(1), [0])
        self.array, self.long, self.large = np.zeros(3), list(range(1000)), torch.zeros(2**19)
        self.draws = [
            torch.Generator().manual_seed(1),
            np.random.default_rng(1),
            np.random.RandomState(1),
            random.Random(1),
        ]

    def error(self, batch):
        x, y = batch
        hidden = self.inner(x)
        if self.training:
            own, numpy, old, python = self.draws
            x = x * (torch.rand((), generator=own) + numpy.random() + old.rand() + python.random())
            self.mean.mul_(0.9).add_(0.1 * x.detach()[0, :5])
            hidden = self.inner(x) * self.mean  # which the backward pass needs
            scale = 1 + len(self.losses) + self.named["sums"][1]["n"] + self.array.sum() + float(self.pair[0])
            hidden = hidden / scale
            self.change(len(self.losses), hidden.detach().mean())
        return (hidden.tanh() @ self.weight.reconstruct() - y).square().mean()

    def change(self, step, value):
        self.total += value
        self.large[step % 2 :: 2] += 1
        self.losses.append(float(value))
        self.history.append(value)
        self.long.append(step)
        self.recent.append(float(value))
        self.named["sums"][0] += value
        self.named["sums"][1]["n"] += 1
        self.kept[step] = value
        self.kept.move_to_end(min(self.kept))
        if len(self.kept) > 2:
            self.kept.popitem(last=False)
        self.counts.update(["batch"])
        self.groups[step % 3].append(float(value))
        self.seen.add(step)
        self.pair[0].add_(1)
        self.pair[1][0] += 1
        self.array += 1

    def state(self):
        numbers = [*self.history, *self.named["sums"][0], *self.kept.values(), self.total, *self.mean, *self.pair[0]]
        return (
            torch.stack(numbers).tolist(),
            self.large.unique().tolist(),
            (self.losses, self.recent, self.long, self.named["sums"][1], list(self.kept), self.counts),
            (dict(self.groups), self.seen, self.pair[1], self.array.tolist()),
            [torch.rand((), generator=self.draws[0]).item(), self.draws[1].random()],
            [self.draws[2].rand(), self.draws[3].random()],
        )


def changing(sam, history):
    torch.manual_seed(1)
    model = Changing(history, optimizer=sgd(), accumulate_grad_batches=2, sam=sam)
    trainer(max_epochs=2).fit(model, Batches(count=5), Batches())
    return model


def test_objects_that_a_loss_changes_in_place_change_once():
    held = []
    plain, sam = changing(None, []), changing(SAM(rho=0), held)
    assert_same_weights(plain, sam)
    assert sam.history is held
    assert len(held) == len(sam.losses) == 10
    assert sam.total._version > 0  # still the tensor that was there
    assert sam.state() == plain.state()


def test_what_only_the_second_pass_would_change_stays():
    class Extremes(Regression):
        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            value = loss.item()
            self.highest.append(max(value, self.highest[-1]))
            if value > self.worst["loss"]:
                self.worst["loss"] = value
            seen.append(value)
            return loss

    seen = []
    model = Extremes(optimizer=sgd(), sam=SAM(rho=0.5))
    model.highest, model.worst = [0.0], {"loss": 0.0}
    trainer(max_epochs=1).fit(model, Batches(), Batches())
    assert len(seen) == 8
    assert max(seen) > max(seen[::2])
    assert model.worst == {"loss": max(seen[::2])}
    assert model.highest == [0.0, *np.maximum.accumulate(seen[::2])]


def test_hooks_of_backward_passes_keep_what_they_change():
    class Hooked(Regression):
        def loss(self, batch, batch_idx):
            self.calls["loss"] += 1
            self.power *= 2
            return super().loss(batch, batch_idx)

        def on_after_backward(self):
            self.calls["backward"] += 1
            self.second.append(self.perturbed)
            self.kept.copy_(self.inner.weight.grad)
            perturbed.append(self.kept.clone())

    perturbed = []
    model = Hooked(optimizer=sgd(), sam=SAM(rho=0.5))
    model.calls, model.second, model.power, model.kept = Counter(), [], torch.ones(()), torch.zeros(5, 6)
    trainer(max_epochs=1).fit(model, Batches(), Batches())
    assert model.calls == {"loss": 4, "backward": 4}
    assert model.second == [True] * 4
    assert model.power == 2**4
    assert model.kept.equal(perturbed[-1])


def test_a_pass_that_asks_changes_objects_as_it_likes():
    class Asking(Regression):
        def loss(self, batch, batch_idx):
            self.passes.append(self.perturbed)
            return super().loss(batch, batch_idx)

    model = Asking(optimizer=sgd(), sam=SAM())
    model.passes = []
    trainer(max_epochs=1).fit(model, Batches(), Batches())
    assert model.passes == [False, True] * 4


def test_tensors_that_share_the_memory_of_weights_are_the_perturbation_s():
    class Bounded(Regression):
        def loss(self, batch, batch_idx):
            self.same[0].clamp_(-0.3, 0.3)
            weights.append(self.inner.weight.detach().clone())
            return super().loss(batch, batch_idx)

    weights = []
    model = Bounded(optimizer=sgd(), sam=SAM(rho=0.05))
    model.same = [model.inner.weight.data]
    trainer(max_epochs=1).fit(model, Batches(), Batches())
    for first, second in zip(weights[::2], weights[1::2], strict=True):
        assert 0 < (first - second).norm() <= 0.051


def test_a_second_pass_that_raises_leaves_what_the_first_has_changed():
    class Broken(Regression):
        def loss(self, batch, batch_idx):
            self.losses.append(1.0)
            self.total += 1
            calls.append(1)
            if len(calls) == 4:
                raise KeyError("second pass")
            return super().loss(batch, batch_idx)

    calls = []
    model = Broken(optimizer=sgd(), sam=SAM())
    model.total = torch.zeros(())
    with pytest.raises(KeyError, match="second pass"):
        trainer().fit(model, Batches(), Batches())
    assert (model.losses, model.total) == ([1.0, 1.0], 2)


def test_nothing_of_a_trainer_stays_in_the_process():
    def train():
        class Own:
            pass

        class Holding(Regression):
            def loss(self, batch, batch_idx):
                self.own = Own()
                return super().loss(batch, batch_idx)

        model = Holding(optimizer=sgd(), sam=SAM())
        trainer(max_epochs=1).fit(model, Batches(), Batches())
        return model, weakref.ref(Own)

    (first, of_first), (second, of_second) = train(), train()
    assert not first._kinds.of.keys() & {of_second()}
    assert {of_first()} <= first._kinds.of.keys()
    del first, second
    gc.collect()
    assert of_first() is of_second() is None


def test_a_task_with_snapshots_is_copied_and_sent_to_other_processes():
    model = changing(SAM(), [])
    assert Kinds in map(type, vars(copy.deepcopy(model)).values())
    assert type(pickle.loads(pickle.dumps(model._kinds))) is Kinds


class Holder(nn.Module):
    def __init__(self, thing):
        super().__init__()
        self.held = thing


def test_what_is_not_to_be_put_back_is_left_alone():
    network, weight = nn.BatchNorm1d(2), nn.Parameter(torch.zeros(2))
    with torch.inference_mode():
        frozen = torch.zeros(2)
    fixed = np.zeros(2)
    fixed.flags.writeable = False
    holder = Holder([network, weight, frozen, fixed, random.SystemRandom(), iter([1]), frozenset({1}), "text"])
    before = Snapshot([holder])
    network(torch.randn(4, 2))
    weight.data += 1
    holder.held.append("more")
    put(before.changed())
    assert len(holder.held) == 8
    assert network.num_batches_tracked == 1
    assert weight.data.tolist() == [1, 1]


def test_a_submodule_that_a_pass_makes_stays():
    holder = Holder(None)
    before = Snapshot([holder])
    holder.made, holder.held = nn.Linear(1, 1), 1
    put(before.changed())
    assert holder.held is None
    assert isinstance(holder.made, nn.Linear)


def test_objects_that_hold_each_other_are_put_back():
    first, second = [], {}
    first.append(second)
    second["first"] = first
    before = Snapshot([Holder(first)])
    second["more"] = torch.ones(2).to_sparse()
    first.append(1)
    after = put(before.changed())
    assert (len(first), list(second)) == (1, ["first"])
    put(after)
    assert (len(first), list(second)) == (2, ["first", "more"])
