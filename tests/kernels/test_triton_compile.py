"""Triton kernels compiled ahead of time, without a GPU: registers, loads and instructions.

What is counted stands for speed as long as nobody has a GPU: no memory of a thread's own, one
16-byte load per source for eight elements of 16 bits, and not more instructions than were recorded.
"""

import re
import subprocess

import pytest
import torch

from evomerge.kernels.triton_launch import WARPS, kernel_of
from evomerge.kernels.triton_pack import Variant

triton = pytest.importorskip("triton", reason="triton is not installed: no kernel to compile")

THREADS = 32 * WARPS
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TIES = frozenset({"ELECT", "NORMALIZE", "THRESHOLDS"})
DELLA = frozenset({"DRAWS", "RANKS"})
EVERYTHING = TIES | DELLA | {"CEILINGS", "CUTS"}


def span(models, candidates=1, base=BF16, dtype=BF16, **changes):
    deltas = frozenset({"DELTAS"} if base else ())
    return Variant("span", models, candidates, dtype, base, dtype, features=deltas, **changes)


def mask(models, features, candidates=1, dtype=BF16, **changes):
    features = frozenset(features)
    return Variant("mask", models, candidates, dtype, dtype, dtype, features=features, **changes)


def local(models, method):
    return Variant("local", models, 1, BF16, BF16, BF16, method=method)


# instructions of a thread per element on the way that all but a tensor's last block take, sm_90,
# triton 3.9
RECORDED = {
    "span 1": (span(1), 14.5),
    "span 3": (span(3), 27.5),
    "span 3 without base": (span(3, base=None), 20.1),
    "span 3, 4 candidates": (span(3, 4), 58.8),
    "span 3, 8 candidates": (span(3, 8), 93.5),
    "span 3, dither": (span(3, dither=True), 63.6),
    "span 3, float32": (span(3, base=FP32, dtype=FP32), 24.2),
    "span 8": (span(8), 53.1),
    "span 8 without base, 8 candidates": (span(8, 8, None), 167.4),
    "span 8, 8 candidates": (span(8, 8), 191.5),
    "ties 1": (mask(1, TIES), 35.8),
    "ties 3": (mask(3, TIES), 65.1),
    "ties 3, float16": (mask(3, TIES, dtype=FP16), 65.1),
    "ties 3, not normalized": (mask(3, TIES - {"NORMALIZE"}), 40.9),
    "ties 3, cuts": (mask(3, TIES | {"CUTS"}), 86.0),
    "ties 4": (mask(4, TIES), 77.2),
    "ties 5": (mask(5, TIES), 96.9),
    "ties 8": (mask(8, TIES), 143.5),
    "breadcrumbs 3": (mask(3, {"THRESHOLDS", "CEILINGS"}), 35.0),
    "dare 3": (mask(3, {"DRAWS"}), 60.5),
    "dare 3, 4 candidates": (mask(3, {"DRAWS"}, 4), 118.1),
    "dare 3, 8 candidates": (mask(3, {"DRAWS"}, 8), 182.6),
    "dare 8": (mask(8, {"DRAWS"}), 130.4),
    "dare 4, 8 candidates": (mask(4, {"DRAWS"}, 8), 220.1),
    "dare_ties 3": (mask(3, {"DRAWS", "ELECT", "NORMALIZE"}), 97.4),
    "della 3": (mask(3, DELLA), 74.0),
    "della 3, 8 candidates": (mask(3, DELLA, 8), 214.0),
    "della_ties 4": (mask(4, DELLA | {"ELECT", "NORMALIZE"}), 128.8),
    "everything 4": (mask(4, EVERYTHING, dither=True), 254.5),
    "everything 8": (mask(8, EVERYTHING, dither=True), 455.9),
    "everything 4, 8 candidates": (mask(4, EVERYTHING - {"ELECT", "NORMALIZE"}, 8), 789.6),
    "sce 3": (local(3, "sce"), 89.4),
    "sce 8": (local(8, "sce"), 203.5),
    "ram 8": (local(8, "ram"), 94.0),
    "consensus 8": (local(8, "consensus"), 93.6),
    "nearswap": (local(1, "nearswap"), 31.0),
}
QUICK = ("span 3", "ties 3", "dare 3", "sce 3")
WORDS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


