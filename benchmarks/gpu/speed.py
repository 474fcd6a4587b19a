"""What steps and passes take, in time, kernels and memory."""

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from benchmarks.gpu.fits import Losses, RandomImages, classification, fit, network, tf32, trainer_of
from benchmarks.gpu.run import Finding, Place
from benchmarks.loops import BareLoop, FitLoop, TakeTurns, interleave, quiet
from benchmarks.report import Ratio, spread
from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.data import CompletionDataModule
from tenzoo.tasks import SAM, CompletionTask

_VARIANTS: dict[str, tuple[str | None, SAM | None, Callable[[], list[Callback]]]] = {
    "dense": (None, None, list),
    "TR": ("tr", None, list),
    "TR + DAS": ("tr", None, lambda: [DeviationAwareScaling(0.01)]),
    "TR + SAM": ("tr", SAM(0.05), list),
    "TR + monitor": ("tr", None, lambda: [NormDynamicsMonitor()]),
    "TR + monitor, logged": ("tr", None, lambda: [NormDynamicsMonitor()]),
}
"""For each variant its format, settings of SAM, and callbacks."""

_LIMITS = {"TR + DAS": 1.1, "TR + SAM": 2.2, "TR + monitor": 1.05}
"""The most that the time of a variant may be of that of TR; in the last variant each step is logged."""

_MONITORED = 400
"""The most kernels that a logged step of the monitor may add."""


class Stopwatch(Callback):
    """Times a window of steps, counts the kernels of another one, and keeps the peak of the memory.

    The memory is what is taken beside that of before: a run that was not cleared away does not count.
    """

    def __init__(self, place: Place, *, warmup: int, steps: int) -> None:
        self._place, self._warmup, self._steps = place, warmup, steps
        self._begin, self._profile = 0.0, profile(activities=[ProfilerActivity.CUDA])
        self.ms, self.kernels, self.peak = 0.0, 0, 0
        gc.collect()
        self._before = torch.cuda.memory_allocated() if place.real else 0

    @property
    def batches(self) -> int:
        """How many it needs: two are counted, after those that are timed."""
        return self._warmup + self._steps + 3

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1 - self._warmup
        if done in (0, self._steps):
            self._place.wait()
        if done == 0:
            if self._place.real:
                torch.cuda.reset_peak_memory_stats()
            self._begin = time.perf_counter()
        elif done == self._steps:
            self.ms = (time.perf_counter() - self._begin) / self._steps * 1e3
            if self._place.real:
                self.peak = torch.cuda.max_memory_allocated() - self._before
                self._profile.start()
        elif done == self._steps + 2 and self._place.real:
            self._place.wait()
            self._profile.stop()
            self.kernels = _kernels(self._profile) // 2


def _kernels(profiled: profile) -> int:
    on_card = [event for event in profiled.events() if event.device_type.name == "CUDA"]  # type: ignore[no-untyped-call]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_card)


def steps(place: Place) -> Iterator[Finding]:
    """A step of training, with drawing its batch: kernels and memory, and milliseconds of variants in turns."""
    for batch, precision in itertools.product((place.pick(128, 4), place.pick(1024, 8)), ("32-true", "bf16-mixed")):
        with tf32(True):
            watches = {name: _watched(place, name, batch, precision) for name in _VARIANTS}
            times = _in_turns(place, batch, precision)
        for name, watch in watches.items():
            yield _step(place, f"step of {name}, batch {batch}, {precision}", name, watch, watches["TR"], times)


def _watched(place: Place, name: str, batch: int, precision: str) -> Stopwatch:
    watch = Stopwatch(place, warmup=place.pick(3, 1), steps=1)
    with quiet():
        _training(place, name, batch, precision, watch.batches, watch)()
    return watch


def _training(
    place: Place, name: str, batch: int, precision: str, steps: int, *callbacks: Callback
) -> Callable[[], None]:
    """What trains a variant for so many steps."""
    factorization, sam, others = _VARIANTS[name]
    data = RandomImages(batch * steps, place.pick(32, 8), batch_size=batch)
    task = classification(factorization, sam)
    every = 1 if name.endswith("logged") else 10**6
    trainer = trainer_of(place, steps, [*others(), *callbacks], precision=precision, log_every_n_steps=every)
    return functools.partial(trainer.fit, task, data)


def _in_turns(place: Place, batch: int, precision: str) -> dict[str, list[float]]:
    """Seconds per step of each variant, round by round, so that all of them see the same machine."""
    warmup, rounds, window = place.pick(5, 1), place.pick(7, 1), place.pick(4, 1)
    with quiet():
        loops = {
            name: FitLoop(
                _training(
                    place, name, batch, precision, warmup + rounds * window, TakeTurns(warmup, window, place.wait)
                )
            )
            for name in _VARIANTS
        }
        return interleave(loops, rounds)


