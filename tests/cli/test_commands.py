"""fit, validate, test, predict and resuming, in this process."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from tenzoo.cli import main
from tenzoo.cli.log_folders import LogFolders
from tenzoo.cli.report import print_metrics
from tenzoo.training import DivergenceError
from tests.cli.refused import refused
from tests.hostile import Bomb
from tests.runs import runs, the_run

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: val/r2, mode: max, save_last: true}
model:
  class_path: tenzoo.tasks.CompletionTask
  init_args: {factorization: cp, rank: 2, optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}}
data:
  class_path: tenzoo.data.CompletionDataModule
  init_args: {dataset: PATH, observed_fraction: 0.6, validation_fraction: 0.2, standardize: true, steps_per_epoch: 3}
"""


@pytest.fixture
def config(tmp_path):
    """A config for a small dense tensor with three missing cells, whose runs go to a folder beside it."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.normal(size=(n, 2)) for n in (6, 5, 4))
    values = np.einsum("ir,jr,kr->ijk", a, b, c) + 3
    values[0, 0, :3] = np.nan
    np.save(tmp_path / "cube.npy", values)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("PATH", str(tmp_path / "cube.npy")))
    return path


def run(command, config, *args):
    root = str(config.parent / "runs")
    return main([command, "--config", str(config), "--trainer.default_root_dir", root, *args])


@pytest.fixture
def checkpoint(config):
    assert run("fit", config) == 0
    return runs(config.parent / "runs")[0] / "checkpoints" / "last.ckpt"


def refusal(capsys, code):
    """The one line on stderr of a refused command."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Error" in line]
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("tenzoo: error: ")
    return lines[0]


def test_fit_writes_both_logs_into_one_directory(config, checkpoint, capsys):
    directory = checkpoint.parent.parent
    names = {path.name for path in directory.iterdir()}
    assert {"metrics.csv", "config.yaml", "hparams.yaml", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    with (directory / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {f"{split}/{name}" for split in ("train", "val", "held_out") for name in ("r2", "rmse")} <= set(columns)
    assert run("fit", config) == 0  # a second run leaves the first one alone
    assert "Metrics of the weights with the best val/r2" in capsys.readouterr().out
    assert len(runs(config.parent / "runs")) == 2
    assert directory.parent.name == "config-plain-s1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}", directory.name)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_judged(config, checkpoint, command, capsys):
    capsys.readouterr()
    assert run(command, config, "--ckpt_path", str(checkpoint)) == 0
    printed = capsys.readouterr().out
    assert printed.count("held out") == 1
    assert "held_out/r2" not in printed  # Lightning's own table would repeat it


def test_predict_writes_the_completed_entries(config, checkpoint):
    for number in (1, 2):
        assert run("predict", config, "--ckpt_path", str(checkpoint)) == 0
        with np.load(runs(config.parent / "runs")[number] / "completed.npz") as written:
            indices, values = written["indices"], written["values"]
    train = round(117 * 0.6) - round(round(117 * 0.6) * 0.2)
    assert indices.shape == (120 - train, 3)
    assert np.isfinite(values).all()
    missing = (indices[:, 0] == 0) & (indices[:, 1] == 0) & (indices[:, 2] < 3)
    assert missing.sum() == 3
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    rebuilt = np.einsum("ir,jr,kr->ijk", *(state[f"model.tensor.cores.{k}"].numpy() for k in range(3)))
    expected = state["model.location"].numpy() + state["model.scale"].numpy() * rebuilt[tuple(indices.T)]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_predict_to_a_csv_of_ones_own(config, checkpoint, tmp_path):
    wanted = tmp_path / "wanted.csv"
    wanted.write_text("0,0,0\n5,4,3\n")
    root = config.parent / "runs"
    writer = ["--trainer.callbacks+=tenzoo.callbacks.CompletedEntriesWriter", "--trainer.callbacks.name=mine.csv"]
    arguments = ["--ckpt_path", str(checkpoint), "--data.init_args.predict_index", str(wanted)]
    assert run("predict", config, *arguments, *writer) == 0
    lines = (runs(root)[1] / "mine.csv").read_text().splitlines()
    assert lines[0] == "i0,i1,i2,value,known"
    assert [line.rsplit(",", 2)[0] for line in lines[1:]] == ["0,0,0", "5,4,3"]
    for _ in range(2):
        assert run("predict", config, *arguments, *writer, "--trainer.logger=false") == 0
    assert {path.name for path in root.glob("mine*")} == {"mine.csv", "mine-1.csv"}
    assert run("predict", config, *arguments, *writer[:1], f"--trainer.callbacks.name={tmp_path / 'mine.csv'}") == 2
    assert not (tmp_path / "mine.csv").exists()


def test_a_run_goes_on_where_it_stopped(config, checkpoint):
    longer = ["--trainer.max_epochs", "4"]
    assert run("fit", config, "--ckpt_path", str(checkpoint), *longer) == 0
    assert run("fit", config, *longer) == 0
    resumed, whole = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in runs(config.parent / "runs")
    )
    assert resumed["global_step"] == whole["global_step"] == 12
    for name, value in whole["state_dict"].items():
        assert value.equal(resumed["state_dict"][name]), name


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        (
            "--model.init_args.optimizer.init_args.lr",
            "0.5",
            "`model.init_args.optimizer.init_args.lr` = 0.5 where it has 0.01",
        ),
        ("--model.init_args.rank", "3", "`model.init_args.rank` = 3 where it has 2"),
        ("--model.init_args.sam.rho", "0.1", "`model.init_args.sam`"),
        ("--data.init_args.seed", "5", "seed"),
    ],
)
def test_a_resumed_run_with_other_settings_is_refused(config, checkpoint, capsys, argument, value, named):
    before = checkpoint.read_bytes()
    line = refusal(capsys, run("fit", config, "--ckpt_path", str(checkpoint), argument, value))
    assert named in line
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_a_checkpoint_of_another_model_is_refused(config, checkpoint, capsys, command):
    line = refusal(capsys, run(command, config, "--ckpt_path", str(checkpoint), "--model.init_args.rank", "3"))
    assert "checkpoint of this model in `ckpt_path`" in line


