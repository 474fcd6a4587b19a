"""What all tensorized layers have in common: the torch layer that they replace."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from tenzoo.factorizations import FactorizationName, Rank, without_dropout
from tenzoo.layers.implementation import FactorizedLayer, Implementation
from tenzoo.layers.tensorization import Tensorization

L = TypeVar("L", bound=nn.Module)


class TensorizedLayer(FactorizedLayer, Generic[L]):
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

    tensorization: tuple[tuple[int, ...], tuple[int, ...]]
    """The factors of both sizes, those of the output or of the rows of a table first."""

    bias: Any

    def patches(self, x: Tensor) -> Tensor | None:
        """What the weight is multiplied by, in the modes of its tensor on the input side.

        Args:
            x: An input.

        Returns:
            One row per position (and group, where there are several), ``(n, *modes)``; None where the weight is not
            multiplied by anything.
        """
        return None

    def output_rows(self, y: Tensor) -> Tensor | None:
        """The rows of an output, in the modes of the weight's tensor on the output side.

        Args:
            y: An output, or its gradient.

        Returns:
            One row for each row of :meth:`patches`, or for each look-up, ``(n, *modes)``; None where rows of the output
            do not belong to single ones of the input.
        """
        return None

    def look_ups(self, x: Tensor, weights: Tensor | None = None) -> Tensor | None:
        """How often each row of a table is looked up, in the modes of its tensor on that side.

        Args:
            x: An input.
            weights: Of the single look-ups, ``(n,)``; by default each counts 1.

        Returns:
            Numbers, of the factors of the number of rows; None where the weight is no table.
        """
        return None

    @staticmethod
    @abstractmethod
    def sides(layer: Any) -> dict[str, int]:
        """The sizes that ``tensorization`` splits, by name.

        Args:
            layer: Torch's, or this one.
        """

    @staticmethod
    @abstractmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        """What torch's layer, or this one, was made with, but for device and dtype."""

    @classmethod
    def empty_like(
        cls,
        layer: L,
        *,
        factorization: FactorizationName,
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
        factorization: FactorizationName,
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
            MemoryError: If the decomposition would take more than 8 GiB on top of the weight.
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
        planned = made.factorization
        made.factorization = type(planned).decompose(made.as_tensor(dense), made.factorization.rank, metric=metric)
        made.factorization.requires_grad_(bool(layer.weight.requires_grad))
        if made.factorization.rank == planned.rank:
            made.factorization.schedules = planned.schedules
        else:
            made._count_costs()
        made._copy_rest(layer)
        return made.train(layer.training)

    @classmethod
    def _dense_name(cls) -> str:
        package = cls.dense_class.__module__
        return f"{'torch.nn' if package.startswith('torch.nn.') else package}.{cls.dense_class.__name__}"

    def _copy_rest(self, layer: L) -> None:
        """Copy what cores do not reconstruct."""
        bias = getattr(layer, "bias", None)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    @abstractmethod
    def to_dense(self) -> L:
        """The torch layer that computes the same; a copy."""

    def _filled(self, layer: L) -> L:
        """Give torch's layer, which is on the meta device, a weight, a bias and a mode of its own."""
        trained = any(core.requires_grad for core in self.factorization.cores)
        with torch.no_grad(), without_dropout(self.factorization):
            weight = self._reconstruct().clone(memory_format=torch.contiguous_format)
        layer.weight = nn.Parameter(weight, requires_grad=trained)
        bias = getattr(self, "bias", None)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(self.training)
