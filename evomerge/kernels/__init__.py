"""Floor 2: arithmetic on flat tensors. torch only; knows nothing of models, files or recipes.

Two kernels carry out most merge methods. *span* is a weighted sum of the sources or of their task
vectors; *mask* sums task vectors of which some elements are dropped (the smallest, or random ones),
as they are or by elected sign. What a kernel does to one tensor is a small frozen table of numbers
(`tables.py`), which the methods make on the host in float64. Other methods bring an expression of
their own, over elements or over whole tensors.

`reference.py` defines both kernels, and runs the expressions of methods that are neither.
`masks.py` draws random masks. `statistics.py` computes once what holds for every candidate of a
search: Gram matrices, order statistics (`histograms.py`), ranks (`ranks.py`), L1 norms.

To add a faster version of a kernel: a file with a function of the same name and arguments as in
`reference.py`, tested to give the same bits. Letters: M models, P elements of one flat tensor.
"""
