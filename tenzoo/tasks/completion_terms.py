"""What a completion has beside its squared residuals: a range of values, and a penalty on roughness."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tenzoo.models import TensorCompletion


def check_clip(clip: Any) -> Literal["data"] | tuple[float, float] | None:
    """The range that predictions are kept in.

    Raises:
        TypeError: If it is neither ``"data"`` nor a pair of numbers.
        ValueError: If the first number is not below the second.

    Example:
        >>> check_clip([1, 5])
        (1.0, 5.0)
    """
    if clip is None or clip == "data":
        return None if clip is None else "data"
    if not isinstance(clip, Sequence) or isinstance(clip, str) or len(clip) != 2 or not all(map(_is_number, clip)):
        raise TypeError(f"expected 'data' or two numbers in `clip`, got {clip!r}")
    low, high = map(float, clip)
    if not low < high:
        raise ValueError(f"expected the smaller number first in `clip`, got {[low, high]}")
    return low, high


def check_decays(cores: Any, biases: Any, *, with_biases: bool) -> dict[str, float | None]:
    """The weight decays of ``"cores"`` and ``"biases"``.

    Raises:
        TypeError: If one is not a number.
        ValueError: If one is negative or not finite, or there are no biases to have one.

    Example:
        >>> check_decays(None, 6, with_biases=True)
        {'cores': None, 'biases': 6.0}
    """
    for name, decay in (("core_weight_decay", cores), ("bias_weight_decay", biases)):
        if decay is not None and not _is_number(decay):
            raise TypeError(f"expected a number in `{name}`, got {decay!r}")
        if decay is not None and not 0 <= decay < math.inf:
            raise ValueError(f"expected a number from 0 on in `{name}`, got {decay}")
    if biases is not None and not with_biases:
        raise ValueError(f"expected `biases` with `bias_weight_decay`, got {biases} without; set biases to true")
    return {name: None if decay is None else float(decay) for name, decay in (("cores", cores), ("biases", biases))}


def check_smoothness(smoothness: Any) -> tuple[float, ...] | None:
    """The weights of the modes; None if none is above 0.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If one is negative or not finite.

    Example:
        >>> check_smoothness([0, 0.1]), check_smoothness([0, 0])
        ((0.0, 0.1), None)
    """
    if smoothness is None:
        return None
    if not isinstance(smoothness, Sequence) or isinstance(smoothness, str) or not all(map(_is_number, smoothness)):
        raise TypeError(f"expected a number for each mode in `smoothness`, got {smoothness!r}")
    weights = tuple(map(float, smoothness))
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"expected numbers from 0 on in `smoothness`, got {[*weights]}")
    return weights if any(weights) else None


def check_smooth_modes(smoothness: Sequence[float], shape: Sequence[int]) -> None:
    """Refuse weights that do not fit the modes of a tensor.

    Raises:
        ValueError: If there are more or fewer, or a mode is too short to have a second difference.

    Example:
        >>> check_smooth_modes([0.1, 0.0], (3, 2))
    """
    if len(smoothness) != len(shape):
        raise ValueError(f"expected a number for each of {len(shape)} modes in `smoothness`, got {[*smoothness]}")
    for mode, (weight, size) in enumerate(zip(smoothness, shape, strict=True)):
        if weight and size < 3:
            raise ValueError(f"expected 0 for mode {mode} of size {size} in `smoothness`, got {weight}; it takes 3")


def roughness(model: TensorCompletion, index: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum of the mean squared second differences along the modes, in standardized units.

    ``Σ_k w_k mean_i (x[i − e_k] − 2 x[i] + x[i + e_k])²`` over cells i, moved inward by one at the ends of the mode. It
    is a function of the tensor alone, and so does not depend on how cores share their norms.

    Args:
        model: A completion.
        index: Cells, shape ``(N, order)``.
        weights: One for each mode.

    Example:
        >>> model = TensorCompletion((5, 2), "cp", 1)
        >>> with torch.no_grad():
        ...     _ = model.tensor.cores[0].copy_(torch.arange(5.0)[:, None]), model.tensor.cores[1].fill_(1)
        >>> roughness(model, torch.tensor([[0, 0], [2, 1]]), [1.0, 0.0]).item()  # a straight line
        0.0
    """
    cells = []
    modes = [mode for mode, weight in enumerate(weights) if weight]
    for mode in modes:
        center = index.clone()
        center[:, mode].clamp_(1, model.shape[mode] - 2)
        for step in (-1, 0, 1):
            moved = center.clone()
            moved[:, mode] += step
            cells.append(moved)
    values = (model(torch.cat(cells)) - model.location) / model.scale
    before, at, after = values.view(len(modes), 3, len(index)).unbind(1)
    means = (before - 2 * at + after).square().mean(1)
    total: Tensor = (means * means.new_tensor([weights[mode] for mode in modes])).sum()
    return total


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
