"""Whatever is wrong with the input ends in one line on stderr, exit code 2, and no run directory that was touched."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from tenzoo.cli import main
from tenzoo.cli.messages import explain
from tests.cli.test_commands import config, refusal, run  # noqa: F401  (config is a fixture)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.init_args.rank", "0"], ["`rank`", "got 0"]),
        (["--model.init_args.rank", "[2,2]"], ["`rank`", "got 2: [2, 2]"]),
        (["--model.init_args.rank", "abc"], ["`model.rank`", "got abc", "int or float or list"]),
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
        (["--model.init_args.sam", "3"], ["a mapping in `model.sam`, got '3'"]),
        (["--model.init_args.optimizer.init_args.lr", "abc"], ["float in `model.optimizer.lr`, got abc"]),
        (["--model.init_args.optimizer.init_args.foo", "1"], ["weight_decay", "`model.optimizer` of Adam, got 'foo'"]),
        (
            [
                "--trainer.callbacks+=DeviationAwareScaling",
                "--trainer.callbacks.alpha=1",
                "--trainer.callbacks.normalizer=foo",
            ],
            ["'group', 'global'", "`trainer.callbacks.normalizer`, got foo"],
        ),
        (["--model.init_args.optimizer.init_args.lr", "-1"], ["positive", "`model.init_args.optimizer.init_args.lr`"]),
        (["--model.init_args.optimizer.init_args.betas", "[0.9,1]"], ["in [0, 1)", "init_args.betas`, got 1.0"]),
        (["--model.init_args.lr_scheduler", "StepLR"], ["step_size in `model.lr_scheduler`, got none"]),
        (["--data", "CompletionData"], ["CompletionDataModule", "'CompletionData'"]),
        (["--data.init_args.dataset", "covd"], ["covid", "kinetic", ".csv", "'covd'"]),
        (["--data.init_args.dataset", "nowhere.npy"], ["`dataset`", "nowhere.npy"]),
        (["--data.init_args.observed_fraction", "0"], ["`observed_fraction`", "0"]),
        (["--data.init_args.observed_fraction", "1.2"], ["`observed_fraction`", "1.2"]),
        (["--seed_everything", "-3"], ["int in [0, 4294967295] or a bool in `seed_everything`, got -3"]),
        (["--trainer.max_epoch", "3"], ["max_epochs", "under `trainer`, got 'trainer.max_epoch'"]),
        (["--nonsense=1"], ["expected one of ckpt_path, config, data, model,", "weights_only, got 'nonsense'"]),
        (["--modle.init_args.rank", "3"], ["data, model,", "weights_only, got 'modle.init_args.rank'"]),
        (["--trainer.precision", "half"], ["'bf16-mixed'", "`trainer.precision`, got half"]),
        (["--trainer.callbacks+=DeviationAwareScaling"], ["expected alpha", "got none"]),
        (["--config", "."], ["existing file in `config`"]),
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
    assert "the package wandb for WandbLogger, got none; run pip install 'wandb>=" in line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "`Monitor` cannot log as `psutil` is not installed. Requirement 'psutil' not met. HINT: Try",
            "expected the package psutil for Monitor, got none; run pip install 'psutil'",
        ),
        (
            "Invalid eta values: 2.0, 0.9",
            "expected two numbers, one in (0, 1) and one above 1, in `model.init_args.optimizer.init_args.etas`, "
            "got 2.0, 0.9",
        ),
        (
            "Learning rate should be >= 0 but is: -1",
            "expected a positive number in `model.init_args.optimizer.init_args.lr`, got -1",
        ),
        ("Invalid cross-device link: x", "Invalid cross-device link: x"),
        ("Invalid path value: x", "Invalid path value: x"),
    ],
)
def test_what_libraries_say_of_themselves(message, line):
    assert explain(message) == line


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
    assert "compress, describe, fit, list, predict, test, validate, got 'fot'" in capsys.readouterr().err
    assert main(["fit"]) == 2
    assert "give a config" in capsys.readouterr().err


def test_a_command_that_needs_a_checkpoint(config, capsys):  # noqa: F811
    assert "expected a checkpoint in `ckpt_path` for predict" in refusal(capsys, run("predict", config))


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
    assert finished.stderr.strip().splitlines()[-1].startswith("tenzoo: error: expected an existing file")
    assert "Traceback" not in finished.stderr


def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m tenzoo list --json --configs {tmp_path} | true"
    shell = ["bash", "-o", "pipefail", "-c", command]
    finished = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=120)
    assert (finished.returncode, finished.stderr) == (0, "")
