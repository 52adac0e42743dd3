"""Space: the ordered knobs of a search, and what each of them governs."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evomerge.config.layout import Layout
from evomerge.config.params import Param
from evomerge.config.space import SpaceConfig, entries_of
from evomerge.errors import ConfigError
from evomerge.registry import did_you_mean
from evomerge.space.check import cover_problems, entry_problems, fixed_problem
from evomerge.space.cover import Fixed, Models, covers
from evomerge.space.genome import Genome
from evomerge.space.knobs import Knob, KnobValue
from evomerge.space.placement import Placement, place


@dataclass(frozen=True)
class Space:
    """The knobs of a search in their fixed order, and where they go.

    Attributes:
        knobs: Their names are unique.
        placements: For one parameter and parent in the order in which they match.
        num_layers: Layers of the models.
    """

    knobs: tuple[Knob, ...]
    placements: tuple[Placement, ...]
    num_layers: int

    @property
    def size(self) -> int:
        """Number of knobs."""
        return len(self.knobs)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the knobs, in order."""
        return tuple(knob.name for knob in self.knobs)

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """Lowest and highest value of each knob; of choices, the first and last position."""
        return tuple((knob.low, knob.high) for knob in self.knobs)

    @property
    def initial(self) -> tuple[float, ...]:
        """The start values as positions in [0, 1]."""
        return tuple(knob.unit(knob.initial) for knob in self.knobs)

    def steps(self, default: float) -> tuple[float, ...]:
        """Return each knob's first step as a share of its range."""
        return tuple(knob.step(default) for knob in self.knobs)

    def values(self, genome: Genome) -> dict[str, KnobValue]:
        """Return the value of each knob by its name."""
        pairs = zip(self.knobs, genome.units, strict=True)
        return {knob.name: knob.value(unit) for knob, unit in pairs}

    def genome(self, values: Mapping[str, KnobValue]) -> Genome:
        """Return the genome of given values: `values(genome(v)) == v` for what `values` gives."""
        return Genome(tuple(knob.unit(values[knob.name]) for knob in self.knobs))

    def describe(self) -> list[dict[str, Any]]:
        """Return the knobs as plain data, part of a study's identity; names say where each goes."""
        return [knob.describe() for knob in self.knobs]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the description, as hexadecimal."""
        text = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def build_space(
    config: SpaceConfig,
    fixed: Mapping[str, Fixed],
    params: Sequence[Param],
    parents: Sequence[str],
    layout: Layout,
    tensors: Sequence[str],
) -> Space:
    """Lay out the knobs of a search.

    Args:
        config: The `space:` section.
        fixed: Parameters of the merge that are not searched, by name.
        params: What the merge method takes.
        parents: Names of the parents, in recipe order.
        layout: Layers of the models, and the tensors outside them.
        tensors: Names of all tensors.

    Raises:
        ConfigError: One line for each problem; a line begins with the dotted field it is about.
    """
    models = Models(tuple(parents), layout, tuple(tensors))
    known = {param.name: param for param in params}
    problems = list(_problems(config, fixed, known, models))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    space = _lay_out(config, known, models)
    twice = sorted({name for name in space.names if space.names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"space: two knobs are called {twice[0]}. Change a filter, or rename a parent."
        )
    return space


def _lay_out(config: SpaceConfig, known: Mapping[str, Param], models: Models) -> Space:
    knobs: list[Knob] = []
    placements = []
    for name, written in config.items():
        entries = entries_of(written)
        for cover in covers(known[name], entries, models):
            if cover.tensors:
                entry = entries[cover.index]
                made, placement = place(known[name], entry, cover, models, len(knobs))
                knobs += made
                placements.append(placement)
    return Space(tuple(knobs), tuple(placements), models.layout.num_layers)


def _problems(
    config: SpaceConfig, fixed: Mapping[str, Fixed], known: Mapping[str, Param], models: Models
) -> Iterator[str]:
    if not known:
        yield "space: the merge method has no parameters to search. Use evomerge merge."
    elif not config:
        yield "space: is empty. Name at least one parameter of the merge method."
    for name, written in config.items():
        if name not in known:
            yield f"space.{name}: the method has no such parameter.{did_you_mean(name, known)}"
            continue
        param, entries = known[name], entries_of(written)
        places = [
            f"space.{name}[{index}]" if isinstance(written, tuple) else f"space.{name}"
            for index in range(len(entries))
        ]
        for at, entry in zip(places, entries, strict=True):
            for field, sentence in entry_problems(param, entry, models):
                yield f"{at}.{field}: {sentence}"
        for index, (field, sentence) in cover_problems(param, entries, models):
            yield f"{places[index]}.{field}: {sentence}"
        clash = fixed_problem(param, entries, fixed.get(name), models)
        if clash is not None:
            yield f"space.{name}: {clash}"
