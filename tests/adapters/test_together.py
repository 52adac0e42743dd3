"""K candidates in one forward pass, against each of them materialised in float64 and run alone."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.adapters.adapter import Adapter, LowRank
from evomerge.adapters.open import open_model
from evomerge.adapters.together import coefficients_of, why_not, wrap
from evomerge.checkpoints.architecture import layout_of
from evomerge.config.recipe import Recipe, Rule, Source
from evomerge.errors import MergeError
from evomerge.kernels.masks import MaskKey
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import Local, Mask, Span
from evomerge.merging.plan import make_plan
from evomerge.merging.run import merge
from tests.adapters.small import layer, make_adapter, reference, write_adapter_files
from tests.families import make_family
from tests.tiny import make_model

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding."""


@dataclass(frozen=True)
class Case:
    """A model with three adapters; the coefficients of four candidates.

    Attributes:
        model: In float32.
        adapters: As they are read from files.
        scales: For each adapter, module to what its product is multiplied by, worked out by hand.
        candidates: For each, a number per tensor and adapter; the last one has zeros only.
    """

    model: torch.nn.Module
    adapters: list[Adapter]
    scales: list[dict[str, float]]
    candidates: list[dict[str, tuple[float, ...]]]

    def alone(self, number: int, dtype: torch.dtype) -> torch.nn.Module:
        """A candidate with weights of its own: float64 arithmetic, then one rounding."""
        model = copy.deepcopy(self.model).double()
        with torch.no_grad():
            for i, (adapter, scales) in enumerate(zip(self.adapters, self.scales, strict=True)):
                for name, part in adapter.low_rank.items():
                    module = model.get_submodule(part.module)
                    c = self.candidates[number][name][i] * scales[part.module]
                    added = c * part.b_OR.double() @ part.a_RI.double()
                    module.weight += added if isinstance(module, torch.nn.Linear) else added.T
        return model.to(dtype)


def llama(folder):
    model = make_model(0, folder / "base")
    q0, q1, o0, down1 = layer(0), layer(1), layer(0, "self_attn.o_proj"), layer(1, "mlp.down_proj")
    make_adapter(folder / "a", folder / "base", 1, {q0: 4, q1: 2, down1: 4}, rank_pattern={q1: 2})
    pattern = {"r": 9, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"o_proj": 3}}
    make_adapter(folder / "b", folder / "base", 2, {q0: 9, o0: 3, "lm_head": 9}, **pattern)
    make_adapter(folder / "c", folder / "base", 3, {down1: 1}, r=1)
    scales = [
        {q0: 8 / 4, q1: 8 / 2, down1: 8 / 4},
        {q0: 6 / 3, o0: 6 / math.sqrt(3), "lm_head": 6 / 3},
        {down1: 8},
    ]
    return model, scales


def gpt2(folder):
    model = make_family("gpt2", 0, folder / "base")
    attn, square, up = (
        f"transformer.h.{m}" for m in ("0.attn.c_attn", "2.attn.c_proj", "1.mlp.c_fc")
    )
    for seed, (name, ranks, fields) in enumerate(
        (
            ("a", {attn: 2, square: 2, up: 2}, {"r": 2, "lora_alpha": 3}),
            ("b", {attn: 5, up: 5}, {"r": 5, "lora_alpha": 2, "use_rslora": True}),
            ("c", {square: 1}, {"r": 1, "lora_alpha": 1}),
        )
    ):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, rank in ranks.items():
            inputs, outputs = model.get_submodule(module).weight.shape
            for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                factor = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor
        config = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": True, **fields}
        write_adapter_files(folder / name, tensors, config)
    rs = 2 / math.sqrt(5)
    return model, [{attn: 1.5, square: 1.5, up: 1.5}, {attn: rs, up: rs}, {square: 1.0}]


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    model, scales = request.param(folder)
    adapters = [open_model(reference(folder / "base", folder / x)).adapter for x in "abc"]
    names = sorted({name for adapter in adapters for name in adapter.low_rank})
    generator = torch.Generator().manual_seed(7)
    drawn = [{n: tuple(torch.randn(3, generator=generator).tolist()) for n in names} for _ in "012"]
    return Case(model, adapters, scales, [*drawn, dict.fromkeys(names, (0.0, 0.0, 0.0))])


