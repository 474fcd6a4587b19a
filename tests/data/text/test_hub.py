from typing import Any

import pytest

from tests.data.text.small_texts import make, random_texts

datasets = pytest.importorskip("datasets", reason="needs the extra text: pip install tenzoo[text]")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Any, ...]]:
    """What the hub is asked for; it has labels 0 to 2, and none in its test set."""
    calls: list[tuple[Any, ...]] = []

    def load(name, config=None, *, split):
        calls.append((name, config, split))
        if name == "nobody/nothing":
            raise ConnectionError("no such data set\nand more of this")
        features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["up", "down", "never"])}
        labels = [-1] * 12 if split == "test" else [0, 1] * 6
        columns = {"sentence": random_texts(12, seed=len(split)), "label": labels}
        return datasets.Dataset.from_dict(columns, datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_name_with_its_own_classes(tmp_path, asked):
    data = make(tmp_path, train="org/name:sub", validation="org/name:sub", test="name", predict="name::other")
    data.setup()
    assert asked == [
        ("org/name", "sub", "train"),
        ("org/name", "sub", "validation"),
        ("name", None, "test"),
        ("name", None, "other"),
    ]
    assert data.label_names == ["up", "down", "never"]
    assert data.num_classes == 3
    assert data.splits["train"].labels.tolist() == [0, 1] * 6
    with pytest.raises(
        ValueError, match="expected labels in column 'label' of `test` to test with, got none in 'name'"
    ):
        data.test_dataloader()
    assert len(list(data.predict_dataloader())) == 1


def test_a_missing_name(tmp_path, asked):
    message = "a name of `datasets`, in `train`, got 'nobody/nothing': no such data set and more of this$"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, train="nobody/nothing").setup()


def test_labels_that_the_hub_does_not_have_are_not_trained_on(tmp_path, asked):
    with pytest.raises(ValueError, match="expected a label in column 'label' in row 0 of name:sub:test, got none"):
        make(tmp_path, train="name:sub:test").setup()
