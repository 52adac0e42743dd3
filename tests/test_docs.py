"""The README says what is there: methods, commands, files, extras."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "scripts"))


def test_the_method_table_is_current():
    from update_readme import with_table

    assert with_table(README) == README, "run python scripts/update_readme.py"


def test_every_command_is_shown():
    from evomerge.cli.main import cli

    for name in cli.commands:
        assert f"evomerge {name}" in README, f"the README does not show evomerge {name}"


def test_every_place_in_the_file_tree_exists():
    tree = README.split("## Where things are")[1].split("```")[1]
    rooms = re.findall(r"^  ([a-z]+)/ ", tree, flags=re.MULTILINE)
    real = [p.name for p in (ROOT / "evomerge").iterdir() if (p / "__init__.py").exists()]
    assert sorted(rooms) == sorted(real)
    for folder in re.findall(r"^([a-z]+)/ ", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_every_file_that_is_named_exists():
    texts = {name: (ROOT / name).read_text() for name in ("README.md", "configs/README.md")}
    for name, text in texts.items():
        for path in re.findall(
            r"`((?:configs|scripts|tests|benchmarks|evomerge)/[\w/]+\.\w+)`", text
        ):
            assert (ROOT / path).exists(), f"{name} names {path}"


def test_every_section_of_a_config_is_explained():
    from evomerge.config.search import SearchConfig

    text = (ROOT / "configs" / "README.md").read_text()
    for name, field in SearchConfig.model_fields.items():
        assert f"- `{name}`:" in text, f"configs/README.md does not explain {name}"
        for setting in getattr(field.annotation, "model_fields", {}):
            assert f"`{setting}" in text or f"{setting}:" in text, f"{name}.{setting}"


def test_nothing_speaks_of_one_machine():
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if inside[0] in (".git", ".venv", "zoo", "runs") or not path.is_file():
            continue
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".sh"):
            text = path.read_text()
            assert not re.search(r"/(work|root|home)/", text), path
