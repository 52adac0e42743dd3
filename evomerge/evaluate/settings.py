"""Settings: few-shot number and generation arguments, put on tasks as `simple_evaluate` does."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask
from transformers import GenerationConfig

from evomerge.config.suite import TaskConfig
from evomerge.registry import did_you_mean

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names for the longest answer in tokens, in its order of precedence."""

_OURS = {"pad_token_id", "use_cache", "max_length"}  # given to `generate` by lm-eval itself


def apply_settings(task: ConfigurableTask, config: TaskConfig) -> Iterator[str]:
    """Put the settings of a suite on a task, once after it was loaded.

    Args:
        task: Changed in place.
        config: What the suite says of it.

    Yields:
        A sentence with the field it is about for each setting that would not be honoured.
    """
    yield from _apply_fewshot(task, config)
    if task.OUTPUT_TYPE != "generate_until":
        if config.generation:
            yield (
                f"generation: task {config.task!r} compares log-likelihoods and generates nothing. "
                "Leave generation out."
            )
        return
    yield from _check_arguments(config.generation)
    task.set_config("generation_kwargs", dict(config.generation), update=True)
    yield from _check_greedy(config, task.config.generation_kwargs)


def _apply_fewshot(task: ConfigurableTask, config: TaskConfig) -> Iterator[str]:
    own, asked = task.config.num_fewshot, config.num_fewshot
    if own == 0 and asked:
        yield (
            f"num_fewshot: task {config.task!r} is fixed to 0 examples by its own file, which "
            "lm-eval never overrides. Leave num_fewshot out."
        )
        return
    number = asked if asked is not None else own or 0
    task.set_config("num_fewshot", number)
    pool = len(task.sampler.fewshot_docs()) if hasattr(task, "sampler") else 0
    if number and task.fewshot_cfg.split == task.config.test_split:
        pool -= 1  # a question is not shown as its own example
    if number > pool:
        yield (
            f"num_fewshot: task {config.task!r} has {pool} examples to show, {number} are asked "
            "for. Lower it."
        )


def _check_arguments(arguments: Mapping[str, Any]) -> Iterator[str]:
    known = {"until", *LENGTHS, *GenerationConfig().to_dict()} - _OURS
    for name, value in arguments.items():
        if name not in known:
            yield f"generation.{name}: no generation argument is called so.{_nearest(name, known)}"
        elif not _fits(name, value):
            yield f"generation.{name}: came {value!r}, {_KINDS[name]} is needed."


def _nearest(name: str, known: Iterable[str]) -> str:
    near = did_you_mean(name, known)
    return near if "Did you" in near else " Known are until, max_gen_toks and transformers' own."


_KINDS = {
    "until": "a text or a list of texts",
    **dict.fromkeys(LENGTHS, "a whole number of at least 1"),
    "do_sample": "true or false",
    "temperature": "a number of at least 0",
}


def _fits(name: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "until":
        texts = value if isinstance(value, list) else [value]
        return all(isinstance(text, str) for text in texts)
    if name in LENGTHS:
        return isinstance(value, int) and number and value >= 1
    if name == "do_sample":
        return isinstance(value, bool)
    return name != "temperature" or (number and value >= 0)


def _check_greedy(config: TaskConfig, arguments: Mapping[str, Any]) -> Iterator[str]:
    # drawn answers would give the same weights another score each time
    warm = config.generation if arguments.get("do_sample") is False else arguments
    if arguments.get("do_sample") or warm.get("temperature"):
        yield (
            f"generation: task {config.task!r} draws its answers at random; only greedy decoding "
            "is offered. Set do_sample: false and temperature: 0."
        )
    if (arguments.get("num_beams") or 1) > 1:
        yield (
            f"generation: task {config.task!r} uses beam search; only greedy decoding is offered. "
            "Set num_beams: 1."
        )
