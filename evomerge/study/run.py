"""Start a search, or go on with one: the doors that the command line and notebooks use."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.config.search import SearchConfig, journal_of, load_search, make_search
from evomerge.config.strict import Origin, override
from evomerge.errors import InterruptedStudy, StudyError
from evomerge.evaluate.tasks import load_tasks
from evomerge.study.confirmation import Confirmation, used_items
from evomerge.study.driver import Driver, Surroundings
from evomerge.study.items import ItemStore
from evomerge.study.lock import study_lock
from evomerge.study.setup import Setup, prepare
from evomerge.study.spec import differences, make_spec, scoring_digest, versions
from evomerge.study.storage import StudyStorage, mend_journal, open_named, open_storage
from evomerge.study.summary import notes_of, sentences_of
from evomerge.workers import make_pool
from evomerge.workers.job import WorkerSettings
from evomerge.workers.logs import close_log, open_log
from evomerge.workers.pool import AbstractPool

log = logging.getLogger(__name__)

PoolMaker = Callable[[SearchConfig, WorkerSettings], AbstractPool]


def run_search(
    config: SearchConfig,
    *,
    resume: bool = False,
    observe: Callable[[dict[str, Any]], None] = lambda summary: None,
    interrupted: Callable[[], bool] = lambda: False,
    warn: Callable[[str], None] = lambda sentence: None,
    start_pool: PoolMaker = lambda config, settings: make_pool(config.workers, settings),
) -> None:
    """Run a search from where its study stands to the end of its budget.

    Args:
        config: The search.
        resume: Whether the study exists already; a new one is not started over an old one by
            mistake.
        observe: Called with the study's summary after every change.
        interrupted: Asked between jobs; True stops the search so that it can be resumed.
        warn: Called with each sentence about knobs that change nothing, before the search begins.
        start_pool: Makes the workers.

    Raises:
        ConfigError: The config does not fit the models or tasks.
        StudyError: The study exists (or does not), is in use, was made by another config, or its
            storage fails.
        InterruptedStudy: The search was stopped on request.
    """
    folder = Path(config.study.folder)
    if resume and not folder.exists():
        raise StudyError(
            f"study {config.study.name!r}: there is no folder {folder}. Start it first."
        )
    setup = prepare(config)  # before anything is written
    with _logged(config):
        for finding in setup.findings:
            log.warning("%s", finding.sentence)
            warn(f"warning: {finding.sentence}")
        for sentence in sentences_of(notes_of(setup)):
            log.warning(sentence)
            warn(sentence)
        with _open(setup, resume, observe, interrupted, start_pool) as driver:
            driver.run()


def confirm_study(
    config: SearchConfig,
    *,
    observe: Callable[[dict[str, Any]], None] = lambda summary: None,
    interrupted: Callable[[], bool] = lambda: False,
    start_pool: PoolMaker = lambda config, settings: make_pool(config.workers, settings),
) -> Confirmation:
    """Confirm what a study has found so far, on items that no confirmation has used yet.

    Args:
        config: The search.
        observe: As for `run_search`.
        interrupted: Likewise.
        start_pool: Likewise.

    Raises:
        ConfigError, StudyError, InterruptedStudy: As `run_search`; or no such items are left.
    """
    setup = prepare(config)
    with _logged(config):
        driver = _open(setup, True, observe, interrupted, start_pool)
        with driver as running:
            return running.confirm()


def confirmations_of(storage: StudyStorage) -> tuple[Confirmation, ...]:
    """Return the confirmations that a study holds."""
    return tuple(map(Confirmation.from_json, storage.attribute("confirmations") or ()))


def find_config(study: str, storage: str | None, settings: Sequence[str] = ()) -> SearchConfig:
    """Return the config of a study given by a config file, or by its name and storage."""
    if storage is None:
        return load_search(study, settings)
    return stored_config(study, storage, settings)


def stored_config(name: str, location: str, settings: Sequence[str] = ()) -> SearchConfig:
    """Return the config that a study was last run with, from its storage alone.

    A study whose folder was moved is found where its journal is now.

    Args:
        name: The study's name.
        location: Journal file or SQLAlchemy URL.
        settings: Changes in the form `dotted.path=value`, as of `--set`.

    Raises:
        StudyError: There is no such study, or it was not made by evomerge.
    """
    data = open_named(name, location).attribute("config")
    if data is None:
        raise StudyError(
            f"study {name!r}: {location} holds no evomerge config. Give the config file instead."
        )
    stored = json.loads(data)
    journal = journal_of(location)
    if journal is not None and stored["study"]["storage"] is None:
        stored["study"]["folder"] = str(journal.resolve().parent)
    else:
        stored["study"]["storage"] = str(journal.resolve()) if journal else location
    return make_search(*override(stored, Origin(f"<study {name}>"), settings))


@contextmanager
def _logged(config: SearchConfig) -> Iterator[None]:
    """Hold the study's lock, and keep its log."""
    folder = Path(config.study.folder)
    with study_lock(folder):
        handler = open_log(folder / "logs", "driver")
        try:
            yield
        finally:
            close_log(handler)


