"""Every config under configs/ trains, and every method goes with every model."""

from pathlib import Path

import pytest

from tenzoo.cli import main

ROOT = Path(__file__).parent.parent / "configs"
MODELS = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name != "methods")
METHODS = sorted((ROOT / "methods").glob("*.yaml"))
TINY = str(Path(__file__).parent / "configs" / "tiny.yaml")
SMALLER = {
    "synthetic_sparse_cp": ["--data.init_args.num_entries", "3000", "--data.init_args.shape", "[60,50,40]"],
    "indian_pines_tt": ["--data.init_args.batch_size", "20000", "--data.init_args.observed_fraction", "0.02"],
}
EXPECTED_METHODS = {"sgd", "adam", "adamw", "sam", "asam", "das", "das_gauge_fixed", "rebalance"}


def fit(tmp_path, *configs, args=()):
    composed = [word for config in (*configs, TINY) for word in ("--config", str(config))]
    return main(["fit", *composed, "--trainer.default_root_dir", str(tmp_path), *args])


def test_the_methods_are_all_there():
    assert {path.stem for path in METHODS} == EXPECTED_METHODS


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("config", MODELS, ids=lambda path: path.stem)
def test_every_model_trains(tmp_path, capsys, config):
    assert fit(tmp_path, config, args=SMALLER.get(config.stem, [])) == 0
    printed = capsys.readouterr().out
    assert "held out" in printed
    assert "nan" not in printed
    run = tmp_path / "version_0"
    assert {"config.yaml", "metrics.csv", "norm_dynamics.png", "checkpoints"} <= {p.name for p in run.iterdir()}


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_every_method_composes(tmp_path, capsys, method):
    assert fit(tmp_path, ROOT / "il2_tucker.yaml", method) == 0
    assert "held out" in capsys.readouterr().out
