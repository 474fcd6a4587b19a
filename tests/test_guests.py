import subprocess
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import tensorly as tl
import torch
from torch import Tensor, nn

from tenzoo import CoreContainer, CoreGroup, find_core_groups
from tenzoo.callbacks import DeviationAwareScaling, Rebalance
from tenzoo.cli import main
from tenzoo.dynamics import bound_factors, deviation_aware_factors, norm_deviation, squared_norms
from tenzoo.guests import register_tltorch
from tenzoo.tasks import SAM, Task
from tests.conformance import CoreProviderConformance
from tests.tasks.toy import Batches, assert_same_weights, sgd, trainer

# tltorch sets TensorLy's backend for the whole process when it is imported: here that is while tests are collected.
_backend = tl.get_backend()
pytest.importorskip("opt_einsum", reason="tltorch needs opt_einsum; pip install 'tenzoo[tltorch]'")
tltorch = pytest.importorskip("tltorch", reason="an optional guest; pip install 'tenzoo[tltorch]'")
tl.set_backend(_backend)


@pytest.fixture(autouse=True)
def _tltorch_on_torch_and_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tenzoo.cores._registry", {})
    register_tltorch()
    tl.set_backend("pytorch")
    yield
    tl.set_backend(_backend)


# --- each format ------------------------------------------------------------------------------------------------------


def randomize_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@torch.no_grad()
def check_rescaling(output: Callable[[], Tensor], cores: Sequence[Tensor], factors: Iterable[Tensor | float]) -> None:
    """Factors of product 1, one per core, leave the output alone."""
    before = output().clone()
    for core, factor in zip(cores, factors, strict=True):
        core.mul_(factor)
    torch.testing.assert_close(output(), before)


class Host(nn.Module, CoreContainer):
    """Gives a guest what the conformance suite asks for."""

    def __init__(self, tensor: nn.Module) -> None:
        super().__init__()
        self.tensor = tensor


class GuestConformance(CoreProviderConformance):
    equation: str
    """Of the dense tensor, from the parameters in their order."""

    @abstractmethod
    def guest(self) -> nn.Module:
        """A tensor of tltorch."""

    def make(self) -> nn.Module:
        return randomize_(Host(self.guest()).double())

    def output(self, provider: nn.Module) -> Tensor:
        return provider.tensor.to_tensor()

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        return torch.einsum(self.equation, *parameters.values())


class TestCP(GuestConformance):
    equation = "r,ar,br,cr->abc"

    def guest(self) -> nn.Module:
        return tltorch.FactorizedTensor.new((3, 4, 2), rank=3, factorization="CP")


class TestCPWithConstantWeights(GuestConformance):
    equation = "r,ar,br,cr->abc"

    def guest(self) -> nn.Module:
        factors = [nn.Parameter(torch.empty(size, 3)) for size in (3, 4, 2)]
        return tltorch.CPTensor(torch.tensor([1.0, 2.0, 3.0]), factors)

    def oracle(self, provider: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        assert len(parameters) == 3
        return torch.einsum(self.equation, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), *parameters.values())


class TestTucker(GuestConformance):
    equation = "rst,ar,bs,ct->abc"

    def guest(self) -> nn.Module:
        return tltorch.FactorizedTensor.new((3, 4, 3), rank=(2, 3, 2), factorization="Tucker")


class TestTensorTrain(GuestConformance):
    equation = "iar,rbs,scj->abc"

    def guest(self) -> nn.Module:
        return tltorch.FactorizedTensor.new((3, 4, 2), rank=(1, 2, 2, 1), factorization="TT")


class TestTensorizedCP(GuestConformance):
    equation = "r,ar,br,cr,dr->abcd"

    def guest(self) -> nn.Module:
        return tltorch.TensorizedTensor.new(((3, 2), (2, 4)), rank=3, factorization="CP")


class TestTensorizedTucker(GuestConformance):
    equation = "rstu,ar,bs,ct,du->abcd"

    def guest(self) -> nn.Module:
        return tltorch.TensorizedTensor.new(((3, 2), (2, 3)), rank=(2, 1, 2, 2), factorization="Tucker")


class TestBlockTT(GuestConformance):
    equation = "iacr,rbdj->abcd"

    def guest(self) -> nn.Module:
        return tltorch.TensorizedTensor.new(((3, 2), (2, 4)), rank=3, factorization="BlockTT")


@pytest.mark.parametrize("name", ["ComplexCP", "ComplexTucker", "ComplexTT"])
def test_complex_tensors_hold_their_cores_as_real_parameters(name: str):
    torch.manual_seed(0)
    rank = (2, 2, 2) if name == "ComplexTucker" else 2
    tensor = tltorch.FactorizedTensor.new((3, 4, 2), rank=rank, factorization=name, dtype=torch.complex128)
    (group,) = find_core_groups(randomize_(tensor))
    assert {id(core) for core in group.cores} == {id(parameter) for parameter in tensor.parameters()}
    factors = [-3.0, 1.0, -1 / 3, *[1.0] * (len(group.cores) - 3)]
    check_rescaling(tensor.to_tensor, group.cores, factors)


