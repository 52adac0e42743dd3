"""PreparedLM: lm-eval's Hugging Face model around the live model; texts are tokenised once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from transformers import StoppingCriteria, StoppingCriteriaList
from typing_extensions import override

from evomerge.config.suite import SuiteConfig
from evomerge.errors import EvaluationError
from evomerge.evaluate.packed import (
    PackedPlan,
    make_plan,
    probe_requests,
    score_plan,
    why_not_packed,
)
from evomerge.evaluate.packed_plan import LEAST_SAVED, ScoredRequest

log = logging.getLogger(__name__)

LoglikelihoodPath = Literal["packed", "packed, no shared prefixes", "lm_eval"]
"""How log-likelihoods of choices are computed."""


@dataclass(frozen=True)
class Generated:
    """How an answer in words came about.

    Attributes:
        length: Its tokens, stop text included, end-of-text not.
        truncated: Whether it was still going on when its tokens were used up.
    """

    length: int
    truncated: bool


class NonFinitePrompt(Exception):
    """The logits of a prompt hold NaN or Inf; the harness knows whose prompt it is."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt


@dataclass(frozen=True)
class Planned:
    """How some requests are scored: packed where it can be, the others by lm-eval.

    Attributes:
        plan: Batches of packed rows.
        others: By number, requests that no packed row can hold, as lm-eval wants them.
    """

    plan: PackedPlan
    others: dict[int, tuple[tuple[str, str], list[int], list[int]]]


