"""What the command line asks a task."""

from typing import Literal, TypeAlias

from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn

Evaluation: TypeAlias = Literal["validate", "test"]


class CommandLineMethods(nn.Module):
    """Methods of a task that the command line calls. Each has a default, so a task overrides those that it needs."""

    def prediction_writer(self) -> Callback | None:
        """A callback that writes what ``predict_step`` returns to a file; None where there is none.

        ``tenzoo predict`` adds it to the Trainer's callbacks, unless they contain one of its class.
        """
        return None

    def final_evaluations(self) -> tuple[Evaluation, ...]:
        """The methods of the Trainer with which ``tenzoo fit`` evaluates the trained weights."""
        return ("validate", "test")

    def described_network(self, data: LightningDataModule) -> nn.Module:
        """The module whose layers ``tenzoo describe`` shows, with the sizes that the data need."""
        return self

    def example_input(self, data: LightningDataModule) -> Tensor | None:
        """One batch of inputs of :meth:`described_network` on the meta device; None where its shape is not known.

        ``tenzoo describe`` counts operations for it. Its first dimension is the batch.
        """
        return None
