import csv
import itertools
import json
from pathlib import Path

import pytest
import torch

from tenzoo.data import TextDataModule
from tests.data.text.small_texts import make, make_tokenizer, random_texts, save_tokenizer, write_small, write_tsv


def ready(*args, **options) -> TextDataModule:
    data = make(*args, **options)
    data.setup()
    return data


def test_batches_are_what_the_tokenizer_gives(tmp_path):
    data = ready(tmp_path, eval_batch_size=6)
    path = Path(data.hparams["validation"])
    rows = list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))
    assert data.num_classes == 3
    assert data.label_names == ["0", "1", "2"]
    (loader,) = data.val_dataloader()
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [6, 6, 6, 2]
    for start, batch in zip(range(0, 20, 6), batches, strict=True):
        texts = [row["sentence"] for row in rows[start : start + 6]]
        expected = make_tokenizer()(texts, padding=True, return_tensors="pt")
        assert batch.keys() == {*expected.keys(), "labels"}
        for name, tensor in expected.items():
            assert batch[name].dtype == torch.int64
            assert torch.equal(batch[name], tensor)
        assert batch["labels"].tolist() == [int(row["label"]) for row in rows[start : start + 6]]
        assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("truncation_side", ["left", "right"])
def test_pairs_are_truncated_and_padded_as_by_the_tokenizer(tmp_path, padding_side, truncation_side):
    sides = {"padding_side": padding_side, "truncation_side": truncation_side}
    columns = {"sentence1": random_texts(30), "sentence2": random_texts(30, seed=5), "label": ["yes", "no"] * 15}
    train = write_tsv(tmp_path / "pairs.tsv", columns)
    tokenizer = save_tokenizer(tmp_path / "other", **sides)
    data = ready(tmp_path, train=train, validation=train, tokenizer=tokenizer, max_length=17)
    (batch,) = data.val_dataloader()[0]
    expected = make_tokenizer(**sides)(
        columns["sentence1"], columns["sentence2"], padding=True, truncation=True, max_length=17, return_tensors="pt"
    )
    assert batch["input_ids"].shape == (30, 17)
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    assert data.label_names == ["no", "yes"]
    assert batch["labels"].tolist() == [1, 0] * 15


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "json", "parquet"])
def test_all_kinds_of_files_give_the_same(tmp_path, ending):
    sentences = ['a "quoted\u2028b', "c, d", "e\u0085f.", "ä b"]
    columns = {"sentence": sentences, "label": [0, 1, 1, 0]}
    path = tmp_path / f"some.{ending}"
    if ending == "tsv":
        write_tsv(path, columns)
    elif ending == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    elif ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table(columns), path)
    else:
        rows = [{"sentence": text, "label": label} for text, label in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    data = ready(tmp_path, train=str(path), validation=str(path))
    (batch,) = data.val_dataloader()[0]
    expected = make_tokenizer()(sentences, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert batch["labels"].tolist() == columns["label"]


def test_the_held_out_part_has_as_much_of_each_class(tmp_path):
    count = 200
    texts = [f"w{number % 40} " * (number // 40 + 1) for number in range(count)]
    columns = {"text": texts, "label": ["many"] * 150 + ["few"] * 50}
    train = write_tsv(tmp_path / "some.tsv", columns)
    data = ready(tmp_path, train=train, validation=None, validation_fraction=0.2)
    assert data.splits["val"].labels.bincount().tolist() == [10, 30]
    assert data.splits["train"].labels.bincount().tolist() == [40, 120]
    rows = [tuple(ids) for split in data.splits.values() for ids in all_ids(split)]
    assert len(set(rows)) == count
    again, other = (ready(tmp_path, train=train, validation=None, seed=seed) for seed in (0, 1))
    assert all_ids(ready(tmp_path, train=train, validation=None).splits["val"]) == all_ids(again.splits["val"])
    assert all_ids(again.splits["val"]) != all_ids(other.splits["val"])


def test_few_examples_of_each_class(tmp_path):
    texts = [f"w{number % 40} " * (number // 40 + 1) for number in range(200)]
    train = write_tsv(tmp_path / "some.tsv", {"text": texts, "label": ["many"] * 150 + ["few"] * 50})
    chosen = [
        ready(tmp_path, train=train, validation=None, per_class=16, validation_fraction=0.5, seed=s) for s in (0, 1)
    ]
    for data in chosen:
        assert data.splits["train"].labels.bincount().tolist() == [16, 16]
        assert data.splits["val"].labels.bincount().tolist() == [16, 16]
        assert len({tuple(ids) for split in data.splits.values() for ids in all_ids(split)}) == 64
    assert all_ids(chosen[0].splits["train"]) != all_ids(chosen[1].splits["train"])
    less = ready(tmp_path, train=train, validation=None, per_class=45, validation_fraction=0.5)
    assert less.splits["val"].labels.bincount().tolist() == [5, 45]
    given = ready(tmp_path, train=train, validation=train, per_class=16)
    assert len(given.splits["val"]) == 200
    assert all_ids(given.splits["train"]) == all_ids(chosen[0].splits["train"])


def all_ids(texts):
    ids, offsets = texts.tokens.ids.tolist(), texts.tokens.offsets.tolist()
    return [ids[start:end] for start, end in itertools.pairwise(offsets)]


def test_numbers_are_for_regression(tmp_path):
    values = [0.1 * number for number in range(30)]
    train = write_tsv(tmp_path / "some.tsv", {"text": random_texts(30), "score": values})
    data = ready(tmp_path, train=train, validation=train, label="score")
    (batch,) = data.val_dataloader()[0]
    assert data.num_classes == 1
    assert data.label_names is None
    assert torch.equal(batch["labels"], torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("truncation_side", ["left", "right"])
def test_a_template_is_kept_when_its_cells_are_cut(tmp_path, truncation_side):
    columns = {"text": ["w1 w2", "w1 w2 w3 w4 w5 w6"], "other": ["w7", "w9"], "label": [0, 1]}
    train = write_tsv(tmp_path / "some.tsv", columns)
    tokenizer = save_tokenizer(tmp_path / "other", truncation_side=truncation_side)
    given = {"train": train, "validation": train, "tokenizer": tokenizer, "template": "{{ {text} , {other} . a"}
    data = ready(tmp_path, **given, max_length=10)
    (batch,) = data.val_dataloader()[0]
    first, second = (data.tokenizer.decode(ids, skip_special_tokens=True).split() for ids in batch["input_ids"])
    assert first == ["w1", "w2", ",", "w7", ".", "a"]
    kept = ["w4", "w5", "w6"] if truncation_side == "left" else ["w1", "w2", "w3"]
    assert second == [*kept, ",", "w9", ".", "a"]
    with pytest.raises(ValueError, match="expected room for more than the template alone in `max_length`"):
        ready(tmp_path, **given, max_length=6)


def test_texts_without_labels(tmp_path):
    plain = write_tsv(tmp_path / "test.tsv", {"index": range(5), "sentence": random_texts(5, seed=9)})
    data = ready(tmp_path, test=plain)
    (batch,) = data.predict_dataloader()
    assert "labels" not in batch
    with pytest.raises(ValueError, match="expected labels in column 'label' of `test` to test with, got none in"):
        data.test_dataloader()
    data = ready(tmp_path, predict=write_small(tmp_path)["train"])
    assert all("labels" not in batch for batch in data.predict_dataloader())
    with pytest.raises(ValueError, match="expected a file or a name in `test`, got None"):
        data.test_dataloader()
    with pytest.raises(ValueError, match="expected a file or a name in `predict`, got None"):
        ready(tmp_path).predict_dataloader()
