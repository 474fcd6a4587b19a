"""The interface of every format: a tensor that is rebuilt from small cores."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from tenzoo.cores import CoreGroup, CoreProvider
from tenzoo.factorizations.decomposition import (
    check_finite,
    check_memory,
    check_metric,
    full_precision,
    multiply_modes,
    scaled_to_safety,
    tensorly_on_torch,
)
from tenzoo.factorizations.gather import first_outside
from tenzoo.factorizations.init import check_init_std, core_std, init_cores_
from tenzoo.factorizations.rank import Rank, check_shape, resolve_rank

_PLACES = tuple(map(str, range(64)))


class _Cores(nn.ParameterList):
    """Torch's list, which looks up each of its parameters by a name that it writes; every step asks for all of them.

    A core that is pruned or normalized in a hook of the forward pass is computed anew: a list has no forward pass.
    """

    @override
    def __iter__(self) -> Iterator[nn.Parameter]:
        own = self._parameters
        # One that was taken out and put back, as by pruning, is the last of the parameters; a parametrized one is none.
        if tuple(own) == _PLACES[: len(self)]:
            return iter(own.values())  # type: ignore[arg-type]
        for hook in self._forward_pre_hooks.values():
            hook(self, ())
        return super().__iter__()


class Factorization(nn.Module, CoreProvider):
    """A tensor ``T = Φ(G_1, …, G_K)`` that is multilinear in its cores, the parameters of the module.

    Abstract: a format says how its cores are shaped and contracted, and is final.

    Args:
        shape: Sizes of the d modes of the tensor, d ≥ 2.
        rank: An int is the rank everywhere; a list holds the ranks of the format one by one; a float in (0, 1] is the
            fraction of the dense tensor's parameters within which the largest uniform rank is taken. ``1`` is rank
            one, ``1.0`` is as many parameters as the dense tensor has.
        init_std: Root mean square of the rebuilt tensor's entries at initialization, exact in expectation.
        device: Where the cores are made.
        dtype: Floating-point type of the cores.

    Attributes:
        shape: Shape of the tensor.
        rank: Ranks, always a tuple.
        cores: The K cores, in order.
        init_std: As given.

    Raises:
        TypeError: If ``shape`` or ``rank`` is of the wrong type, or ``dtype`` is not a floating-point type.
        ValueError: If a size, a rank or ``init_std`` is out of range, or a list of ranks has the wrong length.

    Example:
        >>> from tenzoo.factorizations import TensorTrain
        >>> weight = TensorTrain((4, 5, 6), rank=[2, 3])
        >>> weight.reconstruct().shape, [tuple(core.shape) for core in weight.cores]
        (torch.Size([4, 5, 6]), [(1, 4, 2), (2, 5, 3), (3, 6, 1)])
    """

    name: ClassVar[str]
    """Short name of the format, as written in a configuration."""

    _even_order: ClassVar[bool] = False

    def __init__(
        self,
        shape: Sequence[int],
        rank: Rank,
        *,
        init_std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"expected a floating-point type in `dtype`, got {dtype}")
        self.shape = check_shape(shape, even=self._even_order)
        self.rank = self._resolve(self.shape, rank)
        self.init_std = check_init_std(init_std)
        self.cores = _Cores(
            torch.empty(core_shape, device=device, dtype=dtype)
            for core_shape in self._core_shapes(self.shape, self.rank)
        )
        self._plan()
        self.reset_parameters()

    @classmethod
    def num_parameters(cls, shape: Sequence[int], rank: Rank) -> int:
        """Number of parameters that an instance of this shape and rank has, without making one.

        Raises:
            TypeError: As the constructor does.
            ValueError: As the constructor does.

        Example:
            >>> from tenzoo.factorizations import CP
            >>> CP.num_parameters((4, 5, 6), 2), CP.num_parameters((4, 5, 6), 0.5)
            (30, 60)
        """
        shape = check_shape(shape, even=cls._even_order)
        return cls._count(shape, cls._resolve(shape, rank))

    @classmethod
    def decompose(cls, tensor: Tensor, rank: Rank, *, metric: Mapping[int, Tensor] | None = None) -> Self:
        """A factorization that approximates a given tensor, by TensorLy's algorithm for the format.

        With a metric the error is made small in ``‖(T - T̂) ×_k S_k‖``, S_k being the matrices of the modes k: the
        tensor is multiplied by them, decomposed, and the cores are multiplied by their inverses, which changes no rank.

        The cores are balanced: of all that make the same tensor these have the least norms, which are the same for all
        of them (see :mod:`tenzoo.factorizations.balance`).

        At ranks with at most half of its parameters, the weight of a layer takes up to 9 times its own memory beside
        it, by alternating least squares (CP, and rings with ``r_0 > 1``) up to 25 times. From 512 rows and columns on,
        and at a rank of at most a quarter of them, matrices go through a randomized decomposition, which takes less.

        Deterministic. Ranks are clipped to what the shape can use, at which the decomposition is exact up to rounding.
        Half-precision tensors are decomposed in float32, also under autocast. TensorLy's backend stays as the user has
        set it.

        Args:
            tensor: Floating-point tensor on any device; it is detached.
            rank: As in the constructor.
            metric: From modes, counted from 0, to invertible matrices ``(n_k, n_k)``.

        Returns:
            An instance with the tensor's dtype and device.

        Raises:
            TypeError: If ``tensor`` is not a dense floating-point tensor.
            ValueError: If it holds NaN or infinity, ``rank`` does not fit the format, a matrix not its mode, or a core
                overflows the dtype.
            MemoryError: If the decomposition would take more than 8 GiB beside the tensor.

        Example:
            >>> from tenzoo.factorizations import TensorTrain
            >>> tensor = torch.randn(3, 4, 5, dtype=torch.float64)
            >>> weight = TensorTrain.decompose(tensor, rank=100)
            >>> weight.rank, torch.allclose(weight.reconstruct(), tensor)
            ((3, 5), True)
        """
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = f"{tensor.layout} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"expected a dense floating-point torch.Tensor in `tensor`, got {kind}")
        shape = check_shape(tuple(tensor.shape), even=cls._even_order)
        ranks = cls._usable_rank(shape, cls._resolve(shape, rank))
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        check_memory(cls._decomposition_size(shape, ranks) * dtype.itemsize)
        check_finite(tensor)
        metric = metric or {}
        check_metric(metric, shape)
        with torch.no_grad(), full_precision(), tensorly_on_torch():
            metric = {mode: scaled_to_safety(matrix.double())[0] for mode, matrix in metric.items()}
            unit, exponent = scaled_to_safety(tensor.detach().to(dtype))
            multiplied, more = scaled_to_safety(multiply_modes(unit, metric))
            cores = list(cls._decompose(multiplied, ranks))
            for mode, matrix in metric.items():
                number, axis = cls._core_of_mode(mode, len(shape))
                cores[number] = multiply_modes(cores[number], {axis: torch.linalg.inv(matrix)})
            cores = cls._balanced(cores)
            if exponent + more:  # the cores are balanced, and each takes its part of the scale
                part = 2.0 ** ((exponent + more) / len(cores))
                cores = [core.double() * part for core in cores]
        # On the meta device nothing is drawn: a decomposition leaves the global random state alone.
        factorization = cls(shape, ranks, device="meta", dtype=tensor.dtype).to_empty(device=tensor.device)
        with torch.no_grad():
            for parameter, core in zip(factorization.cores, cores, strict=True):
                parameter.copy_(core)
        if not all(bool(torch.isfinite(core).all()) for core in factorization.cores):
            raise ValueError(
                f"expected a tensor in `tensor` whose cores are finite in {tensor.dtype}, got an overflow; "
                "decompose it in a wider dtype"
            )
        return factorization

    def reset_parameters(self) -> None:
        """Draw the cores anew: independent normal entries with which ``E[T²] = init_std²`` in every entry."""
        num_monomials = self._num_monomials(self.rank)
        init_cores_(self.cores, core_std(self.init_std, num_monomials=num_monomials, num_cores=len(self.cores)))

    @property
    def elements_per_entry(self) -> int:
        """Number of core elements that one entry of the tensor is computed from: what :meth:`entries` gathers.

        Example:
            >>> from tenzoo.factorizations import TensorTrain
            >>> TensorTrain((40, 50, 60), rank=[2, 3]).elements_per_entry  # 1 × 2, 2 × 3 and 3 × 1
            11
        """
        return self._count((1,) * len(self.shape), self.rank)

    @property
    @abstractmethod
    def multiplications(self) -> int:
        """Number of multiplications in :meth:`reconstruct`.

        Example:
            >>> from tenzoo.factorizations import TensorTrain
            >>> TensorTrain((40, 50), rank=3).multiplications
            6000
        """

    def core_groups(self) -> list[CoreGroup]:
        """One group with all cores, under an empty name."""
        return [CoreGroup("", tuple(self.cores))]

    def forward(self) -> Tensor:
        """The tensor, as :meth:`reconstruct` gives it."""
        return self.reconstruct()

    @abstractmethod
    def reconstruct(self) -> Tensor:
        """The dense tensor, of exactly ``shape``, by a few matrix products."""

    def entries(self, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
        """Entries of the tensor, without building it.

        Args:
            index: Integers ``(n, d)``, one entry per row, counted from 0. On the CPU the range is checked, at no cost
                to an index within it; an accelerator is not waited for, and reports an error of its own, later.
            sparse_grad: Whether the gradients of all cores are coalesced COO tensors that hold the touched rows only,
                for an optimizer that takes them (``SGD``, ``SparseAdam``). A backward pass then costs a time that does
                not depend on the sizes of the modes.

        Returns:
            Values ``(n,)``. Memory grows with n times a product of ranks, never with the sizes of the modes.

        Raises:
            TypeError: If ``index`` is not a tensor of type int64 or int32.
            ValueError: If its shape is not ``(n, d)``.
            IndexError: If an index on the CPU is out of range.

        Example:
            >>> from tenzoo.factorizations import CP
            >>> CP((10**6, 10**6), rank=2).entries(torch.tensor([[0, 999_999]])).shape
            torch.Size([1])
        """
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"expected a torch.Tensor of type int64 or int32 in `index`, got {kind}")
        if index.ndim != 2 or index.shape[1] != len(self.shape):
            raise ValueError(f"expected shape (n, {len(self.shape)}) in `index`, got {tuple(index.shape)}")
        columns = index.t().contiguous().unbind(0)
        try:
            return self._entries(columns, sparse_grad=sparse_grad)
        except (IndexError, RuntimeError) as error:  # torch has checked the range, but names neither mode nor value
            if index.is_cpu and (outside := first_outside(columns, self.shape)):
                raise IndexError(outside) from error
            raise

    def extra_repr(self) -> str:
        """Shape, ranks and size, for ``print``."""
        count, dense = self._count(self.shape, self.rank), math.prod(self.shape)
        return f"shape={self.shape}, rank={self.rank}, init_std={self.init_std:g}, parameters={count} of {dense}"

    @classmethod
    def _resolve(cls, shape: tuple[int, ...], rank: Rank, num_dense: int | None = None) -> tuple[int, ...]:
        resolved = resolve_rank(
            rank,
            num_ranks=cls._num_ranks(len(shape)),
            num_dense=num_dense or math.prod(shape),
            num_parameters=lambda ranks: cls._count(shape, cls._admitted_rank(shape, ranks)),
        )
        return cls._admitted_rank(shape, resolved)

    @classmethod
    def _count(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        return sum(math.prod(core_shape) for core_shape in cls._core_shapes(shape, rank))

    @staticmethod
    @abstractmethod
    def _num_ranks(order: int) -> int:
        """How many ranks a tensor of this order has."""

    @staticmethod
    @abstractmethod
    def _admitted_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks the constructor takes for the given ones; a format need not clip."""

    @staticmethod
    @abstractmethod
    def _usable_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks, clipped to what a decomposition of this shape can use."""

    @staticmethod
    @abstractmethod
    def _core_of_mode(mode: int, order: int) -> tuple[int, int]:
        """Which core has a mode of the tensor of this order, and as which of its own."""

    @staticmethod
    @abstractmethod
    def _core_shapes(shape: tuple[int, ...], rank: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of the K cores."""

    @staticmethod
    @abstractmethod
    def _num_monomials(rank: tuple[int, ...]) -> int:
        """How many products of core entries sum up to one entry of the tensor."""

    @abstractmethod
    def _plan(self) -> None:
        """Decide the order of the contraction, once, at construction."""

    @abstractmethod
    def _entries(self, columns: Sequence[Tensor], *, sparse_grad: bool) -> Tensor:
        """Entries at one index column ``(n,)`` per mode."""

    @staticmethod
    @abstractmethod
    def _decompose(tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        """Cores of a decomposition with exactly these, usable ranks; TensorLy computes on torch's tensors here."""

    @staticmethod
    @abstractmethod
    def _balanced(cores: Sequence[Tensor]) -> list[Tensor]:
        """The cores of the same tensor that have the least norms."""

    @staticmethod
    @abstractmethod
    def _decomposition_size(shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        """Estimate of the numbers that :meth:`_decompose` holds at its peak, beside the tensor."""
