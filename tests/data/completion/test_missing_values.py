"""What stands for a missing value is refused, in every type and file, and what is a value is not."""

import contextlib
import re

import numpy as np
import pytest
import tensorly as tl
import torch
from tensorly.datasets import load_covid19_serology, load_IL2data, load_indian_pines, load_kinetic

from tenzoo.data.completion.files import read_entries
from tenzoo.data.completion.missing_values import check_markers

RNG = np.random.default_rng(0)
BASE = RNG.normal(3, 1, (20, 6, 5))
LACKING = RNG.random(BASE.shape) < 0.2
COUNT = int(LACKING.sum())

FILLS = [
    *(1e20, -1e20, 1e30, -1e30, 1e36, -1e34, 1e38, 9.969209968386869e36, 9.96921e36, 1.70141e38),
    *(-3.4028234663852886e38, 3.4028235e38, -3.40282e38, -3.4e38),
    *(2**31 - 1, -(2**31), 2**32 - 1, -(2**63), 2**63, 2**64, 32767, -32767, -32768, 65535, 255, 127, -127, -128),
    *(-99, 99, -999, 999, -9999, 9999, -99999, 99999, 999999, -9999999, -99.9, -999.9, -9999.9, -8888, -7777),
    *(-12345.678, 4321.5),  # no code that anybody knows, but far off and always the same
]


