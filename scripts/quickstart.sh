#!/usr/bin/env bash
# From raw text to a chat model and a report, on a bare machine. Options go to `gristmill quickstart`.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv .venv --constraint constraints.txt --editable '.[corpus,evaluate,serve,verify]'
exec .venv/bin/gristmill quickstart "$@"
