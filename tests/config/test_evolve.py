"""Genome files of mergekit-evolve mean the same here as in mergekit 0.1.5, tensor by tensor.

What mergekit makes of them was written down by scripts/record_evolve_golden.py.
"""

import itertools
import json
import math
import random
import statistics
from pathlib import Path

import pytest

from evomerge.checkpoints.architecture import layout_of
from evomerge.config.evolve import read_evolve
from evomerge.config.evolve_import import Run, Shape, import_genome, llama_shape
from evomerge.config.models import ModelRef
from evomerge.config.resolve import Position, parameter_at
from evomerge.config.search import make_search
from evomerge.config.strict import parse_yaml
from evomerge.errors import ConfigError
from evomerge.methods import METHODS
from evomerge.space.decode import decode
from evomerge.space.genome import Genome
from evomerge.space.space import build_space
from evomerge.study.setup import make_template

GENOMES = Path(__file__).parents[1] / "golden" / "evolve"
GOLDEN = json.loads((GENOMES / "parameters.json").read_text())
TENSORS = tuple(GOLDEN["linear"]["first"]["tensors"])
LAYOUT = layout_of(TENSORS)
SHAPE = Shape(LAYOUT, TENSORS)
RUN = Run("study", base=ModelRef(path="base"))

# recipes keep six decimals of what mergekit keeps in float32
GRID = 0.51e-6


def imported(path, shape=SHAPE, run=RUN):
    """Text of the search config, and the config."""
    text = import_genome(*read_evolve(path), shape, run)
    return text, make_search(*parse_yaml(text))


def value_at(param, tensor, recipe, source=None):
    """What a recipe says of a parameter for one tensor."""
    position = Position(LAYOUT.layer_of(tensor), LAYOUT.num_layers)
    levels = [*([source.parameters] if source else []), recipe.parameters]
    return parameter_at(param, tensor, position, levels, recipe.merge_method)


class World:
    """A genome file, and the space that its search config opens."""

    def __init__(self, name):
        self.evolve, _ = read_evolve(GENOMES / f"{name}.yml")
        _, self.config = imported(GENOMES / f"{name}.yml")
        self.method = METHODS[self.config.merge.method]
        self.space = build_space(
            self.config.space,
            self.config.merge.parameters,
            self.method.params,
            list(self.config.models.parents),
            LAYOUT,
            TENSORS,
        )

    def recipe(self, genome):
        return decode(self.space, genome, make_template(self.config, self.method, "bfloat16"))

    def assert_same(self, recipe, golden):
        """Every searched parameter of every tensor and model, and `normalize`, are mergekit's."""
        params = {param.name: param for param in self.method.params}
        for tensor, theirs in golden["tensors"].items():
            if self.evolve.genome.smooth and tensor == "model.norm.weight":
                continue  # the one known difference, with a test of its own
            for source in recipe.models:
                own = theirs["models"][source.model.path]
                for name in own.keys() & set(self.evolve.genome.parameters):
                    ours = value_at(params[name], tensor, recipe, source)
                    assert ours == pytest.approx(own[name], abs=GRID), (tensor, source.model, name)
            for name in ("t", "normalize"):
                if name in theirs["shared"]:
                    ours = value_at(params[name], tensor, recipe)
                    value = theirs["shared"][name]
                    turned = name == "t" and theirs["base"] != str(recipe.base_model)
                    assert ours == pytest.approx(1 - value if turned else value, abs=GRID), tensor

    def knobs_of(self, shape, genotype):
        """The values of our knobs that stand for a genotype of mergekit's."""
        genome = self.evolve.genome
        if genome.merge_method == "slerp":
            return self._slerp_knobs(genotype)
        sets = [*(genome.filters or ()), None]
        values = {}
        places = itertools.product(*(range(number) for number in shape))
        for (group, model, part, parameter), value in zip(places, genotype, strict=True):
            stem = [genome.parameters[parameter], genome.models[model].path, sets[part]]
            stem = ".".join(word for word in stem if word)
            suffixes = [f".knot_{group}", f".layer_{group}", f".layers_{2 * group}_{2 * group + 1}"]
            found = [stem + suffix for suffix in suffixes if stem + suffix in self.space.names]
            if not found and group == 0 and stem in self.space.names:
                found = [stem]
            values |= dict.fromkeys(found, round(value, 6))
        return values

    def _slerp_knobs(self, genotype):
        pairs = zip(genotype[::2], genotype[1::2], strict=True)
        shares = [math.exp(c) / (math.exp(a) + math.exp(c)) for a, c in pairs]
        return {f"t.layers_{2 * g}_{2 * g + 1}": round(t, 6) for g, t in enumerate(shares)}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_search_starts_where_mergekit_evolve_does(name):
    world = World(name)
    world.assert_same(world.recipe(Genome(world.space.initial)), GOLDEN[name]["first"])


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_any_genotype_has_the_same_merge_here(name):
    world, golden = World(name), GOLDEN[name]["drawn"]
    values = world.knobs_of(golden["shape"], golden["genotype"])
    assert sorted(values) == sorted(world.space.names), "each knob is a gene of mergekit-evolve"
    world.assert_same(world.recipe(world.space.genome(values)), golden)


