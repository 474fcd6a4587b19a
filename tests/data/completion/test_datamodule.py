import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from tenzoo.data import CompletionDataModule, Entries

SMALL = {"dataset": "synthetic", "shape": [6, 7, 8], "num_entries": 200, "observed_fraction": 0.5}


def ready(**changes) -> CompletionDataModule:
    data = CompletionDataModule(**{**SMALL, **changes})
    data.setup()
    return data


def rows(entries) -> set[tuple[int, ...]]:
    return set(map(tuple, entries.index.tolist()))


def test_paper_protocol():
    data = CompletionDataModule("covid", observed_fraction=0.3, validation_fraction=0.0, seed=42)
    data.setup("fit")
    assert data.eval_split_names == ("train", "held_out")
    assert len(data.splits["train"]) == round(0.3 * 438 * 6 * 11)
    assert rows(data.splits["train"]).isdisjoint(rows(data.splits["held_out"]))
    assert len(data.splits["train"]) + len(data.splits["held_out"]) == 438 * 6 * 11


def test_missing_entries_are_in_no_split_but_are_predicted():
    data = CompletionDataModule("il2", validation_fraction=0.2)
    data.setup()
    known = set.union(*map(rows, data.splits.values()))
    assert math.prod(data.shape) - len(known) == 192
    (batch,) = data.predict_dataloader()
    assert batch.value.isnan().sum() == 192
    assert rows(batch) == set(np.ndindex(*data.shape)) - rows(data.splits["train"])


def test_same_arguments_same_splits():
    torch.manual_seed(0)
    a = ready(seed=3)
    torch.manual_seed(1)
    b, c = ready(seed=3), ready(seed=4)
    assert a.state_dict() == b.state_dict()
    assert a.state_dict()["checksum"] != c.state_dict()["checksum"]


def test_setup_does_not_touch_global_generators():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data = ready(batch_size=9)
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_standardization_comes_from_train_only_and_values_stay_raw():
    raw, data = ready(), ready(standardize=True)
    train = data.splits["train"].value.double()
    assert (raw.location, raw.scale) == (0.0, 1.0)
    assert data.location == pytest.approx(train.mean().item(), abs=1e-12)
    assert data.scale == pytest.approx(train.std(correction=0).item(), abs=1e-12)
    assert type(data.location) is type(data.scale) is float
    assert torch.equal(raw.splits["train"].value, data.splits["train"].value)


def test_loaders():
    data = ready(batch_size=40, steps_per_epoch=3)
    assert data.eval_split_names == ("train", "val", "held_out")
    assert [len(batch.value) for batch in data.train_dataloader()] == [40, 40, 10]
    for loaders in (data.val_dataloader(), data.test_dataloader()):
        assert [len(loader) for loader in loaders] == [1, 1, 1]
        for name, loader in zip(data.eval_split_names, loaders, strict=True):
            (batch,) = loader
            assert torch.equal(batch.index, data.splits[name].index)
            assert torch.equal(batch.value, data.splits[name].value)


def test_setup_begins_a_new_stream():
    data = ready(batch_size=40)
    loader = data.train_dataloader()
    next(iter(loader))
    assert data.train_dataloader() is loader
    data.setup()
    assert data.train_dataloader().state_dict() == {"permutation": 0, "batch": 0}


def test_full_batch_yields_the_split_itself():
    data = ready(steps_per_epoch=4)
    assert all(batch.value is data.splits["train"].value for batch in data.train_dataloader())
    assert len(data.train_dataloader()) == 4


