"""SearchConfig: the whole run as a user writes it, and the only checks that span its sections."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from evomerge.config.models import DtypeName, ModelRef, absolute_path
from evomerge.config.objective import ObjectiveConfig
from evomerge.config.proposer import ProposerConfig
from evomerge.config.recipe import Rounding, ThresholdTies
from evomerge.config.space import SpaceConfig
from evomerge.config.strict import Loc, Origin, StrictModel, override, read_yaml, validate
from evomerge.config.suite import SuiteConfig
from evomerge.errors import ConfigError
from evomerge.registry import did_you_mean

BASE = "base"
"""The name under which a config speaks of the base model."""


def _said_off(value: Any) -> Any:
    # YAML reads a bare off as false
    return "off" if value is False else value


class BudgetConfig(StrictModel):
    """When the search ends: whichever comes first. Baselines and confirmation come on top."""

    evaluations: int | None = Field(None, ge=1)
    """Candidates scored (failed ones count, duplicates do not)."""

    examples: int | None = Field(None, ge=1)
    """Items scored, summed over candidates."""

    seconds: float | None = Field(None, gt=0)
    """Wall time of the search, over all its sessions."""

    @model_validator(mode="after")
    def _some_limit(self) -> "BudgetConfig":
        if self.evaluations is None and self.examples is None and self.seconds is None:
            raise ValueError("no limit came. Give evaluations, examples or seconds.")
        return self


BaselineName = Literal[
    "uniform", "greedy_soup", "lambda_sweep", "ties", "model_stock", "random_search"
]
"""Baselines that a study may have beside base and parents.

`uniform`: the mean of the parents. `greedy_soup`: the mean of those parents that do not lower the
search score, tried from the best on. `lambda_sweep`: the base plus 0.2, 0.4 ... 1.0 times the sum
of all task vectors; the best counts. `ties`: a density of 0.2, weights and lambda of 1.
`model_stock`: as it is. `random_search`: as many random candidates as the search has scored, after
it; the best counts.
"""


class StudyConfig(StrictModel):
    """Where a search is kept and how long it goes on."""

    name: str = Field(min_length=1, max_length=200)
    folder: str
    """Holds all of the study: trials, results per item, logs, lock. Relative to the config file."""

    storage: str | None = None
    """None or a path is an Optuna journal file; anything with `://` is a SQLAlchemy URL.

    None is the file `FOLDER/journal.log`.
    """

    seed: int = Field(0, ge=0)
    """Root of every random stream of the study."""

    budget: BudgetConfig

    baselines: tuple[BaselineName, ...] = (
        "uniform",
        "greedy_soup",
        "lambda_sweep",
        "ties",
        "model_stock",
    )
    """What the search is compared with, beside base and parents, which always are.

    All that cost a few evaluations; `random_search` doubles the cost of a study and is on request.
    What is no merge of these models is left out, and said. May change when a study is resumed.
    """

    @property
    def journal(self) -> Path | None:
        """The journal file; None when the storage is a database."""
        return journal_of(self.storage) if self.storage else Path(self.folder) / "journal.log"


def journal_of(storage: str) -> Path | None:
    """Return the journal file that a storage names; None for the URL of a database."""
    return None if "://" in storage else Path(storage)


class ModelsConfig(StrictModel):
    """The base model and the parents, each parent under a short name."""

    base: ModelRef
    parents: dict[str, ModelRef] = Field(min_length=1)

    @field_validator("parents")
    @classmethod
    def _names(cls, parents: dict[str, ModelRef]) -> dict[str, ModelRef]:
        for name in parents:
            if name == BASE or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"parent name {name!r} is not usable. Use letters, digits, - and _, and "
                    "another word than base."
                )
        return parents


FixedValue = float | bool | dict[str, float | bool]
"""A parameter's value for all parents, or for each parent by name."""


