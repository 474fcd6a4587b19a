"""What composing configs keeps, and what it does not keep without a word."""

import functools
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace

from tenzoo.cli import main
from tenzoo.cli.trainer import TenzooCLI, build
from tenzoo.zoo import composition
from tenzoo.zoo.reading import quiet
from tests.runs import runs

ROOT = Path(__file__).parents[2] / "configs"
MODELS = sorted(path for path in ROOT.glob("*.yaml"))
METHODS = sorted((ROOT / "methods").glob("*.yaml"))
OF_OPTIMIZER = {"sgd": "torch.optim.SGD", "adam": "torch.optim.Adam", "adamw": "torch.optim.AdamW"}


class Parsed(TenzooCLI):
    """Parses, and makes nothing."""

    def _parse_ckpt_path(self):
        raise StopIteration


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(composition, "rank_zero_info", lines.append)
    return lines


def parsed(*words) -> Namespace:
    cli = Parsed.__new__(Parsed)
    with warnings.catch_warnings(), suppress(StopIteration):
        quiet()
        build(cli, ["fit", *map(str, words)])
    return cli.config["fit"]


@functools.cache
def flat(*configs) -> dict:
    config = parsed(*(word for path in configs for word in ("--config", path)))
    return {key: value for key, value in config.as_flat().__dict__.items() if key != "config"}