def configurations():
    for name in RECORDED:
        for capability in (80, 90):
            quick = name in QUICK and capability == 90
            marks = () if quick else pytest.mark.slow
            yield pytest.param(name, capability, marks=marks, id=f"{name}, sm_{capability}")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Return a function that compiles a kernel, and gives its resources and its machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def run(kernel, constants, signature, capability):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": WARPS, "enable_fp_fusion": False}
        target = GPUTarget("cuda", capability, 32)
        cubin = triton.compile(source, target=target, options=options).asm["cubin"]
        path = tmp_path / "kernel.cubin"
        path.write_bytes(cubin)
        return dumped(path, "-res-usage"), dumped(path, "-sass")

    return run


def dumped(path, what):
    command = [triton.knobs.nvidia.cuobjdump.path, what, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(text):
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text))
    return {name: int(number) for name, number in found.items()}


def common_way(code):
    """Return the instructions of the blocks that every program runs, except a tensor's last.

    The others hold stores of single elements, or call the division of very small numbers.
    """
    lines = [(int(address, 16), line) for address, line in WORDS.findall(code)]
    calls = [int(target, 16) for target in re.findall(r"CALL\.\S+ .*?(0x[0-9a-f]+)", code)]
    starts = {int(target, 16) for target in re.findall(r"BRA .*?(0x[0-9a-f]+)", code)}
    blocks, ended = [], True
    for address, line in lines:
        if address >= min(calls, default=address + 1) or line.startswith("NOP"):
            continue
        if ended or address in starts:
            blocks.append([])
        blocks[-1].append(line)
        ended = re.search(r"\b(BRA|EXIT|RET|BSYNC)\b", line) is not None
    cold = re.compile(r"\bCALL\b|\bSTG\.E(\.U16)? ")
    return [line for block in blocks if not any(map(cold.search, block)) for line in block]


@pytest.mark.parametrize(("name", "capability"), list(configurations()))
def test_kernels_compile_to_what_was_recorded(compiled, name, capability):
    variant, recorded = RECORDED[name]
    kernel, constants = kernel_of(variant)
    signature = {"blocks": "*i32", "integers": "*i64", "numbers": "*fp32"}
    usage, code = compiled(kernel, constants, signature, capability)
    used = resources(usage)
    assert used["STACK"] == used["LOCAL"] == used["SHARED"] == 0, "registers spill, or data moves"
    inputs = variant.models * variant.source.itemsize
    inputs += 0 if variant.base is None else variant.base.itemsize
    per_thread = variant.block // THREADS
    assert code.count("LDG.E.128") == inputs * per_thread / 16, "loads are not 16 bytes wide"
    assert not re.search(r"\b(LDL|STL|FFMA)\b", code) or "MUFU.RCP" in code, "adds are fused"
    way = common_way(code)
    wide_stores = sum("STG.E.128" in line for line in way)
    assert wide_stores == variant.candidates * variant.out.itemsize * per_thread / 16
    per_element = len(way) / per_thread
    if capability == 90:
        assert per_element <= 1.05 * recorded, f"{per_element:.1f}, {used['REG']} registers"


def test_checksums_are_read_16_bytes_at_a_time(compiled):
    from evomerge.kernels.triton_kernels import written_kernel
    from evomerge.kernels.triton_launch import SLOTS, WORDS

    signature = {"blocks": "*i32", "integers": "*i64", "totals": "*i64", "T": "i32"}
    usage, code = compiled(written_kernel, {"SLOTS": SLOTS, "BLOCK": WORDS}, signature, 90)
    used = resources(usage)
    assert used["STACK"] == used["LOCAL"] == 0
    assert code.count("LDG.E.128") == WORDS * 8 // 16 // THREADS
