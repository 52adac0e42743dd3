"""Floor 2: tensors and sidecars of models on disk. torch and safetensors.

A model comes in as `locate` (which folder) -> `open_checkpoint` (a `TensorSource` over memory maps)
and goes out as `write_checkpoint` (tensors) with `copy_sidecars` (everything else). Nothing is read
before it is asked for, files are checked before anything is computed, and what is written appears
whole or not at all. Names are in one order whatever the shards. `arena.py` holds a model in one
buffer per device and dtype.

To add another kind of source (adapters, aligned weights), write a `TensorSource`; nothing above
changes. To teach a new family of models, see the tables on top of `architecture.py`. Tested in
`tests/checkpoints/` against safetensors' own reader and writer and against transformers.
"""
