"""A user's own file is read as it is meant, or refused in a line that says how to make it plain."""

import numpy as np
import pytest

from tenzoo.data.completion.files import read_entries
from tests.data.completion.tables import FULL, KNOWN, VALUES, csv

RNG = np.random.default_rng(1)


def numbered(start=0, order=None):
    rows = np.arange(start, start + len(KNOWN)) if order is None else order
    return np.column_stack([rows, KNOWN])


def shuffled():
    return numbered(order=np.random.default_rng(1).permutation(90) * 3)


MISREAD_TABLES = {
    "pandas index": (
        {"index": numbered(), "header": ",i,j,k,v"},
        r"column 1 of `dataset`, got a different one in each of 90",
    ),
    "named index": (
        {"index": numbered(), "header": "index,i,j,k,v"},
        r"column 1 \(index\) of `dataset`, got a different one",
    ),
    "no header": ({"index": numbered()}, "row numbers; leave the column out, or give `shape` if it is a mode"),
    "from 1": ({"index": numbered(1)}, "in each of 90 rows, like row numbers"),
    "filtered, sorted": ({"index": shuffled()}, "in each of 90 rows, like row numbers"),
    "two rows": (
        {"index": KNOWN[:2] * 0 + [[0, 0, 0], [1, 0, 0]], "values": VALUES[:2], "header": ",j,k,v"},
        "column 1 ",
    ),
    "counted from 1": ({"index": KNOWN + 1}, r"from 0 on in column 1 of `dataset`, got 1 to 6; subtract 1 if they"),
    "one mode from 1": (
        {"index": KNOWN + np.array([0, 0, 1]), "header": "i,j,month,v"},
        r"column 3 \(month\) .* got 1 to 4",
    ),
    "ids": ({"index": KNOWN * [1, 1, 5_000_000]}, "got 4 different ones from 0 to 15000000, as ids are; number them"),
    "ids from 1": ({"index": KNOWN * [1, 977, 1] + 1, "header": "i,id,k,v"}, r"column 1 \(i\) .* got 1 to 6"),
    "large ids": (
        {"index": KNOWN + np.array([0, 10**15, 0])},
        "got 5 different ones from 10{15} to 10{14}4, as ids are",
    ),
    "timestamp": (
        {"index": np.column_stack([KNOWN[:, :2], KNOWN[:, 2]]), "header": "user,film,rating,timestamp"},
        "the value in the last column of `dataset`, got 'rating' before 'timestamp'; move it",
    ),
    "dense table": (
        {"index": RNG.integers(0, 3, (50, 20)), "values": VALUES[:50]},
        "got 21 columns; save a dense table",
    ),
    "marker": (
        {"values": np.where(VALUES < -1, -999, VALUES)},
        "for missing values in `dataset`, got .* times -999 where",
    ),
    "one marker": (
        {"values": np.where(np.arange(90) == 7, 9999, VALUES)},
        "got 1 times 9999 where all others are from",
    ),
}


@pytest.mark.parametrize("name", MISREAD_TABLES)
def test_tables_that_would_be_misread(tmp_path, name):
    changes, message = MISREAD_TABLES[name]
    csv(tmp_path / "x.csv", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_entries(tmp_path / "x.csv", None)
    assert "\n" not in str(caught.value)
    if "header" not in changes:
        index, values = changes.get("index", KNOWN), changes.get("values", VALUES)
        np.savez(tmp_path / "x.npz", indices=index, values=values)
        with pytest.raises(ValueError, match=message.replace(r" \(index\)", "")):
            read_entries(tmp_path / "x.npz", None)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("userId,movieId,rating,timestamp", "got 'rating' before 'timestamp'; move it to the end"),
        ("user,film,stars_given,when", "got 'stars_given' before 'when'"),
        ('"User","Film","FilmRating","Seen"', "got 'FilmRating' before 'Seen'"),
        ("rating,userId,movieId,genre", "got 'rating' before 'genre'"),
        ("user,film,clicks,unix_time", "got 'unix_time', as a timestamp is called; move the value to the end, or call"),
        ("user,film,note,Date", "got 'Date', as a timestamp is called"),
        ("temp,site,depth,year", "got 'year', as a timestamp is called"),
        ("temp,site,depth,sensorId", "got 'sensorId', as an index is called"),
        ("temp,site,depth,sensor_id", "got 'sensor_id', as an index is called"),
    ],
)
def test_a_header_that_puts_the_value_elsewhere(tmp_path, header, message):
    csv(tmp_path / "x.csv", header=header)
    with pytest.raises(ValueError, match=f"the value in the last column of `dataset`, {message}"):
        read_entries(tmp_path / "x.csv", None)


