import csv
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.data import CIFAR10DataModule
from tenzoo.layers import TensorizedLinear
from tenzoo.models import CIFARResNet
from tenzoo.tasks import SAM, ImageClassificationTask
from tests.tasks.toy import adam, assert_same_weights, sgd, trainer


class Batches:
    """The same labeled images in every epoch; the last batch is smaller."""

    def __init__(self, seed: int = 0, sizes: tuple[int, ...] = (8, 8, 3), side: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batches = [
            (torch.randn(size, 3, side, side, generator=generator), torch.randint(5, (size,), generator=generator))
            for size in sizes
        ]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def small(seed=0):
    """Cores, norms of both kinds, biases and a dense matrix."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.LayerNorm([3, 4, 4]),
        nn.Flatten(),
        TensorizedLinear(48, 12, factorization="tt", rank=3),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(12, 5),
    )


def task(network=None, **kwargs):
    return ImageClassificationTask(network or small(), num_classes=5, **{"optimizer": sgd(0.1), **kwargs})


def fit(model, *, batches=None, epochs=2, **kwargs):
    torch.manual_seed(3)
    run = trainer(max_epochs=epochs, **kwargs)
    run.fit(model, batches or Batches(), Batches(seed=1))
    return run


# --- the optimizer ---------------------------------------------------------------------------------------------


def named(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in model.trainable_parameters()}


def test_parameters_fall_into_three_groups():
    biases = [f"network.{k}.bias" for k in (0, 2, 3, 6)]
    groups = named(task())
    assert list(groups) == ["cores", "norms", "rest"]
    assert groups["cores"] == [f"network.2.factorization.cores.{k}" for k in range(6)]
    assert sorted(groups["norms"]) == sorted([*biases, "network.0.weight", "network.3.weight"])
    assert groups["rest"] == ["network.6.weight"]


def test_groups_of_the_networks():
    dense = named(ImageClassificationTask(CIFARResNet(20)))
    assert {name: len(members) for name, members in dense.items()} == {"norms": 39, "rest": 20}
    network = CIFARResNet(20, factorization="cp", rank=2)
    network.linear.requires_grad_(False)
    ring = named(ImageClassificationTask(network))
    assert {name: len(members) for name, members in ring.items()} == {"cores": 57, "norms": 38}


@pytest.mark.parametrize(
    ("kwargs", "decays"),
    [
        ({}, [0.01, 0.0, 0.01]),
        ({"core_weight_decay": 0.3}, [0.3, 0.0, 0.01]),
        ({"core_weight_decay": 0.0, "norm_weight_decay": None}, [0.0, 0.01, 0.01]),
        ({"norm_weight_decay": 0.2}, [0.01, 0.2, 0.01]),
    ],
)
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_each_group_has_its_decay(optimizer, kwargs, decays):
    built = task(optimizer=optimizer(0.1, weight_decay=0.01), **kwargs).configure_optimizers()
    assert [group["weight_decay"] for group in built.param_groups] == decays
    assert [group["lr"] for group in built.param_groups] == [0.1] * 3


def test_a_decay_acts_on_its_group_alone():
    """Without a gradient, SGD with learning rate 1/2 and decay 1/10 multiplies by 1 − 1/20."""
    model = task(optimizer=sgd(0.5, weight_decay=0.0), core_weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if ".cores." in name else 1.0))


@pytest.mark.parametrize("optimizer", [torch.optim.Rprop, torch.optim.LBFGS])
def test_an_optimizer_without_decay(optimizer):
    model = task(optimizer=lambda parameters: optimizer(parameters, lr=0.01))
    fit(model, epochs=1)
    (group,) = model.trainer.optimizers[0].param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    for argument in ("core_weight_decay", "norm_weight_decay"):
        other = task(optimizer=optimizer, **{argument: 0.1})
        with pytest.raises(ValueError, match=f"with weight_decay with `{argument}` = 0.1, got {optimizer.__name__}"):
            fit(other)


def test_methods_find_the_cores():
    plain, das, sam = (
        task(small(seed=2), optimizer=sgd(0.1, momentum=0.9), lr_scheduler="cosine", **kwargs)
        for kwargs in ({}, {}, {"sam": SAM(rho=0.0, scope="cores")})
    )
    fit(plain)
    fit(das, callbacks=[DeviationAwareScaling(0.0)])
    fit(sam)
    assert_same_weights(plain, das)
    assert_same_weights(plain, sam)
    strong = task(small(seed=2), optimizer=sgd(0.1, momentum=0.9), lr_scheduler="cosine")
    fit(strong, callbacks=[DeviationAwareScaling(1.0)])
    assert not strong.network[2].factorization.cores[0].equal(plain.network[2].factorization.cores[0])


# --- loss and metrics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_cross_entropy_with_smoothed_targets(smoothing):
    model = task(label_smoothing=smoothing).eval()
    images, labels = Batches().batches[0]
    targets = torch.full((8, 5), smoothing / 5)
    targets[torch.arange(8), labels] += 1 - smoothing
    expected = -(targets * model(images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model.loss((images, labels), 0), expected)


class Record(Callback):
    """Logits and labels of every call to the network."""

    def __init__(self, model):
        self.calls: list[tuple[bool, torch.Tensor]] = []
        model.network.register_forward_hook(
            lambda network, inputs, logits: self.calls.append((network.training, logits.detach().argmax(1)))
        )

    def correct(self, training):
        return [predicted for was_training, predicted in self.calls if was_training == training]


def accuracy(predicted, batches):
    labels = torch.cat([labels for _, labels in batches.batches])
    return (torch.cat(predicted) == labels).float().mean().item()


@pytest.mark.parametrize("sam", [None, SAM(rho=1.0)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accuracies_are_counted_over_all_images(sam, accumulate):
    """Under SAM the network runs twice per batch, and the first time counts."""
    model = task(sam=sam, accumulate_grad_batches=accumulate)
    record = Record(model)
    run = fit(model, epochs=3, num_sanity_val_steps=0)
    shown = {"train/loss", "train/loss_epoch", "train/accuracy", "train/images_per_s", "val/loss", "val/accuracy"}
    assert set(run.callback_metrics) == shown
    assert 0 < run.callback_metrics["train/images_per_s"] < 1e7
    passes = record.correct(training=True)
    assert len(passes) == 9 * (1 if sam is None else 2)
    last = passes[-3:] if sam is None else passes[-6::2]
    assert run.callback_metrics["train/accuracy"].item() == pytest.approx(accuracy(last, Batches()))
    if sam is not None:
        assert accuracy(last, Batches()) != accuracy(passes[-5::2], Batches())
    judged = record.correct(training=False)[-3:]
    assert run.callback_metrics["val/accuracy"].item() == pytest.approx(accuracy(judged, Batches(seed=1)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_images_per_second_reach_the_loggers_in_every_epoch(tmp_path, accumulate):
    """Three batches an epoch and a log every other step: the steps that are logged shift from epoch to epoch."""
    logger = CSVLogger(tmp_path, name="", version="")
    fit(task(accumulate_grad_batches=accumulate), epochs=4, logger=logger, log_every_n_steps=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["train/images_per_s"]) for row in rows if row["train/images_per_s"]]
    losses = [row for row in rows if row["train/loss"]]
    assert len(rates) == len(losses) == {1: 6, 2: 4}[accumulate]
    assert all(0 < rate < 1e7 for rate in rates)


@torch.no_grad()
def test_validation_and_test_average_over_images_without_smoothing():
    model = task(label_smoothing=0.4)
    run = trainer()
    (judged,) = run.validate(model, Batches(), verbose=False)
    (tested,) = run.test(model, Batches(), verbose=False)
    images, labels = (torch.cat(parts) for parts in zip(*Batches().batches, strict=True))
    logits = model.eval()(images)
    loss, correct = F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    assert judged == pytest.approx({"val/loss": loss, "val/accuracy": correct})
    assert tested == pytest.approx({"test/loss": loss, "test/accuracy": correct})


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a number from the device, or for the size of a result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "is_nonzero", "nonzero", "_unique2", "masked_select", "equal"}, name
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device():
    model = task()
    images, labels = Batches().batches[0]
    with NoWaiting():
        model.loss((images, labels), 0).backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            labels.sum().item()
    ((correct, count),) = model._epoch_means["train/accuracy"].state(trainer()).tolist()
    assert 0 <= correct <= count == len(labels)


@pytest.mark.parametrize("with_labels", [True, False])
def test_prediction(with_labels):
    model = task()
    batches = Batches()
    images = torch.cat([images for images, _ in batches])
    if not with_labels:
        batches.batches = [images for images, _ in batches]
    predicted = torch.cat(trainer().predict(model, batches))
    torch.testing.assert_close(predicted, model.eval()(images).detach().softmax(1))
    torch.testing.assert_close(predicted.sum(1), torch.ones(19))


# --- arguments and checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_classes": 1}, "int >= 2 in `num_classes`, got 1"),
        ({"num_classes": True}, "int >= 2 in `num_classes`, got True"),
        ({"label_smoothing": 1.0}, r"\[0, 1\) in `label_smoothing`, got 1.0"),
        ({"label_smoothing": math.nan}, "`label_smoothing`, got nan"),
        ({"core_weight_decay": -0.1}, "finite number >= 0 or null in `core_weight_decay`, got -0.1"),
        ({"norm_weight_decay": math.inf}, "`norm_weight_decay`, got inf"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ImageClassificationTask(small(), **kwargs)


@pytest.mark.parametrize("count", ["5", 5.0, None])
def test_a_number_of_classes_that_is_no_integer(count):
    with pytest.raises(TypeError, match=f"^expected an int >= 2 in `num_classes`, got {count!r}$"):
        ImageClassificationTask(small(), num_classes=count)


def test_a_network_that_is_none():
    with pytest.raises(TypeError, match=r"nn\.Module in `network`, got str"):
        ImageClassificationTask("resnet")


def test_a_network_with_other_classes():
    with pytest.raises(ValueError, match=r"shape \(N, 10\) from `network` for N = 8 images, got \(8, 5\)"):
        fit(ImageClassificationTask(small()))


def test_a_metric_that_is_not_logged():
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match=r"expected one of \['train/accuracy', .*, 'val/loss'\] .* got 'val/acc'"):
        fit(task(lr_scheduler=scheduler, lr_scheduler_monitor="val/acc"))


@pytest.mark.parametrize("sam", [None, SAM(rho=0.1)])
def test_a_plateau_of_the_training_accuracy(sam):
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, threshold=10.0, factor=0.5)

    model = task(lr_scheduler=scheduler, lr_scheduler_monitor="train/accuracy", sam=sam)
    run = fit(model, epochs=3)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1 / 4  # none of the two after the first is better


def test_a_network_made_in_python_is_handed_in_again(tmp_path):
    model = task(label_smoothing=0.1, sam=SAM(rho=0.2))
    run = fit(model)
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert "network" not in stored
    assert stored["label_smoothing"] == 0.1
    again = ImageClassificationTask.load_from_checkpoint(tmp_path / "x.ckpt", network=small(seed=5), weights_only=True)
    assert again.label_smoothing == 0.1
    assert again.sam == SAM(rho=0.2)
    assert again.num_classes == 5
    assert_same_weights(model, again)


def test_a_subclass_keeps_its_network_out_as_well():
    class Mine(ImageClassificationTask):
        def __init__(self, backbone, width=3):
            super().__init__(nn.Sequential(backbone), num_classes=5)

    assert dict(Mine(small()).hparams)["num_classes"] == 5
    assert "backbone" not in Mine(small()).hparams


def test_data_of_another_number_of_classes_are_refused_before_training(tmp_path, root):
    data = CIFAR10DataModule(root, batch_size=4, validation_size=2)
    with pytest.raises(ValueError, match="expected 10 in `num_classes`, as in the data, got 5"):
        trainer(tmp_path, max_epochs=1).fit(task(), data)
