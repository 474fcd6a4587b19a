"""``rank="auto"``: what is tried, what is chosen, and what runs and checkpoints make of it."""

import math

import pytest
import torch

from tenzoo.data import CompletionDataModule
from tenzoo.tasks import CompletionTask, rank_search
from tenzoo.tasks.rank_search import Choice, candidates, halve
from tests.processes import in_processes
from tests.tasks.toy import adam, sgd, trainer


class Curve:
    """A trial whose error after each epoch is known."""

    def __init__(self, choice, errors, seconds=0.0, clock=None):
        self.choice, self.errors, self.rmse, self.epochs = choice, errors, math.inf, 0
        self.seconds, self.clock = seconds, clock

    def train(self):
        self.rmse = min(self.rmse, self.errors(self.epochs))
        self.epochs += 1
        if self.clock is not None:
            self.clock[0] += self.seconds


def test_the_better_half_is_trained_twice_as_long():
    trials = [Curve(Choice(rank, None), lambda epoch, rank=rank: 1 + (rank - 5) ** 2 / 10) for rank in range(8)]
    assert halve(trials, epochs=32, minutes=1) == (Choice(5, None), 1.0)
    assert sorted(trial.epochs for trial in trials) == [4, 4, 4, 4, 12, 12, 28, 28]


def test_an_error_that_is_not_finite_never_wins():
    broken = Curve(Choice(1, None), lambda epoch: math.nan)
    assert halve([broken, Curve(Choice(2, None), lambda epoch: 7.0)], epochs=4, minutes=1)[0].rank == 2
    with pytest.raises(ValueError, match="training diverges; lower the learning rate"):
        halve([broken], epochs=4, minutes=1)


def test_the_minutes_end_a_search(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(rank_search.time, "monotonic", lambda: clock[0])
    trials = [Curve(Choice(rank, None), lambda epoch, rank=rank: 10.0 - rank, 50.0, clock) for rank in range(8)]
    with pytest.warns(UserWarning, match=r"stopped after 2 minutes, with 8 of 8 choices left"):
        assert halve(trials, epochs=8, minutes=2)[0].rank == 2  # the fourth was not begun
    assert [trial.epochs for trial in trials] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_no_model_is_tried_twice_and_none_that_is_too_large():
    tried = candidates(lambda rank: 3 * min(rank, 5), most=1000, decays=[0.0, 0.1])
    assert [choice.rank for choice in tried] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert candidates(lambda rank: 3 * rank, most=1, decays=[None]) == [Choice(1, None)]


def test_the_smallest_of_ranks_that_are_alike_is_taken():
    errors = {4: 1.3, 8: 1.005, 16: 1.0, 32: 1.0}
    trials = [Curve(Choice(rank, None), lambda epoch, rank=rank: errors[rank]) for rank in errors]
    assert halve(trials, epochs=4, minutes=1) == (Choice(8, None), 1.005)


@pytest.fixture
def few(monkeypatch):
    """Fewer choices, so that a search takes a second."""
    monkeypatch.setattr(rank_search, "RANKS", (1, 2))
    monkeypatch.setattr(rank_search, "COUPLED", (0.0, 3e-3))


def noisy(**kwargs):
    """A CP tensor of rank 2 with noise; half of its entries are missing."""
    torch.manual_seed(3)
    truth = torch.einsum("ir,jr,kr->ijk", *(torch.randn(size, 2) for size in (14, 12, 10)))
    known = torch.rand(truth.shape) < 0.5
    values = torch.where(known, truth + 0.3 * torch.randn(truth.shape), math.nan)
    return CompletionDataModule(values.numpy(), standardize=True, seed=1, **{"steps_per_epoch": 10, **kwargs})


def fit(data, *, rank="auto", epochs=30, callbacks=(), **kwargs):
    torch.manual_seed(0)
    task = CompletionTask("cp", rank, **{"optimizer": adam(lr=0.03), "init_std": 0.5, **kwargs})
    own = trainer(max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
    own.fit(task, data)
    return task, own


def test_the_rank_of_the_tensor_is_found_and_its_run_is_the_run_with_that_rank(monkeypatch):
    monkeypatch.setattr(rank_search, "RANKS", (1, 2, 4, 8))
    monkeypatch.setattr(rank_search, "COUPLED", (0.0, 3e-3))
    task, own = fit(noisy())
    rank, decay = task.hparams["rank"], task.hparams["core_weight_decay"]
    assert rank in (2, 4)
    assert [group["weight_decay"] for group in own.optimizers[0].param_groups] == [decay]
    (held_out,) = [each["held_out/r2"] for each in own.test(task, noisy(), verbose=False)[-1:]]
    assert held_out > 0.8
    again, _ = fit(noisy(), rank=rank, core_weight_decay=decay)
    for one, other in zip(task.model.tensor.cores, again.model.tensor.cores, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_penalties_are_tried_in_the_units_of_the_loss(reduction, monkeypatch):
    tried = []
    monkeypatch.setattr(rank_search, "halve", lambda trials, **_: (tried.extend(trials), (trials[0].choice, 1.0))[1])
    fit(noisy(batch_size=100), epochs=1, reduction=reduction, optimizer=sgd(lr=1e-4, weight_decay=0.7))
    entries = 100 if reduction == "sum" else 1
    assert sorted({trial.choice.decay for trial in tried}) == pytest.approx(
        sorted([0.0, 0.7, *(entries * part for part in (3e-4, 1e-3, 3e-3, 1e-2))])
    )
    tried.clear()
    fit(noisy(), epochs=1, reduction=reduction, core_weight_decay=0.5)
    assert {trial.choice.decay for trial in tried} == {0.5}
    tried.clear()
    fit(noisy(), epochs=1, reduction=reduction, optimizer=torch.optim.Rprop)
    assert {trial.choice.decay for trial in tried} == {None}


def test_checkpoints_have_what_was_chosen(tmp_path, few):
    data, path = noisy(), tmp_path / "a.ckpt"
    task, own = fit(data, epochs=2)
    own.save_checkpoint(path)
    expected = torch.cat([batch.value for batch in own.predict(task, data)])

    def fresh():
        return CompletionTask("cp", "auto", optimizer=adam(lr=0.03), init_std=0.5)

    found = torch.cat([batch.value for batch in trainer(max_epochs=2).predict(fresh(), noisy(), ckpt_path=path)])
    torch.testing.assert_close(found, expected)
    loaded = CompletionTask.load_from_checkpoint(path)
    assert loaded.hparams["rank"] == task.hparams["rank"]
    task.save_pretrained(tmp_path / "saved")
    assert CompletionTask.from_pretrained(tmp_path / "saved").hparams["rank"] == task.hparams["rank"]

    resumed = fresh()
    torch.manual_seed(9)  # a new search would not decide alike
    trainer(max_epochs=4).fit(resumed, noisy(), ckpt_path=path)
    whole, _ = fit(noisy(), epochs=4, rank=task.hparams["rank"], core_weight_decay=task.hparams["core_weight_decay"])
    for one, other in zip(resumed.model.tensor.cores, whole.model.tensor.cores, strict=True):
        assert torch.equal(one, other)


def test_an_ensemble_and_biases_and_groups_take_the_rank(few):
    task, own = fit(
        noisy(),
        epochs=2,
        ensemble=2,
        biases=True,
        bias_weight_decay=0.5,
        interactions=[[0, 1], [1, 2]],
        shape=[14, 12, 10],
    )
    cores, biases = own.optimizers[0].param_groups
    assert (cores["weight_decay"], biases["weight_decay"]) == (task.hparams["core_weight_decay"], 0.5)
    assert {tensor.rank for member in task.model.members for tensor in member.tensors} == {(task.hparams["rank"],)}


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"search_minutes": 0}, ValueError, "a number above 0 in `search_minutes`, got 0"),
        ({"search_minutes": math.nan}, ValueError, "in `search_minutes`"),
        ({"search_minutes": "1"}, TypeError, "a number in `search_minutes`, got '1'"),
        ({"core_weight_decay": -1}, ValueError, "from 0 on in `core_weight_decay`, got -1"),
        ({"core_weight_decay": True}, TypeError, "a number in `core_weight_decay`, got True"),
    ],
)
def test_arguments_that_are_refused(kwargs, error, said):
    with pytest.raises(error, match=said):
        CompletionTask("cp", "auto", **kwargs)


