import pytest
import torch

from evomerge.checkpoints.source import MemorySource
from evomerge.errors import ConfigError, MergeError
from tests.merging.small import SHAPES, TASK_ARITHMETIC, make_sources, make_tensors, plan_of

UP = "model.layers.1.mlp.up_proj.weight"


def problem(text, sources=None, error=MergeError):
    with pytest.raises(error) as caught:
        plan_of(text, sources or make_sources())
    return str(caught.value)


def values_of(plan, name):
    return next(job.values for job in plan.jobs if job.spec.name == name)


def models_of(job):
    """The base's name and the parents'."""
    return (job.base and job.base.model, *(parent.model for parent in job.parents))


def test_jobs_come_sorted_with_shape_and_dtype_of_the_base():
    sources = make_sources(base={"model.norm.weight": torch.ones(6, dtype=torch.bfloat16)})
    plan = plan_of(TASK_ARITHMETIC, sources)
    assert [job.spec.name for job in plan.jobs] == sorted(SHAPES)
    assert {job.spec.name: job.spec.shape for job in plan.jobs} == SHAPES
    kept = {job.spec.name: job.spec.dtype for job in plan.jobs}
    assert kept.pop("model.norm.weight") is torch.bfloat16
    assert set(kept.values()) == {torch.float32}
    assert {models_of(job) for job in plan.jobs} == {("base", "a", "b")}
    assert all(name == job.spec.name for job in plan.jobs for _, name in job.inputs)
    assert plan.layers is None


@pytest.mark.parametrize(
    ("line", "dtype"),
    [
        ("dtype: bfloat16", torch.bfloat16),
        ("out_dtype: float16", torch.float16),
        ("{dtype: float32, out_dtype: bfloat16}", torch.bfloat16),
    ],
)
def test_out_dtype_wins_over_dtype(line, dtype):
    text = TASK_ARITHMETIC + line.strip("{}").replace(", ", "\n")
    assert {job.spec.dtype for job in plan_of(text, make_sources()).jobs} == {dtype}


def test_integers_keep_their_dtype():
    counts = {"model.layers.0.count": torch.arange(3)}
    sources = make_sources(base=counts, a=counts, b=counts)
    jobs = {job.spec.name: job for job in plan_of(TASK_ARITHMETIC + "dtype: float16", sources).jobs}
    assert jobs["model.layers.0.count"].spec.dtype is torch.int64
    assert jobs["model.layers.0.count"].values is None


def test_values_follow_rules_curves_and_precedence():
    plan = plan_of(
        """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: [0.0, 0.5, 1.0]}}
  - model: b
    parameters:
      weight: [{filter: mlp, value: [1.0, 0.0]}, {filter: lm_head, value: 0.125}]
      density: {filter: norm, value: 0.5}
parameters: {weight: 0.75, density: 0.25, lambda: [{filter: layers.2, value: 2.0}]}
""",
        make_sources(),
    )
    assert values_of(plan, UP).per_model == {"weight": (0.5, 0.5), "density": (0.25, 0.25)}
    assert values_of(plan, "lm_head.weight").per_model["weight"] == (0.0, 0.125)
    assert values_of(plan, "model.norm.weight").per_model == {
        "weight": (0.0, 0.75),
        "density": (0.25, 0.5),
    }
    lambdas = [values_of(plan, f"model.layers.{i}.mlp.up_proj.weight").shared for i in range(3)]
    assert [shared["lambda"] for shared in lambdas] == [1.0, 1.0, 2.0]
    assert lambdas[0]["normalize"] is True


def test_the_base_among_the_models_is_no_parent():
    text = TASK_ARITHMETIC.replace("models:", "models:\n  - model: base")
    assert {models_of(job) for job in plan_of(text, make_sources()).jobs} == {("base", "a", "b")}


def test_slerp_needs_the_base_and_one_other_model():
    text = (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}"
    )
    plan = plan_of(text, make_sources())
    assert {models_of(job) for job in plan.jobs} == {("a", "b")}
    assert problem(text.replace("base_model: a", "base_model: base")) == (
        "models: slerp takes exactly 1 besides the base, and 2 (a, b) came."
    )


def test_linear_takes_its_base_from_its_models():
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
    plan = plan_of(text + "base_model: b", make_sources())
    assert {models_of(job) for job in plan.jobs} == {(None, "a", "b")}
    assert "base is not among them" in problem(text + "base_model: base")


@pytest.mark.parametrize(
    ("method", "models", "message"),
    [
        ("model_stock", "a", "model_stock takes at least 2 besides the base, and 1 (a) came."),
        ("slerp", "a, b", "slerp takes exactly 1 besides the base, and 2 (a, b) came."),
        ("ties", "base", "ties takes at least 1 besides the base, and none came."),
        ("passthrough", "base, a", "passthrough takes exactly 1, and 2 (base, a) came."),
    ],
)
def test_a_wrong_number_of_parents_names_them(method, models, message):
    listed = ", ".join(f"{{model: {name}}}" for name in models.split(", "))
    text = f"merge_method: {method}\nbase_model: base\nmodels: [{listed}]\nparameters: {{t: 1}}\n"
    assert f"models: {message}" in problem(text).splitlines()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "base_model: base",
            "",
            "base_model: task_arithmetic needs one, and the recipe gives none. Add it.",
        ),
        (
            "model: b,",
            "model: a,",
            "models: a stands twice. List it once, with the sum of its weights.",
        ),
        (
            "model: b,",
            "model: base,",
            "models: base is the base, so its weight would have no effect in task_arithmetic. "
            "Remove its parameters.",
        ),
        (
            "weight: 0.5",
            "wieght: 0.5",
            "a: task_arithmetic has no parameter 'wieght'. Did you mean weight?",
        ),
        (
            "weight: 0.5",
            "weight: 0.5, lambda: 2.0",
            "a: lambda is one value for all models in task_arithmetic. "
            "Write it under the recipe's own parameters.",
        ),
        (
            "base_model: base",
            "base_model: base\nparameters: {densty: 1}",
            "parameters: task_arithmetic has no 'densty'. "
            "Known: int8_mask, lambda, normalize, weight.",
        ),
    ],
)
def test_recipes_that_are_no_merge(old, new, message):
    assert message in problem(TASK_ARITHMETIC.replace(old, new)).splitlines()


