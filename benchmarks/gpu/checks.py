"""All checks, the most important first."""

from collections.abc import Mapping

from benchmarks.gpu import cost, formats, jobs, speed, training
from benchmarks.gpu.run import Check

CHECKS: Mapping[str, Check] = {
    "formats": formats.against_float64,
    "methods": training.against_cpu,
    "sam at 0": training.sam_at_zero,
    "no waiting": training.without_waiting,
    "steps": speed.steps,
    "completion": speed.completion,
    "compression": formats.compression,
    "ddp": jobs.ddp,
    "evaluation": speed.evaluation,
    "resume": jobs.kill_and_resume,
    "rates": cost.rates,
}
