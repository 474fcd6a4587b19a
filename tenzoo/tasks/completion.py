"""Training and evaluation of a tensor completion."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, R2Score
from typing_extensions import Unpack

from tenzoo.data import CompletionBatch, CompletionDataModule
from tenzoo.factorizations import FactorizationName, Rank, factorization_class
from tenzoo.models import TensorCompletion
from tenzoo.prediction import CompletedEntriesWriter
from tenzoo.tasks.arguments import TaskArguments
from tenzoo.tasks.base import Task
from tenzoo.tasks.command_line import Evaluation
from tenzoo.training import batch_weight


class CompletionTask(Task):
    """Fit a :class:`~tenzoo.models.TensorCompletion` to the observed entries of a tensor by least squares.

    Logs ``train/loss``, and from every validation or test ``{train,val,held_out}/{r2,rmse}`` in the units of the data.
    The data module decides which entries are in which split, and whether values are standardized.

    With plain SGD without momentum and weight decay, or with SparseAdam, a tensor that is too large to reconstruct gets
    row-sparse gradients: the time of a step then depends on its batch alone. This requires one process and no
    ``gradient_clip_val``: neither DDP nor clipping takes sparse gradients.

    Args:
        factorization: ``"cp"``, ``"tucker"``, ``"tt"``, ``"tr"`` or ``"btt"``.
        rank: As the factorization takes it: one number, a list, or a fraction of the number of cells.
        shape: Mode sizes; null takes those of the data.
        init_std: Root mean square of the tensor's entries at initialization, in standardized units.
        init: ``"normal"``, or ``"uniform"`` for cores drawn from U(0, 1).
        reduction: Loss per batch: ``"mean"`` or ``"sum"`` of squared residuals, in standardized units.
        **kwargs: The arguments of :class:`~tenzoo.tasks.base.Task`.

    Raises:
        ValueError: For an unknown format, rank or choice; from ``fit`` also for a shape other than the data's.
    """

    model: TensorCompletion

    def __init__(
        self,
        factorization: FactorizationName = "tucker",
        rank: Rank = 8,
        *,
        shape: Sequence[int] | None = None,
        init_std: float = 1.0,
        init: Literal["normal", "uniform"] = "normal",
        reduction: Literal["mean", "sum"] = "mean",
        **kwargs: Unpack[TaskArguments],
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        factorization_class(factorization)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"expected 'mean' or 'sum' in `reduction`, got {reduction!r}")
        self.reduction = reduction
        self._model_args = {"factorization": factorization, "rank": rank, "init_std": init_std, "init": init}
        self.shape = None if shape is None else tuple(shape)
        self.metrics = nn.ModuleDict()
        if shape is not None:
            self.model = TensorCompletion(shape, **self._model_args)  # type: ignore[arg-type]

    def forward(self, index: Tensor) -> Tensor:
        """Values, in the units of the data, at an ``(N, order)`` index; shape ``(N,)``."""
        values: Tensor = self.model(index)
        return values

    # --- building ----------------------------------------------------------------------------------------------

    @property
    def _data(self) -> CompletionDataModule:
        return as_completion_data(getattr(self.trainer, "datamodule", None))

    def setup(self, stage: str) -> None:
        """Check the data's shape and make a metric for each of its splits."""
        super().setup(stage)
        if self.trainer.precision in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
            raise ValueError(
                "expected a precision with float32 or float64 weights for CompletionTask, got "
                f"{self.trainer.precision!r}, which rounds the data; train with 'bf16-mixed' or '16-mixed'"
            )
        data = self._data
        if self.shape is not None and data.shape != self.shape:
            raise ValueError(f"expected the data's shape {list(data.shape)} in `shape`, got {list(self.shape)}")
        for split in data.eval_split_names:
            for name, metric in (("r2", R2Score()), ("rmse", MeanSquaredError(squared=False))):
                self.metrics[f"{split}/{name}"] = metric.set_dtype(torch.float64)

    def build(self, shape: Sequence[int]) -> None:
        """Build the model for a shape. Without ``shape`` in the arguments, this is done before training."""
        self.shape = tuple(shape)
        self.hparams["shape"] = list(shape)
        self.model = TensorCompletion(shape, **self._model_args)  # type: ignore[arg-type]

    def configure_model(self) -> None:
        """Build the model for the shape of the data, if the arguments give none."""
        if self.shape is None:
            self.build(self._data.shape)

    def on_fit_start(self) -> None:
        """Copy the location and scale of the data into the model, and so into checkpoints."""
        super().on_fit_start()
        self.model.location.fill_(self._data.location)
        self.model.scale.fill_(self._data.scale)

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and use row-sparse gradients where it and the size of the tensor allow them."""
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        only_sparse = isinstance(optimizer, torch.optim.SparseAdam)
        processes, clip = self.trainer.world_size, self.gradient_clip_val
        if only_sparse and processes > 1:  # DDP reduces sparse gradients only of torch's own embeddings
            raise ValueError(f"expected one process with SparseAdam, got {processes}; take Adam")
        if only_sparse and clip is not None:
            raise ValueError(f"expected no `gradient_clip_val` with SparseAdam, got {clip}; take Adam")
        plain_sgd = isinstance(optimizer, torch.optim.SGD) and not any(
            group["momentum"] or group["weight_decay"] for group in optimizer.param_groups
        )
        entries = len(self._data.splits["train"])
        batch_size = self._data.hparams["batch_size"] or entries
        large = not self.model.reconstructs(min(entries, batch_size))
        self.model.sparse_grad = only_sparse or (plain_sgd and large and clip is None and processes == 1)
        return configured

    @property
    def metric_names(self) -> set[str]:
        """The loss, R² and RMSE of every split of the data."""
        return {"train/loss", "train/loss_epoch", *self.metrics}

    # --- the command line --------------------------------------------------------------------------------------

    def prediction_writer(self) -> CompletedEntriesWriter:
        """A writer of indices and values."""
        return CompletedEntriesWriter()

    def final_evaluations(self) -> tuple[Evaluation, ...]:
        """Validation alone: a test has the same entries."""
        return ("validate",)

    def described_network(self, data: LightningDataModule) -> TensorCompletion:
        """The model, built for the data's shape where the arguments named none; the data's arguments may name it."""
        if self.shape is None:
            tensor = as_completion_data(data)
            shape: Sequence[int] | None = tensor.hparams["shape"]
            if shape is None:
                tensor.prepare_data()
                tensor.setup("fit")
                shape = tensor.shape
            self.build(shape)
        return self.model

    # --- steps -------------------------------------------------------------------------------------------------

    def loss(self, batch: CompletionBatch, batch_idx: int) -> Tensor:
        """Squared residuals of a batch, in standardized units, summed or averaged."""
        residual: Tensor = (self.model(batch.index) - batch.value) / self.model.scale
        weight = batch_weight(self)
        if self.reduction == "mean":
            return residual.square().mean() if weight == 1 else residual.square().mean() * weight
        # DDP averages over ranks, and the loss is a sum. A share of weight 0 repeats an entry of another rank.
        return residual.square().sum() * (self.trainer.world_size if weight else 0)

    def _metrics_of(self, split: str) -> dict[str, Metric]:
        return {key: metric for key, metric in self.metrics.items() if key.startswith(f"{split}/")}  # type: ignore[misc]

    def _update(self, batch: CompletionBatch, dataloader_idx: int) -> None:
        predicted = self.model(batch.index).double()
        for metric in self._metrics_of(self._data.eval_split_names[dataloader_idx]).values():
            metric.update(predicted, batch.value.double())

    def _log_metrics(self) -> None:
        splits = self._data.eval_split_names
        shown = "val/r2" if "val" in splits else "train/r2"
        for split in splits:
            for key, metric in self._metrics_of(split).items():
                self.log(key, metric.compute(), prog_bar=key == shown, sync_dist=True)
                metric.reset()

    def validation_step(self, batch: CompletionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of its split."""
        self._update(batch, dataloader_idx)

    def test_step(self, batch: CompletionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of its split."""
        self._update(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log R² and RMSE of every split."""
        self._log_metrics()

    def on_test_epoch_end(self) -> None:
        """Log R² and RMSE of every split."""
        self._log_metrics()

    def predict_step(self, batch: CompletionBatch, batch_idx: int, dataloader_idx: int = 0) -> CompletionBatch:
        """The batch's indices with the model's values, in the units of the data."""
        return CompletionBatch(batch.index, self.model(batch.index))


def as_completion_data(data: object) -> CompletionDataModule:
    """The data module, checked to be one of a tensor completion.

    Raises:
        TypeError: If it is another object.
    """
    if not isinstance(data, CompletionDataModule):
        raise TypeError(f"expected a CompletionDataModule as `datamodule`, got {type(data).__name__}")
    return data
