"""Floor 2: arithmetic on flat tensors. torch only; knows nothing of models, files or recipes.

Two kernels carry out every merge method. *span* is a weighted sum of the sources or of their task vectors; *mask* sums task
vectors of which some elements are dropped (the smallest, or random ones), as they are or by elected sign. What they do to one
tensor is a small frozen table of numbers (`tables.py`), made on the host in float64 by the methods.

`reference.py` defines both kernels: float32, sources in recipe order, multiply and add apart, one rounding at the store. Every
other implementation must give the same bits. `masks.py` draws random masks, `statistics.py` computes what holds for every
candidate of a search (Gram matrices, magnitude histograms, L1 norms) once.

To add a kernel's faster version: its own file with functions of the same names and arguments as in `reference.py`, tested
bitwise against it. Letters: M models, P elements of one tensor, flattened.
"""
