"""Lightning's own callbacks and Trainer flags: each acts on a task as on any module, or is refused in one line."""

import inspect

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn

from tenzoo.callbacks import DeviationAwareScaling
from tenzoo.data import CompletionDataModule
from tenzoo.factorizations import Tucker
from tenzoo.tasks import SAM, CompletionTask
from tests.tasks.toy import Batches, Regression, assert_same_weights, sgd, trainer


class Plain(LightningModule):
    """The network of Regression, trained as a LightningModule that knows nothing of tenzoo."""

    def __init__(self, norm=True):
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.dropout = nn.Dropout(0.0)
        self.weight = Tucker((5, 3), 2)

    def error(self, batch):
        return Regression.error(self, batch)

    def training_step(self, batch, batch_idx):
        loss = self.error(batch)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.error(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


KINDS = ["plain", "task", "sam", "das"]


def run(kind, tmp_path, *, found=(), norm=True, **flags):
    """Train one network in one of four ways that all come to the same."""
    torch.manual_seed(1)
    task = {
        "optimizer": sgd(momentum=0.9),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    }
    sam = SAM(rho=0) if kind == "sam" else None
    model = Plain(norm) if kind == "plain" else Regression(norm=norm, sam=sam, **task)
    extra = [DeviationAwareScaling(0.0)] if kind == "das" else []
    made = [callback() if inspect.isfunction(callback) else callback for callback in found]
    fit = trainer(tmp_path / kind, **{"max_epochs": 4, "callbacks": [*made, *extra], **flags})
    fit.fit(model, Batches(), Batches(seed=9))
    return model, fit, made


class Thaw(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.inner)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.inner, optimizer, lr=0.05)


class Lowest(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx > 3


WORKING = {
    "early stopping": lambda: EarlyStopping("train/loss", patience=1, min_delta=0.2),
    "weight averaging": lambda: Lowest(),
    "exponential averaging": lambda: EMAWeightAveraging(decay=0.5),
    "stochastic weight averaging": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2),
    "pruning": lambda: ModelPruning("l1_unstructured", amount=0.5),
    "finetuning": lambda: Thaw(),
    "accumulation": lambda: GradientAccumulationScheduler({0: 1, 2: 2}),
    "time limit": lambda: Timer(duration="00:01:00:00"),
    "time limit by steps": lambda: Timer(duration={"hours": 1}, interval="step"),
    "hooks": lambda: LambdaCallback(on_before_zero_grad=lambda trainer, module, optimizer: None),
    "summary": lambda: ModelSummary(max_depth=2),
    "rich summary": lambda: RichModelSummary(),
    "rich progress": lambda: RichProgressBar(refresh_rate=1),
    "progress": lambda: TQDMProgressBar(refresh_rate=1),
}

FLAGS = {
    "fast_dev_run": {"fast_dev_run": 2},
    "overfit_batches": {"overfit_batches": 2},
    "limit_train_batches": {"limit_train_batches": 0.5},
    "limit_val_batches": {"limit_val_batches": 0},
    "val_check_interval": {"val_check_interval": 0.5},
    "val_check_interval in steps": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2},
    "detect_anomaly": {"detect_anomaly": True},
    "inference_mode": {"inference_mode": False},
    "barebones": {"barebones": True},
    "sync_batchnorm": {"sync_batchnorm": True},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 1},
    "max_time": {"max_time": "00:01:00:00"},
    "min_epochs": {"min_epochs": 2, "min_steps": 3},
    "max_steps": {"max_steps": 7, "max_epochs": -1},
    "profiler": {"profiler": "simple"},
    "deterministic": {"deterministic": True},
    "use_distributed_sampler": {"use_distributed_sampler": False},
    "num_sanity_val_steps": {"num_sanity_val_steps": 0},
    "log_every_n_steps": {"log_every_n_steps": 0},
    "strategy": {"strategy": "auto", "devices": 1, "num_nodes": 1},
}

SET_ELSEWHERE = {
    "accelerator", "callbacks", "logger", "default_root_dir", "enable_checkpointing", "enable_progress_bar",
    "enable_model_summary", "enable_autolog_hparams", "max_epochs", "limit_test_batches", "limit_predict_batches",
    "benchmark", "model_registry", "plugins",
    "precision",  # tests/tasks/test_sam_state.py
    "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches",  # refused: tests/tasks/test_base.py
}  # fmt: skip


def test_every_flag_of_the_trainer_is_in_a_table():
    tried = {name for flags in FLAGS.values() for name in flags} | SET_ELSEWHERE
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} - tried == set()


