"""LightningCLI with tenzoo's defaults, and errors of one line."""

from pathlib import Path
from typing import Any, Self

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar, StochasticWeightAveraging
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from tenzoo import __version__
from tenzoo.atomic import unused
from tenzoo.callbacks import RankWatch
from tenzoo.cli import cluster, resumed_run
from tenzoo.cli.bar import TrainingBar
from tenzoo.cli.checkpoints import read_checkpoint, settle_rank
from tenzoo.cli.checks import check_callbacks, check_environment, check_seed, check_trainer, tell_of_emulated_precision
from tenzoo.cli.continued_logs import Resumed
from tenzoo.cli.environment import FILE as ENVIRONMENT
from tenzoo.cli.environment import write_environment
from tenzoo.cli.log_folders import ELSEWHERE, LogFolders, SameFolder
from tenzoo.cli.report import log_final_metrics, print_metrics, tell_of_early_stops, write_metrics
from tenzoo.cli.run_folders import RUNS, checkpoint_of, config_of, name_of, run_of
from tenzoo.cli.start import ZOO, StartWeights, start_of
from tenzoo.cli.summary import NetworkSummary
from tenzoo.jobs import ExactResume, first_logged_step
from tenzoo.prediction import PredictionWriter
from tenzoo.tasks import Task
from tenzoo.training import NoProfiler
from tenzoo.zoo import reading

_OUTPUT = "the file of the predictions, such as completed.parquet; default: a file in the run's folder"
_PRETRAINED = "weights to start from, or to judge: `zoo`, `zoo:NAME`, a folder of save_pretrained, a name on the hub"
_INIT_FROM = "a checkpoint whose weights a new run starts from; `ckpt_path` goes on with its run"

_NEEDED = {"validate": ("val_dataloader", "validation_step"), "test": ("test_dataloader", "test_step")}
"""Methods of the data module and the task without which the Trainer cannot evaluate."""


class TrainingStart(Callback):
    """Notes whether training began: an error from then on is no mistake in the input, and shows its traceback."""

    def __init__(self) -> None:
        self.began = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = True