@pytest.mark.parametrize("keyword", ["hpc", "registry"])
def test_a_checkpoint_keyword_of_lightning_is_refused(config, checkpoint, capsys, keyword):
    line = refusal(capsys, run("fit", config, "--ckpt_path", keyword))
    assert f"`ckpt_path`, got '{keyword}'" in line


def test_the_checkpoint_called_last_is_the_last_state(config, capsys):
    text = config.read_text().replace("monitor: val/r2, mode: max, save_last: true", "filename: last")
    config.write_text(text)
    assert run("fit", config) == 0
    last = runs(config.parent / "runs")[0] / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert run("fit", config, "--ckpt_path", str(last), "--trainer.max_epochs", "3") == 0
    resumed = torch.load(the_run(config.parent / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 9


def test_a_checkpoint_whose_optimizer_is_code_is_not_resumed_with_another(config, checkpoint, capsys):
    content = torch.load(checkpoint, weights_only=True)
    del (
        content["tenzoo_run"],
        content["hyper_parameters"]["optimizer"],
    )  # as from CompletionTask(optimizer=lambda parameters: ...)
    made = config.parent / "python.ckpt"
    torch.save(content, made)
    line = refusal(capsys, run("fit", config, "--ckpt_path", str(made)))
    assert "`model.init_args.optimizer`" in line


def test_a_new_argument_of_the_optimizer_is_a_difference(config, checkpoint, capsys):
    option = "--model.init_args.optimizer.init_args.weight_decay"
    line = refusal(capsys, run("fit", config, "--ckpt_path", str(checkpoint), option, "0.5"))
    assert "`model.init_args.optimizer.init_args.weight_decay` = 0.5" in line


@pytest.mark.parametrize("rank", ["1000000000000", "1000000000000000000", "10000000000000000000"])
def test_a_rank_that_fits_no_memory_is_refused(config, capsys, rank):
    line = refusal(capsys, run("fit", config, "--model.init_args.rank", rank))
    assert "fit into memory" in line


@pytest.mark.parametrize(
    "mistake",
    [
        ("--model.init_args.shape", "[2,2,2]"),
        ("--model.init_args.optimizer", "torch.optim.LBFGS", "--model.init_args.sam.rho", "0.1"),
    ],
)
def test_a_refused_run_leaves_no_directory(config, checkpoint, capsys, mistake):
    before = {path: path.read_bytes() for path in sorted((config.parent / "runs").rglob("*")) if path.is_file()}
    refusal(capsys, run("fit", config, *mistake))
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((config.parent / "runs").glob("*/*"))) == 1


def test_a_refused_run_leaves_what_another_has_made(config, checkpoint, monkeypatch, capsys):
    """Two runs may look for a free directory at the same moment."""
    others = []
    make = LogFolders._make

    def late(folders, folder):
        if folder.exists():  # the run before began in the same second
            return make(folders, folder)
        monkeypatch.setattr(LogFolders, "_make", make)
        (folder / "checkpoints").mkdir(parents=True)
        others.append(folder)
        return make(folders, folder)

    monkeypatch.setattr(LogFolders, "_make", late)
    refusal(capsys, run("fit", config, "--model.init_args.shape", "[2,2,2]"))
    assert (others[0] / "checkpoints").is_dir()
    assert len(list((config.parent / "runs").glob("*/*"))) == 2


def logger(kind, folder, *, version):
    options = {"save_dir": folder, "name": "a", "version": version}
    return ["--trainer.logger", kind, *(f"--trainer.logger.{name}={value}" for name, value in options.items())]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(("kind", "version"), [("CSVLogger", "0"), ("CSVLogger", "mine"), ("TensorBoardLogger", "0")])
def test_logs_of_another_run_are_neither_deleted_nor_mixed(config, tmp_path, capsys, command, kind, version):
    words = ["--config", str(config), *logger(kind, tmp_path / "logs", version=version)]
    assert main(["fit", *words]) == 0
    folder = tmp_path / "logs" / "a" / ("mine" if version == "mine" else "version_0")
    checkpoint = [] if command == "fit" else ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    assert (folder / "config.yaml").is_file()
    line = refused(capsys, tmp_path, [command, *words, *checkpoint], [f"`trainer.logger`, got {str(folder)!r}"])
    assert f"give {kind} another `version`" in line


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_a_refused_run_leaves_its_version_free(config, tmp_path, capsys, kind):
    words = ["fit", "--config", str(config), *logger(kind, tmp_path / "logs", version="0")]
    refused(capsys, tmp_path, [*words, "--model.init_args.shape", "[2,2,2]"], ["`shape`"])
    assert not (tmp_path / "logs").exists()
    assert main(words) == 0


def test_a_folder_in_which_two_loggers_write_is_refused_once_there_are_logs(config, tmp_path, capsys):
    both = [
        f"{{class_path: {kind}, init_args: {{save_dir: {tmp_path}, name: a, version: 0}}}}"
        for kind in ("TensorBoardLogger", "CSVLogger")
    ]
    words = ["fit", "--config", str(config), f"--trainer.logger=[{', '.join(both)}]"]
    assert main(words) == 0
    assert {"metrics.csv", "config.yaml"} <= {path.name for path in (tmp_path / "a" / "version_0").iterdir()}
    refused(capsys, tmp_path, words, ["version_0"])


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_logger_without_a_folder_of_its_own_serves_any_number_of_runs(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where checkpoints go if a logger has no folder
    (tmp_path / "logs").mkdir()
    words = ["--config", str(config), "--trainer.logger=tests.cli.own_logger.OwnLogger"]
    for folder in (str(tmp_path / "logs"), "null"):
        for _ in range(2):
            assert main(["fit", *words, f"--trainer.logger.folder={folder}", "--trainer.max_epochs=1"]) == 0
    assert {path.name for path in (tmp_path / "logs").glob("*.yaml")} == {"config.yaml", "config-1.yaml"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data.init_args.validation_fraction", "0"], "`monitor` of ModelCheckpoint, got 'val/r2'"),
        (
            [
                "--model.init_args.lr_scheduler",
                "torch.optim.lr_scheduler.ReduceLROnPlateau",
                "--model.init_args.lr_scheduler_monitor",
                "val/foo",
            ],
            "`lr_scheduler_monitor`, got 'val/foo'",
        ),
        (["--trainer.check_val_every_n_epoch", "0"], "`trainer.check_val_every_n_epoch`, got 0"),
    ],
)
def test_what_would_fail_after_an_epoch_is_refused_before(config, capsys, arguments, named):
    assert named in refusal(capsys, run("fit", config, *arguments))


def test_each_of_two_checkpoint_callbacks_is_looked_at(config, capsys):
    last = "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n      init_args: {filename: last}\nmodel:"
    config.write_text(config.read_text().replace("model:", last, 1))
    named = "`monitor` of ModelCheckpoint, got 'val/r2'"
    assert named in refusal(capsys, run("fit", config, "--data.init_args.validation_fraction", "0"))


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
def test_a_run_without_validation_says_where_its_weights_are(config, capsys):
    assert run("fit", config, "--trainer.limit_val_batches", "0") == 0
    folder = runs(config.parent / "runs")[0]
    assert capsys.readouterr().out.splitlines()[-1] == f"Logs and checkpoints: {folder}"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6


KEEP = "ModelCheckpoint, init_args: {filename: best"
STOP = "EarlyStopping, init_args: {patience: 1"
PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"


def with_callback(config, text):
    text = f"callbacks: [{{class_path: {text}}}}}]\n"
    config.write_text(re.sub(r"callbacks:.*?(?=model:)", text, config.read_text(), flags=re.DOTALL))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["val/r2", "train/r2", "held_out/r2", "val/rmse", "train/loss", "train/loss_epoch"])