class MergeConfig(StrictModel):
    """The merge method and everything about the merge that is not searched."""

    method: str
    parameters: dict[str, FixedValue] = Field(default_factory=dict)
    """Fixed parameters of the method: one value, or a mapping from parent to value."""

    dtype: Literal["float32"] = "float32"
    """Arithmetic. Sources are read as stored and merged in float32; only that is offered."""

    out_dtype: DtypeName | None = None
    """Dtype of the merged model, scored and exported; None is the base's."""

    threshold_ties: ThresholdTies = "keep"
    """Whether TIES and breadcrumbs keep all elements that equal the last one kept, or exactly as
    many as the density says, by `index` or by `hash`; see a recipe's."""

    rounding: Rounding = "nearest"
    """How merged models become bfloat16; see a recipe's. Baselines are rounded to nearest."""

    tokenizer: str | None = None
    """Whose tokenizer and chat template the merge takes: `base` or a parent's name. Models with
    other vocabularies are brought to it row by row. None is the base's; others are refused."""


RacingMode = Literal["off", "conservative", "aggressive"]
"""How readily candidates are stopped before all search items are scored."""


class RacingConfig(StrictModel):
    """Whether candidates that will not do are scored on fewer items. May change on resume."""

    mode: Annotated[RacingMode, BeforeValidator(_said_off)] = "off"
    """After each chunk of items a candidate is compared with the incumbent, the best model that was
    fully scored when the candidate was asked for, on the items that both have seen.

    `conservative` stops it where one that is as good as the incumbent would look so bad in 5 % of
    cases, over all looks together; `aggressive` in 25 %. The proposer is told what the whole score
    is expected to be. Metrics must be means over items.
    """


class ConfirmConfig(StrictModel):
    """Who is scored on the confirm items, besides base, parents and baselines. May change."""

    best: int = Field(5, ge=1)
    """So many of the best trials by their score on the search items."""

    mean: bool = True
    """And the centre of what the proposer would ask next, where it has one: an average over many
    candidates, it has not been picked for its luck."""


SourcePlace = Literal["auto", "mapped", "resident", "streamed"]
"""Where a worker's sources lie."""


class WorkersConfig(StrictModel):
    """Where candidates are merged and scored."""

    pool: Literal["inline", "ray"] = "inline"
    """`inline` works in this process; `ray` on a cluster."""

    address: str = "local"
    """For Ray: an address, `local` (a cluster for this run) or `auto` (this machine's)."""

    count: int = Field(1, ge=1)
    """Workers; each holds one model."""

    cpus: int = Field(1, ge=1)
    """CPU threads of a worker, the same inline and on Ray."""

    gpus: float = Field(0.0, ge=0.0)
    """GPUs of a worker; below 1 several share one. 0 is the CPU."""

    sources: SourcePlace = "auto"
    """Where the models' tensors lie.

    `mapped`: in their files, which the system keeps in memory once for all workers of a machine.
    `resident`: in the worker's own memory, on its device. `streamed`: in host memory, copied to the
    GPU piece by piece for each candidate. `auto` is what fits, as `evomerge check` prints it.
    """


class SearchConfig(StrictModel):
    """One search: what to merge, what varies, how it is scored and proposed, where it runs."""

    study: StudyConfig
    models: ModelsConfig
    merge: MergeConfig
    space: SpaceConfig
    suite: SuiteConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    proposer: ProposerConfig = ProposerConfig()
    racing: RacingConfig = RacingConfig()
    confirm: ConfirmConfig = ConfirmConfig()
    workers: WorkersConfig = WorkersConfig()

    _origin: Origin = PrivateAttr(default_factory=lambda: Origin("<config>"))

    @property
    def origin(self) -> Origin:
        """The file and lines the settings came from."""
        return self._origin

    @property
    def tokenizer_model(self) -> ModelRef:
        """The model whose tokenizer the merge takes."""
        return (
            self.models.base
            if self.merge.tokenizer in (None, BASE)
            else self.models.parents[self.merge.tokenizer]
        )


def load_search(path: str | Path, settings: Sequence[str] = ()) -> SearchConfig:
    """Read a search config; relative paths in it are read from its own folder.

    Args:
        path: YAML file.
        settings: Changes in the form `dotted.path=value`, as of `--set`.

    Raises:
        ConfigError: One line for each problem, with file, line and field.
    """
    data, origin = read_yaml(path)
    if settings:
        data, origin = override(data, origin, settings)
    return make_search(data, origin, Path(path).resolve().parent)


def make_search(
    data: Any, origin: Origin | None = None, folder: Path | None = None
) -> SearchConfig:
    """Make a search config from plain data, e.g. in a notebook.

    Relative paths are read from `folder` (default: here).
    """
    origin = origin or Origin("<config>")
    config = _absolute(validate(SearchConfig, data, origin), origin, folder or Path.cwd())
    config._origin = origin
    _check_across(config)
    return config