class PreparedLM(HFLM):
    """Scores by lm-eval's own code, so that numbers equal those of `simple_evaluate`.

    Log-likelihoods of choices are computed in packed rows instead (`evaluate/packed.py`) once
    `choose_path` has found that the model takes them.

    Tokens are kept by text, batches of prompts by their texts. Rows of a generation stop each at
    its own stop text (lm-eval goes on until all rows have met the same one, and then cuts); the
    answers are the same, runaway batches end earlier.

    Args:
        model: The live causal language model; its weights may change in place between calls.
        tokenizer: Its tokenizer; gets a padding token if it has none.
        config: Batch size, lengths and dress of the prompts.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, config: SuiteConfig) -> None:
        chat = config.chat
        named = isinstance(chat.apply_chat_template, str)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            softmax_dtype="float32",  # in bfloat16 choices tie and the first one wins
            batch_size=config.batch_size,
            max_length=config.max_length,
            add_bos_token=config.add_bos_token,
            enable_thinking=chat.enable_thinking,
            think_end_token=chat.think_end_token,
            chat_template_args={"chat_template": chat.apply_chat_template} if named else None,
        )
        self._tokens: dict[tuple[Any, ...], list[int]] = {}
        self._batches: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._prompts: tuple[str, ...] = ()
        self._by_prompt: dict[str, Generated] = {}  # of requests with the same arguments
        self._generated: dict[tuple[Any, ...], Generated] = {}
        self._config = config
        self._plans: dict[tuple[Any, ...], Planned] = {}
        self.loglikelihood_path: LoglikelihoodPath = "lm_eval"

    def request_tokens(self, request: Instance) -> tuple[list[int], list[int]]:
        """Return the tokens of a request: context and continuation, empty where it has none.

        As in lm-eval, a token that begins texts is the context of a continuation without one.
        """
        if request.request_type != "loglikelihood":
            return self.tok_encode(request.args[0]), []
        context, continuation = request.args
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        first = [self.prefix_token_id]
        return (first, tokens[1:]) if tokens[:1] == first else (first, tokens)

    def choose_path(self, requests: Sequence[Instance]) -> None:
        """Decide how log-likelihoods are computed from now on, by trying it on this model.

        Args:
            requests: Those that will be scored, or some of them; of any kind.

        Raises:
            EvaluationError: The suite asks for packed rows and the model does not take them.
        """
        wanted = self._config.loglikelihood
        asked = [self._scored(r).tokens for r in requests if r.request_type == "loglikelihood"]
        if not asked or wanted == "lm_eval":
            return
        self.loglikelihood_path, why_not = self._try_paths(asked)
        if why_not is None:
            log.info("log-likelihoods: %s", self.loglikelihood_path)
        elif wanted == "packed" and self.loglikelihood_path == "lm_eval":
            raise EvaluationError(
                f"suite.loglikelihood: this model does not take packed rows ({why_not}). Set it to "
                "auto or lm_eval."
            )
        else:
            log.warning("log-likelihoods: %s (%s)", self.loglikelihood_path, why_not)

    def _try_paths(self, asked: Sequence[tuple[int, ...]]) -> tuple[LoglikelihoodPath, str | None]:
        """Return the fastest path that gives lm-eval's numbers, and why it is not a faster one."""
        short = [tokens for tokens in asked if self._fits(tokens)]
        if not short:
            return "lm_eval", f"nothing is within the attention window of {self._window} tokens"
        probe = probe_requests(max(short, key=len))
        alone = super()._loglikelihood_tokens(
            [(None, list(r.tokens[: r.first_scored + 1]), list(r.targets)) for r in probe],
            disable_tqdm=True,
        )
        expected = [loglikelihood for loglikelihood, _ in alone]
        why_not = why_not_packed(self.model, probe, expected, True, self.device)
        if why_not is None:
            return "packed", None
        if why_not_packed(self.model, probe, expected, False, self.device) is None:
            return "packed, no shared prefixes", why_not
        return "lm_eval", why_not

    @override
    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        if self.loglikelihood_path == "lm_eval":
            return super().loglikelihood(requests, disable_tqdm=True)
        key = tuple((r.task_name, r.doc_id, r.args) for r in requests)
        if key not in self._plans:
            self._plans[key] = self._plan(requests)
        planned = self._plans[key]
        answers = score_plan(self.model, planned.plan)
        if planned.others:
            others = super()._loglikelihood_tokens(list(planned.others.values()), disable_tqdm=True)
            answers.update(zip(planned.others, others, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _plan(self, requests: Sequence[Instance]) -> Planned:
        scored = {n: self._scored(request) for n, request in enumerate(requests)}
        packed = {n: request for n, request in scored.items() if self._fits(request.tokens)}
        others = {
            n: (request.args, *self.request_tokens(request))
            for n, request in enumerate(requests)
            if n not in packed
        }
        least_saved = LEAST_SAVED if self.loglikelihood_path == "packed" else None
        plan = make_plan(packed, least_saved, self._config.batch_size, self.device)
        return Planned(plan, others)

    def _scored(self, request: Instance) -> ScoredRequest:
        """Return what the model reads for a request: too long ones lose their beginning."""
        context, continuation = self.request_tokens(request)
        tokens = (*context, *continuation)[-(self.max_length + 1) : -1]
        return ScoredRequest(request.task_name, request.doc_id, tokens, tuple(continuation))

    def _fits(self, tokens: Sequence[int]) -> bool:
        """Return whether a packed row may hold these: all of them are in the attention's window."""
        return self._window is None or len(tokens) <= self._window

    @property
    def _window(self) -> int | None:
        """Tokens that the narrowest layer looks back on; None where all look back on all.

        A mask for each pair of tokens takes the place of the one that a layer with a window makes.
        """
        config = self.model.config.get_text_config()
        fields = ("sliding_window", "attention_chunk_size")
        widths = [width for field in fields if (width := getattr(config, field, None))]
        return min(widths, default=None)

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        # lm-eval's own groups: requests with different arguments are never in one batch
        groups = Collator.group(list(enumerate(requests)), _arguments, "gen_kwargs").values()
        self._generated = {}
        texts = [""] * len(requests)
        for group in groups:
            self._by_prompt = {}
            answers = super().generate_until([r for _, r in group], disable_tqdm=True)
            for (number, request), text in zip(group, answers, strict=True):
                texts[number] = text
                self._generated[_key(request)] = self._by_prompt[request.args[0]]
        return texts

    def generated(self, request: Instance) -> Generated:
        """Return how the answer to one of the last requests in words came about."""
        return self._generated[_key(request)]

    @override
    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        key = (string, add_special_tokens, left_truncate_len)
        if key not in self._tokens:
            self._tokens[key] = super().tok_encode(string, add_special_tokens, left_truncate_len)
        return self._tokens[key]

    @override
    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._prompts = tuple(strings)
        key = (self._prompts, padding_side, left_truncate_len, truncation)
        if key not in self._batches:
            self._batches[key] = super().tok_batch_encode(
                list(strings), padding_side, left_truncate_len, truncation
            )
        return self._batches[key]

    @override
    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # rolling requests ask for a bar for every batch
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    @override
    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        generation_kwargs.pop("temperature", None)  # 0, as decoding is greedy
        stop_rows = self._stop_rows(stop, context.shape[1])
        hook = self.model.register_forward_hook(self._check_logits)
        try:
            tokens = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([stop_rows]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **generation_kwargs,
            )
        finally:
            hook.remove()
        rows = tokens[:, context.shape[1] :].tolist()
        for number, (prompt, row) in enumerate(zip(self._prompts, rows, strict=True)):
            self._by_prompt[prompt] = self._how(row, stop_rows.stopped_at.get(number))
        return tokens

    def _how(self, tokens: list[int], stopped_at: int | None) -> Generated:
        """Return how an answer came about from its row, which padding may follow."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        tokens = tokens[:stopped_at]
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        truncated = stopped_at is None and end is None
        return Generated(len(tokens) if end is None else end, truncated)

    def _stop_rows(self, stop: list[str], prompt_length: int) -> "StopRows":
        end = self.think_end_token
        return StopRows(
            self.tokenizer,
            texts=tuple(text for text in stop if text),
            prompt_length=prompt_length,
            window=2 + max(len(self.tok_encode(text, add_special_tokens=False)) for text in stop),
            think_end=self.tok_decode([end]) if isinstance(end, int) else end,
        )

    def _check_logits(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        # the host looks for stop texts after every token, so it waits for the device anyway
        rows = output.logits[:, -1].isfinite().all(-1).tolist()
        if not all(rows):
            raise NonFinitePrompt(self._prompts[rows.index(False)])


def _arguments(numbered: tuple[int, Instance]) -> dict[str, Any]:
    arguments: dict[str, Any] = numbered[1].args[1]
    return arguments


def _key(request: Instance) -> tuple[Any, ...]:
    return request.task_name, request.doc_id, request.idx


class StopRows(StoppingCriteria):
    """Ends each row of a generation at its own stop text; one within the thinking does not count.

    Args:
        tokenizer: Decodes the answers.
        texts: The stop texts.
        prompt_length: Tokens of the padded prompts.
        window: How many of the last tokens are searched. lm-eval takes two more than a stop text
            has, as a model may spell it in other tokens.
        think_end: Text that ends the thinking; None where there is none.

    Attributes:
        stopped_at: For each row that has met a stop text, how many tokens it had then.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: tuple[str, ...],
        prompt_length: int,
        window: int,
        think_end: str | None = None,
    ) -> None:
        self._tokenizer, self._texts, self._think_end = tokenizer, texts, think_end
        self._prompt_length, self._window = prompt_length, window
        self.stopped_at: dict[int, int] = {}

    @override
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        answers = input_ids[:, self._prompt_length :]
        if self._think_end is None:
            recent = self._tokenizer.batch_decode(answers[:, -self._window :])
        else:
            rows = self._tokenizer.batch_decode(answers)
            recent = [row.partition(self._think_end)[2] for row in rows]
        done = [any(text in row for text in self._texts) for row in recent]
        for number, stopped in enumerate(done):
            if stopped:
                self.stopped_at.setdefault(number, answers.shape[1])
        return torch.tensor(done, device=input_ids.device)
