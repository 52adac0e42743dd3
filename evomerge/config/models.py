"""References to models: a local folder or a hub id, with an adapter or not; the names of dtypes."""

import os
from pathlib import Path
from typing import Any, Literal, Self

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


class FolderRef(StrictModel):
    """A folder on this machine, or a hub id with an optional revision.

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
        return _split_revision(value) if isinstance(value, str) else value

    @model_serializer
    def _to_string(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def relative_to(self, folder: Path) -> Self:
        """Return the reference with a relative local path read from `folder`, the config's own.

        A path is local when it starts with `.`, `/` or `~`, or when such a folder exists; else it
        is a hub id.

        Raises:
            ConfigError: No path can be made of it.
        """
        local = absolute_path(self.path, folder)
        if self.path.startswith((".", "/", "~")) or _exists(local):
            return self.model_copy(update={"path": str(local)})
        return self

    @property
    def is_local(self) -> bool:
        """Whether the reference is a folder on this machine (after `relative_to`)."""
        return self.path.startswith("/")


class ModelRef(FolderRef):
    """One model: a folder or hub id, and the adapter (LoRA) that is applied to it, if any.

    Written as a string (`org/math-7b`, `org/base-7b@v1.2+org/math-lora@main`) or as a mapping
    (`{path: org/base-7b, revision: v1.2, adapter: org/math-lora}`); mergekit's
    `{model: {path, revision}, lora: {path, revision}}` is read too.

    The first `+` of a string begins the adapter, and the last `@` of each part its revision. A
    string that as a whole is the path of a folder is that folder, whatever is in its name.
    """

    adapter: FolderRef | None = None
    """Adapter in PEFT's format: a folder, or a hub id with an optional revision."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return _own_names(value)
        if not isinstance(value, str):
            return value
        if value.startswith("/") and os.path.isdir(value):
            return {"path": value}
        model, plus, adapter = value.partition("+")
        if not plus:
            return _split_revision(value)
        if not model or not adapter or "+" in adapter:
            raise ValueError(
                f"came {value!r}; a model, or a model and one adapter as model+adapter, is needed. "
                "To apply several adapters, list model+adapter once for each."
            )
        return {**_split_revision(model), "adapter": adapter}

    def __str__(self) -> str:
        return f"{super().__str__()}+{self.adapter}" if self.adapter else super().__str__()

    @property
    def without_adapter(self) -> "ModelRef":
        """The model that the adapter is applied to."""
        return self.model_copy(update={"adapter": None})

    def relative_to(self, folder: Path) -> "ModelRef":
        """Return the reference with relative local paths, the adapter's too, read from `folder`.

        A `+` or `@` that belongs to the name of an existing folder is found out here.

        Raises:
            ConfigError: No path can be made of it.
        """
        whole = absolute_path(str(self), folder)
        if os.path.isdir(whole):
            return ModelRef(path=str(whole))
        placed = super().relative_to(folder)
        adapter = self.adapter.relative_to(folder) if self.adapter else None
        return placed.model_copy(update={"adapter": adapter})


def _split_revision(text: str) -> dict[str, str | None]:
    if text.startswith("/"):  # a folder, which has no revision
        return {"path": text}
    path, at, revision = text.rpartition("@")
    return {"path": path, "revision": revision} if at and path else {"path": text}


def _own_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with this class's names in place of mergekit's `model` and `lora`.

    What does not fit together stays as it is, to be refused as an unknown key.
    """
    fields = dict(fields)
    if "lora" in fields and "adapter" not in fields:
        fields["adapter"] = fields.pop("lora")
    model = fields.get("model")
    if isinstance(model, str) and "path" not in fields:
        del fields["model"]
        return {**_split_revision(model), **fields}
    if isinstance(model, dict) and not model.keys() & fields.keys():
        del fields["model"]
        return {**model, **fields}
    return fields


def _exists(path: Path) -> bool:
    # unlike Path.exists, os.path.exists says no to a name too long for a file
    return os.path.exists(path)
