"""Predictions are written batch by batch, whole or not at all, by one process."""

import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from scipy import io

from tenzoo.callbacks import CompletedEntriesWriter, PredictedClassesWriter
from tenzoo.cli import main
from tenzoo.data import CompletionDataModule
from tenzoo.prediction.arrays import GrowingArrays
from tests.processes import in_processes

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Sum(LightningModule):
    """Predicts the sum of an index, in a precision of its own."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.kind = dtype

    def predict_step(self, batch, batch_idx):
        return batch._replace(value=(batch.index.sum(1) / 3).to(self.kind))


def data(**changes):
    arguments = {"dataset": "synthetic", "shape": [60, 50, 40], "num_entries": 900, "observed_fraction": 0.5}
    return CompletionDataModule(**{**arguments, **changes})


def predict(folder, module=None, writer=None, *callbacks, source=None, **options):
    trainer = Trainer(default_root_dir=folder, callbacks=[writer or CompletedEntriesWriter(), *callbacks], **QUIET)
    trainer.predict(module or Sum(), source or data(), return_predictions=False, **options)
    return trainer


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_npz_and_csv_hold_the_same_cells(tmp_path, dtype):
    for name in ("completed.npz", "deep/completed.csv"):
        predict(tmp_path, Sum(dtype), CompletedEntriesWriter(name))
    with np.load(tmp_path / "completed.npz") as arrays:
        written = dict(arrays)
    source = data()
    source.setup()
    seen = np.zeros((60, 50, 40), dtype=bool)
    seen[tuple(source.splits["train"].index.T.numpy())] = True
    np.testing.assert_array_equal(written["indices"], np.argwhere(~seen))  # two batches, one after the other
    expected = (torch.from_numpy(np.argwhere(~seen)).sum(1) / 3).to(dtype)
    assert written["values"].dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_array_equal(written["values"], expected.to(torch.promote_types(dtype, torch.float32)))
    lines = (tmp_path / "deep" / "completed.csv").read_text().splitlines()
    assert lines[0] == "i0,i1,i2,value,known"
    table = np.loadtxt(lines[1:], delimiter=",", usecols=range(4))
    splits = {tuple(row): name for name, split in source.splits.items() for row in split.index.tolist()}
    names = {"val": "validation", "held_out": "held out"}
    marks = [names.get(splits.get(tuple(cell)), "missing") for cell in written["indices"].tolist()]
    assert [line.rsplit(",", 1)[1] for line in lines[1:]] == marks
    assert [written["known_names"][number] for number in written["known"]] == marks
    np.testing.assert_array_equal(table[:, :3], written["indices"])
    np.testing.assert_array_equal(table[:, 3].astype(written["values"].dtype), written["values"])
    assert {path.name for path in tmp_path.iterdir()} == {"completed.npz", "deep"}


def test_indices_stay_whole_in_a_csv(tmp_path):
    growing = GrowingArrays(tmp_path / "x.csv")
    growing.add({"indices": np.array([[2**62 + 1, 0]]), "values": np.array([0.1], dtype=np.float32)})
    growing.finish({"indices": ["i", "j"], "values": ["v"]})
    assert (tmp_path / "x.csv").read_text() == f"i,j,v\n{2**62 + 1},0,0.100000001\n"


def test_it_is_said_what_was_written(tmp_path, caplog, monkeypatch):
    said = []
    monkeypatch.setattr("tenzoo.prediction.base.rank_zero_info", said.append)
    source = data()
    predict(tmp_path, source=source)
    train, missing = len(source.splits["train"]), 60 * 50 * 40 - 900
    everything = (
        f"wrote {60 * 50 * 40 - train} completed entries, {missing} of them in cells without a known value (of "
        f"{missing} in all) and {900 - train} in cells with one, to {tmp_path / 'completed.npz'}"
    )
    assert said == [everything]
    predict(tmp_path, source=data(predict_index="held_out"))
    assert said[1] == (
        f"wrote 450 completed entries, 0 of them in cells without a known value (of {missing} in all) and 450 in cells "
        f"with one, to {tmp_path / 'completed-1.npz'}"
    )


def test_nothing_is_kept_in_memory():
    assert not issubclass(CompletedEntriesWriter, BasePredictionWriter)  # for these Lightning collects all predictions
    assert not issubclass(PredictedClassesWriter, BasePredictionWriter)


class Stop(Callback):
    def __init__(self, error):
        self.error = error

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_prediction_leaves_nothing(tmp_path, error):
    with pytest.raises((SystemExit, RuntimeError)):
        predict(tmp_path, None, None, Stop(error()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["completed.npz", "completed.csv"])
@pytest.mark.parametrize("room", [2**12, 2**21])  # of 3.3 MB: the rows do not fit, or only some of them
def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, name, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=r"folder with room for 'completed.*' in `trainer.default_root_dir`, got "):
            predict(tmp_path, None, CompletedEntriesWriter(name))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named_before_the_first_batch(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Sum, "predict_step", lambda *_: pytest.fail("it began"))
    with pytest.raises(OSError, match=r"in `trainer.default_root_dir`, got '.*/file' \(.*\); nothing was written"):
        predict(tmp_path / "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused(tmp_path, value):
    class Diverged(Sum):
        def predict_step(self, batch, batch_idx):
            return batch._replace(value=torch.full((len(batch.index),), value))

    with pytest.raises(ValueError, match=r"finite predictions, got 65536 that are not .* earlier checkpoint"):
        predict(tmp_path, Diverged())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", [CompletedEntriesWriter, PredictedClassesWriter])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("/tmp/x.npz", ValueError, "inside the log directory in `name`, got '/tmp/x.npz'; .*default_root_dir"),
        ("../x.npz", ValueError, "inside the log directory"),
        ("a/../../x.csv", ValueError, "inside the log directory"),
        ("x.txt", ValueError, "ending in .npz, .csv, .parquet.* in `name`"),
        (".npz", ValueError, "ending in .npz, .csv, .parquet.* in `name`"),
        (3, TypeError, "file name as str in `name`, got 3"),
    ],
)
def test_names_that_are_refused(writer, name, error, message):
    with pytest.raises(error, match=message):
        writer(name)


@pytest.mark.parametrize("writer", [CompletedEntriesWriter, PredictedClassesWriter])
@pytest.mark.parametrize("first", [True, False])
def test_every_rank_asks_for_the_log_directory(tmp_path, writer, first):
    asked = []

    class OfSomeRank:
        is_global_zero = first
        default_root_dir = str(tmp_path)
        datamodule = None
        predict_dataloaders = None

        @property
        def log_dir(self):  # a broadcast from the first rank: all have to take part
            asked.append(self)
            return str(tmp_path)

    callback = writer()
    trainer, batch = OfSomeRank(), SimpleNamespace(index=torch.ones(2, 2).long(), value=torch.ones(2))
    callback.on_predict_start(trainer, None)
    outputs = batch if writer is CompletedEntriesWriter else torch.ones(2, 3)
    callback.on_predict_batch_end(trainer, None, outputs, batch, 0)
    callback.on_predict_epoch_end(trainer, None)
    assert asked == [trainer]
    assert len(list(tmp_path.iterdir())) == first


CONFIG = """
trainer: {accelerator: cpu, max_epochs: 1, enable_progress_bar: false, enable_model_summary: false, logger: false,
          default_root_dir: ROOT, callbacks: [{class_path: ModelCheckpoint, init_args: {dirpath: ROOT/ckpt}}]}
