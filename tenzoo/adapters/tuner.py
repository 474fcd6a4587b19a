"""The tuner that PEFT calls, and its entry in PEFT's lists."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
from torch import Tensor, nn

from tenzoo.adapters.config import TensorAdapterConfig
from tenzoo.adapters.layer import TensorAdapterLayer
from tenzoo.adapters.matrices import check_uniform_rank
from tenzoo.adapters.targets import (
    be_called_,
    check_adapter_name,
    check_targets,
    layers_with,
    no_targets,
    take_all_linear_,
    take_out_,
    targets_of,
)
from tenzoo.factorizations import Factorization

_NAME = "tensor_adapter"


class TensorAdapterModel(BaseTuner):  # type: ignore[misc]
    """A model with adapters made of cores; PEFT makes it from a :class:`TensorAdapterConfig`."""

    prefix = f"{_NAME}_"
    tuner_layer_cls = TensorAdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to all its targets, or to none.

        Args:
            model: The model.
            adapter_name: Name of the adapter, whose settings PEFT keeps in ``peft_config``.
            *args: As PEFT's.
            **kwargs: As PEFT's.

        Raises:
            TypeError: If a target is a layer that can have no adapter.
            ValueError: If the name cannot be one, no layer is a target, or the settings do not fit the layers.
        """
        check_adapter_name(adapter_name)
        before = set(layers_with(model, adapter_name))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_rank(model, adapter_name)
        except NoMatchingPeftModuleError:
            raise no_targets(model, self.peft_config[adapter_name]) from None
        except (TypeError, ValueError):
            for name in set(layers_with(model, adapter_name)) - before:
                take_out_(model, name, adapter_name)
            raise
        be_called_(model)

    def _check_rank(self, model: nn.Module, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        rank = config.r if config.rank is None else config.rank
        if config.factorization is not None and isinstance(rank, int):
            key = f".{_NAME}_update.{adapter_name}."
            named = model.named_modules()
            check_uniform_rank((part for name, part in named if key in name and isinstance(part, Factorization)), rank)

    def _prepare_model(self, peft_config: TensorAdapterConfig, model: nn.Module) -> None:
        # PEFT calls this when the targets are settled, and before it looks for them.
        take_all_linear_(peft_config, model)
        check_targets(peft_config, targets_of(peft_config, model))

    def _create_and_replace(
        self,
        peft_config: TensorAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        try:
            if isinstance(target, TensorAdapterLayer):
                target.update_layer(adapter_name, peft_config)
                return
            layer = TensorAdapterLayer(target, adapter_name, peft_config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} in {current_key}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the weights of all layers, or into none.

        Args:
            adapter_names: Which; the active ones by default.
            safe_merge: Refuse a result that is not finite.

        Raises:
            TypeError: If a weight is itself reconstructed from cores, or sharded over processes.
            ValueError: If an adapter is a bottleneck, or a result is not finite with ``safe_merge``.
        """
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(safe_merge, adapter_names)
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops these arguments where no tuner takes them.
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"expected no `{name}` with adapters of TensorAdapterConfig, which are the same for all samples of "
                    f"a batch, got {kwargs[name]!r}; choose one with set_adapter()"
                )
        yield

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, TensorAdapterLayer):
                with onload_layer(module):
                    module.check_merge(safe_merge, adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the name right before the last part of a key, and here a whole module follows it.
        return key.replace(f".{_NAME}_update.{adapter_name}.", f".{_NAME}_update.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: TensorAdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        own = {
            key: value for key, value in model.state_dict().items() if f".{_NAME}_update.{adapter_name}." in f".{key}"
        }
        given = {key: value for key, value in remapped.items() if f".{_NAME}_update." in key}
        _check_same(own, given)
        return remapped


def _check_same(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Refuse the weights of an adapter with other settings or for another model; PEFT would take what fits.

    Raises:
        ValueError: Naming a tensor that is missing, left over, or of another shape.
    """
    valid = f"the {len(own)} tensors of this adapter in the file of adapter weights"
    if missing := sorted(own.keys() - given.keys()):
        raise ValueError(f"expected {valid}, got none for {missing[0]!r} and {len(missing) - 1} others")
    if surplus := sorted(given.keys() - own.keys()):
        raise ValueError(f"expected {valid}, got {surplus[0]!r} and {len(surplus) - 1} others, which it does not have")
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"expected shape {tuple(own[key].shape)} for {key!r} in the file of adapter weights, got "
                f"{tuple(value.shape)}"
            )


def _register() -> None:
    """Enter the method in PEFT's lists. Its enumeration of methods is closed, so a member is added to it."""
    value = _NAME.upper()
    if value in PeftType.__members__:
        return
    kind: Any = PeftType
    member = str.__new__(kind, value)
    member._name_, member._value_ = value, value
    type.__setattr__(kind, value, member)
    kind._member_map_[value] = member
    kind._member_names_.append(value)
    kind._value2member_map_[value] = member
    register_peft_method(name=_NAME, config_cls=TensorAdapterConfig, model_cls=TensorAdapterModel)


_register()
