"""Write tests/golden/mergekit: tiny models, and what mergekit 0.1.5 makes of them.

    python scripts/record_golden.py ORACLE/bin/python

ORACLE is an environment with mergekit (see mergekit_worker.py). The recipes there are written by
hand; nothing else writes the two safetensors files.
"""

import sys
import tempfile
from pathlib import Path

from compare_mergekit import MODELS, RECIPES, load, make_models, run_mergekit
from safetensors.torch import save_file

from evomerge.config.mergekit import parse_recipe

GOLDEN = RECIPES.parent


def main() -> None:
    """Let mergekit carry out every recipe and keep models and merges, tensor names after `/`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = make_models(root / "models", hidden_size=8, num_layers=3, vocab_size=16)
        texts = {path.stem: path.read_text() for path in sorted(RECIPES.glob("*.yaml"))}
        recipes = {name: parse_recipe(text, name, models) for name, text in texts.items()}
        run_mergekit(sys.argv[1], recipes, root / "merged")
        keep([models / name for name in MODELS], GOLDEN / "models.safetensors")
        keep([root / "merged" / name for name in recipes], GOLDEN / "merged.safetensors")


def keep(folders: list[Path], path: Path) -> None:
    """Write the tensors of several checkpoints into one file."""
    tensors = {
        f"{folder.name}/{name}": tensor
        for folder in folders
        for name, tensor in load(folder).items()
    }
    line = "python scripts/record_golden.py ORACLE/bin/python, with mergekit 0.1.5"
    save_file(tensors, path, metadata={"made_by": line})


if __name__ == "__main__":
    main()
