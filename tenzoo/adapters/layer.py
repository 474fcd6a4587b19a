"""A layer with a frozen weight and adapters, as PEFT wraps it."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from tenzoo.adapters.bottleneck import Bottleneck
from tenzoo.adapters.config import TensorAdapterConfig
from tenzoo.adapters.matrices import check_r
from tenzoo.adapters.merging import MergedUpdates, MergedWeight, delta
from tenzoo.adapters.updates import (
    FLORA_STD,
    Adapter,
    FactorizedLowRankUpdate,
    LowRankUpdate,
    NetworkUpdate,
    Update,
)
from tenzoo.dynamics import is_distributed
from tenzoo.layers import TensorizedLayer


class TensorAdapterLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer, a Hugging Face ``Conv1D`` or an embedding, with adapters by name.

    Args:
        base_layer: The layer, which is frozen.
        adapter_name: Name of the first adapter.
        config: Its settings.

    Raises:
        TypeError: If the layer is of another class, or its weight is quantized.
        ValueError: If the settings do not fit the sizes of the layer.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("tensor_adapter_update",)
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "scaling", "tensor_adapter_dropout")

    if TYPE_CHECKING:  # PEFT's
        active_adapters: list[str]
        get_base_layer: Callable[[], nn.Module]
        set_adapter: Callable[..., None]
        delete_adapter: Callable[[str], None]
        _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
        _get_embed_scale: Callable[[], Tensor | None]
        _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: TensorAdapterConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.tensor_adapter_update = nn.ModuleDict()
        self.tensor_adapter_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._scaling_at_start: dict[str, float] = {}
        self._merged_weight: MergedWeight | None = None
        self._merged_updates: list[MergedUpdates] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.out_features, self.in_features = sizes_of(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def is_embedding(self) -> bool:
        """Whether the layer looks up rows."""
        return isinstance(self.get_base_layer(), nn.Embedding)

    def update_layer(self, adapter_name: str, config: TensorAdapterConfig) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            config: Its settings.

        Raises:
            TypeError: If the layer cannot have this kind.
            ValueError: If the settings do not fit the sizes of the layer.
        """
        adapter = self._make(config)
        if config.init_weights:
            adapter.start_at_zero_()
        self.tensor_adapter_update[adapter_name] = adapter
        self.tensor_adapter_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = self._scaling_at_start[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _make(self, config: TensorAdapterConfig) -> Adapter:
        sizes = self.in_features, self.out_features
        rank = config.r if config.rank is None else config.rank
        if config.kind == "bottleneck":
            if self.is_embedding:
                raise TypeError("expected a linear layer for an adapter with kind='bottleneck', got an Embedding")
            return Bottleneck(
                self.out_features, config.r, factorization=config.factorization, rank=rank, modes=config.modes
            )
        if config.kind == "flora":
            check_r(config.r, *sizes)
            r = min(config.r, *sizes)
            return NetworkUpdate(
                *sizes, factorization="tucker", rank=r, whole=True, std=FLORA_STD, is_table=self.is_embedding
            )
        if config.factorization is None:
            return LowRankUpdate(*sizes, config.r, is_table=self.is_embedding)
        network: dict[str, Any] = {
            "factorization": config.factorization,
            "rank": rank,
            "modes": config.modes,
            "is_table": self.is_embedding,
        }
        if config.kind == "lora":
            return FactorizedLowRankUpdate(*sizes, config.r, **network)
        return NetworkUpdate(*sizes, **network)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer with its active adapters.

        Args:
            x: Input of the layer.
            *args: Further arguments of the layer.
            **kwargs: Further arguments of the layer.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        dtype = y.dtype
        for name, adapter in self._active():
            y = y + self._output_of(name, adapter, x, y) * self.scaling[name]
        return y.to(dtype)

    def _output_of(self, name: str, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        dropout = self.tensor_adapter_dropout[name]
        if self.is_embedding:
            assert isinstance(adapter, Update)
            rows: Tensor = dropout(adapter.look_up(x))
            if self._padding_idx is not None:  # torch gives this row no gradient
                rows = rows.masked_fill((x == self._padding_idx).unsqueeze(-1), 0)
            scale = self._get_embed_scale()
            return rows if scale is None else rows * scale.to(rows.dtype)
        source = y if isinstance(adapter, Bottleneck) else x
        output: Tensor = adapter(dropout(self._cast_input_dtype(source, adapter.cores()[0].dtype)))
        return output

    def _active(self) -> Iterator[tuple[str, Adapter]]:
        for name in self.active_adapters:
            if name in self.tensor_adapter_update:
                adapter = self.tensor_adapter_update[name]
                assert isinstance(adapter, Adapter)
                yield name, adapter

    # --- merging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging adds to the weight, in the layout of the layer and the precision of the cores.

        Raises:
            ValueError: If the adapter is a bottleneck, which no weight can hold.
        """
        update = self._mergeable(adapter_name)
        return delta(update, self.scaling[adapter_name], transposed=self._is_transposed, padding_idx=self._padding_idx)

    def _mergeable(self, adapter_name: str) -> Update:
        adapter = self.tensor_adapter_update[adapter_name]
        if not isinstance(adapter, Update):
            raise ValueError(
                f"expected an adapter that updates a weight, got {adapter_name!r} of kind 'bottleneck', which cannot "
                "be merged"
            )
        return adapter

    @property
    def _is_transposed(self) -> bool:
        return isinstance(self.get_base_layer(), nn.Embedding | Conv1D)

    @property
    def _padding_idx(self) -> int | None:
        padding_idx: int | None = getattr(self.get_base_layer(), "padding_idx", None) if self.is_embedding else None
        return padding_idx

    def _weight_to_merge_into(self) -> Tensor:
        base = self.get_base_layer()
        if isinstance(base, TensorizedLayer):
            raise TypeError(
                f"expected a layer with a weight of its own to merge into, got a {type(base).__name__}, whose weight "
                "is reconstructed from cores; make it dense with fold_() first"
            )
        weight = base.weight
        assert isinstance(weight, Tensor)
        if is_distributed(weight) or getattr(base, "_is_fsdp_managed_module", False):
            raise TypeError(
                f"expected a {type(base).__name__} with a whole weight to merge into, got one that FSDP2 shards; save "
                "the adapter with save_pretrained(), load it in one process, and merge it there"
            )
        return weight

    def _with_updates(self, names: list[str], safe_merge: bool) -> tuple[Tensor, MergedUpdates]:
        weight = self._weight_to_merge_into()
        updates = MergedUpdates(
            [(self._mergeable(name), self.scaling[name]) for name in names],
            transposed=self._is_transposed,
            padding_idx=self._padding_idx,
        )
        merged = updates.added_to(weight)
        if safe_merge and not bool(merged.to(weight.dtype).isfinite().all()):
            raise ValueError(
                f"expected finite weights after merging in `adapter_names`, got NaN or infinity from {names}"
            )
        return merged, updates

    @torch.no_grad()
    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise what :meth:`merge` would, and change nothing.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Which; the active ones by default.

        Raises:
            TypeError: As :meth:`merge` does.
            ValueError: As :meth:`merge` does.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.tensor_adapter_update and name not in self.merged_adapters]
        if self._merged_weight is not None:
            self._merged_weight.enter()
        if names:
            self._weight_to_merge_into()
        for name in names:
            self._mergeable(name)
        if names and safe_merge:
            self._with_updates(names, safe_merge)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the weight, which is kept for :meth:`unmerge`.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Which; the active ones by default.

        Raises:
            TypeError: If the weight is itself reconstructed from cores, or sharded over processes.
            ValueError: If an adapter is a bottleneck, or the result is not finite with ``safe_merge``.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tensor_adapter_update]
        if not names:
            return
        merged, updates = self._with_updates(names, safe_merge)
        weight = self._weight_to_merge_into()
        if self._merged_weight is None:
            self._merged_weight = MergedWeight.of(weight)
        self._merged_weight.add_(updates, merged, weight)
        self._merged_updates.append(updates)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back as it was before the first merge, to the bit.

        Where other layers have the same weight, what they have merged into it stays.
        """
        if self._merged_weight is not None:
            weight = self.get_base_layer().weight
            assert isinstance(weight, Tensor)
            self._merged_weight.remove_(self._merged_updates, weight)
        self._merged_weight = None
        self._merged_updates = []
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether :func:`peft.convert_to_lora` can take the adapter: an update of a matrix."""
        return not self.is_embedding and isinstance(self.tensor_adapter_update[adapter_name], Update)

    # --- scaling -----------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter by this many times its own scaling."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._scaling_at_start[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name, _ in self._active():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or give them their own."""
        for name, _ in self._active():
            self.scaling[name] = self._scaling_at_start[name] if scale is None else self.scaling[name] / scale

    def __repr__(self) -> str:
        """As PEFT's."""
        return f"tensor_adapter.{super().__repr__()}"


def is_read_by_its_parent(layer: nn.Module) -> bool:
    """Whether this is the ``out_proj`` of ``nn.MultiheadAttention``, which reads its weight and does not call it."""
    return isinstance(layer, NonDynamicallyQuantizableLinear)


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer; columns and rows of the table of an embedding.

    Raises:
        TypeError: If it can have no adapter.
    """
    weight = getattr(layer, "weight", None)
    valid = "a torch.nn.Linear, a transformers Conv1D or a torch.nn.Embedding as a target"
    if not isinstance(layer, nn.Linear | nn.Embedding | Conv1D) or not isinstance(weight, Tensor):
        raise TypeError(f"expected {valid}, got a {type(layer).__name__}")
    if is_read_by_its_parent(layer):
        raise TypeError(
            f"expected {valid}, got a {type(layer).__name__}, whose weight torch.nn.MultiheadAttention reads past any "
            "adapter"
        )
    if not weight.is_floating_point():
        raise TypeError(
            f"expected {valid} with a floating-point weight, got a {type(layer).__name__} of {weight.dtype}"
        )
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    return weight.shape[1], weight.shape[0]
