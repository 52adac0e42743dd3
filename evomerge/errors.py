"""Every error that evomerge raises on purpose.

    EvoMergeError               printed without a traceback, exit code 1
    ├── ConfigError             what a user wrote: file, line, dotted field
    ├── CheckpointError         a model's files: missing, truncated, of another shape, not writable
    ├── MergeError              a recipe that is not a merge of these models
    ├── EvaluationError         tasks, metrics, items; a suite that cannot be scored
    │   └── NonFiniteError      NaN or Inf in weights, logits or scores: a failed trial, not a score
    ├── StudyError              a study that cannot be opened, written or continued
    ├── WorkerError             workers that cannot be started
    ├── MissingDependencyError  an optional package; names the pip command
    └── InterruptedStudy        stopped on request and resumable, exit code 3

A message is one sentence with where, what came, what is allowed, then what to do. Any other
exception is our bug and keeps its traceback.
"""


class EvoMergeError(Exception):
    """Root of the errors that a user can act on."""

    exit_code = 1


class ConfigError(EvoMergeError):
    """A setting is unknown, of the wrong kind, out of range, or contradicts another one."""


class CheckpointError(EvoMergeError):
    """A model's files cannot be found, read, or written."""


class MergeError(EvoMergeError):
    """A recipe does not describe a merge of the models it names."""


class EvaluationError(EvoMergeError):
    """Tasks, metrics or items cannot be had, or a model cannot be scored on them."""


class NonFiniteError(EvaluationError):
    """NaN or Inf appeared in weights, logits or scores."""


class StudyError(EvoMergeError):
    """A study cannot be opened, written, or continued."""


class WorkerError(EvoMergeError):
    """Workers cannot be started or kept alive."""


class MissingDependencyError(EvoMergeError):
    """An optional package is not installed."""


class InterruptedStudy(EvoMergeError):
    """The search was stopped on request; it can be resumed."""

    exit_code = 3
