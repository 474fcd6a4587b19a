"""What stands in for an accelerator where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """CUDA tensors without a card and without values: forward passes only, since autograd asks for the card."""
    with FakeTensorMode():
        yield torch.device("cuda")


class Calls(TorchDispatchMode):
    """The operations that are dispatched, with the arguments and keyword arguments of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func._overloadpacket, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def operations(self) -> list[Any]:
        """What was computed: views are free."""
        return [name for name, *_ in self.seen if not _is_view(name)]

    def uploads(self) -> list[tuple[Any, tuple[int, ...], bool]]:
        """Operations that take tensors from the host to another device, their shapes, and whether the host goes on."""
        found = []
        for name, args, kwargs in self.seen:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            target = kwargs.get("device") or next((t.device for t in tensors if not t.is_cpu), torch.device("cpu"))
            if target.type != "cpu":
                found += [(name, tuple(t.shape), kwargs.get("non_blocking", False)) for t in tensors if t.is_cpu]
        return found

    def outer_products(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes of the batched matrix products that are outer products, or whose gradients are."""
        batched = [args for name, args, _ in self.seen if name is torch.ops.aten.bmm and args[0].is_cuda]
        return [(tuple(a.shape), tuple(b.shape)) for a, b in batched if 1 in (*a.shape[1:], b.shape[2])]


def _is_view(name: Any) -> bool:
    schemas = [getattr(name, overload)._schema for overload in name.overloads()]
    return all(any(r.alias_info is not None and not r.alias_info.is_write for r in s.returns) for s in schemas)
