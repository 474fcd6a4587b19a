"""Twenty thousand steps: memory does not grow, and steps do not slow down."""

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.tasks import SAM
from tests.tasks.toy import Batches, Regression, sgd, trainer

STEPS = 20_000
WARM_UP = 4_000
"""Steps until allocators and caches have what they need."""


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("reads /proc/self/statm, which only Linux has")
    return int(pages.read_text().split()[1]) * resource.getpagesize()


def reference() -> float:
    """Seconds of the processor that fixed work takes. Only the machine changes it."""
    start = time.process_time()
    weight = torch.ones(16, 16, requires_grad=True)
    for _ in range(10):
        (torch.ones(16, 16) @ weight).relu().sum().backward()
    return time.process_time() - start


class Gauge(Callback):
    """Memory, and processor time of each thousand steps in units of fixed work done between them."""

    def __init__(self, every: int = 1000) -> None:
        self.every = every
        self.memory: list[int] = []
        self.relative: list[float] = []
        self.times: list[float] = []
        self.fixed: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.times.append(time.process_time() - self.start)
        self.fixed.append(reference())
        if trainer.global_step % self.every == 0:
            self.memory.append(resident())
            step, fixed = (float(np.percentile(times, 10)) for times in (self.times, self.fixed))
            self.relative.append(step / fixed)  # others use the machine too
            self.times, self.fixed = [], []


METHODS = {
    "sam": ({"sam": SAM(rho=0.05)}, []),
    "das": ({}, [DeviationAwareScaling(0.05)]),
    "sam, das and monitor": ({"sam": SAM(rho=0.05)}, [DeviationAwareScaling(0.05), NormDynamicsMonitor()]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_twenty_thousand_steps_cost_what_the_first_ones_do(name, tmp_path, capsys):
    arguments, callbacks = METHODS[name]
    torch.manual_seed(1)
    gauge = Gauge()
    settings = {"max_epochs": -1, "max_steps": STEPS, "log_every_n_steps": 50, "limit_val_batches": 0}
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1000)
    trainer(tmp_path, callbacks=[*callbacks, gauge], logger=logger, **settings).fit(
        Regression(optimizer=sgd(lr=0.01), **arguments), Batches(count=500), Batches()
    )
    begin = WARM_UP // gauge.every
    steps = np.arange(len(gauge.memory))[begin:] * gauge.every
    growth = np.polyfit(steps, np.array(gauge.memory[begin:], dtype=float), 1)[0]
    relative = np.array(gauge.relative[begin:])
    halves = np.array_split(relative, 2)
    first, last = (float(half.mean()) for half in halves)
    noise = float(np.hypot(*(half.std(ddof=1) / len(half) ** 0.5 for half in halves))) / first
    drift = last / first - 1
    with capsys.disabled():
        print(f"\n{name}: {growth:.1f} bytes a step, drift of a step's time {drift:+.1%} +- {noise:.1%}")
    assert growth < 200  # the monitor keeps a row for each step that is logged, and a page every forty steps is noise
    assert drift - 2 * noise < 0.02
    assert noise < 0.05  # otherwise the machine is too busy for this test
