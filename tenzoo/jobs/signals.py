"""Signals that stop a run: it saves at the end of a batch, and stops in all processes together."""

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
"""Name of the checkpoint of a run that a signal stopped, in the folder of its checkpoints."""


class Preempted(SystemExit):
    """A signal stopped the run. Its exit code is 128 plus the number of the signal."""


class Signals(_SignalConnector):
    """Records signals and does nothing else, so that they interrupt neither a save nor a step of SAM.

    It replaces Lightning's handlers, which save in the middle of a step, and communicate with other processes there.

    Args:
        trainer: The Trainer whose handlers are replaced.
        pointer: A file with the path of the checkpoint, for the next start of this Slurm job. Without it the checkpoint
            is written where Lightning looks for one.
    """

    def __init__(self, trainer: Trainer, *, pointer: Path | None = None) -> None:
        super().__init__(trainer)
        self.pointer = pointer
        self.noted = 0
        """Number of the received signal, or 0."""
        self._process = os.getpid()

    @property
    def slurm(self) -> SLURMEnvironment | None:
        """The environment of a Slurm job that requeues itself, else None."""
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
            os.kill(os.getpid(), number)  # in a worker of a data loader, or if there is nothing to save
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
    """Replace Lightning's handlers by :class:`Signals`."""
    if not isinstance(trainer._signal_connector, Signals):
        trainer._signal_connector = Signals(trainer, pointer=pointer)


class StopOnSignal(Callback):
    """Ends a run after the batch in which SIGTERM arrives, or the signal with which Slurm announces a requeue.

    The run is saved as ``preempted.ckpt`` in the folder of its checkpoints, unless the Trainer has no checkpoint
    callback, and exits with 128 plus the number of the signal. A Slurm job is requeued. Several processes stop at the
    same batch, whichever of them got the signal. Every task attaches it.
    """

    def __init__(self) -> None:
        self._vote = _Vote()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._vote = _Vote()
        if trainer.world_size > 1:
            # Lightning asks only the first process, and waits for the device before each batch.
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
    """The largest number of all processes in the previous call. No process waits for the others or for the device."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def largest(self, number: int, trainer: Trainer) -> int:
        answer = self._answer()
        device = trainer.strategy.root_device
        numbers = torch.tensor([number], device="cpu")
        if device.type == "cuda":
            self._pending = _reduced_on(device, numbers)
        else:
            numbers = numbers.to(device)
            self._pending = (
                numbers,
                torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, async_op=True),
            )
        return answer

    def end(self) -> None:
        """Wait for the last call."""
        self._answer()

    def _answer(self) -> int:
        if self._pending is None:
            return 0
        numbers, work = self._pending
        self._pending = None
        work.wait()
        return int(numbers)


class _Arrival:
    """A copy to the host that may not be complete."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def _reduced_on(device: torch.device, numbers: Tensor) -> tuple[Tensor, _Arrival]:
    """Reduce on a separate stream, so that the kernels of the step do not wait for other processes."""
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
    message = f"tenzoo: {signal.Signals(number).name} after step {trainer.global_step}: "
    if path is None:
        message += "nothing was saved, since checkpoints are switched off"
    else:
        trainer.save_checkpoint(path, weights_only=False)
        message += f"saved {path}; give it as `ckpt_path` to continue"
    if trainer.is_global_zero:
        if path is not None and connector.slurm is not None:
            if connector.pointer is not None:
                connector.pointer.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(connector.pointer) as unfinished:
                    unfinished.write_text(str(path.absolute()))
            if number != signal.SIGTERM:
                message += f"; {requeue()}"
        print(message, file=sys.stderr, flush=True)
    trainer.strategy.barrier("preempted")
    # Lightning's own child processes exit with 0: if one fails, Lightning kills the parent, which may not be done.
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
