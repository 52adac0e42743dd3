"""What a recipe may be, and what identifies it."""

import pytest
from pydantic import ValidationError

from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe, Slice, SliceSource, Source
from evomerge.config.tokenizer import TokenizerConfig

A, B, C = (ModelRef(path=f"org/{name}") for name in "abc")
MODELS = (Source(model=A), Source(model=B))


def stack(*ranges):
    return tuple(
        Slice(sources=(SliceSource(model=model, layer_range=layers),)) for model, layers in ranges
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of models and slices is needed, and neither came."),
        (
            {"models": MODELS, "slices": stack((A, (0, 1)))},
            "one of models and slices is needed, and both came.",
        ),
        (
            {"models": MODELS, "tokenizer": TokenizerConfig(), "tokenizer_source": "base"},
            "tokenizer and tokenizer_source are both given.",
        ),
    ],
)
def test_a_recipe_has_one_form_and_one_vocabulary(fields, message):
    with pytest.raises(ValidationError) as caught:
        Recipe(merge_method="m", **fields)
    assert message in str(caught.value)


def test_models_that_are_read_come_once_the_bases_first():
    first, second, third = stack((A, (0, 1)), (B, (0, 1)), (A, (1, 2)))
    third = third.model_copy(update={"base_model": C})
    recipe = Recipe(merge_method="m", slices=(first, second, third))
    assert recipe.references() == (C, A, B)
    assert recipe.donor == A
    assert [source.model for source in recipe.sources] == [A, B, A]
    assert recipe.model_copy(update={"base_model": B}).donor == B


def test_every_field_that_changes_the_merge_changes_the_hash():
    recipes = [
        Recipe(merge_method="m", models=MODELS),
        Recipe(merge_method="m", models=MODELS[::-1]),
        Recipe(merge_method="m", models=MODELS, tokenizer=TokenizerConfig()),
        Recipe(merge_method="m", models=MODELS, tokenizer=TokenizerConfig(source="base")),
        Recipe(merge_method="m", models=MODELS, chat_template="auto"),
        Recipe(merge_method="m", slices=stack((A, (0, 1)), (B, (0, 1)))),
        Recipe(merge_method="m", slices=stack((A, (0, 1)), (B, (1, 2)))),
        Recipe(merge_method="m", slices=stack((B, (0, 1)), (A, (0, 1)))),
    ]
    assert len({recipe.hash for recipe in recipes}) == len(recipes)


def test_a_slice_is_as_deep_as_its_sources():
    assert stack((A, (3, 7)))[0].num_layers == 4
    with pytest.raises(ValidationError, match="org/a gives 1, org/b gives 2"):
        Slice(
            sources=(
                SliceSource(model=A, layer_range=(0, 1)),
                SliceSource(model=B, layer_range=(0, 2)),
            )
        )
    with pytest.raises(ValidationError, match=r"came \[2, 2\]"):
        SliceSource(model=A, layer_range=(2, 2))
