#!/usr/bin/env bash
# Measures everything that a GPU is needed for, within nine minutes, the most important things first.
#
#   bash scripts/measure_on_gpu.sh [OUT]          # on a GPU; OUT is a new folder, by default measured-DATE-TIME
#   bash scripts/measure_on_gpu.sh --toy [OUT]    # on any machine, in about a minute: tiny shapes, interpreted kernels
#
# OUT/summary.md holds the tables and OUT/results.jsonl a line for each measurement. Both are written as the run goes, so
# a run that is cut off loses only what was being measured. OUT/log.txt holds everything that was printed, and
# OUT/failing_cases.npz the inputs of kernels that computed something wrong.
#
# The checkout need not be installed. $PYTHON (default python3) needs jax with its GPU plugin, flax, jaxtyping, numpy and
# transformers; a package that is absent is named in the results. These may name checkouts, to be timed beside ours:
#   GPT_FAST                      gpt-fast
#   HSHARE_PUBLISHED              HShare's published code, and
#   HSHARE_PUBLISHED_FUNCTION     its kernel there, as MODULE:FUNCTION
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

toy=()
if [[ ${1:-} == --toy ]]; then
  toy=(--toy)
  shift
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
  # The interpreter's many small programs run for microseconds each, so they are compiled without optimisation.
  export XLA_FLAGS=${XLA_FLAGS---xla_backend_optimization_level=0}
fi
out=${1:-measured-$(date +%Y-%m-%d-%H%M%S)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# The weights and caches of a 7B model fill most of the device; the rest is left to torch.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.9}
# A worker that takes over from one that crashed need not compile everything again, nor need a second run.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/hshare-jax-measure-cache}
exec "${PYTHON:-python3}" -m scripts.bench.measure "$out" "${toy[@]}"
