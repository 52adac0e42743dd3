"""ModelSet: opened models that recipes are bound to: brought to one vocabulary, then planned."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.adapters.open import Model
from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.sidecars import merged_config
from evomerge.checkpoints.source import TensorSource
from evomerge.config.recipe import Recipe
from evomerge.merging.plan import MergePlan, make_plan
from evomerge.merging.vocabulary import Vocabulary, align


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


class ModelSet:
    """Opened models by their references as recipes write them (`str(ModelRef)`).

    Args:
        models: As `open_model` gives them.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.models = models
        self._vocabularies: dict[Hashable, Vocabulary] = {}

    def bind(self, recipe: Recipe) -> BoundMerge:
        """Bind a recipe to its models, and check that it is a merge of them.

        Raises:
            CheckpointError: A tokenizer cannot be read.
            ConfigError: There is no such merge method.
            MergeError: The recipe is not a merge of these models; one line for each of the first
                problems.
        """
        donor = str(recipe.donor)
        vocabulary = self._vocabulary(recipe)
        plan = make_plan(recipe, vocabulary.sources, layout_of(self.models[donor].names()))
        config = None
        if plan.layers is not None or vocabulary.size is not None:
            folder = self.models[donor].folder
            config = merged_config(folder, vocab_size=vocabulary.size, layers=plan.layers)
        return BoundMerge(plan, vocabulary, config)

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
