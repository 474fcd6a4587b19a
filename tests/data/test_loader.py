import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenzoo.data import CompletionBatch, Entries, EntryLoader, SequentialLoader


def entries(count: int) -> Entries:
    return Entries(torch.arange(count)[:, None].repeat(1, 3), torch.arange(float(count)))


def values(loader, epochs: int = 1) -> list[list[float]]:
    return [batch.value.tolist() for _ in range(epochs) for batch in loader]


def test_full_batch_is_the_same_tensors_every_step():
    data = entries(7)
    loader = EntryLoader(data, steps_per_epoch=3)
    batches = [*loader, *loader]
    assert len(loader) == 3
    assert len(batches) == 6
    assert isinstance(batches[0], CompletionBatch)
    assert all(batch.index is data.index and batch.value is data.value for batch in batches)
    assert len(EntryLoader(data)) == 1
    assert next(iter(EntryLoader(data, batch_size=100))).value is data.value


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 30), size=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_each_permutation_has_every_entry_once(count, size, seed):
    loader = EntryLoader(entries(count), batch_size=size, seed=seed)
    for _ in range(3):
        batches = values(loader)
        assert len(batches) == len(loader) == -(-count // size)
        assert sorted(itertools.chain(*batches)) == list(range(count))
        assert all(len(batch) == min(size, count) for batch in batches[:-1])


def test_index_and_value_stay_together():
    for batch in EntryLoader(entries(11), batch_size=4):
        assert torch.equal(batch.index[:, 0].float(), batch.value)


def test_order_depends_on_seed_and_permutation_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = values(EntryLoader(entries(50), batch_size=8, seed=1), epochs=2)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    torch.manual_seed(7)
    assert values(EntryLoader(entries(50), batch_size=8, seed=1), epochs=2) == first
    assert values(EntryLoader(entries(50), batch_size=8, seed=2), epochs=2) != first
    assert first[:7] != first[7:]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_steps_per_epoch_only_cuts_the_stream(steps):
    stream = values(EntryLoader(entries(10), batch_size=3), epochs=7)
    loader = EntryLoader(entries(10), batch_size=3, steps_per_epoch=steps)
    assert len(loader) == steps
    assert values(loader, epochs=4) == stream[: 4 * steps]


def test_an_epoch_that_is_left_early_goes_on_where_it_stopped():
    loader = EntryLoader(entries(10), batch_size=3)
    stream = values(EntryLoader(entries(10), batch_size=3), epochs=2)
    assert [next(iter(loader)).value.tolist() for _ in range(6)] == stream[:6]


@pytest.mark.parametrize("consumed", range(9))
@pytest.mark.parametrize("steps", [None, 3, 5])
def test_state_resumes_anywhere(consumed, steps):
    options = {"batch_size": 3, "steps_per_epoch": steps, "seed": 4}
    stream = values(EntryLoader(entries(10), **options), epochs=9)
    loader = EntryLoader(entries(10), **options)
    for _ in range(consumed):
        next(iter(loader))
    state = loader.state_dict()
    assert all(type(number) is int for number in state.values())
    resumed = EntryLoader(entries(10), **options)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert values(resumed) == stream[consumed : consumed + len(resumed)]


def test_state_after_another_batch_size_goes_on_in_the_next_permutation():
    loader = EntryLoader(entries(12), batch_size=6)
    loader.load_state_dict({"permutation": 2, "batch": 3})
    assert loader.state_dict() == {"permutation": 3, "batch": 0}


def test_batches_in_flight_come_again():
    loader = EntryLoader(entries(10), batch_size=3, in_flight=lambda: 1)
    assert loader.state_dict() == {"permutation": 0, "batch": 0}
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.state_dict() == {"permutation": 0, "batch": 1}


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({}, ValueError),
        (None, ValueError),
        ({"permutation": 0}, ValueError),
        ({"permutation": 0, "batch": -1}, ValueError),
        ({"permutation": 0.5, "batch": 0}, TypeError),
        ({"permutation": True, "batch": 0}, TypeError),
    ],
)
def test_bad_states(state, error):
    with pytest.raises(error, match="state_dict"):
        EntryLoader(entries(3)).load_state_dict(state)


@pytest.mark.parametrize(("count", "size"), [(10, None), (10, 4), (11, 4), (9, 4), (3, 3), (1, None)])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_each_batch(count, size, world_size):
    whole = values(EntryLoader(entries(count), batch_size=size), epochs=2)
    loaders = [
        EntryLoader(entries(count), batch_size=size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    ranks = [[share for _ in range(2) for share in loader] for loader in loaders]
    for batch, *shares in zip(whole, *ranks, strict=True):
        own = [share.batch.value.tolist() if share.weight else [] for share in shares]
        assert own == [batch[rank::world_size] for rank in range(world_size)]
        assert sorted(itertools.chain(*own)) == sorted(batch)  # each entry once
        assert [share.weight for share in shares] == pytest.approx(
            [len(part) * world_size / len(batch) for part in own], abs=0
        )
        assert all(share.batch.value.tolist() == batch[:1] for share in shares if not share.weight)


def test_full_batch_of_a_rank_is_the_same_tensors_every_step():
    first, second = EntryLoader(entries(7), steps_per_epoch=2, rank=1, world_size=2)
    assert first.batch.value is second.batch.value
    assert first.batch.value.tolist() == [1, 3, 5]
    assert first.weight == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "at least 1 in `batch_size`"),
        ({"batch_size": 2.0}, TypeError, "integer in `batch_size`"),
        ({"batch_size": True}, TypeError, "integer in `batch_size`"),
        ({"steps_per_epoch": 0}, ValueError, "at least 1 in `steps_per_epoch`"),
        ({"seed": -1}, ValueError, "at least 0 in `seed`"),
        ({"seed": None}, TypeError, "integer in `seed`"),
        ({"world_size": 0}, ValueError, "at least 1 in `world_size`"),
        ({"rank": 2, "world_size": 2}, ValueError, "less than `world_size`"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        EntryLoader(entries(5), **options)


def test_no_entries():
    with pytest.raises(ValueError, match="at least one entry"):
        EntryLoader(entries(0))


def test_sequential_loader_always_starts_anew():
    loader = SequentialLoader(entries(7), batch_size=3)
    assert len(loader) == 3
    next(iter(loader))
    assert values(loader) == [[0, 1, 2], [3, 4, 5], [6]]
    assert not hasattr(loader, "state_dict")
    with pytest.raises(ValueError, match="at least 1 in `batch_size`"):
        SequentialLoader(entries(7), batch_size=0)