def prompts(vocabulary, rows):
    """Random tokens of different lengths, padded on the left; never the padding or an end."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(4, vocabulary, (rows, 9), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return tokens * mask, mask


@torch.no_grad()
def logits_of(model, tokens, mask):
    """Logits in float64, padding as 0: what a model says of padding means nothing."""
    logits = model(tokens, attention_mask=mask).logits.double()
    return logits * mask.unsqueeze(-1)


ROWS = [0, 1, 2, 3, 2, 1, 0, 2]


def logits_together(case, dtype, rows, tokens, mask):
    model = copy.deepcopy(case.model).to(dtype)
    with wrap(model, case.adapters) as together:
        together.set_candidates(case.candidates)
        together.assign_rows(rows)
        return logits_of(model, tokens, mask)


def logits_alone(case, dtype, rows, tokens, mask):
    one_by_one = [
        logits_of(case.alone(number, dtype), tokens[[row]], mask[[row]])
        for row, number in enumerate(rows)
    ]
    return torch.cat(one_by_one)


def truth_and_noise(case, rows, tokens, mask):
    """What the candidates say in float64, and what float32 moves it by."""
    truth = logits_alone(case, torch.float64, rows, tokens, mask)
    return truth, (logits_alone(case, torch.float32, rows, tokens, mask) - truth).abs().max()


def rms(tensor):
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_together_is_each_alone(case, dtype):
    """Within the rounding noise of the network, for any candidates and adapters.

    The noise is measured: what float32 moves the logits of the materialised candidates by,
    relative to float64; in another dtype it scales with the unit of rounding. Together, an adapted
    module rounds four times (both products, lambda, the addition) where alone it rounds twice (the
    weights, the product), in terms of the sizes of W x and of the adapters' parts of it, which for
    these adapters are alike: 4 times the noise is the bound. Without the adapters, or with those
    of another row, the logits are wrong by more than a thousand times that.
    """
    tokens, mask = prompts(case.model.config.vocab_size, len(ROWS))
    truth, noise = truth_and_noise(case, ROWS, tokens, mask)
    tolerance = 4 * noise * UNIT[dtype] / UNIT[torch.float32]
    found = logits_together(case, dtype, ROWS, tokens, mask)
    assert (found - truth).abs().max() <= tolerance
    for wrong in ([3] * len(ROWS), ROWS[1:] + ROWS[:1]):
        other = logits_together(case, dtype, wrong, tokens, mask)
        assert (other - truth).abs().max() > 1000 * tolerance


def test_in_bfloat16_it_is_no_further_from_the_truth_than_the_materialised(case):
    """The truth starts from the same rounded base; alone, the weights are rounded once more."""
    case = replace(case, model=copy.deepcopy(case.model).bfloat16().float())
    tokens, mask = prompts(case.model.config.vocab_size, len(ROWS))
    truth = logits_alone(case, torch.float64, ROWS, tokens, mask)
    alone = rms(logits_alone(case, torch.bfloat16, ROWS, tokens, mask) - truth)
    together = rms(logits_together(case, torch.bfloat16, ROWS, tokens, mask) - truth)
    # the two are noise of one size, so that which is smaller is chance
    assert together <= 1.5 * alone
    assert rms(logits_of(case.model, tokens, mask) - truth) > 3 * together


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_one_module_is_within_the_bound_of_its_roundings(kind):
    """A product over n terms errs by at most n u / (1 - n u) of the sum of its terms' magnitudes.

    Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1. x A^T has I terms, lam
    and the product with it round once each, B^T adds S, the sum into the output one.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    model = module_of(kind, 48, 40)
    with torch.no_grad():
        model.m.weight.copy_(random(*model.m.weight.shape))
    parts = [
        LowRank("m", random(r, 48), random(40, r), s, kind == "conv1d")
        for r, s in ((3, 2.0), (7, 0.1))
    ]
    coefficients = random(5, 2).double()
    x = random(5, 6, 48)
    with wrap(model, [adapter_of(part) for part in parts]) as together, torch.no_grad():
        together.set_candidates([{"m.weight": tuple(row)} for row in coefficients.tolist()])
        together.assign_rows(range(5))
        found = model.m(x).double()
    weight = model.m.weight.detach().double()
    weight = weight if kind == "linear" else weight.T
    exact, bound, u = x.double() @ weight.T, x.double().abs() @ weight.abs().T * gamma(50), 2.0**-24
    for part, c in zip(parts, coefficients.T, strict=True):
        lam, a, b = c[:, None, None] * part.scale, part.a_RI.double(), part.b_OR.double()
        exact += lam * (x.double() @ a.T) @ b.T
        bound += lam.abs() * (x.double().abs() @ a.abs().T) @ b.abs().T * gamma(48 + 2 + 10 + 2)
    assert u * exact.abs().max() < bound.max()
    assert ((found - exact).abs() <= bound).all()


