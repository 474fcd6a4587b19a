"""Tables as people have them: each is read as it is meant, or refused in one line that says what to do."""

import gzip

import numpy as np
import pytest

from tenzoo.data import CompletionDataModule

pandas = pytest.importorskip("pandas", reason="needs pandas to write tables: pip install pandas")
pytest.importorskip("pyarrow", reason="needs the extra tables: pip install 'tenzoo[tables]'")

USERS, FILMS, STARS = ["ann", "bob", "ann", "eve"] * 5, [f"f{k}" for k in range(5) for _ in range(4)], range(1, 21)
FRAME = pandas.DataFrame({"user": USERS, "film": FILMS, "stars": [each / 2 for each in STARS]}).drop_duplicates(
    ["user", "film"]
)[:-1]
NAMED = {"index_columns": ["user", "film"], "value_column": "stars"}
NUMBERED = FRAME.assign(user=FRAME.user.map({"ann": 0, "bob": 1, "eve": 2}), film=FRAME.film.str[1:].astype(int))


def csv(frame, **options):
    return lambda path: frame.to_csv(path, **{"index": False, **options})


def with_ids(*ids):
    return FRAME.assign(user=FRAME.user.map(dict(zip(["ann", "bob", "eve"], ids, strict=True))))


READ = {
    "names": ("a.csv", csv(FRAME), NAMED, ("ann", "bob", "eve")),
    "dates": ("a.csv", csv(with_ids("2024-01-03", "2023-12-31", "2024-01-02")), NAMED, None),
    "ids with gaps": ("a.csv", csv(with_ids(7, 900, 55)), NAMED, (7, 55, 900)),
    "huge ids": ("a.csv", csv(with_ids(10**12, 10**18, 3)), NAMED, (3, 10**12, 10**18)),
    "ids with leading zeros": ("a.csv", csv(with_ids("007", "7", "070")), NAMED, ("007", "070", "7")),
    "a column of row numbers": ("a.csv", csv(FRAME, index=True), NAMED, ("ann", "bob", "eve")),
    "a time behind the value": (
        "a.csv",
        csv(FRAME.assign(when=range(1_700_000_000, 1_700_000_000 + len(FRAME)))),
        NAMED,
        ("ann", "bob", "eve"),
    ),
    "semicolons": ("a.csv", csv(FRAME, sep=";"), NAMED, ("ann", "bob", "eve")),
    "tabs": ("a.tsv", csv(FRAME, sep="\t"), NAMED, ("ann", "bob", "eve")),
    "zipped": (
        "a.csv.gz",
        lambda path: path.write_bytes(gzip.compress(FRAME.to_csv(index=False).encode())),
        NAMED,
        ("ann", "bob", "eve"),
    ),
    "Parquet": ("a.parquet", lambda path: FRAME.to_parquet(path), NAMED, ("ann", "bob", "eve")),
    "-999 that is named": (
        "a.csv",
        csv(pandas.concat([FRAME, pandas.DataFrame([["bob", "f9", -999], ["ann", "f9", 1]], columns=FRAME.columns)])),
        {**NAMED, "missing_values": [-999]},
        ("ann", "bob", "eve"),
    ),
    "numbers from 1 on, by name": ("a.csv", csv(NUMBERED.assign(user=NUMBERED.user + 1)), NAMED, (1, 2, 3)),
}

REFUSED = {
    "names without columns": ("a.csv", csv(FRAME), {}, "name the columns in `index_columns` and `value_column`"),
    "numbers from 1 on": ("a.csv", csv(NUMBERED + 1), {}, "got 1 to 3; subtract 1 if they count from 1"),
    "row numbers": ("a.csv", csv(NUMBERED, index=True), {}, "row numbers; leave the column out"),
    "-999": (
        "a.csv",
        csv(pandas.concat([FRAME, pandas.DataFrame([["bob", "f9", -999]], columns=FRAME.columns)])),
        NAMED,
        r"1 times -999 .* name it in `missing_values`",
    ),
    "a time behind the value": (
        "a.csv",
        csv(NUMBERED.assign(timestamp=range(1_700_000_000, 1_700_000_000 + len(FRAME)))),
        {},
        "got 'stars' before 'timestamp'; move it to the end",
    ),
    "decimal commas": (
        "a.csv",
        csv(FRAME, sep=";", decimal=","),
        NAMED,
        r"numbers in column 'stars' of `dataset`, got '0,5' in row 1",
    ),
    "two values for a cell": (
        "a.csv",
        csv(pandas.concat([FRAME, FRAME.assign(stars=9)])),
        NAMED,
        "got 0.5 and 9.0 at user ann, film f0",
    ),
    "Parquet without columns": (
        "a.parquet",
        lambda path: FRAME.to_parquet(path),
        {},
        "names of its columns in `index_columns` and `value_column`",
    ),
    "zeros in whole numbers": (
        "a.npy",
        lambda path: np.save(path, np.eye(4, dtype=int)),
        {},
        "12 zeros of 16, which may mean missing or 0",
    ),
}


def load(folder, case):
    name, write, arguments, expected = case
    write(folder / name)
    data = CompletionDataModule(str(folder / name), **{"observed_fraction": 1, "validation_fraction": 0, **arguments})
    data.setup()
    return data, expected


@pytest.mark.parametrize("case", READ)
def test_a_table_is_read_as_it_is_meant(tmp_path, case):
    data, users = load(tmp_path, READ[case])
    assert data.mode_names == ("user", "film")
    if users is not None:
        assert data.labels[0] == users
    table = {
        (data.labels[0][row], data.labels[1][column]): value
        for (row, column), value in zip(data.known.index.tolist(), data.known.value.tolist(), strict=True)
    }
    assert len(table) == len(FRAME) + (case == "-999 that is named")
    assert set(FRAME.stars) <= set(table.values())
    assert data.shape[0] == 3  # not as many as the largest id


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_would_be_misread_is_refused(tmp_path, case):
    with pytest.raises(ValueError, match=REFUSED[case][3]) as error:
        load(tmp_path, REFUSED[case])
    assert "\n" not in str(error.value)
