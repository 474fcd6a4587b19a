"""A user's own array is read as it is meant, or refused in a line that says how to make it plain."""

import zipfile

import numpy as np
import pytest
import torch

from tenzoo.data import CompletionDataModule
from tenzoo.data.completion.files import read_entries
from tenzoo.models import TensorCompletion
from tests.data.completion.tables import KNOWN, VALUES, csv

RNG = np.random.default_rng(2)

DENSE = RNG.normal(size=(6, 5))
COUNTS = RNG.integers(1, 9, (6, 5))
MASKED = np.ma.masked_array(COUNTS, mask=RNG.random((6, 5)) < 0.3)

MISREAD_ARRAYS = {
    "zeros of integers": (
        COUNTS * (COUNTS > 2),
        r"floats in `dataset`, .* got int64 with \d+ zeros of 30, which may mean .* save array\.astype",
    ),
    "zeros of bytes": ((COUNTS * (COUNTS > 2)).astype(np.uint8), "got uint8 with"),
    "marker of integers": (
        np.where(COUNTS > 6, -999, COUNTS),
        "NaN for missing values in `dataset`, got .* times -999",
    ),
    "marker of floats": (np.where(DENSE > 1, -9999.0, DENSE), "got .* times -9999 where all others are from"),
    "of a masked array": (MASKED.filled(), "got .* times 999999 where"),
    "of a masked array of floats": (np.ma.masked_array(DENSE, MASKED.mask).filled(), r"got .* times 1e\+20 where"),
    "smallest integer": (np.where(COUNTS > 6, np.iinfo(np.int32).min, COUNTS), "got .* times -2147483648 where"),
}


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("name", MISREAD_ARRAYS)
def test_arrays_that_would_be_misread(tmp_path, name, ending):
    array, message = MISREAD_ARRAYS[name]
    path = tmp_path / f"x{ending}"
    match ending:
        case ".npy":
            np.save(path, array)
        case ".npz":
            np.savez(path, array)
        case ".pt":
            torch.save(torch.from_numpy(np.asarray(array)), path)
    with pytest.raises(ValueError, match=message):
        read_entries(path, None)


def test_hidden_values_of_a_masked_array_are_told_by_its_name(tmp_path):
    """NumPy writes what is below the mask, or refuses to write at all."""
    with pytest.raises(NotImplementedError):
        np.save(tmp_path / "x.npy", MASKED)
    np.savez(tmp_path / "y.npz", values=MASKED.data, mask=MASKED.mask)
    with pytest.raises(ValueError, match="expected one array, or `indices` and `values`"):
        read_entries(tmp_path / "y.npz", None)


