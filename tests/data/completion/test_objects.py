"""Data in memory and in files of other programs: what is known, its modes and labels, and what is refused."""

import warnings

import numpy as np
import pytest
import torch
from scipy import io, sparse

from tenzoo.data import CompletionDataModule
from tenzoo.data.completion.objects import object_entries
from tenzoo.tasks import CompletionTask
from tests.tasks.toy import adam, trainer

VALUES = np.array([[0.5, np.nan, 2.5], [np.nan, 1.5, 3.5]])
INDEX = [[0, 0], [0, 2], [1, 1], [1, 2]]
KNOWN = [0.5, 2.5, 1.5, 3.5]
SPARSE = torch.sparse_coo_tensor(torch.tensor(INDEX).t(), torch.tensor(KNOWN), (2, 3), check_invariants=True)


def csr():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return SPARSE.to_dense().to_sparse_csr()


def masked(kind=np.float64):
    return np.ma.MaskedArray(np.nan_to_num(VALUES, nan=9).astype(kind), mask=np.isnan(VALUES))


def array():
    xarray = pytest.importorskip("xarray", reason="needs the extra arrays: pip install 'tenzoo[arrays]'")
    days = np.array(["2024-01-01", "2024-01-02", "2024-01-05"], dtype="datetime64[ns]")
    return xarray.DataArray(VALUES, {"site": [70, 7], "day": days}, ("site", "day"), name="level")


def files(folder):
    np.save(folder / "a.npy", VALUES)
    torch.save(torch.from_numpy(VALUES), folder / "a.pt")
    torch.save(SPARSE.coalesce(), folder / "sparse.pt")
    io.savemat(folder / "a.mat", {"a": VALUES})
    io.savemat(folder / "sparse.mat", {"a": sparse.coo_array((KNOWN, tuple(np.transpose(INDEX))), (2, 3))})
    return {path.name: str(path) for path in folder.iterdir()}


def checked(entries, shape):
    assert shape == (2, 3)
    assert entries.index.tolist() == INDEX
    assert entries.value.tolist() == KNOWN


@pytest.mark.parametrize(
    "data",
    [
        VALUES,
        VALUES.astype(np.float32),
        masked(),
        torch.from_numpy(VALUES),
        torch.from_numpy(VALUES).bfloat16(),
        SPARSE,
        SPARSE.coalesce(),
        csr(),
        sparse.coo_array((KNOWN, tuple(np.transpose(INDEX))), (2, 3)),
        sparse.csr_matrix((KNOWN, tuple(np.transpose(INDEX))), (2, 3)),
    ],
    ids=lambda data: f"{type(data).__name__}-{getattr(data, 'dtype', '')}-{getattr(data, 'layout', '')}",
)
def test_arrays_in_memory(data):
    checked(*object_entries(data))


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "sparse.pt", "a.mat", "sparse.mat"])
def test_files_of_arrays(tmp_path, name):
    data = CompletionDataModule(files(tmp_path)[name], observed_fraction=1, validation_fraction=0)
    data.setup()
    checked(data.known, data.shape)


@pytest.mark.parametrize("form", ["array", "dataset", "file"])
def test_dimensions_are_modes_and_coordinates_are_labels(tmp_path, form):
    found = array()
    if form == "file":
        pytest.importorskip("h5netcdf", reason="needs the extra arrays: pip install 'tenzoo[arrays]'")
        found.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    source = {"array": found, "dataset": found.to_dataset(), "file": str(tmp_path / "a.nc")}[form]
    data = CompletionDataModule(source, observed_fraction=1, validation_fraction=0)
    data.setup()
    checked(data.known, data.shape)
    assert data.mode_names == ("site", "day")
    assert data.labels == ((70, 7), ("2024-01-01", "2024-01-02", "2024-01-05"))


def test_dimensions_without_coordinates():
    found = array().drop_vars("day")
    entries, _ = object_entries(found)
    assert entries.labels == ((70, 7), (0, 1, 2))
    entries, _ = object_entries(found.drop_vars("site"))
    assert (entries.mode_names, entries.labels) == (("site", "day"), None)


