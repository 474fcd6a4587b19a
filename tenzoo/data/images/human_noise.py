"""Wrong labels that people gave."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tenzoo.data.arrays import Array, TooLargeError, read_npz
from tenzoo.data.images.label_noise import LabelNoise

HumanLabels = Literal["aggre_label", "clean_label", "random_label1", "random_label2", "random_label3", "worse_label"]
"""The sets of labels of CIFAR-10N."""


class HumanNoise(LabelNoise):
    """Labels that people gave to the same images, such as CIFAR-10N (Wei et al., ICLR 2022, arXiv:2110.12088).

    The file is an ``.npz`` of integer arrays of shape ``(n,)`` in the order of the training set, named as in
    CIFAR-10N: ``clean_label``, ``aggre_label`` (majority of three people, 9 % wrong), ``random_label1`` to
    ``random_label3`` (one person each, 17 to 18 %), ``worse_label`` (a wrong one of the three if there is one, 40 %).
    An array ``clean_label`` must equal the labels of the data, which proves the order. Nothing is random.

    The authors publish ``CIFAR-10_human.pt`` (github.com/UCSC-REAL/cifar-10-100n, CC BY-NC 4.0: not for commercial
    use), a pickle. Loading a pickle can run code, so it is not read here. Convert it once, if you trust it:
    ``numpy.savez("cifar10n.npz", **torch.load("CIFAR-10_human.pt", weights_only=False))``.

    Args:
        path: Path of the ``.npz`` file.
        labels: The array to train on.

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
            raise TypeError(f"expected a path as str in `path`, got {path!r}")
        if Path(path).suffix.lower() != ".npz":
            raise ValueError(f"expected a file ending in .npz in `path`, got {path!r}")
        if labels not in get_args(HumanLabels):
            raise ValueError(f"expected one of {', '.join(get_args(HumanLabels))} in `labels`, got {labels!r}")
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
        return f"HumanNoise(labels={self._labels!r})"  # without the path: files may move to another folder


def _read_arrays(path: str, names: Sequence[str]) -> dict[str, Array]:
    """The named arrays that are in the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected an existing file of labels in `path`, got {path!r}")
    try:
        arrays = read_npz(Path(path))
    except TooLargeError as error:
        raise ValueError(f"expected a file of labels that fits into memory in `path`, got {error}") from None
    except Exception as error:  # zip and numpy raise half a dozen types on broken files
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
        raise ValueError(f"expected integers as {name!r} in the file in `path`, got {array.dtype}; save them as int64")
    wrong = array[(array < 0) | (array >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"expected labels from 0 to {num_classes - 1} as {name!r} in the file in `path`, got {wrong[0]}; count "
            "labels from 0"
        )
