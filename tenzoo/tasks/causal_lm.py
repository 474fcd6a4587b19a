"""Training and evaluation of a network that predicts the next token."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric
from typing_extensions import Unpack, override

from tenzoo.data.corpus.blocks import IGNORED
from tenzoo.models import Decoder
from tenzoo.models.generation import Continuation
from tenzoo.prediction import ContinuationsWriter
from tenzoo.tasks.arguments import SupervisedArguments
from tenzoo.tasks.command_line import Evaluation
from tenzoo.tasks.supervised import SupervisedTask


class CausalLMTask(SupervisedTask):
    """Fit a network to running text by the cross-entropy of each next token.

    A batch is a dict of ``"tokens"`` and ``"targets"``, the tokens that follow them, int64 ``(N, T)``; targets of
    ``-100`` do not count. The network maps tokens to logits ``(N, T, num_tokens)``. Logs ``train/loss``,
    ``train/tokens_per_s``, ``train/accuracy`` of each epoch, and from every validation or test
    ``{val,test}/loss``, in nats per token, ``{val,test}/accuracy``, the part of the tokens that have the largest logit,
    ``{val,test}/perplexity``, and ``{val,test}/bits_per_character`` where the data tell the number of characters.
    Prediction continues prompts.

    Args:
        network: The module, such as a :class:`~tenzoo.models.Decoder`. In YAML a ``class_path`` with ``init_args``.
        core_weight_decay: Weight decay of the cores; null takes the optimizer's.
        norm_weight_decay: Weight decay of norms and biases; null takes the optimizer's.
        continuation: How prediction continues prompts; null takes the defaults.
        **kwargs: ``base_width`` of :class:`~tenzoo.tasks.SupervisedTask`, and the arguments of
            :class:`~tenzoo.tasks.base.Task`.

    Raises:
        TypeError: If ``network`` is not a module.
        ValueError: For a value out of its range, or a weight decay for an optimizer that has none.
    """

    items: ClassVar[str] = "tokens"

    def __init__(
        self,
        network: nn.Module,
        *,
        core_weight_decay: float | None = None,
        norm_weight_decay: float | None = 0.0,
        continuation: Continuation | None = None,
        **kwargs: Unpack[SupervisedArguments],
    ) -> None:
        super().__init__(
            network,
            num_classes=getattr(network, "num_tokens", 0),
            core_weight_decay=core_weight_decay,
            norm_weight_decay=norm_weight_decay,
            **kwargs,
        )
        self.save_hyperparameters()
        if not isinstance(continuation, Continuation | None):
            raise TypeError(f"expected a Continuation or None in `continuation`, got {type(continuation).__name__}")
        self.continuation = continuation or Continuation()
        self._block = 1
        self.judge_by({"accuracy": _Accuracy(), "perplexity": _Perplexity()}, counts_correct=True)

    @override
    def setup(self, stage: str) -> None:
        """Refuse data of another vocabulary, and learn how many characters a token stands for."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        given = getattr(data, "num_tokens", self.num_classes)
        if self.num_classes and given != self.num_classes:
            raise ValueError(f"expected {given} in `num_tokens` of the network, as in the data, got {self.num_classes}")
        length = getattr(data, "hparams", {}).get("context")
        if isinstance(self.network, Decoder) and length is not None and length > self.network.architecture.context:
            context = self.network.architecture.context
            raise ValueError(
                f"expected at most {context}, the context of the network, in `context` of the data, got {length}"
            )
        texts: Mapping[str, Any] = getattr(data, "splits", {})
        for split in ("val", "test"):
            text: Any = texts.get(split) or texts.get("val")
            if getattr(text, "characters", 0):
                rate = (len(text.tokens) - 1) / text.characters
                self.metrics[f"{split}/bits_per_character"] = _BitsPerCharacter(rate)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(N, T, num_tokens)`` of tokens ``(N, T)``, in single precision or a higher one.

        Raises:
            ValueError: If the network gives another shape.
        """
        logits: Tensor = self.network(tokens)
        logits = getattr(logits, "logits", logits)
        logits = logits[0] if isinstance(logits, tuple) and logits else logits
        if not isinstance(logits, Tensor):
            raise TypeError(f"expected logits as a tensor from `network`, got {type(logits).__name__}")
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"expected logits of shape (N, T, num_tokens) from `network` for (N, T) = {tuple(tokens.shape)}, got "
                f"{tuple(logits.shape)}"
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @override
    def example_input(self, data: LightningDataModule) -> Tensor | None:
        """Tokens of the shape of the data module's batches."""
        shape: list[Any] = [data.hparams.get(name) for name in ("batch_size", "context")]
        return None if None in shape else torch.empty(shape, dtype=torch.int64, device="meta")

    # --- steps -----------------------------------------------------------------------------------------------------

    @override
    def outputs_and_targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``(N T, num_tokens)`` and targets ``(N T,)``."""
        targets = batch["targets"]
        self._block = targets.shape[1]
        return self(batch["tokens"]).flatten(0, 1), targets.flatten()

    @override
    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, in nats per token."""
        return F.cross_entropy(outputs, targets, ignore_index=IGNORED)

    @override
    def judged_outputs(self, outputs: Tensor) -> Tensor:
        """The logits."""
        return outputs

    @override
    def num_judged(self, targets: Tensor) -> int:
        """How many targets count."""
        return int((targets != IGNORED).sum())

    @override
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The prompt ``(1, T)`` of a batch, and the tokens ``(1, length)`` that continue it.

        Raises:
            TypeError: If the network is no :class:`~tenzoo.models.Decoder`.
        """
        if not isinstance(self.network, Decoder):
            raise TypeError(f"expected a Decoder in `network` to continue prompts, got {type(self.network).__name__}")
        prompt = batch["tokens"]
        tokens = torch.stack(list(self.continuation.of(self.network, prompt, batch_idx)), dim=1)
        return {"prompt": prompt, "continuation": tokens}

    @override
    def final_evaluations(self) -> tuple[Evaluation, ...]:
        """Of the texts that the data has: one of validation, and one of its own for the test."""
        texts = getattr(getattr(self.trainer, "datamodule", None), "splits", None)
        evaluations = super().final_evaluations()
        if texts is None:
            return evaluations
        return tuple(each for each in evaluations if {"validate": "val", "test": "test"}[each] in texts)

    @override
    def prediction_writer(self) -> ContinuationsWriter:
        """A writer of prompts and what continues them."""
        return ContinuationsWriter()

    @override
    def _own(self, split: str, size: int) -> int:
        return super()._own(split, size // self._block) * self._block


class _TokenMean(Metric):
    """A mean over all tokens that count, in double precision."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add the tokens of a batch."""
        counted = targets != IGNORED
        values = self._values(logits[counted], targets[counted])
        self.total = self.total + values.double().sum()
        self.count = self.count + values.numel()

    def _values(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    @override
    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.count


class _Accuracy(_TokenMean):
    @override
    def _values(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.argmax(1) == targets


class _Perplexity(_TokenMean):
    @override
    def compute(self) -> Tensor:
        """``exp`` of the mean."""
        return super().compute().exp()


class _BitsPerCharacter(_TokenMean):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        """Targets per character."""

    @override
    def compute(self) -> Tensor:
        """The mean in bits, for a character."""
        return super().compute() * self.rate / math.log(2)
