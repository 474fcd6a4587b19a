"""Training loops that take turns: a window of steps each, so that all of them see the same machine."""

import contextlib
import gc
import io
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol
from unittest import mock

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class Loop(Protocol):
    """What can be timed in turns."""

    def start(self) -> None:
        """Everything up to the first step that counts."""

    def window(self) -> float:
        """Do a window of steps; seconds per step."""

    def finish(self) -> None:
        """Everything after the last step that counts."""


class BareLoop:
    """Calls a function again and again.

    Args:
        step: What to time.
        steps: Calls per window.
        warmup: Calls before the first window.
    """

    def __init__(self, step: Callable[[], object], *, steps: int, warmup: int) -> None:
        self._step, self._steps, self._warmup = step, steps, warmup

    def start(self) -> None:
        """Warm up."""
        for _ in range(self._warmup):
            self._step()

    def window(self) -> float:
        """Time the calls of a window."""
        begin = time.perf_counter()
        for _ in range(self._steps):
            self._step()
        return (time.perf_counter() - begin) / self._steps

    def finish(self) -> None:
        """Nothing is left to do."""


class FitLoop(threading.Thread):
    """A fit that stands still between its windows.

    It runs in a thread of its own, at no time beside another one: whoever asks for a window waits for it. Between the
    windows the fit waits inside :class:`TakeTurns`, so neither start-up nor validation nor what comes after training
    is ever timed.

    Args:
        fit: Trains for ``warmup + rounds · steps`` batches, with a :class:`TakeTurns` among the callbacks.
    """

    def __init__(self, fit: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._fit = fit
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self.seconds = 0.0
        """Per step, in the last window."""

    def run(self) -> None:
        """The thread's work."""
        self._go.acquire()
        try:
            self._fit()
        except BaseException as error:  # shown by whoever waits
            self._error = error
        finally:
            self._back.release()

    def pause(self) -> None:
        """In the thread: let the others go on, until it is this one's turn again."""
        self._back.release()
        self._go.acquire()

    def _turn(self) -> None:
        if self._error is None:
            self._go.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error

    def start(self) -> None:
        """Start the fit and let it warm up."""
        super().start()
        self._turn()

    def window(self) -> float:
        """Let the fit do a window of steps."""
        self._turn()
        return self.seconds

    def finish(self) -> None:
        """Let the fit come to its end."""
        self._turn()
        self.join()


class TakeTurns(Callback):
    """Times each window of an epoch, from the end of one batch to the end of another, and pauses in between.

    Args:
        warmup: Batches before the first window.
        steps: Batches per window.
        wait: Returns when the device has done all it was given; a window begins and ends with it.
    """

    def __init__(self, warmup: int, steps: int, wait: Callable[[], None] = lambda: None) -> None:
        self._warmup, self._steps, self._wait = warmup, steps, wait
        self._begin = 0.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1 - self._warmup
        if done < 0 or done % self._steps:
            return
        loop = threading.current_thread()
        assert isinstance(loop, FitLoop)
        self._wait()
        loop.seconds = (time.perf_counter() - self._begin) / self._steps
        loop.pause()
        self._begin = time.perf_counter()


def interleave(loops: Mapping[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every loop, one per round; each round goes once through all loops, in their order."""
    for loop in loops.values():
        loop.start()
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        gc.collect()
        for name, loop in loops.items():
            times[name].append(loop.window())
    for loop in loops.values():
        loop.finish()
    return times


class _Terminal(io.TextIOBase):
    """Takes everything and shows nothing, but passes for a terminal: a progress bar draws on nothing else."""

    @override
    def write(self, text: str) -> int:
        return len(text)

    @override
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what training prints, logs and warns of out of the report."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    terminal = mock.patch.dict(os.environ, {"TERM": "xterm"})
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(_Terminal()), terminal:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
