#!/usr/bin/env bash
# Runs a module with compilers for accelerators that this machine lacks.
#
#   bash scripts/with_compilers.sh PYTHON gpu|tpu MODULE [OPTION...]     PYTHON has hshare-jax installed
#
# XLA's CUDA compiler comes in two wheels of the same version as jax, and its assembler in two of CUDA's. The compiler
# for TPUs is libtpu. They go into separate environments, .venv-h200 and .venv-tpu, which see PYTHON's packages, because
# in PYTHON's environment they would make jax look for a GPU or a TPU on every start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=$1 kind=$2
shift 2
version=$("$base" -c 'from importlib.metadata import version; print(version("jax"))')
packages=$("$base" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
case $kind in
  gpu) venv=.venv-h200 compilers=("jax-cuda13-pjrt==$version" "jax-cuda13-plugin==$version")
       compilers+=('nvidia-cuda-nvcc>=13,<14' 'nvidia-nvvm>=13,<14') ;;  # the assembler and its library
  # jax names the libtpu that belongs to it; others refuse its programs.
  tpu) venv=.venv-tpu compilers=("$("$base" -c 'from importlib.metadata import requires
print(next(r.split(";")[0].strip() for r in requires("jax") if r.startswith("libtpu")))')") ;;
  *) echo "with_compilers.sh: $kind is neither gpu nor tpu" >&2; exit 2 ;;
esac
stamp=$venv/ready
wanted="$version $packages ${compilers[*]}"
if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  rm -rf "$venv"
  "$base" -m venv "$venv"
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  echo "import site; site.addsitedir('$packages')" > "$site/base.pth"
  "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps "${compilers[@]}"
  echo "$wanted" > "$stamp"
fi
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 exec "$venv/bin/python" -m "$@"
