#!/usr/bin/env bash
# From nothing to a merge that beats its parents: set-up, tiny models, a search on two Ray workers, export.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
.venv/bin/python scripts/make_zoo.py
rm -rf runs/quickstart   # the quickstart always starts its study anew
.venv/bin/evomerge search configs/quickstart.yaml
.venv/bin/evomerge export configs/quickstart.yaml --weights runs/quickstart/winner
echo
echo "The study is in runs/quickstart; look again with: .venv/bin/evomerge status configs/quickstart.yaml"
