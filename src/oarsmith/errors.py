"""The one error users see: what went wrong, where, and what to do about it."""

from __future__ import annotations

from typing import ClassVar


class OarsmithError(ValueError):
    """A problem the user can act on. The command line prints it as one block, without a traceback.

    Args:
        what: what is wrong, with the offending value, in one sentence.
        where: file:line, config key, tensor name or similar. Optional.
        fix: what to do, as an instruction. Optional only where nothing sensible can be said.

    Attributes:
        exit_code: exit status of the command that ends with this error.
        headline: the word the command line puts before it.
    """

    exit_code: ClassVar[int] = 2
    headline: ClassVar[str] = "error"

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        head = f"{where}: {what}" if where else what
        super().__init__(f"{head}\n  fix: {fix}" if fix else head)


class ConfigError(OarsmithError):
    """A configuration key, value or combination that cannot be honoured."""


class DataError(OarsmithError):
    """A data file or row that cannot be used."""


class CheckpointError(OarsmithError):
    """A checkpoint that is missing, damaged or does not fit the model."""


class ModelError(OarsmithError):
    """An architecture or model option that this version does not know."""


class TrainingError(OarsmithError):
    """Training cannot go on (NaN loss, nothing to train, disk full while saving)."""


class StoppedError(TrainingError):
    """The process was asked to end (SIGTERM) and has done so in good order: everything is saved."""

    exit_code: ClassVar[int] = 143  # 128 + SIGTERM, as shells report it
    headline: ClassVar[str] = "stopped"


class MissingExtraError(OarsmithError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            fix=f"pip install 'oarsmith[{extra}]'",
        )
