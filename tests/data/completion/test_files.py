import tarfile

import numpy as np
import pytest
import torch

from tenzoo.data.completion.entry_checks import check_values
from tenzoo.data.completion.files import read_entries, read_index
from tenzoo.data.completion.sources import load_entries
from tests.hostile import Bomb


def save_npy(path, array):
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=True)


def save_npz(path, array):
    with path.open("wb") as file:
        np.savez(file, array)


def save_sparse(path, indices=((0, 1), (2, 0)), values=(1.0, 2.0), **others):
    np.savez(path, indices=np.asarray(indices), values=np.asarray(values), **others)


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


OFFSET = 1e8 + np.random.default_rng(0).normal(size=(20, 20))

WRITERS = {
    "empty.npy": (lambda p: p.write_bytes(b""), "file with data"),
    "empty.npz": (lambda p: p.write_bytes(b""), "file with data"),
    "empty.pt": (lambda p: p.write_bytes(b""), "file with data"),
    "empty.csv": (lambda p: p.write_bytes(b""), "file with data"),
    "text.npy": (lambda p: p.write_text("hello there"), "readable .npy file"),
    "text.npz": (lambda p: p.write_text("hello there"), "readable .npz file"),
    "text.pt": (lambda p: p.write_text("hello there"), "readable .pt file"),
    "words.csv": (lambda p: p.write_text("a,b,c\nd,e,f"), "by commas in line 2 of '.*words.csv'.*, got 'd,e,f'; check"),
    "half_word.csv": (lambda p: p.write_text("0,1,x\n0,2,5"), "by commas in line 1 of .*, got '0,1,x'"),
    "gap.csv": (lambda p: p.write_text("i,j,v\n\n0,1,\n"), "by commas in line 3 of .*, got '0,1,'"),
    "ragged.csv": (lambda p: p.write_text("i,j,v\n0,1,5\n\n0,2\n"), "3 columns in line 4 of .*, got 2: '0,2'; check"),
    "semicolon.csv": (
        lambda p: p.write_text("0;1;5\n"),
        "by commas in line 1 of .* in `dataset`, got '0;1;5'; write commas",
    ),
    "both.csv": (
        lambda p: p.write_text("1;2;3,5\n1;0;2,5\n"),
        "got '1;2;3,5'; write commas between columns, points in",
    ),
    "decimal_comma.csv": (lambda p: p.write_text("i;j;v\n0;1;5,5\n"), "by commas in line 1 of .*, got 'i;j;v'"),
    "tab.csv": (lambda p: p.write_text("0\t1\t5\n0\t2\t5\n"), r"by commas in line 1 of .*, got '0\\t1\\t5'"),
    "long.csv": (lambda p: p.write_text("0 " * 999), "in line 1 of .*, got '[0 ]{60}…'"),
    "underscore.csv": (lambda p: p.write_text("0,1,1_0\n"), "readable .csv file"),
    "nul.csv": (lambda p: p.write_text("0,1,5\n0,2,\0\n"), "readable .csv file"),
    "offset.csv": (lambda p: p.write_text("0,0,100000000\n0,1,100000003\n"), "`dataset` that float32 tells apart"),
    "binary.csv": (lambda p: p.write_bytes(bytes(range(256))), "readable .csv file"),
    "header_wide.csv": (lambda p: p.write_text("i,j,k,v\n0,1,2.5\n"), "4 columns in line 2"),
    "header_narrow.csv": (lambda p: p.write_text("i,j,v\n0,1,2,5\n"), "3 columns in line 2"),
    "header.csv": (lambda p: p.write_text("a,b,c\n"), "indices of shape"),
    "narrow.csv": (lambda p: p.write_text("0,2\n1,2\n"), "indices of shape"),
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
    "tiny.npy": (
        lambda p: save_npy(p, np.array([[1, 1e-300], [2, 3]])),
        "tells from 0, got 1 that it rounds to 0; rescale",
    ),
    "large.npy": (lambda p: save_npy(p, np.array([[1, 1e300], [2, 3]])), "finite float32 values"),
    "offset.npy": (
        lambda p: save_npy(p, OFFSET),
        r"mean 1e\+08, .* by up to 4, .* deviation of 0.995; subtract an offset",
    ),
    "offset_float32.npy": (
        lambda p: save_npy(p, np.float32([[1e8, 1e8 + 8], [1e8, 1e8 + 16]])),
        "that float32 tells apart",
    ),
    "offset_int.npy": (lambda p: save_npy(p, np.array([[2**62, 2**62 + 1]])), "that float32 tells apart"),
    "complex.npy": (lambda p: save_npy(p, np.ones((2, 2), complex)), "real numbers .* complex128"),
    "string.npy": (lambda p: save_npy(p, np.array([["a", "b"]])), "real numbers"),
    "bool.npy": (lambda p: save_npy(p, np.ones((2, 2), bool)), "real numbers .* bool"),
    "date.npy": (lambda p: save_npy(p, np.zeros((2, 2), "M8[s]")), "real numbers"),
    "object.npy": (lambda p: save_npy(p, np.array([[1, None]])), "readable .npy file"),
    "complex.pt": (lambda p: torch.save(torch.ones(2, 2, dtype=torch.complex64), p), "real numbers"),
    "bool.pt": (lambda p: torch.save(torch.ones(2, 2, dtype=torch.bool), p), "real numbers"),
    "dict.pt": (lambda p: torch.save({"x": torch.ones(2, 2)}, p), "one tensor .* got dict"),
    "meta.pt": (lambda p: torch.save(torch.ones(2, 2, device="meta"), p), "a tensor with numbers"),
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


@pytest.mark.parametrize("offset", [0.0, 300.0, 1e5, -1e5])
def test_an_offset_that_float32_holds_is_kept(offset):
    values = np.random.default_rng(0).normal(size=1000)
    kept = check_values(offset + values, arg="x").astype(np.float64) - offset
    assert np.square(kept - values).mean() < 1e-4 * values.var()


def test_equal_values_may_be_of_any_size():
    assert check_values(np.array([[1e8 + 1, np.nan], [1e8 + 1, 1e8 + 1]]), arg="x")[0, 0] == 1e8