def gamma(n, u=2.0**-24):
    return n * u / (1 - n * u)


def module_of(kind, inputs, outputs):
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.Module()
    made = {
        "linear": lambda: torch.nn.Linear(inputs, outputs, bias=False),
        "conv1d": lambda: Conv1D(outputs, inputs),
        "embedding": lambda: torch.nn.Embedding(inputs, outputs),
    }
    model.m = made[kind]()
    return model


def adapter_of(*parts, label="x", saved=()):
    low_rank = {f"{part.module}.weight": part for part in parts}
    return Adapter(label, low_rank, dict(saved), {}, ties_head=False)


def test_without_coefficients_rows_are_the_base_to_the_bit(case):
    """Adding 0 to a finite number is exact; so nothing leaks from one row into another."""
    tokens, mask = prompts(case.model.config.vocab_size, len(ROWS))
    base = logits_of(case.model, tokens, mask)
    together = logits_together(case, torch.float32, ROWS, tokens, mask)
    is_base = torch.tensor([number == 3 for number in ROWS])
    assert torch.equal(together[is_base], base[is_base])
    assert not torch.equal(together[~is_base], base[~is_base])


def test_the_order_of_rows_does_not_matter(case):
    """Products of another block of rows may round otherwise: 4 times the noise, as above."""
    tokens, mask = prompts(case.model.config.vocab_size, len(ROWS))
    truth, noise = truth_and_noise(case, ROWS, tokens, mask)
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(1))
    shuffled = logits_together(
        case, torch.float32, [ROWS[i] for i in order], tokens[order], mask[order]
    )
    assert (shuffled - truth[order]).abs().max() <= 4 * noise


def test_one_candidate_is_the_merge_itself(case):
    tokens, mask = prompts(case.model.config.vocab_size, 4)
    for number in range(3):
        single = replace(case, candidates=case.candidates[number : number + 1])
        truth, noise = truth_and_noise(single, [0] * 4, tokens, mask)
        found = logits_together(single, torch.float32, [0] * 4, tokens, mask)
        assert (found - truth).abs().max() <= 4 * noise


def test_generation_gives_each_row_its_own_candidates_tokens(case):
    """With the cache, from prompts of different lengths; alone there is no padding."""
    tokens, mask = prompts(case.model.config.vocab_size, len(ROWS))
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    model = copy.deepcopy(case.model)
    with wrap(model, case.adapters) as together:
        together.set_candidates(case.candidates)
        together.assign_rows(ROWS)
        found = model.generate(tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :]
    answers = set()
    for row, number in enumerate(ROWS):
        prompt = tokens[row][mask[row].bool()].unsqueeze(0)
        answer = case.alone(number, torch.float32).generate(prompt, **settings)[0]
        assert found[row].tolist() == answer[prompt.shape[1] :].tolist(), f"row {row}"
        answers.add(tuple(found[row].tolist()))
    assert len(answers) > len(ROWS) / 2


def test_unwrapped_the_model_is_what_it_was(case):
    tokens, mask = prompts(case.model.config.vocab_size, len(ROWS))
    model = copy.deepcopy(case.model)
    modules, state = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    memory = [parameter.data_ptr() for parameter in model.parameters()]
    before = logits_of(model, tokens, mask)
    together = wrap(model, case.adapters)
    together.set_candidates(case.candidates)
    for rows in (ROWS, ROWS[::-1]):
        together.assign_rows(rows)
        logits_of(model, tokens, mask)
    assert [parameter.data_ptr() for parameter in model.parameters()] == memory
    together.unwrap()
    together.unwrap()
    assert torch.equal(logits_of(model, tokens, mask), before)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_candidates_and_rows_can_change_between_batches(case):
    tokens, mask = prompts(case.model.config.vocab_size, 3)
    first = logits_together(case, torch.float32, [0, 1, 2], tokens, mask)
    model = copy.deepcopy(case.model)
    with wrap(model, case.adapters) as together:
        together.set_candidates(case.candidates[:2])
        together.assign_rows([1])
        logits_of(model, tokens[:1], mask[:1])
        together.set_candidates(case.candidates)
        with pytest.raises(MergeError, match=r"0 rows are assigned.*Assign the rows"):
            logits_of(model, tokens, mask)
        together.assign_rows([0, 1, 2])
        assert torch.equal(logits_of(model, tokens, mask), first)


