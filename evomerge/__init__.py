"""evomerge: search for the best merge of fine-tuned language models, and trust what it found.

    import evomerge

    study = evomerge.search("configs/quickstart.yaml")
    study.trials                                  # a pandas frame
    evomerge.merge("winner.yaml", "merged-model")

Nothing heavy is imported until one of these is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.config.search import SearchConfig
    from evomerge.study.view import StudyView

__version__ = "0.1.0"
__all__ = ["load_study", "merge", "search"]


def search(
    config: "str | Path | dict[str, Any] | SearchConfig", *, resume: bool = False
) -> "StudyView":
    """Run a search to the end of its budget, or go on with one.

    Args:
        config: YAML file, the same settings as a dict (relative paths are then read from here), or
            a config that was loaded already.
        resume: Go on with a study that exists; a new study otherwise.

    Returns:
        The study, with `trials`, `items()` and `baselines` as pandas frames.

    Raises:
        EvoMergeError: One sentence; see `evomerge.errors`.
    """
    from evomerge.config.search import SearchConfig, load_search, make_search
    from evomerge.study.run import run_search
    from evomerge.study.view import StudyView

    if isinstance(config, SearchConfig):
        loaded = config
    else:
        loaded = make_search(config) if isinstance(config, dict) else load_search(config)
    run_search(loaded, resume=resume)
    return StudyView(loaded)


def load_study(study: str | Path, storage: str | None = None) -> "StudyView":
    """Open a study for reading, by its config file, or by name and storage.

    Raises:
        EvoMergeError: There is no such study.
    """
    from evomerge.study.view import load_study as load

    return load(study, storage)


def merge(recipe: str | Path, out: str | Path) -> str:
    """Carry out a recipe and write the merged model.

    Args:
        recipe: YAML file, mergekit's or one that evomerge exported.
        out: Folder to write; must not exist or be empty.

    Returns:
        Digest of the merged weights.

    Raises:
        EvoMergeError: The recipe is not a merge, or files cannot be read or written.
    """
    from evomerge.config.mergekit import read_recipe
    from evomerge.merging.run import merge as run_merge

    return run_merge(read_recipe(recipe), Path(out))