@pytest.mark.parametrize("kind", [KEEP, STOP])
def test_the_worst_weights_are_not_kept_for_the_best(config, capsys, kind, name):
    better, worse = ("max", "min") if name.endswith("r2") else ("min", "max")
    root = ["--trainer.default_root_dir", str(config.parent / "runs")]
    with_callback(config, f"{kind}, monitor: {name}, mode: {worse}")
    argv = ["fit", "--config", str(config), *root]
    words = [f"of {kind.partition(',')[0]} for {name!r}", f"got {worse!r}", f"add mode: {better}"]
    refused(capsys, config.parent, argv, words)
    with_callback(config, f"{kind}, monitor: {name}" + (", mode: max" if better == "max" else ""))
    assert run("fit", config, "--trainer.max_epochs=1") == 0


def test_lightnings_default_mode_is_not_taken_for_a_choice(config, capsys):
    root = ["--trainer.default_root_dir", str(config.parent / "runs")]
    with_callback(config, f"{KEEP}, monitor: val/r2")
    refused(capsys, config.parent, ["fit", "--config", str(config), *root], ["ModelCheckpoint", "add mode: max"])


@pytest.mark.parametrize("sam", [[], ["--model.init_args.sam.rho=0.1"]])
def test_a_plateau_of_a_metric_is_no_end_of_its_fall(config, capsys, sam):
    words = ["--model.init_args.lr_scheduler", PLATEAU, "--model.init_args.lr_scheduler_monitor", "val/r2", *sam]
    root = ["--trainer.default_root_dir", str(config.parent / "runs")]
    argv = ["fit", "--config", str(config), *words, *root]
    refused(capsys, config.parent, argv, ["ReduceLROnPlateau for 'val/r2'", "add mode: max"])
    mode = "--model.init_args.lr_scheduler.init_args.mode=max"
    assert run("fit", config, *words, mode, "--trainer.max_epochs=1") == 0


