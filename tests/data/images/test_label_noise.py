import math
from typing import Any

import numpy as np
import pytest
import torch

from tenzoo.data import AsymmetricNoise, HumanNoise, LabelNoise, MatrixNoise, SymmetricNoise
from tenzoo.data.images.label_noise import check_noise, noise_settings

CLEAN = torch.arange(10).repeat(10_000)


def draw(noise: LabelNoise, labels: torch.Tensor = CLEAN, seed: int = 0, num_classes: int = 10) -> torch.Tensor:
    return noise.noisy(labels, num_classes=num_classes, generator=np.random.default_rng(seed))


def frequencies(noisy: torch.Tensor) -> np.ndarray:
    """How often each class became each other one, by counting."""
    table = np.zeros((10, 10))
    np.add.at(table, (CLEAN.numpy(), noisy.numpy()), 1)
    return table / table.sum(axis=1, keepdims=True)


def assert_close(observed: np.ndarray, expected: np.ndarray) -> None:
    """Within 5 standard deviations of 10,000 draws per row; exact where nothing is random."""
    assert (abs(observed - expected) <= 5 * np.sqrt(expected * (1 - expected) / 10_000)).all()


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.8, 1.0])
def test_symmetric_noise_goes_to_the_other_classes_alike(rate):
    noisy = draw(SymmetricNoise(rate))
    expected = np.full((10, 10), rate / 9)
    np.fill_diagonal(expected, 1 - rate)
    assert noisy.dtype == torch.int64
    assert_close(frequencies(noisy), expected)
    assert (noisy != CLEAN).double().mean().item() == pytest.approx(rate, abs=0.01)
    if rate in (0.0, 1.0):
        assert bool((noisy == CLEAN).any()) is (rate == 0.0)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_asymmetric_noise_goes_to_the_class_that_looks_alike(rate):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    becomes = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
    expected = np.eye(10)
    for name, other in becomes.items():
        i, j = names.index(name), names.index(other)
        expected[i, i], expected[i, j] = 1 - rate, rate
    noisy = draw(AsymmetricNoise(rate))
    assert_close(frequencies(noisy), expected)
    assert (noisy != CLEAN).double().mean().item() == pytest.approx(rate / 2, abs=0.01)


def test_matrix_noise_follows_its_matrix_and_never_draws_what_is_impossible():
    matrix = np.random.default_rng(1).dirichlet(np.full(10, 0.3), size=10)
    matrix[:, [3, 9]] = 0.0  # at the end too, where rounding of the sum could let one through
    matrix /= matrix.sum(axis=1, keepdims=True)
    for given in (matrix, matrix.tolist(), torch.from_numpy(matrix), matrix * (1 - 9e-7)):
        noisy = draw(MatrixNoise(given))
        assert_close(frequencies(noisy), matrix)
        assert not torch.isin(noisy, torch.tensor([3, 9])).any()


def test_a_sum_below_one_does_not_invent_a_class():
    class AlmostOne(np.random.Generator):
        def random(self, size):
            return np.full(size, np.nextafter(1.0, 0.0))

    generator = AlmostOne(np.random.PCG64(0))
    noise = MatrixNoise([[0.1] * 3 + [0.7 - 5e-7, 0.0], *([[0.2] * 5] * 4)])
    assert noise.noisy(torch.tensor([0, 1]), num_classes=5, generator=generator).tolist() == [3, 4]


def test_draws_are_independent_of_each_other():
    noisy = draw(SymmetricNoise(0.5), torch.zeros(100_000, dtype=torch.int64))
    wrong = (noisy != 0).double()
    assert (wrong[1:] * wrong[:-1]).mean().item() == pytest.approx(0.25, abs=0.01)


def test_noise_depends_on_the_generator_alone_and_leaves_the_labels():
    before, state = CLEAN.clone(), torch.get_rng_state()
    noise = SymmetricNoise(0.4)
    assert torch.equal(draw(noise, seed=1), draw(noise, seed=1))
    assert not torch.equal(draw(noise, seed=1), draw(noise, seed=2))
    assert torch.equal(CLEAN, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [SymmetricNoise, AsymmetricNoise])
