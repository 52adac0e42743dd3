"""Packed log-likelihoods against lm-eval's own, on many families, and plans against brute force."""

import copy
import json
import logging
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import evaluate as benchmark
from evomerge.errors import EvaluationError
from evomerge.evaluate.packed import make_plan, probe_requests, score_plan, why_not_packed
from evomerge.evaluate.packed_plan import ScoredRequest, make_groups
from tests.evaluate.helpers import CHOICE, make_harness, make_suite, rewrite
from tests.families import make_family
from tests.tiny import VOCABULARY, make_model, make_tokenizer

TOKENS = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 1024}
WIDE = {"sliding_window": 1000}
"""Wider than any row here."""

SHAPES = {
    "words": (),
    "letters": (("doc_to_choice: choices", 'doc_to_choice: ["a", "b", "c", "d"]'),),
    "no context": (("metric: acc,", "metric: acc_mutual_info,"),),
    "many questions": (
        ('"{{text}}\\nquestion: {{question}}\\nanswer:"', '"{{answer}}"'),
        ("doc_to_target: answer", "doc_to_target: question"),
    ),
    "same examples": (
        ("fewshot_split: train", "fewshot_split: train\nfewshot_config: {sampler: first_n}"),
    ),
}


def make_other(model_type, **fields):
    """A family that tests/families.py has not, every weight random."""
    sizes = {
        **TOKENS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**sizes, **fields})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


PACKED = {
    "llama": lambda: make_family("llama", 1, **TOKENS),
    "llama, tied head": lambda: make_family("llama_tied", 1, **TOKENS),
    "qwen2": lambda: make_family("qwen2", 1, **TOKENS, use_sliding_window=False),
    "qwen3": lambda: make_family("qwen3", 1, **TOKENS),
    "mixtral": lambda: make_family("mixtral", 1, **TOKENS),
    "deepseek_v3": lambda: make_family("deepseek_v3", 1, **TOKENS),
    "gpt2, absolute positions": lambda: make_family(
        "gpt2", 1, vocab_size=len(VOCABULARY), n_positions=1024
    ),
    "gpt_neox, untied head": lambda: make_family("gpt_neox", 1, **TOKENS),
    "gemma2, soft caps": lambda: make_family(
        "gemma2", 1, **TOKENS, **WIDE, final_logit_softcapping=2.0
    ),
    "gemma3, window": lambda: make_family("gemma3", 1, **TOKENS, **WIDE),
    "cohere, scaled logits": lambda: make_other("cohere", logit_scale=0.25),
    "granite, divided logits": lambda: make_other("granite", logits_scaling=3.0),
    "opt": lambda: make_other("opt", word_embed_proj_dim=16, ffn_dim=24),
}

NOT_PACKED = {
    # error out on the mask
    "mamba, no attention": lambda: make_other("mamba", state_size=4),
    "bloom, distances from a mask": lambda: make_other("bloom", n_head=4),
    # take it, and give other numbers
    "mpt, distances in the row": lambda: make_other("mpt", d_model=16, n_heads=4, n_layers=2),
}


@pytest.fixture(scope="module")
def model():
    # calmer than the tiny models of other tests, whose logits of 30 have errors of 1e-5 themselves
    return make_model(0, initializer_range=0.2)


def requests_of(harness):
    items = harness._items["search"].values()
    return [r for found in items for item in found.values() for r in item.requests]


def stock_answers(model, requests, batch_size=4, **settings):
    lm = HFLM(
        pretrained=model,
        tokenizer=make_tokenizer(),
        softmax_dtype="float32",
        batch_size=batch_size,
        **settings,
    )
    return lm.loglikelihood(requests, disable_tqdm=True)


def assert_same(found, expected):
    """Log-likelihoods equal up to float32's rounding, greedy answers equal.

    lm-eval adds in float32, whose numbers lie 8e-6 apart from 64 on: so two of its steps there.
    """
    for (ours, our_greedy), (theirs, their_greedy) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=2.5e-7)
        assert our_greedy == their_greedy


def best(answers):
    values = [value for value, _ in answers]
    return [max(range(4), key=values[i : i + 4].__getitem__) for i in range(0, len(values), 4)]


