"""Texts are classified with adapters of a pretrained transformer, under every method, and checkpoints are small."""

import csv
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

pytest.importorskip("peft", reason="needs the extra text: pip install tenzoo[text]")

from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.cores import find_core_groups
from tenzoo.dynamics.shards import own_part
from tenzoo.models import PretrainedTransformer
from tenzoo.models.pretrained_transformer import checksum
from tenzoo.tasks import SAM, TextClassificationTask
from tests.processes import in_processes

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing:FutureWarning",
    "ignore:.*was configured without a logger:UserWarning",
    "ignore:.*does not have many workers:UserWarning",
)
ADAPTER = {"factorization": "tt", "rank": 3, "r": 4, "target_modules": ["query", "value"]}
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert")
    BertModel(BertConfig(**SIZES)).save_pretrained(path)
    return str(path)


class Texts(LightningDataModule):
    """Token 5 stands in the texts of class 1, as often as the number is large in a regression."""

    label_names = ("no", 'yes, "really"')

    def __init__(self, num_classes=2, batches=6):
        super().__init__()
        self.num_classes, self.batches = num_classes, batches

    def loader(self, seed, labels=True):
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(self.batches):
            ids = torch.randint(6, 40, (8, 7), generator=generator)
            classes = torch.randint(0, max(self.num_classes, 2), (8,), generator=generator)
            ids[classes == 1, 2:5] = 5
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            targets = classes.float() if self.num_classes == 1 else classes
            made.append({**batch, "labels": targets} if labels else batch)
        return DataLoader(made, batch_size=None)

    def train_dataloader(self):
        return self.loader(0)

    def val_dataloader(self):
        return self.loader(1)

    def test_dataloader(self):
        return self.loader(2)

    def predict_dataloader(self):
        return self.loader(2, labels=False)


def task(folder, num_classes=2, *, adapter=ADAPTER, seed=0, **settings):
    seed_everything(seed, verbose=False)
    network = PretrainedTransformer(folder, num_classes, adapter=adapter)
    optimizer = settings.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=2e-2))
    return TextClassificationTask(network, num_classes=num_classes, optimizer=optimizer, **settings)


def trainer(path, *callbacks, **settings):
    settings = {
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    } | settings
    return Trainer(accelerator="cpu", default_root_dir=path, callbacks=list(callbacks), **settings)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["plain", "sam", "das"])
def test_every_method_trains_cores_and_head_alone(folder, tmp_path, method):
    model = task(folder, sam=SAM(rho=0.05) if method == "sam" else None)
    before = {name: value.clone() for name, value in model.network.named_parameters()}
    callbacks = [NormDynamicsMonitor(), *([DeviationAwareScaling(alpha=0.5)] if method == "das" else [])]
    run = trainer(tmp_path, *callbacks, max_epochs=20, enable_checkpointing=False)
    run.fit(model, Texts())
    changed = {name for name, value in model.network.named_parameters() if not torch.equal(value, before[name])}
    assert all("tensor_adapter_update" in name or "modules_to_save" in name for name in changed)
    assert {name.split(".")[-3] for name in changed if "cores" in name} == {"factorization"}
    assert run.callback_metrics["val/accuracy"] > 0.9
    assert len(find_core_groups(model)) == 2
    assert {"train/accuracy", "train/texts_per_s", "val/loss", "train/loss_epoch"} <= run.callback_metrics.keys()


def test_sam_without_a_radius_is_plain_training_with_the_same_dropout(folder, tmp_path):
    weights = []
    for sam in (None, SAM(rho=0)):
        model = task(folder, sam=sam)
        assert any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
        seed_everything(1, verbose=False)
        trainer(tmp_path, enable_checkpointing=False).fit(model, Texts())
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_dropout_acts_in_training(folder):
    model = task(folder)
    batch = next(iter(Texts().loader(0)))
    assert not torch.equal(*(model.outputs_and_targets(batch)[0] for _ in range(2)))


def test_numbers_are_judged_by_correlations(folder, tmp_path):
    model = task(folder, num_classes=1)
    run = trainer(tmp_path, max_epochs=20, enable_checkpointing=False)
    run.fit(model, Texts(num_classes=1))
    assert run.callback_metrics["val/pearson"] > 0.8
    assert run.callback_metrics["val/spearman"] > 0.7
    assert "train/accuracy" not in run.callback_metrics