@pytest.mark.parametrize(
    "array",
    [
        DENSE,
        np.asfortranarray(DENSE),
        DENSE.astype(np.float16),
        DENSE.astype(">f8"),
        COUNTS,
        COUNTS.astype(np.uint16),
        np.zeros((3, 4)),
    ],
)
def test_arrays_that_are_plain(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    entries, shape = read_entries(tmp_path / "x.npy", None)
    assert shape == array.shape
    np.testing.assert_array_equal(entries.value, array.astype(np.float32).ravel())


def bomb(path, size):
    """Some kilobytes that hold an array of zeros of this many bytes, or a tensor."""
    if path.suffix == ".pt":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data/0", bytes(size))
        return
    header = {"descr": "<f4", "fortran_order": False, "shape": (size // 4096, 1024)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(size // 2**20):
            file.write(bytes(2**20))


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
def test_a_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tenzoo.data.arrays._MAX_INFLATED", 2**20)
    bomb(tmp_path / name, 2**25)
    monkeypatch.setattr("tenzoo.data.arrays._read_array", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(
        ValueError, match=r"fits into memory in `dataset`, got \d+ bytes that hold 0.03 GB; write it again"
    ):
        read_entries(tmp_path / name, None)


def sparse_file(path, shape):
    """A .npy file whose data are a hole in the disk."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * int(np.prod(shape)))


def test_an_array_larger_than_memory_is_refused(tmp_path):
    sparse_file(tmp_path / "x.npy", (10**4, 10**4, 10**4))
    with pytest.raises(
        ValueError, match=r"an array \(10000, 10000, 10000\) of 4000.0 GB where .* are free; write the known"
    ):
        read_entries(tmp_path / "x.npy", None)


def of_two_arrays(path):
    with path.open("wb") as file:
        np.save(file, DENSE)
        np.save(file, DENSE)


def of_one_name_twice(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x.npy", "y.npy"):
            with archive.open(name, "w") as file:
                np.save(file, DENSE)
    path.write_bytes(path.read_bytes().replace(b"y.npy", b"x.npy"))


def expanded(path):
    torch.save(torch.zeros(1).expand(10**6, 10**6), path)


DOUBTFUL = {
    "two.npy": (of_two_arrays, "readable .npy file"),
    "twice.npz": (of_one_name_twice, "readable .npz file"),
    "expanded.pt": (expanded, "plain numbers in `dataset`, got .* bytes that asks for .* of memory"),
    "quantized.pt": (
        lambda path: torch.save(torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8), path),
        "quantized|readable",
    ),
    "only_indices.npz": (lambda path: np.savez(path, indices=KNOWN), "expected one array, or `indices` and `values`"),
    "only_values.npz": (lambda path: np.savez(path, values=DENSE), "expected one array, or `indices` and `values`"),
    "matrix.csv": (lambda path: path.write_text(",0,1,2\n0,4,5,6\n1,7,8,9\n"), "by commas in line 1"),
    "utf16.csv": (lambda path: path.write_text("i,j,v\n0,1,5\n", encoding="utf-16"), "readable .csv file"),
    "quoted.csv": (lambda path: path.write_text('"0","1","5"\n'), "by commas in line"),
    "decimal_comma.csv": (lambda path: path.write_text("i,j,v\n0,1,5,5\n1,0,4,5\n"), "3 columns in line 2"),
    "gz.csv": (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(40)), "readable .csv"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("name", DOUBTFUL)
def test_files_that_can_be_read_in_two_ways(tmp_path, name):
    write, message = DOUBTFUL[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_entries(tmp_path / name, None)


@pytest.mark.parametrize("text", ["\ufeffi,j,v\r\n0,1,5\r\n1,0,7\r\n", "0,1,5\r1,0,7\r", " 0 , 1 , 5 \n1,0,7\n\n"])
def test_line_ends_and_spaces_mean_nothing(tmp_path, text):
    (tmp_path / "x.csv").write_bytes(text.encode())
    entries, shape = read_entries(tmp_path / "x.csv", None)
    assert (entries.index.tolist(), entries.value.tolist(), shape) == ([[0, 1], [1, 0]], [5, 7], (2, 2))


# --- what is done with a file ----------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr("tenzoo.data.completion.datamodule.rank_zero_info", lines.append)
    return lines


def test_a_tenth_is_held_out_and_a_tenth_validates_unless_it_is_said_otherwise(tmp_path, said):
    csv(tmp_path / "x.csv")
    data = CompletionDataModule(str(tmp_path / "x.csv"))
    data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 72, "val": 9, "held_out": 9}
    assert said[0].splitlines() == [
        f"{tmp_path / 'x.csv'}: 6 × 5 × 4 = 120 cells",
        "  known   90 (75 %): 72 to train on, 9 to validate, 9 held out",
        f"  values  {VALUES.min():.6g} to {VALUES.max():.6g}, mean {VALUES.mean():.6g}, standard deviation "
        f"{VALUES.std():.3g}",
    ]
    data = CompletionDataModule(str(tmp_path / "x.csv"), observed_fraction=0.3)
    data.setup()
    assert "24 to train on, 3 to validate, 63 held out" in said[1]
    state = data.state_dict()
    assert state["observed_fraction"] == 0.3
    named = CompletionDataModule("il2")
    named.setup()
    assert named.state_dict()["observed_fraction"] == 0.3
    assert len(said) == 2


def test_indices_without_an_entry_to_train_on_are_told(tmp_path, said):
    values = RNG.normal(size=(6, 5, 4))
    values[3] = values[5] = values[:, :, 1] = np.nan
    np.save(tmp_path / "x.npy", values)
    CompletionDataModule(str(tmp_path / "x.npy"), validation_fraction=0).setup()
    assert said[0].endswith(
        "no training entries, so predictions have no meaning, at 2 of 6 of mode 0, 1 of 4 of mode 2"
    )


@pytest.mark.parametrize(("array", "zeros"), [(DENSE, ""), (np.where(DENSE > 0, DENSE, 0), r" \(\d+ of them 0\)")])
def test_a_tensor_of_which_nothing_is_missing_is_asked_about(tmp_path, array, zeros):
    np.save(tmp_path / "x.npy", array)
    message = (
        rf"in `observed_fraction` for '.*x.npy', whose 6 × 5 cells are all known{zeros}, got None; write NaN where"
    )
    with pytest.raises(ValueError, match=message):
        CompletionDataModule(str(tmp_path / "x.npy")).setup()
    CompletionDataModule(str(tmp_path / "x.npy"), observed_fraction=0.5).setup()


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_made():
    free_before = torch.get_rng_state()
    with pytest.raises(
        ValueError,
        match=r"to fit into memory, .* in `rank`, got 8 for 2000000001 × 5 × 4: \d+ parameters, 256.0 GB .*number the",
    ):
        TensorCompletion((2_000_000_001, 5, 4), "cp", 8)
    assert torch.equal(torch.get_rng_state(), free_before)
