"""References -> the folder that holds a model or an adapter, downloaded where it is a hub id."""

from pathlib import Path

from evomerge.config.models import FolderRef, ModelRef
from evomerge.errors import CheckpointError

# a prefix, so that copies in other formats (original/, consolidated*, onnx/) stay where they are
_SIDECARS = ["README.md", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
_WEIGHTS = ["model*.safetensors"]
_PICKLES = ["pytorch_model*.bin"]
_ADAPTER = ["adapter_model.safetensors"]
_ADAPTER_PICKLE = ["adapter_model.bin"]


def locate(ref: ModelRef) -> Path:
    """Return the folder that holds a model, without its adapter if the reference has one.

    A path that begins with `/`, `.` or `~` is a folder of this machine, and the hub's library is
    not even imported; anything else is a hub id and comes from the hub's cache, downloaded first
    where it can be. Pickled weights are downloaded only where there are no safetensors.

    Args:
        ref: The model; see `ModelRef.relative_to` for paths written in a config.

    Returns:
        An existing folder with a config.json; its weights are checked by `reader.open_checkpoint`.

    Raises:
        CheckpointError: No such folder, not a model's folder, or the hub cannot give it.
    """
    model = ref.without_adapter
    folder = _find(model, _WEIGHTS, _PICKLES)
    if not (folder / "config.json").is_file():
        advice = (
            "It holds an adapter: write model+adapter, the model it was trained on first."
            if (folder / "adapter_config.json").is_file()
            else "Give the folder of a complete model, as save_pretrained leaves it."
        )
        raise CheckpointError(f"{model}: holds no config.json (it has {_held(folder)}). {advice}")
    return folder


def locate_adapter(ref: FolderRef) -> Path:
    """Return the folder that holds an adapter in PEFT's format; see `locate`.

    Returns:
        An existing folder with an adapter_config.json.

    Raises:
        CheckpointError: No such folder, not an adapter's folder, or the hub cannot give it.
    """
    folder = _find(ref, _ADAPTER, _ADAPTER_PICKLE)
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{ref}: holds no adapter_config.json (it has {_held(folder)}). "
            "Give the folder of one adapter, as PEFT's save_pretrained leaves it."
        )
    return folder


def _find(ref: FolderRef, weights: list[str], pickles: list[str]) -> Path:
    if ref.path.startswith(("/", ".", "~")):
        return _local_folder(ref)
    folder = _download(ref, weights)
    return folder if any(folder.glob(weights[0])) else _download(ref, pickles)


def _held(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


def _local_folder(ref: FolderRef) -> Path:
    if ref.revision is not None:
        raise CheckpointError(
            f"{ref}: is a folder, and revision {ref.revision!r} is for hub ids only. "
            "Remove the revision."
        )
    folder = Path(ref.path).expanduser()
    if not folder.exists():
        raise CheckpointError(
            f"{ref}: there is no such folder. Correct the path, or write a hub id as owner/name."
        )
    if not folder.is_dir():
        raise CheckpointError(f"{ref}: is a file. Give the folder that holds it.")
    return folder


def _download(ref: FolderRef, weights: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    page = f"https://huggingface.co/{ref.path}"
    try:
        found = snapshot_download(
            ref.path,
            revision=ref.revision,
            allow_patterns=[*_SIDECARS, *weights],
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{ref}: is gated. Ask for access at {page}, then run hf auth login."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{ref}: is neither a folder here nor a model you may see on the hub. "
            f"Correct the name, write ./{ref.path} for a folder, or run hf auth login if the model "
            "is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{ref}: the model has no revision {ref.revision!r}. "
            f"Its revisions are listed at {page}/tree/main."
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{ref}: is neither a folder here nor a hub id. "
            f"Write owner/name, or ./{ref.path} for a folder."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = (
            "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        )
        raise CheckpointError(
            f"{ref}: is not, or not completely, in the cache {constants.HF_HUB_CACHE}, and {why}. "
            f"Download it where there is a network (hf download {ref.path}), or give a folder."
        ) from error
    # the transport's own errors (proxy, TLS, time-outs) share no class that is public in all
    # versions of the hub's library
    except Exception as error:
        raise CheckpointError(
            f"{ref}: could not be downloaded into {constants.HF_HUB_CACHE} "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "Try again; what has arrived is kept."
        ) from error
    return Path(found)
