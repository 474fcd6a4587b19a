"""The settings of an adapter, as PEFT keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import PeftType

from tenzoo.factorizations import factorization_class

Kind = Literal["lora", "flora", "network", "bottleneck"]


@dataclass
class TensorAdapterConfig(PeftConfig):  # type: ignore[misc]
    """An adapter made of cores, for :func:`peft.get_peft_model` and all else in PEFT that takes a config.

    ============== ================================================================================================
    ``kind``       what is trained for each target, a layer with the frozen weight W
    ============== ================================================================================================
    ``lora``       ``W + B A``; A and B are dense (LoRA), or tensor networks with a ``factorization`` (LoRETTA-rep)
    ``flora``      ``W + A G Bᵀ`` with a core G of r × r (FLoRA)
    ``network``    W plus one tensor network of the ``factorization``
    ``bottleneck`` ``U gelu(D y)`` is added to the output y; D and U as the factors of ``lora`` (LoRETTA-adp)
    ============== ================================================================================================

    The update is zero at the start, and is scaled by ``alpha / r``. FLoRA was published with ``alpha = 16 r``, and with
    a smaller initialization than LoRA's.

    Args:
        kind: ``"lora"``, ``"flora"``, ``"network"`` or ``"bottleneck"``.
        r: Inner width of ``lora``, ``flora`` and ``bottleneck``; the rank of ``network`` where ``rank`` is not given.
        alpha: Numerator of the scaling.
        use_rslora: Scale by ``alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv:2312.03732).
        factorization: Name of a format, such as ``"tt"``, or an einsum.
        rank: Of the tensor networks: an int, a fraction of the dense parameters, or a list of ranks. None is r.
        modes: Maps a width to its modes. For ``network`` they multiply to the width; for ``lora`` and ``bottleneck`` to
            the width times r, the size of a factor. By default modes that are alike.
        dropout: Probability with which an element of the adapter's input is dropped in training.
        init_weights: Whether the update starts at zero; False draws all cores.
        target_modules: Names of the layers, a regular expression, or ``"all-linear"``. By default those that PEFT has
            for LoRA in a known architecture.
        exclude_modules: Names of layers, or a regular expression, to leave out.
        modules_to_save: Names of modules that are trained and saved as they are, such as a new head.
        layers_to_transform: Indices of the blocks to take; all by default.
        layers_pattern: Name of the list of blocks.

    Raises:
        ValueError: If an argument is out of range, or does not fit the kind.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(768, 768))
        >>> config = TensorAdapterConfig(factorization="tt", rank=5, modes={768: [8, 8, 12, 8]}, target_modules=["0"])
        >>> get_peft_model(model, config).print_trainable_parameters()
        trainable params: 1,160 || all params: 591,752 || trainable%: 0.1960
    """

    kind: Kind = "lora"
    r: int = 8
    alpha: float = 8
    use_rslora: bool = False
    factorization: str | None = None
    rank: int | float | list[int] | None = None
    modes: dict[int, list[int]] | None = None
    dropout: float = 0.0
    init_weights: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_model_name_or_path: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("TENSOR_ADAPTER")
        self._check_numbers()
        self._check_network()
        if self.modes is not None:  # JSON has strings for keys
            self.modes = {int(width): _ints(modes, f"modes[{width}]") for width, modes in self.modes.items()}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT wants a set
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _check_numbers(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"expected one of {list(get_args(Kind))} in `kind`, got {self.kind!r}")
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"expected an int >= 1 in `r`, got {self.r!r}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"expected a positive, finite number in `alpha`, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected a probability in [0, 1) in `dropout`, got {self.dropout!r}")

    def _check_network(self) -> None:
        if self.kind == "network" and self.factorization is None:
            raise ValueError("expected a `factorization` with kind='network', got none")
        if self.kind == "flora" and self.factorization not in (None, "tucker"):
            raise ValueError(
                f"expected no `factorization` with kind='flora', whose A G Bᵀ is a Tucker network, got "
                f"{self.factorization!r}"
            )
        if self.factorization is not None:
            factorization_class(self.factorization)
        elif self.rank is not None or self.modes is not None:
            name = "rank" if self.rank is not None else "modes"
            raise ValueError(f"expected a `factorization` with `{name}`, got {getattr(self, name)!r} without one")

    @property
    def scaling(self) -> float:
        """What the update is multiplied by."""
        return float(self.alpha / (self.r**0.5 if self.use_rslora else self.r))


def _ints(values: Any, argument: str) -> list[int]:
    if not isinstance(values, Sequence) or not all(isinstance(each, int) and each > 0 for each in values):
        raise ValueError(f"expected a list of positive ints in `{argument}`, got {values!r}")
    return [int(each) for each in values]
