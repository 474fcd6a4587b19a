"""Plans: what each weight of a trained network becomes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from tenzoo.atomic import atomic_write
from tenzoo.factorizations import FACTORIZATIONS, factorization_class
from tenzoo.messages import shown

if TYPE_CHECKING:
    from tenzoo.compression.decompositions import Decompositions

Counted: TypeAlias = Literal["parameters", "multiplications"]
"""What a budget counts."""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Args:
        name: Qualified name of the layer, or of the parameter where no layer can replace its module.
        kind: Name of the layer's class in torch.
        shape: Shape of the dense weight.
        factorization: Format of the cores; None leaves the layer dense.
        rank: Ranks of the cores.
        tensorization: Factors of the output and of the input size.
        parameters: Number of parameters, bias included.
        dense_parameters: Number of parameters of the dense layer.
        multiplications: For one sample of the example input, with a reconstructed weight that is kept between calls or
            with the cores in sequence, whichever is estimated to be faster in a large batch; None without an example
            input, or if it does not reach the layer.
        dense_multiplications: Multiplications of the dense layer.
        error: ``‖W − Ŵ‖ / ‖W‖`` of the decomposition, in Frobenius norms, or in those of the calibration data (see
            :func:`~tenzoo.compression.metrics.output_metrics`); 0 for a dense layer.
        reason: Why the layer stays dense; None if it does not.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    factorization: str | None
    rank: tuple[int, ...] | None
    tensorization: tuple[tuple[int, ...], tuple[int, ...]] | None
    parameters: int
    dense_parameters: int
    multiplications: int | None
    dense_multiplications: int | None
    error: float
    reason: str | None


class _InMemory:
    """Holds the decompositions of a plan outside of its fields: no comparison, copy, pickle or file has them."""

    __slots__ = ("_decompositions",)

    _decompositions: "Decompositions"

    @property
    def decompositions(self) -> "Decompositions | None":
        """What :func:`~tenzoo.compression.plan` decomposed; None for a plan from a file, and for a copy."""
        return getattr(self, "_decompositions", None)

    def keep_decompositions(self, decompositions: "Decompositions") -> None:
        """Keep them for :func:`~tenzoo.compression.apply_` as long as the plan is in memory."""
        object.__setattr__(self, "_decompositions", decompositions)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


@dataclass(frozen=True)
class Plan(_InMemory):
    """What becomes of each layer of a network; printable, and a JSON file on disk.

    A plan from :func:`~tenzoo.compression.plan` also keeps the cores that it decomposed, in memory only.

    Args:
        layers: The plans of convolutions, linear, attention and recurrent layers and embeddings.
        other_parameters: Number of parameters outside of these layers.
        data_aware: Whether the plan was made with calibration data, which are then needed to apply it.
        calibration: Hash of the calibration data; None if there were none, or the plan is older than the hash.
        keeps: What the decompositions preserve: the ``"weights"``, or the ``"outputs"`` of the layers on calibration
            data. With such data it is the one that moves the outputs of the network less on the inputs held back.
        output_error: ``‖y' − y‖ / ‖y‖`` of the outputs of the network on the inputs held back; None without any.
        held_back: Whether the inputs held back took no part in the choice of the ranks. False where samples could not
            be told apart: the error is then that on all inputs, and no estimate for new ones.
        counts: What the budget counts. With ``"multiplications"``, layers that are planned to have fewer contract their
            input with the cores in every batch, even where their dense weight would be faster.
    """

    layers: tuple[LayerPlan, ...]
    other_parameters: int
    data_aware: bool = False
    calibration: str | None = None
    keeps: Literal["weights", "outputs"] | None = None
    output_error: float | None = None
    held_back: bool = True
    counts: Counted = "parameters"

    @property
    def by_outputs(self) -> bool:
        """Whether the decompositions keep the outputs of the layers; with calibration data so did older plans."""
        return self.data_aware and self.keeps != "weights"

    @property
    def parameters(self) -> int:
        """Parameters of the whole network."""
        return self.other_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the whole dense network."""
        return self.other_parameters + sum(layer.dense_parameters for layer in self.layers)

    @property
    def multiplications(self) -> int | None:
        """Multiplications of all planned layers together; None if they were not counted."""
        return _sum([layer.multiplications for layer in self.layers])

    @property
    def dense_multiplications(self) -> int | None:
        """Multiplications of all planned layers together, when dense."""
        return _sum([layer.dense_multiplications for layer in self.layers])

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            FileExistsError: If the file exists.
            OSError: If it cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"expected a new file in `path`, got {str(path)!r}, which exists")
        with atomic_write(path) as file:
            content = asdict(self)
            for layer in content["layers"]:
                layer["factorization"] = _path_of_format(layer["factorization"])
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file is no plan, or a format in it is not known.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            content = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number)
            rows = content.pop("layers")
            if not isinstance(rows, list):
                raise TypeError(rows)
            layers = tuple(LayerPlan(**_tuples(layer)) for layer in rows)
            for layer in layers:
                _check(layer)
            if len({layer.name for layer in layers}) < len(layers):
                raise ValueError("a layer twice")
            plan = cls(layers, **content)
            _check_plan(plan)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"expected a plan, as Plan.save writes it, in {str(path)!r}, got something else"
            ) from error
        return replace(plan, layers=tuple(_with_known_format(layer, str(path)) for layer in layers))

    def __str__(self) -> str:
        return self.table(140)

    def table(self, columns: int) -> str:
        """What becomes of each layer, and the totals, as text.

        Args:
            columns: The largest width of the text.
        """
        from tenzoo.compression.plan_table import plan_table  # only here: rich is slow to import

        return plan_table(self, columns)


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _no_number(text: str) -> float:
    raise ValueError(text)