@pytest.mark.parametrize(
    "header",
    ["x,y,z,temperature", "source,target,layer,weight", "user,film,month,rating", "user,service,hour,response_time"],
)
def test_a_header_that_names_other_modes_and_values(tmp_path, header):
    csv(tmp_path / "x.csv", header=header)
    entries, _ = read_entries(tmp_path / "x.csv", None)
    order = np.lexsort(KNOWN.T[::-1])
    np.testing.assert_array_equal(entries.value, VALUES[order].astype(np.float32))


@pytest.mark.parametrize("marker", [-1, 99])
def test_markers_among_ratings(tmp_path, marker):
    stars = np.where(np.arange(90) % 5 == 0, marker, np.arange(90) % 6)
    csv(tmp_path / "x.csv", values=stars, header="user,film,day,Book-Rating")
    with pytest.raises(ValueError, match=f"got 18 times {marker} where all others are from 0 to 5; write NaN"):
        read_entries(tmp_path / "x.csv", None)


PAIRS = np.stack(np.meshgrid(np.arange(12), np.arange(11), indexing="ij"), -1).reshape(-1, 2)


def lines_of(values, pairs=PAIRS):
    return "\n".join(f"{i},{j},{value}" for (i, j), value in zip(pairs.tolist(), values, strict=False))


HALVES = [f"{stars},{half}" for stars, half in zip(np.arange(132) % 5, 5 * (np.arange(132) % 7 % 2), strict=True)]
TENTHS = [f"{value:.1f}".replace(".", ",") for value in RNG.uniform(0, 6, 132)]
HUNDREDTHS = [f"{value:.2f}".replace(".", ",") for value in RNG.uniform(0, 6, 132)]
ROUNDED = [str(value).replace(".", ",") for value in RNG.uniform(0, 6, 132).round(2) + 0.001]
STAMPED = [f"{stars},{1000000 + 7 * at}" for at, stars in enumerate(RNG.integers(0, 6, 132))]


