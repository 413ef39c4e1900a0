#!/usr/bin/env bash
# Runs the library of CPU kernels under the sanitizers of gcc: memory and undefined behaviour by the tests of the
# kernels, races by tests/native. It takes about six minutes on two cores, and needs g++ and the test extra. The
# sanitizers do not see what a matrix unit (AMX) reads and writes.
#
#   bash scripts/check_native.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(command -v python3)

echo "== races"
g++ -std=gnu++17 -O1 -g -fsanitize=thread tests/native/crew.cc -o "$work/crew" -pthread
"$work/crew"

echo "== memory and undefined behaviour"
git ls-files -z | xargs -0 cp -P --parents --target-directory "$work"
cd "$work"
sanitize="-fsanitize=address,undefined -fno-sanitize-recover=all"
CFLAGS="$sanitize -O1 -g" LDFLAGS="$sanitize" "$python" setup.py --quiet build_ext --inplace
test -f kernels/native/libhshare_native.so
# The interpreter is not compiled with the sanitizer, so its library must be there first; leaks are Python's own.
libraries="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
LD_PRELOAD=$libraries ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$work "$python" -m pytest -q -p no:cacheprovider -n 0 \
  tests/kernels/test_native.py tests/kernels/test_implementations.py -k "native or library or shape" "$@"
