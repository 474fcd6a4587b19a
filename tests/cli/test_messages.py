"""Whatever is wrong with the input ends in one line on stderr, exit code 2, and no run directory that was touched."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest

from tenzoo.cli import main
from tests.cli.test_commands import config, refusal, run  # noqa: F401  (config is a fixture)

RESNET = """
model:
  class_path: tenzoo.tasks.ImageClassificationTask
  init_args:
    network:
      class_path: torchvision.models.resnet.ResNet
      init_args: {block: torchvision.models.resnet.BasicBlock, layers: [1, 1]}
data: {class_path: tenzoo.data.CIFAR10DataModule, init_args: {root: nowhere}}
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.init_args.rank", "0"], ["`rank`", "got 0"]),
        (["--model.init_args.rank", "[2,2]"], ["`rank`", "got 2: [2, 2]"]),
        (
            ["--model.init_args.rank", "abc"],
            ["`model.rank`, got abc: Expected a int; Expected a float; Expected a Sequence"],
        ),
        (["--model.init_args.rank", "1.7"], ["`rank`", "got 1.7", "(0, 1]"]),
        (["--model.init_args.shape", "[6,5,9]"], ["`shape`", "[6, 5, 4]", "[6, 5, 9]"]),
        (["--model.init_args.factorization", "cpp"], ["`factorization`", "btt", "tucker", "'cpp'"]),
        (["--model.init_args.rnak", "3"], ["rank", "'rnak'"]),
        (["--model.init_args.reduction", "max"], ["'mean', 'sum'", "got max"]),
        (["--model", "CompletionTusk"], ["CompletionTask", "'CompletionTusk'"]),
        (["--model.init_args.optimizer", "Adm"], ["AdamW", "SparseAdam", "'Adm'"]),
        (["--model.rnak.depth", "3"], ["rank", "`model` of CompletionTask, got 'rnak.depth'"]),
        (["--model.init_args.sam.radius", "1"], ["rho", "sync_ascent", "'radius'"]),
        (["--model.init_args.sam.rho", "-1"], ["`sam.rho`", "-1"]),
        (["--model.init_args.sam", "3"], ["`model.sam`, got 3"]),
        (["--model.init_args.optimizer.init_args.lr", "abc"], ["`model.optimizer.lr`, got abc", "Expected a float"]),
        (["--model.init_args.optimizer.init_args.foo", "1"], ["weight_decay", "`model.optimizer` of Adam, got 'foo'"]),
        (
            [
                "--trainer.callbacks+=DeviationAwareScaling",
                "--trainer.callbacks.alpha=1",
                "--trainer.callbacks.normalizer=foo",
            ],
            ["'group', 'global'", "`trainer.callbacks.normalizer`, got foo"],
        ),
        (["--model.init_args.optimizer.init_args.lr", "-1"], ["Invalid learning rate: -1.0", "in Adam.__init__"]),
        (
            ["--model.init_args.optimizer.init_args.betas", "[0.9,1]"],
            ["Invalid beta parameter at index 1: 1.0", "in Adam.__init__"],
        ),
        (
            ["--model.init_args.lr_scheduler", "StepLR"],
            ["`model.lr_scheduler`, got torch.optim.lr_scheduler.StepLR", "required: step_size"],
        ),
        (["--data", "CompletionData"], ["CompletionDataModule", "'CompletionData'"]),
        (["--data.init_args.dataset", "covd"], ["covid", "kinetic", ".csv", "'covd'"]),
        (["--data.init_args.dataset", "nowhere.npy"], ["`dataset`", "nowhere.npy"]),
        (["--data.init_args.observed_fraction", "0"], ["`observed_fraction`", "0"]),
        (["--data.init_args.observed_fraction", "1.2"], ["`observed_fraction`", "1.2"]),
        (["--seed_everything", "-3"], ["int in [0, 4294967295] or a bool in `seed_everything`, got -3"]),
        (["--trainer.max_epoch", "3"], ["max_epochs", "under `trainer`, got 'trainer.max_epoch'"]),
        (
            ["--nonsense=1"],
            ["expected one of ckpt_path, config, data, init_from, model,", "weights_only, got 'nonsense'"],
        ),
        (["--modle.init_args.rank", "3"], ["data, init_from, model,", "weights_only, got 'modle.init_args.rank'"]),
        (["--trainer.precision", "half"], ["'bf16-mixed'", "`trainer.precision`, got half"]),
        (
            ["--trainer.callbacks+=DeviationAwareScaling"],
            ["`trainer.callbacks`", "DeviationAwareScaling': the following arguments are required: alpha"],
        ),
        (["--config", "."], ["`config`: Path is not a file: "]),
        (["--trainer.max_epochs", "few"], ["`trainer.max_epochs`", "int", "few"]),
        (["--trainer.callbacks+=DeviationScaling"], ["DeviationAwareScaling", " more, got 'DeviationScaling'"]),
        (["--trainer.callbacks+=Rebalanced"], ["Rebalance,", "'Rebalanced'"]),
        (["--trainer.callbacks+=DeviationAwareScaling", "--trainer.callbacks.alpha=-1"], ["`alpha`", "-1"]),
        (["--trainer.gradient_clip_val", "1"], ["`gradient_clip_val`", "model.init_args.gradient_clip_val: 1"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--ckpt_path", "nowhere.ckpt"], ["`ckpt_path`", "nowhere.ckpt"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_one_line_that_names_argument_value_and_choices(config, capsys, arguments, words):  # noqa: F811
    line = refusal(capsys, run("fit", config, *arguments))
    for word in words:
        assert word in line


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="shows what is said without wandb")
@pytest.mark.parametrize("option", ["--trainer.logger", "--trainer.logger+"])
def test_a_logger_whose_package_is_missing(config, capsys, option):  # noqa: F811
    line = refusal(capsys, run("fit", config, f"{option}=WandbLogger"))
    assert "ModuleNotFoundError: Requirement 'wandb>=" in line
    assert "in WandbLogger.__init__)" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.init_args.optimizer.fused=true", "--model.init_args.optimizer.foreach=true"],
            "RuntimeError: `fused` and `foreach` cannot be `True` together. (torch/optim/adam.py:, in Adam.__init__)",
        ),
        (
            ["--trainer.callbacks+=ThroughputMonitor", "--trainer.callbacks.batch_size_fn=foo.bar"],
            "expected another value in `trainer.callbacks.batch_size_fn`, got foo.bar: Type typing.Callable"
            "[[typing.Any], int] expects a function or a callable class: No module named 'foo'",
        ),
    ],
    ids=["torch", "parser"],
)
def test_a_librarys_message_is_kept(config, capsys, arguments, message):  # noqa: F811
    line = refusal(capsys, run("fit", config, *arguments))
    assert re.sub(r"(?<=\.py:)\d+", "", line) == f"tenzoo: error: {message}"