def begins_with_field(line: str) -> bool:
    """Whether a line of an error begins with a dotted field of the config and a colon."""
    field, colon, _ = line.partition(": ")
    section = re.match(r"[a-z_]+", field)
    known = section is not None and section.group() in SearchConfig.model_fields
    return bool(colon) and known and bool(re.fullmatch(r"[a-z_]+(\.[\w-]+|\[\d+\])*", field))


def place_problems(error: ConfigError, origin: Origin) -> ConfigError:
    """Add file and line to the lines of an error that begin with a dotted field of the config."""
    placed = []
    for line in str(error).splitlines():
        if begins_with_field(line):
            field, _, rest = line.partition(": ")
            parts = [int(p) if p.isdigit() else p for p in re.findall(r"[^.\[\]]+", field)]
            line = f"{origin.at(*parts)}: {rest}"
        placed.append(line)
    return ConfigError("\n".join(placed))


def _absolute(config: SearchConfig, origin: Origin, folder: Path) -> SearchConfig:
    study, models = config.study, config.models
    written: dict[Loc, str | ModelRef] = {
        ("study", "folder"): study.folder,
        ("models", "base"): models.base,
        **{("models", "parents", name): ref for name, ref in models.parents.items()},
        **{("suite", "include_path", i): text for i, text in enumerate(config.suite.include_path)},
    }
    if study.storage and journal_of(study.storage):
        written["study", "storage"] = study.storage
    placed = _all_absolute(written, origin, folder)
    parents = {name: placed["models", "parents", name] for name in models.parents}
    include = tuple(value for loc, value in placed.items() if loc[:2] == ("suite", "include_path"))
    storage = placed.get(("study", "storage"), study.storage)
    return config.model_copy(
        update={
            "study": study.model_copy(
                update={"folder": placed["study", "folder"], "storage": storage}
            ),
            "models": models.model_copy(
                update={"base": placed["models", "base"], "parents": parents}
            ),
            "suite": config.suite.model_copy(update={"include_path": include}),
        }
    )


def _all_absolute(
    written: Mapping[Loc, str | ModelRef], origin: Origin, folder: Path
) -> dict[Loc, str | ModelRef]:
    placed: dict[Loc, str | ModelRef] = {}
    problems = []
    for loc, value in written.items():
        try:
            placed[loc] = (
                value.relative_to(folder)
                if isinstance(value, ModelRef)
                else str(absolute_path(value, folder))
            )
        except ConfigError as error:
            problems.append(f"{origin.at(*loc)}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return placed


def _check_across(config: SearchConfig) -> None:
    problems = []
    origin, parents = config.origin, list(config.models.parents)
    if config.merge.tokenizer not in [None, BASE, *parents]:
        hint = did_you_mean(str(config.merge.tokenizer), [BASE, *parents])
        problems.append(
            f"{origin.at('merge', 'tokenizer')}: no model is called "
            f"{config.merge.tokenizer!r}.{hint}"
        )
    first: dict[str, str] = {str(config.models.base): BASE}
    for name, ref in config.models.parents.items():
        if first.setdefault(str(ref), name) != name:
            place = origin.at("models", "parents", name)
            problems.append(
                f"{place}: is the same model as {first[str(ref)]}. Name each model once."
            )
    for name, value in config.merge.parameters.items():
        for parent in value if isinstance(value, dict) else ():
            if parent not in parents:
                place = origin.at("merge", "parameters", name, parent)
                problems.append(
                    f"{place}: no parent is called {parent!r}.{did_you_mean(parent, parents)}"
                )
    if config.workers.sources == "streamed" and not config.workers.gpus:
        place = origin.at("workers", "sources")
        problems.append(
            f"{place}: came streamed, which is for GPUs, and workers.gpus is 0. Remove it."
        )
    if config.workers.pool == "inline" and config.workers.count > 1:
        place = origin.at("workers", "count")
        problems.append(
            f"{place}: the inline pool has one worker, {config.workers.count} came. "
            "Set workers.pool to ray."
        )
    if problems:
        raise ConfigError("\n".join(problems))
