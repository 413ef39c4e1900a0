"""`python -m hshare_jax` is the command `hshare-jax`. An interrupt of the imports at its start ends it quietly too."""

import sys


def main() -> int:
    """Runs the command line. Returns the exit status."""
    try:
        from hshare_jax.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
