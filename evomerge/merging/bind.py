"""ModelSet: opened models that recipes are bound to: brought to one vocabulary, then planned."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from evomerge.adapters.open import Model
from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.sidecars import merged_config
from evomerge.checkpoints.source import TensorSource
from evomerge.config.recipe import Recipe
from evomerge.merging.plan import MergePlan, Outline, form_of, make_outline
from evomerge.merging.vocabulary import Vocabulary, align

MAX_FORMS = 64
"""Forms of recipes that are remembered; a search has one, and its baselines a few more."""


@dataclass(frozen=True)
class BoundMerge:
    """A recipe with all that it takes to carry it out.

    Attributes:
        plan: The merge, tensor by tensor.
        vocabulary: Its tokenizer.
        config: Its config.json; None where that is the donor's as it is.
    """

    plan: MergePlan
    vocabulary: Vocabulary
    config: Mapping[str, Any] | None

    @property
    def sources(self) -> Mapping[str, TensorSource]:
        """The models' tensors over the merge's vocabulary."""
        return self.vocabulary.sources


class Prepared(NamedTuple):
    """What all recipes of one form (`plan.form_of`) have in common, over the models of a set."""

    outline: Outline
    vocabulary: Vocabulary
    config: Mapping[str, Any] | None


class ModelSet:
    """Opened models by their references as recipes write them (`str(ModelRef)`).

    The candidates of a search mostly differ in numbers alone. What does not depend on these is
    found and checked once.

    Args:
        models: As `open_model` gives them.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.models = models
        self._vocabularies: dict[Hashable, Vocabulary] = {}
        self._prepared: dict[Hashable, Prepared] = {}

    def bind(self, recipe: Recipe) -> BoundMerge:
        """Bind a recipe to its models, and check that it is a merge of them.

        Raises:
            CheckpointError: A tokenizer cannot be read.
            ConfigError: There is no such merge method.
            MergeError: The recipe is not a merge of these models; one line for each of the first
                problems.
        """
        outline, vocabulary, config = self.prepared(recipe)
        return BoundMerge(outline.plan(recipe), vocabulary, config)

    def prepared(self, recipe: Recipe) -> Prepared:
        """Return what a recipe has in common with all that differ from it in numbers alone.

        Raises:
            CheckpointError, ConfigError, MergeError: As `bind`, as far as the numbers have no part
                in it.
        """
        form = form_of(recipe)
        if form not in self._prepared:
            if len(self._prepared) >= MAX_FORMS:
                self._prepared.clear()
            self._prepared[form] = self._prepare(recipe)
        return self._prepared[form]

    def _prepare(self, recipe: Recipe) -> Prepared:
        donor = self.models[str(recipe.donor)]
        vocabulary = self._vocabulary(recipe)
        outline = make_outline(recipe, vocabulary.sources, layout_of(donor.names()))
        config = None
        if outline.layers is not None or vocabulary.size is not None:
            size, layers = vocabulary.size, outline.layers
            config = merged_config(donor.folder, vocab_size=size, layers=layers)
        return Prepared(outline, vocabulary, config)

    def _vocabulary(self, recipe: Recipe) -> Vocabulary:
        names = tuple(str(reference) for reference in recipe.references())
        tokenizer = recipe.tokenizer.model_dump_json() if recipe.tokenizer else None
        base = None if recipe.base_model is None else str(recipe.base_model)
        # one for all candidates of a search: tokenizers are read once
        key = (
            names,
            base,
            str(recipe.donor),
            tokenizer,
            recipe.tokenizer_source,
            recipe.chat_template,
        )
        if key not in self._vocabularies:
            models = {name: self.models[name] for name in names}
            self._vocabularies[key] = align(
                recipe.tokenizer,
                recipe.tokenizer_source,
                recipe.chat_template,
                {name: model.folder for name, model in models.items()},
                models,
                base,
                str(recipe.donor),
            )
        return self._vocabularies[key]