def test_unknown_method_names_the_nearest():
    text = TASK_ARITHMETIC.replace("task_arithmetic", "task_arithmetics")
    assert problem(text, error=ConfigError) == (
        "merge method 'task_arithmetics' is not known. Did you mean task_arithmetic?"
    )


def test_a_missing_weight_is_one_problem_and_not_one_per_tensor():
    text = TASK_ARITHMETIC.replace(", parameters: {weight: 0.5}", "")
    assert problem(text) == (
        "lm_head.weight: task_arithmetic needs weight for a, and the recipe gives none. "
        "Add it to parameters."
    )


def test_a_value_out_of_range_names_the_tensor():
    text = TASK_ARITHMETIC.replace("task_arithmetic", "ties").replace(
        "weight: 0.5", "weight: 0.5, density: [0.5, 1.5]"
    )
    lines = problem(text).splitlines()
    assert lines[0].startswith(
        "model.layers.2.input_layernorm.weight: density is 1.5 for a, allowed"
    )
    assert len(lines) == 1


def test_linear_with_weights_that_cancel_names_the_tensor():
    text = """
merge_method: linear
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: [0.0, -2.0]}}
"""
    assert problem(text) == (
        "model.layers.1.input_layernorm.weight: a, b: the weights (1.0, -1.0) add up to 0. "
        "Change them, or set normalize: false."
    )


def test_another_shape_names_both_models():
    wide = {UP: torch.zeros(12, 6)}
    assert problem(TASK_ARITHMETIC, make_sources(b=wide)) == (
        f"{UP}: b has (12, 6), base base has (10, 6). "
        "These two models cannot be merged tensor by tensor; check base_model."
    )


def test_embeddings_of_another_width_are_not_blamed_on_the_vocabulary():
    wide = {name: torch.zeros(16, 8) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    lines = problem(TASK_ARITHMETIC, make_sources(b=wide)).splitlines()
    assert len(lines) == 2
    assert all("b has (16, 8)" in line and "check base_model" in line for line in lines)


def test_another_number_of_tokens_says_what_to_do():
    more = {name: torch.zeros(20, 6) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    lines = problem(TASK_ARITHMETIC, make_sources(b=more)).splitlines()
    assert [line.partition(":")[0] for line in lines] == sorted(more)
    assert all(
        "b has (20, 6), base base has (16, 6). Their vocabularies differ" in x for x in lines
    )
    assert all("tokenizer: {source: union}" in line for line in lines)


def test_missing_and_extra_tensors_are_counted():
    names = sorted(SHAPES)[:5]
    text = problem(TASK_ARITHMETIC, make_sources(a=dict.fromkeys(names), b={"x": torch.ones(1)}))
    assert text.splitlines() == [
        f"a: lacks {', '.join(names[:3])} and 2 tensors more, which base base has. "
        "These two models cannot be merged tensor by tensor; check base_model.",
        "b: has x, which base base lacks. These two models cannot be merged tensor by tensor; "
        "check base_model.",
    ]


def test_a_head_that_only_one_model_ties_is_explained():
    sources = make_sources()
    tied = {name: t for name, t in make_tensors(1).items() if name != "lm_head.weight"}
    sources["a"] = MemorySource(tied, "a", {"lm_head.weight": "model.embed_tokens.weight"})
    assert "a: lacks lm_head.weight (tied to model.embed_tokens.weight there), which" in problem(
        TASK_ARITHMETIC, sources
    )


@pytest.mark.parametrize("model", ["base", "b"])
def test_float64_is_refused_and_not_rounded_silently(model):
    text = problem(TASK_ARITHMETIC, make_sources(**{model: {UP: torch.zeros(10, 6).double()}}))
    assert text == (
        f"{UP}: {model} stores float64; merged are float32, float16, bfloat16. "
        "Convert the model first."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_integers_must_have_one_dtype(dtype):
    counts = {"model.layers.0.count": torch.arange(3)}
    other = {"model.layers.0.count": torch.arange(3).to(dtype)}
    text = problem(TASK_ARITHMETIC, make_sources(base=counts, a=counts, b=other))
    assert text.startswith(f"model.layers.0.count: b stores {dtype}, base base stores torch.int64.")


def test_only_the_first_problems_are_shown():
    wide = {name: torch.zeros(3, 3) for name in SHAPES}
    lines = problem(TASK_ARITHMETIC, make_sources(a=wide)).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "... and 4 more of this kind."


def test_nothing_is_read():
    sources = make_sources()
    for source in sources.values():
        source.read = None
    assert len(plan_of(TASK_ARITHMETIC, sources).jobs) == len(SHAPES)