@contextmanager
def _open(
    setup: Setup,
    resume: bool,
    observe: Callable[[dict[str, Any]], None],
    interrupted: Callable[[], bool],
    start_pool: PoolMaker,
) -> Iterator[Driver]:
    """Open a study with its workers and give its driver; workers end with it."""
    config = setup.config
    if config.study.journal is not None:
        mend_journal(config.study.journal)
    storage = open_storage(config.study, create=not resume)
    # a study that something else made ends here, before it is written to
    records = storage.trials()
    stored = storage.attribute("spec")
    if stored is not None and not resume:
        raise StudyError(
            f"study {config.study.name!r} exists already with {len(records)} trials. "
            "Continue it with evomerge resume, or give study.name and study.folder of a new one."
        )
    confirmed = confirmations_of(storage)
    if confirmed:
        used = used_items(confirmed)
        setup = replace(setup, tasks=load_tasks(config.suite, used), used=used)
    proposer = setup.proposer()
    pool = start_pool(config, worker_settings(setup))
    try:
        spec = make_spec(setup, pool.facts())
        _claim(storage, setup, spec, stored)
        around = Surroundings(
            storage=storage,
            items=item_store(config, spec),
            pool=pool,
            proposer=proposer,
            observe=observe,
            interrupted=interrupted,
            confirmed=confirmed,
        )
        yield Driver(setup, around)
    except KeyboardInterrupt:
        storage.set_attribute("state", "interrupted")
        raise InterruptedStudy(
            f"study {config.study.name!r} was stopped; what finished is stored."
        ) from None
    finally:
        pool.close()


def _claim(
    storage: StudyStorage, setup: Setup, spec: dict[str, Any], stored: dict[str, Any] | None
) -> None:
    """Write the study's identity, or compare it with the stored one."""
    if stored is not None:
        changed = differences(stored, json.loads(json.dumps(spec)))
        if changed:
            raise StudyError(
                f"study {storage.name!r} was made by another config: {'; '.join(changed)}. "
                "Use a new study name, or evomerge export to keep what was found."
            )
    storage.set_attribute("spec", spec)
    storage.set_attribute("config", setup.config.model_dump_json(by_alias=True))
    storage.set_attribute("versions", versions())
    storage.set_attribute("notes", notes_of(setup))


def item_store(config: SearchConfig, spec: Mapping[str, Any]) -> ItemStore:
    """Return the store of results per item that belongs to a study's specification."""
    return ItemStore(Path(config.study.folder) / "items" / scoring_digest(spec))


def worker_settings(setup: Setup) -> WorkerSettings:
    """Return what each worker of a search prepares."""
    config = setup.config
    return WorkerSettings(
        models=(config.models.base, *config.models.parents.values()),
        tokenizer=config.tokenizer_model,
        out_dtype=setup.out_dtype,
        suite=config.suite,
        cpus=config.workers.cpus,
        device="cuda" if config.workers.gpus > 0 else "cpu",
        log_folder=str(Path(config.study.folder) / "logs")
        if config.workers.pool == "ray"
        else None,
        method=config.merge.method,
        gpus=config.workers.gpus,
        count=config.workers.count,
        sources=config.workers.sources,
        used=setup.used,
    )