class _SaveConfig(SaveConfigCallback):
    """Writes the config beside the logs; without a logger there is no directory that belongs to this run alone.

    Loggers that send their logs elsewhere share a directory, or have none: there a number makes the name a new one, as
    it does for a run that goes on with other settings.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir if trainer.loggers else None  # a collective: every process asks, and asks once
        if folder is None:
            return
        if trainer.is_global_zero and not self.already_saved:
            self.already_saved = self._goes_on_as_it_was(Path(folder))
            if not self.already_saved:
                self.config_filename = unused(Path(folder) / "config.yaml").name
            if trainer.state.fn == TrainerFn.FITTING:
                write_environment(unused(Path(folder) / ENVIRONMENT))
        self.already_saved = trainer.strategy.broadcast(self.already_saved)
        super().setup(trainer, pl_module, stage)

    def _goes_on_as_it_was(self, folder: Path) -> bool:
        """Whether this is a run that goes on in its folder, with settings that were saved there."""
        resumed = self.config.get("ckpt_path")
        if resumed is None or run_of(Path(resumed)) != folder:
            return False
        own = _settings(self.parser.dump(self.config, skip_none=False))
        return any(_settings(path.read_text(encoding="utf-8")) == own for path in folder.glob("config*.yaml"))

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            checkpoint[resumed_run.KEY] = resumed_run.record(self.config)


class TenzooCLI(reading.ConfigCLI):
    """Adds to Lightning's: both loggers in one directory, a progress bar, a report, and checks of checkpoints.

    Attributes:
        training_start: Whether training began.
        log_folders: Those of this run.
        start: Weights that are loaded before the first step.
        run: Folder of the run that wrote the checkpoint, if there is one.
        first_step: The first step that a run that goes on logs.
    """

    training_start: TrainingStart
    log_folders: LogFolders
    start: Path | str | None
    run: Path | None
    first_step: int

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Make the attributes that are read also where ``__init__`` fails."""
        cli = super().__new__(cls)
        cli.training_start = TrainingStart()
        cli.log_folders = LogFolders()
        cli.start = cli.run = None
        return cli

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        if isinstance(args, list):
            name = self.config.get("subcommand")
            check_seed((self.config[name] if name else self.config).get("seed_everything"))

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if parser is not self.parser:
            parser.add_argument("--pretrained", type=str | None, default=None, nargs="?", const=ZOO, help=_PRETRAINED)
            parser.add_argument("--init_from", type=str | None, default=None, help=_INIT_FROM)

    @override
    def _parse_ckpt_path(self) -> None:
        # In place of Lightning's, which lets the checkpoint's settings win over the command line without a word.
        config = self.config[self.config.subcommand]
        given = config.get("ckpt_path")
        self.start = start_of(config.get("pretrained"), config.get("init_from"), map(str, config.get("config") or []))
        if self.config.subcommand != "fit" and (given is None) == (self.start is None):
            got = "none" if given is None else f"both, {given!r} and {str(self.start)!r}"
            raise ValueError(
                f"expected a checkpoint in `ckpt_path`, or `pretrained`, for {self.config.subcommand}, got {got}"
            )
        if given is None:
            given = config.ckpt_path = (
                cluster.where_it_goes_on(_root(config.trainer)) if self.config.subcommand == "fit" else None
            )
        if given is None:
            return
        self.start = None  # the run that goes on has begun with it
        configs = [str(each) for each in config.get("config") or []]
        given = checkpoint_of(str(given), _root(config.trainer), config_of(configs))
        self.run = run_of(Path(given))
        given = config.ckpt_path = given if self.run is None else str(self.run / "checkpoints" / Path(given).name)
        checkpoint = read_checkpoint(Path(given))
        settle_rank(config.model, checkpoint)
        if self.config.subcommand == "fit":
            resumed_run.check_same_run(checkpoint, config, Path(given))
            self.first_step = first_logged_step(checkpoint)
        else:
            resumed_run.check_judged(checkpoint, config, Path(given))

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if "verbose" in self._subcommand_method_arguments[subcommand]:
            parser.set_defaults(verbose=False)  # the report below says it once, and shorter
        if "return_predictions" in self._subcommand_method_arguments[subcommand]:
            parser.set_defaults(return_predictions=False)  # they are written as they come, not held in memory
            parser.add_argument("--output", type=str | None, default=None, help=_OUTPUT)
        return parser

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer", default={})
        callbacks = settings.get("callbacks") or []
        check_trainer(settings, self.subcommand)
        check_callbacks(callbacks if isinstance(callbacks, list) else [callbacks])
        extra: list[Callback] = [self.training_start, *([] if _any_of(callbacks, RankWatch) else [RankWatch()])]
        logger = settings.get("logger")
        elsewhere = logger if isinstance(logger, list) else [logger]
        if logger in (None, True) or (elsewhere and all(isinstance(each, ELSEWHERE) for each in elsewhere)):
            own = self._own_loggers(settings, callbacks)
            kwargs["logger"] = own if logger in (None, True) else [*own, *elsewhere]
            extra.append(SameFolder(self.log_folders.own))
        if settings.get("profiler") is None:
            kwargs["profiler"] = NoProfiler()
        if settings.get("enable_progress_bar") is not False and not _any_of(callbacks, ProgressBar):
            extra.append(TrainingBar())
        if settings.get("enable_model_summary") is not False and not _any_of(callbacks, ModelSummary):
            extra.append(NetworkSummary())
        if self.subcommand == "predict":
            extra += _writers(self.model, callbacks, self._get(self.config_init, "output", default=None))
        if self.start is not None:
            given = callbacks if isinstance(callbacks, list) else [callbacks]
            kwargs["callbacks"] = [StartWeights(self.start), *given]  # before what looks at the norms of the cores
        trainer = self._instantiate_trainer({**settings, **kwargs}, extra)
        self.log_folders.claim(trainer.loggers)
        cluster.prepare(trainer, _root(settings))
        if self.subcommand == "fit":
            tell_of_emulated_precision(trainer)
        return trainer

    def _own_loggers(self, settings: Any, callbacks: Any) -> list[Logger]:
        """Those of a new run, or of the run that goes on; what judges a run lies beside it."""
        command, config = str(self.subcommand), self.config[self.subcommand]
        if command == "fit" and self.run is not None:
            return self.log_folders.same_run(Resumed(self.run, self.first_step))
        root = Path(_root(settings))
        if self.run is not None and root.resolve() in self.run.resolve().parents:
            return self.log_folders.new_run(self.run.parent, command=command)
        configs = [str(each) for each in config.get("config") or []]
        given = callbacks if isinstance(callbacks, list) else [callbacks]
        name = name_of(configs, self.model, given, config.get("seed_everything"))
        return self.log_folders.new_run(root / name, command=command)

    def after_fit(self) -> None:
        """Judge the best weights, where a checkpoint callback chose them by a metric, else the last.

        Where weights are averaged at the end of training, these are judged, and saved beside the other checkpoints,
        none of which has them.
        """
        trainer = self.trainer
        if trainer.interrupted:
            return
        tell_of_early_stops(trainer)
        chosen = trainer.checkpoint_callback
        best, weights = None, "the last weights"
        if isinstance(chosen, ModelCheckpoint) and chosen.monitor is not None and _has_best(chosen):
            best, weights = chosen.best_model_path, f"the weights with the best {chosen.monitor}"
            if not all(each.keeps_best for each in trainer.callbacks if isinstance(each, ExactResume)):  # type: ignore[attr-defined]
                weights += " since the run was resumed"
        if _any_of(trainer.callbacks, StochasticWeightAveraging):  # type: ignore[attr-defined]
            best, weights = None, "the averaged weights"
            folder = getattr(chosen, "dirpath", None) or Path(trainer.log_dir or trainer.default_root_dir)
            trainer.save_checkpoint(
                trainer.strategy.broadcast(unused(Path(folder) / "averaged.ckpt", "-v")), weights_only=True
            )
        metrics: dict[str, Any] = {}
        for name in self.model.final_evaluations():
            loader, step = _NEEDED[name]
            if is_overridden(loader, self.datamodule) and is_overridden(step, self.model):
                getattr(trainer, name)(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
                metrics.update(trainer.logged_metrics)
        cluster.forget(trainer, _root(self._get(self.config_init, "trainer", default={})))
        log_final_metrics(trainer, metrics)
        print_metrics(trainer, metrics, weights=weights)
        write_metrics(trainer, metrics, weights=weights, checkpoint=best)

    def after_validate(self) -> None:
        """Print the metrics."""
        metrics = self.trainer.logged_metrics
        judged = self.config[self.config.subcommand].ckpt_path or self.start
        print_metrics(self.trainer, metrics, weights=f"the weights of {judged}")

    def after_test(self) -> None:
        """Print the metrics."""
        self.after_validate()


def _root(settings: Any) -> str:
    """The folder of all runs."""
    return str(settings.get("default_root_dir") or RUNS)


def _has_best(checkpoint: ModelCheckpoint) -> bool:
    """Whether the best weights are known and there: a resumed run that forgot their score starts with the old path."""
    return checkpoint.best_model_score is not None and Path(checkpoint.best_model_path).is_file()


def _settings(text: str) -> Any:
    """What a saved config says of a run, other than where it begins."""
    content = yaml.safe_load(text)
    return {**content, "ckpt_path": None} if isinstance(content, dict) else content


def _writers(task: Task, callbacks: Any, output: str | None) -> list[Callback]:
    """The task's writer of predictions, unless the callbacks have one; a line says where nothing writes them."""
    writer = task.prediction_writer()
    if output is not None:
        if not isinstance(writer, PredictionWriter) or _any_of(callbacks, type(writer)):
            raise ValueError(
                f"expected no `output` where {type(task).__name__} or its callbacks have their own way to write "
                f"predictions, got {output!r}"
            )
        writer.write_to(output)
    if writer is not None:
        return [] if _any_of(callbacks, type(writer)) else [writer]
    hooks = ("on_predict_batch_end", "on_predict_epoch_end", "on_predict_end")
    given = callbacks if isinstance(callbacks, list) else [callbacks]
    if not any(is_overridden(hook, each, parent=Callback) for each in given for hook in hooks):
        rank_zero_info(
            f"predictions are not written: {type(task).__name__}.prediction_writer() gives None, and no callback of "
            "`trainer.callbacks` takes them"
        )
    return []


def _any_of(callbacks: Any, kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in (callbacks if isinstance(callbacks, list) else [callbacks]))


def build(cli: TenzooCLI, argv: list[str], *, run: bool = True) -> None:
    """Initialize a command line, and run its command.

    Args:
        cli: Made by ``__new__`` only: its parsers are wanted also where this fails.
        argv: As on the command line, without the program's name.
        run: Whether ``argv`` begins with a subcommand.
    """
    check_environment()
    parser = {"prog": "tenzoo", "version": __version__}
    reading.build(cli, argv, run=run, parser=parser, save_config_callback=_SaveConfig, seed_everything_default=0)
