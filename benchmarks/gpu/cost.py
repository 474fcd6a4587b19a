"""The rates of a device that the choice between rebuilding and contracting rests on."""

import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.run import Finding, Place
from tenzoo.layers.cost import RATES


def rates(place: Place) -> Iterator[Finding]:
    """Multiplications, numbers moved and operations started in a second; only their proportions matter."""
    size, device = place.pick(4096, 32), place.device
    a = torch.randn(size, size, device=device)
    b = torch.randn(size * size * place.pick(4, 1), device=device)
    tiny = torch.randn(1, device=device)
    known = RATES[device.type]
    products = {}
    for name, dtype, precision in (
        ("float32", a.dtype, "highest"),
        ("TF32", a.dtype, "high"),
        ("bf16", torch.bfloat16, "high"),
    ):
        torch.set_float32_matmul_precision(precision)
        matrix = a.to(dtype)
        products[name] = size**3 / _seconds(place, lambda matrix=matrix: matrix @ matrix, 20)  # type: ignore[misc]
    elements = 2 * b.numel() / _seconds(place, lambda: b + 1, 20)
    launches = 1 / _seconds(place, lambda: tiny.add_(1), 2000)
    measured = {**{f"products in {name}": rate for name, rate in products.items()}}
    for name, rate, own in (
        *((name, rate, known.multiplications) for name, rate in measured.items()),
        ("numbers moved", elements, known.elements),
        ("operations started", launches, known.launches),
    ):
        figure = f"{rate:.1e} a second" if place.real else "not measured"
        yield Finding(name, figure, f"{own:.1e} in tenzoo.layers.cost")


def _seconds(place: Place, step: Callable[[], object], repeats: int) -> float:
    repeats = repeats if place.real else 1
    for _ in range(3):
        step()
    place.wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    place.wait()
    return (time.perf_counter() - begin) / repeats
