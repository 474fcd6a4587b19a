"""Whether training on the device is what it is on the CPU."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from benchmarks.gpu.fits import (
    CPU,
    METHODS,
    Losses,
    RandomImages,
    classification,
    deterministic,
    differing,
    fit,
    precision_of,
    sgd,
)
from benchmarks.gpu.run import Finding, Place
from tenzoo.callbacks import NormDynamicsMonitor
from tenzoo.data import CompletionDataModule
from tenzoo.tasks import SAM, CompletionTask

_BOUNDS = {"32-true": 1e-3, "bf16-mixed": 5e-2, "16-mixed": 5e-2}
"""Largest difference of a loss in 20 steps, relative to it."""

_LOGGED = 11
"""Steps from one that is logged to the next; what was logged stays in the progress bar, which reads it every time."""


def _images(place: Place) -> RandomImages:
    batch = place.pick(64, 4)
    return RandomImages(24 * batch, place.pick(32, 8), batch_size=batch)  # more batches than any check here takes


def against_cpu(place: Place) -> Iterator[Finding]:
    """The losses of the first steps, of every method in every precision, against float32 on the CPU."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    steps = place.pick(20, 3)
    for method, (sam, callbacks) in METHODS.items():
        exact = Losses()
        fit(CPU, classification(sam=sam), _images(place), steps, [*callbacks(), exact])
        for precision, bound in _BOUNDS.items():
            found = Losses()
            settings = precision_of(precision, place)
            fit(place, classification(sam=sam), _images(place), steps, [*callbacks(), found], **settings)
            pairs = [(float(a), float(b)) for a, b in zip(found.values, exact.values, strict=True)]
            worst = max(abs(a - b) / b for a, b in pairs)
            yield Finding(
                f"{method}, {precision}, {steps} steps of a tensor-ring ResNet-20, against the CPU",
                f"losses differ by at most {worst:.1e} of {pairs[-1][1]:.3f}",
                f"< {bound:g}",
                len(pairs) == steps and worst < bound,
            )


def sam_at_zero(place: Place) -> Iterator[Finding]:
    """SAM without a radius is the plain optimizer, bit for bit."""
    deterministic(True)
    try:
        for precision in _BOUNDS:
            trained = [
                fit(place, classification(sam=sam), _images(place), place.pick(6, 2), **precision_of(precision, place))
                for sam in (None, SAM(0.0))
            ]
            wrong, all_of_them = differing(*trained)
            yield Finding(
                f"SAM(rho=0) against SGD, {precision}", f"{wrong} of {all_of_them} tensors differ", "0", wrong == 0
            )
    finally:
        deterministic(False)


class _NoWaiting(Callback):
    """Lets torch raise an error wherever the host waits for the device, from one logged step to the next."""

    def __init__(self, place: Place) -> None:
        self._place = place

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._place.real and batch_idx == _LOGGED + 1:
            torch.cuda.set_sync_debug_mode("error")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._place.real and batch_idx == 2 * _LOGGED - 2:
            torch.cuda.set_sync_debug_mode("default")


def without_waiting(place: Place) -> Iterator[Finding]:
    """Steps that are not logged never wait for the device, drawing the batches included."""
    steps = place.pick(2 * _LOGGED - 1, 2)
    problems: dict[str, Any] = {
        "network": (lambda sam: classification(sam=sam), lambda: _images(place)),
        "completion": (
            lambda sam: CompletionTask("tucker", 6, optimizer=sgd, sam=sam),
            lambda: CompletionDataModule(
                "synthetic", shape=(60, 50, 40), num_entries=20_000, batch_size=1024, steps_per_epoch=steps
            ),
        ),
    }
    for (problem, (task, data)), method in itertools.product(problems.items(), METHODS):
        sam, callbacks = METHODS[method]
        for precision in ("32-true", "bf16-mixed"):
            yield _waits(place, f"{problem}, {method}, {precision}", task(sam), data(), steps, callbacks(), precision)


def _waits(
    place: Place,
    name: str,
    task: LightningModule,
    data: LightningDataModule,
    steps: int,
    callbacks: list[Callback],
    precision: str,
) -> Finding:
    # The watch comes last: its hook at the end of a batch is to run after those of the others.
    watched = [*callbacks, NormDynamicsMonitor(), _NoWaiting(place)]
    figure, ok = ("none", True) if place.real else ("not measured", None)
    try:
        settings = {"log_every_n_steps": place.pick(_LOGGED, 1), "enable_progress_bar": True}
        fit(place, task, data, steps, watched, precision=precision, **settings)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        figure, ok = f"{_where(error)} waits", False
    finally:
        if place.real:
            torch.cuda.set_sync_debug_mode("default")
    return Finding(f"waits of the host in steps {_LOGGED + 2} to {2 * _LOGGED - 1}, {name}", figure, "none", ok)


def _where(error: BaseException) -> str:
    """The place in this project, or else the innermost one."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename.split('site-packages/')[-1]}:{trace.tb_lineno}"
        found = place if "tenzoo" in place or not found else found
        trace = trace.tb_next
    return found
