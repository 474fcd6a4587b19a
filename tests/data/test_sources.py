import math
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenzoo.data.entries import check_values, look_up
from tenzoo.data.files import read_entries, read_index
from tenzoo.data.sources import check_source, load_entries, synthetic_entries


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def save_npy(path, array):
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=True)


def save_npz(path, array):
    with path.open("wb") as file:
        np.savez(file, array)


def save_sparse(path, indices=((0, 1), (2, 0)), values=(1.0, 2.0), **others):
    np.savez(path, indices=np.asarray(indices), values=np.asarray(values), **others)


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


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt"])
def test_dense_files_drop_nan(tmp_path, ending):
    values = np.array([[1.0, np.nan, 3.0], [4.0, 5.0, 6.0]])
    path = tmp_path / f"x{ending}"
    match ending:
        case ".npy":
            np.save(path, values)
        case ".npz":
            np.savez(path, whatever=values)
        case ".pt":
            torch.save(torch.from_numpy(values).bfloat16().requires_grad_(), path)
    entries, shape = load_entries(str(path))
    assert shape == (2, 3)
    assert entries.value.tolist() == [1, 3, 4, 5, 6]
    assert entries.index.tolist() == [[0, 0], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize(
    "text", ["0,1,5\n2,0,7\n", "i,j,v\n0,1,5\n2,0,7", "\ufeff# i,j,v\r\n0,1,5.0\r\n2,0,7\r\n1,1,nan\n"]
)
def test_csv(tmp_path, text):
    path = tmp_path / "x.CSV"
    path.write_text(text)
    entries, shape = load_entries(str(path))
    assert shape in {(3, 2)}
    assert entries.index.tolist() == [[0, 1], [2, 0]]
    assert entries.value.tolist() == [5, 7]
    assert load_entries(str(path), shape=(9, 8))[1] == (9, 8)


@pytest.mark.parametrize("indices", [[[0, 1], [2, 0]], [[0.0, 1.0], [2.0, 0.0]]])
def test_sparse_npz(tmp_path, indices):
    save_sparse(tmp_path / "x.npz", indices, shape=np.array([4, 5]))
    entries, shape = load_entries(str(tmp_path / "x.npz"), shape=[4, 5])
    assert shape == (4, 5)
    assert entries.index.tolist() == [[0, 1], [2, 0]]


def test_equal_duplicates_are_merged_and_rows_sorted(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("2,0,7\n0,1,5\n2,0,7\n2,0,nan\n")
    entries, _ = load_entries(str(path))
    assert entries.index.tolist() == [[0, 1], [2, 0]]
    assert entries.value.tolist() == [5, 7]


def test_row_order_of_a_file_does_not_matter(tmp_path):
    rows = ["0,1,5", "2,0,7", "1,1,9"]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    (tmp_path / "b.csv").write_text("\n".join(reversed(rows)))
    a, b = (load_entries(str(tmp_path / name))[0] for name in ("a.csv", "b.csv"))
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.value, b.value)


WRITERS = {
    "empty.npy": (lambda p: p.write_bytes(b""), "file with data"),
    "empty.npz": (lambda p: p.write_bytes(b""), "file with data"),
    "empty.pt": (lambda p: p.write_bytes(b""), "file with data"),
    "empty.csv": (lambda p: p.write_bytes(b""), "file with data"),
    "text.npy": (lambda p: p.write_text("hello there"), "readable .npy file"),
    "text.npz": (lambda p: p.write_text("hello there"), "readable .npz file"),
    "text.pt": (lambda p: p.write_text("hello there"), "readable .pt file"),
    "words.csv": (lambda p: p.write_text("a,b,c\nd,e,f"), "readable .csv file"),
    "half_word.csv": (lambda p: p.write_text("0,1,x\n0,2,5"), "readable .csv file"),
    "ragged.csv": (lambda p: p.write_text("0,1,5\n0,2\n"), "readable .csv file"),
    "binary.csv": (lambda p: p.write_bytes(bytes(range(256))), "readable .csv file"),
    "header.csv": (lambda p: p.write_text("a,b,c\n"), "indices of shape"),
    "narrow.csv": (lambda p: p.write_text("0,1\n1,2\n"), "indices of shape"),
    "fraction.csv": (lambda p: p.write_text("0,1.5,3\n0,2,5"), "integer indices .* got 1.5"),
    "nan_index.csv": (lambda p: p.write_text("0,nan,3\n0,2,5"), "integer indices .* got nan"),
    "negative.csv": (lambda p: p.write_text("0,-1,3\n0,2,5"), "at least 0 in `dataset`, got -1"),
    "infinite.csv": (lambda p: p.write_text("0,1,inf\n0,2,5"), "finite float32 values .* got 1"),
    "twice.csv": (lambda p: p.write_text("0,1,3\n0,1,5"), r"one value per index .* got 3.0 and 5.0 at \(0, 1\)"),
    "all_nan.csv": (lambda p: p.write_text("0,1,nan\n0,2,nan"), "known entries"),
    "order1.npy": (lambda p: save_npy(p, np.ones(3)), "order 2 or more .* got order 1"),
    "order0.npy": (lambda p: save_npy(p, np.array(1.0)), "order 2 or more"),
    "none.npy": (lambda p: save_npy(p, np.ones((0, 3))), "known entries"),
    "all_nan.npy": (lambda p: save_npy(p, np.full((2, 2), np.nan)), "known entries"),
    "infinite.npy": (lambda p: save_npy(p, np.array([[1, np.inf], [2, 3]])), "finite float32 values"),
    "large.npy": (lambda p: save_npy(p, np.array([[1, 1e300], [2, 3]])), "finite float32 values"),
    "complex.npy": (lambda p: save_npy(p, np.ones((2, 2), complex)), "real numbers .* complex128"),
    "string.npy": (lambda p: save_npy(p, np.array([["a", "b"]])), "real numbers"),
    "bool.npy": (lambda p: save_npy(p, np.ones((2, 2), bool)), "real numbers .* bool"),
    "date.npy": (lambda p: save_npy(p, np.zeros((2, 2), "M8[s]")), "real numbers"),
    "object.npy": (lambda p: save_npy(p, np.array([[1, None]])), "readable .npy file"),
    "complex.pt": (lambda p: torch.save(torch.ones(2, 2, dtype=torch.complex64), p), "real numbers"),
    "bool.pt": (lambda p: torch.save(torch.ones(2, 2, dtype=torch.bool), p), "real numbers"),
    "dict.pt": (lambda p: torch.save({"x": torch.ones(2, 2)}, p), "one dense tensor .* got dict"),
    "sparse.pt": (lambda p: torch.save(torch.eye(3).to_sparse(), p), "one dense tensor"),
    "meta.pt": (lambda p: torch.save(torch.ones(2, 2, device="meta"), p), "one dense tensor"),
    "order1.pt": (lambda p: torch.save(torch.ones(3), p), "order 2 or more"),
    "module.pt": (lambda p: torch.save(torch.nn.Linear(2, 2), p), "readable .pt file"),
    "two.npz": (lambda p: np.savez(p, a=np.ones(2), b=np.ones(2)), "one array, or `indices` and `values`"),
    "no_array.npz": (lambda p: np.savez(p), "one array, or `indices` and `values`"),
    "extra.npz": (lambda p: save_sparse(p, weights=np.ones(2)), "one array, or `indices` and `values`"),
    "lengths.npz": (lambda p: save_sparse(p, values=[1.0]), "expected 2 values"),
    "column.npz": (lambda p: save_sparse(p, values=[[1.0], [2.0]]), "expected 2 values"),
    "flat.npz": (lambda p: save_sparse(p, indices=[0, 1]), "indices of shape"),
    "order1.npz": (lambda p: save_sparse(p, indices=[[0], [1]]), "indices of shape"),
    "floats.npz": (lambda p: save_sparse(p, indices=[[0.5, 1], [1, 1]]), "integer indices .* got 0.5"),
    "bools.npz": (lambda p: save_sparse(p, indices=[[True, False], [True, True]]), "integer indices"),
    "negative.npz": (lambda p: save_sparse(p, indices=[[0, -3], [1, 1]]), "at least 0"),
    "outside.npz": (lambda p: save_sparse(p, shape=np.array([2, 2])), r"inside the shape \(2, 2\)"),
    "modes.npz": (lambda p: save_sparse(p, shape=np.array([4, 4, 4])), r"inside the shape \(4, 4, 4\)"),
    "shape.npz": (lambda p: save_sparse(p, shape=np.array([2.5, 2])), "row of integers as `shape`"),
    "unsigned.npz": (lambda p: save_sparse(p, np.array([[2**64 - 1, 0], [0, 0]], np.uint64)), "sizes from 1"),
    "complex.npz": (lambda p: save_sparse(p, values=[1j, 2]), "real numbers"),
    "objects.npz": (lambda p: np.savez(p, x=np.array([[1, None]], dtype=object)), "readable .npz file"),
    "tar.pt": (lambda p: tarfile.open(p, "w").close(), "readable .pt file"),
    "npy_inside.npz": (lambda p: save_npy(p, np.ones((2, 2))), "readable .npz file"),
    "npz_inside.npy": (lambda p: save_npz(p, np.ones((2, 2))), "readable .npy file"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_bad_files(tmp_path, name):
    write, message = WRITERS[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_entries(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("expected ")


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt"])
def test_truncated_files(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    match ending:
        case ".npy":
            np.save(path, np.ones((9, 9)))
        case ".npz":
            np.savez(path, np.ones((9, 9)))
        case ".pt":
            torch.save(torch.ones(9, 9), path)
    content = path.read_bytes()
    for length in (1, 7, 60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"readable {ending} file"):
            load_entries(str(path))


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt", ".csv"])
def test_missing_files_and_folders(tmp_path, ending):
    with pytest.raises(FileNotFoundError, match="existing file in `dataset`"):
        load_entries(str(tmp_path / f"x{ending}"))
    (tmp_path / f"x{ending}").mkdir()
    with pytest.raises(FileNotFoundError, match="existing file in `dataset`"):
        load_entries(str(tmp_path / f"x{ending}"))


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt"])
def test_pickles_do_not_run(tmp_path, ending):
    path, target = tmp_path / f"x{ending}", tmp_path / "ran"
    objects = np.array([[Bomb(target)]], dtype=object)
    match ending:
        case ".npy":
            np.save(path, objects, allow_pickle=True)
        case ".npz":
            np.savez(path, x=objects)
        case ".pt":
            torch.save(Bomb(target), path)
    with pytest.raises(ValueError, match="no Python objects"):
        load_entries(str(path))
    assert not target.exists()


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt"])
def test_plain_pickles_do_not_run(tmp_path, ending):
    import pickle

    path, target = tmp_path / f"x{ending}", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(ValueError, match="no Python objects"):
        load_entries(str(path))
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"dataset": "covid19"},
            ValueError,
            "covid, il2, indian_pines, kinetic, synthetic or .* .csv, .npy, .npz, .pt",
        ),
        ({"dataset": "x.parquet"}, ValueError, "a file ending in .csv, .npy, .npz, .pt"),
        ({"dataset": ""}, ValueError, "in `dataset`"),
        ({"dataset": Path("x.npy")}, TypeError, "string in `dataset`"),
        ({"dataset": None}, TypeError, "string in `dataset`"),
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


def test_shape_of_a_dense_npz_or_against_the_file(tmp_path):
    np.savez(tmp_path / "dense.npz", np.ones((2, 2)))
    with pytest.raises(ValueError, match="no `shape` for the dense file"):
        load_entries(str(tmp_path / "dense.npz"), shape=(2, 2))
    save_sparse(tmp_path / "sparse.npz", shape=np.array([4, 5]))
    with pytest.raises(ValueError, match=r"shape of the file in `shape`, got \(5, 5\)"):
        load_entries(str(tmp_path / "sparse.npz"), shape=(5, 5))
    (tmp_path / "x.csv").write_text("0,1,5\n2,0,7\n")
    with pytest.raises(ValueError, match=r"inside the shape \(2, 2\)"):
        load_entries(str(tmp_path / "x.csv"), shape=(2, 2))


def test_index_files(tmp_path):
    np.savez(tmp_path / "x.npz", np.array([[1, 1], [0, 0], [1, 1]]))
    assert read_index(tmp_path / "x.npz", (2, 2)).tolist() == [[1, 1], [0, 0], [1, 1]]
    save_sparse(tmp_path / "y.npz")
    assert read_index(tmp_path / "y.npz", (3, 2)).tolist() == [[0, 1], [2, 0]]
    np.savez(tmp_path / "z.npz", a=np.zeros((1, 2), int), b=np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="one array or an array `indices` in `predict_index`"):
        read_index(tmp_path / "z.npz", (2, 2))
    with pytest.raises(ValueError, match=r"ending in \.csv or \.npz"):
        read_index(tmp_path / "x.npy", (2, 2))
    with pytest.raises(ValueError, match="file ending in"):
        read_entries(tmp_path / "x.txt", None)


def test_values_of_every_real_dtype():
    for dtype in ("int8", "uint64", "float16", "float64", "longdouble"):
        assert check_values(np.ones((2, 2), dtype), arg="x").dtype == np.float32


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
        "data = CompletionDataModule('synthetic', **size, batch_size=999)\n"
        "data.setup()\n"
        "next(iter(data.train_dataloader())), list(data.val_dataloader()[2]), list(data.predict_dataloader())\n"
        "assert len(data.splits['held_out']) == 700_000\n"
        "print(peak() - imported)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 250  # megabytes; the imports take 500 to 800 before
