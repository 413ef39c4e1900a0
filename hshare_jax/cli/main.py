"""The command line of hshare-jax."""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from hshare_jax.cli.errors import FAILURE, USAGE, Parser, Silent, UsageError
from hshare_jax.errors import is_out_of_memory

# Each command has a module of the same name in this folder. The module holds `add_NAME`, which adds the options of the
# command and sets `run`. Only the module of the command that is called is imported, so that every start is quick.
COMMANDS = {
    "generate": "continue or answer prompts",
    "calibrate": "find label channels and one plan for all prompts, from texts",
    "convert": "write a model as an Orbax checkpoint, which loads fast",
    "eval": "measure what sparse decoding costs, on tasks and on any text",
    "plot": "draw how alike choices of tokens are, a plan, or quality against tokens read or time",
    "train": "train a model on text files, from random weights or from a model",
    "info": "show a model's shape and the size of its cache, or the plans of prompts",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the words after the program's name; None takes the arguments of this process.

    Returns:
        The exit status: 0, `FAILURE`, or `USAGE` for a mistake in the call.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")  # a character that standard output lacks must not end an answer
    try:
        options = _parser(arguments).parse_args(arguments)
        status = options.run(options)
        if sys.stdout is not None:  # None where standard output is closed
            sys.stdout.flush()  # here, because Python would tell a full disk in a traceback
        return status
    except UsageError as error:
        return _complain(str(error), USAGE)
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            return _complain(f"{error.filename}: {error.strerror}", FAILURE)
        if isinstance(error, OSError):
            _drop_output()
        if isinstance(error, BrokenPipeError):
            return FAILURE
        return _complain(str(error) or type(error).__name__, FAILURE)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _complain(f"out of memory, take fewer or shorter texts at once: {error}", FAILURE)
    except KeyboardInterrupt:
        return 130
    finally:
        _speak()


def _speak() -> None:
    """Lets a process that was silent, because another prints for it, tell its errors."""
    for name in ("stdout", "stderr"):
        if isinstance(stream := getattr(sys, name), Silent):
            setattr(sys, name, stream.beneath)


def _complain(message: str, status: int) -> int:
    _speak()
    print(f"hshare-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """Sends what standard output cannot take to nowhere, because Python would try to write it once more at its end."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(arguments: Sequence[str]) -> Parser:
    """The parser of these arguments. Only the command that they name gets its options."""
    parser = Parser(
        prog="hshare-jax",
        description="Sparse decoding without training, and KV sharing across layers, for LLaMA-family models.",
        epilog="hshare-jax COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", "-V", action=_ShowVersion, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if name == called:
            getattr(importlib.import_module(f"hshare_jax.cli.{name}"), f"add_{name}")(command)
    return parser


class _ShowVersion(argparse.Action):
    """Prints the version. Only this reads the installed package's metadata, which takes as long as all else here."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **more)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"hshare-jax {version('hshare-jax')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
