"""Strict YAML: every problem at once.

Each comes with file, line, dotted field, what came, what is allowed, and the nearest name.
"""

import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from evomerge.errors import ConfigError
from evomerge.registry import did_you_mean

Loc = tuple[str | int, ...]


class StrictModel(BaseModel):
    """A frozen record of settings; nothing is converted silently.

    Unknown keys, wrong kinds, NaN and Inf are errors.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Model = TypeVar("Model", bound=StrictModel)


def one_or_many(value: Any) -> Any:
    """Let a list be written as its only member; for use as a field's `BeforeValidator`."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


@dataclass(frozen=True)
class Origin:
    """Where settings came from, so that a message can point at the line.

    Attributes:
        name: File name as the user wrote it, or a phrase such as `<config>`.
        lines: Line number (from 1) of each field.
        overrides: Fields that were set on the command line.
    """

    name: str
    lines: dict[Loc, int] = field(default_factory=dict)
    overrides: frozenset[Loc] = frozenset()

    def at(self, *loc: str | int) -> str:
        """Return `file:line: dotted.field` for a field.

        The line is that of the nearest enclosing field that has one.
        """
        if any(tuple(loc[: len(o)]) == o for o in self.overrides):
            return f"--set {dotted(loc)}"
        nearest = next(
            (self.lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in self.lines), None
        )
        place = f"{self.name}:{nearest}" if nearest else self.name
        return f"{place}: {dotted(loc)}" if loc else place