def test_a_run_that_stops_early_says_why(config, caplog):
    with_callback(config, f"{STOP}, monitor: val/r2, mode: max, min_delta: 1000.0")
    assert run("fit", config, "--trainer.max_epochs=9") == 0
    (line,) = (record.getMessage() for record in caplog.records if "stopped early" in record.getMessage())
    reason = r"Monitored metric val/r2 did not improve in the last 1 records\. Best score: -?[\d.]+\."
    assert re.fullmatch(f"stopped early, in epoch 1: {reason}", line)
    caplog.clear()
    assert run("fit", config, "--trainer.max_epochs=1") == 0
    assert "stopped early" not in caplog.text


def test_a_resumed_run_names_its_best_weights_for_what_they_are(config, checkpoint, capsys):
    moved = config.parent / "moved.ckpt"
    moved.write_bytes(checkpoint.read_bytes())
    capsys.readouterr()
    assert run("fit", config, "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "4") == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "best val/r2" in printed  # of both runs together
    assert "since" not in printed
    shutil.rmtree(checkpoint.parent)  # a finished run writes no better weights, and does not ask for the old ones
    assert run("fit", config, "--ckpt_path", str(moved)) == 0
    assert "Metrics of the last weights" in capsys.readouterr().out
    assert run("fit", config, "--ckpt_path", str(moved), "--trainer.max_epochs", "4") == 0
    assert "best val/r2 since the run was resumed" in capsys.readouterr().out.replace("\n", " ")


def test_a_run_that_diverged_fails_and_saves_no_such_weights(config, capsys):
    optimizer = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "1e6"]
    assert run("fit", config, *optimizer) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("tenzoo: error: ")
    assert "training diverged" in lines[0]
    for path in config.parent.rglob("*.ckpt"):
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["state_dict"].values())


def test_a_time_limit_from_the_command_line(config, capsys):
    """Its defaults hold a member of an enumeration, which the saved config has to name."""
    limit = ["--trainer.callbacks+=Timer", "--trainer.callbacks.init_args.duration=00:01:00:00"]
    assert run("fit", config, *limit) == 0
    saved = (runs(config.parent / "runs")[0] / "config.yaml").read_text()
    assert "interval: step" in saved
    assert run("fit", runs(config.parent / "runs")[0] / "config.yaml") == 0


def numbers(printed):
    return [line.split() for line in printed.splitlines() if "│" in line]


