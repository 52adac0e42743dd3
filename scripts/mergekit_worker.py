"""Run mergekit on every YAML file of a folder; the only file here that imports mergekit.

    ORACLE/bin/python scripts/mergekit_worker.py RECIPES OUT [--seeds N]

ORACLE is an environment of its own: `python3 -m venv ORACLE`, `ORACLE/bin/pip install
torch==2.13.0`, then `ORACLE/bin/pip install mergekit==0.1.5`. OUT gets a folder for every file, or
with --seeds one for every file and random seed (NAME.0, NAME.1, ...).
"""

import argparse
import warnings
from pathlib import Path

import yaml


def main() -> None:
    """Merge every recipe with every seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for path in sorted(arguments.recipes.glob("*.yaml")):
        if arguments.seeds:
            for seed in range(arguments.seeds):
                merge(path, arguments.out / f"{path.stem}.{seed}", seed)
        else:
            merge(path, arguments.out / path.stem, 0)


def merge(path: Path, out: Path, seed: int) -> None:
    """Merge one recipe into a folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    options = MergeOptions(
        random_seed=seed, quiet=True, write_model_card=False, copy_tokenizer=False
    )
    run_merge(config, str(out), options)


if __name__ == "__main__":
    main()
