"""An adapter's folder -> `Adapter`: every tensor is fitted to one of the model's, or refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from evomerge.adapters.adapter import Adapter, LowRank
from evomerge.adapters.config import AdapterConfig, read_config
from evomerge.adapters.files import read_tensors
from evomerge.checkpoints.source import TensorSource
from evomerge.errors import CheckpointError
from evomerge.registry import did_you_mean

PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?$")
_WRAPPERS = re.compile(r"\.(modules_to_save|base_layer)(?=\.)")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_OTHER_MODEL = "Name the model that the adapter was trained on."


def open_adapter(folder: Path, label: str, base: TensorSource) -> Adapter:
    """Open an adapter without reading its tensors, and bind it to a model.

    A module's tensor is `<module>.weight`; where the model has none, the one name of it that has a
    leading module more or less (`transformer.`, `model.`).

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors or .bin.
        label: How messages name the adapter.
        base: The model.

    Raises:
        CheckpointError: The files are missing or damaged, the adapter is of a kind that is not
            supported, or its tensors do not fit those of the model.
    """
    config = read_config(folder, label)
    binder = _Binder(config, label, base)
    for key, tensor in sorted(read_tensors(folder, label).items()):
        binder.take(key.removeprefix(PREFIX), tensor)
    return binder.bound()


class _Binder:
    """Sorts an adapter's tensors, and fits them to the model's."""

    def __init__(self, config: AdapterConfig, label: str, base: TensorSource) -> None:
        self._config, self._label, self._base = config, label, base
        self._factors: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
        self._saved: dict[str, torch.Tensor] = {}
        self._written: dict[str, str] = {}

    def take(self, key: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self._label}: {key} is {_name_of(tensor.dtype)}; adapters of float32, float16 "
                "and bfloat16 are read. Convert it first."
            )
        factor = _FACTOR.fullmatch(key)
        if factor:
            self._factors.setdefault((factor[1], bool(factor[2])), {})[factor[3]] = tensor
        else:
            name = _WRAPPERS.sub("", key)
            self._put(self._saved, name, tensor)
            self._written[self._base_name(name)] = name

    def bound(self) -> Adapter:
        low_rank: dict[str, LowRank] = {}
        for (module, embedding), pair in self._factors.items():
            self._put(low_rank, f"{module}.weight", self._low_rank(module, embedding, pair))
        if not low_rank and not self._saved:
            raise CheckpointError(f"{self._label}: holds no tensors. Save the adapter again.")
        for name, tensor in self._saved.items():
            self._check_shape(name, tuple(tensor.shape))
        for name, part in low_rank.items():
            self._check_shape(name, part.shape)
        ties_head = self._config.ties_head
        adapter = Adapter(self._label, low_rank, self._saved, self._written, ties_head)
        return _without_tied(adapter, self._base)

    def _low_rank(self, module: str, embedding: bool, pair: dict[str, torch.Tensor]) -> LowRank:
        a_RI, b_OR = self._pair(module, pair)
        name = self._base_name(f"{module}.weight")
        transposed = embedding or _inputs_first(self._base, name, (len(b_OR), a_RI.shape[1]))
        scale = self._config.scale_of(module)
        return LowRank(module, a_RI, b_OR, scale, transposed, embedding)

    def _pair(
        self, module: str, pair: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rank = self._config.rank_of(module)
        shapes = {letter: tuple(tensor.shape) for letter, tensor in sorted(pair.items())}
        flat = all(len(shape) == 2 for shape in shapes.values())
        if not (flat and len(pair) == 2 and shapes["A"][0] == shapes["B"][1] == rank):
            raise CheckpointError(
                f"{self._label}: {module} has LoRA factors of shapes {shapes}, and "
                f"adapter_config.json gives it rank {rank}. An A of (rank, inputs) and a B of "
                "(outputs, rank) are needed; save the adapter again."
            )
        return pair["A"], pair["B"]

    def _put(self, found: dict[str, Any], name: str, value: object) -> None:
        name = self._base_name(name)
        if name in found:
            raise CheckpointError(
                f"{self._label}: has two parts for {name} of {self._base.label}. "
                "Save the adapter again."
            )
        found[name] = value

    def _base_name(self, name: str) -> str:
        base = self._base
        if name in base or name in base.tied:
            return name
        shorter = name.partition(".")[2]
        longer = [other for other in base.names() if other.endswith(f".{name}")]
        near = [*longer, *([shorter] if shorter in base else [])]
        if len(near) != 1:
            raise CheckpointError(
                f"{self._label}: is for {name}, which {base.label} has not."
                f"{did_you_mean(name, base.names())} {_OTHER_MODEL}"
            )
        return near[0]

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        base = self._base
        stored = base.tied.get(name, name)
        if base.shape(stored) != shape or not base.dtype(stored).is_floating_point:
            raise CheckpointError(
                f"{name}: adapter {self._label} is for {shape}, {base.label} has "
                f"{base.shape(stored)} in {_name_of(base.dtype(stored))}. {_OTHER_MODEL}"
            )


def _inputs_first(base: TensorSource, name: str, shape: tuple[int, int]) -> bool:
    """Whether a module's weight is stored as (inputs, outputs), as GPT-2's Conv1D does.

    Args:
        base: The model.
        name: The weight.
        shape: Its outputs and inputs.
    """
    if name not in base or shape[0] != shape[1]:
        return name in base and base.shape(name) == shape[::-1]
    # a square weight tells nothing: the biases beside its neighbours' weights do
    block = re.match(r".*?\.\d+\.", name)
    neighbours = [other for other in base.names() if block and other.startswith(block[0])]
    outputs = [
        (base.shape(weight), base.shape(bias)[0])
        for weight in neighbours
        if (bias := weight.removesuffix("weight") + "bias") in base and weight != bias
    ]
    uneven = [pair for pair in outputs if len(set(pair[0])) == 2]
    has_bias = name.removesuffix("weight") + "bias" in base
    return has_bias and bool(uneven) and all(pair[0][1] == pair[1] for pair in uneven)


def _without_tied(adapter: Adapter, base: TensorSource) -> Adapter:
    """Return an adapter without parts for a head that uses the embedding in its place.

    Raises:
        CheckpointError: Head and embedding would differ, so that the model is tied no more.
    """
    low_rank, saved = dict(adapter.low_rank), dict(adapter.saved)
    for head, embedding in base.tied.items():
        touched = sorted({head, embedding} & {*low_rank, *saved})
        follows = adapter.ties_head and embedding in touched
        if not follows and _would_differ(adapter, base, head, embedding):
            raise CheckpointError(
                f"{adapter.label}: changes {' and '.join(touched)}, and {base.label} uses "
                f"{embedding} for both {embedding} and {head}. Train the adapter with "
                "ensure_weight_tying, or on a copy of the model with an untied head."
            )
        low_rank.pop(head, None)
        saved.pop(head, None)
    return dataclasses.replace(
        adapter, low_rank=dict(sorted(low_rank.items())), saved=dict(sorted(saved.items()))
    )


def _would_differ(adapter: Adapter, base: TensorSource, head: str, embedding: str) -> bool:
    if {head, embedding} & adapter.low_rank.keys():
        return True
    if not {head, embedding} & adapter.saved.keys():
        return False
    stored = base.read(embedding)
    one, other = (adapter.saved.get(name, stored) for name in (head, embedding))
    return not torch.equal(one.float(), other.float())


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
