"""The zoo's entries for text train, with every adapter and method, on a tiny model with the names of MiniLM."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

from tenzoo.cli import main
from tenzoo.models import PretrainedTransformer
from tests.runs import runs

ROOT = Path(__file__).parent.parent / "configs"
MODELS = sorted((ROOT / "text").glob("minilm_*.yaml"))
ADAPTERS = sorted((ROOT / "adapters").glob("*.yaml"))
FEW_SHOT = sorted((ROOT / "few_shot").glob("*.yaml"))
TINY = str(Path(__file__).parent / "configs" / "tiny.yaml")
WORDS = ["good", "bad", "a", "film", "it", "was", "very", "not", "and", "dull"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing:FutureWarning",
    "ignore:The number of training batches:UserWarning",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, model):
    return renamed(tmp_path_factory, model, "Roberta")


@pytest.fixture(scope="module")
def opt(tmp_path_factory, model):
    return renamed(tmp_path_factory, model, "OPT")


def renamed(tmp_path_factory, model, kind):
    """A tiny model of another kind, with the tokenizer of the BERT."""
    import transformers

    folder = tmp_path_factory.mktemp(kind)
    transformers.BertTokenizerFast.from_pretrained(model).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    if kind == "OPT":
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}
        transformers.OPTForCausalLM(transformers.OPTConfig(**sizes)).save_pretrained(folder)
    else:
        sizes |= {"intermediate_size": 48, "pad_token_id": 0}
        transformers.RobertaModel(transformers.RobertaConfig(**sizes)).save_pretrained(folder)
    return str(folder)


def sentences(folder, task):
    """Files of a few texts in the format of GLUE, as arguments."""
    generator = torch.Generator().manual_seed(0)

    def text():
        return " ".join(WORDS[k] for k in torch.randint(len(WORDS), (6,), generator=generator))

    for name, count in (("train", 60), ("dev", 20)):
        if task == "rte":
            rows = [f"{k}\t{text()}\t{text()}\t{('entailment', 'not_entailment')[k % 2]}" for k in range(count)]
            rows = ["index\tsentence1\tsentence2\tlabel", *rows]
        else:
            rows = ["sentence\tlabel", *(f"{text()}\t{k % 2}" for k in range(count))]
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    files = {"train": folder / "train.tsv", "test": folder / "dev.tsv", "cache": folder / "cache", "per_class": 20}
    return [word for name, value in files.items() for word in (f"--data.init_args.{name}", str(value))]


def fit(tmp_path, model, path, *parts):
    task = "rte" if "rte" in path.stem else "sst2"
    arguments = [
        *sentences(tmp_path, task),
        *("--data.init_args.tokenizer", model),
        *("--model.init_args.network.init_args.path", model),
        *("--trainer.default_root_dir", str(tmp_path / "runs")),
    ]
    composed = [word for config in (path, *parts, TINY) for word in ("--config", str(config))]
    return main(["fit", *composed, *arguments])


@pytest.mark.parametrize("config", MODELS, ids=lambda path: path.stem)
def test_every_model_trains(tmp_path, model, capsys, config):
    assert fit(tmp_path, model, config) == 0
    printed = capsys.readouterr().out
    assert "test" in printed
    assert "nan" not in printed
    written = {path.name for path in runs(tmp_path / "runs")[0].iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "norm_dynamics.png"} <= written


@pytest.mark.sampled(3)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["adam", "sam", "das"])
def test_every_adapter_and_method_compose(tmp_path, model, capsys, adapter, method):
    methods = ROOT / "methods" / f"{method}.yaml"
    assert fit(tmp_path, model, ROOT / "text" / "minilm_sst2_loretta.yaml", adapter, methods) == 0
    assert "test" in capsys.readouterr().out


def test_all_published_kinds_are_there():
    assert {path.stem for path in ADAPTERS} == {"lora", "flora", "loretta", "loretta_adp", "tt"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("task", FEW_SHOT, ids=lambda path: path.stem)
def test_roberta_trains_on_every_task(tmp_path, roberta, capsys, task):
    settings = yaml.safe_load(task.read_text())
    text, classes = settings["data"]["init_args"]["text"], settings["model"]["init_args"]["num_classes"]
    columns = [text] if isinstance(text, str) else text
    for name, count in (("train", 90), ("dev", 30)):
        rows = ["\t".join([*columns, "label"])]
        rows += ["\t".join([*(["a good film"] * len(columns)), str(k % classes)]) for k in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    data = {"train": tmp_path / "train.tsv", "test": tmp_path / "dev.tsv", "tokenizer": roberta, "per_class": 4}
    arguments = [word for name, value in data.items() for word in (f"--data.init_args.{name}", str(value))]
    arguments += ["--model.init_args.network.init_args.path", roberta, "--trainer.default_root_dir", str(tmp_path)]
    arguments += ["--data.init_args.cache", str(tmp_path / "cache")]
    configs = (ROOT / "text" / "roberta_large_flora.yaml", task, ROOT / "methods" / "das.yaml", TINY)
    assert main(["fit", *(word for config in configs for word in ("--config", str(config))), *arguments]) == 0
    assert "test" in capsys.readouterr().out


def test_opt_answers_by_a_word(tmp_path, opt, capsys):
    rows = ["passage\tquestion\tanswer", *(f"a good film\twas it good\t{k % 2 == 0}" for k in range(60))]
    (tmp_path / "boolq.tsv").write_text("\n".join(rows) + "\n")
    data = {"train": tmp_path / "boolq.tsv", "test": tmp_path / "boolq.tsv", "tokenizer": opt, "per_class": 8}
    arguments = [word for name, value in data.items() for word in (f"--data.init_args.{name}", str(value))]
    arguments += ["--data.init_args.cache", str(tmp_path / "cache"), "--trainer.default_root_dir", str(tmp_path)]
    network = "--model.init_args.network.init_args"
    arguments += [f"{network}.path", opt, f"{network}.label_words", "[dull, good]"]
    arguments += [f"{network}.adapter.modes", "{32: [8, 8, 4]}", f"{network}.adapter.rank", "4"]
    configs = (ROOT / "text" / "opt_6.7b_boolq_loretta.yaml", TINY)
    assert main(["fit", *(word for config in configs for word in ("--config", str(config))), *arguments]) == 0
    assert "test" in capsys.readouterr().out


def test_without_its_model_an_entry_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(ROOT / "text" / "minilm_sst2_loretta.yaml")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "tenzoo: error: expected an existing folder in `path`, got './models/all-MiniLM-L6-v2'"


def test_the_list_shows_entries_without_their_model(tmp_path, capsys, monkeypatch):
    """It asks no hub."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "http_backoff", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["list", "--json", "--configs", str(ROOT / "text")]) == 0
    listed = {entry["config"].rpartition("/")[2]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {entry["model"] for entry in listed.values()} == {"(weights not there)"}
    assert "roberta_large_flora.yaml" in listed
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_description_tells_what_is_trained(model, capsys):
    config = str(ROOT / "text" / "minilm_sst2_loretta.yaml")
    paths = ["--model.init_args.network.init_args.path", model, "--data.init_args.tokenizer", model]
    assert main(["describe", "--config", config, *paths]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    settings = yaml.safe_load(Path(config).read_text())["model"]["init_args"]["network"]["init_args"]
    network = PretrainedTransformer(model, adapter=settings["adapter"])
    numbers = [
        sum(p.numel() for p in network.parameters() if p.requires_grad or not trained) for trained in (True, False)
    ]
    assert last == f"trained: {numbers[0]:,} of {numbers[1]:,} parameters; the others are frozen"
