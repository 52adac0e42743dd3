#!/usr/bin/env bash
# Everything that must pass: set-up, checks, all tests. What CI runs.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python scripts/make_zoo.py
.venv/bin/python -m pytest -q -m "not gpu and not oracle" "$@"
