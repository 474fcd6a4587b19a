"""The settings of an adapter, as PEFT keeps them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType

from tenzoo.factorizations import FactorizationName, factorization_class

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
        rank: Of the tensor networks: an int, which is cut to what a small layer can use, a fraction of the dense
            parameters, or a list of ranks. None is r. Not for ``flora``.
        modes: Maps a width that a target has to its modes. For ``network`` they multiply to the width; for ``lora`` and
            ``bottleneck`` to the width times r, the size of a factor. By default modes that are alike.
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
    factorization: FactorizationName | None = None
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
        self._check_names()
        if self.modes is not None:
            self.modes = _modes(self.modes)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))  # PEFT wants a set

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The settings of a saved adapter; PEFT reads its weights from the same folder right after.

        Args:
            pretrained_model_name_or_path: The folder, or a name on the hub.
            subfolder: Folder in it.
            **kwargs: As PEFT's.

        Raises:
            ValueError: If the file of weights beside the settings is damaged.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        _check_weights(Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME))
        return config

    def _check_numbers(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"expected one of {list(get_args(Kind))} in `kind`, got {self.kind!r}")
        if not _is_int(self.r) or self.r < 1:
            raise ValueError(f"expected an int >= 1 in `r`, got {self.r!r}")
        if not _is_number(self.alpha) or not 0 < self.alpha < float("inf"):
            raise ValueError(f"expected a positive, finite number in `alpha`, got {self.alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"expected a probability in [0, 1) in `dropout`, got {self.dropout!r}")
        for name in ("use_rslora", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"expected True or False in `{name}`, got {getattr(self, name)!r}")

    def _check_network(self) -> None:
        if self.kind == "network" and self.factorization is None:
            raise ValueError("expected a `factorization` with kind='network', got none")
        if self.kind == "flora":
            self._check_flora()
        if self.factorization is not None:
            factorization_class(self.factorization)
        elif self.rank is not None or self.modes is not None:
            name = "rank" if self.rank is not None else "modes"
            raise ValueError(f"expected a `factorization` with `{name}`, got {getattr(self, name)!r} without one")

    def _check_flora(self) -> None:
        if self.factorization not in (None, "tucker"):
            raise ValueError(
                f"expected no `factorization` with kind='flora', whose A G Bᵀ is a Tucker network, got "
                f"{self.factorization!r}"
            )
        for name in ("rank", "modes"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"expected no `{name}` with kind='flora', whose core is r × r and whose widths stay whole, got "
                    f"{getattr(self, name)!r}"
                )

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not _is_list(value, str):
                raise ValueError(f"expected a string or a list of strings in `{name}`, got {value!r}")
        if self.modules_to_save is not None and not _is_list(self.modules_to_save, str):
            raise ValueError(f"expected a list of strings in `modules_to_save`, got {self.modules_to_save!r}")
        layers = self.layers_to_transform
        if layers is None:
            return
        if not all(map(_is_int, layers if isinstance(layers, list | tuple) else [layers])):
            raise ValueError(f"expected an int or a list of ints in `layers_to_transform`, got {layers!r}")
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            raise ValueError(
                f"expected a list of names in `target_modules` with `layers_to_transform`, which a regular expression "
                f"does not follow, got {self.target_modules!r}"
            )

    @property
    def scaling(self) -> float:
        """What the update is multiplied by."""
        return float(self.alpha / (self.r**0.5 if self.use_rslora else self.r))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(values: Any, kind: type) -> bool:
    return isinstance(values, list | tuple | set | frozenset) and all(isinstance(value, kind) for value in values)


def _modes(modes: Any) -> dict[int, list[int]]:
    """The modes of each width. JSON has strings for keys.

    Raises:
        ValueError: If they are none.
    """
    if not isinstance(modes, Mapping):
        raise ValueError(f"expected a dict from a width to its modes in `modes`, got {modes!r}")
    for width in modes:
        if not _is_int(width) and not (isinstance(width, str) and width.isdecimal()):
            raise ValueError(f"expected widths, which are ints, as keys of `modes`, got {width!r}")
    return {int(width): _ints(values, f"modes[{width}]") for width, values in modes.items()}


def _ints(values: Any, argument: str) -> list[int]:
    if not isinstance(values, Sequence) or not all(_is_int(each) and each > 0 for each in values):
        raise ValueError(f"expected a list of positive ints in `{argument}`, got {values!r}")
    return [int(each) for each in values]


def _check_weights(path: Path) -> None:
    """Refuse a damaged file of weights; what stands elsewhere is left to PEFT.

    Raises:
        ValueError: Naming the file.
    """
    if not path.is_file():
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"expected a whole file of adapter weights, got {str(path)!r}: {error}") from None