@pytest.mark.sampled(7)
@pytest.mark.filterwarnings("ignore:.*SWA|.*max_epochs|.*You have turned on|.*modules in eval mode|.*overfit_batches")
@pytest.mark.filterwarnings("ignore:.*logging|.*cannot be computed|.*The number of training batches|.*early stopping")
@pytest.mark.parametrize("name", [*WORKING, *FLAGS])
def test_it_acts_on_a_task_as_on_any_module(name, tmp_path):
    flags = dict(FLAGS.get(name, {}))
    found = [WORKING[name]] if name in WORKING else []
    if "progress" in name:
        flags["enable_progress_bar"] = True
    if "summary" in name:
        flags["enable_model_summary"] = True
    if name == "barebones":
        flags |= dict.fromkeys(("enable_checkpointing", "logger", "enable_progress_bar", "enable_model_summary"), None)
        flags["log_every_n_steps"] = None
    kinds = KINDS if name in WORKING else ["plain", "sam"]
    if name == "accumulation":
        kinds = ["plain", "task", "das"]  # SAM refuses it
    flags["norm"] = name != "stochastic weight averaging"  # with one Lightning's last step has gradients of the past
    plain, reference, _ = run("plain", tmp_path, found=found, **flags)
    if "averaging" in name and flags["norm"]:  # averages a count and cuts it off; that of a task stays a count
        plain.norm.num_batches_tracked.fill_(reference.fit_loop.total_batch_idx + 1)
    for kind in kinds[1:]:
        model, fit, _ = run(kind, tmp_path, found=found, **flags)
        assert fit.global_step == reference.global_step > 0, kind
        assert fit.current_epoch == reference.current_epoch, kind
        assert_same_weights(plain, model)


def test_averaging_is_really_done(tmp_path):
    """The reference above would be satisfied by callbacks that do nothing."""
    ends = {name: run("sam", tmp_path, found=[WORKING[name]] if name else [])[0] for name in ("", *list(WORKING)[1:6])}
    weights = [next(iter(model.inner.parameters())).flatten() for model in ends.values()]
    for index, one in enumerate(weights):
        assert all(not one.equal(two) for two in weights[index + 1 :])


