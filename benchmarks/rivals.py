"""The same networks and layers by TedNet and tltorch, which the extra ``bench`` installs."""

import contextlib
import functools
import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.reconstruct import tltorch_library
from benchmarks.steps import Step
from tenzoo.models import CIFARResNet

_TEDNET = {
    "TR 10": ("tensor_ring", "TRResNet20", 10),
    "BlockTT 12": ("tensor_train", "TTResNet20", 12),  # TedNet calls it TT
    "Tucker 16": ("tucker2", "TK2ResNet20", 16),
    "CP 50": ("cp", "CPResNet20", 50),
}
_TLTORCH: dict[str, tuple[str, Any]] = {
    "TT 16": ("tt", [1, 16, 16, 16, 1]),
    "Tucker 16": ("tucker", [16, 16, 3, 3]),
    "CP 50": ("cp", 50),
}
IMPLEMENTATIONS = ("factorized", "reconstructed")
"""Those of tltorch."""


@contextlib.contextmanager
def tltorch_if_installed() -> Iterator[None]:
    """TensorLy computes with torch, as tltorch needs it in every call; without tltorch nothing happens."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            stack.enter_context(tltorch_library())
        yield


def tltorch_layer(kind: str, *args: Any, **kwargs: Any) -> nn.Module:
    """A layer of tltorch with random cores."""
    layer: nn.Module = getattr(importlib.import_module("tltorch"), kind)(*args, **kwargs)
    layer.reset_parameters()  # type: ignore[operator]
    return layer


def try_rival(steps: dict[str, Step], skipped: list[str], name: str, make: Callable[[], Step]) -> None:
    """Add a rival's step once it has run; a rival that is not installed, or fails, is skipped, and the reason noted."""
    try:
        step = make()
        step()
    except Exception as error:  # each has its own
        reason = " ".join(str(error).split())
        skipped.append(f"{name} ({type(error).__name__}: {reason[:120]})")
    else:
        steps[name] = step


def note_on(skipped: list[str]) -> str:
    """A sentence on what was skipped, for the end of a note."""
    return f" Skipped: {'; '.join(skipped)}." if skipped else ""


def rival_networks(depth: int) -> dict[str, Callable[[], nn.Module]]:
    """What makes each of them, under its name: TedNet's own ResNet-20, and our ResNet with tltorch's convolutions."""
    networks: dict[str, Callable[[], nn.Module]] = {
        f"TedNet {name}": functools.partial(_tednet, *case) for name, case in _TEDNET.items()
    }
    for name, (factorization, rank) in _TLTORCH.items():
        for implementation in IMPLEMENTATIONS:
            make = functools.partial(_with_tltorch, depth, factorization, rank, implementation)
            networks[f"tltorch {name}, {implementation}"] = make
    return networks


def _tednet(module: str, network: str, rank: int) -> nn.Module:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints a line per layer
        warnings.simplefilter("ignore")
        made: nn.Module = getattr(importlib.import_module(f"tednet.tnn.{module}"), network)([rank] * 7, 10)
    return made


def _with_tltorch(depth: int, factorization: str, rank: Any, implementation: str) -> nn.Module:
    network = CIFARResNet(depth)
    convolutions = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    for name, layer in convolutions:
        made = tltorch_layer(
            "FactorizedConv",
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride[0],
            padding=1,
            factorization=factorization,
            rank=_clipped(rank, layer) if factorization == "tucker" else rank,
            implementation=implementation,
        )
        network.set_submodule(name, made)
    return network


def _clipped(rank: list[int], layer: nn.Conv2d) -> list[int]:
    return [min(r, size) for r, size in zip(rank, layer.weight.shape, strict=True)]
