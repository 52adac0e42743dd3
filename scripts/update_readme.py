"""Writes the generated block of the README: the table of merge methods.

python scripts/update_readme.py
"""

from pathlib import Path

from evomerge.methods import METHODS
from evomerge.methods.method import Method

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- methods: scripts/update_readme.py -->", "<!-- end of methods -->"


def method_table() -> str:
    """Return the table of merge methods as Markdown."""
    rows = ["| method | what it does | can be searched | models |", "| --- | --- | --- | --- |"]
    return "\n".join([*rows, *map(_row, METHODS.values())])


def with_table(text: str) -> str:
    """Return the README's text with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{method_table()}\n{END}{after}"


def _row(method: Method) -> str:
    knobs = ", ".join(f"`{p.name}`" for p in method.params if p.search) or "nothing"
    exactly = method.max_parents == method.min_parents
    number = f"{method.min_parents}" if exactly else f"{method.min_parents} or more"
    by_base = {"required": f"base and {number}", "optional": f"{number}, with a base or without"}
    models = by_base.get(method.base, number)
    return f"| [`{method.name}`]({method.source}) | {method.summary} | {knobs} | {models} |"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
