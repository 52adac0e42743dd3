"""Log files of the driver and the workers; every line names the trial it is about."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from evomerge.errors import StudyError

_TRIAL: ContextVar[str] = ContextVar("evomerge_trial", default="-")
_FORMAT = "%(asctime)s %(levelname)s trial=%(trial)s %(message)s"


class _WithTrial(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.trial = _TRIAL.get()
        return True


def open_log(folder: str | Path, name: str) -> logging.Handler:
    """Write to `folder/name.log` what evomerge logs in this process, and others' warnings.

    Returns:
        The handler, for `close_log`.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(Path(folder) / f"{name}.log", encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"{folder}: the log cannot be written ({error.strerror}). Mend it, or choose another "
            "study.folder."
        ) from None
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_WithTrial())
    logging.getLogger("evomerge").setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    return handler


def close_log(handler: logging.Handler) -> None:
    """Undo `open_log`."""
    logging.getLogger().removeHandler(handler)
    handler.close()


@contextmanager
def about_trial(number: int) -> Iterator[None]:
    """Name the trial in every line that is logged inside the `with` block."""
    token = _TRIAL.set(str(number))
    try:
        yield
    finally:
        _TRIAL.reset(token)