def tables_of(recipe, models):
    plan = make_plan(recipe, models, layout_of(models[str(recipe.donor)].names()))
    nothing = (None, [], None, ())
    return {
        job.spec.name: plan.method.table(job.values, TensorStatistics(job.spec.name, *nothing))
        for job in plan.jobs
        if job.values
    }


def recipe_of(method, refs, weights):
    sources = [
        Source(model=ref, parameters={"weight": weight})
        for ref, weight in zip(refs, weights, strict=True)
    ]
    if method == "linear":
        return Recipe(merge_method=method, models=tuple(sources), out_dtype="float32")
    return Recipe(
        merge_method=method, base_model=refs[0], models=tuple(sources[1:]), out_dtype="float32"
    )


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_recipes_with_curves_and_filters_score_as_their_merges(method, tmp_path):
    """From recipe to logits, beside the merged files; noise as above, in float32."""
    make_model(0, tmp_path / "base")
    modules = [layer(n, m) for n in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")]
    for seed, name in ((1, "a"), (2, "b")):
        make_adapter(tmp_path / name, tmp_path / "base", seed, dict.fromkeys(modules, 4))
    base = reference(tmp_path / "base")
    refs = [base, *(reference(tmp_path / "base", tmp_path / name) for name in "ab")]
    rules = (Rule(filter="mlp", value=0.2), Rule(value=0.9))
    weights = [(0.5, rules, (0.1, 0.7)), (0.0, (1.0, 0.3), 0.4)]
    recipes = [recipe_of(method, refs, chosen) for chosen in weights]
    models = {str(ref): open_model(ref) for ref in refs}
    adapters = [models[str(ref)].adapter for ref in refs[1:]]
    if method == "linear":
        adapters.insert(0, adapter_of())
    tokens, mask = prompts(32, 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with wrap(model, adapters) as together:
        found = [coefficients_of(tables_of(recipe, models), adapters) for recipe in recipes]
        together.set_candidates(found)
        together.assign_rows([0, 1, 1, 0])
        logits = logits_of(model, tokens, mask)
    for number, recipe in enumerate(recipes):
        merge(recipe, tmp_path / f"{method}{number}")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{method}{number}")
        rows = [row for row, which in enumerate([0, 1, 1, 0]) if which == number]
        alone = logits_of(merged, tokens[rows], mask[rows])
        noise = (logits_of(merged.double(), tokens[rows], mask[rows]) - alone).abs().max()
        assert (logits[rows] - alone).abs().max() <= 5 * noise  # 4, and 1 of its own
        stored = load_file(tmp_path / "base" / "model.safetensors")
        assert not torch.equal(
            merged.state_dict()[f"{modules[0]}.weight"].float(), stored[f"{modules[0]}.weight"]
        )


PART = LowRank("m", torch.ones(2, 6), torch.ones(5, 2), 1.0)
FLAT = Span((0.5, 0.5))
KEY = MaskKey(0, "m.weight")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            Mask((1.0,) * 2, (1.0,) * 2, (0.1,) * 2, (2**32,) * 2, KEY, elect=True),
            "no weighted sum",
        ),
        (Local(lambda base, sources: sources[0]), "no weighted sum"),
        (Span((0.5, 0.4)), r"scales the model itself, by 0\.9; only 1"),
        (Span((0.5, 0.4), base=0.8, deltas=True), r"scales the model itself, by 0\.8"),
        (Span((float("nan"), 0.4)), "scales the model itself, by nan"),
        (Span((1.0,)), "1 models are merged, and 2 adapters"),
        (None, "the recipe does not merge it"),
    ],
)
def test_recipes_that_are_no_sum_of_adapters_are_refused(table, message):
    tables = {"norm.weight": FLAT, "m.weight": table}
    tables = {name: table for name, table in tables.items() if table is not None}
    with pytest.raises(MergeError, match=rf"^m\.weight: .*{message}"):
        coefficients_of(tables, [adapter_of(PART), adapter_of()])


def test_weights_that_add_up_to_one_but_for_rounding_are_taken():
    tables = {"norm.weight": FLAT, "m.weight": Span((0.1,) * 10), "o.weight": Span((0.1,) * 10)}
    tables["norm.weight"] = Span((0.1,) * 10, base=1.0, deltas=True)
    adapters = [adapter_of(PART), *(adapter_of() for _ in range(9))]
    assert sum((0.1,) * 10) != 1
    assert why_not(tables, adapters) is None
    assert coefficients_of(tables, adapters) == {"m.weight": (0.1,) * 10}
    tables["o.weight"] = Span((0.1,) * 9 + (0.1000002,))
    assert "o.weight: the merge scales the model itself, by 1.0000002" in why_not(tables, adapters)


