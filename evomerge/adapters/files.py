"""The tensors in an adapter's folder, from safetensors or a pickle."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open

from evomerge.checkpoints.index import read_header
from evomerge.errors import CheckpointError


def read_tensors(folder: Path, label: str) -> dict[str, torch.Tensor]:
    """Open an adapter's tensors by their names in the file; pages are read when they are touched.

    Args:
        folder: Folder with adapter_model.safetensors, or else adapter_model.bin.
        label: How messages name the adapter.

    Raises:
        CheckpointError: The file is missing, damaged, of a dtype that is not read, or a pickle that
            holds more than tensors.
    """
    path = folder / "adapter_model.safetensors"
    if path.exists():
        read_header(path, label)
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    path = folder / "adapter_model.bin"
    if not path.exists():
        raise CheckpointError(
            f"{label}: holds no adapter_model.safetensors or adapter_model.bin. "
            "Give the folder of one adapter, as PEFT's save_pretrained leaves it."
        )
    return _load_pickle(path, label)


def _load_pickle(path: Path, label: str) -> dict[str, torch.Tensor]:
    damaged = CheckpointError(
        f"{label}: {path.name} is truncated, or not in PyTorch's format since version 1.6. "
        "Download it again, or convert the adapter to safetensors."
    )
    if not zipfile.is_zipfile(path):
        raise damaged
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{label}: {path.name} is a pickle that holds more than tensors, and loading it would "
            "run its code. Convert it to safetensors on a machine where you trust it."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise damaged from error
    if not isinstance(loaded, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in loaded.values()
    ):
        raise CheckpointError(f"{label}: {path.name} does not hold named tensors.")
    return loaded