@pytest.mark.parametrize(
    ("rate", "error"),
    [(-0.1, ValueError), (1.5, ValueError), (math.nan, ValueError), ("0.4", TypeError), (True, TypeError)],
)
def test_bad_rates(kind, rate, error):
    with pytest.raises(error, match=r"number in \[0, 1\] in `rate`, got") as caught:
        kind(rate)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        ([[0.5, 0.5]], ValueError, "square matrix in `matrix`, got 1 rows and 2 numbers in row 0"),
        ([[1.0, 0.0], [1.0]], ValueError, "square matrix in `matrix`, got 2 rows and 1 numbers in row 1"),
        ([[0.5, 0.5], [0.5, 0.6]], ValueError, "sum 1 in `matrix`, got 1.1 in row 1"),
        ([[1.5, -0.5], [0.0, 1.0]], ValueError, r"\[0, 1\] in `matrix`, got 1.5"),
        ([[math.nan, 1.0], [0.0, 1.0]], ValueError, r"\[0, 1\] in `matrix`, got nan"),
        ([["1", "0"], [0.0, 1.0]], TypeError, "number .* in `matrix`, got '1'"),
        ([1.0, 0.0], TypeError, "rows of numbers in `matrix`, got 1.0 as row 0"),
        ("identity", TypeError, "rows of numbers in `matrix`, got 'identity'"),
        (0.4, TypeError, "rows of numbers in `matrix`, got 0.4"),
        ([[1.0]], ValueError, "at least 2 rows in `matrix`, got 1"),
        ([], ValueError, "at least 2 rows in `matrix`, got 0"),
    ],
)
def test_bad_matrices(matrix, error, message):
    with pytest.raises(error, match=message) as caught:
        MatrixNoise(matrix)
    assert "\n" not in str(caught.value)


def test_noise_for_another_number_of_classes():
    with pytest.raises(ValueError, match=r"expected 10 rows in `matrix`, .* got 2"):
        draw(MatrixNoise([[1.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"10 classes of CIFAR-10 .*, got 3 classes"):
        draw(AsymmetricNoise(0.2), num_classes=3)


def write_labels(path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_human_labels_come_from_the_file(tmp_path):
    clean, worse = np.arange(10, dtype=np.uint8), np.arange(10, dtype=np.uint8)[::-1]
    path = write_labels(tmp_path / "n.npz", clean_label=clean, worse_label=worse, aggre_label=clean // 2)
    labels = torch.arange(10)
    assert draw(HumanNoise(path), labels).tolist() == worse.tolist()
    assert draw(HumanNoise(path, "aggre_label"), labels, seed=8).tolist() == (clean // 2).tolist()
    assert draw(HumanNoise(path, "clean_label"), labels).dtype == torch.int64
    alone = write_labels(tmp_path / "alone.npz", random_label2=worse.astype(np.int64))
    assert draw(HumanNoise(alone, "random_label2"), labels).tolist() == worse.tolist()


GOOD = np.arange(10)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"worse_label": GOOD[:9]}, "expected 10 labels as 'worse_label' in the file in `path`, .*, got 9;"),
        ({"worse_label": GOOD[None]}, r"expected 10 labels .* got an array of shape \(1, 10\)"),
        ({"worse_label": GOOD, "clean_label": GOOD[:5]}, "expected 10 labels as 'clean_label'"),
        ({"worse_label": GOOD.astype(float)}, "expected integers as 'worse_label' .*, got float64"),
        ({"worse_label": GOOD == 1}, "expected integers as 'worse_label' .*, got bool"),
        ({"worse_label": GOOD + 1}, "labels from 0 to 9 as 'worse_label' .*, got 10"),
        ({"worse_label": GOOD - 1}, "labels from 0 to 9 as 'worse_label' .*, got -1"),
        ({"worse_label": GOOD, "clean_label": GOOD[::-1]}, "as 'clean_label' in the file in `path`, got 10 of 10 that"),
        ({"aggre_label": GOOD}, "an array 'worse_label' in the file in `path`"),
        ({"worse_label": GOOD.astype(object)}, r"readable .npz file .* \(ValueError\); .* no Python objects"),
    ],
)
def test_bad_label_files(tmp_path, arrays, message):
    path = write_labels(tmp_path / "n.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        draw(HumanNoise(path), torch.arange(10))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no zip at all", None, "truncated", "npy"])
def test_label_files_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "n.npz"
    if content == "npy":
        np.save(tmp_path / "n.npy", GOOD)
        (tmp_path / "n.npy").rename(path)
    elif content == "truncated":
        write_labels(path, worse_label=GOOD)
        path.write_bytes(path.read_bytes()[:-40])
    elif content is not None:
        path.write_bytes(content)
    error, message = (FileNotFoundError, "existing file") if content is None else (ValueError, "readable .npz file")
    with pytest.raises(error, match=f"{message} of .* in `path`") as caught:
        draw(HumanNoise(str(path)), torch.arange(10))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "path as str in `path`"),
        (("CIFAR-10_human.pt",), ValueError, r"ending in .npz in `path`, got 'CIFAR-10_human.pt'"),
        (("n.npz", "worst_label"), ValueError, "one of aggre_label, clean_label, .* in `labels`, got 'worst_label'"),
    ],
)
def test_bad_arguments_for_human_labels(arguments, error, message):
    with pytest.raises(error, match=message):
        HumanNoise(*arguments)


