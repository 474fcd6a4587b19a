import itertools

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tenzoo.data import TextDataModule
from tests.data.text.small_texts import make, random_texts, write_small, write_tsv
from tests.processes import in_processes


class Recorder(LightningModule):
    """Writes down each batch that it is given."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[tuple[list[list[int]], list[float]]] = []
        self.given: dict[str, list[dict[str, torch.Tensor]]] = {"train": [], "val": [], "test": []}
        self.weights: list[float] = []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise ConnectionError("the machine went away")
        self.seen.append((batch["input_ids"].tolist(), batch["labels"].tolist()))
        self.weights.append(self.trainer.datamodule.batch_weight)
        self.given["train"].append(batch)
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        self.given["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.given["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        return batch["input_ids"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(tmp_path, callbacks=(), **options) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {} if callbacks else {"enable_checkpointing": False}
    limits = {"num_sanity_val_steps": 0, "max_epochs": 1, **options}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet, **checkpoints, **limits)


def test_what_steps_are_given(tmp_path):
    data = make(tmp_path, test=write_small(tmp_path)["validation"], eval_batch_size=20)
    module, trainer = Recorder(), make_trainer(tmp_path)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert [len(labels) for _, labels in module.seen] == [8] * 13 + [3]
    for split in ("train", "val", "test"):
        for batch in module.given[split]:
            assert type(batch) is dict
            assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids", "labels"}
            assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    (predicted,) = trainer.predict(module, data)
    assert torch.equal(predicted, module.given["test"][0]["input_ids"])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed", "32-true"])
def test_numbers_are_not_rounded(tmp_path, precision):
    values = [0.1 + number / 3 for number in range(30)]
    train = write_tsv(tmp_path / "some.tsv", {"text": random_texts(30), "score": values})
    data = make(tmp_path, train=train, validation=train, label="score", eval_batch_size=30)
    module = Recorder()
    trainer = make_trainer(tmp_path, precision=precision)
    trainer.fit(module, data)
    expected = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(module.given["val"][0]["labels"], expected)
    assert torch.equal(torch.cat([batch["labels"] for batch in module.given["train"]]).sort().values, expected)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_every_checkpoint_resumes_exactly(tmp_path):
    steps = ModelCheckpoint(
        tmp_path / "c", "{step}", every_n_train_steps=3, save_top_k=-1, save_on_train_epoch_end=False
    )
    epochs = ModelCheckpoint(tmp_path / "c", "end-{epoch}", every_n_epochs=1, save_top_k=-1)
    whole = Recorder()
    make_trainer(tmp_path, [steps, epochs], max_epochs=2).fit(whole, make(tmp_path))
    paths = sorted((tmp_path / "c").glob("*.ckpt"))
    assert len(whole.seen) == 28
    assert len(paths) == 9 + 2
    for path in paths:
        rest = Recorder()
        make_trainer(tmp_path, max_epochs=2).fit(rest, make(tmp_path), ckpt_path=path, weights_only=True)
        assert rest.seen == whole.seen[torch.load(path, weights_only=True)["global_step"] :], path.name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("fail_at", [0, 4])
def test_the_batch_that_failed_comes_again(tmp_path, fail_at):
    class SaveOnException(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "on_exception.ckpt")

    whole, rest = Recorder(), Recorder()
    make_trainer(tmp_path).fit(whole, make(tmp_path))
    with pytest.raises(ConnectionError):
        make_trainer(tmp_path, [SaveOnException()]).fit(Recorder(fail_at), make(tmp_path))
    make_trainer(tmp_path).fit(rest, make(tmp_path), ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True)
    assert rest.seen == whole.seen[fail_at:]


def test_a_checkpoint_rebuilds_the_data_and_refuses_other(tmp_path):
    data, trainer = make(tmp_path, validation=None, text=["sentence"]), make_trainer(tmp_path)
    trainer.fit(Recorder(), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = TextDataModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.state_dict() == data.state_dict()
    assert again.hparams == data.hparams
    both = "'train' and 'val'"
    for options, splits in (
        ({"seed": 1}, both),
        ({"max_length": 9}, both),
        ({"per_class": 5}, "'train'"),
        ({"template": "{sentence} a"}, both),
        ({"validation_fraction": 0.0}, both),
    ):
        other = make(tmp_path, validation=None, **options)
        message = f"expected the `checksum` of the checkpoint, got another one of {splits}: its numbers"
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path).fit(Recorder(), other, ckpt_path=tmp_path / "x.ckpt", weights_only=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_split_that_differs_is_named(tmp_path, split):
    data, trainer = make(tmp_path), make_trainer(tmp_path)
    trainer.fit(Recorder(), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    texts = write_tsv(tmp_path / "other.tsv", {"sentence": random_texts(9, seed=5), "label": [0, 1, 2] * 3})
    other = make(tmp_path, **{"train" if split == "train" else "validation": texts})
    with pytest.raises(ValueError, match=f"`checksum` of the checkpoint, got another one of '{split}': its numbers"):
        make_trainer(tmp_path).predict(Recorder(), other, ckpt_path=tmp_path / "x.ckpt", weights_only=True)


def test_new_texts_are_tested_with_an_old_checkpoint(tmp_path):
    data, trainer = make(tmp_path), make_trainer(tmp_path)
    trainer.fit(Recorder(), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = write_tsv(tmp_path / "other.tsv", {"sentence": random_texts(9, seed=5), "label": [0, 1, 2] * 3})
    module = Recorder()
    trainer = make_trainer(tmp_path)
    trainer.test(module, make(tmp_path, test=other), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    assert len(module.given["test"][0]["labels"]) == 9


def test_without_validation_nothing_is_validated(tmp_path):
    module, data = Recorder(), make(tmp_path, validation=None, validation_fraction=0.0)
    trainer = make_trainer(tmp_path, num_sanity_val_steps=2)
    trainer.fit(module, data)
    assert trainer.validate(module, data, verbose=False) == []
    assert data.eval_split_names == ()
    assert module.given["val"] == []
    assert sum(len(labels) for _, labels in module.seen) == 107


def train_in_two(folder, given):
    module = Recorder()
    strategy = {"strategy": "ddp", "devices": 2}
    make_trainer(folder, max_epochs=2, **strategy).fit(module, TextDataModule(**given, batch_size=8))
    return [labels if weight else [] for (_, labels), weight in zip(module.seen, module.weights, strict=True)]


@pytest.mark.slow
def test_two_processes_see_each_text_once(tmp_path):
    given = write_small(tmp_path, count=105)  # the last batch has one text: the other process has none of its own
    columns = {"sentence": random_texts(105), "score": [number + 0.5 for number in range(105)]}
    given["train"] = given["validation"] = write_tsv(tmp_path / "numbered.tsv", columns)
    first, second = in_processes(train_in_two, tmp_path, given | {"label": "score"})
    assert len(first) == len(second) == 2 * 14
    one = Recorder()
    make_trainer(tmp_path, max_epochs=2).fit(one, TextDataModule(**given, label="score", batch_size=8))
    for mine, other, (_, labels) in zip(first, second, one.seen, strict=True):
        assert sorted(mine + other) == sorted(labels)
    for epoch in (slice(0, 14), slice(14, 28)):
        assert sorted(itertools.chain(*first[epoch], *second[epoch])) == columns["score"]
