"""The first line of a csv: names, numbers of columns, or data."""

from pathlib import Path

import pytest

from tenzoo.data import CompletionDataModule
from tenzoo.data.completion.files import read_entries, read_index

ROWS = "0,0,0,4\n0,1,1,5\n1,0,2,3\n1,1,0,2\n"


@pytest.mark.parametrize("first", ["0,1,2,3\n", "\ufeff0,1,2,3\r\n", "0, 1, 2, 3\n"])
@pytest.mark.parametrize("shape", [None, (3, 3, 4)])
def test_a_first_line_that_numbers_the_columns_is_refused(tmp_path, first, shape):
    path = tmp_path / "x.csv"
    path.write_text(first + ROWS)
    with pytest.raises(ValueError, match=r"names or data in line 1 of .*x\.csv' in `dataset`, got '0,1,2,3'") as caught:
        read_entries(path, shape)
    message = str(caught.value)
    assert message.endswith("if it numbers the columns, or write a line of names above it if it is data")
    assert "\n" not in message


@pytest.mark.parametrize(("first", "rest"), [("0,1", "1,0\n"), ("0,1,2", "3,2,1\n0,0,0\n"), ("0,1,2", "")])
def test_so_it_is_among_cells_to_predict(tmp_path, first, rest):
    path = tmp_path / "wanted.csv"
    path.write_text(f"{first}\n{rest}")
    with pytest.raises(ValueError, match=rf"in line 1 of .*wanted\.csv' in `predict_index`, got '{first}'"):
        read_index(path, (4,) * len(first.split(",")))


@pytest.mark.parametrize(
    "text", [ROWS + "0,1,2,3\n", "i,j,k,value\n0,1,2,3\n" + ROWS, "0,1,2,3.0\n" + ROWS, "0,1,2,3.5\n" + ROWS]
)
def test_the_same_row_elsewhere_or_with_a_decimal_point_is_data(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_text(text)
    entries, _ = read_entries(path, None)
    assert len(entries) == 5
    assert [0, 1, 2] in entries.index.tolist()


def test_both_remedies_work(tmp_path):
    path = tmp_path / "wanted.csv"
    path.write_text("i,j,k\n0,1,2\n3,2,1\n")
    assert read_index(path, (4, 4, 4)).tolist() == [[0, 1, 2], [3, 2, 1]]
    path.write_text("3,2,1\n0,1,2\n")
    assert read_index(path, (4, 4, 4)).tolist() == [[3, 2, 1], [0, 1, 2]]


def wanted(folder, data_names, index_names, row="1,2,3"):
    (folder / "x.csv").write_text("".join(f"{line}\n" for line in [*data_names, "0,0,0,4\n1,0,0,5\n0,1,3,2\n1,2,1,7"]))
    (folder / "wanted.csv").write_text("".join(f"{line}\n" for line in [*index_names, row]))
    data = CompletionDataModule(
        str(folder / "x.csv"),
        shape=[4, 4, 4],
        observed_fraction=1,
        validation_fraction=0.0,
        predict_index=str(folder / "wanted.csv"),
    )
    data.setup()
    (batch,) = data.predict_dataloader()
    return batch.index.tolist()


@pytest.mark.parametrize(
    ("names", "row"),
    [("k,j,i", "1,2,3"), ("i,k,j", "1,2,3"), ("user,film,month", "1,2,3"), ("i,j,k,value", "1,2,3,4"), ("i,j", "1,2")],
)
def test_cells_to_predict_under_other_names_than_those_of_the_data_are_refused(tmp_path, names, row):
    with pytest.raises(ValueError, match=f"the columns i,j,k of the data in `predict_index`, got {names};") as caught:
        wanted(tmp_path, ["i,j,k,value"], [names], row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data_names", "index_names"),
    [
        ([], []),
        (["i,j,k,value"], []),
        ([], ["k,j,i"]),
        (["i,j,k,value"], ["i,j,k"]),
        (["# User,film ,month,value"], ['"user","film","month"']),
        (["\ufeffi,j,k,value"], ["\ufeffI, J, K"]),
    ],
)
def test_cells_to_predict_under_the_same_names_or_none_are_taken(tmp_path, data_names, index_names):
    assert wanted(tmp_path, data_names, index_names) == [[1, 2, 3]]


def test_names_in_a_csv_are_not_compared_with_data_that_have_none(tmp_path):
    (tmp_path / "wanted.csv").write_text("a,b,c\n1,2,3\n")
    size = {"shape": [4, 4, 4], "num_entries": 20, "validation_fraction": 0.0}
    data = CompletionDataModule("synthetic", **size, observed_fraction=0.5, predict_index=str(tmp_path / "wanted.csv"))
    data.setup()
    (batch,) = data.predict_dataloader()
    assert batch.index.tolist() == [[1, 2, 3]]


def test_a_file_with_a_header_is_opened_once(tmp_path, monkeypatch):
    opened = []
    original = Path.open

    def noting(path, *args, **kwargs):
        opened.append(path.name)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noting)
    assert wanted(tmp_path, ["user,film,week,stars"], ["user,film,week"]) == [[1, 2, 3]]
    assert sorted(opened) == ["wanted.csv", "wanted.csv", "x.csv", "x.csv"]  # written, then read
