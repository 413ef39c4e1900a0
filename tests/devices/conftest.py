"""Tests on eight devices, which a CPU counts as if JAX_NUM_CPU_DEVICES=8. Otherwise the files here are not collected.

JAX_NUM_CPU_DEVICES=8 python -m pytest tests/devices
"""

import os

collect_ignore_glob = [] if os.environ.get("JAX_NUM_CPU_DEVICES") == "8" else ["test_*.py"]
