#!/usr/bin/env bash
# Compiles whole decode steps for an H200 on a machine without a GPU, and fails beyond the limits that the Python file names.
#
#   bash scripts/check_h200_compile.sh [PYTHON]     PYTHON has hshare-jax installed; default .venv-test/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec bash scripts/with_compilers.sh "${1:-.venv-test/bin/python}" gpu scripts.check_h200_compile
