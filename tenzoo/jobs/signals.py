"""Signals that ask a run to stop: it saves where a batch ends, and stops in all processes together."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from typing_extensions import override

from tenzoo.atomic import atomic_write
from tenzoo.jobs.places import model_checkpoints
from tenzoo.jobs.slurm import requeue

SAVED_AS = "preempted.ckpt"
"""Name of the checkpoint of a run that was asked to stop, in the folder of its checkpoints."""


class Preempted(SystemExit):
    """A signal asked the run to stop; its code is 128 and the signal's number, as of a program that was killed."""


class Signals(_SignalConnector):
    """Notes signals and does nothing else: whatever they interrupt, a save or a step of SAM, ends in peace.

    In place of Lightning's handlers, which save in the middle of a step, and talk to other processes from wherever
    they interrupted this one.

    Args:
        trainer: Whose handlers these are.
        pointer: A file that tells the next start of this Slurm job where it goes on. Without it the checkpoint itself
            lies where Lightning looks for one.
    """

    def __init__(self, trainer: Trainer, *, pointer: Path | None = None) -> None:
        super().__init__(trainer)
        self.pointer = pointer
        self.noted = 0
        """Number of the signal that was received, 0 without one."""
        self._process = os.getpid()

    @property
    def slurm(self) -> SLURMEnvironment | None:
        """The Slurm job that requeues itself, if this is one."""
        environment = self.trainer._accelerator_connector.cluster_environment
        return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None

    @override
    def register_signal_handlers(self) -> None:
        self.noted, self._process = 0, os.getpid()
        self.received_sigterm = False  # Lightning would stop by itself, without saving
        self._watch(signal.SIGTERM)
        number = None if self.slurm is None else self.slurm.requeue_signal
        if number is not None and not self._has_already_handler(number):
            self._watch(number)

    def _watch(self, number: signal.Signals) -> None:
        self._original_handlers.setdefault(number, signal.getsignal(number))
        self._register_signal(number, self._note)

    def _note(self, number: int | signal.Signals, frame: FrameType) -> None:
        state = self.trainer.state
        saves = state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING
        if os.getpid() != self._process or not (saves or self.noted):
            self._forward(number)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # a worker of a data loader, or nothing that could be saved
        elif not self.noted:
            self.noted = int(number)
            self._forward(number)
            before = self._original_handlers.get(signal.Signals(number))
            if callable(before):
                before(signal.Signals(number), frame)

    def _forward(self, number: int | signal.Signals) -> None:
        launcher = self.trainer.strategy.launcher
        if launcher is not None and number == signal.SIGTERM and os.getpid() == self._process:
            launcher.kill(signal.Signals(number))


def handle_signals(trainer: Trainer, *, pointer: Path | None = None) -> None:
    """Put :class:`Signals` in the place of Lightning's handlers."""
    if not isinstance(trainer._signal_connector, Signals):
        trainer._signal_connector = Signals(trainer, pointer=pointer)


class StopOnSignal(Callback):
    """Ends a run at the end of the batch in which SIGTERM came, or the signal with which Slurm announces a requeue.

    The run is saved as ``preempted.ckpt`` among its checkpoints, unless the Trainer has no checkpoint callback, and
    exits with 128 + the signal's number. A Slurm job is requeued. With several processes all of them stop at the same
    batch, whichever was asked. Every task attaches it.
    """

    def __init__(self) -> None:
        self._vote = _Vote()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._vote = _Vote()
        if trainer.world_size > 1:
            # Lightning asks the first process alone, and waits for the device before each batch.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._check(trainer)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._check(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._vote.end()

    def _check(self, trainer: Trainer) -> None:
        connector = trainer._signal_connector
        assert isinstance(connector, Signals)
        number = connector.noted if trainer.world_size == 1 else self._vote.largest(connector.noted, trainer)
        if number:
            _stop(trainer, connector, number)


class _Vote:
    """The largest number that any process gave one call before: nobody waits for the answer, nor for the device."""

    def __init__(self) -> None:
        self._asked: tuple[Tensor, Any] | None = None

    def largest(self, number: int, trainer: Trainer) -> int:
        answer = self._answer()
        device = trainer.strategy.root_device
        numbers = torch.tensor([number], device="cpu")
        if device.type == "cuda":
            self._asked = _asked_on(device, numbers)
        else:
            numbers = numbers.to(device)
            self._asked = numbers, torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, async_op=True)
        return answer

    def end(self) -> None:
        """Wait for the last call."""
        self._answer()

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        numbers, work = self._asked
        self._asked = None
        work.wait()
        return int(numbers)


class _Arrival:
    """A copy to the host that is under way."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def _asked_on(device: torch.device, numbers: Tensor) -> tuple[Tensor, _Arrival]:
    """Reduce on a stream of its own, so that the step's kernels do not wait for the other processes."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    host = torch.empty(1, dtype=numbers.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        there = numbers.pin_memory().to(device, non_blocking=True)
        torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX)
        host.copy_(there, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    return host, _Arrival(event)


def _stop(trainer: Trainer, connector: Signals, number: int) -> None:
    path = _path(trainer, connector)
    said = f"tenzoo: {signal.Signals(number).name} after step {trainer.global_step}: "
    if path is None:
        said += "nothing was saved, since checkpoints are switched off"
    else:
        trainer.save_checkpoint(path, weights_only=False)
        said += f"saved {path}; give it as `ckpt_path` to go on"
    if trainer.is_global_zero:
        if path is not None and connector.slurm is not None:
            if connector.pointer is not None:
                connector.pointer.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(connector.pointer) as unfinished:
                    unfinished.write_text(str(path.absolute()))
            if number != signal.SIGTERM:
                said += f"; {requeue()}"
        print(said, file=sys.stderr, flush=True)
    trainer.strategy.barrier("preempted")
    # Lightning's own child processes keep still: it kills the parent, which may not be done, where one of them fails.
    ours = trainer._accelerator_connector.cluster_environment.creates_processes_externally
    raise Preempted(128 + number if ours or trainer.local_rank == 0 else 0)


def _path(trainer: Trainer, connector: Signals) -> Path | None:
    savers = model_checkpoints(trainer)
    if not savers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if connector.slurm is not None and connector.pointer is None:
        path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
        return Path(trainer.strategy.broadcast(path))
    return Path(savers[0].dirpath or trainer.default_root_dir) / SAVED_AS
