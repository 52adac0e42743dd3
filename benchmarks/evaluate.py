"""What scoring a candidate costs: stock lm-eval, lm-eval prepared once, and ours.

    python -m benchmarks.evaluate [--layers 2] [--hidden 64] [--vocab 2000] [--rounds 3] [--json]

One random model and the same 500 items for all three: 200 questions with four choices of several
words, 200 with four letters, 100 answers to be written (at most 32 tokens); 1,700 requests, without
and with five examples before each. `stock` is `simple_evaluate` with all its defaults, which
includes reading the names of all of lm-eval's tasks; beside it stands what is gained over a
`simple_evaluate` that is given them. `prepared` is our harness with lm-eval's own path for
log-likelihoods. Times are CPU seconds of this process, one thread, medians over the rounds;
`forward` is what passes within the model's `forward`, everything else is overhead.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import count, one_thread, parser, print_table
from evomerge.config.strict import Origin, validate
from evomerge.config.suite import SuiteConfig

NUM_CHOICE, NUM_WRITE, NUM_EXAMPLES = 200, 100, 32
BATCH_SIZE = 16
NOUNS = ("boat", "clock", "field", "glove", "house", "island", "kettle", "ladder", "meadow")
KINDS = ("brown", "cheap", "early", "gentle", "hollow", "itchy", "jolly", "keen", "modern")
DEEDS = ("admires", "builds", "carries", "draws", "enters", "finds", "guards", "hides", "keeps")

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{train: "{folder}/{data}_train.jsonl", test: "{folder}/{data}_test.jsonl"}}
training_split: train
test_split: test
fewshot_split: train
metadata: {{version: 1.0}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TASKS = {
    "choices": f"""{CHOICE}
doc_to_text: "{{{{story}}}}\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
""",
    "letters": f"""{CHOICE}
doc_to_text: "{{{{story}}}}\\nQuestion: {{{{question}}}}\\nA. {{{{choices[0]}}}}\\n\
B. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
""",
    "writing": """
output_type: generate_until
doc_to_text: "Question: {{story}} {{question}}\\nAnswer:"
doc_to_target: "{{'low' if answer < 2 else 'high'}}"
generation_kwargs: {until: ["\\n\\n", "Question:"], do_sample: false, max_gen_toks: 32}
filter_list:
  - name: half
    filter:
      - {function: regex, regex_pattern: "([a-z])"}
      - {function: map, mapping_dict: {HALVES}, default_value: low}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""".replace("HALVES", ", ".join(f"{c}: high" for c in "nopqrstuvwxyz")),
}
SAME_EXAMPLES = "fewshot_config: {sampler: first_n}\n"
"""Of the tasks whose names end in _fixed: every question has the same examples before it."""

CASES: Mapping[str, tuple[str, ...]] = {
    "all": ("choices", "letters", "writing"),
    "choices": ("choices",),
    "letters": ("letters",),
    "generation": ("writing",),
    "all, same examples": ("choices_fixed", "letters_fixed", "writing_fixed"),
    "choices, same examples": ("choices_fixed",),
    "letters, same examples": ("letters_fixed",),
}
METRICS = {"choices": "acc", "letters": "acc", "writing": "exact_match"}


@dataclass(frozen=True)
class World:
    """What all three score, and with what.

    Attributes:
        folder: Task files.
        model: The model.
        tokenizer: Its tokenizer.
        timer: Times the model's forward.
    """

    folder: str
    model: Any
    tokenizer: Any
    timer: "ForwardTimer"


@dataclass
class ForwardTimer:
    """CPU seconds within the model's `forward`, summed up."""

    seconds: float = 0.0
    _started: float = field(default=0.0, repr=False)

    def watch(self, model: torch.nn.Module) -> None:
        """Time a model from now on."""
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started = time.process_time()

    def _stop(self, *_: object) -> None:
        self.seconds += time.process_time() - self._started


@dataclass(frozen=True)
class Run:
    """One evaluation: its CPU seconds, those in the forward, and each item's metrics."""

    total_s: float
    forward_s: float
    values: Mapping[tuple[str, str, int], float]
    catalog_s: float = 0.0


def main() -> None:
    """Measure every case and print the rows."""
    arguments = _parser().parse_args()
    one_thread()
    _offline()
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), arguments)
        rows = []
        for name in arguments.cases or CASES:
            for shots in (5,) if "same" in name else (0, 5):
                row = measured(world, name, shots, arguments.rounds)
                rows.append(row)
                if arguments.json:
                    print(json.dumps(row), flush=True)
    if not arguments.json:
        print_table([{key.replace("_", " "): _text(row[key]) for key in row} for row in rows])


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__ or "")
    made.set_defaults(rounds=3)
    made.add_argument("--layers", type=count, default=2, help="of the model, default 2")
    made.add_argument("--hidden", type=count, default=64, help="its width, default 64")
    made.add_argument("--vocab", type=count, default=2000, help="its vocabulary, default 2000")
    made.add_argument("--share", type=count, default=1, help="score one item in so many")
    made.add_argument("--cases", nargs="*", choices=list(CASES), help="all unless given")
    return made