model: {class_path: CompletionTask, init_args: {factorization: cp, rank: 2, shape: [60, 50, 40]}}
data:
  class_path: CompletionDataModule
  init_args: {dataset: synthetic, shape: [60, 50, 40], num_entries: 900, observed_fraction: 0.5}
"""


def predict_from_the_command_line(config, checkpoint, root, *more):
    words = ["predict", "--config", config, "--ckpt_path", checkpoint, "--trainer.default_root_dir", root]
    return main([*words, *more])


def test_two_processes_write_the_file_of_one(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("ROOT", str(tmp_path)))
    assert main(["fit", "--config", str(config)]) == 0
    (checkpoint,) = tmp_path.glob("ckpt/*.ckpt")
    arguments = [str(config), str(checkpoint)]
    assert predict_from_the_command_line(*arguments, str(tmp_path / "one")) == 0
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    assert in_processes(predict_from_the_command_line, *arguments, str(tmp_path / "two"), *ddp) == [0, 0]
    one, two = tmp_path / "one" / "completed.npz", tmp_path / "two" / "completed.npz"
    with np.load(one) as of_one, np.load(two) as of_two:
        assert len(of_one["values"]) > 100_000
        for name in ("indices", "values"):
            np.testing.assert_array_equal(of_one[name], of_two[name])
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["completed.npz"]


# --- one's own file, tables and whole tensors ------------------------------------------------------------------------


def labelled(**changes):
    """A frame of which two cells are missing, and one is held out."""
    pandas = pytest.importorskip("pandas", reason="needs pandas: pip install pandas")
    rows = [(f"u{i}", 10 * j, i + j / 8) for i in range(6) for j in range(5) if (i, j) not in [(0, 4), (5, 1)]]
    frame = pandas.DataFrame(rows, columns=["user", "film", "stars"])
    return CompletionDataModule(frame, index_columns=["user", "film"], value_column="stars", **changes)


def test_parquet_has_labels_and_splits(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra tables: pip install 'tenzoo[tables]'")
    writer = CompletedEntriesWriter()
    writer.write_to(str(tmp_path / "elsewhere" / "all.parquet"))
    source = labelled()
    predict(tmp_path, writer=writer, source=source)
    table = parquet.read_table(tmp_path / "elsewhere" / "all.parquet").to_pydict()
    assert list(table) == ["user", "film", "value", "known"]
    assert len(table["user"]) == 30 - len(source.splits["train"])
    rows = {(user, film): (value, known) for user, film, value, known in zip(*table.values(), strict=True)}
    assert rows["u0", "40"] == (np.float32(4 / 3), "missing")
    assert rows["u5", "10"][1] == "missing"
    assert sorted(known for _, known in rows.values()) == ["held out"] * 3 + ["missing"] * 2 + ["validation"] * 3


@pytest.mark.parametrize("ending", [".npy", ".pt", ".mat", ".nc"])
def test_whole_tensors_keep_what_is_known(tmp_path, ending):
    if ending == ".nc":
        pytest.importorskip("h5netcdf", reason="needs the extra arrays: pip install 'tenzoo[arrays]'")
    writer = CompletedEntriesWriter()
    writer.write_to(str(tmp_path / f"all{ending}"))
    predict(tmp_path, writer=writer, source=labelled(observed_fraction=0.7, validation_fraction=0.2))
    path = tmp_path / f"all{ending}"
    match ending:
        case ".npy":
            found = np.load(path)
        case ".pt":
            found = torch.load(path, weights_only=True).numpy()
        case ".mat":
            found = io.loadmat(path)["completed"]
        case _:
            xarray = pytest.importorskip("xarray")
            with xarray.open_dataset(path) as file:
                found = file["completed"].values
                assert file["user"].values.tolist() == [f"u{i}" for i in range(6)]
                assert file["film"].values.tolist() == [0, 10, 20, 30, 40]
    expected = np.add.outer(np.arange(6), np.arange(5) / 8).astype(np.float32)
    expected[0, 4], expected[5, 1] = np.float32(4 / 3), 2  # as Sum predicts
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    predict(tmp_path, writer=writer, source=labelled(observed_fraction=0.7, validation_fraction=0.2))
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"all-1{ending}", f"all{ending}"]


def test_whole_tensors_that_are_refused(tmp_path, monkeypatch):
    writer = CompletedEntriesWriter("all.pt")
    with pytest.raises(ValueError, match=r"no `predict_index` for a \.pt file, .* got 'held_out'"):
        predict(tmp_path, writer=writer, source=labelled(predict_index="held_out"))
    monkeypatch.setattr("tenzoo.prediction.cells.free_memory", lambda: 200)
    with pytest.raises(
        ValueError, match=r"fits into memory twice for a \.pt file, got 1e-07 GB where 2e-07 GB are free"
    ):
        predict(tmp_path, writer=writer, source=labelled())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_whole_tensor_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        predict(tmp_path, None, CompletedEntriesWriter("all.npy"), Stop(RuntimeError()))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_writes_where_it_is_told(tmp_path, capsys):
    words = ["--config", "covid_tucker", "--trainer.default_root_dir", str(tmp_path / "runs")]
    quick = ["--trainer.max_epochs", "1", "--data.steps_per_epoch", "1", "--trainer.log_every_n_steps", "1"]
    words += ["--trainer.enable_progress_bar", "false"]
    assert main(["fit", *words, *quick]) == 0
    words += ["--ckpt_path", "best"]
    assert main(["predict", *words, "--output", str(tmp_path / "mine.npy")]) == 0
    assert np.load(tmp_path / "mine.npy").shape == (438, 6, 11)
    assert main(["predict", *words, "--output", "mine.txt"]) == 2
    assert "ending in .npz, .csv, .parquet, .npy, .pt, .mat, .nc in `output`, got 'mine.txt'" in capsys.readouterr().err
    own = ["--trainer.callbacks", "tenzoo.prediction.CompletedEntriesWriter"]
    assert main(["predict", *words, *own, "--output", "mine.npy"]) == 2
    assert "expected no `output` where CompletionTask or its callbacks" in capsys.readouterr().err
