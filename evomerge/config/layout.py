"""Layout: how many layers a model has, and which tensors lie outside them."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["embed", "norm", "head"]
"""Part of a model outside its layers: token embeddings, final norm, output head."""


@dataclass(frozen=True)
class Layout:
    """What a layer-wise search needs to know of the models it merges.

    Attributes:
        num_layers: Number of layers, at least 1.
        outside: Role and full name of every tensor that belongs to no layer, in reading order.
            Tied tensors that are not stored are not listed.
        layer_prefix: What stands before the layer number in tensor names, e.g. `model.layers.`.
    """

    num_layers: int
    outside: tuple[tuple[Role, str], ...]
    layer_prefix: str = "model.layers."

    def layer_of(self, name: str) -> int | None:
        """Return the layer a tensor belongs to, or None outside the layers."""
        if not name.startswith(self.layer_prefix):
            return None
        number = name[len(self.layer_prefix) :].partition(".")[0]
        return int(number) if number.isdigit() else None
