#!/usr/bin/env bash
# Resolve pyproject.toml in a throw-away environment and write exact versions of everything:
#   requirements.lock        what `assay` needs to run
#   requirements-test.lock   what tests and checks need besides
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# Names and versions alone: a direct reference would record where this machine found a wheel.
frozen() {
  pip list --format=json --exclude pip --exclude setuptools --exclude assay |
    "$python" -c 'import json, sys; print(*(p["name"] + "==" + p["version"] for p in json.load(sys.stdin)), sep="\n")' |
    sed 's/+cpu$//' | LC_ALL=C sort
}
pip install --quiet .
frozen > "$scratch/base"
pip install --quiet '.[test,dev]'
frozen > "$scratch/all"
cp "$scratch/base" requirements.lock
comm -13 "$scratch/base" "$scratch/all" > requirements-test.lock
