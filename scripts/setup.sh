# Makes .venv beside this folder's parent if it is missing or out of date; sourced by the other scripts.
# torch comes first and by itself: any other way of asking for it may download gigabytes of CUDA packages.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=$(cat pyproject.toml scripts/constraints.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.evomerge-stamp 2>/dev/null)" != "$stamp" ]; then
    echo "setting up .venv …"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0
    .venv/bin/pip install -qq --disable-pip-version-check -c scripts/constraints.txt -e ".[dev]"
    echo "$stamp" > .venv/.evomerge-stamp
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
