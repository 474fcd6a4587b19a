"""Learning rates by the widths of a network and the structure of its weights."""

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from tenzoo.callbacks import DeviationAwareScaling, NormDynamicsMonitor
from tenzoo.factorizations import factorization_class
from tenzoo.factorizations.init import core_std
from tenzoo.layers import (
    TensorizedConv2d,
    TensorizedEmbedding,
    TensorizedLinear,
    TensorRegression,
)
from tenzoo.layers.fan_in import core_fan_ins, fan_in
from tenzoo.models import Decoder
from tenzoo.tasks import SAM, CausalLMTask, ImageClassificationTask
from tenzoo.tasks.learning_rates import learning_rate_factors


def fan_ins_of(factorization, rank, first=(8, 4), second=(4, 3)):
    layer = TensorizedLinear(
        math.prod(second),
        math.prod(first),
        factorization=factorization,
        rank=rank,
        tensorization=[first, second],
    )
    return core_fan_ins(layer)


# --- fan-ins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factorization", "rank", "expected"),
    [
        ("tt", (2, 3, 2), (2, 3, 4 * 2, 3)),
        ("tr", (2, 3, 5, 2), None),
        ("cp", 5, (5, 1, 4, 3)),
        ("tucker", (2, 3, 4, 3), (4 * 3, 2, 3, 4, 3)),
        ("btt", 5, (4 * 5, 3)),
    ],
)
def test_each_core_sums_its_inputs_and_the_bonds_that_end_in_it(factorization, rank, expected):
    found = fan_ins_of(factorization, rank)
    if expected is not None:
        assert found == expected
    # All legs that are no mode of the output are summed once.
    kind = factorization_class(factorization)
    layer_shape = (8, 4, 4, 3)
    monomials = kind.network(4).num_monomials(kind.resolve_rank(layer_shape, rank))
    assert math.prod(found) == 12 * monomials


def test_fan_ins_of_layers():
    conv = TensorizedConv2d(6, 8, 3, factorization="tucker", rank=[2, 3, 4])
    assert (fan_in(conv), fan_in(nn.Conv2d(6, 8, 3)), core_fan_ins(conv)) == (54, 54, (3 * 4, 2, 9, 6))
    table = TensorizedEmbedding(12, 8, factorization="tt", rank=[3], tensorization=[[12], [8]])
    assert (fan_in(table), math.prod(core_fan_ins(table))) == (1, 3)
    assert fan_in(nn.LayerNorm(4)) is None


@pytest.mark.parametrize(
    ("factorization", "rank"), [("tt", 4), ("btt", 4), ("tucker", 0.3), ("cp", 9), ("ar,rb->ab", 7)]
)
def test_steps_of_cores_change_the_output_as_a_step_of_the_dense_weight(factorization, rank):
    """One step along the signs of gradients of one linear function: the sum over the cores is near that of dense."""
    torch.manual_seed(0)
    size = 256
    changes = []
    for seed in range(8):
        torch.manual_seed(seed)
        x, direction = torch.randn(size), torch.randn(size)
        dense = nn.Linear(size, size, bias=False)
        nn.init.normal_(dense.weight, std=size**-0.5)
        cores = TensorizedLinear(size, size, bias=False, factorization=factorization, rank=rank)
        cores.factorization.init_std = size**-0.5
        cores.reset_parameters()
        for layer in (dense, cores):
            factors = learning_rate_factors(layer, size)
            before = layer(x).detach()
            (layer(x) @ direction).backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(parameter.grad.sign(), alpha=1e-4 * factors[id(parameter)])
            changes.append((layer(x) - before).norm().item())
    dense, cores = (sum(changes[start::2]) / 8 for start in (0, 1))
    assert 0.2 < cores / dense < 2


# --- groups of the optimizer ---------------------------------------------------------------------------------------


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


def decoder(width=64, **settings):
    return Decoder(65, width=width, depth=1, hidden_width=2 * width, context=16, **settings)


def test_dense_weights_tables_and_vectors():
    network = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 3))
    optimizer = ImageClassificationTask(network, num_classes=3, optimizer=adamw, base_width=32).build_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in network.parameters()] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.1])
    assert [group["name"] for group in optimizer.param_groups] == ["norms", "rest", "rest*0.5"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01, 0.01]


