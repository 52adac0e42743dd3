"""Part: layers of a merge that are made alike, and which tensors of the models they are made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.source import TensorSource
from evomerge.config.layout import Layout, Role
from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe, Setting, SliceSource
from evomerge.methods.method import Method

_ROLES: frozenset[Role] = frozenset({"embed", "norm", "head"})


@dataclass(frozen=True)
class Part:
    """One slice of a recipe, or all of it where whole models are merged.

    Attributes:
        where: The part in the recipe, for messages: `models` or `slices[1]`.
        whole: Whether whole models are merged, every tensor under its own name.
        sources: The listed models and their layers.
        base_model: The base model that the recipe names for the part.
        parameters: The slice's own; empty for whole models.
        first_layer: Layer of the merge that the first layer becomes.
        num_layers: Number of layers.
        outside: Which tensors outside the layers the part makes.
    """

    where: str
    whole: bool
    sources: tuple[SliceSource, ...]
    base_model: ModelRef | None
    parameters: Mapping[str, Setting]
    first_layer: int
    num_layers: int
    outside: frozenset[Role]

    @property
    def base(self) -> SliceSource | None:
        """The base model and its layers; None where they are not known, or there is no base."""
        listed = find(self.base_model, self.sources)
        if listed is None and self.whole and self.base_model:
            return SliceSource(model=self.base_model, layer_range=(0, self.num_layers))
        return listed

    def base_of(self, method: Method) -> SliceSource | None:
        """Return what task vectors start from; None where the method makes none."""
        base = self.base
        return base if method.has_deltas(base is not None) else None

    def parents_of(self, method: Method) -> tuple[SliceSource, ...]:
        """Return the models that are merged, in order; what the base is to them see `Method`."""
        base = self.base
        if method.has_deltas(base is not None):
            return tuple(source for source in self.sources if source.model != self.base_model)
        if method.base == "input" and base is not None and base not in self.sources:
            return (base, *self.sources)
        return self.sources


@dataclass(frozen=True)
class Member:
    """A model of a part and what it gives.

    Attributes:
        name: The model as the recipe writes it.
        parameters: Its own.
        tensors: Its tensors.
        given: Name in the merge -> name in the model.
    """

    name: str
    parameters: Mapping[str, Setting]
    tensors: TensorSource
    given: Mapping[str, str]


@dataclass(frozen=True)
class BoundPart:
    """A part, its models and what a method makes of them.

    Attributes:
        part: The part.
        members: Every model; first the one that the others must fit: the base if there is one.
        base: What task vectors start from; None where the method makes none.
        parents: The models that are merged, in order.
    """

    part: Part
    members: tuple[Member, ...]
    base: Member | None
    parents: tuple[Member, ...]

    @property
    def donor(self) -> Member:
        """The model that the others must fit."""
        return self.members[0]


def parts_of(recipe: Recipe, layout: Layout) -> tuple[Part, ...]:
    """Return the parts of a recipe, in the order of their layers.

    Args:
        recipe: The merge.
        layout: The layers of the recipe's donor.
    """
    if recipe.slices:
        return tuple(_slices(recipe))
    every = (0, layout.num_layers)
    sources = tuple(
        SliceSource(model=source.model, parameters=source.parameters, layer_range=every)
        for source in recipe.models
    )
    return (Part("models", True, sources, recipe.base_model, {}, 0, layout.num_layers, _ROLES),)


def _slices(recipe: Recipe) -> Iterator[Part]:
    first_layer, last = 0, len(recipe.slices) - 1
    for i, part in enumerate(recipe.slices):
        outside: set[Role] = {"embed"} if i == 0 else set()
        outside |= {"norm", "head"} if i == last else set()
        yield Part(
            where=f"slices[{i}]",
            whole=False,
            sources=part.sources,
            base_model=part.base_model or recipe.base_model,
            parameters=part.parameters,
            first_layer=first_layer,
            num_layers=part.num_layers,
            outside=frozenset(outside),
        )
        first_layer += part.num_layers


def bind(part: Part, method: Method, sources: Mapping[str, TensorSource], prefix: str) -> BoundPart:
    """Find what each model gives to a part, and what the method makes of it.

    Args:
        part: The part.
        method: The merge's method.
        sources: The models' tensors by name.
        prefix: What stands before the layer number in tensor names.
    """
    models = {str(source.model): source for source in (part.base or part.sources[0], *part.sources)}
    members = {
        name: Member(
            name, source.parameters, sources[name], _given(part, source, sources[name], prefix)
        )
        for name, source in models.items()
    }
    base = part.base_of(method)
    return BoundPart(
        part=part,
        members=tuple(members.values()),
        base=None if base is None else members[str(base.model)],
        parents=tuple(members[str(source.model)] for source in part.parents_of(method)),
    )


def _given(part: Part, source: SliceSource, tensors: TensorSource, prefix: str) -> dict[str, str]:
    if part.whole:
        return {name: name for name in tensors.names()}
    outside = layout_of(tensors.names()).outside if part.outside else ()
    given = {name: name for role, name in outside if role in part.outside}
    first, end = source.layer_range
    for layer, names in names_by_layer(tensors, prefix).items():
        if first <= layer < end:
            given |= moved(names, prefix, layer, layer - first + part.first_layer)
    return given


def names_by_layer(tensors: TensorSource, prefix: str) -> dict[int, list[str]]:
    """Return the names of a model's tensors by layer; those outside the layers are left out."""
    layout = Layout(num_layers=1, outside=(), layer_prefix=prefix)
    found: dict[int, list[str]] = {}
    for name in tensors.names():
        layer = layout.layer_of(name)
        if layer is not None:
            found.setdefault(layer, []).append(name)
    return found


def moved(names: list[str], prefix: str, layer: int, to: int) -> dict[str, str]:
    """Return the tensors of one layer by the names they have as another layer."""
    start = len(f"{prefix}{layer}")
    return {f"{prefix}{to}{name[start:]}": name for name in names}


def output_depth(recipe: Recipe, layout: Layout) -> list[int]:
    """Return, for each layer of the merge, the donor's layer that its config describes it by.

    That is the donor's own layer where the donor takes part in the slice, else the layer of this
    number. Whole models keep the donor's layers.

    Args:
        recipe: The merge.
        layout: The layers of the recipe's donor.
    """
    if not recipe.slices:
        return list(range(layout.num_layers))
    layers: list[int] = []
    for part in recipe.slices:
        layers += range(*(find(recipe.donor, part.sources) or part.sources[0]).layer_range)
    return layers


def find(model: ModelRef | None, sources: tuple[SliceSource, ...]) -> SliceSource | None:
    """Return the source of this model; None where it is not listed."""
    return next((source for source in sources if source.model == model), None)
