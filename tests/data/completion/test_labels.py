"""Tables with names for columns and labels for modes: what is read, and what is refused."""

import gzip

import numpy as np
import pytest
import torch

from tenzoo.data import CompletionDataModule

pandas = pytest.importorskip("pandas", reason="needs pandas to write tables: pip install pandas")
pytest.importorskip("pyarrow", reason="needs the extra tables: pip install 'tenzoo[tables]'")

COLUMNS = {"index_columns": ["user", "film"], "value_column": "stars"}
ROWS = [("ann", "Alien, 1979", 4.0), ("bob", "Brazil", 5.0), ("ann", "Brazil", 2.5), ("eve", "Zardoz", 1.0)]
LABELS = (("ann", "bob", "eve"), ("Alien, 1979", "Brazil", "Zardoz"))
INDEX = [[0, 0], [0, 1], [1, 1], [2, 2]]
VALUES = [4.0, 2.5, 5.0, 1.0]


def frame():
    """With a column of row numbers and a timestamp, which are no modes."""
    table = pandas.DataFrame(ROWS, columns=["user", "film", "stars"])
    table.insert(0, "", range(1, 5))
    return table.assign(when=range(1700000000, 1700000004))


WRITERS = {
    "a.csv": lambda path: frame().to_csv(path, index=False),
    "semicolons.csv": lambda path: frame().to_csv(path, index=False, sep=";"),
    "bom.csv": lambda path: frame().to_csv(path, index=False, encoding="utf-8-sig"),
    "a.tsv": lambda path: frame().to_csv(path, index=False, sep="\t"),
    "a.csv.gz": lambda path: frame().to_csv(path, index=False),
    "a.parquet": lambda path: frame().to_parquet(path),
    "a.feather": lambda path: frame().to_feather(path),
}


def read(path, **arguments):
    data = CompletionDataModule(
        str(path), **{"observed_fraction": 1, "validation_fraction": 0.0, **COLUMNS, **arguments}
    )
    data.setup()
    return data


def known(data):
    return data._data.known


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_table_is_read_alike(tmp_path, name):
    WRITERS[name](tmp_path / name)
    data = read(tmp_path / name)
    assert (data.mode_names, data.labels, data.shape) == (("user", "film"), LABELS, (3, 3))
    assert known(data).index.tolist() == INDEX
    assert known(data).value.tolist() == VALUES


def test_columns_are_taken_in_the_order_in_which_they_are_named(tmp_path):
    WRITERS["a.csv"](tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", index_columns=["film", "user"]).labels == LABELS[::-1]


def write(path, text):
    path.write_text(text)
    return path


def test_labels_keep_their_text_and_integers_their_order(tmp_path):
    text = "a,b,v\n007,10,1\n7,9,2\nNA,-3,3\n 1.0 ,123456789012345678901,4\n"
    data = read(write(tmp_path / "a.csv", text), index_columns=["a", "b"], value_column="v")
    assert data.labels == (("007", "1.0", "7", "NA"), (-3, 9, 10, 123456789012345678901))
    assert data.shape == (4, 4)
    assert known(data).index.tolist() == [[0, 2], [1, 3], [2, 1], [3, 0]]


def test_missing_values(tmp_path):
    values = [*range(1, 13), "", "NA", "nan", "-999"]
    rows = "".join(f"{i},{j},{v}\n" for (i, j), v in zip(np.ndindex(4, 4), values, strict=True))
    path = write(tmp_path / "a.csv", "a,b,v\n" + rows)
    columns = {"index_columns": ["a", "b"], "value_column": "v"}
    assert len(known(read(path, **columns, missing_values=[-999]))) == 12
    with pytest.raises(ValueError, match=r"got 1 times -999 .* name it in `missing_values`"):
        read(path, **columns)


def test_missing_values_of_files_without_labels(tmp_path):
    values = np.arange(24.0).reshape(4, 6)
    values[1, 2] = values[3, 3] = -999
    np.save(tmp_path / "a.npy", values.astype(np.int32))
    with pytest.raises(ValueError, match="1 zeros of 24"):
        CompletionDataModule(str(tmp_path / "a.npy")).setup()
    data = CompletionDataModule(str(tmp_path / "a.npy"), missing_values=[-999])
    data.setup()
    assert data.num_known == 22
    np.savetxt(tmp_path / "a.csv", [[i, j, values[i, j]] for i, j in np.ndindex(4, 6)], delimiter=",", fmt="%g")
    data = CompletionDataModule(str(tmp_path / "a.csv"), missing_values=[-999], shape=[4, 6])
    data.setup()
    assert data.num_known == 22


def test_a_vocabulary_is_saved_and_another_refused(tmp_path):
    WRITERS["a.csv"](tmp_path / "a.csv")
    data = read(tmp_path / "a.csv")
    state = data.state_dict()
    assert state["labels"] == {"user": ["ann", "bob", "eve"], "film": ["Alien, 1979", "Brazil", "Zardoz"]}
    torch.save(state, tmp_path / "state.pt")
    data.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    frame().replace("Zardoz", "Zulu").to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ValueError, match="labels"):
        read(tmp_path / "a.csv").load_state_dict(state)


