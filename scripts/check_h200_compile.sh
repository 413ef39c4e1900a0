#!/usr/bin/env bash
# Compiles whole decode steps for an H200 on a machine without a GPU, and fails beyond the limits that the Python file names.
#
#   bash scripts/check_h200_compile.sh [PYTHON]     PYTHON has hshare-jax installed; default .venv-test/bin/python
#
# XLA's CUDA compiler comes in two wheels of the same version as jax. They go into a separate environment, .venv-h200,
# which sees PYTHON's packages, because in PYTHON's environment they would make jax look for a GPU on every start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=${1:-.venv-test/bin/python}
version=$("$base" -c 'from importlib.metadata import version; print(version("jax"))')
packages=$("$base" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
stamp=.venv-h200/ready
if [[ $(cat "$stamp" 2>/dev/null) != "$version $packages" ]]; then
  rm -rf .venv-h200
  "$base" -m venv .venv-h200
  site=$(.venv-h200/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  echo "import site; site.addsitedir('$packages')" > "$site/base.pth"
  .venv-h200/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps \
    "jax-cuda13-pjrt==$version" "jax-cuda13-plugin==$version"
  echo "$version $packages" > "$stamp"
fi
JAX_PLATFORMS=cpu .venv-h200/bin/python -m scripts.check_h200_compile
