"""A warning of Lightning that does not hold for SAM, silenced during the fit and no longer."""

import warnings
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

_MESSAGE = "Using ModelCheckpoint with manual optimization"


class QuietCheckpoints(Callback):
    """Silences the warning that checkpoints under manual optimization hold the weights after the step.

    With SAM they should: that is what checkpoints of automatic optimization hold. Other modules of the process are
    warned as before.
    """

    def __init__(self) -> None:
        self._filter: Any = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(pl_module, "sam", None) is not None:
            before = list(warnings.filters)
            warnings.filterwarnings("ignore", message=_MESSAGE)
            self._filter = None if warnings.filters[0] in before else warnings.filters[0]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._filter in warnings.filters:
            cast(list[Any], warnings.filters).remove(self._filter)
        self._filter = None
