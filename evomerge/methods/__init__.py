"""Floor 3: merge methods, one file each; a method turns parameter values into the table of one of the two kernels.

To add a method: a file with a `METHOD` row (see `method.py`), and its name in `METHODS` below. The search space, the README's
table, the YAML check and the tests in `tests/contracts/merge_method.py` follow from the row. A method works in float64 on
single numbers; whatever touches every element belongs to `kernels/`.
"""

from evomerge.methods import dare, linear, passthrough, slerp, task_arithmetic, ties
from evomerge.methods.method import Method
from evomerge.registry import Table

METHODS: Table[Method] = Table(
    "merge method",
    (
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
    ),
)
"""Every merge method by its name in recipes."""
