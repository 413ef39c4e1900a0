"""Mistakes in a call: told in one line, in the words of the command line."""

import argparse
import contextlib
import io
from collections.abc import Iterator
from typing import NoReturn, TextIO

from hshare_jax.errors import SettingError

USAGE, FAILURE = 2, 1  # exit statuses: a mistake in the call, and a failure of the work


class UsageError(Exception):
    """A mistake in the call. `main` prints the message and returns `USAGE`."""


class Silent(io.TextIOBase):
    """Standard output or error of a process that is to print nothing but errors. `beneath` is the true stream."""

    def __init__(self, beneath: TextIO) -> None:
        self.beneath = beneath

    def write(self, text: str, /) -> int:
        """Takes the text, and drops it."""
        return len(text)


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, without the usage text above it."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits."""
        program = self.prog.split()[0]  # the prog of a subcommand is "hshare-jax generate"
        self.exit(USAGE, f"{program}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """As argparse's, but a second `--` is no argument. Some Pythons make an empty list of it."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.nargs is None and not action.option_strings and getattr(found, action.dest, None) == []:
                self.error(f"the following arguments are required: {action.metavar or action.dest}")
        return found, rest


def option_name(name: str) -> str:
    """The option of a setting: `num_critical` is set by --num-critical."""
    return "--" + name.replace("_", "-")


# Settings whose option has another name.
_OPTIONS = {
    "count": "--limit",
    "spec": "--kv-sharing",
    "window": "--kv-window",
    "model": "--tensor-parallel-size",
    "data": "--data-parallel-size",
}
# Settings that are a part of what an option gives.
_PARTS = {
    "layer_ratio": "the layer ratio of --sharing-ratio",
    "head_ratio": "the head ratio of --sharing-ratio",
}
# How None is typed, where it is not "none".
_NONE = {"forward_passes": "exact"}
# Settings that no option gives. Names such as `kv_layer_map[2]`, which are no identifiers, have no option either.
_WITHOUT_OPTION = ("num_kv_layers", "prompts")


def say(name: str, value: object) -> str:
    """A setting as it is typed: `--num-critical 0`. A setting without an option stays `name=value`."""
    if name in _WITHOUT_OPTION or not name.isidentifier():
        return f"{name}={value!r}"
    if name in _PARTS:
        return f"{_PARTS[name]}, {value}"
    option = _OPTIONS.get(name) or option_name(name)
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    return f"{option} {_NONE.get(name, 'none') if value is None else value}"


def usage_error(error: ValueError) -> UsageError:
    """A usage error with the message of a library error. A SettingError names the option in place of the setting."""
    return UsageError(error.told(say) if isinstance(error, SettingError) else str(error))


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Within this context, the errors that the library raises are mistakes in the call.

    It is for the checks before any computing. Later errors are failures.

    Raises:
        UsageError: in place of a ValueError, and of an OSError for a file that cannot be read.
    """
    try:
        yield
    except ValueError as error:
        raise usage_error(error) from error
    except OSError as error:
        message = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        raise UsageError(message) from error
