#!/usr/bin/env bash
# Runs every check of this repository: format, lint, types, compilation for a GPU, tests.
#
#   bash scripts/test.sh                               everything, in about twenty minutes on two cores
#   bash scripts/test.sh --quick                       format, lint, types, and the tests that matter most: four minutes
#   bash scripts/test.sh tests/kernels/test_labels.py  the static checks, then one file of tests
#
# Further arguments go to pytest.
#
# The script uses the active virtual environment, or makes .venv-test with $PYTHON (default python3, 3.11 or newer). It
# installs only when pyproject.toml or the checkout's place has changed since the last time.
#
# On Linux, PyPI's torch brings several gigabytes of CUDA packages that no test uses. If pip knows a CPU build of the
# same version (from PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL or its configuration), it takes that, because 2.13.0+cpu sorts
# higher. EXTRAS=test leaves torch out, and the tests that need it are skipped; the default is EXTRAS=test,torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tests of --quick: the order of imports; kernels and selection against their definitions; whole decodes, prefill,
# plans and generation against oracles; and the README's first lines.
quick_tests=(
  tests/test_architecture.py
  tests/test_words.py
  tests/kernels/test_top_k.py
  tests/kernels/test_reference_attention.py
  tests/kernels/test_pallas.py::test_sparse_decode_equals_the_oracle
  tests/kernels/test_pallas.py::test_selection_by_labels_equals_the_definition_in_every_layout
  tests/methods/hshare/test_share_plan.py
  tests/methods/hshare/test_settings.py
  tests/test_decode_step.py::test_a_whole_shared_decode_equals_the_oracle
  tests/test_decode_rows.py::test_a_budget_that_covers_the_row_equals_dense
  tests/test_prefill.py
  tests/test_generate.py
  tests/models/test_logits.py
  tests/cli/test_main.py
  tests/test_readme.py::test_the_first_lines_of_the_readme_answer
)

quick=false
if [[ ${1:-} == --quick ]]; then
  quick=true
  shift
  set -- "${quick_tests[@]}" "$@"
fi

section() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

venv=${VIRTUAL_ENV:-$PWD/.venv-test}
if [[ ! -x $venv/bin/python ]]; then
  section "create $venv"
  "${PYTHON:-python3}" -c 'import sys; assert sys.version_info >= (3, 11), "python 3.11 or newer is needed: set PYTHON"'
  "${PYTHON:-python3}" -m venv "$venv"
fi
python=$venv/bin/python

# The checkout's place counts because an editable install from another checkout would test that checkout's sources. The
# environment is asked where it finds the package, because another install may have replaced the editable one.
stamp=$venv/hshare-jax-test-extra
extras=${EXTRAS:-test,torch}
wanted=$(cat pyproject.toml && pwd -P && echo "$extras")
found=$(cd / && "$python" -c 'from importlib import util; print(getattr(util.find_spec("hshare_jax"), "origin", None))')
if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" || $found != "$(pwd -P)/hshare_jax/__init__.py" ]]; then
  section "install the package, editable, with the extras $extras"
  # Python compiles a module when it is first imported; of these packages few are.
  "$python" -m pip install --quiet --no-compile --disable-pip-version-check --editable ".[$extras]"
  echo "$wanted" > "$stamp"
fi

section "ruff format"
"$python" -m ruff format --check .
section "ruff check"
"$python" -m ruff check .
# A file of tests stays on one worker, so that its compiled functions and fixtures are made once. Files run in the order
# of their names, because ordered by their number of tests the longest file, which has one test, would come last. Pass
# -n 0 to debug.
pytest=("$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@")
section "pytest, and beside it pyright and programs compiled for H200s"
"$python" -m pyright --pythonpath "$python" &
checks=("$! pyright")
if ! $quick && [[ $(uname -s) == Linux ]]; then  # the CUDA compiler's wheels are for Linux alone; no GPU is needed
  (bash scripts/check_h200_compile.sh "$python" && bash scripts/check_many_devices.sh "$python" --layers 2) &
  checks+=("$! compiling for H200s")
fi
"${pytest[@]}" && passed=true || passed=false
if ! $quick && [[ " $* " != *" tests"* ]]; then  # unless a file of tests is named
  section "pytest of the Triton kernels, in Triton's interpreter"
  TRITON_INTERPRET=1 "$python" -m pytest -n 2 tests/kernels/test_triton.py || passed=false
  section "pytest on a CPU that counts as eight devices"
  JAX_NUM_CPU_DEVICES=8 "$python" -m pytest -n 2 tests/devices || passed=false
fi
for check in "${checks[@]}"; do
  wait "${check%% *}" || { passed=false; section "failed: ${check#* }"; }
done
section "done"
$passed
