"""Makes the zoo: a tiny base model and three parents fine-tuned from it, with lm-eval tasks.

    python scripts/make_zoo.py [--out zoo]

The base has begun to learn every task; each parent was trained mostly on its own. So good merges
exist, and a search has something honest to find: the parents' task vectors differ in size, and one
weight for all is not the best. Models are kept while the settings stay the same; task files are
written each time.
"""

import argparse
import copy
import hashlib
import json
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from zoo_tasks import (
    ALPHABETS,
    PARENTS,
    ROLE_PERCENTILES,
    SIGNS,
    ItemCounts,
    answer,
    draw,
    question,
    write_tasks,
)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz" + "".join(SIGNS.values()) + "=\n "
TOKEN_IDS = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}


@dataclass(frozen=True)
class Training:
    """One training run: which tasks in which shares, for how long, how fast."""

    mix: dict[str, float]
    steps: int
    learning_rate: float
    seed: int


def _mostly(task: str, others: float) -> dict[str, float]:
    return {t: 1.0 - 2 * others if t == task else others for t in PARENTS}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the models; a change makes them anew."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    batch_size: int = 128
    lengths: tuple[int, ...] = (3, 4, 5, 6)
    init_seed: int = 0
    base: Training = Training(
        {"copy": 0.4, "reverse": 0.24, "sort": 0.12, "shift": 0.24}, 155, 2e-3, seed=1
    )
    parents: dict[str, Training] = field(
        default_factory=lambda: {
            "reverse": Training(_mostly("reverse", 0.04), 150, 5e-4, seed=10),
            "sort": Training(_mostly("sort", 0.03), 150, 1e-3, seed=11),
            "shift": Training(_mostly("shift", 0.04), 150, 5e-4, seed=12),
        }
    )

    @property
    def digest(self) -> str:
        """SHA-256 of the settings and of what is asked, as hexadecimal."""
        asked = (ALPHABETS, SIGNS, ROLE_PERCENTILES)
        text = json.dumps([asdict(self), asked], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[1] / "zoo"
    parser.add_argument("--out", type=Path, default=default, help="folder of the zoo")
    out = parser.parse_args().out
    settings = Settings()
    if is_made(out, settings):
        print(f"zoo: the models in {out} are up to date")
    else:
        make_models(out, settings)
    write_tasks(out, ItemCounts())


def is_made(out: Path, settings: Settings) -> bool:
    """Whether the folder holds the models of these settings, whole."""
    try:
        digest = json.loads((out / "zoo.json").read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return False
    models = ("base", *settings.parents)
    return digest == settings.digest and all((out / m / "config.json").is_file() for m in models)


def make_models(out: Path, settings: Settings) -> None:
    """Train the models into a folder beside `out`, and move it there when all are whole."""
    if out.exists() and not (out / "zoo.json").is_file():
        raise SystemExit(
            f"{out} is there and is no zoo (it has no zoo.json). Give --out a new folder; "
            "a zoo replaces the folder it is made in."
        )
    torch.set_num_threads(1)  # models this small gain nothing from a second thread
    logging.disable_progress_bar()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    record = {"digest": settings.digest, "settings": asdict(settings), "models": {}}
    torch.manual_seed(settings.init_seed)
    base = LlamaForCausalLM(make_config(settings))
    for name, training in {"base": settings.base, **settings.parents}.items():
        started = time.perf_counter()
        model = base if name == "base" else copy.deepcopy(base)
        losses = train(model, training, settings)
        save(model, partial / name)
        seconds = time.perf_counter() - started
        print(f"zoo: {name} trained in {seconds:.0f} s, loss {losses[-1]:.3f}", flush=True)
        record["models"][name] = {"seconds": round(seconds, 1), "losses": losses}
    (partial / "zoo.json").write_text(json.dumps(record, indent=1))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def make_config(settings: Settings) -> LlamaConfig:
    """Return the shape of every model of the zoo: 0.6 M parameters."""
    return LlamaConfig(
        vocab_size=len(TOKEN_IDS),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=TOKEN_IDS["<pad>"],
        bos_token_id=TOKEN_IDS["<bos>"],
        eos_token_id=TOKEN_IDS["<eos>"],
        tie_word_embeddings=True,
    )


def train(model: LlamaForCausalLM, training: Training, settings: Settings) -> list[float]:
    """Train a model in place on its answers alone; returns the loss of every step."""
    rng = random.Random(training.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.steps, pct_start=0.2
    )
    model.train()
    losses = []
    for _ in range(training.steps):
        tokens, targets = make_batch(rng, training.mix, settings)
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(round(loss.item(), 4))
    model.eval()
    return losses


def make_batch(
    rng: random.Random, mix: dict[str, float], settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and targets (-100 where nothing is asked), both (batch, width) int64."""
    width = 2 * max(settings.lengths) + 4
    tokens = torch.zeros(settings.batch_size, width, dtype=torch.long)
    targets = torch.full_like(tokens, -100)
    tasks = rng.choices(list(mix), weights=list(mix.values()), k=settings.batch_size)
    for row, task in enumerate(tasks):
        string = draw(rng, task, "train", settings.lengths)
        asked = [TOKEN_IDS["<bos>"], *(TOKEN_IDS[c] for c in question(task, string))]
        said = [*(TOKEN_IDS[c] for c in answer(task, string)), TOKEN_IDS["<eos>"]]
        tokens[row, : len(asked) + len(said)] = torch.tensor(asked + said)
        targets[row, len(asked) : len(asked) + len(said)] = torch.tensor(said)
    return tokens, targets


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Save a model as an ordinary checkpoint in several shards, with its tokenizer."""
    model.save_pretrained(folder, max_shard_size="1MB")
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token for each character, `<bos>` before a text."""
    backend = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", TOKEN_IDS["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
    )


if __name__ == "__main__":
    main()