def test_cells_to_predict_have_labels(tmp_path):
    WRITERS["a.csv"](tmp_path / "a.csv")
    wanted = write(tmp_path / "wanted.csv", "film,user\nZardoz,ann\nBrazil,eve\n")
    (batch,) = read(tmp_path / "a.csv", predict_index=str(wanted)).predict_dataloader()
    assert batch.index.tolist() == [[0, 2], [2, 1]]
    write(wanted, "film,user\nZardoz,ann\nAliens,eve\n")
    with pytest.raises(ValueError, match=r"one of the 3 labels of 'film' in `predict_index`, got 'Aliens' in row 2"):
        read(tmp_path / "a.csv", predict_index=str(wanted))
    write(wanted, "film,person\nZardoz,ann\n")
    with pytest.raises(ValueError, match=r"a column 'user' in `predict_index`, got film, person"):
        read(tmp_path / "a.csv", predict_index=str(wanted))


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("user,film,rating\na,b,1\n", {}, r"a column 'stars' in `dataset`, got user, film, rating"),
        ("user,film,stars\na,b,3,5\n", {}, r"expected a table in `dataset`, got .* 3 columns, got 4"),
        ("user,film,stars\na,b,3\na,c,3,5\n", {}, r"expected a table in `dataset`, got .* 3 columns, got 4"),
        ("user,film,stars\na,b,3\na,c\n", {}, r"expected a table in `dataset`, got .* 3 columns, got 2"),
        ('user,film,stars\na,b,"3,5"\nb,a,"1,5"\n', {}, r"numbers in column 'stars' of `dataset`, got '3,5' in row 1"),
        ("user,film,stars\na,b,1\n,c,2\n", {}, r"a label in column 'user' of `dataset` in each row, got none in row 2"),
        ("user,film,stars\na,b,1\na,b,2\n", {}, r"got 1.0 and 2.0 at user a, film b"),
        ("user,film,stars\na,b,inf\na,c,2\n", {}, r"inf"),
        ("", {}, r"table in `dataset`"),
        ("user,film,stars\n", {}, r"`dataset`"),
        ("user,film,stars\na,b,1\n", {"shape": [3, 3]}, r"no `shape` beside `index_columns`"),
        ("user,film,stars\na,b,1\n", {"index_columns": ["user"]}, r"two or more different names in `index_columns`"),
        ("user,film,stars\na,b,1\n", {"index_columns": ["user", "user"]}, r"two or more different names"),
        (
            "user,film,stars\na,b,1\n",
            {"value_column": None},
            r"`value_column` beside `index_columns`",
        ),
        (
            "user,film,stars\na,b,1\n",
            {"index_columns": None},
            r"`index_columns` beside `value_column`",
        ),
    ],
)
def test_tables_that_are_refused(tmp_path, text, arguments, said):
    with pytest.raises(ValueError, match=said):
        read(write(tmp_path / "a.csv", text), **arguments)


def test_tables_whose_columns_are_not_named(tmp_path):
    WRITERS["a.tsv"](tmp_path / "a.tsv")
    with pytest.raises(ValueError, match="the names of its columns in `index_columns` and `value_column` for"):
        CompletionDataModule(str(tmp_path / "a.tsv"))
    with pytest.raises(ValueError, match="expected `index_columns` only for a table"):
        CompletionDataModule("covid", **COLUMNS)
    with pytest.raises(ValueError, match="expected `missing_values` only for a file"):
        CompletionDataModule("covid", missing_values=[0])
    with pytest.raises(TypeError, match="a list of numbers in `missing_values`, got 'x'"):
        CompletionDataModule("a.npy", missing_values="x")


def test_a_damaged_gzip_file(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"user,film,stars\na,b,1\n" * 100)[:40])
    with pytest.raises(ValueError, match="which cannot be read"):
        read(path)
