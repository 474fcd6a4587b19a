"""The price of Lightning, DAS and SAM on a small tensor, where every microsecond of overhead shows."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from benchmarks.loops import BareLoop, FitLoop, Loop, interleave, quiet
from benchmarks.report import Ratio, Report
from tenzoo.cli import main
from tenzoo.data import CompletionBatch, CompletionDataModule
from tenzoo.dynamics import bound_factors, deviation_aware_factors, sharpness_perturbation, squared_norms
from tenzoo.models import TensorCompletion

_CONFIGS = Path(__file__).parents[1] / "configs"
_PAPER = _CONFIGS / "covid_tucker_paper.yaml"
_DAS = _CONFIGS / "methods" / "das.yaml"
_SAM = _CONFIGS / "methods" / "sam.yaml"


def covid(rounds: int, *, steps: int = 200, warmup: int = 100) -> Report:
    """Train the COVID-19 Tucker model by a bare loop and by the command line, with Adam, DAS and SAM.

    Args:
        rounds: How often each variant has its turn.
        steps: Steps per turn; with a multiple of 100 all turns log and flush equally often.
        warmup: Steps before the first turn.
    """
    with tempfile.TemporaryDirectory() as root, quiet():
        fit = functools.partial(_fit, Path(root), rounds=rounds, steps=steps, warmup=warmup)
        loops: dict[str, Loop] = {
            "bare Adam": BareLoop(_adam_step(), steps=steps, warmup=warmup),
            "Lightning Adam": fit("adam", []),
            "Lightning DAS": fit("das", [_DAS]),
            "Lightning SAM": fit("sam", [_SAM]),
            "bare DAS": BareLoop(_das_step(), steps=steps, warmup=warmup),
            "bare SAM": BareLoop(_sam_step(), steps=steps, warmup=warmup),
            "Lightning Adam, progress bar": fit("bar", [], progress_bar=True),
        }
        times = interleave(loops, rounds)
    ratio = functools.partial(Ratio.of, times)
    return Report(
        "covid: Tucker (8, 6, 8) on (438, 6, 11), full batch of 8,672 entries",
        f"Turns of {steps} steps. Under Lightning with both loggers and NormDynamicsMonitor at its default interval, "
        "as the command line sets it up, without a progress bar except where it says so.",
        ("µs/step", 1e6),
        times,
        [
            ratio("Lightning Adam", "bare Adam", target=1.6),
            ratio("Lightning DAS", "Lightning Adam", target=1.05),
            ratio("Lightning SAM", "Lightning Adam", target=2.1),
            ratio("bare DAS", "bare Adam"),
            ratio("bare SAM", "bare Adam"),
            ratio("Lightning DAS", "bare DAS"),
            ratio("Lightning SAM", "bare SAM"),
            ratio("Lightning Adam, progress bar", "Lightning Adam"),
        ],
    )


# --- Lightning -----------------------------------------------------------------------------------------------------


def _fit(
    root: Path,
    name: str,
    methods: Sequence[Path],
    *,
    rounds: int,
    steps: int,
    warmup: int,
    progress_bar: bool = False,
) -> FitLoop:
    """A run of the command line: the Trainer is the one that users get, with both loggers and the monitor."""
    turns = {"class_path": "benchmarks.loops.TakeTurns", "init_args": {"warmup": warmup, "steps": steps}}
    overrides = {
        "trainer": {
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": progress_bar,
            "default_root_dir": str(root / name),
            "callbacks+": [turns],
        },
        "data": {"init_args": {"steps_per_epoch": warmup + rounds * steps}},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(overrides), encoding="utf-8")
    args = ["fit", *(f"--config={config}" for config in (_PAPER, *methods, path))]
    return FitLoop(functools.partial(_run, args))


def _run(args: list[str]) -> None:
    if main(args) != 0:
        raise RuntimeError(f"expected a fit, got an error from: tenzoo {' '.join(args)}")


# --- bare loops ----------------------------------------------------------------------------------------------------


def _problem() -> tuple[TensorCompletion, CompletionBatch, torch.optim.Optimizer]:
    """Model, batch and optimizer of the same configuration."""
    config = yaml.safe_load(_PAPER.read_text(encoding="utf-8"))
    settings, data_settings = config["model"]["init_args"], config["data"]["init_args"]
    torch.manual_seed(config["seed_everything"])
    data = CompletionDataModule(**data_settings)
    data.setup()
    model = TensorCompletion(data.shape, settings["factorization"], settings["rank"], init=settings["init"])
    batch: CompletionBatch = next(iter(data.train_dataloader()))
    return model, batch, torch.optim.Adam(model.parameters(), **settings["optimizer"]["init_args"])


def _backward(model: TensorCompletion, batch: CompletionBatch) -> None:
    residual: Tensor = model(batch.index) - batch.value
    residual.square().sum().backward()  # type: ignore[no-untyped-call]


def _adam_step() -> Callable[[], None]:
    model, batch, optimizer = _problem()

    def step() -> None:
        optimizer.zero_grad()
        _backward(model, batch)
        optimizer.step()

    return step


def _das_step() -> Callable[[], None]:
    model, batch, optimizer = _problem()
    alpha: float = yaml.safe_load(_DAS.read_text(encoding="utf-8"))["trainer"]["callbacks+"][0]["init_args"]["alpha"]
    cores = [core.detach() for core in model.tensor.cores]
    lr: float = optimizer.param_groups[0]["lr"]

    def step() -> None:
        optimizer.zero_grad()
        _backward(model, batch)
        grads = [core.grad for core in model.tensor.cores if core.grad is not None]
        s, gamma = squared_norms([*cores, *grads]).view(2, -1).unbind()
        factors = bound_factors(deviation_aware_factors(s, gamma, lr=lr, alpha=alpha), 0.1)
        torch._foreach_mul_(cores, list((factors + 1).unbind()))
        optimizer.step()

    return step


def _sam_step() -> Callable[[], None]:
    model, batch, optimizer = _problem()
    rho: float = yaml.safe_load(_SAM.read_text(encoding="utf-8"))["model"]["init_args"]["sam"]["rho"]
    parameters = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        _backward(model, batch)
        with sharpness_perturbation(parameters, rho=rho):
            optimizer.zero_grad()
            _backward(model, batch)
        optimizer.step()

    return step
