"""merge: from a recipe to a folder, in one call."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from evomerge.adapters.open import fingerprint_of, open_model
from evomerge.checkpoints.sidecars import copy_sidecars
from evomerge.checkpoints.writer import GIB
from evomerge.config.recipe import Recipe
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.bind import BoundMerge, ModelSet
from evomerge.merging.folder import Destination, Progress, quietly, write_folder
from evomerge.merging.model_card import write_model_card
from evomerge.merging.provenance import identity_of, write_provenance


def merge(
    recipe: Recipe,
    out: Path,
    statistics: StatisticsCache | None = None,
    shard_bytes: int = 5 * GIB,
    notify: Callable[[Progress], None] = quietly,
) -> str:
    """Carry out a recipe and write the result as a complete checkpoint.

    A merge that was killed or stopped (Ctrl-C) is gone on with by the next call for the same recipe
    and folder; whatever else goes wrong leaves nothing behind. The memory it takes is that of the
    largest tensor in all models, whatever the models' size, except that pickled models are mapped.

    Args:
        recipe: The merge; its models are looked up, and downloaded where they are hub ids.
        out: The new folder; must not exist, or be empty.
        statistics: What a search has found out about these models, to be reused; None starts anew.
        shard_bytes: Most bytes of tensors in one file.
        notify: Called at the start and whenever a tensor is written.

    Returns:
        The weights' digest, equal to that of the candidate that was scored with this recipe.

    Raises:
        CheckpointError: A model cannot be had, or the folder cannot be written.
        ConfigError: There is no such merge method.
        MergeError: The recipe is not a merge of these models.
        NonFiniteError: NaN or Inf in a model, or in the result.
    """
    sources = {str(ref): open_model(ref, mapped=False) for ref in recipe.references()}
    folders = {name: source.folder for name, source in sources.items()}
    bound = ModelSet(sources).bind(recipe)
    fingerprints = {name: fingerprint_of(source) for name, source in sources.items()}
    write_beside = partial(_write_beside, bound, folders, fingerprints)
    # a changed tokenizer is written into a temporary folder, so its rows count, not its files
    identity = identity_of(bound.plan, fingerprints, folders.values()) + bound.vocabulary.digest
    to = Destination(out, shard_bytes, identity, notify)
    # one merge needs ranks once, and its memory must not grow with the models
    statistics = statistics or StatisticsCache(keep_ranks=False)
    return write_folder(bound.plan, bound.sources, statistics, to, write_beside)


def _write_beside(
    bound: BoundMerge,
    folders: Mapping[str, Path],
    fingerprints: Mapping[str, str],
    out: Path,
    digest: str,
) -> None:
    plan, vocabulary = bound.plan, bound.vocabulary
    recipe = plan.recipe
    donor = folders[str(recipe.donor)]
    dtype = recipe.out_dtype or recipe.dtype
    sidecars = copy_sidecars(
        donor,
        vocabulary.tokenizer_folder,
        out,
        dtype=dtype,
        vocab_size=vocabulary.size,
        numbered_by=vocabulary.numbered_by,
        layers=plan.layers,
    )
    write_provenance(out, plan, digest, fingerprints, sidecars)
    write_model_card(out, plan, digest, folders)