def _path_of_format(name: str | None) -> str | None:
    """The name of a format of tenzoo, or the path of a class that another process can import."""
    kind = FACTORIZATIONS.get(str(name))
    if kind is None or kind.__module__.partition(".")[0] in ("tenzoo", "__main__") or "<" in kind.__qualname__:
        return name
    return f"{kind.__module__}.{kind.__qualname__}"


def _with_known_format(layer: LayerPlan, file: str) -> LayerPlan:
    """The plan of a layer with the name of its format, which may be read from a path."""
    if layer.factorization is None:
        return layer
    try:
        return replace(layer, factorization=factorization_class(layer.factorization).name)
    except ValueError as error:
        raise ValueError(
            f"expected formats that are defined in {file!r}, got {shown(layer.factorization)} for {shown(layer.name)}; "
            "define this format first"
        ) from error


def _check_plan(plan: Plan) -> None:
    """Refuse a wrong number of parameters, and a wrong account of calibration data."""
    if type(plan.other_parameters) is not int or plan.other_parameters < 0 or type(plan.data_aware) is not bool:
        raise ValueError(plan.other_parameters)
    if plan.keeps not in (None, "weights", "outputs") or (plan.keeps is not None and not plan.data_aware):
        raise ValueError(plan.keeps)
    if type(plan.held_back) is not bool:
        raise ValueError(plan.held_back)
    if plan.counts not in ("parameters", "multiplications"):
        raise ValueError(plan.counts)
    error = plan.output_error
    if error is not None and (type(error) not in (int, float) or not 0 <= error < math.inf or plan.keeps is None):
        raise ValueError(error)
    if plan.calibration is not None and not (plan.data_aware and isinstance(plan.calibration, str)):
        raise ValueError(plan.calibration)


def _check(layer: LayerPlan) -> None:
    """Refuse numbers that no layer can have."""

    def sizes(value: object) -> bool:
        return isinstance(value, tuple) and all(type(size) is int and size >= 1 for size in value)

    optional = (layer.multiplications, layer.dense_multiplications)
    counts = (layer.parameters, layer.dense_parameters, *(count for count in optional if count is not None))
    if not all(type(count) is int and count >= 0 for count in counts) or not sizes(layer.shape):
        raise ValueError(layer.name)
    if type(layer.error) not in (int, float) or not 0 <= layer.error < math.inf:
        raise ValueError(layer.name)
    if not all(isinstance(text, str) for text in (layer.name, layer.kind, layer.reason or "")):
        raise ValueError(layer.name)
    if (layer.rank is None) != (layer.reason is not None):
        raise ValueError(layer.name)
    if layer.rank is None:
        if (layer.factorization, layer.tensorization, layer.error) != (None, None, 0):
            raise ValueError(layer.name)
        return
    if not isinstance(layer.factorization, str):
        raise ValueError(layer.name)
    modes = layer.tensorization
    if not sizes(layer.rank) or modes is None or len(modes) != 2 or not all(sizes(side) for side in modes):
        raise ValueError(layer.name)
    if max(*layer.rank, *modes[0], *modes[1]) > math.prod(layer.shape):
        raise ValueError(layer.name)


def _tuples(layer: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(LayerPlan)}
    if set(layer) != names:
        raise KeyError(*set(layer) ^ names)

    def frozen(value: Any) -> Any:
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return {name: frozen(value) for name, value in layer.items()}
