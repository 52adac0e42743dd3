"""merge: from a recipe to a folder, in one call."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.fingerprint import fingerprint
from evomerge.checkpoints.index import read_json
from evomerge.checkpoints.locate import locate
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.sidecars import copy_sidecars
from evomerge.checkpoints.writer import GIB
from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe
from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.folder import write_folder
from evomerge.merging.plan import MergePlan, make_plan
from evomerge.merging.provenance import write_provenance


def merge(
    recipe: Recipe,
    out: Path,
    statistics: StatisticsCache | None = None,
    shard_bytes: int = 5 * GIB,
) -> str:
    """Carry out a recipe and write the result as a complete checkpoint.

    Args:
        recipe: The merge; its models are looked up, and downloaded where they are hub ids.
        out: The new folder; must not exist, or be empty.
        statistics: What a search has found out about these models, to be reused; None starts anew.
        shard_bytes: Most bytes of tensors in one file.

    Returns:
        The weights' digest, equal to that of the candidate that was scored with this recipe.

    Raises:
        CheckpointError: A model cannot be had, or the folder cannot be written.
        ConfigError: There is no such merge method.
        MergeError: The recipe is not a merge of these models.
        NonFiniteError: NaN or Inf in a model, or in the result.
    """
    folders = {str(reference): locate(reference) for reference in recipe.references()}
    sources = {name: open_checkpoint(folder, name) for name, folder in folders.items()}
    plan = make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))
    write_beside = partial(_write_beside, plan, folders, tokenizer_folder(recipe, folders))
    cache = statistics or StatisticsCache()
    return write_folder(plan, sources, cache, out, write_beside, shard_bytes)


def _write_beside(
    plan: MergePlan, folders: Mapping[str, Path], tokenizer_donor: Path, out: Path, digest: str
) -> None:
    recipe = plan.recipe
    donor = folders[str(recipe.donor)]
    dtype = recipe.out_dtype or recipe.dtype
    sidecars = copy_sidecars(donor, tokenizer_donor, out, dtype=dtype)
    fingerprints = {name: fingerprint(folder) for name, folder in folders.items()}
    write_provenance(out, plan, digest, fingerprints, sidecars)


def tokenizer_folder(recipe: Recipe, folders: Mapping[str, Path]) -> Path:
    """Return the folder of the model whose tokenizer goes with the merge.

    Raises:
        MergeError: It gives a token another number than the donor of the weights does, as far as
            their tokenizer.json tell.
    """
    donor = folders[str(recipe.donor)]
    if recipe.tokenizer_source in (None, "base", str(recipe.donor)):
        return donor
    reference = ModelRef.model_validate(recipe.tokenizer_source)
    folder = folders.get(str(reference)) or locate(reference)
    theirs = _token_ids(folder)
    moved = [
        token for token, number in _token_ids(donor).items() if theirs.get(token, number) != number
    ]
    if moved:
        raise MergeError(
            f"tokenizer_source: {reference} and {recipe.donor} number {len(moved)} tokens "
            f"differently, first {moved[0]!r}, and moving embeddings between vocabularies is not "
            "supported yet. Use tokenizer_source: base."
        )
    return folder


def _token_ids(folder: Path) -> dict[str, int]:
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    tokenizer = read_json(path, str(folder))
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # a unigram model lists [token, log probability]
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = tokenizer.get("added_tokens", [])
    return {**vocabulary, **{token["content"]: token["id"] for token in added}}