@pytest.mark.parametrize(
    "values",
    [HALVES, TENTHS, HUNDREDTHS, ROUNDED, STAMPED, HALVES[:9], TENTHS[:9], HUNDREDTHS[:25], STAMPED[:25]],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_decimal_commas_and_timestamps_that_make_an_index_of_the_value(tmp_path, values, end):
    (tmp_path / "x.csv").write_text(lines_of(values).replace("\n", end))
    with pytest.raises(
        ValueError, match=r"column 3 of `dataset` to tell rows apart.* write \d.\d+ for a number, leave"
    ):
        read_entries(tmp_path / "x.csv", None)
    with pytest.raises(ValueError, match="inside the shape"):
        read_entries(tmp_path / "x.csv", (12, 11))
    (tmp_path / "y.csv").write_text("user,film,stars\n" + lines_of(values))
    with pytest.raises(ValueError, match="3 columns in line 2"):
        read_entries(tmp_path / "y.csv", None)


def test_a_decimal_comma_below_zero(tmp_path):
    (tmp_path / "x.csv").write_text("0,0,0,25\n0,1,-0,75\n1,0,0,5\n")
    with pytest.raises(ValueError, match="indices of at least 0 in `dataset`, got -0; write decimals with a point"):
        read_entries(tmp_path / "x.csv", None)


TIMES = {
    "seconds": 1_260_759_144 + np.arange(132) * 86_401,
    "milliseconds": (1_260_759_144 + np.arange(132) * 86_401) * 1000 + 7,
    "dates": 20_260_101 + np.arange(132) % 28 + 100 * (np.arange(132) % 12),
}


@pytest.mark.parametrize("header", ["", "user,item,clicked\n"])
@pytest.mark.parametrize("name", TIMES)
def test_times_are_no_values(tmp_path, name, header):
    times = TIMES[name]
    (tmp_path / "x.csv").write_text(header + lines_of(times.tolist()))
    message = f"values in the last column of `dataset`, got {times.min()} to {times.max()}, as times are written; move"
    with pytest.raises(ValueError, match=message):
        read_entries(tmp_path / "x.csv", None)
    (tmp_path / "y.csv").write_text("user,item,value\n" + lines_of(times.tolist()))
    assert len(read_entries(tmp_path / "y.csv", None)[0]) == 132


def test_large_whole_numbers_are_no_times(tmp_path):
    for times in (TIMES["dates"] + 50, 3 * TIMES["seconds"], TIMES["seconds"] - 1_260_000_000):
        (tmp_path / "x.csv").write_text(lines_of(times.tolist()))
        assert len(read_entries(tmp_path / "x.csv", None)[0]) == 132


WEEKS = RNG.integers(0, 4, 132)
WEEKS[:4] = range(4)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (lines_of([f"{week},{stars}" for week, stars in zip(WEEKS, RNG.integers(1, 6, 132), strict=True)]), None),
        (lines_of([f"{week},{clicks}" for week, clicks in zip(WEEKS, RNG.integers(0, 99, 132), strict=True)]), None),
        (lines_of([f"{week},{value}" for week, value in zip(WEEKS, RNG.normal(size=132), strict=True)]), None),
        ("user,film,week,stars\n" + lines_of([f"{week},{at % 10}" for at, week in enumerate(WEEKS)]), None),
        (lines_of([f"{week},{at % 10}" for at, week in enumerate(WEEKS)]), (12, 11, 4)),
        (lines_of([f"{k},{7 * i % 10}" for i, (_, _, k) in enumerate(FULL)], FULL[:, :2]), None),
    ],
)
def test_three_modes_of_whole_numbers(tmp_path, text, shape):
    (tmp_path / "x.csv").write_text(text)
    entries, found = read_entries(tmp_path / "x.csv", shape)
    assert found == ((12, 11, 4) if len(entries) == 132 else (6, 5, 4))


@pytest.mark.parametrize("index", [numbered(), KNOWN + 1, KNOWN * [1, 1, 5000], numbered(1)])
def test_a_shape_makes_any_numbering_plain(tmp_path, index):
    shape = tuple((index.max(0) + 3).tolist())
    csv(tmp_path / "x.csv", index)
    np.savez(tmp_path / "x.npz", indices=index, values=VALUES, shape=np.array(shape))
    for entries, found in (read_entries(tmp_path / "x.csv", shape), read_entries(tmp_path / "x.npz", None)):
        assert found == shape
        order = np.lexsort(index.T[::-1])
        assert entries.index.tolist() == index[order].tolist()


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (6, 5, 4)),
        ({"header": "i,j,k,value"}, (6, 5, 4)),
        ({"header": "rating,j,k,value"}, (6, 5, 4)),
        ({"index": np.array([[0, 0], [1, 2], [2, 1]]), "values": VALUES[:3]}, (3, 3)),  # few rows tell nothing
        ({"values": VALUES * 0 - 999}, (6, 5, 4)),  # a marker among no others is a value
        ({"values": np.where(np.arange(90) < 9, -999, -(VALUES**2) * 600)}, (6, 5, 4)),  # nor apart
        ({"values": VALUES - 999}, (6, 5, 4)),
    ],
)
def test_tables_that_are_plain(tmp_path, changes, shape):
    csv(tmp_path / "x.csv", **changes)
    entries, found = read_entries(tmp_path / "x.csv", None)
    assert found == shape
    assert len(entries) == len(changes.get("values", VALUES))
