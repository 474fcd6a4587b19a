"""Formats, layers and compression against the CPU in float64."""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.fits import network, tf32
from benchmarks.gpu.run import Finding, Place
from tenzoo.compression import apply_, plan
from tenzoo.factorizations import FACTORIZATIONS
from tenzoo.layers import TensorizedConv2d, TensorizedEmbedding, TensorizedLinear

_BOUNDS = {False: 1e-5, True: 2e-3}
"""Largest relative error in float32, without and with TF32."""


def against_float64(place: Place) -> Iterator[Finding]:
    """Output and gradients of every format, layer and implementation, without TF32 and with it."""
    size = place.pick(16, 1)
    cases: dict[str, Callable[[str], tuple[nn.Module, Sequence[Tensor]]]] = {
        "conv": lambda name: (
            TensorizedConv2d(4 * size, 8 * size, 3, padding=1, factorization=name, rank=6),
            (torch.randn(place.pick(32, 2), 4 * size, 8, 8),),
        ),
        "linear": lambda name: (
            TensorizedLinear(16 * size, 8 * size, factorization=name, rank=6),
            (torch.randn(place.pick(256, 3), 16 * size),),
        ),
        "embedding": lambda name: (
            TensorizedEmbedding(300 * size, 16 * size, factorization=name, rank=6),
            (torch.randint(300 * size, (place.pick(512, 5),)),),
        ),
        "rebuilt": lambda name: (FACTORIZATIONS[name]((6 * size, 5, 4, 8), 6), ()),
        "entries": lambda name: (
            _Entries(FACTORIZATIONS[name]((100 * size, 50, 40, 80), 20)),
            (torch.stack([torch.randint(n, (place.pick(4096, 7),)) for n in (100 * size, 50, 40, 80)], 1),),
        ),
    }
    for on in (False, True):
        for kind, make in cases.items():
            with tf32(on):
                errors = {each: error for name in FACTORIZATIONS for each, error in _errors(place, name, make).items()}
            worst = max(errors, key=lambda each: errors[each])
            yield Finding(
                f"{kind}, {len(errors)} cases, TF32 {'on' if on else 'off'}, against CPU float64",
                f"relative error at most {errors[worst]:.1e} ({worst})",
                f"< {_BOUNDS[on]:g}",
                errors[worst] < _BOUNDS[on],
            )


class _Entries(nn.Module):
    def __init__(self, tensor: nn.Module) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, index: Tensor) -> Tensor:
        entries: Tensor = self.tensor.entries(index)  # type: ignore[operator]
        return entries


def _errors(place: Place, name: str, make: Callable[[str], tuple[nn.Module, Sequence[Tensor]]]) -> dict[str, float]:
    """The largest relative error of output and gradients, by implementation."""
    torch.manual_seed(0)
    module, inputs = make(name)
    exact = _results(copy.deepcopy(module).double(), [x.double() if x.is_floating_point() else x for x in inputs])
    errors = {}
    for way in ("reconstruct", "contract") if hasattr(module, "implementation") else ("only",):
        if way != "only":
            module.implementation = way  # type: ignore[assignment]
        found = _results(copy.deepcopy(module).to(place.device), [x.to(place.device) for x in inputs])
        errors[f"{name}, {way}"] = max(_relative(a, b) for a, b in zip(found, exact, strict=True))
    return errors


def _results(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    output = module(*inputs)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).to(output.device).view_as(output)
    wanted = [*module.parameters(), *(x for x in inputs if x.requires_grad)]
    return [output, *torch.autograd.grad((output * weight).sum() + output.square().sum(), wanted)]


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm())


def compression(place: Place) -> Iterator[Finding]:
    """Decompositions, plans and compressed networks, made on the device."""
    size = place.pick(128, 8)
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, size)
    weight = torch.exp(-(ramp[:, None, None] - ramp[None, :, None]).abs() - torch.linspace(0, 1, 9))
    weight = weight + 0.01 * torch.randn(size, size, 9)
    for name, kind in FACTORIZATIONS.items():
        tensor = weight.reshape(size, size, 3, 3) if name == "btt" else weight
        rank = place.pick(12, 3)
        error = [
            _relative(kind.decompose(each, rank).reconstruct().detach(), tensor.double())
            for each in (tensor, tensor.to(place.device))
        ]
        begin = time.perf_counter()
        kind.decompose(tensor.to(place.device), rank)
        place.wait()
        yield Finding(
            f"decompose {tuple(tensor.shape)} as {name}",
            f"error {error[1]:.4f}, on the CPU {error[0]:.4f}; {time.perf_counter() - begin:.2f} s",
            "at most 1 % above the CPU's",
            error[1] <= 1.01 * error[0] + 1e-6,
        )
    images = torch.randn(place.pick(64, 4), 3, place.pick(32, 8), place.pick(32, 8))
    for name, calibrated in itertools.product(("tt", "tucker"), (False, True)):
        yield _compressed(place, name, images.to(place.device), calibrated)


def _compressed(place: Place, name: str, images: Tensor, calibrated: bool) -> Finding:
    model = network(None).to(place.device).eval()
    before = sum(p.numel() for p in model.parameters())
    given: dict[str, Any] = {"calibration" if calibrated else "example_input": images}
    begin = time.perf_counter()
    made = plan(model, factorization=name, budget=0.5, **given)
    apply_(model, made, **given)
    place.wait()
    seconds = time.perf_counter() - begin
    after = sum(p.numel() for p in model.parameters())
    elsewhere = [p for p in model.parameters() if p.device.type != place.device.type]
    with torch.no_grad():
        finite = bool(model(images).isfinite().all())
    return Finding(
        f"plan and apply_ as {name}{', calibrated' if calibrated else ''}",
        f"{after / before:.3f} of the parameters, {len(elsewhere)} on another device, {seconds:.1f} s",
        "at most .5 of them, all on the device, finite outputs",
        after <= 0.5 * before and not elsewhere and finite,
    )
