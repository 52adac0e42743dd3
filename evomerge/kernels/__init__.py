"""Floor 2: arithmetic on flat tensors. torch, C and Triton; knows nothing of models or recipes.

Two kernels carry out most merge methods. *span* is a weighted sum of the sources or of their task
vectors; *mask* sums task vectors of which some elements are dropped (the smallest, or random ones),
as they are or by elected sign. What a kernel does to one tensor is a small frozen table of numbers
(`tables.py`), which the methods make on the host in float64. Other methods bring an expression of
their own, over elements or over whole tensors.

The way of a candidate: `launch.py` says what a launch takes and tells, all tensors at once;
`dispatch.py` gives each job to the first implementation that can run it. `reference.py` defines
what comes out, in plain torch. `native.py` packs jobs for the kernels in C (`native.c`, `strips.h`,
compiled by `compiler.py` when first needed). `triton_launch.py` and `triton_pack.py` do so for
`triton_kernels.py` on CUDA. `streamed.py` brings sources in host memory to a device piece by piece.
All give equal bits.

`masks.py` draws random masks. `statistics.py` knows once what holds for every candidate of a
search: Gram matrices and norms (`sums.py`), order statistics (`histograms.py`; `ladders.py` looks
many up at once; `tie_cuts.py`), ranks (`ranks.py`); in C by `native_statistics.py`.

To add an implementation: a file, and its row in `dispatch.KERNELS`; `tests/contracts/kernel.py`
holds it to the reference's bits. To let the kernels in C and Triton run a method's own expression:
a `Fused` table, and its body in `native.c` and `triton_kernels.py`. Letters: M models, P elements
of one flat tensor.
"""
