"""Two parents of six layers, and the parameters of a method, for the tests of the search space."""

from hypothesis import settings

from evomerge.config.layout import Layout
from evomerge.config.models import ModelRef
from evomerge.config.params import Param
from evomerge.config.space import SpaceConfig
from evomerge.config.strict import StrictModel, parse_yaml, validate
from evomerge.space.decode import RecipeTemplate
from evomerge.space.space import build_space

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
"""For property tests: the same examples every time, and no clock."""

PARAMS = (
    Param("weight", "", default=None, per_model=True, search=(0.0, 1.0)),
    Param("density", "", default=1.0, per_model=True, low=0.0, high=1.0, search=(0.1, 1.0)),
    Param("lambda", "", default=1.0, per_model=False, search=(0.5, 1.5)),
    Param("t", "", default=None, per_model=False, low=0.0, high=1.0),
    Param("normalize", "", default=True, per_model=False, kind="bool"),
    Param("max_iter", "", 10, False, kind="int", low=1, high=100, search=(1, 20)),
)
PARENTS = ("math", "code")
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
OUTSIDE = {EMBED: "embed", NORM: "norm", HEAD: "head"}
LAYOUT = Layout(6, (("embed", EMBED), ("norm", NORM), ("head", HEAD)))
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
TENSORS = (
    EMBED,
    *(f"model.layers.{layer}.{name}.weight" for layer in range(6) for name in MODULES),
    NORM,
    HEAD,
)


class Section(StrictModel):
    space: SpaceConfig


def read(text):
    """The `space:` section of a text that begins below that key."""
    return validate(Section, *parse_yaml(f"space:\n{text}")).space


def make_space(text, fixed=None, layout=LAYOUT, tensors=TENSORS):
    return build_space(read(text), fixed or {}, PARAMS, PARENTS, layout, tensors)


def template(**changes):
    refs = tuple((name, ModelRef(path=f"/m/{name}")) for name in PARENTS)
    return RecipeTemplate("ties", ModelRef(path="/m/base"), refs, **changes)