def dotted(loc: Sequence[str | int]) -> str:
    """Return `suite.tasks[1].metric` for `("suite", "tasks", 1, "metric")`."""
    text = ""
    for part in loc:
        part = "''" if part == "" else part
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-5` is a number, a key that comes twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:float"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> tuple[Any, Origin]:
    """Read a YAML file into plain data and the line of every field.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or repeats a key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{path}: cannot be read ({reason}). Give the path of a YAML file."
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str = "<config>") -> tuple[Any, Origin]:
    """Parse YAML text; `name` stands for the file in messages.

    Raises:
        ConfigError: The text is not YAML, repeats a key, or holds a value that is none of its kind.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Loc, int] = {}
        data = _build(loader, node, (), lines, name) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(
            f"{place}: is not YAML ({error.problem}). Check indentation and quotes."
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{name}:{line}: is not YAML (character {chr(error.character)!r} is not allowed). "
            "Delete it."
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{name}: is nested too deeply, or an alias stands inside what it names. Flatten it."
        ) from None
    return data, Origin(name, lines)


def _build(loader: _Loader, node: yaml.Node, loc: Loc, lines: dict[Loc, int], name: str) -> Any:
    lines[loc] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(_construct(loader, key_node, loc, name))
            if key in result:
                place = f"{name}:{key_node.start_mark.line + 1}: {dotted((*loc, key))}"
                raise ConfigError(f"{place} is given twice. Keep one.")
            result[key] = _build(loader, value_node, (*loc, key), lines, name)
            lines[(*loc, key)] = key_node.start_mark.line + 1
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, child, (*loc, i), lines, name) for i, child in enumerate(node.value)]
    return _construct(loader, node, loc, name)


def _construct(loader: _Loader, node: yaml.Node, loc: Loc, name: str) -> Any:
    try:
        value = loader.construct_object(node, deep=True)
        repr(value)  # refuses a whole number of thousands of digits, however it was written
    except (ValueError, LookupError, AttributeError):  # what PyYAML lets through
        place = Origin(name, {loc: node.start_mark.line + 1}).at(*loc)
        kind = node.tag.rpartition(":")[2]
        raise ConfigError(
            f"{place}: came {_show(node.value)}, which is not a usable {kind}. "
            "Mend it, or put it in quotes if a text is meant."
        ) from None
    return value


def override(data: Any, origin: Origin, settings: Sequence[str]) -> tuple[Any, Origin]:
    """Apply `dotted.path=value` settings (values are YAML) to a copy of the data.

    Raises:
        ConfigError: A setting without `=`, or a path through something that is neither a mapping
            nor a list.
    """
    data = json.loads(json.dumps(data, default=str))
    changed: set[Loc] = set()
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {setting}: no value came. Write dotted.path=value.")
        loc = tuple(int(p) if p.isdecimal() else p for p in re.findall(r"[^.\[\]]+", path))
        value, _ = parse_yaml(text, f"--set {path}")
        _assign(data, loc, value, setting)
        changed.add(loc)
    return data, Origin(origin.name, origin.lines, frozenset(changed) | origin.overrides)


def _assign(data: Any, loc: Loc, value: Any, setting: str) -> None:
    place = data
    try:
        for part in loc[:-1]:
            place = place.setdefault(str(part), {}) if isinstance(place, dict) else place[part]
        if isinstance(place, dict):
            place[str(loc[-1])] = value
        else:
            place[loc[-1]] = value
    except (TypeError, IndexError, AttributeError):
        raise ConfigError(f"--set {setting}: there is no such place in the config.") from None


def validate(model: type[Model], data: Any, origin: Origin) -> Model:
    """Make a settings record from plain data.

    Raises:
        ConfigError: One line for every problem found.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{origin.at()}: came {_show(data)}, a mapping of settings is needed.")
    try:
        return model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        problems = [
            f"{origin.at(*_place(e))}: {_explain(model, e)}"
            for e in error.errors()
            # a list whose members failed is not short
            if e["type"] != "too_short" or not e["input"]
        ]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def _place(error: ErrorDetails) -> Loc:
    loc = error["loc"]
    # an unknown key is the user's own word, whatever it looks like
    return (*_plain(loc[:-1]), loc[-1]) if error["type"] == "extra_forbidden" else _plain(loc)


def _plain(loc: Loc) -> Loc:
    # pydantic puts the name of a union's branch or of a wrapping validator into the location; users
    # do not know them
    return tuple(
        p
        for p in loc
        if isinstance(p, int) or (re.fullmatch(r"[\w.\- /@*]+", p) and p not in _BRANCHES)
    )


_BRANCHES = {"float", "int", "bool", "str", "constrained-str", "number"}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_KINDS = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
}


def _explain(model: type[StrictModel], error: ErrorDetails) -> str:
    kind, came, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        *place, key = _place(error)
        names = _field_names(model, tuple(place))
        return f"is not a setting here.{did_you_mean(str(key), names)}"
    if kind == "missing":
        return "is missing. Add it."
    if kind == "literal_error":
        allowed = str(context["expected"])
        hint = did_you_mean(str(came), re.findall(r"'([^']*)'", allowed))
        return f"came {_show(came)}, allowed: {allowed}.{hint}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"came {_show(came)}, allowed is {words} {context[bound]:g}."
    if kind in _KINDS:
        return f"came {_show(came)}, {_KINDS[kind]} is needed."
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    return f"came {_show(came)}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _field_names(model: type[StrictModel], loc: Loc) -> list[str]:
    """Names of the settings allowed at a place, over all record types that may stand there."""
    candidates: list[Any] = [model]
    for part in loc:
        candidates = [inner for c in candidates for inner in _inside(c, part)]
    names = [_names_of(c) for c in candidates if isinstance(c, type) and issubclass(c, StrictModel)]
    return list(dict.fromkeys(name for group in names for name in group))


def _names_of(model: type[StrictModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _inside(kind: Any, part: str | int) -> Iterator[Any]:
    if isinstance(kind, type) and issubclass(kind, StrictModel):
        info = next((i for n, i in kind.model_fields.items() if part in (n, i.alias)), None)
        if info is not None:
            yield from _flatten(info.annotation)
        return
    for argument in typing.get_args(kind):
        yield from _flatten(argument)


def _flatten(kind: Any) -> Iterator[Any]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for argument in typing.get_args(kind):
            yield from _flatten(argument)
    elif typing.get_origin(kind) is typing.Annotated:
        yield from _flatten(typing.get_args(kind)[0])
    else:
        yield kind
