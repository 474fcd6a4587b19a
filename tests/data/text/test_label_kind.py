"""Labels that are said to be classes or numbers, and those of JSON that are neither."""

import json

import pytest
import torch

from tenzoo.data import TextDataModule
from tests.data.text.small_texts import make, random_texts, write_tsv


def labelled(tmp_path, labels, name: str = "some.tsv") -> str:
    return write_tsv(tmp_path / name, {"sentence": random_texts(len(labels)), "label": labels})


def labelled_json(tmp_path, labels) -> str:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"sentence": "w1", "label": label}) + "\n" for label in labels))
    return str(path)


def ready(tmp_path, train: str, **options) -> TextDataModule:
    data = make(tmp_path, **{"train": train, "validation": train, **options})
    data.setup()
    return data


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([1, 2, 3, 4, 5, 1], ["1", "2", "3", "4", "5"], [0, 1, 2, 3, 4, 0]),
        ([100, 9, 10, -1, 9, 100], ["-1", "9", "10", "100"], [3, 1, 2, 0, 1, 3]),
        (["0.0", "1.0", "0", "1", "01", "1e0"], ["0", "1"], [0, 1, 0, 1, 1, 1]),
        ([1.5, 0.5, "0.50", 10, 2, 1.5], ["0.5", "1.5", "2", "10"], [1, 0, 0, 3, 2, 1]),
        (["b", "a", "1", "1.0", "a", "b"], ["1", "1.0", "a", "b"], [3, 2, 0, 1, 2, 3]),
        (["1e999", "1", "2", "1e999", "1", "2"], ["1", "1e999", "2"], [1, 0, 2, 1, 0, 2]),
    ],
)
def test_distinct_values_are_classes(tmp_path, labels, names, numbers):
    data = ready(tmp_path, labelled(tmp_path, labels), label_kind="classes")
    assert data.label_names == names
    assert data.num_classes == len(names)
    (batch,) = data.val_dataloader()[0]
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == numbers


@pytest.mark.parametrize("labels", [[1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1], [7] * 6])
def test_integers_are_numbers_for_regression(tmp_path, labels):
    data = ready(tmp_path, labelled(tmp_path, labels), label_kind="numbers")
    assert data.num_classes == 1
    assert data.label_names is None
    (batch,) = data.val_dataloader()[0]
    assert torch.equal(batch["labels"], torch.tensor(labels, dtype=torch.float32))


def test_whole_numbers_are_the_classes_of_integers(tmp_path):
    floats = labelled_json(tmp_path, [0.0, 1.0, 1.0, 0.0])
    integers = labelled(tmp_path, [0, 1, 0, 1])
    for train, test, expected in ((integers, floats, [0, 1, 1, 0]), (floats, integers, [0, 1, 0, 1])):
        data = ready(tmp_path, train, test=test, label_kind="classes", per_class=1)
        assert data.label_names == ["0", "1"]
        assert data.splits["test"].labels.tolist() == expected
    with pytest.raises(ValueError, match=r"got '0\.0'; give 'classes' in `label_kind` if all labels are classes$"):
        ready(tmp_path, integers, test=floats)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1, 2, 5], {}, "counted from 0 without gaps .*, got 1, 2, 5; give 'classes' or 'numbers' in `label_kind`$"),
        ([0, 1, "x"], {}, "got both: '0' and 'x'; give 'classes' in `label_kind` if all are names$"),
        ([0.0, 1.0, 0.0], {"per_class": 1}, "got 1; give 'classes' in `label_kind` if they are classes$"),
        ([0.0, 1.0, 0.0], {"per_class": 1, "label_kind": "numbers"}, "labels that are numbers, got 1$"),
        ([1, 2, "x"], {"label_kind": "numbers"}, "expected a finite number in column 'label' in line 4 of .*, got 'x'"),
        (
            [1, 2, "1e39"],
            {"label_kind": "numbers"},
            "expected a finite number in column 'label' in line 4 of .*, got '1e39'; labels have single precision$",
        ),
        ([1, 2, ""], {"label_kind": "numbers"}, "expected a label in column 'label' in line 4 of .*, got none"),
        (["1", "1.0", "01"], {"label_kind": "classes"}, "expected at least two classes in .*, got '1' alone"),
        ([0, 1], {"label_kind": "both"}, "expected 'classes', 'numbers' or None in `label_kind`, got 'both'"),
    ],
)
def test_what_does_not_fit(tmp_path, labels, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        ready(tmp_path, labelled(tmp_path, labels), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "kind", "message"),
    [
        ("0.5", None, r"of those to train on, 0, 1, .*, got '0\.5'; give 'numbers' in `label_kind` if all .* numbers$"),
        ("2", None, "got '2'$"),
        ("x", None, "got 'x'$"),
        ("0.5", "classes", r"of those to train on, 0, 1, in .*, got '0\.5'$"),
        ("9" * 5000, None, "expected a label of those to train on, 0, 1, "),
    ],
)
def test_other_labels_to_test_with(tmp_path, label, kind, message):
    train, test = labelled(tmp_path, [0, 1, 0, 1]), labelled(tmp_path, [0, 1, label], "test.tsv")
    with pytest.raises(ValueError, match=message):
        ready(tmp_path, train, test=test, label_kind=kind)


def test_classes_that_the_hub_names_are_not_numbers(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra text: pip install tenzoo[text]")
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    rows = datasets.Dataset.from_dict({"sentence": random_texts(4), "label": [0, 1, 0, 1]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert ready(tmp_path, "org/name", label_kind="classes").label_names == ["b", "a"]
    with pytest.raises(ValueError, match="expected None or 'classes' in `label_kind` for the named classes in column"):
        ready(tmp_path, "org/name", label_kind="numbers")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ('"pos" "neg" NaN "pos"', "expected a label in column 'label' in line 3 of .*, got none"),
        ('"pos" "neg" null "pos"', "expected a label in column 'label' in line 3 of .*, got none"),
        ("0.5 0.25 NaN 1", "expected a label in column 'label' in line 3 of .*, got none"),
        ('"pos" "neg" Infinity "pos"', "expected a finite number in column 'label' in line 3 of .*, got inf"),
        ("0.5 0.25 1 -1e999", "expected a finite number in column 'label' in line 4 of .*, got -inf"),
        (
            '"pos" "neg" true "pos"',
            "expected a name or a number, as above, in column 'label' in line 3 of .*, got True",
        ),
        ('true false "true"', "expected true or false, as above, in column 'label' in line 3 of .*, got 'true'"),
        ("true false 1", "expected true or false, as above, in column 'label' in line 3 of .*, got 1"),
        ('"pos" "neg" ["pos"]', r"expected a name or a number in column 'label' in line 3 of .*, got \['pos'\]"),
        ('"pos" "neg" {"a":1}', r"expected a name or a number in column 'label' in line 3 of .*, got \{'a': 1\}"),
    ],
)
def test_labels_of_json(tmp_path, labels, message):
    given = labels.split()
    path = tmp_path / "some.jsonl"
    path.write_text("".join(f'{{"sentence": "w1", "label": {label}}}\n' for label in given))
    with pytest.raises(ValueError, match=message) as caught:
        ready(tmp_path, str(path))
    assert "\n" not in str(caught.value)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(f'{{"sentence": "w1", "label": {label}}}\n' for label in given[:2]))
    with pytest.raises(ValueError, match=r"^expected .* in line [34] of "):
        ready(tmp_path, str(train), validation=str(path))
