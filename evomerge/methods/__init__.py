"""Floor 3: merge methods, one file each.

A method turns the values of its parameters into a table for the kernels, in float64 on single
numbers: a `Span` or a `Mask` wherever it can be one. What is neither carries an expression of its
own, `Local` where elements do not depend on one another, `Whole` where rows or the matrix matter.

To add one: a file with a `Method` (see `method.py`) and its row in `METHODS` below. Search space,
README, checks of recipes and the tests in `tests/contracts/merge_method.py` follow from the row.
"""

from evomerge.methods import (
    arcee_fusion,
    breadcrumbs,
    consensus,
    dare,
    della,
    fourier,
    iso_c,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    pcb,
    ram,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv,
)
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
            della.LINEAR,
            della.TIES,
            breadcrumbs.LINEAR,
            breadcrumbs.TIES,
            sce.METHOD,
            ram.METHOD,
            ram.PLUS,
            consensus.METHOD,
            pcb.METHOD,
            slerp.METHOD,
            nuslerp.METHOD,
            multislerp.METHOD,
            karcher.METHOD,
            model_stock.METHOD,
            nearswap.METHOD,
            arcee_fusion.METHOD,
            fourier.METHOD,
            tsv.METHOD,
            iso_c.METHOD,
            passthrough.METHOD,
        )
    ],
)
"""Every merge method by its name in recipes."""