# --- what is no core --------------------------------------------------------------------------------------------------


def test_dense_tensors_have_no_cores():
    assert not find_core_groups(tltorch.FactorizedTensor.new((3, 4), factorization="Dense"))
    assert not find_core_groups(tltorch.TensorizedTensor.new(((3, 2), (2, 2)), rank=None, factorization="Dense"))


def test_a_tensor_without_parameters_has_no_cores():
    tensor = tltorch.CPTensor(torch.ones(2), [torch.randn(3, 2), torch.randn(4, 2)])
    assert len(list(tensor.buffers())) == 3
    assert not find_core_groups(tensor)


def test_the_weights_of_a_lasso_are_no_core():
    tensor = tltorch.FactorizedTensor.new((3, 4, 2), rank=(2, 2, 2), factorization="Tucker")
    before = find_core_groups(tensor)[0].cores
    tltorch.tensor_lasso("Tucker").apply(tensor)
    assert len(list(tensor.parameters())) == len(before) + 3
    assert all(one is two for one, two in zip(find_core_groups(tensor)[0].cores, before, strict=True))


def test_a_tensor_with_one_factor_in_two_modes_is_refused():
    factor = nn.Parameter(torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"expected distinct parameters in `cores` .* got one twice"):
        find_core_groups(tltorch.CPTensor(torch.ones(2), [factor, factor]))


def test_factors_stand_in_the_order_of_the_modes():
    tensor = tltorch.FactorizedTensor.new((3, 4), rank=2, factorization="CP").transduct(5, mode=1)
    assert [len(core) for core in find_core_groups(tensor)[0].cores] == [2, 3, 5, 4]


# --- layers -----------------------------------------------------------------------------------------------------------

Linear, Conv = tltorch.FactorizedLinear, tltorch.FactorizedConv


@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
@pytest.mark.parametrize(
    ("kind", "factorization"),
    [("linear", "CP"), ("linear", "Tucker"), ("linear", "BlockTT"), ("conv", "CP"), ("conv", "Tucker"), ("conv", "TT")],
)
def test_a_layer_is_one_group_that_can_be_rescaled(kind: str, factorization: str, implementation: str):
    torch.manual_seed(0)
    rank = (2, 2, 2, 2) if factorization == "Tucker" else 2
    settings = {"rank": rank, "factorization": factorization, "implementation": implementation, "dtype": torch.float64}
    if kind == "linear":
        layer, x = Linear((2, 3), (3, 4), **settings), torch.randn(5, 6, dtype=torch.float64)
    else:
        layer, x = Conv(3, 4, (3, 2), bias=True, **settings), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    (group,) = find_core_groups(randomize_(layer))
    assert group.name == "weight"
    assert {id(p) for p in layer.parameters()} - {id(core) for core in group.cores} == {id(layer.bias)}
    factors = torch.rand(len(group.cores), dtype=torch.float64) + 0.5
    check_rescaling(lambda: layer(x), group.cores, factors / factors.log().mean().exp())


def test_a_contraction_layer_is_one_group():
    layer = randomize_(tltorch.TCL((3, 4), (2, 2), dtype=torch.float64))
    (group,) = find_core_groups(nn.Sequential(layer))
    assert group.name == "0"
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    check_rescaling(lambda: layer(x), group.cores, [3.0, 1 / 3])


def test_layers_that_share_a_tensor_are_one_group():
    joint = Linear((2, 3), (3, 4), factorization="CP", rank=2, n_layers=2)
    (group,) = find_core_groups(nn.ModuleList([joint[0], joint[1]]))
    assert group.name == "0.main_linear.weight"


# --- training ---------------------------------------------------------------------------------------------------------


