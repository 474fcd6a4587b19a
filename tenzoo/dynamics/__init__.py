"""The mathematics of core norms under training: pure functions of tensors, with neither modules nor Lightning."""

from tenzoo.dynamics.foreach import by_device_and_dtype
from tenzoo.dynamics.norms import (
    effective_rho,
    exact_sam_deviation_rate,
    norm_deviation,
    norm_gradient_covariance,
    sam_deviation_rate,
    squared_norms,
)
from tenzoo.dynamics.scaling import bound_factors, deviation_aware_factors, rebalance_
from tenzoo.dynamics.shards import is_distributed, of_parts, own_part
from tenzoo.dynamics.sharpness import SharpnessState, SharpnessWindow, sharpness_perturbation

__all__ = [
    "SharpnessState",
    "SharpnessWindow",
    "bound_factors",
    "by_device_and_dtype",
    "deviation_aware_factors",
    "effective_rho",
    "exact_sam_deviation_rate",
    "is_distributed",
    "norm_deviation",
    "norm_gradient_covariance",
    "of_parts",
    "own_part",
    "rebalance_",
    "sam_deviation_rate",
    "sharpness_perturbation",
    "squared_norms",
]
