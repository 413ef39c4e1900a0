#!/usr/bin/env bash
# Builds the package as for PyPI, checks it, and installs and tests the wheel on each Python that is named.
#
#   bash scripts/check_install.sh python3.11 python3.12 python3.13
#   JAX=0.12.0 bash scripts/check_install.sh python3.13        with this jax; without it, the newest that is allowed
#   TESTS=tests/cli bash scripts/check_install.sh python3.12   these tests; without it, all
#
# Each Python gets a fresh virtual environment in a temporary folder, without torch. The tests that need torch are
# skipped there. The tests import the installed wheel, not the checkout; those of scripts/ alone import the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -gt 0 ]] || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install=(-m pip install --quiet --no-compile --disable-pip-version-check)

echo "== build"
"$1" -m venv "$work/build"
builder=$work/build/bin/python
"$builder" "${install[@]}" build twine check-wheel-contents
git archive HEAD | (mkdir "$work/source" && tar -x -C "$work/source")
"$builder" -m build --outdir "$work/dist" "$work/source" > "$work/build.log" || { tail -50 "$work/build.log"; exit 1; }
"$builder" -m twine check --strict "$work"/dist/*
"$work/build/bin/check-wheel-contents" "$work"/dist/*.whl
ls "$work/dist"

for python in "$@"; do
  echo "== $python${JAX:+, jax $JAX}"
  rm -rf "$work/own"
  "$python" -m venv "$work/own"
  own=$work/own/bin
  "$own/python" "${install[@]}" "$(echo "$work"/dist/*.whl)[test]" ${JAX:+"jax==$JAX" "jaxlib==$JAX"}
  (
    cd "$work"
    "$own/hshare-jax" info
    "$own/hshare-jax" generate "Name the primary colours." --max-new-tokens 16
    # Keeps the current folder, which may be the checkout, off the import path, also in the tests' own processes.
    export PYTHONSAFEPATH=1
    "$own/python" -m pytest -q -n 2 --dist loadfile -c "$root/pyproject.toml" --rootdir "$root" "$root/${TESTS:-tests}"
  )
done