@pytest.mark.parametrize("sam", [[], ["--model.init_args.sam.rho=0.1"]])
def test_averaged_weights_are_judged_and_saved(config, capsys, sam):
    shape = ["--model.init_args.shape=[6,5,4]"]
    averaging = ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"]
    epochs = ["--trainer.max_epochs=6", "--trainer.callbacks.swa_epoch_start=2"]
    assert run("fit", config, *averaging, *epochs, *shape, *sam) == 0
    printed = capsys.readouterr()
    assert "Metrics of the averaged weights" in printed.out
    assert "Warning" not in printed.err
    folder = runs(config.parent / "runs")[0] / "checkpoints"
    averaged, last = (torch.load(folder / name, weights_only=True) for name in ("averaged.ckpt", "last.ckpt"))
    name = "model.tensor.cores.0"
    assert not averaged["state_dict"][name].equal(last["state_dict"][name])
    assert run("test", config, "--ckpt_path", str(folder / "averaged.ckpt"), *shape) == 0
    assert numbers(capsys.readouterr().out) == numbers(printed.out)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_averaged_weights_of_an_earlier_run_in_the_same_folder_stay(config, tmp_path):
    averaging = ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"]
    averaging += ["--trainer.callbacks.swa_epoch_start=1", "--model.init_args.shape=[6,5,4]"]
    folder = tmp_path / "kept"
    config.write_text(config.read_text().replace("{monitor: val/r2", f"{{dirpath: {folder}, monitor: val/r2"))
    assert run("fit", config, *averaging) == 0
    first = (folder / "averaged.ckpt").read_bytes()
    for seed in (2, 3):
        assert run("fit", config, *averaging, f"--seed_everything={seed}") == 0
    assert (folder / "averaged.ckpt").read_bytes() == first
    averaged = [torch.load(path, weights_only=True)["state_dict"] for path in sorted(folder.glob("averaged*.ckpt"))]
    assert {path.name for path in folder.glob("averaged*")} == {
        "averaged.ckpt",
        "averaged-v1.ckpt",
        "averaged-v2.ckpt",
    }
    assert len({float(state["model.tensor.cores.0"].sum()) for state in averaged}) == 3


@pytest.mark.parametrize("method", ["das", "das_gauge_fixed"])
def test_a_method_that_is_added_twice_is_refused(config, capsys, method):
    twice = [word for name in ("das", method) for word in ("--config", f"configs/methods/{name}.yaml")]
    line = refused(
        capsys, config.parent, ["fit", "--config", str(config), *twice], ["one DeviationAwareScaling", "got 2"]
    )
    assert "`trainer.callbacks`" in line


@pytest.mark.parametrize(
    ("command", "limit"), [("validate", "val"), ("test", "test"), ("predict", "predict"), ("fit", "train")]
)
def test_a_command_that_would_look_at_no_batch_is_refused(config, checkpoint, capsys, command, limit):
    name = f"limit_{limit}_batches"
    words = [command, "--config", str(config), *([] if command == "fit" else ["--ckpt_path", str(checkpoint)])]
    root = ["--trainer.default_root_dir", str(config.parent / "runs")]
    for nothing in ("0", "0.0"):
        refused(
            capsys, config.parent, [*words, *root, f"--trainer.{name}", nothing], [f"`trainer.{name}` for {command}"]
        )


def test_a_metric_that_is_not_finite_is_printed_and_fails(tmp_path, capsys):
    judge = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    with pytest.raises(DivergenceError, match="val/r2 is nan, and no number to compare by"):
        print_metrics(judge, {"train/r2": torch.tensor(0.5), "val/r2": torch.tensor(torch.nan)}, weights="the weights")
    assert "nan" in capsys.readouterr().out
    print_metrics(judge, {"train/r2": torch.tensor(0.5)}, weights="the weights")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pickle", "tensor", "missing"])
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_damaged_checkpoint_is_refused(config, checkpoint, capsys, command, damage):
    bad, trap = config.parent / "bad.ckpt", config.parent / "trap"
    match damage:
        case "truncated":
            bad.write_bytes(checkpoint.read_bytes()[:2000])
        case "empty":
            bad.write_bytes(b"")
        case "text":
            bad.write_text("weights")
        case "pickle":
            torch.save({"state_dict": {}, "global_step": 1, "extra": Bomb(trap)}, bad)
        case "tensor":
            torch.save(torch.ones(3), bad)
    line = refusal(capsys, run(command, config, "--ckpt_path", str(bad)))
    assert "`ckpt_path`" in line
    assert not trap.exists()
