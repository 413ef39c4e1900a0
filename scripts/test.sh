#!/usr/bin/env bash
# Runs every check of this repository: format, lint, types, tests. Extra arguments go to pytest:
#
#   bash scripts/test.sh                       everything
#   bash scripts/test.sh tests/test_labels.py  the static checks, then one file of tests
#
# Uses the active virtual environment, or makes .venv-test with $PYTHON (default python3, 3.11 or newer). Installs only when
# pyproject.toml or the checkout's place has changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

section() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

venv=${VIRTUAL_ENV:-$PWD/.venv-test}
if [[ ! -x $venv/bin/python ]]; then
  section "create $venv"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(f"python 3.11 or newer is needed, this is {sys.version}; set PYTHON" if sys.version_info < (3, 11) else 0)'
  "${PYTHON:-python3}" -m venv "$venv"
fi
python=$venv/bin/python

# The place counts too: an editable install made from another checkout would test that checkout's sources. The environment is asked
# where it takes the package from, because a plain `pip install` may have replaced the editable one since.
stamp=$venv/hshare-jax-test-extra
wanted=$("$python" -c 'import hashlib, pathlib; print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest(), pathlib.Path.cwd())')
found=$(cd "$venv" && "$python" -c 'import importlib.util as u; s = u.find_spec("hshare_jax"); print(s and s.origin)')
if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" || $found != "$PWD/hshare_jax/__init__.py" ]]; then
  section "install the package, editable, with its test extra"
  "$python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
  echo "$wanted" > "$stamp"
fi

section "ruff format"
"$python" -m ruff format --check .
section "ruff check"
"$python" -m ruff check .
section "pyright"
"$python" -m pyright --pythonpath "$python"
section "pytest"
exec "$python" -m pytest "$@"
