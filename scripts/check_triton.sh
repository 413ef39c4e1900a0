#!/usr/bin/env bash
# Tests the Triton kernels in Triton's interpreter, and compiles them for an H200. Neither needs a GPU.
#
#   bash scripts/check_triton.sh [PYTHON]     PYTHON is version 3.12 or newer; default python3.12
#
# jax-triton needs a newer Python than this package does, and it does not know the newest jax. So all packages go into
# an environment of their own, .venv-triton, which sees the sources of this checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=${1:-python3.12} venv=.venv-triton
if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
  echo "check_triton.sh: '$base' is no Python 3.12 or newer; name one: bash scripts/check_triton.sh PYTHON" >&2
  exit 2
fi
python=$PWD/$venv/bin/python stamp=$venv/ready
wanted=$("$base" --version && cat pyproject.toml)
if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  echo "== install jax-triton, Triton and XLA's CUDA compiler into $venv"
  rm -rf "$venv"
  "$base" -m venv "$venv"
  "$python" > "$venv/requirements.txt" << 'END'
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["triton"], sep="\n")
print(*(line for line in extras["test"] if line.startswith(("beartype", "hypothesis", "pytest"))), sep="\n")
END
  pip=("$python" -m pip install --quiet --no-compile --disable-pip-version-check)
  "${pip[@]}" -r "$venv/requirements.txt"
  version=$("$python" -c 'from importlib.metadata import version; print(version("jax"))')
  "${pip[@]}" --no-deps "jax-cuda13-pjrt==$version" "jax-cuda13-plugin==$version" 'nvidia-cuda-nvcc>=13,<14' \
    'nvidia-nvvm>=13,<14'  # without the rest of CUDA, which only a GPU needs
  echo "$wanted" > "$stamp"
fi

export JAX_PLATFORMS=cpu PYTHONPATH=$PWD
echo "== the kernels in Triton's interpreter"
TRITON_INTERPRET=1 "$python" -m pytest -q -n 0 -k triton tests/kernels/test_implementations.py \
  tests/kernels/test_prefill_attention.py tests/kernels/test_triton.py
echo "== the kernels compiled for an H200"
TRITON_INTERPRET=0 "$python" -m scripts.check_triton