def test_the_final_norm_of_a_smooth_genome_is_the_known_difference():
    world, golden = World("smooth"), GOLDEN["smooth"]["drawn"]
    values = world.knobs_of(golden["shape"], golden["genotype"])
    recipe = world.recipe(world.space.genome(values))
    weight = next(param for param in world.method.params if param.name == "weight")
    ours = value_at(weight, "model.norm.weight", recipe, recipe.models[0])
    assert ours == values["weight.a.knot_1"]
    theirs = golden["tensors"]["model.norm.weight"]["models"]["a"]["weight"]
    assert theirs == pytest.approx(values["weight.a.knot_0"], abs=GRID)
    text, _ = imported(GENOMES / "smooth.yml")
    assert (
        "# final norm and head take the last knot's value; mergekit gives them the first's" in text
    )


def test_first_steps_are_a_sixth_of_a_gene():
    for name in set(GOLDEN) - {"slerp"}:
        for knob in World(name).space.knobs:
            step = knob.sigma * (knob.high - knob.low)
            assert step == pytest.approx(1 / 6, abs=2e-6), knob.name


def test_the_first_step_of_slerp_is_that_of_a_softmax_of_two_genes():
    generator = random.Random(0)
    steps = [generator.gauss(0, 1 / 6) - generator.gauss(0, 1 / 6) for _ in range(4000)]
    spread = statistics.pstdev(1 / (1 + math.exp(step)) for step in steps)
    for knob in World("slerp").space.knobs:
        assert knob.sigma == pytest.approx(spread, rel=0.05)  # 4 standard errors of the estimate


def test_bounds_stand_for_magnitude_clamp_and_negative_weights():
    bounds = {
        name: dict(zip(s.names, s.bounds, strict=True))
        for name in GOLDEN
        for s in [World(name).space]
    }
    assert bounds["linear"]["weight.a"] == (0.0, 1.0)
    assert bounds["dare_ties"]["weight.a.layers_0_1"] == (0.0, 1.5)
    assert bounds["dare_ties"]["density.c.layers_2_3"] == (0.0, 1.0)
    assert bounds["smooth"]["weight.b.knot_1"] == (-1.0, 1.0)


def test_tasks_items_and_chat_are_carried_over():
    _, config = imported(GENOMES / "dare_ties.yml")
    first, second = config.suite.tasks
    assert (first.task, first.metric, first.weight, first.num_fewshot) == (
        "tiny_choice",
        "acc_norm",
        2.0,
        1,
    )
    assert (second.metric, second.weight, second.higher_is_better) == (
        "exact_match,whole",
        1.0,
        None,
    )
    assert (config.suite.items.search.count, config.suite.items.confirm.count) == (8, 8)
    assert not config.suite.chat.apply_chat_template
    _, config = imported(GENOMES / "smooth.yml")
    perplexity = config.suite.tasks[1]
    assert (perplexity.weight, perplexity.higher_is_better) == (0.5, False)
    assert config.suite.chat.apply_chat_template
    assert config.suite.chat.fewshot_as_multiturn
    _, config = imported(GENOMES / "ties_filters.yml")
    assert (config.suite.tasks[0].metric, config.suite.tasks[0].num_fewshot) == ("acc", None)
    assert (config.suite.items.search.count, config.suite.items.confirm.count) == (None, 0)


def test_the_rest_of_a_search():
    text, config = imported(GENOMES / "ties_filters.yml")
    assert config.models.parents.keys() == {"a", "b"}
    assert "genes that changed nothing" in text
    assert config.proposer.population == 4 + int(3 * math.log(4 * 3 * 3 * 2))
    assert config.merge.out_dtype == "bfloat16"
    run = Run("x y", evaluations=7, seconds=60.0, include_path=("/t",), base=RUN.base)
    text, config = imported(GENOMES / "linear.yml", run=run)
    assert (config.study.name, config.study.budget.evaluations) == ("x y", 7)
    assert config.study.budget.seconds == 60.0
    assert config.suite.include_path == ("/t",)
    assert config.merge.tokenizer == "base"
    assert "random_init: here the start stays at the even mix" in text


