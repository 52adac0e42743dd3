"""Floor 5: where jobs run. `worker.py` does one job; a pool keeps workers and hands jobs to them.

`placement.py` brings models to where they are worked on.

To add a pool, implement `AbstractPool` in a file of its own and give it a row in `make_pool`;
`tests/workers` has what a pool must stand. Workers never touch the study: what they find goes
back to the driver in an `Outcome`.
"""

from evomerge.config.search import WorkersConfig
from evomerge.workers.job import WorkerSettings
from evomerge.workers.pool import AbstractPool, InlinePool


def make_pool(config: WorkersConfig, settings: WorkerSettings) -> AbstractPool:
    """Start the pool that a config asks for.

    Raises:
        EvoMergeError: Workers cannot be started.
    """
    if config.pool == "inline":
        return InlinePool(settings)
    from evomerge.workers.ray_pool import RayPool

    return RayPool(config, settings)