def test_runs_that_cannot_choose_are_refused(few):
    with pytest.raises(ValueError, match="validation entries with `rank` 'auto', got none; set `validation_fraction`"):
        fit(noisy(validation_fraction=0.0), epochs=1)
    with pytest.raises(ValueError, match="a checkpoint with `rank` 'auto' in a run that does not train"):
        trainer(max_epochs=1).test(CompletionTask("cp", "auto"), noisy())
    for shape in (None, [14, 12, 10]):
        with pytest.raises(
            ValueError, match="expected a rank, got `rank` 'auto', which is chosen when training begins"
        ):
            CompletionTask("cp", "auto", shape=shape).described_network(noisy())
    with pytest.raises(ValueError, match="training diverges"):
        fit(noisy(), epochs=1, optimizer=sgd(lr=1e9), init_std=1e9)


def choice_of_process(shape):
    rank_search.RANKS = (1, 2)  # of a process that ends with this function
    rank_search.COUPLED = (0.0, 3e-3)
    data = noisy()
    torch.manual_seed(0)
    task = CompletionTask("cp", "auto", optimizer=adam(lr=0.03), init_std=0.5, reduction="sum", shape=shape)
    trainer(strategy="ddp", devices=2, max_epochs=2).fit(task, data)
    return task.hparams["rank"], task.hparams["core_weight_decay"], [core.detach() for core in task.model.tensor.cores]


def test_processes_choose_alike(few):
    (rank, decay, cores), second = in_processes(choice_of_process, [14, 12, 10])
    assert (rank, decay) == second[:2]
    alone, _ = fit(noisy(), epochs=2, reduction="sum")
    assert (rank, decay) == (alone.hparams["rank"], alone.hparams["core_weight_decay"])
    for one, other in zip(cores, alone.model.tensor.cores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
