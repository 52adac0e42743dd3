"""Canonical form: recipes of one merge have one hash, however they are written."""

import shutil

import pytest
import torch

from evomerge.adapters.open import fingerprint_of, open_model
from evomerge.config.mergekit import parse_recipe
from evomerge.config.models import ModelRef
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.bind import ModelSet
from evomerge.merging.canonical import CanonicalForms, identities
from evomerge.merging.execute import merged_tensors
from tests.world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    shutil.copytree(folder / "a", folder / "copy")
    (folder / "link").symlink_to(folder / "b")
    return folder


@pytest.fixture(scope="module")
def models(world):
    opened = {}
    for name in ("base", "a", "b", "copy", "link"):
        opened[str(world / name)] = open_model(ModelRef(path=str(world / name)))
    return ModelSet(opened)


@pytest.fixture(scope="module")
def forms(models):
    fingerprints = {name: fingerprint_of(model) for name, model in models.models.items()}
    return CanonicalForms(models, fingerprints)


def recipe(world, method, parents, base=True, **settings):
    """A recipe; `parents` maps a model to its parameters, `settings` are the other fields."""
    data = [f"merge_method: {method}"]
    data += [f"base_model: {world / 'base'}"] if base else []
    data += [f"{key}: {value}" for key, value in settings.items()]
    data += ["models:"]
    data += [f"  - {{model: {world / n}, parameters: {p}}}" for n, p in parents.items()]
    return parse_recipe("\n".join(data))


