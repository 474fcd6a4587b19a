"""What a resumed run may change of the settings of its checkpoint, and what would make another run of it."""

import pytest
import torch

from tenzoo.cli import main
from tests.cli.refused import refused
from tests.cli.test_commands import checkpoint, config, run  # noqa: F401  (fixtures)
from tests.runs import runs

DAS = ["--trainer.callbacks+=tenzoo.callbacks.DeviationAwareScaling", "--trainer.callbacks.alpha=0.01"]
EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--model.init_args.shape=[6,5,4]"]
LONGER = "--trainer.max_epochs=4"


def last(config, version):  # noqa: F811
    return runs(config.parent / "runs")[version] / "checkpoints" / "last.ckpt"


def refusal(capsys, config, *words, before=()):  # noqa: F811
    """The line with which a longer run of other settings is refused; the same run with its own is not."""
    assert run("fit", config, *before) == 0
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(config.parent / "runs"), LONGER]
    argv += ["--ckpt_path", str(last(config, 0))]
    line = refused(capsys, config.parent, [*argv, *words], ["on resume, got", "start a new run"])
    assert main([*argv, *before]) == 0
    assert "resumed with" not in capsys.readouterr().err
    return line


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("before", "words", "named"),
    [
        (DAS, [], "`trainer.callbacks of DeviationAwareScaling` = none where it has {'alpha': 0.01"),
        ([], DAS, "`trainer.callbacks of DeviationAwareScaling` = {'alpha': 0.01"),
        (DAS, [DAS[0], "--trainer.callbacks.alpha=0.02"], "DeviationAwareScaling: alpha` = 0.02 where it has 0.01"),
        (DAS, [*DAS, "--trainer.callbacks.gauge_fixed=true"], "DeviationAwareScaling: gauge_fixed` = True where"),
        ([], ["--seed_everything=2"], "`seed_everything` = 2 where it has 1"),
        ([], ["--trainer.precision=64-true"], "`trainer.precision` = '64-true'"),
        ([], ["--trainer.limit_train_batches=1"], "`trainer.limit_train_batches` = 1 where"),
        ([], ["--data.init_args.batch_size=20"], "`data.init_args.batch_size` = 20 where it has None"),
        ([], ["--data.init_args.steps_per_epoch=2"], "`data.init_args.steps_per_epoch` = 2 where it has 3"),
        ([], ["--model.init_args.accumulate_grad_batches=3"], "accumulate_grad_batches` = 3 where it has 1"),
        ([], ["--model.init_args.gradient_clip_val=1.0"], "gradient_clip_val` = 1.0 where it has None"),
    ],
)
def test_a_resumed_run_is_not_another(config, capsys, before, words, named):  # noqa: F811
    assert named in refusal(capsys, config, *words, before=before)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averaged_weights_are_not_taken_for_those_that_were_trained(config, capsys):  # noqa: F811
    assert "EMAWeightAveraging" in refusal(capsys, config, "--model.init_args.shape=[6,5,4]", before=EMA)
    content = torch.load(last(config, 0), weights_only=True)
    del content["tenzoo_run"]  # as of a run in Python
    torch.save(content, last(config, 0))
    words = ["fit", "--config", str(config), "--model.init_args.shape=[6,5,4]", "--ckpt_path", str(last(config, 0))]
    refused(capsys, config.parent, words, ["EMAWeightAveraging"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.logger=false"],
        ["--trainer.callbacks+=LearningRateMonitor"],
        ["--trainer.callbacks+=tenzoo.callbacks.NormDynamicsMonitor"],
        ["--trainer.precision=32"],
        ["--trainer.limit_train_batches=1.0"],
        ["--trainer.log_every_n_steps=2"],
        ["--seed_everything=true"],
    ],
)
def test_what_leaves_a_run_as_it_is_may_change_without_a_word(config, checkpoint, capsys, words):  # noqa: F811
    assert run("fit", config, "--ckpt_path", str(checkpoint), LONGER, *words) == 0
    assert "resumed with" not in capsys.readouterr().err


