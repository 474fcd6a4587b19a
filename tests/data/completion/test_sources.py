import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenzoo.data.completion.entries import look_up
from tenzoo.data.completion.sources import check_source, load_entries, synthetic_entries


@pytest.mark.parametrize(
    ("name", "shape", "missing"),
    [
        ("covid", (438, 6, 11), 0),
        ("il2", (13, 4, 12, 8), 192),
        ("kinetic", (64, 12, 10, 60), 1754),
        ("indian_pines", (145, 145, 200), 0),
    ],
)
def test_public_datasets(name, shape, missing):
    entries, found = load_entries(name)
    assert found == shape
    assert len(entries) == math.prod(shape) - missing
    assert entries.index.dtype == torch.int64
    assert entries.value.dtype == torch.float32
    assert entries.value.isfinite().all()
    assert (entries.index.max(dim=0).values == torch.tensor(shape) - 1).all()


def test_public_values_stand_where_they_belong():
    values = tl.to_numpy(tl.datasets.load_IL2data().tensor)  # in whatever backend is set
    entries, _ = load_entries("il2")
    np.testing.assert_array_equal(entries.value, values[tuple(entries.index.T.numpy())].astype(np.float32))


def test_kinetic_mask_is_missing_and_zeros_are_not():
    entries, shape = load_entries("kinetic")
    dense = torch.zeros(shape, dtype=torch.bool)
    dense[entries.index.unbind(1)] = True
    assert (dense.numpy() == ~tl.datasets.load_kinetic().missing_values_position).all()
    assert (entries.value == 0).sum() == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"dataset": "covid19"},
            ValueError,
            "covid, il2, indian_pines, kinetic, synthetic or .* .csv, .mat, .nc, .npy, .npz, .pt",
        ),
        ({"dataset": "x.parquet"}, ValueError, "a file ending in .csv, .mat, .nc, .npy, .npz, .pt"),
        ({"dataset": ""}, ValueError, "in `dataset`"),
        ({"dataset": 3}, TypeError, "a name, a path, .* in `dataset`, got a int"),
        ({"dataset": None}, TypeError, "in `dataset`, got a NoneType"),
        ({"dataset": "covid", "shape": (3, 4)}, ValueError, "`shape` only with"),
        ({"dataset": "covid", "num_entries": 4}, ValueError, "`num_entries` only with"),
        ({"dataset": "x.npy", "shape": (3, 4)}, ValueError, "`shape` only with"),
        ({"dataset": "x.pt", "shape": (3, 4)}, ValueError, "`shape` only with"),
        ({"dataset": "x.csv", "num_entries": 4}, ValueError, "`num_entries` only with"),
        ({"dataset": "x.csv", "shape": (3,)}, ValueError, "at least 2 modes in `shape`"),
        ({"dataset": "x.csv", "shape": ()}, ValueError, "at least 2 modes in `shape`"),
        ({"dataset": "x.csv", "shape": (3, 0)}, ValueError, "sizes from 1"),
        ({"dataset": "x.csv", "shape": (3, 2**63)}, ValueError, "sizes from 1"),
        ({"dataset": "x.csv", "shape": (3, 2.0)}, TypeError, "integers in `shape`"),
        ({"dataset": "x.csv", "shape": (3, True)}, TypeError, "integers in `shape`"),
        ({"dataset": "x.csv", "shape": "33"}, TypeError, "sequence of integers in `shape`"),
        ({"dataset": "x.csv", "shape": 9}, TypeError, "sequence of integers in `shape`"),
        ({"dataset": "synthetic", "num_entries": 4}, ValueError, "mode sizes in `shape`"),
        ({"dataset": "synthetic", "shape": (3, 4)}, ValueError, "number in `num_entries`"),
        ({"dataset": "synthetic", "shape": (3, 4), "num_entries": 13}, ValueError, "2 to 12"),
        ({"dataset": "synthetic", "shape": (3, 4), "num_entries": 1}, ValueError, "2 to 12"),
        ({"dataset": "synthetic", "shape": (3, 4), "num_entries": 4.0}, TypeError, "integer in `num_entries`"),
        ({"dataset": "synthetic", "shape": (3, 4), "num_entries": True}, TypeError, "integer in `num_entries`"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        check_source(**{"shape": None, "num_entries": None, **arguments})


def test_synthetic_is_low_rank_with_unit_variance_and_small_noise():
    shape = (30, 40)
    entries = synthetic_entries(shape, 1200, seed=3)
    dense = torch.full(shape, torch.nan)
    dense[entries.index.unbind(1)] = entries.value
    spectrum = torch.linalg.svdvals(dense)
    assert (spectrum[:4] > 3 * spectrum[4]).all()
    noise = (spectrum[4:].square().sum() / (26 * 36)).sqrt()
    assert 0.08 < noise < 0.12
    assert 0.98 < entries.value.std() < 1.03


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_synthetic_indices_are_distinct_and_inside(shape, seed, data):
    cells = math.prod(shape)
    if cells < 2:
        return
    count = data.draw(st.integers(2, cells))
    entries = synthetic_entries(tuple(shape), count, seed=seed)
    assert len(set(map(tuple, entries.index.tolist()))) == count
    assert (entries.index >= 0).all()
    assert (entries.index < torch.tensor(shape)).all()
    assert torch.equal(look_up(entries, entries.index.flip(0)), entries.value.flip(0))


def test_synthetic_sample_is_uniform():
    counts = torch.zeros(4, 5)
    for seed in range(400):
        counts[synthetic_entries((4, 5), 6, seed=seed).index.unbind(1)] += 1
    assert (counts / 400 - 6 / 20).abs().max() < 0.1  # four standard deviations are 0.092


def test_synthetic_depends_on_the_seed_alone():
    torch.manual_seed(1)
    a = synthetic_entries((9, 9, 9), 50, seed=0)
    torch.manual_seed(2)
    b = synthetic_entries((9, 9, 9), 50, seed=0)
    c = synthetic_entries((9, 9, 9), 50, seed=1)
    assert torch.equal(a.value, b.value)
    assert not torch.equal(a.value, c.value)


def test_synthetic_tensor_with_more_cells_than_int64_counts():
    entries, shape = load_entries("synthetic", shape=[10**6] * 5, num_entries=100)
    assert math.prod(shape) > 2**63
    assert look_up(entries, entries.index[:3]).tolist() == entries.value[:3].tolist()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_ten_trillion_cells_fit_in_a_gigabyte():
    code = (
        "import re, warnings; from pathlib import Path; warnings.simplefilter('error')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1]) // 1024\n"
        "from tenzoo.data import CompletionDataModule\n"
        "imported = peak()\n"
        "size = {'shape': [100_000, 100_000, 1000], 'num_entries': 1_000_000}\n"
        "data = CompletionDataModule('synthetic', **size, batch_size=999, predict_index='held_out')\n"
        "data.setup()\n"
        "next(iter(data.train_dataloader())), list(data.val_dataloader()[2]), list(data.predict_dataloader())\n"
        "assert len(data.splits['held_out']) == 700_000\n"
        "print(peak() - imported)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 250  # megabytes; the imports take 500 to 800 before
