"""Whether training on the device is what it is on the CPU."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

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
    tf32,
)
from benchmarks.gpu.run import Finding, Place, set_sync_debug_mode
from tenzoo.callbacks import NormDynamicsMonitor
from tenzoo.data import CompletionDataModule
from tenzoo.tasks import SAM, CompletionTask

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

_LOGGED = 11
"""Steps from one that is logged to the next; what was logged stays in the progress bar, which reads it every time."""


def _images(place: Place) -> RandomImages:
    batch = place.pick(64, 8)
    return RandomImages(24 * batch, place.pick(32, 8), batch_size=batch)  # more batches than any check here takes


def against_cpu(place: Place) -> Iterator[Finding]:
    """The losses of the first steps, of every method in every precision, against float64 on the CPU.

    Rounding errors grow from step to step. In float32 they may be three times what they are on the CPU.
    """
    steps = place.pick(20, 2)
    with tf32(False):
        for method in METHODS:
            exact = _losses(CPU, place, method, "64-true", steps)
            rounded = _error(_losses(CPU, place, method, "32-true", steps), exact)
            bounds = {"64-true": 1e-8, "32-true": max(1e-3, 3 * rounded), "bf16-mixed": 5e-2, "16-mixed": 5e-2}
            for precision, bound in bounds.items():
                found = _losses(place, place, method, precision, steps)
                worst = _error(found, exact)
                yield Finding(
                    f"{method}, {precision}, {steps} steps of a tensor-ring ResNet-20, against CPU float64",
                    f"losses differ by at most {worst:.1e} of {exact[-1]:.3f}",
                    f"< {bound:.1e}",
                    len(found) == steps and worst < bound,
                )


def _losses(where: Place, place: Place, method: str, precision: str, steps: int) -> list[float]:
    """Of each step, computed in one place on the data of another."""
    sam, callbacks = METHODS[method]
    kept = Losses()
    task, settings = classification(sam=sam), precision_of(precision, where)
    fit(where, task, _images(place), steps, [*callbacks(), kept], **settings)
    return [float(value) for value in kept.values]


def _error(found: Sequence[float], exact: Sequence[float]) -> float:
    """The largest, relative."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))


def sam_at_zero(place: Place) -> Iterator[Finding]:
    """SAM without a radius is the plain optimizer, bit for bit."""
    for precision in _PRECISIONS:
        with deterministic():
            trained = [
                fit(place, classification(sam=sam), _images(place), place.pick(6, 2), **precision_of(precision, place))
                for sam in (None, SAM(0.0))
            ]
        wrong, all_of_them = differing(*trained)
        yield Finding(
            f"SAM(rho=0) against SGD, {precision}", f"{wrong} of {all_of_them} tensors differ", "0", wrong == 0
        )


class _NoWaiting(Callback):
    """Lets torch raise an error wherever the host waits for the device, from one logged step to the next."""

    def __init__(self, place: Place) -> None:
        self._place = place

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._place.real and batch_idx == _LOGGED + 1:
            set_sync_debug_mode("error")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._place.real and batch_idx == 2 * _LOGGED - 2:
            set_sync_debug_mode("default")


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
            set_sync_debug_mode("default")
    return Finding(f"waits of the host in steps {_LOGGED + 2} to {2 * _LOGGED - 1}, {name}", figure, "none", ok)


def _where(error: BaseException) -> str:
    """The place in this project, or else the innermost one."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename.split('site-packages/')[-1]}:{trace.tb_lineno}"
        found = place if "tenzoo" in place or not found else found
        trace = trace.tb_next
    return found
