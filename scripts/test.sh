#!/usr/bin/env bash
# All checks: formatting, lint, types, layering, tests. Options go to pytest, e.g. -m "not asset" or tests/engine.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv .venv --constraint constraints.txt --editable '.[dev]'
# the clients that the server is tested with would change the versions of what we need ourselves
make_venv .venv-clients --no-deps $(grep -v '^#' tests/serve/clients/requirements.txt)
bin=.venv/bin
$bin/ruff format --check --quiet . || { echo "Formatting differs: run $bin/ruff format ." >&2; exit 1; }
$bin/ruff check --quiet .
$bin/mypy --no-error-summary
layers=$($bin/lint-imports 2>&1) || { echo "$layers" >&2; exit 1; }
exec $bin/python -m pytest "$@"
