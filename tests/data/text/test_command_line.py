"""Wrong texts from a config: one line that names the culprit, exit code 2, nothing written."""

import json

import pytest

from tests.cli.refused import refused
from tests.data.text.small_texts import write_small

WRONG = {
    "train": ("none.tsv", "expected a file in `train`, got 'none.tsv', which does not exist"),
    "test": ("nobody/nothing", "a name of `datasets`, in `test`, got 'nobody/nothing': "),
    "tokenizer": ("nowhere/at-all", "in `tokenizer`, got 'nowhere/at-all': "),
    "label": ("score", "in `label`, of ['sentence', 'label'], got 'score'"),
    "text": (["sentence", "more"], "in `text`, of ['sentence', 'label'], got 'more'"),
    "label_kind": ("ratings", "label_kind"),
    "template": ("{more}", "in `template`, of ['sentence', 'label'], got 'more'"),
    "per_class": (99, "in `per_class`, got 99"),
    "max_length": (0, "expected at least 1 in `max_length`, got 0"),
    "validation_fraction": (1.5, "in `validation_fraction`, got 1.5"),
    "batch_sise": (4, "batch_size"),
}


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.filterwarnings("ignore:(?s).*JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:(?s).*was deprecated in v4")
@pytest.mark.parametrize("argument", WRONG)
def test_one_line(tmp_path, monkeypatch, capsys, argument):
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    value, message = WRONG[argument]
    data = write_small(tmp_path / "texts") | {argument: value}
    network = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 3}}
    config = {
        "model": {
            "class_path": "tenzoo.tasks.TextClassificationTask",
            "init_args": {"network": network, "num_classes": 3},
        },
        "data": {"class_path": "tenzoo.data.TextDataModule", "init_args": data},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path / "runs")},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    refused(capsys, tmp_path, ["fit", "--config", "config.yaml"], [message])
