"""Adapters in several processes: the frozen base is sharded, and what is trained stays whole."""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakMethod

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from torch.autograd import Variable

from tenzoo.dynamics import by_device_and_dtype, is_distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_frozen_(model: nn.Module, mesh: "DeviceMesh") -> None:
    """Shard the frozen parameters of a model over processes with FSDP2. What is trained stays whole on each of them.

    Call it in ``configure_model`` of a LightningModule under ``ModelParallelStrategy``. The modules in the lists of the
    model are its blocks. Each block is gathered while it runs, and the rest of the model as one more block.

    Trained parameters, and those of all adapters, start with the values of the first process. At the end of a backward
    pass their gradients become the mean over the processes, as under DDP. Norms of cores need no communication.

    A second call takes in adapters that were added after the first one.

    Args:
        model: The module that is called. All trained parameters lie in it.
        mesh: The processes. A mesh of two dimensions replicates over the first and shards over the second.

    Raises:
        TypeError: If ``mesh`` is not a ``DeviceMesh``.
        ValueError: If no parameter is frozen, an adapter is merged, a parameter is sharded already or has no values, or
            a trained embedding has sparse gradients.

    Example:
        >>> from lightning import LightningModule
        >>> class Tuned(LightningModule):
        ...     def configure_model(self):
        ...         shard_frozen_(self.network, self.device_mesh["data_parallel"])
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"expected a DeviceMesh in `mesh`, got a {type(mesh).__name__}")
    whole = _whole_parameters(model)
    _check_trained(model, whole)
    if not isinstance(model, FSDPModule):
        _check_frozen(model, whole)
        for part in [*_blocks(model, whole), model]:
            fully_shard(part, mesh=mesh, ignored_params=whole)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
    average = _averages.setdefault(model, _GradientAverage(mesh))
    new = average.take([parameter for parameter in model.parameters() if parameter in whole])
    _take_from_first_([*new, *(buffer for buffer in model.buffers() if not buffer.is_meta)], mesh)


class _GradientAverage:
    """Averages gradients over the processes of a mesh, with one all-reduce at the end of each backward pass.

    A gradient that is accumulated over several passes is averaged after each of them. The part that is the same on all
    processes does not change by that.
    """

    def __init__(self, mesh: "DeviceMesh") -> None:
        self._mesh = mesh
        self._parameters: list[nn.Parameter] = []
        self._pass = -1

    def take(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Average the gradients of these parameters from now on, while they are trained.

        Returns:
            Those that are new.
        """
        known = set(self._parameters)
        waits = WeakMethod(self._await_end)  # a hook that holds the parameters would keep them in memory for good

        def hook(_: Tensor) -> None:
            if wait := waits():
                wait()

        new = [parameter for parameter in parameters if parameter not in known]
        for parameter in new:
            if parameter.is_floating_point() or parameter.is_complex():
                trained = parameter.requires_grad
                parameter.requires_grad_(True)  # for a hook, which waits until the parameter is trained
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                parameter.requires_grad_(trained)
        self._parameters = parameters
        return new

    def _await_end(self) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass = current
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        for (parameters,) in by_device_and_dtype(trained):
            self._average_alike(parameters)

    def _average_alike(self, parameters: list[Tensor]) -> None:
        """Average the gradients of parameters of one device and dtype.

        A missing gradient counts as 0 where another process has one, and stays missing where none has.
        """
        sizes = [parameter.numel() for parameter in parameters]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        missing = [p for p in parameters if p.grad is None]
        present = parts[0].new_ones(len(parts))
        if missing:
            present.copy_(torch.tensor([p.grad is not None for p in parameters]))
        flat = torch.cat([*(part.reshape(-1) for part in parts), present]).div_(self._mesh.size())
        for dim in range(self._mesh.ndim):
            torch.distributed.all_reduce(flat, group=self._mesh.get_group(dim))
        *means, present = flat.split_with_sizes([*sizes, len(parts)])
        torch._foreach_copy_(parts, [mean.view_as(part) for mean, part in zip(means, parts, strict=True)])
        if missing:
            for parameter, part, somewhere in zip(parameters, parts, present.tolist(), strict=True):
                parameter.grad = part if somewhere else None


_averages: WeakKeyDictionary[nn.Module, _GradientAverage] = WeakKeyDictionary()


def _whole_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that are trained, or will be when another adapter is active, and what FSDP2 and PEFT need whole.

    FSDP2 shards no scalars. PEFT copies modules that it trains anew, and saves the tables of adapted embeddings.
    """
    found = {parameter for parameter in model.parameters() if parameter.requires_grad or parameter.ndim == 0}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            found.update(module.parameters())
        elif isinstance(module, BaseTunerLayer):
            adapters = [getattr(module, part) for part in module.adapter_layer_names]
            found.update(p for each in adapters if isinstance(each, nn.Module) for p in each.parameters())
        if isinstance(module, BaseTunerLayer) and name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES:
            found.update(module.get_base_layer().parameters())
    return found


def _blocks(module: nn.Module, whole: Collection[nn.Parameter]) -> Iterator[nn.Module]:
    """The outermost modules that lie in lists and have parameters to shard."""
    in_list = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        runs = not isinstance(child, nn.ModuleList | nn.ModuleDict)
        if in_list and runs and any(parameter not in whole for parameter in child.parameters()):
            yield child
        else:
            yield from _blocks(child, whole)


def _check_trained(model: nn.Module, whole: Collection[nn.Parameter]) -> None:
    for name, parameter in model.named_parameters():
        if parameter in whole and is_distributed(parameter):
            raise ValueError(
                f"expected whole parameters to train in `model`, got {name!r}, which is sharded; call "
                "shard_frozen_() without fully_shard(), and after all that is trained is in place"
            )
        if parameter in whole and parameter.is_meta:
            raise ValueError(f"expected parameters with values to train in `model`, got {name!r} on the meta device")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"expected no merged adapters in `model`, got one in {name!r}; call unmerge_adapter() before"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"expected dense gradients in `model`, got the sparse ones of {name!r}; make it with sparse=False"
            )


def _check_frozen(model: nn.Module, whole: Collection[nn.Parameter]) -> None:
    frozen = {name: parameter for name, parameter in model.named_parameters() if parameter not in whole}
    if not frozen:
        raise ValueError("expected frozen parameters in `model`, got none; shard what is trained with fully_shard()")
    if sharded := [name for name, parameter in frozen.items() if is_distributed(parameter)]:
        raise ValueError(
            f"expected whole parameters in `model`, got {sharded[0]!r}, which is sharded; call shard_frozen_() without "
            "fully_shard()"
        )


@torch.no_grad()
def _take_from_first_(tensors: Sequence[Tensor], mesh: "DeviceMesh") -> None:
    """Move tensors to the device of a mesh, and give them the values of its first process."""
    for tensor in tensors:
        tensor.data = tensor.data.to(mesh.device_type)
    for (alike,) in by_device_and_dtype(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        for dim in range(mesh.ndim):
            torch.distributed.broadcast(flat.view(torch.uint8), group=mesh.get_group(dim), group_src=0)
        values = flat.split_with_sizes([tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [value.view_as(tensor) for value, tensor in zip(values, alike, strict=True)])