def differences(before, after):
    return {key: after.get(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def check_method(method, models, said):
    for path in models:
        before = flat(path)
        after = flat(path, method)
        changed = differences(before, after)
        optimizer = "model.init_args.optimizer"
        if method.stem not in OF_OPTIMIZER:
            named = {"model.init_args.sam" if "sam" in method.stem else "trainer.callbacks"}
            assert {".".join(key.split(".")[:3]) if "sam" in key else key for key in changed} == named, path
            assert said == []
            continue
        kind, old = OF_OPTIMIZER[method.stem], before[f"{optimizer}.class_path"]
        assert after[f"{optimizer}.class_path"] == kind
        if kind == old:
            assert changed == {}
            assert said == []
            continue
        clipping = "model.init_args.gradient_clip_val"
        is_bounded = "Adam" in old and kind == "torch.optim.SGD" and before[clipping] is None
        bound = {clipping} if is_bounded else set()
        assert {key for key in changed if not key.startswith(optimizer)} == bound
        (line,) = said
        said.clear()
        short = [name.rpartition(".")[2] for name in (kind, old)]
        assert line.startswith(f"optimizer {short[0]} in place of {short[1]}: ")
        assert f"lr {after[f'{optimizer}.init_args.lr']}" in line


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_method_changes_what_it_names_and_nothing_else(said, method):
    kinds = ("covid_tucker", "synthetic_sparse_cp", "tr_resnet20_cifar10")  # of optimizers
    check_method(method, [path for path in MODELS if path.stem in kinds], said)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_method_changes_what_it_names_over_each_config(said, method):
    check_method(method, MODELS, said)


@pytest.mark.parametrize(
    ("config", "method", "lr", "decay", "clip"),
    [
        ("covid_tucker", "adam", 0.01, 16.0, None),
        ("covid_tucker", "adamw", 0.01, 0.01, None),
        ("covid_tucker", "sgd", 0.01, 0, 1.0),
        ("tr_resnet20_cifar10", "adam", 0.001, 5e-4, None),
        ("tr_resnet20_cifar10", "adamw", 0.001, 0.01, None),
        ("tr_resnet20_cifar10", "sgd", 0.1, 5e-4, None),
        ("synthetic_sparse_cp", "adam", 0.02, 0.0, None),
    ],
)
def test_settings_of_an_optimizer_in_place_of_another(said, config, method, lr, decay, clip):
    task = parsed("--config", ROOT / f"{config}.yaml", "--config", ROOT / "methods" / f"{method}.yaml").model.init_args
    optimizer = task.optimizer.init_args
    assert (optimizer.lr, optimizer.weight_decay, task.gradient_clip_val) == (lr, decay, clip)


OVER_ADAM = ["--config", ROOT / "covid_tucker.yaml"]
OVER_SGD = ["--config", ROOT / "tr_resnet20_cifar10.yaml"]


@pytest.mark.parametrize(
    ("words", "lr", "clip"),
    [
        ([*OVER_SGD, "--model.init_args.optimizer", "Adam"], 0.001, None),
        ([*OVER_SGD, "--model.optimizer=torch.optim.Adam"], 0.001, None),
        ([*OVER_SGD, "--model.init_args.optimizer.class_path", "torch.optim.RMSprop"], 0.01, None),
        ([*OVER_SGD, "--model.optimizer", "Adam", "--model.optimizer.lr", "0.3"], 0.3, None),
        ([*OVER_SGD, "--model.optimizer", '{"class_path": "Adam", "init_args": {"lr": 0.2}}'], 0.2, None),
        ([*OVER_SGD, "--model.optimizer.lr", "0.3", "--model.optimizer", "Adam"], 0.001, None),
        ([*OVER_SGD, "--model.optimizer", "Adam", "--model.optimizer", "SGD"], 0.1, None),
        ([*OVER_SGD, "--model.optimizer", "SGD", "--model.optimizer.lr", "0.3"], 0.3, None),
        ([*OVER_ADAM, "--model.optimizer", "SGD", "--model.optimizer.lr", "1e-6"], 1e-6, None),
        ([*OVER_ADAM, "--model.optimizer", "SGD"], 0.01, 1.0),
        ([*OVER_ADAM, "--model.optimizer", "SGD", "--model.gradient_clip_val", "3"], 0.001, 3.0),
        ([*OVER_ADAM, "--model.optimizer", "NAdam"], 0.01, None),
        ([*OVER_ADAM, "--model.optimizer", "RMSprop"], 0.01, None),
        ([*OVER_ADAM, "--model.optimizer", "RMSprop", "--model.optimizer", "SGD"], 0.01, 1.0),
        ([*OVER_ADAM, "--model.optimizer", "Adagrad"], 0.01, None),
        ([*OVER_ADAM, "--model.optimizer", "Adadelta"], 1.0, None),
        ([*OVER_ADAM, "--model.optimizer", "LBFGS"], 1.0, None),
        ([*OVER_ADAM, "--model.optimizer", "ASGD"], 0.01, 1.0),
    ],
)
def test_arguments_count_as_configs_do(said, words, lr, clip):
    task = parsed(*words).model.init_args
    assert (task.optimizer.init_args.lr, task.gradient_clip_val) == (lr, clip)


OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


def last_step(name, scale):
    """The size of the last of many steps along one gradient; RAdam begins to adapt at the sixth."""
    kind = getattr(torch.optim, name)
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    plain = {"weight_decay": 0} if name in ("Muon", "AdamW") else {}
    optimizer = kind([weight], lr=0.01, **plain)
    gradient = scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        before = weight.detach().clone()
        weight.grad = gradient.to_sparse() if name == "SparseAdam" else gradient
        optimizer.step()
    return (weight.detach() - before).norm().item()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "LBFGS"])
def test_the_gradient_is_bounded_for_optimizers_whose_steps_are_as_large_as_it(name):
    ratio = last_step(name, 1000.0) / last_step(name, 1.0)
    assert ratio == pytest.approx(1000.0 if name in composition._PROPORTIONAL else 1.0, rel=0.02)


def test_the_gradient_is_not_bounded_for_lbfgs_which_finds_its_steps_by_itself():
    ends = []
    for scale in (1.0, 1000.0):
        weight = torch.nn.Parameter(torch.full((4, 4), 5.0))
        optimizer = torch.optim.LBFGS([weight])

        def closure(weight=weight, scale=scale):
            weight.grad = scale * weight.detach()
            return scale * weight.detach().square().sum() / 2

        optimizer.step(closure)
        ends.append(weight.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)
    assert "LBFGS" not in composition._PROPORTIONAL


@pytest.mark.parametrize("name", sorted(composition._ADAPTIVE))
def test_a_learning_rate_is_kept_where_it_is_the_size_of_a_step(name):
    assert 0.002 < last_step(name, 1.0) / 4 < 0.02  # root mean square over sixteen entries, at a rate of 0.01


