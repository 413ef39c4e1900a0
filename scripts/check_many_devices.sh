#!/usr/bin/env bash
# Compiles LLaMA3-70B's decode steps for 8 and 16 H200s, or TPUs, on a machine that has none, and fails beyond the limits
# that the Python file names.
#
#   bash scripts/check_many_devices.sh [PYTHON] [--tpu] [--layers 80]     PYTHON has hshare-jax installed; default
#                                                                         .venv-test/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv-test/bin/python kind=gpu
if [[ ${1:-} != -* && -n ${1:-} ]]; then
  python=$1
  shift
fi
[[ " $* " != *" --tpu "* ]] || kind=tpu
exec bash scripts/with_compilers.sh "$python" "$kind" scripts.check_many_devices "$@"
