"""Wrong labels on purpose: drawn from transition matrices, or given by people."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tenzoo.data.arrays import Array, TooLargeError, read_npz
from tenzoo.data.checks import check_fraction

HumanLabels = Literal["aggre_label", "clean_label", "random_label1", "random_label2", "random_label3", "worse_label"]
"""The sets of labels of CIFAR-10N."""

_CONFUSED = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
_ROW_SUM_TOLERANCE = 1e-6


class LabelNoise(ABC):
    """Changes some labels of a training set.

    A subclass of your own keeps its arguments, of builtin types, in :attr:`init_args`: checkpoints store them.
    """

    @property
    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """The arguments that make an equal object, of builtin types only."""

    @abstractmethod
    def noisy(self, labels: Tensor, *, num_classes: int, generator: np.random.Generator) -> Tensor:
        """The labels with noise.

        Args:
            labels: The correct labels of the whole training set in its own order, shape ``(n,)``, int64.
            num_classes: Number of classes.
            generator: What to draw from.

        Returns:
            Shape ``(n,)``, int64, a new tensor.

        Raises:
            ValueError: If the noise is not for such labels.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.init_args.items())})"


class TransitionNoise(LabelNoise):
    """Noise that depends on the class alone: a label i becomes j with probability ``T[i, j]``, each on its own."""

    @abstractmethod
    def transition(self, num_classes: int) -> Array:
        """The matrix T, shape ``(num_classes, num_classes)``, float64, rows of sum 1.

        Raises:
            ValueError: If there is none for so many classes.
        """

    @override
    def noisy(self, labels: Tensor, *, num_classes: int, generator: np.random.Generator) -> Tensor:
        cumulative = self.transition(num_classes).cumsum(axis=1)
        cumulative /= cumulative[:, -1:]  # 1 exactly where the last possible class ends: nothing is drawn beyond it
        drawn = generator.random(len(labels))
        return torch.from_numpy((drawn[:, None] >= cumulative[labels.numpy()]).sum(axis=1, dtype=np.int64))


class SymmetricNoise(TransitionNoise):
    """With probability ``rate`` a label becomes one of the *other* classes, each equally likely.

    So ``rate`` is the expected fraction of wrong labels. Where the new label is drawn from all classes, the correct
    one among them, as in some publications, it is ``(1 - 1/C)`` times their rate that counts here.

    Args:
        rate: Probability in [0, 1] that a label is wrong.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is outside of [0, 1].

    Example:
        >>> SymmetricNoise(0.3).transition(4)[0].round(6).tolist()
        [0.7, 0.1, 0.1, 0.1]
    """

    def __init__(self, rate: float) -> None:
        self._rate = check_fraction(rate, arg="rate")

    @property
    @override
    def init_args(self) -> dict[str, Any]:
        return {"rate": self._rate}

    @override
    def transition(self, num_classes: int) -> Array:
        matrix = np.full((num_classes, num_classes), self._rate / (num_classes - 1))
        np.fill_diagonal(matrix, 1 - self._rate)
        return matrix


class AsymmetricNoise(TransitionNoise):
    """With probability ``rate`` a label of CIFAR-10 becomes that of a class that looks alike.

    Truck → automobile, bird → airplane, deer → horse, cat ↔ dog, as in Patrini et al. (2017, arXiv:1609.03683). The
    other five classes keep their labels, so the expected fraction of wrong labels is ``rate / 2``.

    Args:
        rate: Probability in [0, 1] that a label of one of the five classes is wrong.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is outside of [0, 1].

    Example:
        >>> matrix = AsymmetricNoise(0.25).transition(10)
        >>> matrix[9, 9].item(), matrix[9, 1].item(), matrix[1, 1].item()
        (0.75, 0.25, 1.0)
    """

    def __init__(self, rate: float) -> None:
        self._rate = check_fraction(rate, arg="rate")

    @property
    @override
    def init_args(self) -> dict[str, Any]:
        return {"rate": self._rate}

    @override
    def transition(self, num_classes: int) -> Array:
        if num_classes != 10:
            raise ValueError(
                f"expected data of the 10 classes of CIFAR-10 for AsymmetricNoise in `noise`, got {num_classes} "
                "classes; give a MatrixNoise"
            )
        matrix = np.eye(10)
        for label, other in _CONFUSED.items():
            matrix[label, label] = 1 - self._rate
            matrix[label, other] = self._rate
        return matrix


