"""Liveness: knobs of a search that change nothing, and knobs that change one and the same thing.

Each knob is moved while the others stay, and what the recipes come to in exact arithmetic
(`methods/effects.py`) is compared. Nothing is merged for it.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import MergeError
from evomerge.merging.canonical import CanonicalForms, Detail
from evomerge.methods.method import INT8_MASK
from evomerge.space.decode import RecipeTemplate, decode
from evomerge.space.genome import Genome
from evomerge.space.placement import Placement
from evomerge.space.space import Space

NUM_POINTS = 5
"""Points, besides the start, at which a knob must change nothing to count as one without effect."""

STEP = 3e-3
"""Share of its range by which a knob is moved to see which way it changes the merge. Far above the
grid of values, so that rounding does not turn the direction."""

PARALLEL = 1.0 - 1e-6
"""Cosine from which on two ways are one; steps of 3e-3 turn the same way by some 1e-4."""

Units = tuple[float, ...]


@dataclass(frozen=True)
class Finding:
    """What is wrong with some knobs of a search.

    Attributes:
        knobs: Their names: those without effect, or two or more that do the same.
        sentence: What it is, why if that is known, and what to do.
    """

    knobs: tuple[str, ...]
    sentence: str


def find_dead_knobs(
    space: Space, template: RecipeTemplate, forms: CanonicalForms
) -> tuple[Finding, ...]:
    """Return the knobs of a search that have no effect, and those that do the same.

    Args:
        space: The knobs.
        template: What of a recipe does not vary.
        forms: Of the search's models.
    """
    probe = _Probe(space, template, forms)
    inert = [place for place in range(space.size) if probe.is_inert(place)]
    reasons: dict[str, list[str]] = {}
    for place in inert:
        reasons.setdefault(probe.why_inert(place), []).append(space.names[place])
    return (
        *_equal_models(template, forms),
        *(_without_effect(names, why) for why, names in reasons.items()),
        *_same_effects(probe, inert),
    )


class _Probe:
    """Looks at what recipes at points of a space come to.

    Args:
        space, template, forms: As for `find_dead_knobs`.
    """

    def __init__(self, space: Space, template: RecipeTemplate, forms: CanonicalForms) -> None:
        self.space, self.template, self._forms = space, template, forms
        self.parents = [name for name, _ in template.parents]
        drawn = np.random.default_rng(0).uniform(0.1, 0.9, (NUM_POINTS, space.size))
        units = [space.initial, *(tuple(map(float, point)) for point in drawn)]
        found = {point: self.details(point) for point in units}
        self._points = {point: details for point, details in found.items() if details is not None}

    def details(self, point: Units) -> tuple[Detail, ...] | None:
        """Return what the recipe at a point comes to; None where it is no merge."""
        try:
            return self._forms.details(decode(self.space, Genome(point), self.template))
        except MergeError:
            return None

    def is_inert(self, place: int) -> bool:
        """Whether a knob changes nothing, wherever the others are."""
        return bool(self._points) and all(
            _is_same(before, self.details(moved))
            for point, before in self._points.items()
            for moved in self._moves(point, place)
        )

    def _moves(self, point: Units, place: int) -> Iterator[Units]:
        """Yield a point with one knob at both ends and in the middle, or at each choice."""
        knob = self.space.knobs[place]
        last = len(knob.choices) - 1 if knob.choices else 2
        for step in range(last + 1):
            yield _at(point, place, step / last if last else 0.0)

    def why_inert(self, place: int) -> str:
        """Return why a knob has no effect, to be put after these words; empty if not known."""
        placement = self.placement(place)
        name, parent = placement.parameter, placement.parent
        if name == INT8_MASK.name:
            return f": {INT8_MASK.meaning}"
        taken = self._taken(place)
        if not taken:
            return ": no tensor that is merged takes it"
        if parent is None:
            return _why_shared(name, taken)
        return _why_own(name, self.parents.index(parent), parent, self.template, taken)

    def placement(self, place: int) -> Placement:
        """Return where a knob goes."""
        return next(
            each
            for each in self.space.placements
            if place in (*each.knobs, *(knob for _, knob in each.outside))
        )

    def _taken(self, place: int) -> list[Detail]:
        """Return what happens to the tensors whose values a knob changes, at all points."""
        return [
            detail
            for point, before in self._points.items()
            for kind, detail in enumerate(before)
            if any(
                after is not None and after[kind].values != detail.values
                for after in map(self.details, self._moves(point, place))
            )
        ]

    def ways(self, places: Sequence[int]) -> list[np.ndarray]:
        """Return, for some points, which way each knob changes the merge there.

        Args:
            places: Knobs whose values are continuous.

        Returns:
            For each point a unit vector for each knob; zeros where it changes more than numbers.
        """
        inside = [point for point in self._points if point != self.space.initial]
        return [np.array([self._way(point, place) for place in places]) for point in inside[:2]]

    def _way(self, point: Units, place: int) -> np.ndarray:
        here = self._points[point]
        ends = [self.details(_at(point, place, point[place] + step)) for step in (-STEP, STEP)]
        if any(end is None or _kinds(end) != _kinds(here) for end in ends):
            return np.zeros_like(_numbers(here))
        before, after = (_numbers(end) for end in ends if end is not None)
        way: np.ndarray = after - before
        return way / (np.linalg.norm(way) or 1.0)


def _at(point: Units, place: int, unit: float) -> Units:
    return (*point[:place], unit, *point[place + 1 :])


def _kinds(details: Sequence[Detail]) -> list[Hashable]:
    return [detail.effect.kind for detail in details]


def _numbers(details: Sequence[Detail]) -> np.ndarray:
    return np.array([number for detail in details for number in detail.effect.numbers])


def _is_same(before: Sequence[Detail], after: Sequence[Detail] | None) -> bool:
    if after is None or _kinds(before) != _kinds(after):
        return False
    return bool(np.allclose(_numbers(before), _numbers(after), rtol=1e-9, atol=0.0))


def _why_shared(name: str, taken: Sequence[Detail]) -> str:
    if name == "nuslerp_row_wise":
        return ": nuslerp_flatten leaves no rows"
    if not any(any(detail.values.per_model.get("weight", (1.0,))) for detail in taken):
        return ": all weights are 0"
    if name in ("rescale", "rescale_by_density", "trim_whole_model") and all(
        density in (0.0, 1.0) for detail in taken for density in detail.values.per_model["density"]
    ):
        return ": at density 1 nothing is dropped"
    return ""


def _why_own(
    name: str, place: int, parent: str, template: RecipeTemplate, taken: Sequence[Detail]
) -> str:
    if all(detail.inputs.parents[place] == detail.inputs.base for detail in taken):
        return f": {parent} has the same tensors as the base there"
    weights = [detail.values.per_model.get("weight", (1.0,)) for detail in taken]
    shared = [detail.values.shared for detail in taken]
    normalized = all(each.get("normalize") or each.get("normalize_weights") for each in shared)
    if name == "weight" and normalized and all(sum(map(bool, each)) <= 1 for each in weights):
        return f": {template.merge_method} with one parent normalises it away"
    if not any(each[place] for each in weights if len(each) > place):
        return f": the weight of {parent} is 0"
    densities = [detail.values.per_model.get("density") for detail in taken]
    if name in ("gamma", "epsilon") and all(each and each[place] in (0, 1) for each in densities):
        return f": nothing is dropped where the density of {parent} is 1"
    return ""


def _without_effect(names: Sequence[str], why: str) -> Finding:
    verb, them = ("has", "it") if len(names) == 1 else ("have", "them")
    sentence = f"{_listed(names)} {verb} no effect{why}. Remove {them} from space."
    return Finding(tuple(names), sentence)


def _equal_models(template: RecipeTemplate, forms: CanonicalForms) -> Iterator[Finding]:
    named = {str(ref): name for name, ref in template.parents}
    named.setdefault(str(template.base), "the base")
    for model, same in forms.equal_models:
        if model in named and same in named:
            yield Finding(
                (), f"{named[model]} and {named[same]} are one model, to the last bit. Remove one."
            )


def _same_effects(probe: _Probe, inert: Sequence[int]) -> list[Finding]:
    """Return the knobs of which two or more change the merge in one way, wherever the others are.

    What is so in many places alike, layer by layer, is one finding.
    """
    knobs = probe.space.knobs
    places = [i for i, knob in enumerate(knobs) if knob.kind == "float" and i not in inert]
    alike: dict[tuple[Hashable, ...], list[list[int]]] = {}
    for cluster in _clusters(probe.ways(places)):
        members = [places[member] for member in cluster]
        at = [probe.placement(member) for member in members]
        where = tuple((each.parameter, each.parent, each.filter) for each in at)
        alike.setdefault(where, []).append(members)
    return [_same_effect(probe, clusters) for clusters in alike.values()]


def _clusters(ways: Sequence[np.ndarray]) -> list[list[int]]:
    """Return the rows, two or more, that are parallel in every one of some matrices."""
    if not ways or not len(ways[0]):
        return []
    parallel = np.logical_and.reduce([np.abs(way @ way.T) >= PARALLEL for way in ways])
    first = parallel.argmax(axis=1)
    rows = [np.flatnonzero((first == row) & parallel.diagonal()) for row in range(len(first))]
    return [row.tolist() for row in rows if len(row) > 1]


def _same_effect(probe: _Probe, clusters: Sequence[Sequence[int]]) -> Finding:
    names = [probe.space.names[place] for place in clusters[0]]
    parameters = {probe.placement(place).parameter for place in clusters[0]}
    why = ""
    if parameters == {"weight"}:
        why = ": only the ratio of the weights counts"
    elif parameters == {"lambda", "weight"}:
        why = ": they are multiplied"
    more = f" (so do the like in {len(clusters) - 1} more places)" if len(clusters) > 1 else ""
    sentence = (
        f"{_listed(names)} change the merge in one and the same way{why}{more}. Search one, and "
        "fix the others in merge.parameters."
    )
    return Finding(tuple(probe.space.names[p] for each in clusters for p in each), sentence)


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
