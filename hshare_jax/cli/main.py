"""The command line: `hshare-jax generate`, `calibrate`, `convert`, `eval`, `plot`, `train` and `info`."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from hshare_jax.cli.calibrate import add_calibrate
from hshare_jax.cli.convert import add_convert, add_info
from hshare_jax.cli.eval import add_eval
from hshare_jax.cli.generate import add_generate
from hshare_jax.cli.options import FAILURE, USAGE, Parser, UsageError
from hshare_jax.cli.plot import add_plot
from hshare_jax.cli.train import add_train

# What only one command needs is imported by it: a start stays short.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for a failure, 2 for a mistake in how it was called."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UsageError as error:
        return _complain(str(error), USAGE)
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILURE
        if isinstance(error, OSError) and error.filename is not None:
            return _complain(f"{error.filename}: {error.strerror}", FAILURE)
        return _complain(str(error) or type(error).__name__, FAILURE)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # how JAX says that a device is out of memory
            raise
        return _complain(f"out of memory, take fewer or shorter texts at once: {error}", FAILURE)
    except KeyboardInterrupt:
        return 130


def _complain(message: str, status: int) -> int:
    print(f"hshare-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hshare-jax", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hshare-jax {version('hshare-jax')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    add_generate(commands.add_parser("generate", help="continue or answer prompts"))
    add_calibrate(commands.add_parser("calibrate", help="make label channels and a plan for all prompts from texts"))
    add_convert(commands.add_parser("convert", help="write a model as an Orbax checkpoint that loads fast"))
    add_eval(commands.add_parser("eval", help="measure what sparse decoding costs, on tasks and on any text"))
    add_plot(
        commands.add_parser("plot", help="draw how alike the choices are, a plan, and quality against reads or time")
    )
    add_train(commands.add_parser("train", help="train a model on text files, from random weights or further"))
    add_info(commands.add_parser("info", help="show a model's shape and what its cache takes"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
