"""The Triton kernels give the reference's bits: by triton's interpreter, and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: nothing to run"
)
ROOT = Path(__file__).parents[2]


def run_cases(*arguments, **environment):
    """Run the cases in a process of their own; see `triton_cases.py`."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_cases", *arguments]
    environment = os.environ | environment
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " 0 differ" in run.stdout


def test_three_models_by_the_interpreter():
    run_cases("cpu", "few", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_all_cases_by_the_interpreter():
    run_cases("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_all_cases_on_a_gpu():
    run_cases("cuda", TRITON_INTERPRET="0")