@pytest.mark.parametrize("factorization", [None, "tt"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_has_the_rate_of_the_head(factorization, tied):
    parts = None if factorization is None else {"embedding": factorization}
    model = decoder(tied=tied, factorization=parts, rank=None if parts is None else 4)
    factors = learning_rate_factors(model, 32)
    table = [model.embedding.weight] if factorization is None else list(model.embedding.factorization.cores)
    if factorization is None:
        assert factors[id(table[0])] == (0.5 if tied else 1.0)
    elif tied:
        std = core_std(64**-0.5, num_monomials=math.prod(model.embedding.factorization.rank), num_cores=len(table))
        fans = core_fan_ins(model.head)
        expected = [32 * std / math.sqrt(fan) / len(table) for fan in fans]
        assert [factors[id(core)] for core in table] == pytest.approx(expected)


def test_an_optimizer_without_decay_gets_groups_as_well():
    task = CausalLMTask(decoder(), optimizer=lambda p: torch.optim.Rprop(p, lr=0.1), base_width=32)
    groups = task.build_optimizer().param_groups
    assert {round(group["lr"], 6) for group in groups} == {0.1, 0.05, 0.025}
    assert sum(len(group["params"]) for group in groups) == len(list(task.parameters()))


def test_a_rate_in_a_tensor_stays_one():
    rate = torch.tensor(0.1)
    task = CausalLMTask(decoder(), optimizer=lambda p: torch.optim.AdamW(p, lr=rate, foreach=False), base_width=64)
    lrs = [group["lr"] for group in task.build_optimizer().param_groups]
    assert all(isinstance(lr, torch.Tensor) for lr in lrs)
    assert sorted({round(lr.item(), 6) for lr in lrs}) == [0.05, 0.1]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"base_width": 0}, ValueError, r"^expected an int >= 1 or null in `base_width`, got 0$"),
        ({"base_width": 1.5}, TypeError, r"^expected an int >= 1 or null in `base_width`, got 1\.5$"),
        ({"base_width": True}, TypeError, r"^expected an int >= 1 or null in `base_width`, got True$"),
        (
            {"base_width": 64, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
            ValueError,
            r"^expected an optimizer whose steps do not grow with the gradients, .* with `base_width`, got SGD$",
        ),
        (
            {"base_width": 64, "optimizer": lambda p: torch.optim.ASGD(p, lr=0.1)},
            ValueError,
            r"^expected an optimizer whose steps do not grow with the gradients, .* with `base_width`, got ASGD$",
        ),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        CausalLMTask(decoder(), **settings).build_optimizer()


def test_a_scheduler_that_replaces_the_rates_is_refused():
    def one_rate(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10)

    task = CausalLMTask(decoder(), optimizer=adamw, base_width=32, lr_scheduler=one_rate, lr_scheduler_interval="step")
    with pytest.raises(
        ValueError, match=r"^expected a scheduler that multiplies .* got OneCycleLR, which replaces them"
    ):
        task.configure_optimizers()
    CausalLMTask(
        decoder(), optimizer=adamw, base_width=32, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3)
    ).configure_optimizers()


@pytest.mark.parametrize("module", [nn.Bilinear(4, 4, 3), nn.MultiheadAttention(8, 2), TensorRegression])
def test_a_matrix_of_another_module_is_refused_by_name(module):
    if module is TensorRegression:
        module = TensorRegression((4, 5), (3,), factorization="tucker", rank=2)
    with pytest.raises(ValueError, match=r"in `network` with `base_width`, got '[a-z0-9_.]+' of shape \("):
        learning_rate_factors(nn.Sequential(module), 64)


# --- the coordinate check ------------------------------------------------------------------------------------------


def moved(width, factorization, rank, base_width, seed):
    """How far eight steps of Adam move the stream after the last block, root mean square."""
    torch.manual_seed(seed)
    parts = None if factorization is None else {"attention": factorization, "feed_forward": factorization}
    model = Decoder(65, width=width, depth=2, context=32, factorization=parts, rank=rank)
    factors = learning_rate_factors(model, base_width) if base_width else {}
    optimizer = torch.optim.Adam([{"params": [p], "lr": 8e-3 * factors.get(id(p), 1.0)} for p in model.parameters()])
    stream = []
    model.blocks[-1].register_forward_hook(lambda block, inputs, output: stream.append(output.detach()))
    tokens = torch.randint(0, 65, (8, 33), generator=torch.Generator().manual_seed(7))
    for _ in range(9):
        logits = model(tokens[:, :-1])
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return (stream[8] - stream[0]).square().mean().sqrt().item()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("factorization", "rank"), [(None, None), ("btt", 8), ("tt", 8), ("cp", 16), ("tucker", 0.25), ("ar,rb->ab", 0.25)]
)
def test_coordinate_check(factorization, rank):
    """What training changes does not move with the width (Yang et al. 2022, appendix D.1)."""
    widths = (32, 512)
    narrow, wide = (sum(moved(width, factorization, rank, 64, seed) for seed in range(2)) for width in widths)
    assert 0.4 < wide / narrow < 2.5


def test_coordinate_check_tells_rates_that_do_not_follow_the_width():
    narrow, wide = (moved(width, None, None, None, seed=0) for width in (32, 512))
    assert wide / narrow > 6


# --- beside the methods --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sam", [None, SAM(rho=0.05)], ids=["das", "sam"])
def test_methods_and_the_monitor_with_rates_that_differ_within_a_group(tmp_path, sam):
    """Norms and the deviation are measured; rates that presuppose one learning rate are left out."""
    torch.manual_seed(0)
    model = decoder(factorization={"attention": "btt"}, rank=4)
    task = CausalLMTask(model, optimizer=adamw, base_width=32, sam=sam, lr_scheduler="one_cycle")
    tokens = torch.randint(65, (4, 17))
    batches = [{"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}] * 6
    logger = CSVLogger(tmp_path)
    callbacks = [NormDynamicsMonitor(), LearningRateMonitor(), *([] if sam else [DeviationAwareScaling(alpha=0.1)])]
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, logger=logger, callbacks=callbacks, **quiet)
    trainer.fit(task, DataLoader(batches, batch_size=None))
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = "norms/network.blocks.0.attention.query.weight"
    deviations = [float(row[f"{key}/deviation"]) for row in rows if row.get(f"{key}/deviation")]
    assert len(deviations) >= 5
    assert all(math.isfinite(value) and value > 0 for value in deviations)
    assert all(not row.get(f"{key}/measured_rate") or math.isnan(float(row[f"{key}/measured_rate"])) for row in rows)
    names = {name for name in rows[0] if name.startswith("lr-AdamW/")}
    assert len(names) == len(trainer.optimizers[0].param_groups) > 4
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["norms"] == pytest.approx(2 * rates["rest*0.5"])
