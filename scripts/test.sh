#!/usr/bin/env bash
# Runs every check of this repository: format, lint, types, compilation for a GPU, tests. Extra arguments go to pytest:
#
#   bash scripts/test.sh                       everything
#   bash scripts/test.sh tests/kernels/test_labels.py  the static checks, then one file of tests
#
# Uses the active virtual environment, or makes .venv-test with $PYTHON (default python3, 3.11 or newer). Installs only
# when pyproject.toml or the checkout's place has changed since the last time.
#
# On Linux, PyPI's torch draws several gigabytes of CUDA packages that no test uses. Where pip is told of a CPU build of
# the same version (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL or pip's configuration), it takes that: 2.13.0+cpu sorts higher.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

section() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

venv=${VIRTUAL_ENV:-$PWD/.venv-test}
if [[ ! -x $venv/bin/python ]]; then
  section "create $venv"
  "${PYTHON:-python3}" -c 'import sys; assert sys.version_info >= (3, 11), "python 3.11 or newer is needed: set PYTHON"'
  "${PYTHON:-python3}" -m venv "$venv"
fi
python=$venv/bin/python

# The place counts too: an editable install made from another checkout would test that checkout's sources. And the
# environment is asked where it takes the package from: another install may have replaced the editable one since.
stamp=$venv/hshare-jax-test-extra
wanted=$(cat pyproject.toml && pwd -P)
found=$(cd / && "$python" -c 'from importlib import util; print(getattr(util.find_spec("hshare_jax"), "origin", None))')
if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" || $found != "$(pwd -P)/hshare_jax/__init__.py" ]]; then
  section "install the package, editable, with its test extra"
  "$python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
  echo "$wanted" > "$stamp"
fi

section "ruff format"
"$python" -m ruff format --check .
section "ruff check"
"$python" -m ruff check .
section "pyright, and beside it programs compiled for an H200"
"$python" -m pyright --pythonpath "$python" &
pyright=$!
if [[ $(uname -s) == Linux ]]; then  # the CUDA compiler's wheels are for Linux alone; no GPU is needed
  bash scripts/check_h200_compile.sh "$python"
fi
wait "$pyright"
section "pytest"
# A file of tests stays on one worker, so that its compiled functions and fixtures are made once; in the order of names,
# for by number of tests the longest file, with one test, would come last. Pass -n 0 to debug.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