@pytest.mark.filterwarnings("ignore:.*SWA")
@pytest.mark.parametrize("kind", KINDS[1:])
def test_stochastic_weight_averaging_ends_with_the_average_and_its_own_statistics(kind, tmp_path):
    """The weights at the start of epochs 1 to 3, and running statistics of one more pass over the data."""
    starts = []
    keep = LambdaCallback(on_train_epoch_start=lambda t, model: starts.append([p.clone() for p in model.parameters()]))
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    model, _, _ = run(kind, tmp_path, found=[keep, swa])
    assert len(starts) == 5
    for parameter, *kept in zip(model.parameters(), *starts[1:4], strict=True):
        torch.testing.assert_close(parameter, sum(kept) / 3, rtol=1e-6, atol=1e-7)
    means = torch.stack([model.inner(x).mean(0) for x, _ in Batches()])
    torch.testing.assert_close(model.norm.running_mean, means.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path|.*ThroughputMonitor")  # Lightning about its own callbacks
@pytest.mark.parametrize("kind", KINDS)
def test_what_only_watches_changes_nothing_and_sees_it_all(kind, tmp_path):
    bare, _, _ = run(kind, tmp_path)
    seen = []
    watch = LambdaCallback(on_train_batch_end=lambda t, m, outputs, *args: seen.append(outputs["loss"].item()))
    found = [
        LearningRateMonitor(),
        ThroughputMonitor(batch_size_fn=len, window_size=2),
        OnExceptionCheckpoint(tmp_path),
        ModelCheckpoint(tmp_path / "best", monitor="val/loss"),
        watch,
    ]
    logger = CSVLogger(tmp_path, name=kind, version=0)
    model, fit, _ = run(kind, tmp_path, found=found, logger=logger, enable_checkpointing=True)
    assert_same_weights(bare, model)
    assert len(seen) == fit.global_step == 16
    rows = [line.split(",") for line in (tmp_path / kind / "version_0" / "metrics.csv").read_text().splitlines()]
    rates = [float(row[rows[0].index("lr-SGD")]) for row in rows[1:] if row[rows[0].index("lr-SGD")]]
    assert rates == pytest.approx([0.1 * 0.9**epoch for epoch in range(4)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_test_of_the_learning_rate_leaves_no_trace(kind, tmp_path):
    bare, _, _ = run(kind, tmp_path)
    finder = LearningRateFinder(num_training_steps=20, max_lr=1e6, update_attr=False)
    model, fit, _ = run(kind, tmp_path, found=[finder])
    assert len(finder.optimal_lr.results["lr"]) > 5
    assert_same_weights(bare, model)
    assert fit.global_step == 16


# --- refused ---


def late(**kwargs):
    return CompletionTask("tucker", 2, optimizer=sgd(lr=0.001), **kwargs)


def data(**kwargs):
    return CompletionDataModule("il2", seed=1, **{"batch_size": 300, **kwargs})


@pytest.mark.parametrize(
    ("callback", "make", "match"),
    [
        (lambda: StochasticWeightAveraging(swa_lrs=0.1), late, "built before training for StochasticWeightAveraging"),
        (lambda: ModelPruning("l1_unstructured"), late, "built before training for ModelPruning"),
        (lambda: BackboneFinetuning(), late, "built before training for BackboneFinetuning"),
        (lambda: LearningRateFinder(), late, "LearningRateFinder that sets the rate with a task"),
        (
            lambda: GradientAccumulationScheduler({1: 2}),
            lambda: late(sam=SAM()),
            "no GradientAccumulationScheduler with `sam`",
        ),
        (
            lambda: GradientAccumulationScheduler({1: 2}),
            lambda: late(accumulate_grad_batches=2),
            "with `accumulate_grad_batches` of the task, got both",
        ),
    ],
)
def test_what_could_not_act_is_refused_before_training(callback, make, match):
    with pytest.raises(ValueError, match=match):
        trainer(callbacks=[callback()]).fit(make(), datamodule=data())


def test_a_batch_size_to_start_from():
    with pytest.raises(ValueError, match="expected an int in `batch_size` of the data for BatchSizeFinder, got null"):
        trainer(callbacks=[BatchSizeFinder()]).fit(late(), datamodule=data(batch_size=None))


@pytest.mark.parametrize("hook", ["optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"])
def test_hooks_that_sam_would_not_call_are_refused(hook):
    kind = type("Own", (Regression,), {hook: lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=rf"expected no {hook}\(\) in Own with `sam`"):
        trainer().fit(kind(optimizer=sgd(), sam=SAM()), Batches(), Batches())


# --- models built late ---


@pytest.mark.parametrize("sam", [None, SAM(rho=0)])
@pytest.mark.parametrize("name", ["exponential averaging", "weight averaging", "early stopping", "time limit"])
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_a_model_built_late_ends_as_one_built_at_once(name, sam, tmp_path):
    ends = []
    for shape in (None, (13, 4, 12, 8)):
        torch.manual_seed(1)
        model = CompletionTask("tucker", 2, shape=shape, optimizer=sgd(lr=0.001), sam=sam)
        torch.manual_seed(2)
        if shape is not None:
            model.build(shape)
        trainer(max_epochs=3, callbacks=[WORKING[name]()]).fit(model, datamodule=data())
        ends.append(model)
    assert_same_weights(*ends)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("sam", "das"), [(None, []), (SAM(rho=0.1), []), (None, [0.01])])
def test_the_batch_size_that_is_found_is_the_one_trained_with(sam, das, tmp_path):
    sizes = []

    class Sizes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(len(batch.value))

    module = data(batch_size=100)
    finder = BatchSizeFinder(init_val=16, max_trials=2, steps_per_trial=2)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[finder, Sizes(), *map(DeviationAwareScaling, das)])
    torch.manual_seed(1)
    model = late(sam=sam)
    fit.fit(model, datamodule=module)
    size = finder.optimal_batch_size
    assert size == module.batch_size == 32
    entries = len(module.splits["train"])
    assert fit.global_step == -(-entries // size)
    assert sizes[-fit.global_step :] == [size] * (entries // size) + [entries % size]


@pytest.mark.parametrize(("flag", "count"), [(2, 2), (1.0, 7)])
def test_overfitting_takes_the_same_batches_in_every_epoch(flag, count, tmp_path):
    seen = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch.value.clone())

    module = data(batch_size=200)
    trainer(tmp_path, max_epochs=3, overfit_batches=flag, callbacks=[Seen()]).fit(late(), datamodule=module)
    assert len(seen) == 3 * count
    for index, values in enumerate(seen):
        assert values.equal(seen[index % count])
    assert not seen[0].equal(seen[1])


@pytest.mark.parametrize("sam", [None, SAM(rho=0.1)])
def test_a_search_before_training_does_not_move_the_stream_of_batches(sam, tmp_path):
    ends = []
    for search in ([], [LearningRateFinder(num_training_steps=7, update_attr=False)]):
        torch.manual_seed(1)
        model = late(sam=sam)
        trainer(tmp_path, max_epochs=3, callbacks=search).fit(model, datamodule=data())
        ends.append(model)
    assert_same_weights(*ends)


def test_tuning_in_python(tmp_path):
    fit = trainer(tmp_path, max_epochs=9)
    limits = {"max_lr": 1e-3, "early_stop_threshold": None}
    found = Tuner(fit).lr_find(late(), datamodule=data(), num_training=20, update_attr=False, **limits)
    assert len(found.results["lr"]) == 20