class Guests(Task):
    """Two convolutions and two linear layers, in four formats."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            Conv(2, 4, (3, 3), padding=1, rank=3, factorization="CP"),
            nn.Tanh(),
            Conv(4, 4, (3, 3), padding=1, rank=(1, 3, 3, 3, 1), factorization="TT", implementation="reconstructed"),
            nn.Flatten(),
            Linear((4, 4, 4), (2, 2, 2), rank=3, factorization="BlockTT"),
            nn.Tanh(),
            Linear((2, 4), (3, 1), rank=(2, 2, 2, 1), factorization="Tucker", implementation="reconstructed"),
        )
        for layer in self.net:
            if isinstance(layer, Conv):
                layer.reset_parameters(std=0.3)
        self.losses: list[float] = []

    def core_groups(self) -> list[CoreGroup]:
        return []  # the walk finds the layers'

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        if not self.perturbed:
            self.losses.append(loss.item())
        return loss


class OneBatch(Batches):
    def __init__(self) -> None:
        x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(3))
        y = torch.stack([2 * x[:, 0].mean((1, 2)), 2 * x[:, 1].mean((1, 2)), x[:, 0, 0, 0]], 1)
        self.batches = [(x, y)]


def _fitted(steps: int, *callbacks: object, lr: float = 0.05, **task: object) -> Guests:
    torch.manual_seed(0)
    guests = Guests(optimizer=sgd(lr), **task)
    trainer(max_epochs=steps, callbacks=list(callbacks)).fit(guests, OneBatch())
    return guests


def test_all_layers_of_the_model_are_found():
    groups = find_core_groups(Guests())
    sizes = {"net.0.weight": 5, "net.2.weight": 4, "net.4.weight": 3, "net.6.weight": 5}
    assert {group.name: len(group.cores) for group in groups} == sizes


@pytest.mark.parametrize("method", ["plain", "sam", "das", "das_gauge_fixed", "rebalance"])
def test_guests_train_under_every_method(method: str):
    callbacks = {
        "das": [DeviationAwareScaling(0.1)],
        "das_gauge_fixed": [DeviationAwareScaling(0.1, gauge_fixed=True)],
        "rebalance": [Rebalance()],
    }
    guests = _fitted(60, *callbacks.get(method, []), sam=SAM(rho=0.05, scope="cores") if method == "sam" else None)
    assert len(guests.losses) == 60
    assert guests.losses[-1] < 0.8 * guests.losses[0]


def test_sam_and_das_at_zero_are_the_plain_optimizer():
    plain = _fitted(5)
    assert_same_weights(_fitted(5, sam=SAM(rho=0.0)), plain)
    assert_same_weights(_fitted(5, DeviationAwareScaling(0.0)), plain)


def test_one_step_of_das_by_hand():
    lr, alpha = 0.05, 2.0
    trained = _fitted(1, DeviationAwareScaling(alpha), lr=lr)
    torch.manual_seed(0)
    by_hand = Guests()
    by_hand.loss(OneBatch().batches[0], 0).backward()
    with torch.no_grad():
        for group in find_core_groups(by_hand):
            s, gamma = squared_norms(group.cores), squared_norms([core.grad for core in group.cores])
            factors = bound_factors(deviation_aware_factors(s, gamma, lr=lr, alpha=alpha), max_scale=0.1)
            assert factors.abs().max() > 1e-4
            for core, factor in zip(group.cores, factors, strict=True):
                core.mul_(1 + factor)
        for parameter in by_hand.parameters():
            parameter.sub_(lr * parameter.grad)
    torch.testing.assert_close(list(trained.parameters()), list(by_hand.parameters()))


def test_rebalancing_gives_the_cores_of_each_guest_one_norm():
    guests = _fitted(1, Rebalance(), lr=0.0)
    torch.manual_seed(0)
    untouched = Guests()
    x = OneBatch().batches[0][0]
    torch.testing.assert_close(guests.net(x), untouched.net(x))
    for group in find_core_groups(guests):
        s = squared_norms(group.cores)
        assert norm_deviation(s / s.mean()) < 1e-9


# --- registration -----------------------------------------------------------------------------------------------------


def test_registering_twice_changes_nothing():
    register_tltorch()
    assert len(find_core_groups(Guests())) == 4


def test_tenzoo_alone_does_not_import_tltorch():
    code = "import sys, tenzoo, tenzoo.guests; sys.exit('tltorch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("missing", ["tltorch", "opt_einsum"])
def test_what_is_missing_is_named_with_the_remedy(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tltorch.py").write_text("import opt_einsum")  # some releases need it, this one may not
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tltorch")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"got no {missing}; run pip install 'tenzoo\[tltorch\]'"):
        register_tltorch()


def test_an_error_inside_tltorch_is_not_taken_for_its_absence(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tltorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorly.decomposition", None)
    with pytest.raises(ModuleNotFoundError, match=r"tensorly\.decomposition"):
        register_tltorch()


_USERS_MODULE = """
import torch
from lightning.pytorch import LightningDataModule
from tltorch import FactorizedLinear

from tenzoo.guests import register_tltorch
from tenzoo.tasks import Task

register_tltorch()


class Guest(Task):
    def __init__(self, rank: int = 2, **kwargs):
        super().__init__(**kwargs)
        self.layer = FactorizedLinear((2, 3), (3, 4), factorization="CP", rank=rank)

    def core_groups(self):
        return []

    def loss(self, batch, batch_idx):
        return self.layer(batch).square().mean()


class Noise(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 6), batch_size=4)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls jsonargparse in a way that it deprecates
def test_the_command_line_registers_in_the_module_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tenzoo.cores._registry", {})
    monkeypatch.setattr("sys.argv", ["tenzoo"])
    (tmp_path / "guest_models.py").write_text(_USERS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "guest_models", raising=False)
    config = tmp_path / "guest.yaml"
    config.write_text(
        "model: {class_path: guest_models.Guest, init_args: {rank: 3}}\n"
        "data: {class_path: guest_models.Noise}\n"
        "trainer:\n"
        "  {accelerator: cpu, max_steps: 2, logger: false, enable_progress_bar: false, enable_checkpointing: false,\n"
        f"   default_root_dir: '{tmp_path}',\n"
        "   callbacks: [{class_path: tenzoo.callbacks.DeviationAwareScaling, init_args: {alpha: 0.1}}]}\n"
    )
    assert main(["fit", "--config", str(config)]) == 0