def test_another_machine_is_said_in_a_line(config, checkpoint, capsys):  # noqa: F811
    try:
        assert run("fit", config, "--ckpt_path", str(checkpoint), LONGER, "--trainer.strategy=ddp") == 0
    finally:
        torch.distributed.destroy_process_group()
    lines = [line for line in capsys.readouterr().err.splitlines() if "resumed with" in line]
    expected = "tenzoo: resumed with trainer.strategy = 'ddp' (was 'auto'): numbers may differ from those of one run"
    assert lines == [expected]


def test_another_length_is_said_where_a_schedule_runs_over_it(config, capsys):  # noqa: F811
    cosine = "--model.init_args.lr_scheduler=cosine"
    assert run("fit", config, cosine) == 0
    assert run("fit", config, cosine, LONGER, "--ckpt_path", str(last(config, 0))) == 0
    assert "resumed with trainer.max_epochs = 4 (was 2): numbers may differ" in capsys.readouterr().err


def use(config, name):  # noqa: F811
    """Train a task of one's own."""
    lines = config.read_text().splitlines()
    where = next(number for number, line in enumerate(lines) if "CompletionTask" in line)
    optimizer = "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}"
    lines[where : where + 2] = [f"  class_path: tests.cli.own_task.{name}", f"  init_args: {{{optimizer}}}"]
    config.write_text("\n".join(lines))


def test_weights_alone_are_judged_and_not_resumed(config, capsys):  # noqa: F811
    assert run("fit", config, "--trainer.callbacks.save_weights_only=true") == 0
    words = ["--config", str(config), "--ckpt_path", str(last(config, 0))]
    named = ["`ckpt_path`", str(last(config, 0)), "save_weights_only"]
    refused(capsys, config.parent, ["fit", *words, LONGER], named)
    assert run("validate", config, *words[2:]) == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["OwnTask", "PartlySaved"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["--model.init_args.optimizer.init_args.lr=0.5"],
            "model.init_args.optimizer.init_args.lr` = 0.5 where it has",
        ),
        (["--model.init_args.optimizer.init_args.betas=[0.5,0.9]"], "betas` = [0.5, 0.9] where it has [0.9, 0.999]"),
        (["--model.init_args.sam.rho=0.1"], "`model.init_args.sam` = {"),
        (["--model.init_args.lr_scheduler=cosine"], "`model.init_args.lr_scheduler` = 'cosine' where it has None"),
        (["--model.init_args.gradient_clip_val=1.0"], "gradient_clip_val` = 1.0 where it has None"),
        (["--model.init_args.start=2"], "`model.init_args.start` = 2.0 where it has 0.0"),
        (["--model=tests.cli.own_task.Renamed"], "`model.class_path` = 'tests.cli.own_task.Renamed' where it has"),
    ],
)
def test_a_task_of_ones_own_is_not_resumed_with_other_settings(config, capsys, name, words, named):  # noqa: F811
    use(config, name)
    assert named in refusal(capsys, config, *words)


def test_a_task_of_ones_own_without_a_record_goes_on(config, capsys):  # noqa: F811
    use(config, "OwnTask")
    assert run("fit", config) == 0
    content = torch.load(last(config, 0), weights_only=True)
    del content["tenzoo_run"]["model"]  # as of an older version
    torch.save(content, last(config, 0))
    assert run("fit", config, LONGER, "--model.init_args.start=2", "--ckpt_path", str(last(config, 0))) == 0


def test_what_is_kept_of_a_run_is_no_code(config, checkpoint):  # noqa: F811
    kept = torch.load(checkpoint, weights_only=True)["tenzoo_run"]
    assert kept["seed_everything"] == 1
    assert kept["trainer"]["max_epochs"] == 2
    assert kept["data"]["init_args"]["steps_per_epoch"] == 3
    assert kept["callbacks"] == []
    assert kept["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
