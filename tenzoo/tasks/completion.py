"""Training and evaluation of a tensor completion."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanSquaredError, Metric, R2Score
from typing_extensions import Unpack

from tenzoo.data import CompletionBatch, CompletionDataModule
from tenzoo.data.checks import check_bool, check_int
from tenzoo.factorizations import FactorizationName, Rank, factorization_class
from tenzoo.models import CompletionEnsemble, TensorCompletion
from tenzoo.models.completion import check_interactions, num_parameters
from tenzoo.prediction import CompletedEntriesWriter
from tenzoo.tasks.arguments import TaskArguments
from tenzoo.tasks.base import Task
from tenzoo.tasks.command_line import Evaluation
from tenzoo.tasks.completion_terms import check_clip, check_decays, check_smooth_modes, check_smoothness, roughness
from tenzoo.tasks.rank_search import AUTO, Choice, check_minutes, choice_of, search
from tenzoo.training import batch_weight

_DECAYS = {"cores": "core_weight_decay", "biases": "bias_weight_decay"}


class CompletedBatch(NamedTuple):
    """Predictions of an ensemble: indices ``(N, order)``, values and their standard deviations ``(N,)``."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    value: Tensor
    deviation: Tensor


class CompletionTask(Task):
    """Fit a :class:`~tenzoo.models.TensorCompletion` to the observed entries of a tensor by least squares.

    Logs ``train/loss``, and from every validation or test ``{train,val,held_out}/{r2,rmse}`` in the units of the data.
    The data module decides which entries are in which split, and whether values are standardized.

    With plain SGD without momentum and weight decay, or with SparseAdam, a tensor that is too large to reconstruct gets
    row-sparse gradients: the time of a step then depends on its batch alone. This requires one process and no
    ``gradient_clip_val``: neither DDP nor clipping takes sparse gradients.

    Args:
        factorization: ``"cp"``, ``"tucker"``, ``"tt"``, ``"tr"`` or ``"btt"``.
        rank: As the factorization takes it: one number, a list, or a fraction of the number of cells. ``"auto"``
            chooses it before training by the validation entries, and ``core_weight_decay`` with it unless that is
            given, see :func:`~tenzoo.tasks.rank_search.search`. The search has the optimizer, but no scheduler, SAM or
            callbacks. Checkpoints have what was chosen. A run that goes on from one in Python looks again in vain:
            make its task by ``load_from_checkpoint``.
        search_minutes: Most minutes that ``rank="auto"`` takes.
        shape: Mode sizes; null takes those of the data.
        init_std: Root mean square of the tensor's entries at initialization, in standardized units.
        init: ``"normal"``, or ``"uniform"`` for cores drawn from U(0, 1).
        reduction: Loss per batch: ``"mean"`` or ``"sum"`` of squared residuals, in standardized units.
        biases: Whether each index of each mode has a number of its own, which is added to its entries, such as for a
            film that all like.
        core_weight_decay: Weight decay of the cores; null takes the optimizer's.
        bias_weight_decay: Weight decay of the biases; null takes the optimizer's.
        interactions: Groups of modes, such as ``[[0, 1], [0, 2]]``: one tensor for each, whose sum is the whole. What
            users think of films is learned better without a third mode where few entries are known.
        clip: What predictions are kept in, in the units of the data: ``"data"`` for the range of the training entries,
            or two numbers. Training does not see it.
        smoothness: For each mode a weight of the mean squared second difference along it, at the training entries, in
            standardized units; 0 for a mode without an order. For volumes, spectra and times.
        ensemble: Number of models that start differently. Their mean is predicted, and with validation entries its
            deviation, see :class:`~tenzoo.models.CompletionEnsemble`. SAM perturbs all together.
        **kwargs: The arguments of :class:`~tenzoo.tasks.base.Task`.

    Raises:
        ValueError: For an unknown format, rank or choice; from ``fit`` also for a shape other than the data's.
    """

    model: TensorCompletion | CompletionEnsemble

    def __init__(
        self,
        factorization: FactorizationName = "tucker",
        rank: Rank | Literal["auto"] = 8,
        *,
        search_minutes: float = 5.0,
        shape: Sequence[int] | None = None,
        init_std: float = 1.0,
        init: Literal["normal", "uniform"] = "normal",
        reduction: Literal["mean", "sum"] = "mean",
        biases: bool = False,
        core_weight_decay: float | None = None,
        bias_weight_decay: float | None = None,
        interactions: Sequence[Sequence[int]] | None = None,
        clip: Literal["data"] | Sequence[float] | None = None,
        smoothness: Sequence[float] | None = None,
        ensemble: int = 1,
        **kwargs: Unpack[TaskArguments],
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        factorization_class(factorization)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"expected 'mean' or 'sum' in `reduction`, got {reduction!r}")
        self.reduction = reduction
        self._decays = check_decays(core_weight_decay, bias_weight_decay, with_biases=biases)
        self._search_minutes = check_minutes(search_minutes)
        self.clip = check_clip(clip)
        self.smoothness = check_smoothness(smoothness)
        self._ensemble = check_int(ensemble, arg="ensemble", least=1)
        self._model_args: dict[str, Any] = {
            "factorization": factorization,
            "rank": rank,
            "init_std": init_std,
            "init": init,
            "biases": check_bool(biases, arg="biases"),
            "interactions": None if interactions is None else check_interactions(interactions),
            "clips": self.clip is not None,
        }
        self.shape = None if shape is None else tuple(shape)
        self._chooses_rank = isinstance(rank, str) and rank == AUTO
        self.metrics = nn.ModuleDict()
        self._excess: list[Tensor] = []
        if shape is not None and not self._chooses_rank:
            self.build(shape)

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
        if self.smoothness is not None:
            check_smooth_modes(self.smoothness, self.shape)
        if self._ensemble == 1:
            self.model = TensorCompletion(shape, **self._model_args)
        else:
            self.model = CompletionEnsemble(self._ensemble, shape, **self._model_args)

    @property
    def _members(self) -> list[TensorCompletion]:
        members = self.model.members if isinstance(self.model, CompletionEnsemble) else [self.model]
        return cast("list[TensorCompletion]", list(members))

    def configure_model(self) -> None:
        """Build the model, if it is not built yet, for the shape of the data and with the rank that is best for them.

        Raises:
            ValueError: With ``rank="auto"``, if there are no validation entries, or no error is finite.
        """
        if hasattr(self, "model"):
            return
        if self._chooses_rank:
            if self.trainer.state.fn != TrainerFn.FITTING:
                return  # on_load_checkpoint has the rank
            found = self._search() if self.trainer.is_global_zero else None
            self._take(cast("Choice", self.trainer.strategy.broadcast(found)))
        self.build(self._data.shape)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With ``rank="auto"`` build the model with the rank of the checkpoint."""
        if self._chooses_rank and "hyper_parameters" in checkpoint:
            choice = choice_of(checkpoint)
            built = hasattr(self, "model") and choice.rank == self._model_args["rank"]
            self._take(choice)
            if not built:
                self.build(self._data.shape)
        super().on_load_checkpoint(checkpoint)

    def _take(self, choice: Choice) -> None:
        self._model_args["rank"] = self.hparams["rank"] = choice.rank
        if choice.decay is not None:
            self._decays["cores"] = self.hparams["core_weight_decay"] = choice.decay

    def _check_built(self) -> None:
        if not hasattr(self, "model"):
            raise ValueError("expected a checkpoint with `rank` 'auto' in a run that does not train, got none")

    def on_validation_start(self) -> None:
        """Refuse ``rank="auto"`` without a checkpoint."""
        self._check_built()

    def on_test_start(self) -> None:
        """Refuse ``rank="auto"`` without a checkpoint."""
        self._check_built()

    def on_predict_start(self) -> None:
        """Refuse ``rank="auto"`` without a checkpoint."""
        self._check_built()

    def _search(self) -> Choice:
        def make(choice: Choice) -> tuple[TensorCompletion, Optimizer]:
            model = self._fitted_to_data(
                TensorCompletion(self._data.shape, **{**self._model_args, "rank": choice.rank})
            )
            optimizer = self._optimizer_over([model.to(device)], {**self._decays, "cores": choice.decay})
            model.sparse_grad = isinstance(optimizer, torch.optim.SparseAdam)
            return model, optimizer

        device = self.trainer.strategy.root_device
        return search(
            self._data,
            make,
            self._objective,
            num_parameters=lambda rank: num_parameters(self._data.shape, **{**self._model_args, "rank": rank}),
            decay=self._decays["cores"],
            summed=self.reduction == "sum",
            device=device,
            epochs=self.trainer.max_epochs,
            minutes=self._search_minutes,
        )

    def on_fit_start(self) -> None:
        """Copy the location, scale and range of the data into the model, and so into checkpoints."""
        super().on_fit_start()
        for member in self._members:
            self._fitted_to_data(member)

    def _fitted_to_data(self, model: TensorCompletion) -> TensorCompletion:
        data = self._data
        model.location.fill_(data.location)
        model.scale.fill_(data.scale)
        if self.clip is not None:
            known = data.splits["train"].value
            low, high = (known.min(), known.max()) if self.clip == "data" else self.clip
            model.low.fill_(low)
            model.high.fill_(high)
        return model

    def build_optimizer(self) -> Optimizer:
        """The optimizer; with groups for cores and biases where these have a weight decay of their own.

        Raises:
            ValueError: If it has no weight decay, and the arguments give one.
        """
        return self._optimizer_over(self._members, self._decays)

    def _optimizer_over(self, models: Sequence[TensorCompletion], decays: Mapping[str, float | None]) -> Optimizer:
        parameters = [each for model in models for each in model.parameters() if each.requires_grad]
        optimizer = self._optimizer_of(parameters)
        own = {name: decay for name, decay in decays.items() if decay is not None}
        if not own:
            return optimizer
        if "weight_decay" not in optimizer.param_groups[0]:
            name, decay = next(iter(own.items()))
            raise ValueError(
                f"expected an optimizer with weight_decay with `{_DECAYS[name]}` = {decay}, got "
                f"{type(optimizer).__name__}, which has none"
            )
        of_biases = {id(bias) for model in models for bias in model.biases or ()}
        groups = {
            "cores": [each for each in parameters if id(each) not in of_biases],
            "biases": [each for each in parameters if id(each) in of_biases],
        }
        return self._optimizer_of(
            [
                {"params": group, "name": name, **({"weight_decay": own[name]} if name in own else {})}
                for name, group in groups.items()
                if group
            ]
        )

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
        large = not self._members[0].reconstructs(min(entries, batch_size))
        sparse = only_sparse or (plain_sgd and large and clip is None and processes == 1)
        for member in self._members:
            member.sparse_grad = sparse
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

    def described_network(self, data: LightningDataModule) -> TensorCompletion | CompletionEnsemble:
        """The model, built for the data's shape where the arguments named none; the data's arguments may name it."""
        if not hasattr(self, "model") and self._chooses_rank:
            raise ValueError("expected a rank, got `rank` 'auto', which is chosen when training begins; give one")
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
        """Squared residuals of a batch, in standardized units, summed or averaged, and the penalty of smoothness.

        Of an ensemble it is the sum of the losses of its members: each is trained as if it were alone.
        """
        first, *others = (self._loss_of(member, batch) for member in self._members)
        return sum(others, first)

    def _loss_of(self, model: TensorCompletion, batch: CompletionBatch) -> Tensor:
        loss, weight = self._objective(model, batch), batch_weight(self)
        if self.reduction == "mean":
            return loss if weight == 1 else loss * weight
        # DDP averages over ranks, and the loss is a sum. A share of weight 0 repeats an entry of another rank.
        return loss * (self.trainer.world_size if weight else 0)

    def _objective(self, model: TensorCompletion, batch: CompletionBatch) -> Tensor:
        squares: Tensor = ((model(batch.index) - batch.value) / model.scale).square()
        penalty = 0.0 if self.smoothness is None else roughness(model, batch.index, self.smoothness)
        return squares.mean() + penalty if self.reduction == "mean" else squares.sum() + len(squares) * penalty

    def _metrics_of(self, split: str) -> dict[str, Metric]:
        return {key: metric for key, metric in self.metrics.items() if key.startswith(f"{split}/")}  # type: ignore[misc]

    def _update(self, batch: CompletionBatch, dataloader_idx: int) -> None:
        if isinstance(self.model, CompletionEnsemble):
            mean, variance = self.model.moments(batch.index)
            predicted = mean.double()
            if self._data.eval_split_names[dataloader_idx] == "val":
                self._excess.append((predicted - batch.value.double()).square() - variance.double())
        else:
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
        if isinstance(self.model, CompletionEnsemble) and self._excess and self.trainer.state.fn == TrainerFn.FITTING:
            self.model.noise.copy_(torch.cat(self._excess).mean().clamp(min=0).sqrt())
        self._excess.clear()
        self._log_metrics()

    def on_test_epoch_end(self) -> None:
        """Log R² and RMSE of every split."""
        self._excess.clear()
        self._log_metrics()

    def predict_step(
        self, batch: CompletionBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> CompletionBatch | CompletedBatch:
        """The batch's indices with the model's values, in the units of the data; of an ensemble with deviations."""
        if isinstance(self.model, CompletionEnsemble) and self.model.noise > 0:
            return CompletedBatch(batch.index, *self.model.with_deviation(batch.index))
        return CompletionBatch(batch.index, self.model(batch.index))


def as_completion_data(data: object) -> CompletionDataModule:
    """The data module, checked to be one of a tensor completion.

    Raises:
        TypeError: If it is another object.
    """
    if not isinstance(data, CompletionDataModule):
        raise TypeError(f"expected a CompletionDataModule as `datamodule`, got {type(data).__name__}")
    return data
