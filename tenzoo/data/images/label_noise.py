"""Wrong labels on purpose, drawn from transition matrices."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tenzoo.data.arrays import Array
from tenzoo.data.checks import check_fraction

_CONFUSED = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
_ROW_SUM_TOLERANCE = 1e-6


class LabelNoise(ABC):
    """Changes some labels of a training set.

    A subclass returns its arguments, of builtin types, from :attr:`init_args`: checkpoints store them.
    """

    @property
    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """The arguments of the constructor that make an equal object, of builtin types only."""

    @abstractmethod
    def noisy(self, labels: Tensor, *, num_classes: int, generator: np.random.Generator) -> Tensor:
        """The labels with noise.

        Args:
            labels: The correct labels of the whole training set in its order, shape ``(n,)``, int64.
            num_classes: Number of classes.
            generator: The source of random numbers.

        Returns:
            Shape ``(n,)``, int64, a new tensor.

        Raises:
            ValueError: If the noise does not fit the labels.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.init_args.items())})"


class TransitionNoise(LabelNoise):
    """Noise that depends on the class alone: each label i becomes j with probability ``T[i, j]``, independently."""

    @abstractmethod
    def transition(self, num_classes: int) -> Array:
        """The matrix T, shape ``(num_classes, num_classes)``, float64, rows of sum 1.

        Raises:
            ValueError: If there is no such matrix for this number of classes.
        """

    @override
    def noisy(self, labels: Tensor, *, num_classes: int, generator: np.random.Generator) -> Tensor:
        cumulative = self.transition(num_classes).cumsum(axis=1)
        cumulative /= cumulative[:, -1:]  # exactly 1 at the end, so that no draw exceeds it
        drawn = generator.random(len(labels))
        return torch.from_numpy((drawn[:, None] >= cumulative[labels.numpy()]).sum(axis=1, dtype=np.int64))


class SymmetricNoise(TransitionNoise):
    """With probability ``rate`` a label becomes one of the *other* classes, each equally likely.

    So ``rate`` is the expected fraction of wrong labels. Some publications draw the new label from all C classes, the
    correct one included; their rate times ``1 - 1/C`` is the rate here.

    Args:
        rate: Probability in [0, 1] that a label is wrong.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is outside [0, 1].

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
    """With probability ``rate`` a label of CIFAR-10 becomes that of a similar class.

    Truck → automobile, bird → airplane, deer → horse, cat ↔ dog, as in Patrini et al. (2017, arXiv:1609.03683). The
    other five classes keep their labels, so the expected fraction of wrong labels is ``rate / 2``.

    Args:
        rate: Probability in [0, 1] that a label of one of the five classes is wrong.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is outside [0, 1].

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
    """Noise with a given transition matrix.

    Args:
        matrix: ``matrix[i][j]`` is the probability that a label i becomes j: one row per class, numbers in [0, 1],
            rows of sum 1.

    Raises:
        TypeError: If it is not rows of numbers.
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


def check_noise(noise: object) -> LabelNoise | None:
    """The argument ``noise`` of a data module as an object.

    Args:
        noise: A :class:`LabelNoise`, the rate of a :class:`SymmetricNoise`, ``None``, or a result of
            :func:`noise_settings`, as checkpoints hold it.

    Raises:
        TypeError: If it is anything else.
        ValueError: If a rate is outside [0, 1], or there is no such class.

    Example:
        >>> check_noise(0.4)
        SymmetricNoise(rate=0.4)
    """
    if noise is None or isinstance(noise, LabelNoise):
        return noise
    if isinstance(noise, Mapping) and set(noise) == {"class_path", "init_args"}:
        known = {name: kind for kind in _subclasses(LabelNoise) for name in (_class_path(kind), kind.__name__)}
        kind = known.get(noise["class_path"]) or known.get(str(noise["class_path"]).rpartition(".")[2])
        if kind is None:  # only classes that are imported: a checkpoint must not choose code to run
            valid = sorted(name for name in known if "." not in name)
            raise ValueError(
                f"expected one of {', '.join(valid)} in `noise`, got {noise['class_path']!r}; import the class first"
            )
        return kind(**noise["init_args"])
    if isinstance(noise, bool) or not isinstance(noise, Real):
        raise TypeError(f"expected a LabelNoise, a rate or None in `noise`, got {noise!r}")
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
