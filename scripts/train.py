#!/usr/bin/env python3
"""The same as `hshare-jax train`, for a checkout."""

import sys

from hshare_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
