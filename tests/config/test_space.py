"""What the `space:` section accepts, and what it says otherwise."""

import json

import pytest
from pydantic import Field

from evomerge.config.proposer import ProposerConfig
from evomerge.config.space import LayerScope, SpaceConfig, SpaceEntry, entries_of
from evomerge.config.strict import StrictModel, parse_yaml, validate
from evomerge.errors import ConfigError


class Run(StrictModel):
    space: SpaceConfig = Field(default_factory=dict)
    proposer: ProposerConfig = ProposerConfig()


def read(text):
    return validate(Run, *parse_yaml(text, "a.yaml"))


def test_one_entry_or_several():
    space = read(
        """
space:
  lambda: {search: [0.5, 1.5]}
  density:
    - {filter: self_attn, search: [0.2, 1], scope: {curve: 4}}
    - {scope: {groups: [[0, 3], [4, 11]]}, outside: tied, models: [math]}
  normalize: {choices: [true, false], initial: true}
"""
    ).space
    assert entries_of(space["lambda"]) == (SpaceEntry(search=(0.5, 1.5)),)
    first, second = entries_of(space["density"])
    assert (first.filter, first.search, first.scope) == (
        "self_attn",
        (0.2, 1.0),
        LayerScope(curve=4),
    )
    assert second.scope == LayerScope(groups=((0, 3), (4, 11)))
    assert (second.outside, second.models, second.filter) == ("tied", ("math",), None)
    assert space["normalize"].choices == (True, False)


def test_resolved_config_reads_back():
    run = read(
        """
space:
  weight: {search: [0, 1], scope: per_layer, outside: own, sigma: 0.2, initial: 0.25}
  t: [{filter: mlp, scope: {every: 2}}, {filter: "*", choices: [1, 2.5], scale: linear}]
proposer: {name: DE, population: 12, options: {crossover: twopoints}}
"""
    )
    assert validate(Run, json.loads(run.model_dump_json()), parse_yaml("")[1]) == run
    assert run.space["t"][1].filter is None


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("{search: [0.9, 0.2]}", ".search: [0.9, 0.2] is empty. Write the smaller number first."),
        (
            "{search: [0.9, 0.9]}",
            ".search: [0.9, 0.9] is empty. Fix the parameter in merge.parameters instead.",
        ),
        ("[{search: [2, 1]}]", "[0].search: [2.0, 1.0] is empty. Write the smaller number first."),
        ("{search: [0.9]}", ".search[1]: is missing. Add it."),
        ("{search: [low, 1]}", ".search[0]: came 'low', a number is needed."),
        ("{serch: [0, 1]}", ".serch: is not a setting here. Did you mean search?"),
        (
            "{scope: per_layers}",
            ".scope: came 'per_layers', allowed: 'global' or 'per_layer'. Did you mean per_layer?",
        ),
        (
            "{scope: {every: 2, curve: 3}}",
            ".scope: came every and curve, exactly one of every, curve, groups is needed.",
        ),
        ("{scope: {every: 0}}", ".scope.every: came 0, allowed is at least 1."),
        ("{scope: {curve: 1}}", ".scope.curve: came 1, allowed is at least 2."),
        ("{scope: {evry: 1}}", ".scope.evry: is not a setting here. Did you mean every?"),
        (
            "{outside: own}",
            ".outside: is for layer-wise scopes, and this scope is global. Remove it.",
        ),
        (
            "{search: [0, 1], choices: [0, 1]}",
            ".choices: stands beside search. Keep one of the two.",
        ),
        (
            "{scale: log, choices: [1, 2]}",
            ".choices: stands beside scale: log. Remove the scale.",
        ),
        (
            "{choices: [1, true]}",
            ".choices: [1, True] mixes numbers with true and false. Keep one kind.",
        ),
        ("{choices: [1, 1.0]}", ".choices: [1, 1.0] names a value twice. Name each once."),
        ("{models: [a, a]}", ".models: ['a', 'a'] names a parent twice. Name each once."),
        ("{sigma: 2}", ".sigma: came 2, allowed is at most 1."),
        ("[]", ": came []"),
        ("0.5", ": came 0.5, a mapping is needed."),
    ],
)
def test_says_what_is_wrong_and_where(entry, sentence):
    with pytest.raises(ConfigError) as error:
        read(f"space:\n  density: {entry}")
    assert str(error.value).startswith(f"a.yaml:2: space.density{sentence}")
    assert "\n" not in str(error.value)


def test_proposer_settings():
    assert ProposerConfig() == ProposerConfig(
        name="CMA", population=8, sigma=0.1, mode="sync", options={}
    )
    with pytest.raises(ConfigError, match=r"^a.yaml:1: proposer.population: came 1, allowed is"):
        read("proposer: {population: 1}")
    with pytest.raises(ConfigError, match="Did you mean async"):
        read("proposer: {mode: asynch}")
