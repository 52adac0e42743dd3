"""Imports go down the floors, never up or sideways; the light floors stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "evomerge"
FLOORS = [
    {"config"},
    {"space", "checkpoints", "kernels"},
    {"methods", "propose", "adapters"},
    {"merging", "evaluate"},
    {"workers", "analysis"},
    {"study"},
    {"report"},
    {"cli"},
]
FOUNDATION = {"errors", "registry", "seeds", "checksums"}
LEVEL = {room: i for i, rooms in enumerate(FLOORS, 1) for room in rooms}
LEVEL |= dict.fromkeys(FOUNDATION, 0)
HEAVY = {
    "torch",
    "transformers",
    "ray",
    "lm_eval",
    "triton",
    "vllm",
    "nevergrad",
    "optuna",
    "matplotlib",
}
LIGHT = ["evomerge", "evomerge.config", "evomerge.space", "evomerge.cli.main"]


def imported_rooms(path):
    """Yield (line, room) for each import of ours, at any depth, TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the full evomerge path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for package, _, rest in (name.partition(".") for name in names):
            if package == "evomerge" and rest:
                yield node.lineno, rest.split(".")[0]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in LEVEL, f"{room} has no floor: add it to FLOORS"
    for line, other in imported_rooms(path):
        if other != room:
            down = other in LEVEL and LEVEL[other] < max(LEVEL[room], other in FOUNDATION)
            assert down, f"{path}:{line}: {room} imports {other}, which is not below it"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module):
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.split(), f"importing {module} pulls in {run.stdout}"
