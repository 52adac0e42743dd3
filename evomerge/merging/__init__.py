"""Floor 4: carry out a recipe.

`make_plan` binds a recipe to models and checks whatever can be checked without reading a tensor
(`groups.py`: tensors that take the same values whatever the numbers are); `Merger` carries plans
out, all tensors of a candidate in one launch; a sink puts them into a live model (`LiveWeights`) or
a folder (`write_folder`), with the same bits. `run.merge` goes from a recipe to a folder.
`provenance.py` writes beside the weights what they were made of.

`parts.py` says which layers are made alike and which tensors each model gives them; `vocabulary.py`
brings models with different tokens to one vocabulary; `bind.py` does both for opened models;
`places.py` finds each stored tensor in a live model's memory; `memory.py` plans where models lie;
`adapter.py` writes a merge of adapters as one adapter.

To add a sink, consume `execute` and take the digest of what was stored. A new kind of model, such
as one with an adapter, is a new `TensorSource`, as in `adapters/`; nothing changes here.
"""
