# Sourced by the other scripts: `make_venv DIRECTORY REQUIREMENT...` makes a virtual environment with the project
# installed in it, or brings an existing one up to date. Does nothing when pyproject.toml and constraints.txt are unchanged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_venv() {
  local directory=$1
  shift
  local python=${PYTHON:-python3} stamp
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
    echo "Gristmill needs Python 3.11 to 3.13; $("$python" --version) was found. Set PYTHON to another one." >&2
    return 1
  fi
  stamp=$directory/.installed-$(cat pyproject.toml constraints*.txt <(echo "$@") | cksum | cut -d' ' -f1)
  if [ -e "$stamp" ]; then
    return
  fi
  echo "Installing into $directory (a few minutes the first time) ..." >&2
  "$python" -m venv "$directory" || {
    echo "python -m venv failed. On Debian and Ubuntu: apt-get install python3-venv" >&2
    return 1
  }
  "$directory/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  touch "$stamp"
}
