"""Job and Outcome: what is sent to a worker and what comes back."""

from dataclasses import dataclass, field
from typing import Literal

from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.recipe import Recipe
from evomerge.config.search import SourcePlace
from evomerge.config.suite import SuiteConfig
from evomerge.evaluate.evaluator import Chunk, EvalResult
from evomerge.evaluate.items import Used


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker prepares once, before its first job.

    Attributes:
        models: Every model a recipe may name, the base first.
        tokenizer: The model whose tokenizer is used.
        out_dtype: Dtype of the live model.
        suite: Tasks and how they are asked.
        cpus: CPU threads.
        device: `cpu` or `cuda`.
        log_folder: Folder for the worker's log; None logs nowhere.
        method: Name of the merge method, for what it keeps in memory.
        gpus: GPUs of a worker.
        count: Workers, all of them on this machine for what is known.
        sources: Where the models' tensors lie; see `WorkersConfig`.
        used: Items of earlier confirmations, by task and split, which no further one gets.
    """

    models: tuple[ModelRef, ...]
    tokenizer: ModelRef
    out_dtype: DtypeName
    suite: SuiteConfig
    cpus: int
    device: str
    log_folder: str | None = None
    method: str = "linear"
    gpus: float = 0.0
    count: int = 1
    sources: SourcePlace = "auto"
    used: Used = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One chunk of one candidate.

    Attributes:
        trial: Number of the trial it belongs to.
        recipe: What to merge; a worker that holds it already does not merge again.
        chunk: The items to score.
        attempt: 1 for the first try.
    """

    trial: int
    recipe: Recipe
    chunk: Chunk
    attempt: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: The job.
        kind: `done`; `invalid` (the recipe is not a merge of these models); `failed` (merging or
            scoring raised: the candidate's fault); `lost` (the worker died: not the candidate's
            fault).
        worker: Which worker.
        result: Results per item, for `done` only.
        digest: Digest of the weights that were scored, for `done` only.
        seconds_merge: Time to materialise the weights; 0 when they were there already.
        seconds_score: Time to score.
        error: One sentence, unless `done`.
        kernels: Which implementations of the kernels merged the weights, for `done` only.
    """

    job: Job
    kind: Literal["done", "invalid", "failed", "lost"]
    worker: str
    result: EvalResult | None = None
    digest: str | None = None
    seconds_merge: float = 0.0
    seconds_score: float = 0.0
    error: str | None = None
    kernels: tuple[str, ...] = ()
