"""Errors that carry facts, not finished sentences, so that Python and the command line each say them their own way."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

Value = TypeVar("Value")
MOST = 2**28  # of a setting; sums of several still fit into int32, in which JAX counts


class CheckpointError(ValueError):
    """A checkpoint whose files are damaged or do not hold the model that their configuration describes."""


class SettingError(ValueError):
    """A setting has a value that breaks a rule.

    In Python the error reads `num_critical=0 must be at least 1`; the command line says `--num-critical 0 must be at
    least 1`. Both come from `told`, so no message is ever edited.

    Attributes:
        name: the setting, as Python spells it.
        value: what was given.
        rule: what the value must be, beginning with a verb: "must be at least 1".
        way_out: what to do instead, or "".
        others: further settings that `rule` and `way_out` mention as `{name}`, with their values.
    """

    def __init__(
        self, name: str, value: object, rule: str, way_out: str = "", others: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(name, value, rule, way_out, others)
        self.name, self.value, self.rule, self.way_out = name, value, rule, way_out
        self.others = dict(others or {})

    def told(self, say: Callable[[str, object], str]) -> str:
        """The message, in which `say(name, value)` spells each setting."""
        text = f"{self.rule}: {self.way_out}" if self.way_out else self.rule
        for name, value in self.others.items():  # not by `format`, because rules may quote users' braces
            text = text.replace(f"{{{name}}}", say(name, value))
        return f"{say(self.name, self.value)} {text}"

    def __str__(self) -> str:
        return self.told(lambda name, value: f"{name}={value if isinstance(value, Fraction) else repr(value)}")


def setting(default: Value, help: str) -> Value:
    """A dataclass field with a default, and with the help text of its command-line option."""
    return dataclasses.field(default=default, metadata={"help": help})


def check_whole(name: str, value: object, least: int, most: int = MOST) -> None:
    """Raises SettingError unless `value` is a whole number of at least `least` and at most `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingError(name, value, f"must be at least {least}, a whole number")
    if value > most:
        raise SettingError(name, value, f"must be at most {most}")


def check_one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises SettingError unless `value` is one of the allowed values."""
    if value not in allowed:
        raise SettingError(name, value, f"must be one of {', '.join(map(repr, allowed))}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has too little memory. JAX names the status, or, where a program does not start, the reason."""
    return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
