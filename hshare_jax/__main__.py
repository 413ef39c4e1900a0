"""`python -m hshare_jax` is the command `hshare-jax`."""

import sys

from hshare_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
