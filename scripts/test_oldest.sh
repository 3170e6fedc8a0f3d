#!/usr/bin/env bash
# The fast tests on the oldest versions of direct dependencies that pyproject.toml allows (torch stays the constrained one).
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
diff <(python3 scripts/oldest.py) constraints-oldest.txt || {
  echo "constraints-oldest.txt is out of date: run python3 scripts/oldest.py > constraints-oldest.txt" >&2
  exit 1
}
make_venv .venv-oldest --constraint constraints.txt --constraint constraints-oldest.txt \
  --editable '.[constrain,corpus,evaluate,hub,plan,serve]' hypothesis httpx jsonschema pytest pytest-timeout
exec .venv-oldest/bin/python -m pytest -m "not asset and not peer and not browser" -p no:cacheprovider "$@"
