"""Write tests/golden/evolve/parameters.json: what mergekit-evolve 0.1.5 makes of its genotypes.

    python scripts/record_evolve_golden.py ORACLE/bin/python

ORACLE is an environment with mergekit (see mergekit_worker.py). For every genome file there, with
its first genotype and one drawn at random: the parameters of every tensor and model, as mergekit
itself plans the merge of models of four layers.
"""

import sys
import tempfile
from pathlib import Path

from compare_mergekit import make_models, run_worker

GENOMES = Path(__file__).parents[1] / "tests" / "golden" / "evolve"


def main() -> None:
    """Ask mergekit."""
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), hidden_size=8, num_layers=4, vocab_size=16)
        run_worker(sys.argv[1], "genomes", GENOMES, models, GENOMES / "parameters.json")


if __name__ == "__main__":
    main()
