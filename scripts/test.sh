#!/usr/bin/env bash
# Everything that must pass: set-up, checks, all tests. What CI runs.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
# the GPU kernels are interpreted and compiled without a GPU
.venv/bin/python -c "import triton" 2>/dev/null ||
    .venv/bin/pip install -qq --disable-pip-version-check -c scripts/constraints.txt triton
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python scripts/make_zoo.py
.venv/bin/python -m pytest -q -m "not gpu and not oracle" "$@"
