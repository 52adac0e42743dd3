"""merge: from a recipe to a folder, in one call."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from evomerge.adapters.open import fingerprint_of, open_model
from evomerge.checkpoints.sidecars import copy_sidecars
from evomerge.checkpoints.writer import GIB
from evomerge.config.recipe import Recipe
from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.bind import BoundMerge, ModelSet
from evomerge.merging.folder import Destination, Progress, quietly, write_folders
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
    (digest,) = merge_together([recipe], [out], statistics, shard_bytes, notify)
    return digest


def merge_together(
    recipes: Sequence[Recipe],
    outs: Sequence[Path],
    statistics: StatisticsCache | None = None,
    shard_bytes: int = 5 * GIB,
    notify: Callable[[Progress], None] = quietly,
) -> list[str]:
    """Carry out several recipes over one read of their models; see `merge`.

    Args:
        recipes: The merges, with the same tensors in all of them: of one depth and vocabulary.
        outs: The new folders.
        statistics: As for `merge`.
        shard_bytes: As for `merge`.
        notify: As for `merge`, for the first of them.

    Returns:
        The digest of each merge's weights.

    Raises:
        CheckpointError, ConfigError, MergeError, NonFiniteError: As `merge`; or the merges differ
            in what tensors they have or in how their vocabularies are brought together.
    """
    references = dict.fromkeys(ref for recipe in recipes for ref in recipe.references())
    sources = {str(ref): open_model(ref, mapped=False) for ref in references}
    folders = {name: source.folder for name, source in sources.items()}
    models = ModelSet(sources)
    bound = [models.bind(recipe) for recipe in recipes]
    if len({merge.vocabulary.digest for merge in bound}) > 1:
        raise MergeError(
            "the recipes bring their models to different vocabularies, so they cannot be merged "
            "over one read of them. Merge them one after another."
        )
    fingerprints = {name: fingerprint_of(source) for name, source in sources.items()}
    to = [
        _destination(merge, folders, fingerprints, out, shard_bytes, quietly if i else notify)
        for i, (merge, out) in enumerate(zip(bound, outs, strict=True))
    ]
    write_beside = [partial(_write_beside, merge, folders, fingerprints) for merge in bound]
    merged = {name: source for merge in bound for name, source in merge.sources.items()}
    # one merge needs ranks once, and its memory must not grow with the models
    statistics = statistics or StatisticsCache(keep_ranks=False)
    return write_folders([merge.plan for merge in bound], merged, statistics, to, write_beside)


def _destination(
    merge: BoundMerge,
    folders: Mapping[str, Path],
    fingerprints: Mapping[str, str],
    out: Path,
    shard_bytes: int,
    notify: Callable[[Progress], None],
) -> Destination:
    own = [str(ref) for ref in merge.plan.recipe.references()]
    # a changed tokenizer is written into a temporary folder, so its rows count, not its files
    identity = identity_of(
        merge.plan, {name: fingerprints[name] for name in own}, [folders[name] for name in own]
    )
    return Destination(out, shard_bytes, identity + merge.vocabulary.digest, notify)


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
    own = {str(ref): fingerprints[str(ref)] for ref in recipe.references()}
    sidecars = copy_sidecars(
        donor,
        vocabulary.tokenizer_folder,
        out,
        dtype=dtype,
        vocab_size=vocabulary.size,
        numbered_by=vocabulary.numbered_by,
        layers=plan.layers,
    )
    write_provenance(out, plan, digest, own, sidecars)
    write_model_card(out, plan, digest, {name: folders[name] for name in own})