@pytest.mark.parametrize("ending", [".csv", ".npz"])
def test_predict_index(tmp_path, ending):
    wanted = [[5, 6, 7], [0, 0, 0], [5, 6, 7]]
    known = ready().splits["train"]
    wanted.append(known.index[3].tolist())
    path = tmp_path / f"wanted{ending}"
    if ending == ".csv":
        path.write_text("i,j,k\n" + "\n".join(",".join(map(str, row)) for row in wanted))
    else:
        np.savez(path, indices=np.array(wanted))
    (batch,) = ready(predict_index=str(path)).predict_dataloader()
    assert batch.index.tolist() == wanted
    assert batch.value[3] == known.value[3]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("0,0,0\n6,0,0", ValueError, r"inside the shape \(6, 7, 8\) in `predict_index`"),
        ("0,0\n1,1", ValueError, "inside the shape .* got 2 columns"),
        ("0,-1,0\n", ValueError, "at least 0 in `predict_index`"),
        ("0,1.5,0\n", ValueError, "integer indices in `predict_index`"),
        ("", ValueError, "file with data in `predict_index`"),
        ("a,b,c\nd,e,f", ValueError, "separated by commas in line 2 of .* in `predict_index`, got 'd,e,f'"),
        ("0;0;0", ValueError, "separated by commas in line 1 of .* in `predict_index`, got '0;0;0'"),
        ("0,0,0\n1,1", ValueError, "3 columns in line 2 of .* in `predict_index`, got 2: '1,1'"),
        (None, FileNotFoundError, "existing file in `predict_index`"),
    ],
)
def test_bad_predict_index_files(tmp_path, content, error, message):
    path = tmp_path / "wanted.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        ready(predict_index=str(path))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": "covid"}, ValueError, "`num_entries` only with"),
        ({"dataset": "nothing"}, ValueError, "expected one of covid, il2, indian_pines, kinetic, synthetic or a file"),
        ({"shape": None}, ValueError, "mode sizes in `shape`"),
        ({"observed_fraction": 0}, ValueError, r"\(0, 1\] in `observed_fraction`, got 0"),
        ({"observed_fraction": 1.01}, ValueError, "in `observed_fraction`"),
        ({"observed_fraction": -0.1}, ValueError, "in `observed_fraction`"),
        ({"observed_fraction": math.nan}, ValueError, "in `observed_fraction`, got nan"),
        ({"observed_fraction": "0.3"}, TypeError, "number in .* in `observed_fraction`"),
        ({"observed_fraction": True}, TypeError, "number in .* in `observed_fraction`"),
        ({"validation_fraction": 1}, ValueError, r"\[0, 1\) in `validation_fraction`, got 1"),
        ({"validation_fraction": -1e-9}, ValueError, "in `validation_fraction`"),
        ({"validation_fraction": "1"}, TypeError, "in `validation_fraction`"),
        ({"seed": True}, TypeError, "integer in `seed`"),
        ({"seed": 1.0}, TypeError, "integer in `seed`"),
        ({"seed": None}, TypeError, "integer in `seed`"),
        ({"seed": -1}, ValueError, "at least 0 in `seed`"),
        ({"batch_size": 0}, ValueError, "at least 1 in `batch_size`"),
        ({"batch_size": 1.5}, TypeError, "integer in `batch_size`"),
        ({"steps_per_epoch": 0}, ValueError, "at least 1 in `steps_per_epoch`"),
        ({"steps_per_epoch": "3"}, TypeError, "integer in `steps_per_epoch`"),
        ({"standardize": 1}, TypeError, "bool in `standardize`"),
        ({"predict_index": "wanted.txt"}, ValueError, "ending in .csv or .npz, or 'held_out', in `predict_index`"),
        ({"predict_index": 3}, TypeError, "path as str in `predict_index`"),
    ],
)
def test_bad_arguments_are_refused_at_construction(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        CompletionDataModule(**{**SMALL, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_entries": 336, "observed_fraction": 1}, "less than 1 in `observed_fraction`"),
        ({"num_entries": 4, "observed_fraction": 0.25}, "at least 2 entries in the split 'train'"),
        ({"validation_fraction": 0.01}, "at least 2 entries in the split 'val'"),
        ({"observed_fraction": 0.999}, "at least 2 entries in the split 'held_out'"),
    ],
)
def test_bad_splits_are_refused_in_setup(changes, message):
    with pytest.raises(ValueError, match=message):
        ready(**changes)


def test_constant_values_cannot_be_standardized(tmp_path):
    np.save(tmp_path / "x.npy", np.full((9, 9), 0.1))
    with pytest.raises(ValueError, match="differ for `standardize`"):
        ready(dataset=str(tmp_path / "x.npy"), shape=None, num_entries=None, standardize=True)
    ready(dataset=str(tmp_path / "x.npy"), shape=None, num_entries=None)


@pytest.mark.parametrize("standardize", [True, False])
def test_values_that_float32_cannot_tell_apart_are_refused(tmp_path, standardize):
    np.save(tmp_path / "x.npy", 1e8 + np.random.default_rng(0).normal(size=(9, 9)))
    with pytest.raises(ValueError, match=r"`dataset` that float32 tells apart, .*; subtract an offset first"):
        ready(dataset=str(tmp_path / "x.npy"), shape=None, num_entries=None, standardize=standardize)


def test_every_known_entry_of_a_sparse_file_may_be_observed(tmp_path):
    (tmp_path / "x.csv").write_text("0,0,1\n0,1,2\n1,0,3\n")
    arguments = {"dataset": str(tmp_path / "x.csv"), "num_entries": None, "validation_fraction": 0.0}
    data = ready(**arguments, shape=None, observed_fraction=1.0)
    assert data.eval_split_names == ("train",)
    (batch,) = data.predict_dataloader()
    assert batch.index.tolist() == [[1, 1]]
    assert batch.value.isnan().all()


def test_attributes_before_setup():
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        _ = CompletionDataModule(**SMALL).shape


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"shape": [6, 7, 9]}, "shape"),
        ({"observed_fraction": 0.4}, "observed_fraction"),
        ({"validation_fraction": 0.2}, "validation_fraction"),
        ({"standardize": True}, "standardize"),
        ({"num_entries": 201}, "num_entries"),
        ({"dataset": "covid", "shape": None, "num_entries": None}, "dataset"),
    ],
)
def test_state_of_other_data_is_refused(changes, field):
    with pytest.raises(ValueError, match=f"expected the `{field}` of the checkpoint") as caught:
        ready().load_state_dict(ready(**changes).state_dict())
    assert "\n" not in str(caught.value)


