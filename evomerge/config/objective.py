"""ObjectiveConfig: how the metrics of a suite's tasks become the one number that is optimised."""

from typing import Literal

from evomerge.config.strict import StrictModel


class ObjectiveConfig(StrictModel):
    """What is optimised; higher is better. Tasks of weight 0 are scored but do not count."""

    kind: Literal["weighted_mean", "worst_task", "geometric_mean"] = "weighted_mean"
    """The mean over tasks by weight, the lowest task, or the geometric mean by weight."""

    scores: Literal["raw", "floor_normalised", "parent_relative"] = "raw"
    """What of a task enters the mean.

    `raw` is the metric itself, negated where lower is better; `floor_normalised` is
    (metric - floor) / (1 - floor) with the task's `floor`; `parent_relative` is the metric divided
    by the best parent's on that task. The latter two need metrics where higher is better.
    """
