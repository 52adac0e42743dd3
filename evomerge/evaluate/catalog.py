"""Catalog: finds lm-eval tasks by name, the user's and lm-eval's own, or says why not."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from evomerge.errors import ConfigError
from evomerge.registry import did_you_mean


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's log to errors and loading without bars; what a user can act on, we say."""
    log, bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.ERROR)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


class Catalog:
    """Tasks by name: those of the given folders first, then lm-eval's own.

    The index of the latter takes 8 seconds and is made only when one of them is asked for.

    Args:
        folders: Existing folders with task YAML files.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self._folders = list(folders)
        self._local = TaskManager(include_path=self._folders, include_defaults=False)
        self._full: TaskManager | None = None

    def load(self, name: str, changes: Mapping[str, Any] | None = None) -> ConfigurableTask:
        """Load one task with its data.

        Args:
            name: Name of a task.
            changes: Fields of its YAML to be replaced.

        Raises:
            ConfigError: A sentence without its place: no such task, a group or tag, or it cannot be
                loaded.
        """
        manager = self._manager_with(name)
        if name not in manager.all_subtasks:
            raise ConfigError(self._why_not(name, manager))
        # only as a member of a group written in place can a registered task be changed
        member = {"task": name, **(changes or {})}
        try:
            task = manager.load([{"group": "evomerge", "task": [member]}])["tasks"][name]
        except Exception as error:  # other people's code and data: whatever it raises is told
            raise ConfigError(_why_not_loaded(name, error)) from None
        return _supported(name, task)

    def unreadable(self) -> list[str]:
        """Return a sentence for each YAML file that cannot be read; lm-eval skips it silently."""
        problems = []
        for path in sorted(p for folder in self._folders for p in Path(folder).rglob("*.yaml")):
            try:
                load_yaml(path, resolve_func=False)
            except (
                Exception
            ) as error:  # not YAML, a missing include, a cycle: all the same to the user
                problems.append(
                    f"{path} cannot be read ({_one_line(error)}). Its tasks are not known."
                )
        return problems

    def _manager_with(self, name: str) -> TaskManager:
        if name in self._local.task_index:
            return self._local
        if self._full is None:
            self._full = TaskManager(include_path=self._folders)
        return self._full

    def _why_not(self, name: str, manager: TaskManager) -> str:
        if name not in manager.task_index:
            own = did_you_mean(name, self._local.all_subtasks)
            theirs = did_you_mean(name, manager.all_subtasks)
            near = next((hint for hint in (own, theirs) if "Did you mean" in hint), own)
            return f"no task is called {name!r}.{near}"
        kind = "group" if name in manager.all_groups else "tag"
        members = ", ".join(_members(name, manager))
        return f"{name!r} is a {kind} of tasks. Write out those that are meant: {members}."


def _members(name: str, manager: TaskManager) -> list[str]:
    """Return the tasks of a group or tag, groups within it opened."""
    entry = manager.task_index.get(name)
    if entry is None or name in manager.all_subtasks:
        return [name]
    listed = entry.cfg.get("task", []) if entry.cfg else sorted(entry.tags)
    names = [listed] if isinstance(listed, str) else listed
    children = [c if isinstance(c, str) else c.get("task") or c.get("group") for c in names]
    flat = [
        task for child in children if isinstance(child, str) for task in _members(child, manager)
    ]
    return list(dict.fromkeys(flat))


def _supported(name: str, task: Any) -> ConfigurableTask:
    if not isinstance(task, ConfigurableTask):
        raise ConfigError(
            f"task {name!r} is a Python class outside lm-eval's YAML tasks. Use a task written in "
            "YAML."
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"task {name!r} runs code that the model writes, which a search does not do. Leave it "
            "out."
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(
            f"task {name!r} needs images or sound; only text is scored. Leave it out."
        )
    return task


def _why_not_loaded(name: str, error: Exception) -> str:
    reason = _one_line(error)
    if isinstance(error, ConnectionError) or "offline" in reason.lower():
        return (
            f"task {name!r}: its data is not on this machine and the hub cannot be reached "
            f"({reason}). Load it once with a connection, or use a task with local files."
        )
    return f"task {name!r} cannot be loaded ({reason}). Mend its YAML or its data files."


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