def test_state_of_a_changed_file_is_refused_and_of_a_moved_one_is_not(tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 9))
    arguments = {"shape": None, "num_entries": None}
    np.save(tmp_path / "x.npy", values)
    state = ready(dataset=str(tmp_path / "x.npy"), **arguments).state_dict()
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "x.npy", values)
    ready(dataset=str(tmp_path / "other" / "x.npy"), **arguments).load_state_dict(state)
    np.save(tmp_path / "x.npy", values + 1)
    with pytest.raises(ValueError, match="expected the `checksum` of the checkpoint"):
        ready(dataset=str(tmp_path / "x.npy"), **arguments).load_state_dict(state)
    with pytest.raises(ValueError, match="expected the `dataset` of the checkpoint, None"):
        ready().load_state_dict({})


class Mean(LightningModule):
    """Predicts one number; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))
        self.evaluated: list[tuple[int, int]] = []

    def training_step(self, batch, batch_idx):
        return (batch.value - self.mean).square().sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((dataloader_idx, len(batch.value)))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.mean.expand(len(batch.index))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def test_whole_life_under_a_trainer(tmp_path):
    module = Mean()
    data = CompletionDataModule(**SMALL)
    trainer = Trainer(max_epochs=2, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, data)
    assert module.evaluated == [(0, 90), (1, 10), (2, 100)] * 2
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["CompletionDataModule"] == data.state_dict()
    module.evaluated.clear()
    trainer.test(module, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False)
    assert module.evaluated == [(0, 90), (1, 10), (2, 100)]
    (prediction,) = trainer.predict(module, data)
    assert len(prediction) == 6 * 7 * 8 - 90
    with pytest.raises(ValueError, match="expected the `seed` of the checkpoint, 0, got 1"):
        Trainer(**QUIET).test(module, ready(seed=1), ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False)


def test_hyper_parameters_are_builtins_and_rebuild_the_data(tmp_path):
    arguments = {**SMALL, "shape": (6, 7, 8), "observed_fraction": np.float64(0.5)}
    data = CompletionDataModule(**arguments)
    trainer = Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET)
    trainer.fit(Mean(), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = CompletionDataModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    again.setup()
    assert again.state_dict()["checksum"] == data.state_dict()["checksum"]


def test_sanity_check_leaves_validation_complete():
    module, data = Mean(), ready()
    Trainer(max_epochs=1, num_sanity_val_steps=1, **QUIET).fit(module, data)
    assert module.evaluated == [(0, 90), (1, 10), (2, 100)] * 2


def test_overfitting_a_batch_gives_no_warning():
    Trainer(max_epochs=1, overfit_batches=1, num_sanity_val_steps=0, **QUIET).fit(Mean(), ready())


def test_ranks_come_from_the_trainer():
    class OneOfTwo:
        global_rank = 1
        world_size = 2
        strategy = SimpleNamespace(root_device=torch.device("cpu"))

    data = ready()
    data.trainer = OneOfTwo()
    (share,) = data.train_dataloader()
    assert torch.equal(share.batch.value, data.splits["train"].value[1::2])
    assert isinstance(data.splits["train"], Entries)
    assert len(next(iter(data.val_dataloader()[0])).value) == 90
