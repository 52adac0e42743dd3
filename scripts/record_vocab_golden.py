"""Write tests/golden/mergekit_vocab: models with different vocabularies, merged by mergekit 0.1.5.

    python scripts/record_vocab_golden.py ORACLE/bin/python

ORACLE is an environment with mergekit (see mergekit_worker.py). The recipes there are written by
hand; nothing else writes the other files.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "mergekit_vocab"
SPECIAL = ("<unk>", "<s>", "</s>")

# letters, merges, added tokens, rows of the embedding beyond the tokens, or fewer than them
VOCABULARIES = {
    "start": ("abcdefgh", ["a b", "ab c"], [], 3),
    "math": ("hgfedcbaij", ["a b", "d e", "de f"], ["<think>"], 0),
    "code": ("acegbdfhxy", ["a b", "x y", "xy a"], ["<think>", "<tool>"], 0),
    "short": ("abcdefghij", ["c d"], ["<think>", "<unused>"], -1),
    "half": ("abcdefgh", ["g h"], ["<think>"], 0),
}


def main() -> None:
    """Make the models, let mergekit carry out every recipe, and keep both."""
    shutil.rmtree(GOLDEN / "models", ignore_errors=True)
    for seed, name in enumerate(VOCABULARIES):
        make_model(GOLDEN / "models" / name, seed, *VOCABULARIES[name])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipes").mkdir()
        for path in sorted((GOLDEN / "recipes").glob("*.yaml")):
            text = yaml.safe_dump(with_folders(yaml.safe_load(path.read_text())))
            (root / "recipes" / path.name).write_text(text)
        worker = Path(__file__).with_name("mergekit_worker.py")
        command = [sys.argv[1], worker, "models", root / "recipes", root / "merged"]
        subprocess.run(list(map(str, command)), check=True)
        keep(root / "merged")


def make_model(
    folder: Path, seed: int, letters: str, merges: list[str], added: list[str], spare: int
) -> None:
    """Write a Llama of one layer with a BPE tokenizer."""
    pieces = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in merges)]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(numbers, [tuple(m.split(" ")) for m in merges], unk_token="<unk>")
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL, *added)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare,
        hidden_size=8,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if folder.name == "half" else torch.float32
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    tokenizer.save_pretrained(folder)


def with_folders(value: object) -> object:
    """Return a recipe with the folders of the models in place of their names."""
    if isinstance(value, dict):
        return {key: with_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_folders(inner) for inner in value]
    return str(GOLDEN / "models" / value) if value in VOCABULARIES else value


def keep(merged: Path) -> None:
    """Write embedding and head of every merge, and the token of every row."""
    rows, tensors = {}, {}
    for folder in sorted(merged.iterdir()):
        numbers = AutoTokenizer.from_pretrained(folder).get_vocab()
        rows[folder.name] = sorted(numbers, key=numbers.__getitem__)
        for name, tensor in load_file(folder / "model.safetensors").items():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[f"{folder.name}/{name}"] = tensor
    (GOLDEN / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    line = "python scripts/record_vocab_golden.py ORACLE/bin/python, with mergekit 0.1.5"
    save_file(tensors, GOLDEN / "merged.safetensors", metadata={"made_by": line})


if __name__ == "__main__":
    main()
