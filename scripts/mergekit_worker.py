"""Let mergekit answer questions; the only file here that imports mergekit.

    ORACLE/bin/python scripts/mergekit_worker.py models RECIPES OUT [--seeds N]
    ORACLE/bin/python scripts/mergekit_worker.py tensors RECIPES INPUTS OUT [--dtype D] [--seeds N]
    ORACLE/bin/python scripts/mergekit_worker.py genomes GENOMES MODELS OUT

ORACLE is an environment of its own: `python3 -m venv ORACLE`, `ORACLE/bin/pip install
torch==2.13.0`, then `ORACLE/bin/pip install mergekit==0.1.5`.

- `models` carries out every YAML file of RECIPES on checkpoints. OUT gets a folder for every file,
  or with --seeds one for every file and random seed (NAME.0, NAME.1, ...).
- `tensors` carries them out on bare tensors. INPUTS and OUT are safetensors with names
  MODEL/TENSOR and RECIPE/TENSOR; with --seeds OUT gets RECIPE/TENSOR/SEED.
- `genomes` says what each file of mergekit-evolve makes of its first genotype and of one drawn at
  random, for every tensor; its models are folders in MODELS. OUT is JSON.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import yaml


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    models = commands.add_parser("models")
    models.add_argument("recipes", type=Path)
    models.add_argument("out", type=Path)
    models.add_argument("--seeds", type=int, default=0)
    tensors = commands.add_parser("tensors")
    tensors.add_argument("recipes", type=Path)
    tensors.add_argument("inputs", type=Path)
    tensors.add_argument("out", type=Path)
    tensors.add_argument("--dtype", default="float32")
    tensors.add_argument("--seeds", type=int, default=0)
    genomes = commands.add_parser("genomes")
    genomes.add_argument("genomes", type=Path)
    genomes.add_argument("models", type=Path)
    genomes.add_argument("out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    {"models": merge_models, "tensors": merge_tensors, "genomes": resolve_genomes}[
        arguments.command
    ](arguments)


def merge_models(arguments: argparse.Namespace) -> None:
    """Merge every recipe with every seed into a folder of its own; say what is refused."""
    for path in sorted(arguments.recipes.glob("*.yaml")):
        if arguments.seeds:
            for seed in range(arguments.seeds):
                merge_model(path, arguments.out / f"{path.stem}.{seed}", seed)
        else:
            merge_model(path, arguments.out / path.stem, 0)


def merge_model(path: Path, out: Path, seed: int) -> None:
    """Merge one recipe into a folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    options = MergeOptions(
        random_seed=seed, quiet=True, write_model_card=False, copy_tokenizer=False
    )
    run_merge(config, str(out), options)


def merge_tensors(arguments: argparse.Namespace) -> None:
    """Merge the tensors of every name with every recipe (and seed)."""
    import torch
    from safetensors.torch import load_file, save_file

    inputs = load_file(arguments.inputs)
    names = sorted({key.split("/")[1] for key in inputs})
    merged = {}
    for path in sorted(arguments.recipes.glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        for name in names:
            for seed in range(max(1, arguments.seeds)):
                torch.manual_seed(seed)
                key = f"{path.stem}/{name}" + (f"/{seed}" if arguments.seeds else "")
                merged[key] = merge_one(recipe, inputs, name, arguments.dtype)
    save_file(merged, arguments.out)


def merge_one(recipe: dict[str, Any], inputs: dict[str, Any], name: str, dtype: str) -> Any:
    """Merge the tensors of one name."""
    import torch
    from mergekit.merge_methods.api import merge_tensors as run

    own = {source["model"]: source.get("parameters", {}) for source in recipe["models"]}
    base = recipe.get("base_model")
    models = [*([base] if base and base not in own else []), *own]
    words = {word for parameters in own.values() for word in parameters}
    per_model = {
        word: {model: own[model][word] for model in own if word in own[model]} for word in words
    }
    return run(
        [inputs[f"{model}/{name}"].to(getattr(torch, dtype)) for model in models],
        recipe["merge_method"],
        parameters={**recipe.get("parameters", {}), **per_model},
        ids=models,
        base_index=models.index(base) if base else None,
        name=name,
        dtype=getattr(torch, dtype),
    ).contiguous()


def resolve_genomes(arguments: argparse.Namespace) -> None:
    """Write what every genome file makes of two genotypes."""
    paths = sorted(arguments.genomes.glob("*.yml"))
    found = {path.stem: resolve_genome(path, arguments.models) for path in paths}
    text = json.dumps(found, separators=(",", ":"))
    arguments.out.write_text(text.replace("},", "},\n") + "\n")


def resolve_genome(path: Path, folder: Path) -> dict[str, Any]:
    """Return the parameters of every tensor for the first genotype and for one at random."""
    import torch
    from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

    data = yaml.safe_load(path.read_text())["genome"]
    data["models"] = [str(folder / name) for name in data["models"]]
    if data.get("base_model"):
        data["base_model"] = str(folder / data["base_model"])
    genome = ModelGenome(ModelGenomeDefinition.model_validate(data))
    first = genome.initial_genotype()
    drawn = torch.rand(first.shape, generator=torch.Generator().manual_seed(0))
    return {
        name: {
            "shape": list(genotype.shape),
            "genotype": genotype.flatten().tolist(),
            "tensors": parameters_of(genome.genotype_merge_config(genotype)),
        }
        for name, genotype in (("first", first), ("drawn", drawn))
    }


def parameters_of(config: Any) -> dict[str, Any]:
    """Return the parameters of every tensor as mergekit plans them: base, shared, per model."""
    from mergekit.merge import get_architecture_info
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    options = MergeOptions(quiet=True)
    shape = config.referenced_models()[0].config()
    planner = MergePlanner(config, get_architecture_info(config, options), options, shape)
    found = {}
    for task in planner.plan_to_disk("nothing is written before a plan is carried out"):
        merge = getattr(task, "tensor_task", None)
        if merge is None:
            continue
        found[merge.output_weight.name] = {
            "base": merge.base_model and Path(merge.base_model.model.path).name,
            "shared": dict(merge.parameters),
            "models": {
                Path(model.model.path).name: dict(merge.input_parameters[model])
                for model in merge.model_order
            },
        }
    return found


if __name__ == "__main__":
    main()
