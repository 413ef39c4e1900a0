"""Freed memory is kept or returned to the system where glibc can be told so."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.parametrize("setting", ["keep_freed_memory", "return_freed_memory"])
def test_the_use_of_freed_memory_can_be_set_under_glibc(setting):
    # In another process, because the setting holds for a whole process.
    program = f"from hshare_jax.host_memory import {setting}; print({setting}())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
