import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenzoo.data.completion.entries import Entries
from tenzoo.data.completion.splits import split_entries


def grid(rows: int, columns: int) -> Entries:
    index = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return Entries(index, torch.arange(float(rows * columns)))


def ids(entries: Entries) -> set[float]:
    return set(entries.value.tolist())


@settings(max_examples=50, deadline=None)
@given(observed=st.floats(0.2, 0.8), validation=st.floats(0.1, 0.8), seed=st.integers(0, 2**64))
def test_splits_are_disjoint_complete_and_counted(observed, validation, seed):
    entries = grid(20, 10)
    splits = split_entries(entries, (20, 10), observed_fraction=observed, validation_fraction=validation, seed=seed)
    assert list(splits) == ["train", "val", "held_out"]
    assert sum(len(split) for split in splits.values()) == 200
    assert set.union(*map(ids, splits.values())) == ids(entries)
    assert len(splits["held_out"]) == 200 - round(observed * 200)
    assert len(splits["val"]) == round(validation * round(observed * 200))
    for split in splits.values():
        assert torch.equal(split.value, split.index[:, 0] * 10.0 + split.index[:, 1])
        assert (split.value.diff() > 0).all()


def test_same_seed_same_split_whatever_the_global_generators_do():
    arguments = {"observed_fraction": 0.5, "validation_fraction": 0.2}
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = split_entries(grid(9, 9), (9, 9), seed=5, **arguments)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    torch.manual_seed(1)
    second = split_entries(grid(9, 9), (9, 9), seed=5, **arguments)
    other = split_entries(grid(9, 9), (9, 9), seed=6, **arguments)
    assert all(torch.equal(first[name].index, second[name].index) for name in first)
    assert not torch.equal(first["train"].index, other["train"].index)


def test_held_out_does_not_depend_on_the_validation_fraction():
    a, b = (
        split_entries(grid(9, 9), (9, 9), observed_fraction=0.5, validation_fraction=fraction, seed=0)
        for fraction in (0.0, 0.3)
    )
    assert torch.equal(a["held_out"].index, b["held_out"].index)
    assert "val" not in a


def test_everything_observed_where_something_is_missing():
    splits = split_entries(grid(3, 3), (3, 4), observed_fraction=1.0, validation_fraction=0.0, seed=0)
    assert list(splits) == ["train"]
    with pytest.raises(ValueError, match="less than 1 in `observed_fraction`"):
        split_entries(grid(3, 3), (3, 3), observed_fraction=1.0, validation_fraction=0.0, seed=0)


@pytest.mark.parametrize(
    ("observed", "validation", "split"),
    [(0.1, 0.0, "train"), (0.95, 0.0, "held_out"), (0.5, 0.1, "val"), (0.5, 0.99, "train"), (0.999, 0.0, "held_out")],
)
def test_splits_that_are_too_small(observed, validation, split):
    with pytest.raises(ValueError, match=f"at least 2 entries in the split '{split}'"):
        split_entries(grid(3, 4), (3, 4), observed_fraction=observed, validation_fraction=validation, seed=0)
