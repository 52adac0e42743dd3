"""Floor 1: what a user writes. pydantic and yaml only, no torch.

`search.py` is the whole run; the other files are its sections, the recipe, and the strict YAML
reader. To add a setting, add a field with a docstring to its section: the error messages and the
reference in the documentation follow. Every value is checked here as far as one file can be checked
alone; what needs the models or the tasks is checked by `evomerge check`.
"""
