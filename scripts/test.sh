#!/usr/bin/env bash
# All checks: formatting, lint, types, layering, tests. Options go to pytest, e.g. -m "not asset" or tests/engine.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv .venv --constraint constraints.txt --editable '.[dev]'
bin=.venv/bin
$bin/ruff format --check --quiet . || { echo "Formatting differs: run $bin/ruff format ." >&2; exit 1; }
$bin/ruff check --quiet .
$bin/mypy --no-error-summary
$bin/lint-imports --no-timings >/dev/null || { $bin/lint-imports; exit 1; }
exec $bin/python -m pytest "$@"
