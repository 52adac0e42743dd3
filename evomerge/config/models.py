"""References to models (a local folder or a hub id with a revision) and the names of dtypes."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import model_serializer, model_validator

from evomerge.config.strict import StrictModel
from evomerge.errors import ConfigError

DtypeName = Literal["float32", "float16", "bfloat16"]


def absolute_path(text: str, folder: Path) -> Path:
    """Return a path as a user wrote it, `~` included, read from `folder` and without links.

    Raises:
        ConfigError: No path can be made of it.
    """
    try:
        return (folder / Path(text).expanduser()).resolve()
    except (RuntimeError, ValueError) as error:  # no such user, links in a circle, a null byte
        reason = str(error).rstrip(".")
        raise ConfigError(f"{text!r} is not a usable path ({reason}). Name another.") from None


class ModelRef(StrictModel):
    """One model: a folder on this machine, or a hub id with an optional revision.

    Written as a string (`./models/math-7b`, `org/math-7b`, `org/math-7b@v1.2`) or as a mapping with
    the fields below.
    """

    path: str
    """Folder, or hub id `owner/name`."""

    revision: str | None = None
    """Branch, tag or commit on the hub; None is the default branch. Not for local folders."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path, at, revision = value.rpartition("@")
        return {"path": path, "revision": revision} if at and path else {"path": value}

    @model_serializer
    def _to_string(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def relative_to(self, folder: Path) -> "ModelRef":
        """Return the reference with a relative local path read from `folder`, the config's own.

        A path is local when it starts with `.`, `/` or `~`, or when such a folder exists; else it
        is a hub id.

        Raises:
            ConfigError: No path can be made of it.
        """
        local = absolute_path(self.path, folder)
        # unlike Path.exists, os.path.exists says no to a name too long for a file
        if self.path.startswith((".", "/", "~")) or os.path.exists(local):
            return ModelRef(path=str(local), revision=self.revision)
        return self

    @property
    def is_local(self) -> bool:
        """Whether the reference is a folder on this machine (after `relative_to`)."""
        return self.path.startswith("/")