LAYERS = "{filter: self_attn, value: %s}, {value: %s}"
SAME = {
    "a curve of equal values": (
        ("ties", {"a": "{weight: 0.3, density: [0.5, 0.5]}", "b": "{weight: 0.4, density: 0.2}"}),
        ("ties", {"a": "{weight: [0.3, 0.3], density: 0.5}", "b": "{weight: 0.4, density: 0.2}"}),
    ),
    "rules of equal values": (
        ("task_arithmetic", {"a": "{weight: 0.3}", "b": "{weight: 0.4}"}),
        ("task_arithmetic", {"a": f"{{weight: [{LAYERS % (0.3, 0.3)}]}}", "b": "{weight: 0.4}"}),
    ),
    "what is inert in some layers": (
        ("ties", {"a": "{weight: [0.0, 0.4], density: [0.2, 0.5]}", "b": "{weight: 1}"}),
        ("ties", {"a": "{weight: [0.0, 0.4], density: [0.9, 0.5]}", "b": "{weight: 1}"}),
    ),
    "a copy of a model": (
        ("ties", {"a": "{weight: 0.3, density: 0.5}", "b": "{weight: 0.4, density: 0.2}"}),
        ("ties", {"copy": "{weight: 0.3, density: 0.5}", "link": "{weight: 0.4, density: 0.2}"}),
    ),
    "seed without draws": (
        ("dare_ties", {"a": "{weight: 0.3}"}, {"evomerge": "{mask_seed: 1}"}),
        ("dare_ties", {"a": "{weight: 0.3}"}, {"evomerge": "{mask_seed: 2}"}),
    ),
    "a merge that is a parent": (
        ("linear", {"a": "{weight: 0.3}", "b": "{weight: 0.0}"}, {"base": False}),
        ("passthrough", {"copy": "{}"}, {"base": False}),
    ),
    "a merge that is the base": (
        ("task_arithmetic", {"a": "{weight: 0.0}", "b": "{weight: 0.0}"}),
        ("passthrough", {"base": "{}"}, {"base": False}),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_recipes_of_one_merge(case, world, models, forms):
    one, other = (
        recipe(world, method, parents, **(rest[0] if rest else {}))
        for method, parents, *rest in SAME[case]
    )
    assert one.hash != other.hash
    assert forms.hash(one) == forms.hash(other)
    tensors = []
    for each in (one, other):
        bound = models.bind(each)
        tensors.append(merged_tensors(bound.plan, bound.sources, StatisticsCache()))
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


DIFFERENT = [
    ("ties", {"a": "{weight: 0.3, density: 0.5}", "b": "{weight: 0.4, density: 0.2}"}),
    ("ties", {"b": "{weight: 0.3, density: 0.5}", "a": "{weight: 0.4, density: 0.2}"}),
    ("ties", {"a": "{weight: 0.3, density: 0.5}", "b": "{weight: 0.4, density: 0.21}"}),
    ("ties", {"a": "{weight: 0.3, density: 0.5}", "b": "{weight: 0.4, density: [0.2, 0.3]}"}),
    ("ties", {"a": "{weight: 0.3, density: 0.5}", "b": "{weight: 0.4, density: [0.3, 0.2]}"}),
    ("ties", {"a": "{weight: 0.3, density: 0.5}"}),
    ("ties", {"a": "{weight: 0.4, density: 0.5}"}),
    ("dare_ties", {"a": "{weight: 0.4, density: 0.5}"}, {"evomerge": "{mask_seed: 1}"}),
    ("dare_ties", {"a": "{weight: 0.4, density: 0.5}"}, {"evomerge": "{mask_seed: 2}"}),
    ("task_arithmetic", {"a": "{weight: 0.3}"}),
    ("task_arithmetic", {"a": "{weight: 0.3}"}, {"dtype": "bfloat16"}),
    ("task_arithmetic", {"a": "{weight: 0.3}"}, {"out_dtype": "float16"}),
    (
        "task_arithmetic",
        {"a": "{weight: 0.3}"},
        {"out_dtype": "bfloat16", "evomerge": "{rounding: dither}"},
    ),
    ("linear", {"a": "{weight: 1}", "b": "{weight: 1}"}, {"base": False}),
    ("passthrough", {"a": "{}"}, {"base": False}),
]


def test_other_merges_have_other_hashes(world, forms):
    recipes = [recipe(world, m, p, **(rest[0] if rest else {})) for m, p, *rest in DIFFERENT]
    assert len({forms.hash(each) for each in recipes}) == len(recipes)


def test_another_process_would_find_the_same_hash(world, models):
    text = recipe(world, "ties", {"a": "{weight: 0.3, density: 0.5}", "b": "{weight: 0.4}"})
    one, other = (
        CanonicalForms(ModelSet(dict(models.models)), dict.fromkeys(models.models, "f"))
        for _ in range(2)
    )
    assert one.hash(text) == other.hash(text)


def test_what_is_no_merge_has_its_own_hash(world, forms):
    wrong = recipe(world, "linear", {"a": "{weight: 1}", "b": "{weight: -1}"}, base=False)
    assert forms.hash(wrong) == wrong.hash


def test_fingerprints_are_samples_and_do_not_decide_alone(world, models):
    names = {name: str(world / name) for name in ("base", "a", "b", "copy", "link")}
    found = identities(models.models, dict.fromkeys(models.models, "the same"))
    assert found[names["copy"]] == names["a"]
    assert found[names["link"]] == names["b"]
    assert len(set(found.values())) == 3


def test_an_adapter_leaves_most_tensors_to_its_base(world, tmp_path):
    from safetensors.torch import save_file

    target = "model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(0)
    factors = {"A": (2, 32), "B": (48, 2)}
    tensors = {
        f"base_model.model.{target}.lora_{factor}.weight": torch.randn(shape, generator=generator)
        for factor, shape in factors.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}'
    )
    refs = [
        ModelRef(path=str(world / "base")),
        ModelRef(path=str(world / "base"), adapter=str(tmp_path)),
    ]
    adapted = ModelSet({str(ref): open_model(ref) for ref in refs})
    forms = CanonicalForms(adapted, {str(ref): str(i) for i, ref in enumerate(refs)})
    texts = [
        f"merge_method: task_arithmetic\nbase_model: {refs[0]}\nmodels:\n"
        f"  - {{model: {refs[1]}, parameters: {{weight: [{rules}]}}}}"
        for rules in (LAYERS % (0.1, 0.3), LAYERS % (0.9, 0.3), LAYERS % (0.1, 0.4))
    ]
    first, unread, live = (forms.hash(parse_recipe(text)) for text in texts)
    assert first == unread
    assert first != live