def test_adapters_that_do_more_than_add_are_refused():
    embedding = adapter_of(LowRank("m", torch.ones(2, 6), torch.ones(5, 2), 1.0, True, True))
    saved = adapter_of(PART, saved={"m.weight": torch.ones(5, 6)})
    for adapter, message in (
        (embedding, "x: adapts the embedding m.weight"),
        (saved, "x: replaces m.weight whole"),
    ):
        model = module_of("embedding" if adapter is embedding else "linear", 6, 5)
        with pytest.raises(MergeError, match=message):
            wrap(model, [adapter_of(PART), adapter])
        assert message in why_not({"m.weight": FLAT}, [adapter_of(PART), adapter])
        assert not model.m._forward_hooks


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("embedding", PART, "m is Embedding in the live model; linear modules"),
        ("linear", replace(PART, module="n"), "n is no module in the live model"),
        ("linear", replace(PART, b_OR=torch.ones(7, 2)), r"has \(5, 6\) .* is for \(7, 6\)"),
        ("conv1d", PART, r"has \(6, 5\) torch.float32 in Conv1D.* \(5, 6\), outputs first"),
        ("linear", replace(PART, transposed=True), r"is for \(6, 5\), inputs first"),
    ],
)
def test_adapters_that_do_not_fit_the_live_model_are_refused(kind, part, message):
    model = module_of(kind, 6, 5)
    with pytest.raises(MergeError, match=message):
        wrap(model, [adapter_of(part)])
    assert not model.m._forward_hooks


def test_a_part_that_does_not_fit_leaves_no_module_wrapped():
    model = module_of("linear", 6, 5)
    model.n = torch.nn.Linear(6, 4)
    with pytest.raises(MergeError, match=r"n\.weight: the live model has \(4, 6\)"):
        wrap(model, [adapter_of(PART), adapter_of(replace(PART, module="n"))])
    assert not model.m._forward_hooks


def test_a_tensor_without_the_leading_module_finds_its_place():
    model = torch.nn.Module()
    model.base_model_prefix, model.transformer = "transformer", module_of("linear", 6, 5)
    x = torch.ones(1, 2, 6)
    before = model.transformer.m(x)
    with wrap(model, [adapter_of(PART)]) as together:
        together.set_candidates([{"m.weight": (0.5,)}])
        together.assign_rows([0])
        after = model.transformer.m(x)
    # half of 2 ranks of 6 ones
    torch.testing.assert_close(after - before, torch.full((1, 2, 5), 6.0))


@pytest.mark.parametrize(
    ("candidates", "rows", "message"),
    [
        ([], [0], "candidates: there are none"),
        ([{}], [0], r"candidate 0: has no coefficients for m\.weight"),
        ([{"m.weight": (1.0,), "n.weight": (1.0,)}], [0], r"0: has coefficients for n\.weight"),
        ([{"m.weight": (1.0, 2.0)}], [0], r"has 2 coefficients for m\.weight.* the 1 adapters"),
        ([{"m.weight": (1.0,)}], [0, 1], "row 1: is for candidate 1, and 1 are set"),
        ([{"m.weight": (1.0,)}], [-1], "row 0: is for candidate -1"),
    ],
)
def test_coefficients_and_rows_that_do_not_fit_are_refused(candidates, rows, message):
    together = wrap(module_of("linear", 6, 5), [adapter_of(PART)])
    with pytest.raises(MergeError, match=message):
        score(together, candidates, rows)


def score(together, candidates, rows):
    together.set_candidates(candidates)
    together.assign_rows(rows)


@pytest.mark.parametrize("shape", [(3, 6), (2, 1, 6), (12, 6)])
def test_other_rows_than_assigned_are_refused(shape):
    model = module_of("linear", 6, 5)
    with wrap(model, [adapter_of(PART)]) as together:
        together.set_candidates([{"m.weight": (1.0,)}])
        together.assign_rows([0, 0, 0])
        with pytest.raises(MergeError, match=r"m\.weight: its module got .*, and 3 rows are"):
            model.m(torch.ones(shape))
    assert model.m(torch.ones(shape)).shape == (*shape[:-1], 5)
