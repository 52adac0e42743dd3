"""What a merged checkpoint was made of: `evomerge.json` and `recipe.yaml` beside the weights.

The same merge gives the same files: no dates, no paths but those of the recipe.
"""

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from evomerge.checkpoints.sidecars import Sidecars
from evomerge.config.mergekit import MASK_VERSION, draws, write_recipe
from evomerge.merging.plan import MergePlan

PACKAGES = ("evomerge", "torch", "numpy", "safetensors")
"""Packages whose version is written down: those that touch the numbers."""


def versions() -> dict[str, str]:
    """Return the version of each of `PACKAGES`."""
    return {package: version(package) for package in PACKAGES}


def identity_of(plan: MergePlan, fingerprints: Mapping[str, str], folders: Iterable[Path]) -> str:
    """Return everything that the bits of a merge depend on, as a text.

    A fingerprint does not see every bit, nor a tokenizer, so size and time of change of every file
    beside the weights and of the weights themselves are part of it too.

    Args:
        plan: The merge.
        fingerprints: Fingerprint of each model that is read, by its name in the recipe.
        folders: Folders of the models and of the tokenizer.
    """
    files = [path for folder in set(folders) for path in folder.iterdir() if path.is_file()]
    facts = {
        "recipe_hash": plan.recipe.hash,
        "masks": MASK_VERSION,
        "fingerprints": dict(fingerprints),
        "files": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)],
        "packages": versions(),
    }
    return json.dumps(facts)


def write_provenance(
    folder: Path,
    plan: MergePlan,
    digest: str,
    fingerprints: Mapping[str, str],
    sidecars: Sidecars,
) -> None:
    """Write `evomerge.json`, which tells what the merge was made of and by, and `recipe.yaml`.

    Args:
        folder: The new checkpoint; exists.
        plan: The merge.
        digest: Digest of its tensors.
        fingerprints: Fingerprint of each model that was read, by its name in the recipe.
        sidecars: Which model gave which other file.
    """
    record = {
        "recipe": plan.recipe.model_dump(mode="json"),
        "recipe_hash": plan.recipe.hash,
        "digest": digest,
        "masks": MASK_VERSION if draws(plan.recipe) else None,
        "fingerprints": dict(fingerprints),
        "config_files": list(sidecars.config_files),
        "tokenizer_files": list(sidecars.tokenizer_files),
        "packages": versions(),
    }
    (folder / "evomerge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(write_recipe(plan.recipe), encoding="utf-8")