class MatrixNoise(TransitionNoise):
    """Noise by a transition matrix of your own.

    Args:
        matrix: ``matrix[i][j]`` is the probability that a label i becomes j: one row per class, numbers in [0, 1],
            rows of sum 1.

    Raises:
        TypeError: If it holds anything but numbers.
        ValueError: If it is not square, or a row is not a distribution.

    Example:
        >>> noise = MatrixNoise([[0.9, 0.1], [0.0, 1.0]])
        >>> noise.noisy(torch.tensor([1, 1, 1]), num_classes=2, generator=np.random.default_rng(0)).tolist()
        [1, 1, 1]
    """

    def __init__(self, matrix: Sequence[Sequence[float]]) -> None:
        self._matrix = _check_matrix(matrix)

    @property
    @override
    def init_args(self) -> dict[str, Any]:
        return {"matrix": [list(row) for row in self._matrix]}

    @override
    def transition(self, num_classes: int) -> Array:
        if len(self._matrix) != num_classes:
            raise ValueError(
                f"expected {num_classes} rows in `matrix`, one per class of the data, got {len(self._matrix)}; "
                "give a row for every class"
            )
        return np.array(self._matrix)

    @override
    def __repr__(self) -> str:
        return f"MatrixNoise({len(self._matrix)} × {len(self._matrix)})"


class HumanNoise(LabelNoise):
    """Labels that people gave to the same images, such as CIFAR-10N (Wei et al., ICLR 2022, arXiv:2110.12088).

    The file is an ``.npz`` of integer arrays of shape ``(n,)`` in the order of the training set, named as in
    CIFAR-10N: ``clean_label``, ``aggre_label`` (majority of three people, 9 % wrong), ``random_label1`` to
    ``random_label3`` (one person each, 17 to 18 %), ``worse_label`` (a wrong one if any of the three was, 40 %). If it
    has ``clean_label``, that must equal the data's own labels, which proves the order. Nothing is drawn.

    The authors publish ``CIFAR-10_human.pt`` (github.com/UCSC-REAL/cifar-10-100n, CC BY-NC 4.0: not for commercial
    use), a pickle, which can run code when it is loaded and so is not read here. Convert it once, if you trust it:
    ``numpy.savez("cifar10n.npz", **torch.load("CIFAR-10_human.pt", weights_only=False))``.

    Args:
        path: Of the ``.npz`` file.
        labels: Which of its arrays to train on.

    Raises:
        TypeError: If ``path`` is not a string.
        ValueError: If ``path`` does not end in ``.npz``, ``labels`` is unknown, or, from ``noisy``, the file is not
            valid or belongs to other data.
        FileNotFoundError: From ``noisy``, if there is no such file.

    Example:
        >>> HumanNoise("cifar10n.npz", "aggre_label")
        HumanNoise(labels='aggre_label')
    """

    def __init__(self, path: str, labels: HumanLabels = "worse_label") -> None:
        if not isinstance(path, str):
            raise TypeError(f"expected a path as str in `path`, got {path!r}; give a string")
        if Path(path).suffix.lower() != ".npz":
            raise ValueError(f"expected a file ending in .npz in `path`, got {path!r}; convert it")
        if labels not in get_args(HumanLabels):
            raise ValueError(
                f"expected one of {', '.join(get_args(HumanLabels))} in `labels`, got {labels!r}; choose one of them"
            )
        self._path, self._labels = path, labels

    @property
    @override
    def init_args(self) -> dict[str, Any]:
        return {"path": self._path, "labels": self._labels}

    @override
    def noisy(self, labels: Tensor, *, num_classes: int, generator: np.random.Generator) -> Tensor:
        arrays = _read_arrays(self._path, ("clean_label", self._labels))
        if self._labels not in arrays:
            raise ValueError(
                f"expected an array {self._labels!r} in the file in `path`, got {self._path!r} without it; choose "
                "another one in `labels`, or another file"
            )
        for name, array in arrays.items():
            _check_labels(array, name, len(labels), num_classes)
        if "clean_label" in arrays and (differing := int((arrays["clean_label"] != labels.numpy()).sum())):
            raise ValueError(
                f"expected the labels of the data as 'clean_label' in the file in `path`, got {differing} of "
                f"{len(labels)} that differ; give the labels of the same images in the same order"
            )
        return torch.from_numpy(arrays[self._labels].astype(np.int64))

    @override
    def __repr__(self) -> str:
        return f"HumanNoise(labels={self._labels!r})"  # files may move to another folder