def test_metrics_are_those_of_all_texts(folder, tmp_path):
    model = task(folder, metrics=["accuracy", "f1", "matthews"])
    run = trainer(tmp_path, max_epochs=10, enable_checkpointing=False)
    run.fit(model, Texts())
    [found] = run.test(model, Texts(), verbose=False)
    outputs, labels = map(torch.cat, zip(*map(model.eval().outputs_and_targets, Texts().loader(2)), strict=True))
    predicted = outputs.argmax(1)
    pairs = [((predicted == a) & (labels == b)).sum().item() for a in (0, 1) for b in (0, 1)]
    tn, fn, fp, tp = pairs
    assert found["test/accuracy"] == pytest.approx((tp + tn) / 48)
    assert found["test/f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    bottom = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert found["test/matthews"] == pytest.approx((tp * tn - fp * fn) / bottom if bottom else 0)


def test_a_resumed_run_ends_as_an_uninterrupted_one(folder, tmp_path):
    whole = task(folder, sam=SAM(rho=0.05))
    seed_everything(1, verbose=False)
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    trainer(tmp_path, saved, DeviationAwareScaling(alpha=0.5)).fit(whole, Texts())
    resumed = task(folder, sam=SAM(rho=0.05))
    checkpoint = str(tmp_path / "step=6.ckpt")
    again = ModelCheckpoint(dirpath=tmp_path / "again", every_n_train_steps=6, save_top_k=-1, filename="{step}")
    trainer(tmp_path, again, DeviationAwareScaling(alpha=0.5)).fit(
        resumed, Texts(), ckpt_path=checkpoint, weights_only=True
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class TestCheckpoints:
    def saved(self, folder, tmp_path, **settings):
        model = task(folder, **settings)
        run = trainer(tmp_path, max_epochs=1)
        run.fit(model, Texts())
        run.save_checkpoint(tmp_path / "last.ckpt")
        return model, torch.load(tmp_path / "last.ckpt", weights_only=True)

    def test_frozen_weights_are_left_out(self, folder, tmp_path):
        model, checkpoint = self.saved(folder, tmp_path)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert trained <= checkpoint["state_dict"].keys()
        assert not [
            name for name in checkpoint["state_dict"] if name in dict(model.named_parameters()) and name not in trained
        ]

    def test_a_checkpoint_is_loaded_whatever_seed_the_task_was_made_with(self, folder, tmp_path):
        model, _ = self.saved(folder, tmp_path)
        expected = trainer(tmp_path).test(model, Texts(), verbose=False)
        other = task(folder, seed=987)  # PEFT keeps the head as it was drawn
        found = trainer(tmp_path).test(other, Texts(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
        assert found == expected
        model.save_pretrained(tmp_path / "saved")
        loaded = type(model).from_pretrained(tmp_path / "saved", network=task(folder, seed=9).network)
        assert trainer(tmp_path).test(loaded, Texts(), verbose=False) == expected

    def test_an_older_checkpoint_is_loaded_with_the_seed_that_it_was_made_with(self, folder, tmp_path):
        model, checkpoint = self.saved(folder, tmp_path)
        expected = trainer(tmp_path).test(model, Texts(), verbose=False)
        checkpoint["pretrained"]["checksum"] = checksum(model.network.frozen_weights())  # with the untrained head
        torch.save(checkpoint, tmp_path / "old.ckpt")
        found = trainer(tmp_path).test(task(folder), Texts(), ckpt_path=str(tmp_path / "old.ckpt"), weights_only=True)
        assert found == expected

    def test_all_are_kept_where_all_are_trained(self, folder, tmp_path):
        model, checkpoint = self.saved(folder, tmp_path, adapter=None)
        assert checkpoint["state_dict"].keys() == model.state_dict().keys()

    def test_frozen_weights_that_were_changed_are_kept(self, folder, tmp_path):
        model = task(folder)
        with torch.no_grad():
            next(iter(model.network.frozen_weights().values())).add_(1)
        run = trainer(tmp_path, max_epochs=1)
        run.fit(model, Texts())
        run.save_checkpoint(tmp_path / "last.ckpt")
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"].keys() == model.state_dict().keys()

    @pytest.mark.parametrize("changed", [lambda x: x.flip(0), lambda x: x.roll(1, 1), lambda x: -x])
    def test_a_base_of_the_same_numbers_in_another_order_is_refused(self, folder, tmp_path, changed):
        self.saved(folder, tmp_path)
        copied = shutil.copytree(folder, tmp_path / "other")
        tensors = load_file(copied / "model.safetensors")
        name = next(name for name in tensors if "word_embeddings" in name)
        save_file(tensors | {name: changed(tensors[name]).contiguous()}, copied / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"^expected the pretrained weights that the checkpoint .* got others from"
        ):
            trainer(tmp_path).test(task(str(copied)), Texts(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)

    def test_another_base_is_refused(self, folder, tmp_path):
        self.saved(folder, tmp_path)
        torch.manual_seed(5)
        BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "other")
        other = task(str(tmp_path / "other"))
        with pytest.raises(
            ValueError, match=r"^expected the pretrained weights that the checkpoint .* got others from"
        ):
            trainer(tmp_path).test(other, Texts(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)


def trained_in(folder, strategy):
    """The trained weights after two epochs, and the numbers of the frozen ones that this process holds."""
    model = task(folder, sam=SAM(rho=0.05), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    devices = {} if strategy is None else {"devices": 2, "strategy": strategy}
    if strategy == "sharded":
        devices["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer(None, enable_checkpointing=False, **devices).fit(model, Texts())
    held = sum(own_part(value).numel() for value in model.network.frozen_weights().values())
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}, held


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_train_as_one(tmp_path, strategy):
    folder = str(tmp_path / "without_dropout")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0)).save_pretrained(folder)
    expected, whole = trained_in(folder, None)
    for weights, held in in_processes(trained_in, folder, strategy):
        assert held == whole if strategy == "ddp" else held < whole  # after validation the root is whole until a step
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_classes", [1, 2])
def test_labels_are_written_as_a_table(folder, tmp_path, num_classes):
    model = task(folder, num_classes)
    run = trainer(tmp_path, model.prediction_writer())
    predicted = torch.cat(run.predict(model, Texts(num_classes)))
    with (tmp_path / "labels.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    if num_classes == 1:
        assert header == ["value"]
        assert np.allclose([float(row[0]) for row in rows], predicted[:, 0])
        return
    assert header == ["label", "no", 'yes, "really"']
    assert [row[0] for row in rows] == [Texts.label_names[k] for k in predicted.argmax(1)]
    assert np.allclose([[float(cell) for cell in row[1:]] for row in rows], predicted)


def test_labels_are_written_as_arrays(folder, tmp_path):
    from tenzoo.prediction import PredictedLabelsWriter

    model = task(folder)
    predicted = torch.cat(trainer(tmp_path, PredictedLabelsWriter("labels.npz")).predict(model, Texts()))
    with np.load(tmp_path / "labels.npz") as arrays:
        assert [*arrays["label_names"]] == [*Texts.label_names]
        assert np.array_equal(arrays["label"], predicted.argmax(1))


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"num_classes": 0}, ValueError, r"^expected an int >= 1 in `num_classes`, got 0$"),
        ({"num_classes": "2"}, TypeError, r"^expected an int >= 1 in `num_classes`, got '2'$"),
        ({"num_classes": 2.0}, TypeError, r"^expected an int >= 1 in `num_classes`, got 2\.0$"),
        ({"num_classes": None}, TypeError, r"^expected an int >= 1 in `num_classes`, got None$"),
        (
            {"metrics": "accuracy"},
            TypeError,
            r"^expected a list of metrics, of \['accuracy', 'f1', 'matthews'\], in `metrics`, got 'accuracy'$",
        ),
        ({"metrics": 5}, TypeError, r"^expected a list of metrics, .* in `metrics`, got 5$"),
        ({"metrics": [["f1"]]}, ValueError, r"^expected metrics of classes, .* got \['f1'\]$"),
        (
            {"core_weight_decay": "0.1"},
            TypeError,
            r"^expected a finite number >= 0 or null in `core_weight_decay`, got '0\.1'$",
        ),
        (
            {"metrics": ["pearson"]},
            ValueError,
            r"^expected metrics of classes, of \['accuracy', 'f1', 'matthews'\], .* got 'pearson'$",
        ),
        (
            {"num_classes": 1, "metrics": ["f1"]},
            ValueError,
            r"^expected metrics of a regression, of \['pearson', 'spearman'\]",
        ),
    ],
)
def test_bad_settings(settings, kind, message):
    with pytest.raises(kind, match=message):
        TextClassificationTask(torch.nn.Linear(2, 2), **settings)


def test_data_of_other_classes_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"^expected 3 in `num_classes`, as in the data, got 2$"):
        trainer(tmp_path).fit(task(folder), Texts(num_classes=3))


