"""Floor 3: merge methods, one file each.

A method turns the values of its parameters into the table of one of the two kernels, in float64 on
single numbers; whatever touches every element belongs to `kernels/`.

To add one: a file with a `Method` (see `method.py`) and its row in `METHODS` below. Search space,
README, checks of recipes and the tests in `tests/contracts/merge_method.py` follow from the row.
"""

from evomerge.methods import dare, linear, passthrough, slerp, task_arithmetic, ties
from evomerge.methods.method import Method
from evomerge.registry import Table

METHODS: Table[Method] = Table(
    "merge method",
    [
        (method.name, method)
        for method in (
            linear.METHOD,
            task_arithmetic.METHOD,
            ties.METHOD,
            dare.LINEAR,
            dare.TIES,
            slerp.METHOD,
            passthrough.METHOD,
        )
    ],
)
"""Every merge method by its name in recipes."""