def check_noise(noise: object) -> LabelNoise | None:
    """What is given for label noise, as an object.

    Args:
        noise: A :class:`LabelNoise`, the rate of a :class:`SymmetricNoise`, ``None``, or what :func:`noise_settings`
            returned, which is what a checkpoint holds.

    Raises:
        TypeError: If it is anything else.
        ValueError: If a rate is outside of [0, 1], or there is no such class.

    Example:
        >>> check_noise(0.4)
        SymmetricNoise(rate=0.4)
    """
    if noise is None or isinstance(noise, LabelNoise):
        return noise
    if isinstance(noise, Mapping) and set(noise) == {"class_path", "init_args"}:
        known = {name: kind for kind in _subclasses(LabelNoise) for name in (_class_path(kind), kind.__name__)}
        kind = known.get(noise["class_path"]) or known.get(str(noise["class_path"]).rpartition(".")[2])
        if kind is None:  # only what is imported already: a checkpoint must not choose code to run
            valid = sorted(name for name in known if "." not in name)
            raise ValueError(f"expected one of {', '.join(valid)} in `noise`, got {noise['class_path']!r}; import it")
        return kind(**noise["init_args"])
    if isinstance(noise, bool) or not isinstance(noise, Real):
        raise TypeError(f"expected a LabelNoise, a rate or None in `noise`, got {noise!r}; give one of them")
    return SymmetricNoise(check_fraction(noise, arg="noise"))


def noise_settings(noise: LabelNoise | None) -> Any:
    """The builtins from which :func:`check_noise` makes an equal object.

    Example:
        >>> noise_settings(AsymmetricNoise(0.2))
        {'class_path': 'tenzoo.data.images.label_noise.AsymmetricNoise', 'init_args': {'rate': 0.2}}
    """
    return None if noise is None else {"class_path": _class_path(type(noise)), "init_args": noise.init_args}


def _class_path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _subclasses(kind: type[Any]) -> list[type[LabelNoise]]:
    own = [] if inspect.isabstract(kind) else [kind]
    return own + [below for child in kind.__subclasses__() for below in _subclasses(child)]


def _check_matrix(matrix: object) -> list[list[float]]:
    if isinstance(matrix, np.ndarray | Tensor):
        matrix = matrix.tolist()
    if isinstance(matrix, str) or not isinstance(matrix, Sequence):
        raise TypeError(f"expected rows of numbers in `matrix`, got {matrix!r}; give one row per class")
    for i, row in enumerate(matrix):
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise TypeError(f"expected rows of numbers in `matrix`, got {row!r} as row {i}; give one row per class")
        if len(row) != len(matrix):
            raise ValueError(
                f"expected a square matrix in `matrix`, got {len(matrix)} rows and {len(row)} numbers in row {i}; "
                "give a number for every pair of classes"
            )
        for value in row:
            check_fraction(value, arg="matrix")
        if abs(sum(row) - 1) > _ROW_SUM_TOLERANCE:
            raise ValueError(f"expected rows of sum 1 in `matrix`, got {sum(row):.6g} in row {i}; divide it by that")
    if len(matrix) < 2:
        raise ValueError(f"expected at least 2 rows in `matrix`, got {len(matrix)}; give one row per class")
    return [[float(value) for value in row] for row in matrix]


def _read_arrays(path: str, names: Sequence[str]) -> dict[str, Array]:
    """Those of the named arrays that the file has."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected an existing file of labels in `path`, got {path!r}; check the path")
    try:
        arrays = read_npz(Path(path))
    except TooLargeError as error:
        raise ValueError(f"expected a file of labels that fits into memory in `path`, got {error}") from None
    except Exception as error:  # zip and numpy raise half a dozen types on broken files, and none of them helps
        raise ValueError(
            f"expected a readable .npz file of integers in `path`, got {path!r} ({type(error).__name__}); check that "
            "it is complete and holds no Python objects"
        ) from error
    return {name: arrays[name] for name in names if name in arrays}


def _check_labels(array: Array, name: str, count: int, num_classes: int) -> None:
    if array.shape != (count,):
        given = f"{len(array)}" if array.ndim == 1 else f"an array of shape {array.shape}"
        raise ValueError(
            f"expected {count} labels as {name!r} in the file in `path`, one per training image, got {given}; give "
            "the labels of the whole training set"
        )
    if array.dtype.kind not in "iu":
        raise ValueError(f"expected integers as {name!r} in the file in `path`, got {array.dtype}; convert them")
    wrong = array[(array < 0) | (array >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"expected labels from 0 to {num_classes - 1} as {name!r} in the file in `path`, got {wrong[0]}; fix them"
        )
