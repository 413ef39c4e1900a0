"""What happens to freed memory, as far as glibc can be told."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.parametrize("setting", ["keep_freed_memory", "return_freed_memory"])
def test_what_becomes_of_freed_memory_is_set_where_glibc_is(setting):
    # In another process, because the setting holds for a whole process.
    program = f"from hshare_jax.host_memory import {setting}; print({setting}())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
