import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenzoo.data import CompletionDataModule, Entries
from tenzoo.data.completion.unseen import UnseenLoader


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    seed=st.integers(0, 999),
    size=st.integers(1, 50),
    share=st.floats(0, 1),
)
def test_the_unseen_cells_are_those_of_the_dense_tensor(shape, seed, size, share):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape).astype(np.float32)
    values[generator.random(shape) < 0.3] = np.nan
    known = ~np.isnan(values)
    trained = known & (generator.random(shape) < share)
    entries, train = (
        Entries(torch.from_numpy(np.argwhere(mask)), torch.from_numpy(values[mask])) for mask in (known, trained)
    )
    if not len(entries) or trained.all():
        return
    loader = UnseenLoader(shape, train, entries, batch_size=size)
    batches = list(loader)
    assert len(loader) == len(batches)
    assert all(len(batch.value) == size for batch in batches[:-1])
    np.testing.assert_array_equal(torch.cat([batch.index for batch in batches]), np.argwhere(~trained))
    np.testing.assert_array_equal(torch.cat([batch.value for batch in batches]), values[~trained])


def test_a_large_tensor_is_completed_from_end_to_end(tmp_path):
    """More cells than used to be completed: 10 million."""
    index = np.stack(np.meshgrid(np.arange(300), np.arange(0, 200, 40), [0, 199], indexing="ij"), -1).reshape(-1, 3)
    np.savez(tmp_path / "x.npz", indices=index, values=np.arange(len(index)) % 7, shape=np.array([300, 200, 200]))
    data = CompletionDataModule(str(tmp_path / "x.npz"), observed_fraction=0.9, validation_fraction=0.1)
    data.setup()
    loader = data.predict_dataloader()
    cells, known, last, order = 0, 0, -1, np.array([200 * 200, 200, 1])
    for batch in loader:
        number = batch.index.numpy() @ order
        assert number[0] > last
        assert (np.diff(number) > 0).all()
        last, cells, known = int(number[-1]), cells + len(number), known + int((~np.isnan(batch.value.numpy())).sum())
    assert cells == 300 * 200 * 200 - len(data.splits["train"])
    assert known == len(index) - len(data.splits["train"])


HUGE = {"dataset": "synthetic", "shape": [10**4, 10**3, 10**3], "num_entries": 400}


@pytest.mark.parametrize(("fraction", "also"), [(0.5, "indices, or 'held_out'"), (1.0, "indices$")])
def test_too_many_cells_are_refused_and_never_replaced_by_others(fraction, also):
    data = CompletionDataModule(**HUGE, observed_fraction=fraction)
    data.setup()
    cells = math.prod(HUGE["shape"]) - len(data.splits["train"])
    with pytest.raises(ValueError, match=f"in `predict_index` for a tensor with {cells} that are not .*{also}"):
        data.predict_dataloader()


def test_the_held_out_entries_alone_are_predicted_where_that_is_asked_for():
    data = CompletionDataModule(**HUGE, observed_fraction=0.5, predict_index="held_out")
    data.setup()
    (batch,) = data.predict_dataloader()
    assert torch.equal(batch.index, data.splits["held_out"].index)
    assert torch.equal(batch.value, data.splits["held_out"].value)
    with pytest.raises(ValueError, match="`predict_index` where nothing is held out, got 'held_out'"):
        CompletionDataModule(**HUGE, observed_fraction=1.0, predict_index="held_out").setup()
