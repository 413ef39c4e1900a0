#!/usr/bin/env bash
# Compiles whole decode steps for an H200 on a machine without a GPU, and fails beyond the limits that the Python file names.
#
#   bash scripts/check_h200_compile.sh [PYTHON]     PYTHON has hshare-jax installed; default .venv-test/bin/python
#
# The Triton kernels are compiled too if PYTHON has the extra `triton`. If not, the script says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:-.venv-test/bin/python}
bash scripts/with_compilers.sh "$python" gpu scripts.check_h200_compile
exec bash scripts/with_compilers.sh "$python" gpu scripts.check_triton --if-installed
