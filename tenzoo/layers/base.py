"""What all tensorized layers have in common: the torch layer that they replace, and two ways to compute it."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from tenzoo.factorizations import Factorization, Rank, factorization_class
from tenzoo.layers.cost import Costs, Phase, Positions, count, count_per_position
from tenzoo.layers.factorized import FactorizedModule
from tenzoo.layers.tensorization import Tensorization, whole_modes

L = TypeVar("L", bound=nn.Module)

Implementation: TypeAlias = Literal["auto", "reconstruct", "contract"]
"""Reconstruct the dense weight and call torch's operator, contract the input with the cores, or take the cheaper."""


_MANY = 2**30


class TensorizedLayer(FactorizedModule, Generic[L]):
    """A layer of torch or of another library whose weight a :class:`~tenzoo.factorizations.Factorization` reconstructs.

    Abstract: a layer says how its weight is laid out, and how it is contracted with an input. It is also of the dense
    layer's own class, so that ``isinstance(layer, nn.Linear)`` holds, and ``layer.weight`` is the dense tensor, for
    code that reads it. Code that writes to it, such as an initialization, is refused.

    Attributes:
        factorization: The cores.
        implementation: ``"auto"``, ``"reconstruct"`` or ``"contract"``.
        costs: What both implementations cost.
    """

    dense_class: ClassVar[type[nn.Module]]
    """The dense layer that this class replaces."""

    bias: Any
    implementation: Implementation
    costs: Costs

    def __init__(self, implementation: Implementation) -> None:
        super().__init__()
        if implementation not in get_args(Implementation):
            raise ValueError(
                f"expected one of {sorted(get_args(Implementation))} in `implementation`, got {implementation!r}"
            )
        self.implementation = implementation

    def _count_costs(self) -> None:
        # On a copy of the cores without memory; now, since a compiler could not follow it later.
        weight = type(self.factorization)(self.factorization.shape, self.factorization.rank, device="meta")
        weight.schedules = self.factorization.schedules  # what is found here serves all calls
        with torch.no_grad():
            dense = self.as_weight(weight.reconstruct()).contiguous()
        inputs = self._example_inputs()
        positions = [self.positions(x) for x in inputs]
        self.costs = Costs(
            count(lambda: self.as_weight(weight.reconstruct())),
            count_per_position(lambda x: self._apply_dense(x, dense), inputs, positions),
            count_per_position(lambda x: self._contract(weight, x), inputs, positions),
        )

    def choose(self, positions: Positions, phase: Phase | None = None) -> Implementation:
        """The implementation that a call will take.

        An exported program has to serve any number of positions where their number is symbolic: it takes what is
        cheaper for many.

        Args:
            positions: Of the call.
            phase: None asks for the current one.
        """
        if self.implementation != "auto":
            return self.implementation
        if torch.compiler.is_exporting() and not isinstance(positions.outputs, int):
            positions = self._many()
        return self.costs.cheaper(positions, phase or self._phase(), next(iter(self.factorization.cores)).device.type)

    def _phase(self) -> Phase:
        if torch.is_grad_enabled():
            return "training"
        return "kept" if self._may_cache() else "inference"

    @abstractmethod
    def positions(self, x: Tensor) -> Positions:
        """How many rows, pixels or indices an input has: what the cost of a call grows with."""

    def _many(self) -> Positions:
        return Positions(_MANY, _MANY)

    def patches(self, x: Tensor) -> Tensor | None:
        """What the weight is multiplied by, in the modes of its tensor on the input side.

        Args:
            x: An input.

        Returns:
            One row per position (and group, where there are several), ``(n, *modes)``; None where the weight is not
            multiplied by anything.
        """
        return None

    @abstractmethod
    def _example_inputs(self) -> Sequence[Tensor]:
        """Inputs on the meta device, as :func:`~tenzoo.layers.cost.count_per_position` takes them."""

    @abstractmethod
    def _apply_dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """Torch's operator with a dense weight, without a bias."""

    @abstractmethod
    def _contract(self, weight: Factorization, x: Tensor) -> Tensor:
        """The same with the cores, in sequence."""

    @staticmethod
    @abstractmethod
    def sides(layer: Any) -> dict[str, int]:
        """The sizes that ``tensorization`` splits, by name.

        Args:
            layer: Torch's, or this one.
        """

    @classmethod
    def whole_modes(cls, layer: L, factorization: str) -> Tensorization | None:
        """The ``tensorization`` with both sizes whole; None, the default of the layer, for a format that needs others.

        Args:
            layer: Torch's.
            factorization: Name of a format.
        """
        kernel = math.prod(layer.kernel_size) if hasattr(layer, "kernel_size") else None  # type: ignore[arg-type]
        return whole_modes(factorization_class(factorization), cls.sides(layer), kernel)

    @staticmethod
    @abstractmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        """What torch's layer, or this one, was made with, but for device and dtype."""

    @classmethod
    def empty_like(
        cls,
        layer: L,
        *,
        factorization: str,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
    ) -> Self:
        """A layer of the sizes and the dtype of a dense one on the meta device, where nothing is computed or stored.

        Args:
            layer: Torch's.
            factorization: As in the constructor.
            rank: As in the constructor.
            tensorization: As in the constructor.
            implementation: As in the constructor.

        Raises:
            TypeError: If the layer is of another class.
            ValueError: As the constructor.
        """
        if not isinstance(layer, cls.dense_class) or isinstance(layer, TensorizedLayer):
            raise TypeError(f"expected a {cls._dense_name()} in `layer`, got a {type(layer).__name__}")
        arguments: dict[str, Any] = {
            **cls._arguments(layer),
            "factorization": factorization,
            "rank": rank,
            "tensorization": tensorization,
            "implementation": implementation,
            "device": "meta",
            "dtype": layer.weight.dtype,
        }
        return cls(**arguments)

    @classmethod
    def from_dense(
        cls,
        layer: L,
        *,
        factorization: str,
        rank: Rank,
        tensorization: Tensorization | None = None,
        implementation: Implementation = "auto",
        metric: Mapping[int, Tensor] | None = None,
    ) -> Self:
        """A layer that approximates a dense one, by decomposing its weight.

        Args:
            layer: Torch's; it stays as it is. What is frozen in it is so in the result.
            factorization: As in the constructor.
            rank: As in the constructor; clipped to what fits, where the result is exact up to rounding.
            tensorization: As in the constructor.
            implementation: As in the constructor.
            metric: In which the error is made small (see :meth:`~tenzoo.factorizations.Factorization.decompose`).

        Raises:
            TypeError: If the layer is of another class, or has a forward pass of its own.
            ValueError: As the constructor, or if the weight holds NaN or infinity, or is on the meta device.
            MemoryError: If the decomposition would take more than 8 GiB beside the weight.
        """
        made = cls.empty_like(
            layer, factorization=factorization, rank=rank, tensorization=tensorization, implementation=implementation
        )
        for name in ("forward", "_conv_forward"):
            if name in vars(layer) or getattr(type(layer), name, None) is not getattr(cls.dense_class, name, None):
                raise TypeError(
                    f"expected a {cls._dense_name()} in `layer` that computes what its class does, got a "
                    f"{type(layer).__name__} with a `{name}` of its own"
                )
        dense: Tensor = layer.weight.detach()  # type: ignore[operator]
        if dense.is_meta:
            raise ValueError("expected a layer with numbers in its weight in `layer`, got one on the meta device")
        made.factorization = type(made.factorization).decompose(
            made.as_tensor(dense), made.factorization.rank, metric=metric
        )
        made.factorization.requires_grad_(bool(layer.weight.requires_grad))
        made._count_costs()
        made._copy_rest(layer)
        return made.train(layer.training)

    @classmethod
    def _dense_name(cls) -> str:
        package = cls.dense_class.__module__
        return f"{'torch.nn' if package.startswith('torch.nn.') else package}.{cls.dense_class.__name__}"

    def _copy_rest(self, layer: L) -> None:
        """Copy what is not made of cores."""
        bias = getattr(layer, "bias", None)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    @abstractmethod
    def to_dense(self) -> L:
        """The torch layer that computes the same; a copy."""

    def _filled(self, layer: L) -> L:
        """Give torch's layer, which is on the meta device, a weight, a bias and a mode of its own."""
        trained = any(core.requires_grad for core in self.factorization.cores)
        with torch.no_grad():
            weight = self._reconstruct().clone(memory_format=torch.contiguous_format)
        layer.weight = nn.Parameter(weight, requires_grad=trained)
        bias = getattr(self, "bias", None)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(self.training)
