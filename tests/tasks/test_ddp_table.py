"""Two processes end where one process ends: every method on every problem."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from tenzoo.tasks import CompletionTask, Task
from tenzoo.training import batch_weight
from tests.data.small_cifar10 import write_cifar10
from tests.processes import in_processes
from tests.tasks.ddp_rows import METHODS, PROBLEMS, run, weights

TOGETHER = [name for name in METHODS if not name.endswith("_alone")]
FAST = [("uneven", "sam"), ("sum", "das"), ("uneven_images", "asam"), ("sparse", "plain"), ("small", "das_global")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cifar10")
    use_files(write_cifar10(folder / "cifar-10-batches-bin"))
    return str(folder)


def use_files(digests: dict[str, str]) -> None:
    import tenzoo.data.images.cifar10_files as files

    files.SHA1 = digests  # type: ignore[assignment]


def trained(rows: list[tuple[str, str]], root: str, digests: Any, settings: dict[str, Any]) -> list[dict[str, Tensor]]:
    use_files(digests)
    return [weights(run(problem, method, root, **settings)[1]) for problem, method in rows]


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest difference of two sets of weights, relative to the largest of each tensor."""
    assert list(one) == list(two)
    return max(float((two[name] - value).abs().max() / value.abs().max()) for name, value in one.items())


def both(rows: list[tuple[str, str]], root: str, **settings: Any) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    import tenzoo.data.images.cifar10_files as files

    return list(zip(*in_processes(trained, rows, root, files.SHA1, settings), strict=True))


def compare(rows: list[tuple[str, str]], root: str, *, steps: int = 1, **settings: Any) -> None:
    wrong = {}
    for row, (first, second) in zip(rows, both(rows, root, steps=steps, **settings), strict=True):
        assert difference(first, second) == 0, row
        alone = weights(run(*row, root, steps=steps)[1])
        if (found := difference(alone, first)) > 1e-10:
            wrong[row] = found
    assert not wrong


def test_a_step_of_two_processes_is_one_of_one_process(root):
    compare(FAST, root)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_method_on_every_problem(root, problem):
    compare([(problem, method) for method in TOGETHER if (problem, method) not in FAST], root)


# --- strategies and accumulation ---------------------------------------------------------------------------------

# Five batches make windows of 2 + 2 + 1 or 3 + 2: the last one is short, and the fourth step lies in the next epoch.
ACCUMULATED = [("uneven", method) for method in ("accumulated", "sam_accumulated", "asam_accumulated")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("strategy", ["views", "small_buckets", "unused"])
def test_gradients_are_accumulated_under_every_kind_of_ddp(root, strategy):
    compare(ACCUMULATED, root, steps=4, strategy=strategy)


# --- each rank climbs by its own batch ---------------------------------------------------------------------------

ALONE = [("uneven", "sam_alone"), ("uneven", "asam_alone"), ("small", "sam_alone"), ("small", "asam_alone")]


class Beginning(Callback):
    """Keeps the weights and the first batch that training begins with."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weights = weights(pl_module)
        self.batch = batch
        self.weight = batch_weight(pl_module)


def written_out(task: Task, begun: Beginning, *, lr: float, rho: float, adaptive: bool) -> dict[str, Tensor]:
    """A step of SAM on this rank's batch alone, with the second gradient averaged over two ranks."""
    parameters = dict(task.named_parameters())

    def gradients(at: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(at[name])
        if isinstance(task, CompletionTask):
            loss = ((task.model(begun.batch.index) - begun.batch.value) ** 2).mean()
        else:
            loss = torch.nn.functional.cross_entropy(task(begun.batch[0]), begun.batch[1])
        return dict(zip(parameters, torch.autograd.grad(loss * begun.weight, parameters.values()), strict=True))

    start = begun.weights
    first = gradients(start)
    size = {name: start[name].abs() if adaptive else torch.ones_like(start[name]) for name in start}
    norm = sum((size[name] * first[name]).square().sum() for name in start) ** 0.5
    second = gradients({name: start[name] + rho * size[name] ** 2 * first[name] / norm for name in start})
    for grad in second.values():
        torch.distributed.all_reduce(grad)
    return {name: start[name] - lr * second[name] / 2 for name in start}


def climbed_alone(root: str, digests: Any) -> list[float]:
    use_files(digests)
    found = []
    for problem, method in ALONE:
        begun = Beginning()
        _, task = run(problem, method, root, steps=1, callbacks=[begun])
        trained = weights(task)
        sam = METHODS[method].task["sam"]
        expected = written_out(task, begun, lr=PROBLEMS[problem].lr, rho=sam.rho, adaptive=sam.adaptive)
        assert difference(begun.weights, trained) > 1e-6
        found.append(difference(expected, trained))
    return found


def test_without_sync_each_rank_climbs_by_its_own_batch(root):
    import tenzoo.data.images.cifar10_files as files

    for rank in in_processes(climbed_alone, root, files.SHA1):
        assert max(rank) < 1e-10


# --- many steps --------------------------------------------------------------------------------------------------


def check_equal_ranks(rows: list[tuple[str, str]], root: str) -> None:
    for row, (first, second) in zip(rows, both(rows, root, steps=200, precision="32-true"), strict=True):
        for name, value in first.items():
            assert value.isfinite().all(), (row, name)
            assert second[name].equal(value), (row, name)


@pytest.mark.slow
def test_ranks_are_bitwise_equal_after_200_steps(root):
    check_equal_ranks([("uneven", "sam"), ("uneven", "das_global")], root)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["uneven_sum", "sparse", "distilled"])
def test_every_method_keeps_ranks_bitwise_equal_for_200_steps(root, problem):
    check_equal_ranks([(problem, method) for method in METHODS], root)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "das", "sam", "asam_alone"])
def test_a_resnet_stays_bitwise_equal_for_200_steps(root, method):
    check_equal_ranks([("resnet", method)], root)
