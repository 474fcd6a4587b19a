"""The interface of every format: a tensor that is reconstructed from small cores."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from tenzoo.cores import CoreGroup, CoreProvider
from tenzoo.dynamics import is_distributed
from tenzoo.factorizations.als import QUICK_SWEEPS
from tenzoo.factorizations.balance import balanced
from tenzoo.factorizations.decomposition import (
    check_finite,
    check_memory,
    check_metric,
    full_precision,
    multiply_modes,
    scaled_to_safety,
    tensorly_on_torch,
)
from tenzoo.factorizations.errors import Errors, errors_of_tree, fitted_errors, interpolated
from tenzoo.factorizations.fitting import fit_network, fit_tree, network_fit_size, tree_fit_size
from tenzoo.factorizations.gather import first_outside, gather_modes, whole_with_sparse_grad
from tenzoo.factorizations.init import check_init_std, init_cores_
from tenzoo.factorizations.masks import masked, masked_dims
from tenzoo.factorizations.network import Holder, Leg, Legs, Network, OrderError, Schedule, schedule
from tenzoo.factorizations.rank import Rank, check_shape, resolve_rank

FACTORIZATIONS: dict[str, type["Factorization"]] = {}
"""All formats by name. A subclass of :class:`Factorization` with a name is entered where it is defined."""

_ENTRY, _MANY = "#", 1024
"""The leg of entries, and the number of them at which the order of the contraction of entries is decided."""

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

    Abstract. A format is a final subclass with a ``name`` and the method :meth:`legs`, which draws the network of its
    cores; it is registered under its name by being defined. All else follows from the legs, and a format overrides
    what it does faster or better by hand.

    Args:
        shape: Sizes of the d modes of the tensor, d ≥ 2.
        rank: An int is the rank everywhere; a list holds the ranks of the format one by one; a float in (0, 1] is the
            fraction of the dense tensor's parameters within which the largest uniform rank is taken. ``1`` is rank
            one, ``1.0`` is as many parameters as the dense tensor has.
        init_std: Root mean square of the tensor's entries at initialization, exact in expectation.
        device: Where the cores are made.
        dtype: Floating-point type of the cores.

    Attributes:
        shape: Shape of the tensor.
        rank: Ranks, always a tuple.
        cores: The K cores, in order.
        init_std: As given.
        dropout: Probability with which an index of a bond is dropped in training mode; 0 unless
            :func:`~tenzoo.factorizations.tensor_dropout_` sets it.

    Raises:
        TypeError: If ``shape`` or ``rank`` is of the wrong type, or ``dtype`` is not a floating-point type.
        ValueError: If a size, a rank or ``init_std`` is out of range, a list of ranks has the wrong length, or the
            format has no tensors of this order.

    Example:
        >>> from tenzoo.factorizations import TensorTrain
        >>> weight = TensorTrain((4, 5, 6), rank=[2, 3])
        >>> weight.reconstruct().shape, [tuple(core.shape) for core in weight.cores]
        (torch.Size([4, 5, 6]), [(1, 4, 2), (2, 5, 3), (3, 6, 1)])
    """

    name: ClassVar[str]
    """Short name of the format, as written in a configuration."""

    dropout: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        if not isinstance(cls.name, str) or not cls.name or cls.name == "auto" or set(cls.name) & set(",.>"):
            raise ValueError(
                f"expected a name without commas, dots and arrows, and not 'auto', in `name` of {cls.__name__}, got "
                f"{cls.name!r}"
            )
        other = FACTORIZATIONS.setdefault(cls.name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"expected a new name in `name` of {cls.__name__}, got {cls.name!r}, which is taken")
        FACTORIZATIONS[cls.name] = cls  # of a class that is defined anew, as in a notebook, the last one

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
        self.shape = check_shape(shape)
        self.rank = self.resolve_rank(self.shape, rank)
        self.init_std = check_init_std(init_std)
        core_shapes = self.network(len(self.shape)).core_shapes(self.shape, self.rank)
        self.cores = _Cores(torch.empty(core_shape, device=device, dtype=dtype) for core_shape in core_shapes)
        _ = self.legs_of_cores, self._masked_dims  # now, since a compiler could not follow the search for them
        self.schedules: dict[str, Schedule] = {}
        """Orders of contraction by the names of what is computed. They are found once, since no compiler follows it."""
        if type(self).reconstruct is Factorization.reconstruct:
            self.schedule("reconstruct", self.legs_of_cores, tuple(range(len(self.shape))))
        if type(self).entries_at is Factorization.entries_at:
            gathered = tuple(_gathered(legs) for legs in self.legs_of_cores)
            self.schedule("entries", gathered, (_ENTRY,), **{_ENTRY: _MANY})
        self.reset_parameters()

    # --- the network -----------------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def legs(order: int) -> Sequence[tuple[Leg, ...]]:
        """The legs of each core: an int for a mode of the tensor, a string for a bond.

        Args:
            order: Number of modes of the tensor.

        Raises:
            OrderError: If the format has no tensors of this order.
        """

    @classmethod
    def bond_sizes(cls, rank: tuple[int, ...], order: int) -> Mapping[str, int]:
        """The size of each bond: 1, or one of the ranks.

        By default there is one rank for each bond, in order of first appearance.

        Args:
            rank: Ranks of the format.
            order: Number of modes of the tensor.

        Raises:
            ValueError: If there are too few or too many ranks.
        """
        bonds = dict.fromkeys(leg for core in cls.legs(order) for leg in core if isinstance(leg, str))
        return dict(zip(bonds, rank, strict=True))

    @classmethod
    @cache
    def network(cls, order: int) -> Network:
        """The drawing of the network, for tensors of one order.

        Raises:
            OrderError: If the format has no tensors of this order.
            ValueError: If its legs make no network.
        """
        try:
            return Network(cls.legs(order), order, cls.bond_sizes)
        except OrderError as error:
            raise OrderError(
                f"expected a format with tensors of {order} modes in `factorization`, got {cls.name!r}; {error}"
            ) from error

    @cached_property
    def legs_of_cores(self) -> Legs:
        """The legs of each core of this tensor."""
        return self.network(len(self.shape)).legs

    @classmethod
    def core_of_mode(cls, mode: int, order: int) -> Holder:
        """Which core has a mode of the tensor, and in which of its own dimensions."""
        return cls.network(order).holders[mode][0]

    # --- ranks -----------------------------------------------------------------------------------------------------

    @classmethod
    def resolve_rank(cls, shape: Sequence[int], rank: Rank, num_dense: int | None = None) -> tuple[int, ...]:
        """The ranks that an instance of this shape and rank has.

        Args:
            shape: As in the constructor.
            rank: As in the constructor.
            num_dense: Number of parameters that a fraction refers to; that of the dense tensor by default.

        Raises:
            TypeError: As the constructor does.
            ValueError: As the constructor does.
        """
        shape = tuple(shape)
        network = cls.network(len(shape))
        resolved = resolve_rank(
            rank,
            num_ranks=network.num_ranks,
            num_dense=num_dense or math.prod(shape),
            num_parameters=lambda ranks: network.num_parameters(shape, cls.admitted_rank(shape, ranks)),
        )
        return cls.admitted_rank(shape, resolved)

    @classmethod
    def admitted_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks that the constructor takes for the given ones.

        By default those of bonds that alone connect two parts of the network are clipped to the largest rank that the
        unfolding at the bond can have.
        """
        return cls.network(len(shape)).rank_of_edges(shape, rank)

    @classmethod
    def usable_rank(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks, clipped to what a decomposition of this shape can use.

        By default no core keeps a bond of two cores that is larger than all its other legs together.
        """
        return cls.network(len(shape)).rank_of_cores(shape, cls.admitted_rank(shape, rank))

    @classmethod
    def clipped_rank(cls, shape: tuple[int, ...], rank: Rank) -> tuple[int, ...]:
        """The :meth:`usable_rank` of a rank as the constructor takes it.

        Example:
            >>> from tenzoo.factorizations import TensorTrain
            >>> TensorTrain.clipped_rank((3, 4, 5), 100)
            (3, 5)
        """
        return cls.usable_rank(shape, cls.resolve_rank(shape, rank))

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
        shape = check_shape(shape)
        return cls.network(len(shape)).num_parameters(shape, cls.resolve_rank(shape, rank))

    # --- decomposition ---------------------------------------------------------------------------------------------

    @classmethod
    def decompose(cls, tensor: Tensor, rank: Rank, *, metric: Mapping[int, Tensor] | None = None) -> Self:
        """A factorization that approximates a given tensor, as :meth:`fit` does.

        With a metric the error is made small in ``‖(T - T̂) ×_k S_k‖``, S_k being the matrices of the modes k: the
        tensor is multiplied by them, decomposed, and the cores are multiplied by their inverses, which changes no rank.

        The cores are balanced: of all that make the same tensor these have the least norms, which are the same for all
        of them (see :mod:`tenzoo.factorizations.balance`).

        At ranks with at most half of its parameters, the weight of a layer takes up to 9 times its own memory on top of
        it, by alternating least squares (CP, and rings with ``r_0 > 1``) up to 25 times. From 512 rows and columns on,
        and at a rank of at most a quarter of them, matrices go through a randomized decomposition, which takes less.

        Deterministic. Ranks are clipped to what the shape can use, at which the decomposition is exact up to rounding.
        Half-precision tensors are decomposed in float32, also under autocast. TensorLy's backend stays as the user has
        set it.

        Args:
            tensor: Floating-point tensor on any device; it is detached.
            rank: As in the constructor.
            metric: From modes, counted from 0, to invertible matrices ``(n_k, n_k)``, or to their diagonals ``(n_k,)``.

        Returns:
            An instance with the tensor's dtype and device.

        Raises:
            TypeError: If ``tensor`` is not a dense floating-point tensor, or is sharded over processes.
            ValueError: If it holds NaN or infinity, ``rank`` does not fit the format, a matrix not its mode, or a core
                overflows the dtype.
            MemoryError: If the decomposition would take more than 8 GiB on top of the tensor.

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
        if is_distributed(tensor):
            raise TypeError("expected a whole tensor in `tensor`, got one that is sharded; take its full_tensor()")
        shape = check_shape(tuple(tensor.shape))
        ranks = cls.clipped_rank(shape, rank)
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        check_memory(cls.fit_size(shape, ranks) * dtype.itemsize)
        check_finite(tensor)
        metric = metric or {}
        check_metric(metric, shape)
        with torch.no_grad(), full_precision(), tensorly_on_torch():
            metric = {mode: scaled_to_safety(matrix.double())[0] for mode, matrix in metric.items()}
            unit, exponent = scaled_to_safety(tensor.detach().to(dtype))
            multiplied, more = scaled_to_safety(multiply_modes(unit, metric))
            cores = list(cls.fit(multiplied, ranks))
            for mode, matrix in metric.items():
                number, dim = cls.core_of_mode(mode, len(shape))
                inverse = matrix.reciprocal() if matrix.ndim == 1 else torch.linalg.inv(matrix)
                cores[number] = multiply_modes(cores[number], {dim: inverse})
            cores = balanced(cores, cls.network(len(shape)))
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

    @classmethod
    def fit(cls, tensor: Tensor, rank: tuple[int, ...]) -> Sequence[Tensor]:
        """Cores that approximate a tensor; :meth:`decompose` checks, scales and balances around it.

        By default by singular values along the edges of a tree, and by alternating least squares in a network with
        loops or hyperedges. TensorLy computes on torch's tensors here.

        Args:
            tensor: In float32 or float64, finite.
            rank: Ranks that the shape can use.
        """
        network = cls.network(tensor.ndim)
        if not tensor.any():
            return [tensor.new_zeros(shape) for shape in network.core_shapes(tensor.shape, rank)]
        return fit_tree(tensor, network, rank) if network.is_tree else fit_network(tensor, network, rank)[0]

    @classmethod
    def fit_size(cls, shape: tuple[int, ...], rank: tuple[int, ...]) -> int:
        """Estimate of the numbers that :meth:`fit` holds at its peak, the tensor itself not counted."""
        network = cls.network(len(shape))
        size = tree_fit_size if network.is_tree else network_fit_size
        return size(shape, network, rank)

    @classmethod
    def errors_by_rank(cls, tensor: Tensor) -> Errors:
        """Ranks of growing size, and an estimate of the squared relative error that each leaves.

        Of a tree the estimate is the sum of the squared singular values that its unfoldings lose, a bound from above
        that is exact for a matrix (see :func:`~tenzoo.factorizations.errors.errors_of_tree`). Of other networks the
        errors are those of decompositions that are cut short, at up to eight uniform ranks; where there is one rank
        only, those between them are interpolated.

        Args:
            tensor: Finite.

        Returns:
            From rank one to the largest that has fewer parameters than the tensor.

        Example:
            >>> from tenzoo.factorizations import TensorTrain
            >>> TensorTrain.errors_by_rank(torch.eye(4))[(1,)]
            0.75
        """
        shape, network = tuple(tensor.shape), cls.network(tensor.ndim)
        if not tensor.any():
            return {cls.clipped_rank(shape, 1): 0.0}
        tensor, _ = scaled_to_safety(tensor)
        if network.is_tree:
            return errors_of_tree(tensor, cls)
        errors = fitted_errors(tensor, cls, cls.quick_error)
        return interpolated(errors) if network.num_ranks == 1 else errors

    @classmethod
    def quick_error(cls, tensor: Tensor, rank: tuple[int, ...]) -> float:
        """About the relative error of a decomposition by least squares, at a fraction of its time.

        Args:
            tensor: In float32 or float64, finite, not all zero.
            rank: Ranks that the shape can use.
        """
        return fit_network(tensor, cls.network(tensor.ndim), rank, sweeps=QUICK_SWEEPS)[1]

    # --- the cores -------------------------------------------------------------------------------------------------

    @property
    def operands(self) -> list[Tensor]:
        """The cores as all computations take them: with a new mask of the bonds where there is dropout."""
        cores: list[Tensor] = list(self.cores)
        return masked(cores, self._masked_dims, self.dropout) if self.drops else cores

    @property
    def drops(self) -> bool:
        """Whether indices of bonds are dropped now."""
        return self.dropout > 0 and self.training

    @cached_property
    def _masked_dims(self) -> tuple[Holder, ...]:
        return masked_dims(self.network(len(self.shape)), self.shape, self.rank)

    # --- the tensor ------------------------------------------------------------------------------------------------

    def schedule(self, name: str, operands: Legs, output: tuple[Leg, ...], **sizes: int) -> Schedule:
        """The order in which operands are contracted, found at the first call with a name.

        Args:
            name: Of what is computed.
            operands: The legs of each operand.
            output: The legs of the result.
            **sizes: Those of legs that the cores do not have.
        """
        if name not in self.schedules:
            own = self.network(len(self.shape)).sizes(self.shape, self.rank)
            self.schedules[name] = schedule(operands, output, frozenset([*own.items(), *sizes.items()]))
        return self.schedules[name]

    def reset_parameters(self) -> None:
        """Draw the cores anew: independent normal entries with which ``E[T²] = init_std²`` in every entry."""
        init_cores_(self.cores, self.network(len(self.shape)).core_std(self.init_std, self.rank))

    @property
    def elements_per_entry(self) -> int:
        """Number of core elements that one entry of the tensor is computed from: what :meth:`entries` gathers.

        Example:
            >>> from tenzoo.factorizations import TensorTrain
            >>> TensorTrain((40, 50, 60), rank=[2, 3]).elements_per_entry  # 1 × 2, 2 × 3 and 3 × 1
            11
        """
        return self.network(len(self.shape)).num_parameters((1,) * len(self.shape), self.rank)

    @property
    def multiplications(self) -> int:
        """Number of multiplications in :meth:`reconstruct`.

        Example:
            >>> from tenzoo.factorizations import TensorTrain
            >>> TensorTrain((40, 50), rank=3).multiplications
            6000
        """
        return self.schedules["reconstruct"].multiplications

    def core_groups(self) -> list[CoreGroup]:
        """One group with all cores, under an empty name."""
        return [CoreGroup("", tuple(self.cores))]

    def forward(self) -> Tensor:
        """The tensor, as :meth:`reconstruct` gives it."""
        return self.reconstruct()

    def reconstruct(self) -> Tensor:
        """The dense tensor, of exactly ``shape``, by a few matrix products."""
        return self.schedules["reconstruct"](self.operands)

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
            return self.entries_at(columns, sparse_grad=sparse_grad)
        except (IndexError, RuntimeError) as error:  # torch has checked the range, but names neither mode nor value
            if index.is_cpu and (outside := first_outside(columns, self.shape)):
                raise IndexError(outside) from error
            raise

    def entries_at(self, columns: Sequence[Tensor], *, sparse_grad: bool = False) -> Tensor:
        """Entries at one index column ``(n,)`` per mode; :meth:`entries` checks the index around it.

        Args:
            columns: Integers ``(n,)``, one column per mode.
            sparse_grad: As in :meth:`entries`.
        """
        parts = []
        for core, legs in zip(self.operands, self.legs_of_cores, strict=True):
            dims = [dim for dim, leg in enumerate(legs) if isinstance(leg, int)]
            if dims:
                own = [columns[leg] for leg in legs if isinstance(leg, int)]
                parts.append(gather_modes(core, dims, own, sparse_grad=sparse_grad))
            else:
                parts.append(whole_with_sparse_grad(core) if sparse_grad else core)
        return self.schedules["entries"](parts)

    def extra_repr(self) -> str:
        """Shape, ranks and size, for ``print``."""
        count, dense = sum(core.numel() for core in self.cores), math.prod(self.shape)
        return f"shape={self.shape}, rank={self.rank}, init_std={self.init_std:g}, parameters={count} of {dense}"


def _gathered(legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """The legs of a core at given indices of its modes."""
    bonds = tuple(leg for leg in legs if isinstance(leg, str))
    return bonds if len(bonds) == len(legs) else (_ENTRY, *bonds)
