"""Contraction of chains of cores ``(r_{k-1}, n_k, r_k)``: tensor trains, rings, and trains of a matrix.

A chain is open at ``r_0 = r_d = 1`` and a ring otherwise; an open chain is the ring with ``r_0 = 1``. A core may have
several modes between its ranks, ``(r_{k-1}, m_k, n_k, r_k)``, which are then treated as one.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tenzoo.factorizations.base import Factorization
from tenzoo.factorizations.gather import gather_slices

_ELEMENTWISE_SIZE = 200


class Chain(Factorization):
    """A chain of cores ``(r_{k-1}, n_k, r_k)``, open or closed to a ring.

    Abstract: a format draws the chain. It takes the ranks as they are given.
    """

    _split: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._split = best_split(self.shape, ends_of([core.shape for core in self.cores]))

    def reconstruct(self) -> Tensor:
        """The dense tensor: the chain is contracted from both of its ends, and the halves are multiplied."""
        return reconstruct_chain(self.operands, self._split).view(self.shape)

    @property
    def multiplications(self) -> int:
        """Number of multiplications in :meth:`reconstruct`."""
        return chain_multiplications(self.shape, ends_of([core.shape for core in self.cores]), self._split)

    def merged(self, *counts: int) -> list[Tensor]:
        """The cores of the same tensor with neighboring modes merged to one.

        Args:
            *counts: How many modes each new mode takes.

        Example:
            >>> from tenzoo.factorizations import TensorTrain
            >>> [tuple(core.shape) for core in TensorTrain((4, 5, 6), rank=[2, 3]).merged(2, 1)]
            [(1, 20, 3), (3, 6, 1)]
        """
        return merge_chain(self.operands, counts)

    def entries_at(self, columns: Sequence[Tensor], *, sparse_grad: bool = False) -> Tensor:
        """Entries at one index column per mode, by products of matrices."""
        pairs = zip(self.operands, columns, strict=True)
        return chain_entries([gather_slices(core, [column], sparse_grad=sparse_grad) for core, column in pairs])

    @classmethod
    def admitted_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks as they are given."""
        return rank


