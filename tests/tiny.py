"""Tiny models, a character tokenizer and small local tasks, all from seeds."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = LETTERS + "0123456789" + " \n.,:;?!+-*/=()[]<>|'\"#_&%"
VOCABULARY = [*SPECIAL, *CHARACTERS]
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_config(**changes):
    """The shape of every tiny model: 2 layers, hidden size 32, the tokenizer's vocabulary."""
    shape = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.4,  # wide, so that answers depend on the prompt
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**shape, **changes})


def make_model(seed, folder=None, dtype=torch.float32, **changes):
    """A random 2-layer Llama; the global generator is left as it was.

    Args:
        seed: Decides every weight.
        folder: Where to save it with its tokenizer; None does not save.
        dtype: Of all weights.
        changes: Fields of the model's config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(make_config(**changes)).to(dtype).eval()
    if folder is not None:
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return model


def make_tokenizer():
    """One token per character; puts `<s>` before a text; has a chat template."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{train: "{folder}/choice_train.jsonl", test: "{folder}/choice_test.jsonl"}}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}\\nquestion: {{{{question}}}}\\nanswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files: {{train: "{folder}/answer_train.jsonl", test: "{folder}/answer_test.jsonl"}}
training_split: train
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "question: {{{{question}}}}\\nanswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "."], do_sample: false, max_gen_toks: 8}}
filter_list:
  - name: first
    filter:
      - {{function: regex, regex_pattern: "([a-z])"}}
      - {{function: map, mapping_dict: {{{halves}}}, default_value: none}}
      - {{function: take_first}}
  - name: last
    filter:
      - {{function: regex, regex_pattern: "([a-z])", group_select: -1}}
      - {{function: map, mapping_dict: {{{halves}}}, default_value: none}}
      - {{function: take_first}}
  - name: whole
    filter:
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: chrf, aggregation: chrf, higher_is_better: true}}
metadata: {{version: 2.0}}
"""

TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/text_test.jsonl"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 3.0}}
"""


def write_tasks(folder, num_test=24, num_train=8):
    """Write three tasks: `tiny_choice`, `tiny_answer` (three filters), `tiny_text` (rolling).

    Documents of `tiny_choice` have a field `subject` with the values `cold` (a quarter) and `warm`.

    Args:
        folder: An existing folder; give it as `include_path`.
        num_test: Documents of each task.
        num_train: Documents to show as examples.

    Returns:
        The folder as a text.
    """
    folder = Path(folder)
    halves = ", ".join(f"{c}: {'low' if c < 'n' else 'high'}" for c in LETTERS)
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("text", TEXT)):
        (folder / f"tiny_{name}.yaml").write_text(text.format(folder=folder, halves=halves))
    rng = random.Random(0)
    for split, number in (("train", num_train), ("test", num_test)):
        write_documents(folder / f"choice_{split}.jsonl", [_choice(rng, i) for i in range(number)])
        write_documents(folder / f"answer_{split}.jsonl", [_answer(rng) for _ in range(number)])
    write_documents(
        folder / "text_test.jsonl", [{"text": _words(rng, 12)} for _ in range(num_test)]
    )
    return str(folder)


def write_documents(path, documents):
    """Write documents as lines of JSON."""
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def _words(rng, number):
    return " ".join(
        "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 6))) for _ in range(number)
    )


def _choice(rng, i):
    return {
        "id": i,
        "subject": "cold" if i % 4 == 0 else "warm",
        "text": _words(rng, rng.randint(3, 9)),
        "question": _words(rng, 3),
        "choices": [_words(rng, rng.randint(1, 3)) for _ in range(4)],
        "answer": rng.randrange(4),
    }


def _answer(rng):
    return {"question": _words(rng, rng.randint(2, 8)), "answer": rng.choice(["low", "high"])}