@pytest.mark.parametrize("kind", [np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("fill", FILLS)
def test_a_marker_is_refused_in_both_float_types(kind, fill):
    values = np.where(LACKING, fill, BASE).astype(kind)
    with pytest.raises(ValueError, match=rf"NaN for missing values in `dataset`, got {COUNT} times ") as caught:
        check_markers(values, arg="dataset")
    told = float(re.search(r"times (\S+) where", str(caught.value))[1])
    assert told == pytest.approx(fill, rel=1e-6)
    rest = BASE[~LACKING]
    assert f"where all others are from {rest.min():.6g} to {rest.max():.6g}; write NaN" in str(caught.value)
    check_markers(np.where(values == values.dtype.type(fill), np.nan, values), arg="dataset")


@pytest.mark.parametrize("fill", [-999, -9999, 9999, -99.9, 255, 65504])
def test_a_marker_is_refused_in_half_precision(fill):
    with pytest.raises(ValueError, match=f"got {COUNT} times"):
        check_markers(np.where(LACKING, fill, BASE).astype(np.float16), arg="dataset")


WHOLE = RNG.integers(1, 100, BASE.shape)


@pytest.mark.parametrize(
    ("kind", "fill"),
    [
        *((np.int8, fill) for fill in (-128, -127, -1, -99)),
        *((np.int16, fill) for fill in (-32768, -32767, 32767, -9999, -999, 999)),
        *((np.int32, fill) for fill in (-(2**31), 1 - 2**31, 2**31 - 1, -9999, 99999)),
        *((np.int64, fill) for fill in (-(2**63), 2**63 - 1, -9999)),
        *((np.uint8, 255), (np.uint16, 65535), (np.uint32, 2**32 - 1), (np.uint64, 2**64 - 1)),
    ],
)
def test_limits_and_codes_of_integers(kind, fill):
    values = np.where(LACKING, np.array(fill, kind), WHOLE.astype(kind))
    with pytest.raises(
        ValueError,
        match=rf"got {COUNT} times .*; save floats, write NaN for it, name it in `missing_values`",
    ):
        check_markers(values, arg="dataset")


LARGE = RNG.uniform(0, 5000, BASE.shape)


@pytest.mark.parametrize("fill", [-999, -9999, -99, -1, -999.9, 9999, 99999, -1000])
@pytest.mark.parametrize("whole", [False, True])
def test_a_marker_that_is_nearer_than_the_others_are_apart(fill, whole):
    others = LARGE.round() + 1 if whole else LARGE
    with pytest.raises(ValueError, match=rf"got {COUNT} times {fill} where all others"):
        check_markers(np.where(LACKING, fill, others), arg="dataset")


WIDE = RNG.normal(0, 2000, BASE.shape)


@pytest.mark.parametrize("fill", [-999, -1, -9999, 9999, -999.9, -32768])
def test_a_marker_near_or_between_the_values_stands_out_as_a_peak(fill):
    for others in (WIDE, np.where(RNG.random(BASE.shape) < 0.5, 0, WIDE)):
        with pytest.raises(ValueError, match=rf"got {COUNT} times {fill} where"):
            check_markers(np.where(LACKING, fill, others), arg="dataset")
    check_markers(np.where(np.arange(600).reshape(BASE.shape) < 5, -999, WIDE), arg="dataset")


def test_a_marker_beside_two_classes():
    with pytest.raises(ValueError, match=rf"got {COUNT} times 255 where all others are from 1 to 2"):
        check_markers(np.where(LACKING, 255, RNG.integers(1, 3, BASE.shape)).astype(np.uint8), arg="dataset")


@pytest.mark.parametrize("fill", [-28672, -3000, -12345, 70000])
def test_a_code_that_nobody_knows_is_a_peak_beyond_any_gap(fill):
    with pytest.raises(ValueError, match=rf"got {COUNT} times {fill} where .* or bring it nearer to the others"):
        check_markers(np.where(LACKING, fill, RNG.uniform(-500, 10000, BASE.shape).round()), arg="dataset")


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_what_numpy_writes_for_masked_values(kind):
    values = np.ma.masked_array(RNG.integers(1, 6, BASE.shape).astype(kind), LACKING).filled()
    with pytest.raises(ValueError, match=rf"got {COUNT} times \S+ where all others are from 1 to 5"):
        check_markers(values, arg="dataset")


def test_two_markers_do_not_hide_each_other():
    values = BASE.copy()
    values[:3], values[3:5] = -999, 999
    with pytest.raises(ValueError, match=r"got 90 times -999 and 60 times 999 where all others are from"):
        check_markers(values, arg="dataset")


def test_a_single_marker():
    values = LARGE.copy()
    values[3, 2, 1] = -999
    with pytest.raises(ValueError, match="got 1 times -999 where"):
        check_markers(values, arg="dataset")


@pytest.mark.parametrize("ending", ["npy", "npz", "pt", "csv", "list.npz"])
@pytest.mark.parametrize("fill", [1e20, 9.969209968386869e36, -3.4028234663852886e38, -999.9, 255])
def test_files_of_all_kinds(tmp_path, ending, fill):
    values = np.where(LACKING, fill, BASE).astype(np.float32)
    index = np.argwhere(np.ones(values.shape, bool))
    path = tmp_path / f"x.{ending}"
    match ending:
        case "npy":
            np.save(path, values)
        case "npz":
            np.savez(path, values)
        case "pt":
            torch.save(torch.from_numpy(values), path)
        case "csv":
            rows = zip(index.tolist(), values.ravel().tolist(), strict=True)
            path.write_text("\n".join(",".join(map(str, (*row, value))) for row, value in rows))
        case _:
            np.savez(path, indices=index, values=values.ravel())
    with pytest.raises(ValueError, match=f"got {COUNT} times"):
        read_entries(path, None)


def test_bfloat16(tmp_path):
    torch.save(torch.from_numpy(np.where(LACKING, -9999, BASE)).bfloat16(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"got {COUNT} times -9984 where"):
        read_entries(tmp_path / "x.pt", None)


PLAIN = {
    "saturated bytes": np.clip(RNG.normal(180, 60, (50, 50)), 1, 255).astype(np.uint8),
    "saturated floats": np.clip(RNG.normal(200, 60, (50, 50)), 0, 255),
    "bright spots": np.where(RNG.random((50, 50)) < 0.1, 255, RNG.integers(1, 201, (50, 50))).astype(np.uint8),
    "clipped audio": np.clip(RNG.normal(0, 20000, (99, 99)), -32768, 32767).astype(np.int16),
    "clipped bytes": np.clip(RNG.normal(0, 80, (50, 50)), -128, 127).astype(np.int8),
    "999 inside": np.where(RNG.random((50, 50)) < 0.01, 999, RNG.uniform(0, 5000, (50, 50))),
    "255 inside": np.where(RNG.random((50, 50)) < 0.2, 255.0, RNG.uniform(0, 1023, (50, 50))),
    "percent": RNG.integers(0, 101, (30, 30)).astype(float),
    "0 to 99": RNG.integers(0, 100, (30, 30)).astype(float),
    "0 to 9999": RNG.integers(0, 10000, (300, 300)).astype(float),
    "mask": np.where(RNG.random((30, 30)) < 0.5, 255.0, 0.0),
    "three tones": RNG.choice([0.0, 128.0, 255.0], (30, 30)),
    "signs": RNG.choice([-1.0, 1.0], (30, 30)),
    "votes": RNG.choice([-1.0, 0.0, 1.0], (30, 30)),
    "marks": RNG.integers(-1, 6, (30, 30)).astype(float),
    "degrees": RNG.binomial(40, 0.4, (30, 30)) - 5.0,
    "-1 to 1": np.clip(RNG.normal(0, 1, (30, 30)), -1, 1),
    "cut at 0": np.maximum(RNG.normal(0, 1, (30, 30)), 0),
    "rare counts": np.where(RNG.random((30, 30)) < 0.9, 0.0, RNG.integers(900, 1000, (30, 30))),
    "sparse signs": RNG.choice([-1.0, 0.0, 0.0, 0.0, 1.0], (30, 30)),
    "cut at 9999": np.minimum(RNG.exponential(6000, (60, 60)), 9999),
    "saturated functions": np.tanh(RNG.normal(0, 30, (60, 60))).round(6),
    "heavy tail": RNG.pareto(1, (60, 60)),
    "heavy tail of counts": RNG.zipf(2, (60, 60)).astype(float),
    "money": RNG.choice([9.99, 19.99, 49.99, 99.0, 199.0, 499.0, 999.0, 1999.0], (30, 30)),
    "around 1e20": RNG.normal(1e20, 1e19, (30, 30)),
    "around -999": RNG.normal(-999, 3, (30, 30)).round(),
    "loss and gain": RNG.normal(0, 400, (30, 30)).round(),
    "outlier": np.where(np.arange(900).reshape(30, 30) == 7, 127.0, RNG.normal(3, 1, (30, 30))),
    "constant": np.full((3, 4), -999.0),
    "empty": np.full((3, 4), np.nan),
    "none": np.ones((0, 3)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_values_that_are_values(name):
    check_markers(PLAIN[name], arg="dataset")
    if PLAIN[name].dtype == np.float64:
        check_markers(PLAIN[name].astype(np.float32), arg="dataset")


@pytest.mark.parametrize("load", [load_covid19_serology, load_IL2data, load_indian_pines, load_kinetic])
def test_real_data_hold_no_marker(load):
    check_markers(tl.to_numpy(load().tensor), arg="dataset")


def test_an_offset_makes_a_value_plain():
    values = np.where(LACKING, -999, LARGE)
    check_markers(values + 0.5, arg="dataset")


def test_ratings_are_never_minus_one():
    check_markers(PLAIN["marks"], arg="dataset")
    with pytest.raises(ValueError, match="times -1 where all others are from 0 to 5"):
        check_markers(PLAIN["marks"], arg="dataset", rated=True)
    check_markers(RNG.integers(-3, 4, 90), arg="dataset", rated=True)


@pytest.mark.parametrize(
    ("share", "least", "refused"),
    [(0.6, 1, True), (0.1, 2, True), (0.1, 1, False), (0.2, 1, False), (0, 1, False)],
)
def test_zero_among_ratings_is_a_grade_or_none_at_all(share, least, refused):
    grades = np.where(RNG.random(900) < share, 0, RNG.integers(least, 11, 900)).astype(float)
    check_markers(grades, arg="dataset")
    message = f"times 0 where all others are from {least} to 10"
    with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
        check_markers(grades, arg="dataset", rated=True)
