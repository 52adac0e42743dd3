"""Canonical form: one hash for all recipes that are the same merge, whatever they say.

The form is what the values come to for each tensor (`methods/effects.py`), and which tensors of the
models that takes; none is read for it. Two names of one model are one model, and a tensor that an
adapter leaves alone is its base's.
"""

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evomerge.adapters.open import Model
from evomerge.adapters.source import AdapterSource
from evomerge.checkpoints.fingerprint import digest_of
from evomerge.config.recipe import Recipe
from evomerge.errors import EvoMergeError
from evomerge.merging.bind import ModelSet
from evomerge.merging.plan import Outline, TensorInput, TensorJob
from evomerge.methods.effect import Effect, Inputs
from evomerge.methods.effects import effect_of, shape_seen
from evomerge.methods.method import Method, Values

MAX_FORMS = 64
"""Forms of recipes whose kinds of tensors are remembered."""


@dataclass(frozen=True)
class _Kinds:
    """Which tensors of a merge have equal effects, whatever the numbers of its recipe are.

    Attributes:
        outline: What they are of.
        structure: Hash of all that the numbers have no part in, but for `kinds`.
        kinds: For each kind of tensors the number of the group that its values are of, and inputs.
        jobs: The kind of each tensor that is merged, in the plan's order.
    """

    outline: Outline
    structure: str
    kinds: tuple[tuple[int, Inputs], ...]
    jobs: tuple[int, ...]


class Detail(NamedTuple):
    """What a recipe does to some tensors of one kind.

    Attributes:
        values: The values they take.
        inputs: What they are made of.
        effect: What the values come to, in exact arithmetic.
    """

    values: Values
    inputs: Inputs
    effect: Effect


class CanonicalForms:
    """Tells which recipes over one set of models are the same merge.

    Args:
        models: The models.
        fingerprints: Fingerprint of each by its reference.
    """

    def __init__(self, models: ModelSet, fingerprints: Mapping[str, str]) -> None:
        self._models = models
        self._identities = identities(models.models, fingerprints)
        self._kinds: dict[tuple[int, int], _Kinds] = {}

    @property
    def equal_models(self) -> list[tuple[str, str]]:
        """Each model that is the same to the last bit as one before it, and that one."""
        return [(model, same) for model, same in self._identities.items() if model != same]

    def hash(self, recipe: Recipe) -> str:
        """Return a hash that is equal for recipes of one merge, in hexadecimal.

        Of equal hashes, every merged element is the same number; the sign of a zero may differ
        where a model holds a negative zero. A recipe that is no merge has its own hash.
        """
        try:
            kinds, values = self._bound(recipe)
        except EvoMergeError:
            return recipe.hash
        method, numbers = kinds.outline.method, dict[Effect, int]()
        effects = (effect_of(method, values[group], inputs) for group, inputs in kinds.kinds)
        found = [numbers.setdefault(effect, len(numbers)) for effect in effects]
        of_jobs = array("I", [found[kind] for kind in kinds.jobs])
        digest = hashlib.sha256(kinds.structure.encode())
        digest.update(repr(list(numbers)).encode())
        digest.update(of_jobs.tobytes())
        return digest.hexdigest()

    def details(self, recipe: Recipe) -> tuple[Detail, ...]:
        """Return what a recipe does in exact arithmetic, for each kind of tensors.

        Raises:
            CheckpointError, ConfigError, MergeError: As `ModelSet.bind`.
        """
        kinds, values = self._bound(recipe)
        method = kinds.outline.method
        return tuple(
            Detail(values[group], inputs, effect_of(method, values[group], inputs, ideal=True))
            for group, inputs in kinds.kinds
        )

    def _bound(self, recipe: Recipe) -> tuple[_Kinds, tuple[Values, ...]]:
        outline, vocabulary, _ = self._models.prepared(recipe)
        key = id(outline), recipe.mask_seed
        if key not in self._kinds:
            if len(self._kinds) >= MAX_FORMS:
                self._kinds.clear()
            self._kinds[key] = self._kinds_of(recipe, outline, vocabulary.digest)
        return self._kinds[key], outline.groups.values(recipe)

    def _kinds_of(self, recipe: Recipe, outline: Outline, vocabulary: str) -> _Kinds:
        kinds: dict[tuple[int, Inputs], int] = {}
        of_jobs = []
        for job, group in outline.jobs:
            if group is not None:
                kind = group, self._inputs(recipe, outline.method, job, bool(vocabulary))
                of_jobs.append(kinds.setdefault(kind, len(kinds)))
        structure = [_described(job, group is None) for job, group in outline.jobs]
        dither = (recipe.rounding, recipe.mask_seed if recipe.rounding == "dither" else 0)
        text = json.dumps([structure, dither, vocabulary])
        hashed = hashlib.sha256(text.encode()).hexdigest()
        return _Kinds(outline, hashed, tuple(kinds), tuple(of_jobs))

    def _inputs(self, recipe: Recipe, method: Method, job: TensorJob, aligned: bool) -> Inputs:
        names = [self._name(source, aligned) for source in job.parents]
        base = None if job.base is None else self._name(job.base, aligned)
        shape = shape_seen(method, job.spec.shape)
        return Inputs(base, tuple(names), shape, recipe.mask_seed, recipe.threshold_ties)

    def _name(self, source: TensorInput, aligned: bool) -> str:
        """Return a name of a model that is equal where the tensor is."""
        if aligned:
            # rows follow the tokenizer, which is no part of a model's identity
            return source.model
        model = self._models.models[source.model]
        if isinstance(model, AdapterSource) and not _changes(model, source.name):
            return self._under_adapter(model)
        return self._identities[source.model]

    def _under_adapter(self, model: AdapterSource) -> str:
        """Return the name of the model that an adapter is on."""
        for name, other in self._models.models.items():
            if _place(other) == _place(model.base):
                return self._identities[name]
        return str(model.folder.resolve())


def identities(models: Mapping[str, Model], fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Return for each model the first of those that are the same to the last bit.

    Models of different files are read in full where their fingerprints, which are samples, agree.

    Args:
        models: By their references.
        fingerprints: By their references.
    """
    found: dict[str, str] = {}
    for name, model in models.items():
        same = (
            other
            for other, first in found.items()
            if other == first
            and fingerprints[other] == fingerprints[name]
            and _is_same(models[other], model)
        )
        found[name] = next(same, name)
    return found


def _is_same(first: Model, second: Model) -> bool:
    return _place(first) == _place(second) or digest_of(first) == digest_of(second)


def _place(model: Model) -> tuple[Path, Path | None]:
    adapter = model.adapter_folder.resolve() if isinstance(model, AdapterSource) else None
    return model.folder.resolve(), adapter


def _changes(model: AdapterSource, tensor: str) -> bool:
    return tensor in model.adapter.low_rank or tensor in model.adapter.saved


def _described(job: TensorJob, copied: bool) -> list[object]:
    """Return what is known of a tensor beside its inputs, as plain data."""
    spec = job.spec
    moved = [source.name for source in job.inputs if source.name != spec.name]
    # those that are copied must agree in all models
    models = [source.model for source in job.inputs] if copied or moved else []
    return [spec.name, list(spec.shape), str(spec.dtype), moved, models]
