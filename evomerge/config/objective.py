"""ObjectiveConfig: how the metrics of a suite's tasks become the one number that is optimised."""

from typing import Literal

from evomerge.config.strict import StrictModel


class ObjectiveConfig(StrictModel):
    """What is optimised; higher is better. Tasks of weight 0 are scored and shown but do not count."""

    kind: Literal["weighted_mean", "worst_task", "geometric_mean"] = "weighted_mean"
    """The mean over tasks by their weights, the lowest score of any task, or the geometric mean by their weights."""

    scores: Literal["raw", "floor_normalised", "parent_relative"] = "raw"
    """The metric itself (negated where lower is better), (metric - floor) / (1 - floor) with the task's `floor`, or
    metric / the best parent's metric on that task. The latter two need metrics where higher is better."""
