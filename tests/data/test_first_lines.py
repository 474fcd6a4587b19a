"""The first line of a csv: names, numbers of columns, or data."""

import pytest

from tenzoo.data.files import read_entries, read_index

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
