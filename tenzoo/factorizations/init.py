"""Initialization of cores with an exact second moment of the tensor that they reconstruct."""

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor


def check_init_std(init_std: float) -> float:
    """``init_std`` as a float.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is not positive and finite.

    Example:
        >>> check_init_std(1)
        1.0
    """
    if isinstance(init_std, bool) or not isinstance(init_std, Real):
        raise TypeError(f"expected a float in `init_std`, got {init_std!r}")
    if not 0 < init_std < math.inf:
        raise ValueError(f"expected a positive, finite float in `init_std`, got {init_std!r}")
    return float(init_std)


def core_std(init_std: float, *, num_monomials: int, num_cores: int) -> float:
    r"""Standard deviation of the cores' entries that gives the tensor the second moment ``init_std²``.

    An entry of the tensor is a sum of N monomials, each a product of K entries, one from every core. Let these be
    independent, with mean 0 and variance σ². Two different monomials of the same entry differ in the entry of at least
    one core, which occurs once in their product, so the product has mean 0 and the monomials are uncorrelated. A
    monomial has the second moment σ^{2K}. Hence, exactly and for every distribution of the entries,

        E[T²] = N σ^{2K},    σ = (init_std² / N)^{1 / (2K)}.

    N is R for CP, r_1 ⋯ r_d for Tucker, the product of the interior ranks for a tensor train and of all ranks for a
    tensor ring.

    Args:
        init_std: Wanted root mean square of the tensor's entries.
        num_monomials: N.
        num_cores: K.

    Example:
        >>> std = core_std(0.5, num_monomials=7, num_cores=3)
        >>> abs(7 * std**6 - 0.5**2) < 1e-15
        True
    """
    # N may exceed every float: a chain of hundreds of cores has the product of all its ranks. Its logarithm does not.
    return math.exp((2 * math.log(init_std) - math.log(num_monomials)) / (2 * num_cores))


@torch.no_grad()
def init_cores_(cores: Iterable[Tensor], std: float) -> None:
    """Fill the cores with independent normal numbers of mean 0, in place.

    Example:
        >>> core = torch.zeros(1000)
        >>> init_cores_([core], 2.0)
        >>> bool(1.5 < core.std() < 2.5)
        True
    """
    for core in cores:
        if not core.is_meta:  # where torch would draw nothing, and load its compiler to do so
            core.normal_(0.0, std)
