"""write_adapter: a recipe whose parents are adapters of one model, as one adapter of that model."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.adapters.adapter import Adapter
from evomerge.adapters.open import Model, fingerprint_of, open_model
from evomerge.adapters.source import AdapterSource
from evomerge.adapters.stack import stack_adapters
from evomerge.adapters.truncate import Residual, truncate
from evomerge.adapters.write import write_peft
from evomerge.checkpoints.architecture import layout_of
from evomerge.config.mergekit import write_recipe
from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe
from evomerge.errors import CheckpointError, MergeError
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics
from evomerge.kernels.tables import Span
from evomerge.merging.execute import merged_tensors
from evomerge.merging.plan import MergePlan, TensorJob, make_plan
from evomerge.merging.provenance import versions
from evomerge.methods import METHODS

LINEAR_METHODS = ("linear", "task_arithmetic")
"""Methods that add adapters up with fixed coefficients, so that the sum is an adapter again."""

_FULL = "Leave out --adapter to write the full model."


@dataclass(frozen=True)
class AdapterReport:
    """What was written.

    Attributes:
        ranks: Module to the rank of its factors.
        residuals: Module to what was left out; only modules where something was.
        replaced: Names of tensors that are written whole, because an adapter replaces them.
    """

    ranks: Mapping[str, int]
    residuals: Mapping[str, Residual]
    replaced: tuple[str, ...]

    @property
    def worst(self) -> tuple[str, Residual] | None:
        """The module of the largest relative residual; None where nothing was left out."""
        by_size = sorted(self.residuals.items(), key=lambda item: (-item[1].relative, item[0]))
        return by_size[0] if by_size else None


def write_adapter(recipe: Recipe, out: Path, rank: int | None = None) -> AdapterReport:
    """Carry out a recipe on adapters and write the result as one adapter in PEFT's format.

    The factors are stacked (`adapters.stack`), which is exact up to the rounding of one factor to
    float32: the model plus this adapter is the merge before its rounding to `out_dtype`. Tensors
    that an adapter replaces (modules_to_save) are merged as in the full model and written whole.

    Args:
        recipe: linear with weights that add up to 1, or task_arithmetic; every parent is an adapter
            on one model, which is the base where there is one. With linear that model itself may be
            a parent too.
        out: The new folder; must not exist, or be empty. Holds evomerge.json and recipe.yaml too.
        rank: Most rank of a module, at least 1; larger ones are cut by singular values. None cuts
            nothing.

    Raises:
        CheckpointError: A model or adapter cannot be had, or the folder cannot be written.
        MergeError: The recipe is not a sum of adapters of one model.
    """
    base = _base_of(recipe)
    models = {str(ref): open_model(ref) for ref in recipe.references()}
    plan = make_plan(recipe, models, layout_of(models[str(recipe.donor)].names()))
    coefficients = {job.spec.name: _coefficients(plan, job) for job in plan.jobs if job.values}
    adapters = [_adapter_of(models[name.model]) for name in plan.jobs[0].parents]
    with _new_folder(out) as partial:
        replaced = _replaced(plan, models, adapters)
        cut = {
            name: truncate(part, rank or part.rank)
            for name, part in stack_adapters(adapters, coefficients).items()
            if name not in replaced
        }
        if not cut and not replaced:
            raise MergeError(
                f"{recipe.merge_method}: nothing is left of the adapters; all weights are 0."
            )
        report = AdapterReport(
            ranks={part.module: part.rank for part, _ in cut.values()},
            residuals={part.module: left for part, left in cut.values() if left.absolute},
            replaced=tuple(replaced),
        )
        low_rank = {name: part for name, (part, _) in cut.items()}
        written = {k: v for adapter in adapters for k, v in adapter.written.items()}
        saved = {written[name]: tensor for name, tensor in replaced.items()}
        for head, embedding in models[str(recipe.donor)].tied.items():
            if embedding in replaced:  # PEFT looks for the head's copy too
                saved[written.get(head, head)] = replaced[embedding].clone()
        ties_head = any(adapter.ties_head for adapter in adapters)
        write_peft(partial, base, low_rank, saved, ties_head=ties_head)
        _write_provenance(partial, recipe, models, report)
    return report


def _base_of(recipe: Recipe) -> ModelRef:
    """Return the model that all adapters are for.

    Raises:
        MergeError: There is none, or the recipe is not a plain sum of adapters.
    """
    if recipe.merge_method not in LINEAR_METHODS:
        raise MergeError(
            f"{recipe.merge_method}: is not a sum of adapters; {' and '.join(LINEAR_METHODS)} "
            f"are. {_FULL}"
        )
    base = recipe.donor.without_adapter
    if recipe.base_model and recipe.base_model.adapter and METHODS[recipe.merge_method].needs_base:
        raise MergeError(
            f"base_model: {recipe.base_model} has an adapter, and the result would be an adapter "
            f"for {base}, which has none. Name {base}, or merge the adapter into it first."
        )
    for ref in recipe.references():
        if ref.without_adapter != base:
            raise MergeError(
                f"{ref}: is not {base} with an adapter, so its difference from it is of no low "
                f"rank. {_FULL}"
            )
    if recipe.slices or recipe.chat_template or not _keeps_tokenizer(recipe, base):
        raise MergeError(
            "slices, tokenizer and chat_template: an adapter can change neither layers nor "
            f"vocabulary. Remove them. {_FULL}"
        )
    if recipe.rounding != "nearest":
        raise MergeError(
            f"evomerge.rounding: came {recipe.rounding}, and an adapter is written before the "
            f"merge is rounded. Remove it. {_FULL}"
        )
    return base


def _keeps_tokenizer(recipe: Recipe, base: ModelRef) -> bool:
    own = recipe.tokenizer_source in (None, "base", *(str(ref) for ref in recipe.references()))
    return own and recipe.tokenizer is None


def _adapter_of(model: Model) -> Adapter:
    if isinstance(model, AdapterSource):
        return model.adapter
    return Adapter(model.label, {}, {}, {}, ties_head=False)


def _coefficients(plan: MergePlan, job: TensorJob) -> tuple[float, ...]:
    """Return the coefficient of each parent's task vector, exactly as the merge has it.

    Raises:
        MergeError: The tensor of the model itself is scaled too.
    """
    assert job.values is not None
    # these methods ask for no facts about the tensors
    table = plan.method.table(job.values, TensorStatistics(job.spec.name, None, [], None, ()))
    assert isinstance(table, Span), "the linear methods are spans"
    total = 1.0 if table.deltas else sum(table.coefficients)
    if abs(total - 1.0) > 1e-6:
        raise MergeError(
            f"{job.spec.name}: the weights add up to {total:g}, which scales the model itself, and "
            f"an adapter cannot. Set normalize: true, or use task_arithmetic. {_FULL}"
        )
    return table.coefficients


def _replaced(
    plan: MergePlan, models: Mapping[str, Model], adapters: list[Adapter]
) -> dict[str, torch.Tensor]:
    """Return the merged tensors of those that an adapter replaces by another than the model's."""
    first = next(iter(models.values()))
    base = first.base if isinstance(first, AdapterSource) else first
    names = {
        name
        for adapter in adapters
        for name, tensor in adapter.saved.items()
        if not torch.equal(tensor.float(), base.read(name).float())
    }
    jobs = tuple(job for job in plan.jobs if job.spec.name in names)
    return merged_tensors(dataclasses.replace(plan, jobs=jobs), models, StatisticsCache())


def _write_provenance(
    folder: Path, recipe: Recipe, models: Mapping[str, Model], report: AdapterReport
) -> None:
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.hash,
        "fingerprints": {name: fingerprint_of(model) for name, model in models.items()},
        "adapter": {
            "ranks": dict(report.ranks),
            "residuals": {module: left._asdict() for module, left in report.residuals.items()},
            "replaced": list(report.replaced),
        },
        "packages": versions(),
    }
    (folder / "evomerge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(write_recipe(recipe), encoding="utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside the target that becomes it at the end, or goes away."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(
            f"{out}: exists and is not an empty folder. Choose another, or remove it."
        )
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror or error}); nothing was kept. "
            "Choose a folder that can be written to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
