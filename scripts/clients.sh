#!/usr/bin/env bash
# The tests of real clients alone. litellm, langchain, llama-index and lm-eval live in a virtual environment of their own.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv .venv --constraint constraints.txt --editable '.[dev]'
make_venv .venv-clients $(grep -v '^#' tests/serve/clients/requirements.txt)
exec .venv/bin/python -m pytest tests/serve/clients "$@"
