"""What stands in for an accelerator where there is none."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """CUDA tensors without a card and without values: forward passes only, since autograd asks for the card."""
    with FakeTensorMode():
        yield torch.device("cuda")


class _Literals(TorchFunctionMode):
    """Tensors that are made of Python's numbers on another device than the CPU, as copies that no dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[int, ...], bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and not args[0].is_cpu:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.seen += [(func, (len(each),), False) for each in index if isinstance(each, list)]
        device = torch.device(kwargs.get("device") or "cpu")
        if func in (torch.tensor, torch.as_tensor) and device.type != "cpu" and not isinstance(args[0], torch.Tensor):
            self.seen.append((func, (), False))
        return func(*args, **kwargs)


class Calls(TorchDispatchMode):
    """The operations that are dispatched, with the arguments and keyword arguments of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._literals = _Literals()

    def __enter__(self) -> "Calls":
        self._literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func._overloadpacket, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def operations(self) -> list[Any]:
        """What was computed: views are free."""
        return [name for name, *_ in self.seen if not _is_view(name)]

    def uploads(self) -> list[tuple[Any, tuple[int, ...], bool]]:
        """Operations that take tensors from the host to another device, their shapes, and whether the host goes on.

        A host's scalar among an accelerator's tensors is an argument of the kernel, and no copy.
        """
        found = list(self._literals.seen)
        for name, args, kwargs in self.seen:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            copied = kwargs.get("device") not in (None, torch.device("cpu")) or name is torch.ops.aten.copy_
            if copied or any(not tensor.is_cpu for tensor in tensors):
                host = [tensor for tensor in tensors if tensor.is_cpu and (copied or tensor.ndim)]
                found += [(name, tuple(tensor.shape), kwargs.get("non_blocking", False)) for tensor in host]
        return found

    def outer_products(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes of the batched matrix products that are outer products, or whose gradients are."""
        batched = [args for name, args, _ in self.seen if name is torch.ops.aten.bmm and args[0].is_cuda]
        return [(tuple(a.shape), tuple(b.shape)) for a, b in batched if 1 in (*a.shape[1:], b.shape[2])]


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class _Strategy(SingleDeviceStrategy):
    def teardown(self) -> None:
        pass  # nothing comes back from the meta device


class _EnoughError(Exception):
    pass


class _Watch(Callback):
    def __init__(self, calls: Calls, warmup: int, steps: int) -> None:
        self.calls, self.warmup, self.steps = calls, warmup, steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warmup:
            self.calls.__enter__()
        elif batch_idx == self.warmup + self.steps:
            self.calls.__exit__(None, None, None)
            raise _EnoughError


def steps_on_meta(module: LightningModule, batches: Any, callbacks: Iterable[Callback] = ()) -> Calls:
    """What two steps of training dispatch on the meta device, an accelerator that can only be given work.

    Whoever asks it for a number raises an error, as does a shape that depends on one. What is copied to it, or computed
    with it, from the host shows in :meth:`Calls.uploads`. The steps are not logged.
    """
    calls = Calls()
    strategy = _Strategy(device=torch.device("meta"), accelerator=_Accelerator())
    trainer = Trainer(
        strategy=strategy,
        callbacks=[_Watch(calls, warmup=2, steps=2), *callbacks],
        max_epochs=1,
        log_every_n_steps=50,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    generators = SimpleNamespace(get_rng_state=lambda device: None)
    with (
        mock.patch("lightning.pytorch.loops.fit_loop.has_len_all_ranks", return_value=True),
        mock.patch("torch.autocast", return_value=nullcontext()),  # which knows no meta device
        mock.patch("torch.get_device_module", return_value=generators),
    ):
        try:
            trainer.fit(module, batches)
        except _EnoughError:
            return calls
        finally:
            while torch.utils._python_dispatch._len_torch_dispatch_stack():  # an error within the steps
                calls.__exit__(None, None, None)
    raise AssertionError("training ended too early")


def _is_view(name: Any) -> bool:
    schemas = [getattr(name, overload)._schema for overload in name.overloads()]
    return all(any(r.alias_info is not None and not r.alias_info.is_write for r in s.returns) for s in schemas)