class TestNetwork:
    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"path": "no/such/model"}, FileNotFoundError, r"^expected the folder of a model .* got 'no/such/model': "),
            ({"num_classes": 0}, ValueError, r"^expected an int >= 1 in `num_classes`, got 0$"),
            ({"num_classes": 2.0}, TypeError, r"^expected an int >= 1 in `num_classes`, got 2\.0$"),
            ({"adapter": {"ranks": 3}}, TypeError, r"^expected arguments of TensorAdapterConfig .* got 'ranks'$"),
            ({"adapter": 3}, TypeError, r"^expected a dict or a config of PEFT in `adapter`, got int$"),
            ({"label_words": ["a"]}, ValueError, r"^expected 2 words in `label_words`, one per class, got \['a'\]$"),
        ],
    )
    def test_bad_arguments(self, folder, monkeypatch, arguments, kind, message):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(kind, match=message):
            PretrainedTransformer(**{"path": folder, **arguments})

    @pytest.mark.parametrize(
        ("changed", "missing"),
        [
            (lambda name: None if "layer.0.output" in name else name, r"'bert\.encoder\.layer\.0\.output.* and 3 more"),
            (lambda name: f"other.{name}", r"'bert\.embeddings.* and \d+ more"),
            (lambda name: None if "pooler" in name else name, r"'bert\.pooler\.dense\.bias' and 1 more"),
        ],
        ids=["some", "all", "the pooling layer"],
    )
    def test_weights_that_are_missing_are_not_drawn(self, folder, tmp_path, changed, missing):
        copied = shutil.copytree(folder, tmp_path / "copy")
        tensors = load_file(copied / "model.safetensors")
        save_file(
            {changed(name): value for name, value in tensors.items() if changed(name)}, copied / "model.safetensors"
        )
        message = rf"^expected all weights of a BertForSequenceClassification in `path`, got '.*copy' without {missing}"
        with pytest.raises(ValueError, match=message):
            PretrainedTransformer(str(copied), adapter=ADAPTER)

    def test_a_pooling_layer_that_is_trained_may_be_new(self, folder, tmp_path):
        copied = shutil.copytree(folder, tmp_path / "copy")
        tensors = load_file(copied / "model.safetensors")
        save_file(
            {name: value for name, value in tensors.items() if "pooler" not in name}, copied / "model.safetensors"
        )
        assert PretrainedTransformer(str(copied)).model.bert.pooler.dense.weight.requires_grad

    def test_an_encoder_is_no_language_model(self, folder):
        with pytest.raises(
            ValueError, match=r"^expected all weights of a BertLMHeadModel in `path`, got .* without 'cls"
        ):
            PretrainedTransformer(folder, label_words=["a", "b"], adapter=ADAPTER)

    def test_a_head_of_the_files_is_kept(self, tmp_path):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
        model.save_pretrained(tmp_path)
        network = PretrainedTransformer(str(tmp_path), 3, adapter=ADAPTER).eval()
        batch = {"input_ids": torch.randint(40, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        assert torch.equal(network(**batch), model.eval()(**batch).logits)

    def test_peft_configs_and_half_precision(self, folder):
        import peft

        config = peft.LoraConfig(r=2, target_modules=["query"])
        network = PretrainedTransformer(folder, 2, adapter=config, dtype="bfloat16", activation_checkpointing=True)
        assert config.modules_to_save is None
        trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
        assert any("lora_A" in name for name in trained)
        assert any("classifier" in name for name in trained)
        assert {value.dtype for name, value in trained.items() if "lora" in name} == {torch.float32}
        network(input_ids=torch.randint(40, (2, 5)), attention_mask=torch.ones(2, 5, dtype=torch.long)).sum().backward()


class TestLabelWords:
    """A language model classifies by the word that it expects next."""

    @pytest.fixture
    def language_model(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        path = tmp_path / "llama"
        vocabulary = {word: k for k, word in enumerate(["<pad>", "<unk>", "good", "bad", "film", "a", "was", "it"])}
        raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>").save_pretrained(path)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(path)
        return str(path)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_logits_are_those_of_the_words_after_the_text(self, language_model, side):
        network = PretrainedTransformer(language_model, 2, label_words=["bad", "good"]).eval()
        texts = [[5, 4, 6], [7, 6, 5, 4, 6]]
        alone = [network.model(input_ids=torch.tensor([text])).logits[0, -1, [3, 2]] for text in texts]
        padding = [[0, 0], []]
        ids = [[*pad, *text] if side == "left" else [*text, *pad] for text, pad in zip(texts, padding, strict=True)]
        mask = torch.tensor([[int(token != 0) for token in row] for row in ids])
        batch = {"input_ids": torch.tensor(ids), "attention_mask": mask}
        if side == "left":
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        torch.testing.assert_close(network(**batch), torch.stack(alone), atol=1e-5, rtol=1e-5)

    def test_adapters_train_without_a_head(self, language_model):
        network = PretrainedTransformer(
            language_model, 2, label_words=["bad", "good"], adapter={**ADAPTER, "target_modules": ["q_proj", "v_proj"]}
        )
        assert all("tensor_adapter_update" in name for name, value in network.named_parameters() if value.requires_grad)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["good", "very good"], r"^expected words of one token in `label_words`, got 'very good' of 2 tokens$"),
            (["good", "good"], r"^expected distinct words in `label_words`, got \['good', 'good'\]$"),
        ],
    )
    def test_words_that_do_not_tell_classes_apart(self, language_model, words, message):
        with pytest.raises(ValueError, match=message):
            PretrainedTransformer(language_model, 2, label_words=words)
