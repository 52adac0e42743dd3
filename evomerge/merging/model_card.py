"""The model card beside the weights: `README.md`, as the Hugging Face hub reads it.

The same merge gives the same card: no dates, no names of this machine. A local folder appears by
the last part of its path, and never where the hub expects a model's id.
https://huggingface.co/docs/hub/model-cards says what the front matter means.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from evomerge.config.mergekit import write_recipe
from evomerge.config.models import FolderRef, ModelRef
from evomerge.config.recipe import Recipe
from evomerge.merging.plan import MergePlan
from evomerge.merging.provenance import versions

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE_KEYS = ("license", "license_name", "license_link")
_CARD = """\
---
{front_matter}---

# Merge of {title}

The weights of this model are a merge of those of others, made with evomerge {version}.

- Method: [{method}]({source}), {summary}
{models}
- Tensors: {num_tensors}, {num_parameters} parameters, {dtypes}

## Recipe

```yaml
{recipe}```

## How to reproduce

```bash
pip install evomerge=={version}
evomerge merge recipe.yaml OUT
```

`recipe.yaml` lies beside the weights; folders in it are those of the machine where the merge was
made, so put your own in their place. The weights are the same if evomerge prints this digest:
`{digest}`. {replay}

Made with {versions}. `evomerge.json` has the fingerprints of the models that went in.
"""
_REPLAY = "mergekit reads the recipe too; where there is a comment on top, it says what differs."
_NO_REPLAY = "mergekit cannot replay the recipe: the comment on top of it says why."


def write_model_card(out: Path, plan: MergePlan, digest: str, folders: Mapping[str, Path]) -> None:
    """Write `README.md` into a new checkpoint.

    Args:
        out: The new checkpoint; exists.
        plan: The merge.
        digest: Digest of its tensors.
        folders: Folder of each model that was read.
    """
    (out / "README.md").write_text(model_card(plan, digest, folders), encoding="utf-8")


def model_card(plan: MergePlan, digest: str, folders: Mapping[str, Path]) -> str:
    """Return the text of the model card; arguments as for `write_model_card`."""
    recipe, packages = portable(plan.recipe), versions()
    specs = [job.spec for job in plan.jobs]
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in specs})
    text = write_recipe(recipe)
    merged = [ref for ref in recipe.references() if ref != recipe.base_model]
    return _CARD.format(
        front_matter=yaml.safe_dump(front_matter(plan.recipe, folders), sort_keys=False),
        title=", ".join(" + ".join(Path(part.path).name for part in _parts(ref)) for ref in merged),
        method=recipe.merge_method,
        source=plan.method.source,
        summary=plan.method.summary,
        models="\n".join(_models(recipe)),
        num_tensors=len(specs),
        num_parameters=f"{sum(spec.num_elements for spec in specs):,}",
        dtypes=" and ".join(dtypes),
        recipe=text,
        digest=digest,
        replay=_NO_REPLAY if "not to be replayed by mergekit" in text else _REPLAY,
        version=packages["evomerge"],
        versions=", ".join(f"{package} {number}" for package, number in packages.items()),
    )


def _models(recipe: Recipe) -> Iterator[str]:
    for reference in recipe.references():
        shown = " + ".join(_link(part) for part in _parts(reference))
        yield f"- {'Base' if reference == recipe.base_model else 'Model'}: {shown}"


def _parts(reference: ModelRef) -> list[FolderRef]:
    """Return the model and, if there is one, its adapter."""
    return [reference, reference.adapter] if reference.adapter else [reference]


def _link(part: FolderRef) -> str:
    name = f"{part.path}@{part.revision}" if part.revision else part.path
    if not _HUB_ID.fullmatch(part.path):
        return f"`{name}`"
    place = f"/tree/{part.revision}" if part.revision else ""
    return f"[{name}](https://huggingface.co/{part.path}{place})"


def front_matter(recipe: Recipe, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the hub shows and searches by: base models, library, licence, tags.

    Only hub ids count as base models, adapters included. A licence is stated only where the cards
    of all models state the same one.

    Args:
        recipe: The merge.
        folders: Folder of each model that was read; its README.md is looked at.
    """
    parts = [part for reference in recipe.references() for part in _parts(reference)]
    ids = list(dict.fromkeys(part.path for part in parts if _HUB_ID.fullmatch(part.path)))
    licences = [_licence(folder) for folder in folders.values()]
    agreed = all(licence == licences[0] for licence in licences)
    return {
        **({"base_model": ids} if ids else {}),
        "library_name": "transformers",
        **(licences[0] if licences and agreed else {}),
        "tags": ["merge", "evomerge", recipe.merge_method],
    }


def _licence(folder: Path) -> dict[str, str]:
    """Return what a model's own card says about its licence; nothing where it says nothing."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return {}
    fields = head if isinstance(head, dict) else {}
    return {key: fields[key] for key in _LICENSE_KEYS if isinstance(fields.get(key), str)}


def portable(recipe: Recipe) -> Recipe:
    """Return the recipe with every folder of this machine cut down to `./` and its last part.

    Two folders whose last parts are the same keep as many parts as tell them apart.
    """
    data = recipe.model_dump(mode="json")
    paths = list(dict.fromkeys(path for text in _texts(data) for path in _paths(text)))
    return Recipe.model_validate_json(json.dumps(_replaced(data, _short_names(paths))))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _paths(text: str) -> list[str]:
    """Return the absolute paths in `path`, `hub/id` or `path+adapter`."""
    return [part for part in text.split("+") if part.startswith("/") and "\n" not in part]


def _short_names(paths: list[str]) -> dict[str, str]:
    for count in range(1, max((len(Path(path).parts) for path in paths), default=0) + 1):
        names = {path: "./" + "/".join(Path(path).parts[-count:]) for path in paths}
        if len(set(names.values())) == len(names):
            return names
    return {}


def _replaced(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return "+".join(names.get(part, part) for part in value.split("+"))
    if isinstance(value, dict):
        return {key: _replaced(part, names) for key, part in value.items()}
    return [_replaced(part, names) for part in value] if isinstance(value, list) else value
