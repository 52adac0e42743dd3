"""Identity of a study: what may not change between its sessions, and what differs when it did."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from evomerge.checkpoints.sidecars import sidecars_hash
from evomerge.config.mergekit import OWN_SETTINGS
from evomerge.config.search import MergeConfig
from evomerge.config.suite import SuiteConfig
from evomerge.evaluate.evaluator import SuiteFacts
from evomerge.study.setup import Setup

RECORDED_PACKAGES = (
    "evomerge",
    "torch",
    "transformers",
    "lm_eval",
    "nevergrad",
    "cma",
    "optuna",
    "numpy",
)


def make_spec(setup: Setup, facts: SuiteFacts) -> dict[str, Any]:
    """Describe everything that decides a study's trials.

    Budget, racing, confirmation, the time limit, workers, the folder's place and library versions
    are not part of it.
    """
    config = setup.config
    return {
        "seed": config.study.seed,
        "models": {
            name: {
                "model": str(ref),
                "fingerprint": setup.fingerprints[name],
                "other_files": sidecars_hash(setup.folders[name]),
            }
            for name, ref in {"base": config.models.base, **config.models.parents}.items()
        },
        "merge": _merge(config.merge),
        "space": config.model_dump(mode="json", include={"space"})["space"],
        "knobs": setup.space.describe(),
        "suite": {"digest": facts.digest, **_suite(config.suite)},
        "objective": config.objective.model_dump(mode="json"),
        "proposer": config.proposer.model_dump(mode="json"),
    }


def _suite(suite: SuiteConfig) -> dict[str, Any]:
    # as of a merge, below; what is confirmed on changes no score of the search, nor does a limit
    later = {"leakage"}
    said = suite.model_dump(mode="json", include=later, exclude_defaults=True)
    unseen = {"items": {"confirm", "report"}}
    without = dict.fromkeys({*later, "time_limit"}, True)
    return suite.model_dump(mode="json", exclude={**unseen, **without}) | said


def _merge(merge: MergeConfig) -> dict[str, Any]:
    # settings of a later version count only where they say something, so that a study goes on
    later = set(OWN_SETTINGS)
    said = merge.model_dump(mode="json", include=later, exclude_defaults=True)
    return merge.model_dump(mode="json", exclude=later) | said


def scoring_digest(spec: Mapping[str, Any]) -> str:
    """Return a short digest of the parts of a specification that decide a recipe's scores.

    Studies that share a folder share results per item only where this is equal.
    """
    merge = spec.get("merge", {})
    parts = [spec.get("models"), spec.get("suite"), merge.get("out_dtype"), merge.get("tokenizer")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of the packages that a study's numbers rest on."""
    return {package: version(package) for package in RECORDED_PACKAGES}


def differences(stored: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Return one phrase for each place where two specifications differ."""
    found = []
    for key in dict.fromkeys([*stored, *now]):
        place = f"{path}.{key}" if path else str(key)
        before, after = stored.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, place)
        elif json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True):
            found.append(f"{place} was {_short(before)}, is now {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
