"""Every shipped config means what it says, as far as that can be known without its models."""

from pathlib import Path

import pytest

from evomerge.config.layout import Layout
from evomerge.config.search import load_search
from evomerge.evaluate.scores import ScoredTask, make_objective
from evomerge.merging.checks import model_problems
from evomerge.merging.parts import parts_of
from evomerge.methods import METHODS
from evomerge.propose import make_proposer
from evomerge.space.decode import decode
from evomerge.space.genome import Genome
from evomerge.space.space import build_space
from evomerge.study.setup import make_template, parameter_problems

CONFIGS = Path(__file__).parents[1] / "configs"


def llama_names(num_layers):
    """Names of a Llama's tensors."""
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    parts += ["input_layernorm", "post_attention_layernorm"]
    layers = [f"model.layers.{i}.{part}.weight" for i in range(num_layers) for part in parts]
    return ["lm_head.weight", "model.embed_tokens.weight", *layers, "model.norm.weight"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_resolves_to_a_merge(path):
    config = load_search(path)
    method = METHODS[config.merge.method]
    assert not parameter_problems(config, method.params)
    num_layers = 32 if path.stem == "ties_7b" else 4
    outside = (
        ("head", "lm_head.weight"),
        ("embed", "model.embed_tokens.weight"),
        ("norm", "model.norm.weight"),
    )
    layout = Layout(num_layers, outside)
    space = build_space(
        config.space,
        config.merge.parameters,
        method.params,
        list(config.models.parents),
        layout,
        llama_names(num_layers),
    )
    recipe = decode(space, Genome(space.initial), make_template(config, method, "bfloat16"))
    assert list(model_problems(recipe, method, parts_of(recipe, layout))) == []
    make_objective(
        config.objective, [ScoredTask(t.task, t.metric, t.weight) for t in config.suite.tasks]
    )
    assert make_proposer(config.proposer, space, seed=0).ask().shape == (space.size,)
    assert f"`{path.name}`" in (CONFIGS / "README.md").read_text()


def test_the_7b_search_has_the_knobs_its_comments_promise():
    config = load_search(CONFIGS / "ties_7b.yaml")
    method = METHODS["ties"]
    outside = (("embed", "model.embed_tokens.weight"), ("norm", "model.norm.weight"))
    space = build_space(
        config.space, config.merge.parameters, method.params, list(config.models.parents),
        Layout(32, outside), llama_names(32),
    )  # fmt: skip
    # for each parent 3 knots for attention, 3 groups for the rest, one density; one lambda
    assert space.size == 3 * (3 + 3 + 1) + 1
    assert [str(ref) for ref in config.models.parents.values()][1].endswith("@main")
    assert all(not ref.is_local for ref in config.models.parents.values())
