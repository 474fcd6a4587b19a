"""A logger of a user's that sends its metrics elsewhere."""

from lightning.pytorch.loggers import Logger


class OwnLogger(Logger):
    """Has a folder that it shares with other runs, or none.

    Args:
        folder: It.
    """

    name, version = "own", "1"

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self._folder = folder

    @property
    def save_dir(self) -> str | None:
        """The folder."""
        return self._folder

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send nothing."""

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """Send nothing."""
