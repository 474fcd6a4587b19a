"""What a completion has beside squared residuals: biases, a range, smoothness, and an ensemble."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tenzoo.data import CompletionBatch, CompletionDataModule
from tenzoo.models import CompletionEnsemble, TensorCompletion
from tenzoo.prediction import CompletedEntriesWriter
from tenzoo.tasks import CompletionTask
from tenzoo.tasks.completion_terms import roughness
from tests.tasks.toy import adam, sgd, trainer


def data(**kwargs):
    return CompletionDataModule("il2", standardize=True, seed=1, **{"steps_per_epoch": 5, **kwargs})


def fit(source=None, *, epochs=2, callbacks=(), **kwargs):
    torch.manual_seed(0)
    task = CompletionTask("cp", **{"rank": 2, "optimizer": adam(lr=0.05), **kwargs})
    own = trainer(max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
    own.fit(task, source or data())
    return task, own


# --- smoothness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reconstructs", [True, False])
def test_roughness_is_that_of_the_dense_tensor(reconstructs, monkeypatch):
    monkeypatch.setattr(TensorCompletion, "reconstructs", lambda self, n: reconstructs)
    torch.manual_seed(0)
    model = TensorCompletion((5, 3, 4), "tucker", 2, biases=True).double()
    model.location.fill_(7.0)
    model.scale.fill_(2.0)
    for bias in model.biases:
        torch.nn.init.normal_(bias)
    index = torch.cartesian_prod(torch.arange(5), torch.arange(3), torch.arange(4))
    dense = ((model(index) - 7) / 2).view(5, 3, 4).detach()
    expected = torch.zeros((), dtype=torch.float64)
    for mode, weight in ((0, 0.3), (2, 2.0)):
        difference = dense.diff(n=2, dim=mode)
        first, last = difference.narrow(mode, 0, 1), difference.narrow(mode, -1, 1)
        expected += weight * torch.cat([first, difference, last], mode).square().mean()  # the ends are moved inward
    torch.testing.assert_close(roughness(model, index, [0.3, 0, 2.0]), expected)
    roughness(model, index, [0.3, 0, 2.0]).backward()
    assert all(core.grad.isfinite().all() for core in model.tensor.cores)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalty_is_in_the_loss(reduction):
    task, _ = fit(epochs=1, reduction=reduction, smoothness=[0.5, 0, 0, 0.1])
    batch = next(iter(task.trainer.train_dataloader))
    without = CompletionTask("cp", 2, reduction=reduction)
    without.trainer, without.model, without.shape = task.trainer, task.model, task.shape
    number = 1 if reduction == "mean" else len(batch.value)
    penalty = number * roughness(task.model, batch.index, [0.5, 0, 0, 0.1])
    torch.testing.assert_close(task.loss(batch, 0), without.loss(batch, 0) + penalty)


def test_a_smooth_signal_is_completed_better_with_the_penalty():
    steps = torch.linspace(0, 3, 40)
    truth = torch.sin(steps)[:, None] * torch.cos(2 * steps) + 0.5 * torch.cos(steps)[:, None]
    known = torch.where(torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.15, truth, math.nan)
    errors = {}
    for name, weights in (("plain", None), ("smooth", [1.0, 1.0])):
        source = CompletionDataModule(known.numpy(), standardize=True, steps_per_epoch=60)
        task, own = fit(source, epochs=10, rank=6, init_std=0.3, smoothness=weights)
        (result,) = own.test(task, source, verbose=False)[:1]
        errors[name] = result["held_out/rmse"]
    assert errors["smooth"] < 0.1 * errors["plain"]


# --- the range -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["data", [0.1, 0.2]])
def test_predictions_keep_to_the_range(clip, tmp_path):
    source = data()
    task, own = fit(source, clip=clip)
    low, high = (0.1, 0.2) if clip != "data" else source.splits["train"].value.aminmax()
    found = torch.cat([batch.value for batch in own.predict(task, source)])
    assert found.min() >= float(low) - 1e-6
    assert found.max() <= float(high) + 1e-6
    own.save_checkpoint(tmp_path / "a.ckpt")
    again = CompletionTask.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (float(again.model.low), float(again.model.high)) == (pytest.approx(float(low)), pytest.approx(float(high)))


# --- ensembles -------------------------------------------------------------------------------------------------------


def test_members_are_trained_as_if_each_were_alone():
    task, _ = fit(ensemble=2, biases=True)
    torch.manual_seed(0)
    start = CompletionEnsemble(2, task.shape, "cp", 2, biases=True)
    for number in (0, 1):
        alone = CompletionTask("cp", 2, shape=task.shape, biases=True, optimizer=adam(lr=0.05))
        alone.model.load_state_dict(start.members[number].state_dict())
        trainer(max_epochs=2).fit(alone, data())
        for one, two in zip(alone.model.parameters(), task.model.members[number].parameters(), strict=True):
            torch.testing.assert_close(one, two)


def test_the_noise_makes_the_deviations_right_on_validation_entries(tmp_path):
    source = data()
    task, own = fit(source, ensemble=3, epochs=6, callbacks=[ModelCheckpoint(tmp_path, filename="last")])
    task.eval()
    known = source.splits["val"]
    with torch.no_grad():
        error, spread = task.model(known.index) - known.value, task.model.predictions(known.index).var(0)
        expected = (error.double().square() - spread.double()).mean().clamp(min=0).sqrt()
        torch.testing.assert_close(task.model.noise.double(), expected, rtol=1e-4, atol=1e-6)
        deviation = task.model.deviation(known.index)
    torch.testing.assert_close((error / deviation).square().mean(), torch.tensor(1.0), rtol=0.3, atol=0)
    again = CompletionTask.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.model.noise.equal(task.model.noise)
    before = task.model.noise.clone()
    own.test(task, source, verbose=False)  # other entries do not change it
    own.validate(task, source, verbose=False)
    assert task.model.noise.equal(before)


def test_deviations_are_predicted_and_written(tmp_path):
    source = data()
    task, _ = fit(source, ensemble=2)
    own = trainer(tmp_path, max_epochs=1, callbacks=[CompletedEntriesWriter("a.csv")])
    own.predict(task, source, return_predictions=False)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "i0,i1,i2,i3,value,deviation,known"
    row = lines[1].split(",")
    index = torch.tensor([[int(part) for part in row[:4]]])
    assert float(row[5]) == pytest.approx(task.eval().model.deviation(index).item(), rel=1e-5)
    task, _ = fit(data(validation_fraction=0), ensemble=2)
    (batch,) = trainer(max_epochs=1).predict(task, data(validation_fraction=0))[:1]
    assert type(batch) is CompletionBatch  # without validation entries nothing is known of deviations


# --- biases ----------------------------------------------------------------------------------------------------------


def test_biases_decay_on_their_own():
    task, own = fit(biases=True, bias_weight_decay=0.5, ensemble=2, optimizer=adam(lr=0.05, weight_decay=3.0))
    cores, biases = own.optimizers[0].param_groups
    assert (cores["weight_decay"], biases["weight_decay"]) == (3.0, 0.5)
    assert {id(p) for p in biases["params"]} == {id(b) for m in task.model.members for b in m.biases}
    assert len(cores["params"]) + len(biases["params"]) == len(list(task.parameters()))
    with pytest.raises(ValueError, match=r"an optimizer with weight_decay with `bias_weight_decay` = 1\.0, got Rprop"):
        fit(biases=True, bias_weight_decay=1, optimizer=torch.optim.Rprop)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"clip": "both"}, TypeError, "'data' or two numbers in `clip`, got 'both'"),
        ({"clip": [1]}, TypeError, r"in `clip`, got \[1\]"),
        ({"clip": [5, 1]}, ValueError, r"the smaller number first in `clip`, got \[5.0, 1.0\]"),
        ({"clip": [1, math.nan]}, ValueError, "in `clip`"),
        ({"smoothness": 1}, TypeError, "a number for each mode in `smoothness`, got 1"),
        ({"smoothness": [1, -1]}, ValueError, "numbers from 0 on in `smoothness`"),
        ({"smoothness": [1, math.inf]}, ValueError, "in `smoothness`"),
        ({"smoothness": [1], "shape": [4, 4]}, ValueError, r"each of 2 modes in `smoothness`, got \[1.0\]"),
        ({"smoothness": [1, 0], "shape": [2, 4]}, ValueError, "0 for mode 0 of size 2 in `smoothness`, got 1.0"),
        ({"ensemble": 0}, ValueError, "at least 1 in `ensemble`"),
        ({"ensemble": True}, TypeError, "an integer in `ensemble`"),
        ({"biases": 1}, TypeError, "a bool in `biases`"),
        ({"bias_weight_decay": 1}, ValueError, "`biases` with `bias_weight_decay`, got 1 without"),
        ({"biases": True, "bias_weight_decay": -1}, ValueError, "from 0 on in `bias_weight_decay`"),
        ({"biases": True, "bias_weight_decay": "1"}, TypeError, "a number in `bias_weight_decay`"),
    ],
)
def test_arguments_that_are_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        CompletionTask("cp", 1, **arguments)


def test_sparse_gradients_reach_biases_and_members():
    shape = [300, 300, 50]
    source = CompletionDataModule(
        "synthetic", shape=shape, num_entries=900, observed_fraction=0.9, batch_size=40, steps_per_epoch=3
    )
    with torch.sparse.check_sparse_tensor_invariants(False):
        task, _ = fit(source, epochs=1, ensemble=2, biases=True, optimizer=torch.optim.SparseAdam)
        assert all(member.sparse_grad for member in task.model.members)
        assert all(bias.count_nonzero() for member in task.model.members for bias in member.biases)
        task, _ = fit(source, epochs=1, biases=True, optimizer=sgd(lr=0.1))
        assert task.model.sparse_grad


def test_data_without_labels_are_marked_by_split():
    source = CompletionDataModule(np.where(np.eye(9) > 0, np.nan, np.arange(81.0).reshape(9, 9)), seed=3)
    source.setup()
    for number, name in enumerate(("train", "val", "held_out"), 1):
        assert source.split_of(source.splits[name].index).eq(number).all()
    assert source.split_of(torch.tensor([[4, 4]])).tolist() == [0]
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 58, "val": 7, "held_out": 7}