def _offline() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def make_world(folder: Path, arguments: argparse.Namespace) -> World:
    """Write the tasks, and make the model and its tokenizer from seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tasks(folder, arguments.share)
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    timer = ForwardTimer()
    timer.watch(model)
    return World(str(folder), model, make_tokenizer(folder), timer)


def make_tokenizer(folder: Path) -> Any:
    """Return a byte-level BPE trained on the items; it puts `<s>` before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train([str(path) for path in sorted(folder.glob("*.jsonl"))], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def write_tasks(folder: Path, share: int) -> None:
    """Write the task files, once as they are and once with fixed examples, and their items."""
    for name, text in TASKS.items():
        data = "writing" if name == "writing" else "choices"
        common = COMMON.format(folder=folder, data=data)
        (folder / f"{name}.yaml").write_text(f"task: {name}{common}{text}")
        fixed = f"task: {name}_fixed{common}{text}{SAME_EXAMPLES}"
        (folder / f"{name}_fixed.yaml").write_text(fixed)
    rng = random.Random(0)
    for data, number in (("choices", NUM_CHOICE), ("writing", NUM_WRITE)):
        for split, size in (("train", NUM_EXAMPLES), ("test", max(1, number // share))):
            lines = [json.dumps(_document(rng)) + "\n" for _ in range(size)]
            (folder / f"{data}_{split}.jsonl").write_text("".join(lines))


def _document(rng: random.Random) -> dict[str, object]:
    sentences = [
        f"The {rng.choice(KINDS)} {rng.choice(NOUNS)} {rng.choice(DEEDS)} the "
        f"{rng.choice(KINDS)} {rng.choice(NOUNS)} behind a {rng.choice(NOUNS)}."
        for _ in range(6)
    ]
    pairs = rng.sample([(kind, noun) for kind in KINDS for noun in NOUNS], 4)
    return {
        "story": " ".join(sentences),
        "question": f"Which thing belongs to the {rng.choice(NOUNS)}?",
        "choices": [f"the {kind} {noun}" for kind, noun in pairs],
        "answer": rng.randrange(4),
    }


def measured(world: World, case: str, shots: int, rounds: int) -> dict[str, object]:
    """Run all three in turn, so many rounds, and return the row."""
    tasks = CASES[case]
    harnesses = {path: make_harness(world, tasks, shots, path) for path in ("lm_eval", "auto")}
    for harness in harnesses.values():  # batches are planned the first time
        run_harness(world, harness)
    runs: dict[str, list[Run]] = {"stock": [], "prepared": [], "ours": []}
    for _ in range(rounds):
        runs["stock"].append(run_stock(world, tasks, shots))
        runs["prepared"].append(run_harness(world, harnesses["lm_eval"]))
        runs["ours"].append(run_harness(world, harnesses["auto"]))
    total = {name: statistics.median(run.total_s for run in made) for name, made in runs.items()}
    forward = {
        name: statistics.median(run.forward_s for run in made) for name, made in runs.items()
    }
    shared = statistics.median(run.total_s - run.catalog_s for run in runs["stock"])
    documents = len({(task, i) for task, _, i in runs["ours"][0].values})
    per_500 = 500 / documents
    return {
        "case": f"{case}, {shots}-shot",
        "documents": documents,
        "overhead_s_per_500": round(per_500 * (total["ours"] - forward["ours"]), 3),
        "forward_s": round(forward["ours"], 3),
        "total_s": round(total["ours"], 3),
        "speedup_total": round(total["stock"] / total["ours"], 2),
        "speedup_forward": round(forward["stock"] / forward["ours"], 2),
        "same_predictions": all(
            run.values == made[0].values for made in runs.values() for run in runs["stock"]
        ),
        "speedup_total_shared_catalog": round(shared / total["ours"], 2),
        "stock_total_s": round(total["stock"], 3),
        "stock_forward_s": round(forward["stock"], 3),
        "prepared_total_s": round(total["prepared"], 3),
        "prepared_overhead_s_per_500": round(
            per_500 * (total["prepared"] - forward["prepared"]), 3
        ),
        "path": harnesses["auto"]._lm.loglikelihood_path,
    }


def make_harness(world: World, tasks: Sequence[str], shots: int, path: str) -> Any:
    """Return our harness with all items of the tasks prepared."""
    from evomerge.evaluate.harness import Harness
    from evomerge.evaluate.tasks import load_tasks

    entries = [
        {"task": task, "metric": METRICS[task.partition("_")[0]], "num_fewshot": shots}
        for task in tasks
    ]
    suite = {
        "tasks": entries,
        "include_path": world.folder,
        "items": {"search": {"count": None}, "confirm": 0},
        "chunks": 1,
        "batch_size": BATCH_SIZE,
        "loglikelihood": path,
    }
    config = validate(SuiteConfig, suite, Origin("<benchmark>"))
    return Harness(load_tasks(config), config, world.model, world.tokenizer)


def run_harness(world: World, harness: Any) -> Run:
    """Score all items."""
    world.timer.seconds, started = 0.0, time.process_time()
    (chunk,) = harness.chunks("search")
    result = harness.score(world.model, chunk)
    total = time.process_time() - started
    values = {
        (task, key.partition(",")[0], i): value
        for task, items in result.items()
        for key, column in items.values.items()
        for i, value in zip(items.ids, column, strict=True)
    }
    return Run(total, world.timer.seconds, values)


def run_stock(world: World, tasks: Sequence[str], shots: int) -> Run:
    """Call `simple_evaluate` as its documentation does, on the model in memory."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    world.timer.seconds, started = 0.0, time.process_time()
    with _silent():
        catalog = TaskManager(include_path=world.folder)
        catalog_s = time.process_time() - started
        lm = HFLM(
            pretrained=world.model,
            tokenizer=world.tokenizer,
            softmax_dtype="float32",
            batch_size=BATCH_SIZE,
        )
        found = simple_evaluate(
            model=lm, tasks=list(tasks), num_fewshot=shots, task_manager=catalog,
            fewshot_as_multiturn=False,
        )  # fmt: skip
    total = time.process_time() - started
    values = {
        (task, metric, sample["doc_id"]): sample[metric]
        for task, samples in found["samples"].items()
        for sample in samples
        for metric in sample["metrics"]
    }
    return Run(total, world.timer.seconds, values, catalog_s)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
