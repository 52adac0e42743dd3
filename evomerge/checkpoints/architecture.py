"""Tensor name -> layer, or role outside the layers.

Works on names alone, as they are on disk, so that models transformers does not know can be searched
too. New families mostly need nothing: the layers are found by their numbers, the rest by the words
below.
"""

import re
from collections import Counter
from collections.abc import Iterable

from evomerge.config.layout import Layout, Role
from evomerge.errors import CheckpointError

# the language model's stack where a model has several (vision, audio, encoder)
_PREFERRED_PREFIX = re.compile(
    r"(^|\.)(language_model|text_model|decoder)\.([a-z_]+\.)*(layers|h|blocks?)\.$"
)
_OTHER_TOWER = re.compile(r"(^|[._])(vision|visual|image|img|audio|speech)([._]|$)")
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+\.")
_TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output_layer", "output", "project_out", "score")
_NORM = re.compile(r"norm|^ln(_|$)")
_LEFTOVER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias)$")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|causal_mask)$")


def layout_of(names: Iterable[str], num_layers: int | None = None) -> Layout:
    """Find a model's layers, and the role of every tensor outside them.

    The layers are the numbered modules `<prefix>N.`; where a model has several such stacks, the
    language model's (by the words language_model, text_model or decoder), else one that is not of
    images or sound by its name, and of those the one with the most tensors. Outside them, by the
    last module's name: `head` for lm_head and its like; then, within the module that holds the
    layers, `norm` for what is called a norm and not an embedding's; everything else is `embed`,
    because what is left (position embeddings, projections, other towers) feeds the layers. So every
    tensor has a layer or a role.

    Args:
        names: Tensor names as stored; their order is kept.
        num_layers: What the config says; None takes it from the names. Layers stored beyond it
            count as layers.

    Raises:
        CheckpointError: There are no numbered modules, or a layer has no tensors.
    """
    names = tuple(names)
    prefix = _layer_prefix(names)
    layout = Layout(num_layers=1, outside=(), layer_prefix=prefix)
    stored = {layer for name in names if (layer := layout.layer_of(name)) is not None}
    count = max(max(stored) + 1, num_layers or 1)
    missing = [layer for layer in range(count) if layer not in stored]
    if missing:
        raise CheckpointError(
            f"{prefix}{missing[0]}: has no tensors, but the model has {count} layers. "
            "The checkpoint is not complete, or num_hidden_layers of its config is wrong."
        )
    root = prefix.rpartition(".")[0].rpartition(".")[0]
    outside = tuple((_role(name, root), name) for name in names if layout.layer_of(name) is None)
    return Layout(num_layers=count, outside=outside, layer_prefix=prefix)


def _layer_prefix(names: tuple[str, ...]) -> str:
    found = Counter(name[: match.start()] for name in names if (match := _NUMBER.search(name)))
    if not found:
        raise CheckpointError(
            f"{names[0] if names else 'no tensor'}: no tensor name has a layer number, as in "
            "model.layers.0.mlp, so the model has no layers to search."
        )
    return max(
        found,
        key=lambda prefix: (
            bool(_PREFERRED_PREFIX.search(prefix)),
            not _OTHER_TOWER.search(prefix),
            found[prefix],
        ),
    )


def _role(name: str, root: str) -> Role:
    module = name.split(".")[-2] if "." in name else name
    if module in _HEADS:
        return "head"
    inside = not root or name.startswith(f"{root}.")
    if inside and _NORM.search(module) and "emb" not in module:
        return "norm"
    return "embed"


def embedding_and_head(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Find the token embedding and the stored output head; None where there is not just one."""
    ends = [(name, name.split(".")[-2:]) for name in names]
    embeddings = [name for name, end in ends if end in [[w, "weight"] for w in _TOKEN_EMBEDDINGS]]
    heads = [name for name, end in ends if end in [[w, "weight"] for w in ("lm_head", "embed_out")]]
    return _only(embeddings), _only(heads)


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def is_leftover(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a stored tensor is a constant that older transformers stored with the weights.

    Causal masks, their fill value and rotary frequencies follow from the config; transformers 5
    neither loads nor stores them, so one of two models may have them and the other not. A mask has
    shape (1, 1, n, n), which tells it from a bias.
    """
    is_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_LEFTOVER.search(name) or (is_mask and _CAUSAL_MASK.search(name)))