def _step(
    place: Place, title: str, name: str, watch: Stopwatch, plain: Stopwatch, times: Mapping[str, Sequence[float]]
) -> Finding:
    ms = statistics.median(times[name]) * 1e3
    figure = f"{ms:.2f} ms, {watch.kernels} kernels, {watch.peak / 2**20:.0f} MiB"
    if not place.real or name == "dense":
        return Finding(title, figure if place.real else "not measured", "")
    if name == "TR":
        return Finding(title, f"{figure}; {_ratio(times, name, 'dense')} × dense", "")
    if name in _LIMITS:
        limit = _LIMITS[name]
        ratio = Ratio.of(times, name, "TR").median
        return Finding(title, f"{figure}; {_ratio(times, name, 'TR')} × TR", f"≤ {limit:g} × TR", ratio <= limit)
    added = watch.kernels - plain.kernels
    return Finding(title, f"{figure}; {added} kernels more than TR", f"≤ {_MONITORED} more", added <= _MONITORED)


def _ratio(times: Mapping[str, Sequence[float]], name: str, other: str) -> str:
    """The median within a round, with the smallest and the largest."""
    return spread(Ratio.of(times, name, other).values)


def completion(place: Place) -> Iterator[Finding]:
    """A large tensor, with dense and with sparse gradients: times, and the losses of the CPU."""
    count, batch = place.pick(1_000_000, 500), place.pick(65_536, 100)
    shape = (place.pick(10_000, 100), place.pick(10_000, 90), place.pick(100, 80))
    optimizers: dict[str, Callable[..., Any]] = {
        "SGD, sparse gradients": functools.partial(torch.optim.SGD, lr=0.1),
        "SparseAdam": functools.partial(torch.optim.SparseAdam, lr=0.01),
        "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    }
    for factorization in ("cp", "tt"):
        for name, optimizer in optimizers.items():
            losses = {}
            watch = Stopwatch(place, warmup=place.pick(5, 1), steps=place.pick(15, 1))
            for where in (place, Place(torch.device("cpu"))):
                data = CompletionDataModule(
                    "synthetic",
                    shape=shape,
                    num_entries=count,
                    observed_fraction=1.0,
                    validation_fraction=0.0,
                    batch_size=batch,
                    steps_per_epoch=watch.batches,
                )
                kept, few = Losses(), where.device.type == "cpu" and place.real
                torch.manual_seed(0)
                task = CompletionTask(factorization, 8, shape=shape, optimizer=optimizer)
                watching: list[Callback] = [kept] if few else [kept, watch]
                fit(where, task, data, 4 if few else watch.batches, watching)
                losses[where.device.type, few] = [float(value) for value in kept.values[:4]]
            (found, *_), (*_, exact) = losses.values(), losses.values()
            worst = max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))
            yield Finding(
                f"completion of {'×'.join(map(str, shape))} as {factorization}, {name}, batch {batch}",
                (f"{watch.ms:.2f} ms, {watch.kernels} kernels; " if place.real else "")
                + f"losses differ from the CPU's by {worst:.1e}",
                "< 1e-3",
                worst < 1e-3,
            )


_FORMATS = {"dense": None, "TR": "tr", "TT": "tt", "Tucker": "tucker", "CP": "cp"}


def evaluation(place: Place) -> Iterator[Finding]:
    """A pass without gradients, which keeps the rebuilt weights, against the dense network's."""
    images = torch.randn(place.pick(500, 2), 3, place.pick(32, 8), place.pick(32, 8), device=place.device)
    models = {name: network(factorization).to(place.device).eval() for name, factorization in _FORMATS.items()}
    loops = {
        name: BareLoop(functools.partial(_passes, place, model, images), steps=1, warmup=2)
        for name, model in models.items()
    }
    with tf32(True):
        times = interleave(loops, place.pick(7, 1))
        peaks = {name: _peak(place, model, images) for name, model in models.items()}
    for name in list(_FORMATS)[1:]:
        ms, peak, dense = statistics.median(times[name]) * 1e3 / _PASSES, peaks[name], peaks["dense"]
        ratio = Ratio.of(times, name, "dense").median
        yield place.judged(
            f"evaluation of {name}, batch {len(images)}",
            f"{ms:.2f} ms, {_ratio(times, name, 'dense')} × dense; "
            f"peak {peak / 2**20:.0f} MiB, dense {dense / 2**20:.0f} MiB",
            "time ≤ 1.1 × dense, peak ≤ 1.1 × dense",
            ratio <= 1.1 and peak <= 1.1 * dense,
        )


_PASSES = 10
"""In a turn."""


def _passes(place: Place, model: torch.nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        for _ in range(place.pick(_PASSES, 1)):
            model(images)
    place.wait()


def _peak(place: Place, model: torch.nn.Module, images: torch.Tensor) -> int:
    """Bytes of a pass, beside what was there before."""
    if not place.real:
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(images)
    place.wait()
    return torch.cuda.max_memory_allocated() - before
