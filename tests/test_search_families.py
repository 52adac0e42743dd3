"""Every family of merge methods is searched from a config, on the zoo, and exported bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest

import evomerge
from evomerge.config.mergekit import read_recipe
from evomerge.config.search import load_search
from evomerge.study.export import export_trial

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

ALL_PARENTS = ("reverse", "sort", "shift")
WEIGHT = {"weight": {"search": [0.0, 1.0]}}
# family: method, fixed parameters, space, parents
FAMILIES = {
    "sum": ("linear", {}, {"weight": {"search": [0.1, 1.0]}}, ALL_PARENTS),
    "curve": (
        "task_arithmetic",
        {},
        {"weight": {"search": [0.0, 1.0], "scope": {"curve": 2}, "outside": "tied"}},
        ALL_PARENTS,
    ),
    "arc": ("slerp", {}, {"t": {}}, ("reverse", "sort")),
    "arc-of-deltas": ("nuslerp", {}, WEIGHT, ("reverse", "sort")),
    "sphere": ("multislerp", {}, {"weight": {"search": [0.1, 1.0]}}, ALL_PARENTS),
    "magnitude": ("ties", {}, {**WEIGHT, "density": {"models": ["sort"]}}, ALL_PARENTS),
    "band": (
        "breadcrumbs",
        {"density": 0.9},
        {**WEIGHT, "gamma": {"search": [0.0, 0.05]}},
        ALL_PARENTS,
    ),
    "random": ("dare_ties", {"density": 0.8}, WEIGHT, ALL_PARENTS),
    "ranked": ("della_linear", {"density": 0.7, "epsilon": 0.1}, WEIGHT, ALL_PARENTS),
    "variance": ("sce", {}, {"select_topk": {"search": [0.2, 1.0]}}, ALL_PARENTS),
    "counts": ("ramplus_tl", {}, {"r": {"search": [0.0, 1.0]}}, ALL_PARENTS),
    "near": ("nearswap", {}, {"t": {"search": [0.0001, 0.1]}}, ("reverse", "sort")),
    "agreed": ("consensus", {}, {"lambda": {}}, ALL_PARENTS),
    "competition": ("pcb", {}, {"density": {}, "lambda": {}}, ALL_PARENTS),
    "frequency": ("fourier", {}, WEIGHT, ALL_PARENTS),
    "singular": ("tsv", {}, {"lambda": {}}, ALL_PARENTS),
    "isotropic": ("iso_c", {}, {"lambda": {}}, ALL_PARENTS),
}


@pytest.fixture(scope="module", autouse=True)
def _zoo():
    subprocess.run([sys.executable, str(ROOT / "scripts/make_zoo.py")], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_search(family, tmp_path):
    method, fixed, space, parents = FAMILIES[family]
    config = load_search(ROOT / "configs" / "quickstart.yaml")
    merge = config.merge.model_copy(update={"method": method, "parameters": fixed})
    data = config.model_dump(mode="json", exclude_unset=True)
    data["merge"] = merge.model_dump(mode="json", exclude_unset=True)
    data["space"] = space
    data["models"]["parents"] = {name: data["models"]["parents"][name] for name in parents}
    data["study"] |= {
        "folder": str(tmp_path / "study"),
        "budget": {"evaluations": 8},
        "baselines": ["uniform"],
    }
    data["suite"]["items"] = {"search": {"split": "search", "count": 40}, "confirm": 0}
    data["confirm"] = {"mean": False}
    data["workers"] = {"pool": "inline"}
    data["proposer"] = {"population": 4}

    study = evomerge.search(data)

    done = [r for r in study.ledger.candidates if r.state == "done"]
    assert {r.recipe.merge_method for r in done} == {method}
    assert len(done) == 8
    assert len({r.result.digest for r in done}) > 4, "the knobs change the weights"
    best = study.best
    exported = export_trial(study, best, tmp_path / "winner.yaml", tmp_path / "winner")
    assert exported.digest == best.result.digest
    assert read_recipe(tmp_path / "winner.yaml") == best.recipe
