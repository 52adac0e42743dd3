"""What it costs to load a model into an arena, beside a copy of its bytes and beside safetensors.

    python -m benchmarks.load [--params 256Mi] [--rounds 7] [--json]

One bfloat16 file of tensors of a decoder's shapes, in the page cache. One thread, CPU time of the
process, in rounds in which everything runs in turn. The copy moves the same bytes, from memory to
memory of the same kind: `in place` is memory that was written to before, `new` is not, and its
first touch costs more than what is loaded into it.
"""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.measure import Row, copy_of, interleaved, one_thread, parser, show, size
from evomerge.checkpoints.arena import Arena, fill, layout_for, load_arena
from evomerge.checkpoints.reader import open_checkpoint

HIDDEN = 2048
SHAPES = {
    "input_layernorm": (HIDDEN,),
    "mlp.down_proj": (HIDDEN, 5632),
    "mlp.gate_proj": (5632, HIDDEN),
    "mlp.up_proj": (5632, HIDDEN),
    "self_attn.k_proj": (512, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (512, HIDDEN),
}
"""Tensors of one layer."""

CASES = (
    ("into an arena, in place", "arena in place", "copy in place"),
    ("into a new arena", "new arena", "new copy"),
    ("safe_open, into an arena, in place", "safe_open in place", "copy in place"),
    ("load_file (pread), new", "load_file", "new copy"),
)
"""Case, what is timed, and what it is compared with."""


def main() -> None:
    """Write the file, time everything, print the rows."""
    arguments = parser(__doc__)
    arguments.add_argument("--params", type=size, default=size("256Mi"), help="default 256Mi")
    chosen = arguments.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        tensors = make_tensors(chosen.params)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, Path(folder) / "model.safetensors")
        del tensors
        show(rows(Path(folder), num_bytes, chosen.rounds), chosen.json)


def make_tensors(num_parameters: int) -> dict[str, torch.Tensor]:
    """Make whole layers until they have at least so many parameters."""
    tensors: dict[str, torch.Tensor] = {}
    made = layer = 0
    while made < num_parameters:
        for number, (name, shape) in enumerate(SHAPES.items()):
            tensor = torch.full(shape, float(layer * len(SHAPES) + number)).bfloat16()
            tensors[f"model.layers.{layer}.{name}.weight"] = tensor
            made += tensor.numel()
        layer += 1
    return tensors


def rows(folder: Path, num_bytes: int, rounds: int) -> list[Row]:
    """Time every way to load the folder's file."""
    source = open_checkpoint(folder)
    layout = layout_for(source, "cpu")
    arena = load_arena(source, layout).arena
    path = folder / "model.safetensors"
    memory = torch.ones(num_bytes, dtype=torch.uint8)
    runs = {
        "copy in place": copy_of(2 * num_bytes),
        "new copy": memory.clone,
        "arena in place": partial(fill, arena, source),
        "new arena": partial(load_arena, source, layout),
        "safe_open in place": partial(copy_with_safe_open, path, arena),
        "load_file": partial(load_file, path, backend="pread"),
    }
    found = interleaved(runs, rounds)
    return [
        Row(case, "", 1, 1, found.ratio(name, copy), more=_more(num_bytes, found.median_s(name)))
        for case, name, copy in CASES
    ]


def _more(num_bytes: int, seconds: float) -> Mapping[str, object]:
    return {"gb": num_bytes / 1e9, "gb_per_s": num_bytes / seconds / 1e9}


def copy_with_safe_open(path: Path, arena: Arena) -> None:
    """Load a file with safetensors' own reader, tensor by tensor, into an arena."""
    with safe_open(path, "pt") as file:
        for name in arena.layout.places:
            arena.view(name).copy_(file.get_tensor(name))


if __name__ == "__main__":
    main()