def ends_of(core_shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """All ranks ``(r_0, …, r_d)`` of a chain of cores.

    Example:
        >>> ends_of([(1, 4, 2), (2, 5, 3), (3, 6, 1)])
        (1, 2, 3, 1)
    """
    return (*(shape[0] for shape in core_shapes), core_shapes[-1][-1])


def split_at(items: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    """Consecutive parts of the given lengths, which cover all items.

    Example:
        >>> import torch
        >>> [len(part) for part in split_at(torch.zeros(3, 1).unbind(), (1, 2))]
        [1, 2]
    """
    ends = list(itertools.accumulate(counts))
    assert ends[-1] == len(items)
    return [items[end - count : end] for end, count in zip(ends, counts, strict=True)]


def best_split(modes: Sequence[int], ranks: Sequence[int]) -> int:
    """Where to cut a chain in two so that reconstructing the tensor takes the fewest multiplications.

    The left part is contracted from its left end, the right part from its right end, and the two are multiplied.

    Args:
        modes: Sizes n_1, …, n_d.
        ranks: Ranks r_0, …, r_d.

    Returns:
        Number of cores in the left part, from 1 to d - 1; 0 for a single core.

    Example:
        >>> best_split([10, 10, 10, 10], [1, 5, 2, 5, 1])
        2
    """
    return min(range(1, len(modes)), key=lambda split: chain_multiplications(modes, ranks, split), default=0)


def chain_multiplications(modes: Sequence[int], ranks: Sequence[int], split: int) -> int:
    """Number of multiplications in :func:`reconstruct_chain`; arguments as in :func:`best_split`.

    Example:
        >>> chain_multiplications([10, 10, 10], [1, 5, 2, 1], split=1)  # 10 × 5 × 2 × 10, then 10 × 5 × 100
        6000
    """
    order = len(modes)
    total = math.prod(modes) * ranks[0] * ranks[split] if split else 0
    for k in range(1, split):
        total += ranks[0] * math.prod(modes[: k + 1]) * ranks[k] * ranks[k + 1]
    for k in range(split, order - 1):
        total += math.prod(modes[k:]) * ranks[k] * ranks[k + 1] * ranks[order]
    return total


def reconstruct_chain(cores: Sequence[Tensor], split: int) -> Tensor:
    """The tensor of a chain, by one matrix product per core.

    Args:
        cores: Cores ``(r_{k-1}, …, r_k)`` with ``r_d = r_0``.
        split: From :func:`best_split`.

    Returns:
        Matrix ``(n_1 ⋯ n_s, n_{s+1} ⋯ n_d)``; a single, open core comes back as ``(1, n_1)``.

    Example:
        >>> import torch
        >>> a, b = torch.randn(1, 4, 2), torch.randn(2, 3, 1)
        >>> torch.equal(reconstruct_chain([a, b], 1), a[0] @ b[:, :, 0])
        True
    """
    ring_rank = cores[0].shape[0]
    right = _merge_right(cores[split:])
    if split == 0:
        return right.reshape(1, -1)
    left = _merge_left(cores[:split])
    if ring_rank == 1:
        return left.reshape(-1, left.shape[2]) @ right.reshape(right.shape[0], -1)
    # T[i, j] = Σ_{a, b} left[a, i, b] right[b, j, a]
    inner = ring_rank * left.shape[2]
    return left.transpose(0, 1).reshape(-1, inner) @ right.permute(2, 0, 1).reshape(inner, -1)


def chain_entries(slices: Sequence[Tensor]) -> Tensor:
    """Traces of products of slices, ``tr(A_1[i] ⋯ A_d[i])``.

    Args:
        slices: One tensor ``(n, r_{k-1}, r_k)`` per core, with ``r_d = r_0``.

    Returns:
        Values ``(n,)``. No intermediate result is larger than ``n r_0 r_k``.

    Example:
        >>> import torch
        >>> a, b = torch.randn(7, 2, 3), torch.randn(7, 3, 2)
        >>> torch.allclose(chain_entries([a, b]), torch.stack([torch.trace(m) for m in a @ b]), atol=1e-5)
        True
    """
    product = slices[0]
    if len(slices) == 1:
        return product.diagonal(dim1=1, dim2=2).sum(-1)
    for matrices in slices[1:-1]:
        product = multiply_batch(product, matrices)
    return (product * slices[-1].transpose(1, 2)).sum((1, 2))


def multiply_batch(left: Tensor, right: Tensor) -> Tensor:
    """Products of small matrices, ``(n, a, r)`` times ``(n, r, b)``.

    On a CPU, multiplying and summing elementwise takes a half to a third of the time of a batched matrix product where
    a is 1 and r and b are small, backward pass included. Elsewhere it is done wherever one of the sizes is 1: the
    batched product, or that of a gradient, is then one of columns with rows, for which torch on CUDA would compile a
    Triton kernel; that takes a C compiler, and seconds at the first call.

    Example:
        >>> import torch
        >>> left, right = torch.randn(7, 1, 2), torch.randn(7, 2, 3)
        >>> torch.allclose(multiply_batch(left, right), left @ right, atol=1e-5)
        True
    """
    (rows, inner), columns = left.shape[1:], right.shape[2]
    host = left.is_cpu or left.is_meta  # costs are counted on the meta device, and calibrated on a CPU
    if host and (rows > 1 or inner * columns > _ELEMENTWISE_SIZE):
        return left.bmm(right)
    if rows == 1:
        return (left.transpose(1, 2) * right).sum(1, keepdim=True)
    if columns == 1:
        return (left * right.transpose(1, 2)).sum(2, keepdim=True)
    return left * right if inner == 1 else left.bmm(right)


def merge_chain(cores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Cores ``(r, ∏ n_k, r')`` of the same chain with neighboring modes merged.

    Args:
        cores: Cores ``(r_{k-1}, …, r_k)``.
        counts: How many cores each new core takes.

    Example:
        >>> import torch
        >>> chain = [torch.randn(1, 4, 2), torch.randn(2, 3, 5), torch.randn(5, 2, 1)]
        >>> [core.shape for core in merge_chain(chain, (2, 1))]
        [torch.Size([1, 12, 5]), torch.Size([5, 2, 1])]
    """
    return [_merge_left(part) for part in split_at(cores, counts)]


def usable_chain_rank(modes: Sequence[int], rank: Sequence[int], *, left: int = 1, right: int = 1) -> tuple[int, ...]:
    """Interior ranks of a chain, clipped from the left to what successive decompositions can use.

    ``r_k`` is at most the number of rows, ``r_{k-1} n_k``, and of columns, ``n_{k+1} ⋯ n_d r_d``, of the k-th matrix.

    Args:
        modes: Sizes n_1, …, n_d.
        rank: Ranks r_1, …, r_{d-1}.
        left: r_0.
        right: r_d.

    Example:
        >>> usable_chain_rank([2, 3, 4], [9, 9])
        (2, 4)
    """
    ranks: list[int] = []
    for k, r in enumerate(rank):
        left = min(r, left * modes[k], math.prod(modes[k + 1 :]) * right)
        ranks.append(left)
    return tuple(ranks)


def _merge_left(cores: Sequence[Tensor]) -> Tensor:
    """Contract to ``(r_first, n ⋯ n, r_last)``, keeping everything to the left in the rows."""
    merged = cores[0]
    for core in cores[1:]:
        rank = core.shape[0]
        merged = merged.reshape(-1, rank) @ core.reshape(rank, -1)
    return merged.reshape(cores[0].shape[0], -1, cores[-1].shape[-1])


def _merge_right(cores: Sequence[Tensor]) -> Tensor:
    """Contract to ``(r_first, n ⋯ n, r_last)``, keeping everything to the right in the columns."""
    merged = cores[-1]
    for core in reversed(cores[:-1]):
        rank = core.shape[-1]
        merged = core.reshape(-1, rank) @ merged.reshape(rank, -1)
    return merged.reshape(cores[0].shape[0], -1, cores[-1].shape[-1])
