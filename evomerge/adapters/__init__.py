"""Floor 3: adapters (LoRA, PEFT's format) in and out.

A parent may be `model+adapter`. `open.open_model` opens any reference: a plain model as the
checkpoint's own reader, one with an adapter as an `AdapterSource` that computes `base + scale * B @
A` when a tensor is read; nothing above knows the difference. `bind.py` fits an adapter's file to
a model's tensors, `config.py` says how modules are scaled and refuses by name what is not plain
LoRA. Out: `stack.py` combines adapters exactly, `truncate.py` to a lower rank with the residual,
`write.py` writes PEFT's format. `together.py` scores K candidates of adapters in one forward pass.

To support another kind of adapter, take its row out of `config._UNSUPPORTED` and give `Adapter`
what it adds to a tensor. Tested in `tests/adapters/` against numbers recorded with PEFT.
"""