class TestAgainstLmEval:
    @pytest.mark.parametrize("family", PACKED)
    def test_families_that_take_packed_rows(self, family, folder, tokenizer):
        model = PACKED[family]()
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        assert harness._lm.loglikelihood_path == "packed"
        requests = requests_of(harness)
        found, expected = harness._lm.loglikelihood(requests), stock_answers(model, requests)
        assert_same(found, expected)
        assert len(set(best(expected))) > 1  # guards against a model that answers all alike

    @pytest.mark.parametrize("family", NOT_PACKED)
    def test_families_that_do_not(self, family, folder, tokenizer, caplog):
        model = NOT_PACKED[family]()
        with caplog.at_level(logging.WARNING, "evomerge"):
            harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        assert harness._lm.loglikelihood_path == "lm_eval"
        assert "log-likelihoods: lm_eval (" in caplog.text
        requests = requests_of(harness)
        assert harness._lm.loglikelihood(requests) == stock_answers(model, requests)
        asked = make_suite(folder, CHOICE, loglikelihood="packed")
        with pytest.raises(EvaluationError, match="this model does not take"):
            make_harness(asked, model, tokenizer)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("shots", [0, 5])
    @pytest.mark.parametrize("batch_size", [1, 64])
    def test_shapes_of_requests(self, shape, shots, batch_size, tokenizer, model, tmp_path):
        folder = rewrite(tmp_path, "tiny_choice.yaml", *SHAPES[shape])
        task = {**CHOICE, "metric": "acc_norm", "num_fewshot": shots}
        config = make_suite(folder, task, batch_size=batch_size)
        harness = make_harness(config, model, tokenizer)
        requests = requests_of(harness)
        assert_same(harness._lm.loglikelihood(requests), stock_answers(model, requests))

    @pytest.mark.parametrize("max_length", [30, 60, 90])
    def test_long_contexts_lose_their_beginning(self, max_length, folder, tokenizer, model):
        harness = make_harness(make_suite(folder, CHOICE, max_length=max_length), model, tokenizer)
        requests = requests_of(harness)
        expected = stock_answers(model, requests, max_length=max_length)
        assert_same(harness._lm.loglikelihood(requests), expected)

    @pytest.mark.parametrize("add_bos_token", [True, False])
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_dress_of_tokens(self, add_bos_token, padding_side, folder, model):
        tokenizer = make_tokenizer()
        tokenizer.padding_side = padding_side
        config = make_suite(folder, CHOICE, add_bos_token=add_bos_token)
        harness = make_harness(config, model, tokenizer)
        requests = requests_of(harness)
        expected = stock_answers(model, requests, add_bos_token=add_bos_token)
        assert_same(harness._lm.loglikelihood(requests), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits(self, dtype, folder, tokenizer):
        model = make_family("llama", 1, dtype=dtype, **TOKENS)
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        assert harness._lm.loglikelihood_path == "packed"
        requests = requests_of(harness)
        found, expected = harness._lm.loglikelihood(requests), stock_answers(model, requests)
        eps = torch.finfo(dtype).eps
        for request, (ours, _), (theirs, _) in zip(requests, found, expected, strict=True):
            length = len(harness._lm.request_tokens(request)[1])
            # half an eps of each logit and of what it came from, per token
            assert abs(ours - theirs) <= eps * (length + abs(theirs))

    def test_eager_attention(self, folder, tokenizer):
        model = make_family("llama", 1, **TOKENS, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        requests = requests_of(harness)
        assert harness._lm.loglikelihood_path == "packed"
        assert_same(harness._lm.loglikelihood(requests), stock_answers(model, requests))


class TestWindows:
    def test_what_leaves_the_window_is_lm_evals(self, folder, tokenizer):
        model = make_family("mistral", 1, **TOKENS, sliding_window=70)
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        assert harness._lm.loglikelihood_path == "packed"
        requests = requests_of(harness)
        planned = harness._lm._plan(requests)
        lengths = {n: sum(map(len, harness._lm.request_tokens(r))) for n, r in enumerate(requests)}
        assert set(planned.others) == {n for n, length in lengths.items() if length > 71}
        assert 0 < len(planned.others) < len(requests)
        assert_same(harness._lm.loglikelihood(requests), stock_answers(model, requests))

    def test_nothing_is_within_the_window(self, folder, tokenizer, caplog):
        model = make_family("mistral", 1, **TOKENS)
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        assert harness._lm.loglikelihood_path == "lm_eval"
        assert "nothing is within the attention window of 8 tokens" in caplog.text


class TestSharedPrefixes:
    @pytest.fixture
    def harness(self, tokenizer, tmp_path):
        folder = rewrite(tmp_path, "tiny_choice.yaml", *SHAPES["same examples"])
        suite = make_suite(folder, {**CHOICE, "num_fewshot": 3}, chunks=1)
        return make_harness(suite, make_model(0), tokenizer)

    def test_nothing_stale_survives_new_weights(self, harness, tokenizer):
        model, requests = harness._lm.model, requests_of(harness)
        ((prefix, _),) = harness._lm._plan(requests).plan.groups
        assert prefix.shape[1] > 100
        before = harness._lm.loglikelihood(requests)
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(make_model(1).state_dict())
        after = harness._lm.loglikelihood(requests)
        assert_same(after, stock_answers(make_model(1), requests))
        assert after != before
        model.load_state_dict(kept)
        assert harness._lm.loglikelihood(requests) == before

    def test_they_are_read_once(self, harness):
        model, requests = harness._lm.model, requests_of(harness)
        read = []
        hook = model.model.embed_tokens.register_forward_pre_hook(
            lambda _, args: read.append(args[0].numel())
        )
        harness._lm.loglikelihood(requests)
        ((prefix, batches),) = harness._lm._plan(requests).plan.groups
        hook.remove()
        assert read == [prefix.numel(), *(batch.ids_BT.numel() for batch in batches)]
        whole = sum(sum(map(len, harness._lm.request_tokens(r))) - 1 for r in requests)
        assert sum(read) < whole / 10

    def test_left_out_where_a_model_keeps_no_keys(
        self, folder, tokenizer, model, monkeypatch, caplog
    ):
        # as a model would that returns no cache, or one of another make
        def without_cache(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.past_key_values = None
            return output

        forward = model.forward
        monkeypatch.setattr(model, "forward", without_cache)
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        assert harness._lm.loglikelihood_path == "packed, no shared prefixes"
        assert "packed, no shared prefixes (AttributeError" in caplog.text
        requests = requests_of(harness)
        assert_same(harness._lm.loglikelihood(requests), stock_answers(model, requests))


class TestRepeatable:
    def test_same_bits_whatever_was_scored_before(self, folder, tokenizer, model):
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        requests = requests_of(harness)
        first = harness._lm.loglikelihood(requests)
        harness._lm.loglikelihood(requests[:7])
        harness._lm.loglikelihood(requests[20:])
        assert harness._lm.loglikelihood(requests) == first
        other = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        assert other._lm.loglikelihood(requests) == first

    def test_same_bits_in_any_order(self, folder, tokenizer, model):
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        requests = requests_of(harness)
        found = harness._lm.loglikelihood(requests)
        order = list(range(len(requests)))
        random.Random(3).shuffle(order)
        shuffled = harness._lm.loglikelihood([requests[i] for i in order])
        assert shuffled == [found[i] for i in order]

    def test_the_path_is_part_of_the_digest(self, folder, tokenizer, model, monkeypatch):
        suite = make_suite(folder, CHOICE)
        own = make_harness(suite, model, tokenizer).facts().digest
        monkeypatch.setattr("evomerge.evaluate.prepared_lm.why_not_packed", lambda *_: "a reason")
        fallen = make_harness(suite, model, tokenizer)
        assert fallen._lm.loglikelihood_path == "lm_eval"
        assert fallen.facts().digest != own

    def test_the_model_is_as_it_was(self, folder, tokenizer, model):
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        harness._lm.loglikelihood(requests_of(harness))
        assert not model.lm_head._forward_pre_hooks


class TestCost:
    def test_letters_take_one_row_and_one_scored_place(self, tokenizer, model, tmp_path):
        folder = rewrite(tmp_path, "tiny_choice.yaml", *SHAPES["letters"])
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        requests = requests_of(harness)
        scored, read = [], []
        hooks = [
            model.lm_head.register_forward_hook(lambda _, args, out: scored.append(out.shape[:-1])),
            model.model.embed_tokens.register_forward_hook(
                lambda _, args, out: read.append(len(args[0]))
            ),
        ]
        harness._lm.loglikelihood(requests)
        for hook in hooks:
            hook.remove()
        assert sum(read) == len(requests) / 4
        # the space before the letter, then the letter
        assert sum(shape.numel() for shape in scored) == 2 * len(requests) / 4

    def test_choices_are_read_once_after_their_context(self, folder, tokenizer, model):
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        requests = requests_of(harness)
        rows = [
            row
            for group in make_groups(
                {n: harness._lm._scored(r) for n, r in enumerate(requests)}, None
            )
            for row in group.rows
        ]
        pairs = [tuple(map(tuple, harness._lm.request_tokens(r))) for r in requests]
        contexts = {r.doc_id: pair[0] for r, pair in zip(requests, pairs, strict=True)}
        # the last token of a choice is never read
        answers = sum(len(answer) - 1 for _, answer in pairs)
        most = sum(map(len, contexts.values())) + answers
        assert len(rows) == len(contexts)
        # choices of a document may begin alike, which is read once too
        assert most - answers / 4 < sum(len(row.tokens) for row in rows) <= most

    def test_a_batch_that_does_not_fit_fails_with_its_size(
        self, folder, tokenizer, model, monkeypatch
    ):
        harness = make_harness(make_suite(folder, CHOICE, batch_size=7), model, tokenizer)

        def out_of_memory(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(model, "forward", out_of_memory)
        with pytest.raises(EvaluationError, match=r"of tiny_choice: .*suite\.batch_size 7"):
            harness.score(model, harness.chunks("search")[0])

    @pytest.mark.slow
    def test_the_benchmark_says_what_it_should(self, monkeypatch, capsys):
        arguments = ["--json", "--rounds", "1", "--share", "50", "--cases", "choices"]
        monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
        benchmark.main()
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["case"] for row in rows] == ["choices, 0-shot", "choices, 5-shot"]
        for row in rows:
            assert row["same_predictions"] is True
            assert row["documents"] == 4
            overhead = row["overhead_s_per_500"] * row["documents"] / 500
            assert overhead + row["forward_s"] == pytest.approx(row["total_s"], abs=2e-3)
            assert row["speedup_total"] > 1


class TestTheCheck:
    def test_a_probe_branches_and_is_as_long_as_the_longest(self):
        tokens = tuple(range(5, 45))
        probe = probe_requests(tokens)
        (group,) = make_groups(dict(enumerate(probe)), least_saved=1)
        assert max(len(request.tokens) for request in probe) == len(tokens)
        assert all(row.branches == 3 for row in group.rows)
        assert group.prefix == tokens[: len(group.prefix)]
        assert len(group.prefix) > 10

    @pytest.mark.parametrize("length", range(1, 8))
    def test_short_probes(self, length, model):
        probe = probe_requests(tuple(range(5, 5 + length)))
        assert all(0 < len(request.tokens) <= length for request in probe)
        alone = {n: replace(r, document=n) for n, r in enumerate(probe)}
        scored = score_plan(model, make_plan(alone, None, 1, "cpu"))
        expected = [scored[n][0] for n in range(len(probe))]
        assert why_not_packed(model, probe, expected, True, "cpu") is None

    def test_other_numbers_are_a_reason(self, model):
        probe = probe_requests(tuple(range(5, 25)))
        alone = {n: replace(r, document=n) for n, r in enumerate(probe)}
        scored = score_plan(model, make_plan(alone, None, 1, "cpu"))
        expected = [scored[n][0] for n in range(len(probe))]
        assert why_not_packed(model, probe, expected, False, "cpu") is None
        expected[4] += 1e-3
        assert "where each request alone gives" in why_not_packed(
            model, probe, expected, False, "cpu"
        )

    def test_a_model_that_is_not_finite_has_no_path(self, folder, tokenizer, caplog):
        model = make_model(0)
        model.lm_head.weight.data[7] = float("nan")
        harness = make_harness(make_suite(folder, CHOICE), model, tokenizer)
        assert harness._lm.loglikelihood_path == "lm_eval"
        assert "it gives nan where each request alone gives nan" in caplog.text


def token_lists(low, high):
    return st.lists(st.integers(3, 5), min_size=low, max_size=high).map(tuple)


DOCUMENT = st.tuples(token_lists(1, 12), st.lists(token_lists(1, 6), min_size=1, max_size=5))


class TestPlans:
    @settings(max_examples=200, deadline=None)
    @given(
        shared=token_lists(0, 9),
        documents=st.lists(DOCUMENT, min_size=1, max_size=5),
        least_saved=st.sampled_from([None, 1, 20]),
    )
    def test_a_place_sees_its_own_request_and_nothing_else(self, shared, documents, least_saved):
        requests = {
            10 * d + c: ScoredRequest("task", d, (*shared, *context, *answer[:-1]), answer)
            for d, (context, answers) in enumerate(documents)
            for c, answer in enumerate(answers)
        }
        groups = make_groups(requests, least_saved)
        placed = []
        for row in [row for group in groups for row in group.rows]:
            for number, places in row.places:
                request = requests[number]
                placed.append(number)
                assert len(places) == len(request.targets)
                for position, place in enumerate(places, request.first_scored):
                    seen = [
                        i for i in range(place + 1) if row.segments[i] in (0, row.segments[place])
                    ]
                    assert [row.tokens[i] for i in seen] == list(request.tokens[: position + 1])
                    assert [row.positions[i] for i in seen] == list(range(position + 1))
        assert sorted(placed) == sorted(requests)

    @settings(max_examples=100, deadline=None)
    @given(shared=token_lists(0, 9), documents=st.lists(DOCUMENT, min_size=2, max_size=5))
    def test_nothing_is_scored_within_a_prefix(self, shared, documents):
        requests = {
            10 * d + c: ScoredRequest("task", d, (*shared, *context, *answer[:-1]), answer)
            for d, (context, answers) in enumerate(documents)
            for c, answer in enumerate(answers)
        }
        for group in make_groups(requests, least_saved=1):
            for row in group.rows:
                assert row.tokens[: len(group.prefix)] == group.prefix
                assert min(min(places) for _, places in row.places) >= len(group.prefix)

    def test_a_prefix_must_pay(self):
        requests = {d: ScoredRequest("task", d, (*range(9), 9 + d), (1,)) for d in range(3)}
        assert [g.prefix for g in make_groups(requests, 18)] == [tuple(range(9))]
        assert [g.prefix for g in make_groups(requests, 19)] == [()]
        assert [g.prefix for g in make_groups(requests, None)] == [()]

    def test_tasks_share_nothing(self):
        requests = {d: ScoredRequest(f"task {d}", 0, tuple(range(9)), (1,)) for d in range(3)}
        assert [g.prefix for g in make_groups(requests, 1)] == [()]

    @pytest.mark.parametrize("budget", [1, 30, 64, 1000])
    def test_batches_keep_to_the_budget(self, budget):
        rng = random.Random(budget)
        requests = {
            d: ScoredRequest("task", d, tuple(rng.choices(range(9), k=rng.randint(4, 30))), (1,))
            for d in range(40)
        }
        (group,) = make_groups(requests, None)
        batches = list(group.batches(budget))
        assert [row for batch in batches for row in batch] == list(group.rows)
        widths = [max(len(row.tokens) for row in batch) for batch in batches]
        assert widths == sorted(widths, reverse=True)
        for batch, width in zip(batches, widths, strict=True):
            assert len(batch) == 1 or len(batch) * width <= budget
        for batch, after, width in zip(batches, batches[1:], widths, strict=False):
            assert (len(batch) + 1) * width > budget or not after