class Shifted(LabelNoise):
    """A user's own."""

    def __init__(self, by: int) -> None:
        self.by = by

    @property
    def init_args(self) -> dict[str, Any]:
        return {"by": self.by}

    def noisy(self, labels, *, num_classes, generator):
        return (labels + self.by) % num_classes


@pytest.mark.parametrize(
    "noise",
    [
        SymmetricNoise(0.3),
        AsymmetricNoise(0.2),
        MatrixNoise(np.full((10, 10), 0.1)),
        HumanNoise("n.npz", "random_label1"),
        Shifted(3),
    ],
)
def test_settings_are_builtins_that_make_the_same_noise(noise):
    def builtin(value):
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        return type(value) in (dict, list, str, float, int) and all(map(builtin, parts))

    settings = noise_settings(noise)
    assert builtin(settings)
    again = check_noise(settings)
    assert type(again) is type(noise)
    assert noise_settings(again) == settings
    assert check_noise(noise) is noise


def test_a_number_is_the_rate_of_symmetric_noise():
    assert noise_settings(check_noise(0.4)) == noise_settings(SymmetricNoise(0.4))
    assert check_noise(None) is None
    assert noise_settings(None) is None


@pytest.mark.parametrize("module", ["tenzoo.data", "tenzoo.data.label_noise", "tenzoo.data.images.label_noise"])
def test_checkpoints_name_the_class_by_where_it_is_or_was(module):
    settings = {"class_path": f"{module}.SymmetricNoise", "init_args": {"rate": 0.4}}
    assert noise_settings(check_noise(settings)) == noise_settings(SymmetricNoise(0.4))


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (1.2, ValueError, r"\[0, 1\] in `noise`, got 1.2"),
        (True, TypeError, "a LabelNoise, a rate or None in `noise`, got True"),
        ("symmetric", TypeError, "a LabelNoise, a rate or None in `noise`, got 'symmetric'"),
        ({"rate": 0.4}, TypeError, "a LabelNoise, a rate or None in `noise`"),
        (
            {"class_path": "os.system", "init_args": {}},
            ValueError,
            "one of AsymmetricNoise, HumanNoise, MatrixNoise, .*SymmetricNoise in `noise`, got 'os.system'",
        ),
    ],
)
def test_bad_noise(noise, error, message):
    with pytest.raises(error, match=message) as caught:
        check_noise(noise)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("noise", "text"),
    [
        (SymmetricNoise(0.4), "SymmetricNoise(rate=0.4)"),
        (MatrixNoise([[1, 0], [0, 1]]), "MatrixNoise(2 × 2)"),
        (HumanNoise("somewhere/n.npz"), "HumanNoise(labels='worse_label')"),
    ],
)
def test_the_name_in_reports(noise, text):
    assert repr(noise) == text