def write(tmp_path, genome, tasks="[t]", **more):
    """A genome file of the given settings."""
    lines = [f"{key}: {value}" for key, value in {"genome": genome, "tasks": tasks, **more}.items()]
    path = tmp_path / "genome.yml"
    path.write_text("\n".join(lines))
    return path


TIES = "{models: [a, b], merge_method: ties, base_model: base%s}"


def test_benchmarks_are_not_refused_but_marked(tmp_path):
    path = write(tmp_path, TIES % "", "[gsm8k, arc_easy_train, my_task]")
    lines = imported(path)[0].splitlines()
    marked = [after for before, after in itertools.pairwise(lines) if "public benchmark" in before]
    assert [line.split("task: ")[1].split(",")[0] for line in marked] == ["gsm8k"]


@pytest.mark.parametrize(
    ("genome", "tokenizer"),
    [
        (TIES % "", "base"),
        (TIES % ", tokenizer_source: base", "base"),
        (TIES % ", tokenizer_source: b", "b"),
        (TIES % ", tokenizer_source: union", "base"),
        ("{models: [a, b], merge_method: linear}", "a"),
        ("{models: [a, b], merge_method: slerp, base_model: b}", "b"),
        ("{models: [a, b], merge_method: slerp, base_model: a}", "base"),
    ],
)
def test_the_tokenizer_is_the_one_mergekit_takes(tmp_path, genome, tokenizer):
    assert imported(write(tmp_path, genome))[1].merge.tokenizer == tokenizer


def test_names_of_parents_are_short_and_unique(tmp_path):
    models = "[org/m-7b@v1, other/m-7b, ./base, org/lora.x]"
    path = write(tmp_path, f"{{models: {models}, merge_method: ties, base_model: org/base}}")
    _, config = imported(path)
    assert list(config.models.parents) == ["m-7b", "m-7b-2", "parent", "lora-x"]
    assert str(config.models.parents["m-7b"]) == "org/m-7b@v1"


def test_models_that_are_not_here_are_taken_for_llamas(tmp_path):
    path = write(tmp_path, TIES % ", layer_granularity: 2, filters: [embed_tokens, mamba]")
    text, config = imported(path, llama_shape(4))
    assert "names of tensors were taken to be Llama's" in text
    assert "# mamba: left out, there is no such tensor" in text
    embed, rest = config.space["weight"]
    assert (embed.filter, embed.scope, embed.outside) == ("embed_tokens", "global", None)
    assert (rest.filter, rest.scope.every, rest.outside) == (None, 2, "tied")
    with pytest.raises(ConfigError, match=r"number of layers is needed.*--layers"):
        imported(path, None)
    assert (
        imported(write(tmp_path, TIES % ", filters: [mlp]"), None)[1].space["weight"][0].filter
        == "mlp"
    )


@pytest.mark.parametrize(
    ("genome", "message"),
    [
        (
            TIES % ", layer_granularit: 2",
            "layer_granularit: is not a setting here. Did you mean layer_granularity",
        ),
        ("{models: [a], merge_method: della, base_model: base}", "came 'della', allowed: 'linear'"),
        ("{models: [a, a], merge_method: linear}", "a stands twice under models"),
        ("{models: [a, b], merge_method: ties}", "ties needs a base_model"),
        ("{models: [base], merge_method: ties, base_model: base}", "only the base model came"),
        ("{models: [a, b, c], merge_method: slerp}", "slerp came with 3 models"),
        (
            "{models: [a, b], merge_method: slerp, base_model: base}",
            "base_model base would be a third",
        ),
        ("{models: [a, b], merge_method: slerp, smooth: true}", "takes neither smooth nor filters"),
        (
            "{models: [base, b], merge_method: linear}",
            "Name another model of this shape with --base",
        ),
        (TIES % ", layer_granularity: 3", "came 3, the models have 4 layers"),
        (
            TIES % ", tokenizer_source: x",
            "tokenizer_source: came 'x', allowed is base, union, or a model",
        ),
    ],
)
def test_what_cannot_be_carried_over_is_a_sentence(tmp_path, genome, message):
    with pytest.raises(ConfigError) as caught:
        imported(write(tmp_path, genome))
    assert message in str(caught.value)
    assert "genome.yml:1: genome" in str(caught.value)