@pytest.mark.parametrize("command", ["fit", "describe"])
def test_a_network_whose_constructor_fails(config, capsys, command):  # noqa: F811
    config.write_text(RESNET)
    line = refusal(capsys, main([command, "--config", str(config)]))
    place = r"\(torchvision/models/resnet\.py:\d+, in ResNet\.__init__\)"
    assert re.fullmatch(rf"tenzoo: error: IndexError: list index out of range {place}", line)


@pytest.mark.parametrize("separator", [";", "\t", " "])
def test_another_separator_than_the_comma(config, capsys, separator):  # noqa: F811
    path = config.parent / "entries.csv"
    path.write_text("\n".join(separator.join(row) for row in ("ijv", "015", "207")))
    line = refusal(capsys, run("fit", config, "--data.init_args.dataset", str(path)))
    assert f"separated by commas in line 1 of {str(path)!r} in `dataset`, got {f'i{separator}j{separator}v'!r}" in line


def broken_file(path, kind):
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            np.save(path, np.ones((6, 5, 4)))
            path.write_bytes(path.read_bytes()[:200])
        case "all NaN":
            np.save(path, np.full((6, 5, 4), np.nan))
        case "text":
            path.write_text("six by five by four")
        case "objects":
            np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        case "nothing missing":
            np.save(path, np.random.default_rng(0).normal(size=(6, 5, 4)))


@pytest.mark.parametrize("kind", ["empty", "truncated", "all NaN", "text", "objects", "nothing missing"])
def test_broken_data(config, capsys, kind):  # noqa: F811
    path = config.parent / "broken.npy"
    broken_file(path, kind)
    extra = ["--data.init_args.observed_fraction", "1.0"] if kind == "nothing missing" else []
    line = refusal(capsys, run("fit", config, "--data.init_args.dataset", str(path), *extra))
    assert "`observed_fraction`" in line if extra else "`dataset`" in line


@pytest.mark.parametrize(
    "text", ["model: [1,", "modle:\n  a: 1\n", "- 1\n", "model: {class_path: tenzoo.tasks.Tusk}\n"]
)
def test_broken_yaml(config, capsys, text):  # noqa: F811
    path = config.parent / "broken.yaml"
    path.write_text(text)
    assert run("fit", config, "--config", str(path)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tenzoo: error:")]
    assert len(lines) == 1


def test_a_binary_config(config, capsys):  # noqa: F811
    line = refusal(capsys, run("fit", config, "--config", str(config.parent / "cube.npy")))
    assert "text file in YAML in UTF-8" in line
    assert str(config.parent / "cube.npy") in line


def test_an_unknown_command_and_an_empty_one(capsys):
    assert main(["fot"]) == 2
    known = "completion, compress, copy, describe, fit, generate, init, list, predict, save, test, validate"
    assert f"{known}, got 'fot'; did you mean 'fit'?" in capsys.readouterr().err
    assert main(["fit"]) == 2
    assert "arguments are required: fit.data, fit.model" in capsys.readouterr().err


def test_a_command_that_needs_a_checkpoint(config, capsys):  # noqa: F811
    assert "expected a checkpoint in `ckpt_path`, or `pretrained`, for predict" in refusal(
        capsys, run("predict", config)
    )


def test_an_error_in_training_shows_its_traceback(config, monkeypatch):  # noqa: F811
    def broken(*args):
        raise ValueError("a defect, not an input")

    monkeypatch.setattr("tenzoo.tasks.CompletionTask.loss", broken)
    with pytest.raises(ValueError, match="a defect"):
        run("fit", config)


def test_from_a_shell():
    command = [sys.executable, "-m", "tenzoo", "fit", "--config", "nowhere.yaml"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 2
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("tenzoo: error: expected a file or a name of the zoo (see `tenzoo list`) in `--config`, got")
    assert "Traceback" not in finished.stderr


def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m tenzoo list --json --configs {tmp_path} | true"
    shell = ["bash", "-o", "pipefail", "-c", command]
    finished = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=120)
    assert (finished.returncode, finished.stderr) == (0, "")
