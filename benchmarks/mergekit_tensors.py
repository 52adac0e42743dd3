"""mergekit's CPU time for the merge of one tensor: its side, in its own environment, and ours.

Ours starts `ORACLE/bin/python -m benchmarks.mergekit_tensors TENSORS` and writes requests to it,
one JSON object on a line; each is answered by one. TENSORS is a safetensors file with the models
`0`, `1`, ... and `base`. mergekit's tasks are carried out as its planner makes them, on tensors
that are in memory, with one thread and without gradients.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import cpu_seconds, one_thread

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

NAME = "model.layers.0.mlp.up_proj.weight"
"""The tensor's name, as methods and their messages see it."""


class Mergekit:
    """mergekit in a process of its own environment, with tensors that it merges when told.

    Use as a context manager.

    Args:
        python: The environment's Python.
        tensors: `base` and the models `0`, `1`, ..., of one shape.
        folder: For the file that hands them over.

    Attributes:
        version: mergekit's.
        num_params: Elements of one of the tensors.
    """

    def __init__(self, python: Path, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        path = folder / "tensors.safetensors"
        save_file(dict(tensors), path)
        self.num_params = tensors["base"].numel()
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.mergekit_tensors", path],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Mergekit":
        self.version: str = self._ask({})["version"]
        return self

    def seconds(
        self,
        method: str,
        num_models: int,
        base: bool,
        per_model: Mapping[str, tuple[float, ...]],
        shared: Mapping[str, float | bool],
        rounds: int,
    ) -> list[float] | None:
        """Return the CPU seconds of a merge in each round; None if mergekit has no such method.

        Args:
            method: Its name.
            num_models: How many are merged, the first ones.
            base: Whether the base takes part.
            per_model: Parameters of each model; unknown ones are passed over.
            shared: The other parameters.
            rounds: How often it is merged, after once that is not counted.
        """
        own = [{name: values[i] for name, values in per_model.items()} for i in range(num_models)]
        request = {"method": method, "base": base, "models": own, "shared": shared}
        return self._ask({**request, "rounds": rounds})["seconds"]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "mergekit's process ended; what it said stands above"
        return json.loads(line)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()


def main() -> None:
    """Be mergekit's side: answer requests until there are no more."""
    one_thread()
    torch.set_grad_enabled(False)
    tensors = load_file(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request, tensors)), flush=True)


def answer(request: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what a request asks for: `seconds`, None without such a method, or the `version`."""
    from mergekit import merge_methods
    from mergekit.common import ModelReference

    if not request:
        return {"version": importlib.metadata.version("mergekit")}
    try:
        merge_methods.get(request["method"])
    except RuntimeError:  # mergekit's word for a name that it does not know
        return {"seconds": None}
    names = [str(i) for i in range(len(request["models"]))]
    if request["base"]:
        names.insert(0, "base")
    models = {ModelReference.model_validate(name): tensors[name] for name in names}
    task = task_of(request, list(models))
    task.execute(models)
    return {
        "seconds": [cpu_seconds(lambda: task.execute(models)) for _ in range(request["rounds"])]
    }


def task_of(request: Mapping[str, Any], models: "list[ModelReference]") -> "ExecuteMergeMethodTask":
    """Return the task that mergekit plans for a tensor of these models, the base first of them."""
    from mergekit import merge_methods
    from mergekit.architecture import WeightInfo
    from mergekit.common import ImmutableMap
    from mergekit.io.tasks import GatherTensors
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from mergekit.parameter_resolver import resolve_parameters

    base = models[0] if request["base"] else None
    merged = [model for model in models if model != base]
    own = dict(zip(merged, request["models"], strict=True))
    shared, per_model = resolve_parameters(
        merge_methods.get(request["method"]).spec,
        tensor_name=NAME,
        inputs=dict.fromkeys(models, NAME),
        sources=lambda model: [own.get(model, {}), request["shared"]],
        base_model=base,
    )
    weight = WeightInfo(name=NAME)
    weights = ImmutableMap(data=dict.fromkeys(models, weight))
    frozen = {model: ImmutableMap(data=values) for model, values in per_model.items()}
    return ExecuteMergeMethodTask(
        method_name=request["method"],
        gather_tensors=GatherTensors(weight_info=weights, dtype="bfloat16"),
        model_order=tuple(models),
        base_model=base,
        output_weight=weight,
        parameters=ImmutableMap(data=shared),
        input_parameters=ImmutableMap(data=frozen),
    )


if __name__ == "__main__":
    main()