def test_weight_decay_stays_where_no_bound_is_set(said):
    task = parsed("--config", ROOT / "il2_tucker.yaml", "--model.optimizer", "RMSprop").model.init_args
    assert (task.optimizer.init_args.weight_decay, task.gradient_clip_val) == (3.0, None)
    assert said == ["optimizer RMSprop in place of Adam: lr 0.01, weight_decay 3.0 as before"]


def test_a_config_of_ones_own_sets_what_it_names(tmp_path, said):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": {"class_path": "Adam"}}}}))
    assert parsed(*OVER_SGD, "--config", path).model.init_args.optimizer.init_args.lr == 0.001
    assert len(said) == 1
    path.write_text("{model: {init_args: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.5}}}}}")
    assert parsed(*OVER_SGD, "--config", path).model.init_args.optimizer.init_args.lr == 0.5


# --- a tensor of one's own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fraction"),
    [
        (["--data.init_args.dataset", "mine.csv"], None),
        (["--data.dataset=mine.csv"], None),
        (["--data.init_args", "{dataset: mine.csv}"], None),
        (["--data.dataset", "mine.csv", "--data.observed_fraction", "0.3"], 0.3),
        (["--data.init_args.observed_fraction=0.3", "--data.init_args.dataset=mine.csv"], 0.3),
        (["--data.init_args", "{dataset: mine.csv, observed_fraction: 0.4}"], 0.4),
        (["--data.dataset", "il2"], 0.3),
        (["--data.dataset", "covid"], 0.3),
        ([], 0.3),
    ],
)
def test_the_split_of_a_benchmark_is_not_that_of_a_tensor_of_ones_own(said, words, fraction):
    assert parsed(*OVER_ADAM, *words).data.init_args.observed_fraction == fraction
    dropped = "validation_fraction 0.05 is the config's for 'covid': not used for 'mine.csv'; give your own"
    if fraction is None:
        dropped = f"observed_fraction 0.3 is the config's for 'covid'; {dropped}"
    own = any("mine.csv" in word for word in words)
    assert [line[: len(dropped)] for line in said] == ([dropped] if own else [])


def test_no_setting_of_a_benchmark_is_taken_for_that_of_a_tensor_of_ones_own(said):
    words = ["--config", ROOT / "synthetic_sparse_cp.yaml", "--data.dataset=mine.csv"]
    data = parsed(*words).data.init_args
    assert (data.observed_fraction, data.shape, data.num_entries) == (None, None, None)
    assert said[0].startswith(
        "num_entries 4000000 is the config's for 'synthetic'; observed_fraction 0.9 is the config's"
    )
    assert parsed(*words, "--data.shape=[9,9]").data.init_args.shape == [9, 9]


def test_configs_of_ones_own_count_as_arguments_do(tmp_path, said):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {init_args: {dataset: mine.csv}}")
    assert parsed(*OVER_ADAM, "--config", path).data.init_args.observed_fraction is None
    path.write_text("data: {init_args: {dataset: mine.csv, observed_fraction: 0.8}}")
    assert parsed(*OVER_ADAM, "--config", path).data.init_args.observed_fraction == 0.8
    assert ["observed_fraction" in line for line in said] == [True, False]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_tenth_of_a_tensor_of_ones_own_is_held_out_and_a_tenth_validates(tmp_path, capfd):
    generator = np.random.default_rng(0)
    values = 3 + np.einsum("ir,jr,kr->ijk", *(generator.normal(size=(size, 2)) for size in (9, 8, 7)))
    values[generator.random(values.shape) < 0.4] = np.nan
    np.save(tmp_path / "mine.npy", values)
    known = int((~np.isnan(values)).sum())
    words = ["fit", *map(str, OVER_ADAM), "--data.init_args.dataset", str(tmp_path / "mine.npy"), "--model.rank", "2"]
    quiet = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    assert main([*words, *quiet, f"--trainer.default_root_dir={tmp_path / 'runs'}"]) == 0
    (checkpoint,) = (runs(tmp_path / "runs")[0] / "checkpoints").glob("last.ckpt")
    counted = torch.load(checkpoint, weights_only=True)["CompletionDataModule"]["num_entries"]
    assert counted == {
        "train": known - 2 * round(0.1 * known),
        "val": round(0.1 * known),
        "held_out": round(0.1 * known),
    }