def test_masked_integers_are_missing():
    entries, _ = object_entries(np.ma.masked_equal([[1, 2], [3, 9]], 9))
    assert entries.value.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: 5, TypeError, "a name, a path, an array .*, or a data frame in `dataset`, got a int"),
        (lambda: [[1.0]], TypeError, "got a list"),
        (lambda: np.array(1.0), ValueError, "order 2 or more"),
        (lambda: np.array([["a", "b"]]), ValueError, "real numbers"),
        (lambda: np.array([[1, 0], [0, 2]]), ValueError, "2 zeros of 4, which may mean missing or 0"),
        (lambda: np.array([[1.0, -999], [2, 3]]), ValueError, "1 times -999 .* name it in `missing_values`"),
        (lambda: torch.ones(2, 2, device="meta"), ValueError, "a tensor with numbers"),
        (lambda: torch.ones(2, 2, dtype=torch.complex64), ValueError, "real numbers"),
        (lambda: torch.sparse_coo_tensor([[0, 0]], torch.ones(2, 3)), ValueError, "1 dense dimensions"),
        (lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0]), ValueError, "each cell once"),
        (lambda: sparse.coo_matrix(([1.0, 2.0], ([0, 0], [1, 1]))), ValueError, "each cell once"),
        (lambda: array().assign_coords(site=[1, 1]), ValueError, "different coordinates along 'site'"),
        (lambda: array().to_dataset().assign(b=array()), ValueError, "one variable in `dataset`, got level, b"),
    ],
)
def test_data_that_is_refused(make, error, said):
    with torch.sparse.check_sparse_tensor_invariants(False), pytest.raises(error, match=said):
        CompletionDataModule(make(), observed_fraction=0.5).setup()


def test_arguments_that_mean_nothing_for_data_in_memory():
    with pytest.raises(ValueError, match="neither `shape` nor `num_entries` for \\(ndarray\\)"):
        CompletionDataModule(VALUES, shape=[2, 3])
    with pytest.raises(ValueError, match="`index_columns` only for a table"):
        CompletionDataModule(VALUES, index_columns=["a", "b"], value_column="c")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: io.savemat(path, {"a": VALUES, "b": VALUES}), "one array in `dataset`, got a, b; give it alone"),
        (lambda path: io.savemat(path, {"a": "text"}), "order 2 or more"),
        (lambda path: path.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64"), "MATLAB 7 or older .* -v7"),
        (lambda path: path.write_bytes(b"MATLAB"), r"a readable .mat file"),
    ],
)
def test_mat_files_that_are_refused(tmp_path, write, said):
    write(tmp_path / "a.mat")
    with pytest.raises(ValueError, match=said):
        CompletionDataModule(str(tmp_path / "a.mat"), observed_fraction=0.5).setup()


def test_what_does_not_fit_into_memory_is_refused_with_its_size(tmp_path, monkeypatch):
    io.savemat(tmp_path / "a.mat", {"a": np.ones((100, 100))})
    monkeypatch.setattr("tenzoo.data.arrays.free_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"\(100, 100\) of 8e-05 GB where 0.0001 GB are free"):
        CompletionDataModule(str(tmp_path / "a.mat"), observed_fraction=0.5).setup()


def test_frames_of_several_libraries_are_read_alike():
    pandas = pytest.importorskip("pandas", reason="needs pandas: pip install pandas")
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra tables: pip install 'tenzoo[tables]'")
    frame = pandas.DataFrame(
        {
            "when": pandas.to_datetime(["2024-01-01", "2024-01-03", "2024-01-01"]),
            "who": pandas.Categorical(["b", "a", "a"]),
            "value": [1.0, None, 3.0],
        }
    )
    for data in (frame, pyarrow.Table.from_pandas(frame)):
        module = CompletionDataModule(
            data, index_columns=["who", "when"], value_column="value", observed_fraction=1, validation_fraction=0
        )
        module.setup()
        assert module.labels == (("a", "b"), ("2024-01-01", "2024-01-03"))
        assert (module.known.index.tolist(), module.known.value.tolist()) == ([[0, 0], [1, 0]], [3.0, 1.0])
    with pytest.raises(ValueError, match="a column 'film' in `dataset`, got when, who, value"):
        CompletionDataModule(frame, index_columns=["who", "film"], value_column="value").setup()
    with pytest.raises(ValueError, match=r"names of its columns .* for '\(DataFrame\)', got none"):
        CompletionDataModule(frame)


def test_a_model_is_fitted_and_its_checkpoint_holds_no_data(tmp_path):
    values = np.random.default_rng(0).normal(size=(6, 5))
    values[::2, 1] = np.nan
    data = CompletionDataModule(values, observed_fraction=1, validation_fraction=0)
    task = CompletionTask("cp", 1, optimizer=adam())
    fit = trainer(max_epochs=1)
    fit.fit(task, data)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["datamodule_hyper_parameters"]["dataset"] == "(ndarray)"
    with pytest.raises(ValueError, match="held-out numbers would be wrong"):
        CompletionDataModule(values + 1, observed_fraction=1, validation_fraction=0).load_state_dict(
            saved[CompletionDataModule.__qualname__]
        )
