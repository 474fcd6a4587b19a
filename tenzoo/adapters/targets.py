"""Which layers of a model have an adapter, and whether its settings fit them."""

from typing import Any

from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenzoo.adapters.config import TensorAdapterConfig
from tenzoo.adapters.layer import TensorAdapterLayer, is_read_by_its_parent, sizes_of

_SHOWN = 6
"""How many names of layers an error has."""


def check_adapter_name(name: str) -> None:
    """Refuse a name that torch cannot have for a module.

    Args:
        name: Of the adapter.

    Raises:
        ValueError: Naming it.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"expected a name without a dot that torch.nn.ModuleDict takes in `adapter_name`, got {name!r}"
        )


def targets_of(config: TensorAdapterConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter is for, by name, without other adapters.

    Args:
        config: The settings of the adapter, with all names of targets.
        model: The model.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in model.named_modules()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    }


def take_all_linear_(config: TensorAdapterConfig, model: nn.Module) -> None:
    """Write out ``"all-linear"``: PEFT's names, without layers that are never called, and with adapted ones.

    Args:
        config: The settings of the adapter.
        model: The model.
    """
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    _maybe_include_all_linear_layers(config, model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = set(config.target_modules)
    for name, module in model.named_modules():
        if is_read_by_its_parent(module):
            names.discard(name)
        adapted = isinstance(module, TensorAdapterLayer) and not module.is_embedding
        if adapted and module is not head:
            names.add(name)
    config.target_modules = names  # type: ignore[assignment]  # PEFT wants a set


def check_targets(config: TensorAdapterConfig, targets: dict[str, nn.Module]) -> None:
    """Refuse layers that can have no adapter, and modes for a width that none of them has.

    Args:
        config: The settings of the adapter.
        targets: The layers by name.

    Raises:
        TypeError: Naming the layer.
        ValueError: Naming the width, and those that there are.
    """
    widths = set()
    for name, layer in targets.items():
        try:
            out_features, in_features = sizes_of(layer)
        except TypeError as error:
            raise TypeError(f"{error} in {name}") from error
        widths.update([out_features] if config.kind == "bottleneck" else [out_features, in_features])
    unknown = sorted((config.modes or {}).keys() - widths)
    if targets and unknown:
        raise ValueError(
            f"expected widths of the targets in `modes`, which are {sorted(widths)}, got modes for {unknown[0]}"
        )


def layers_with(model: nn.Module, adapter_name: str) -> list[str]:
    """The names of the layers that have an adapter.

    Args:
        model: The model.
        adapter_name: Name of the adapter.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TensorAdapterLayer)}
    return [name for name, layer in layers.items() if adapter_name in layer.tensor_adapter_update]


def take_out_(model: nn.Module, name: str, adapter_name: str) -> None:
    """Take an adapter out of a layer, which stays as it was without it.

    Args:
        model: The model.
        name: Name of the layer.
        adapter_name: Name of the adapter.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, TensorAdapterLayer)
    if len(layer.tensor_adapter_update) > 1:
        layer.delete_adapter(adapter_name)
    else:
        model.set_submodule(name, layer.base_layer)


def be_called_(model: nn.Module) -> None:
    """Keep torch's encoders from reading the weights of their layers past the adapters, which they do in evaluation.

    Args:
        model: The model.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, TensorAdapterLayer) for m in module.modules()
        ):
            module.use_nested_tensor = False  # only what reads the weights can take such tensors
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in module.children():
                if isinstance(layer, TensorAdapterLayer) and not layer._forward_pre_hooks:
                    layer.register_forward_pre_hook(_do_nothing)


def _do_nothing(layer: nn.Module, inputs: Any) -> None:
    """A hook, whose being there is what torch looks for."""


def no_targets(model: nn.Module, config: TensorAdapterConfig) -> NoMatchingPeftModuleError:
    """The error that no layer is a target.

    Args:
        model: The model.
        config: The settings of the adapter.
    """
    names = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear | Conv1D)]
    shown = ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} others" if names[_SHOWN:] else "")
    given = config.target_modules
    got = repr(given) if isinstance(given, str) or given is None else ", ".join(map(repr, sorted(given))) or "none"
    if config.exclude_modules:
        got += f" without `exclude_modules` {config.exclude_modules!r}"
    if config.layers_to_transform is not None:
        got += f" in the blocks {config.layers_to_transform!r} of `layers_to_transform`"
    return NoMatchingPeftModuleError(
        f"expected names of layers of the model in `target_modules`, such as {shown or 'none here'}, got {got}"
    )
