"""Trained weights of the package: they are whole, and judged they give the metrics of their cards."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import tenzoo
from tenzoo.cli import main
from tenzoo.tasks import CompletionTask
from tenzoo.zoo import create_model, list_models, load_task, model_info, weights

SUMS = json.loads((weights.FOLDER / weights.SUMS).read_text(encoding="utf-8"))
IMAGES = [name for name in weights.names() if "resnet" in name]
COMPLETIONS = [name for name in weights.names() if model_info(name).model.endswith("TensorCompletion")]


def card_of(name):
    """The metrics of a card, by split and name, as they are printed."""
    rows = re.findall(r"^\| (.+) \|$", (weights.FOLDER / name / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    cells = [row.split(" | ") for row in rows]
    names = next(row for row in cells if row[0] == "split")
    splits = ("train", "validation", "held out", "test")
    return {
        (row[0], name): value
        for row in cells
        if row[0] in splits
        for name, value in zip(names[1:], row[1:], strict=True)
    }


def printed(out):
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in out.splitlines() if line[:1] in "│┃"]
    names = next(row for row in rows if row[0] == "split")
    return {
        (row[0], name): value
        for row in rows
        if row[0] in ("train", "validation", "held out", "test")
        for name, value in zip(names[1:], row[1:], strict=True)
    }


def test_all_weights_are_those_that_were_published_and_small():
    assert weights.names() == sorted(SUMS)
    assert {name: weights.digest(weights.folder_of(name)) for name in SUMS} == SUMS
    files = [path for path in weights.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for path in files:
        if path.suffix in (".md", ".json"):
            assert not re.search(r"(^|\s|\")/\w+/", path.read_text(encoding="utf-8")), path  # a place of a machine


@pytest.mark.parametrize("name", COMPLETIONS)
def test_the_card_is_what_judging_gives(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--config", f"zoo:{name}", "--pretrained", "--trainer.enable_progress_bar=false"]) == 0
    shown = printed(capsys.readouterr().out)
    names = {"r2": "R²", "rmse": "RMSE"}
    assert shown == {(split, names[metric]): value for (split, metric), value in card_of(name).items()}
    assert len(shown) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_the_card_of_a_network_is_what_judging_gives(name, tmp_path, monkeypatch, capsys):
    root = os.environ.get("TENZOO_CIFAR10")
    if root is None:
        pytest.skip("set TENZOO_CIFAR10 to the folder of the official files to judge the networks of the zoo")
    monkeypatch.chdir(tmp_path)
    card = (weights.FOLDER / name / "README.md").read_text(encoding="utf-8")
    precision = re.search(r"^- \*\*precision:\*\* (.+)$", card, re.MULTILINE)[1]
    words = ["test", "--config", f"zoo:{name.partition('-')[0]}", "--pretrained", f"zoo:{name}"]
    words += ["--data.init_args.root", root, "--trainer.precision", precision, "--trainer.enable_progress_bar=false"]
    assert main(words) == 0
    shown = printed(capsys.readouterr().out)
    assert shown == {key: value for key, value in card_of(name).items() if key[0] == "test"}
    assert len(shown) == 2


def test_weights_in_python():
    assert set(list_models(pretrained=True)) <= set(list_models())
    assert "covid_tucker" in list_models("covid*", pretrained=True)
    assert list_models("synthetic*", pretrained=True) == []
    assert model_info("covid_tucker").weights == ("covid_tucker",)
    torch.manual_seed(0)
    drawn, trained = create_model("covid_tucker"), create_model("zoo:covid_tucker", pretrained=True)
    assert not drawn.tensor.cores[0].equal(trained.tensor.cores[0])
    task = load_task("covid_tucker", pretrained=True)
    assert isinstance(task, CompletionTask)
    assert task.model.tensor.cores[0].equal(trained.tensor.cores[0])
    assert trained.location != 0  # buffers are loaded, too


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3"):
        create_model("covid_tucker", pretrained=True, rank=3)
    with pytest.raises(ValueError, match="expected True or one of covid_tucker in `pretrained` for 'covid_tucker'"):
        create_model("covid_tucker", pretrained="kinetic_cp")
    with pytest.raises(ValueError, match=r"a name of weights of the zoo, one of .*, got 'synthetic_sparse_cp'"):
        create_model("synthetic_sparse_cp", pretrained=True)


def test_torch_hub():
    folder = str(Path(tenzoo.__file__).parents[1])
    if not (Path(folder) / "hubconf.py").is_file():
        pytest.skip("needs a checkout: hubconf.py is no part of the package")
    model = torch.hub.load(folder, "covid_tucker", source="local", pretrained=True)
    assert model.tensor.cores[0].equal(create_model("covid_tucker", pretrained=True).tensor.cores[0])
