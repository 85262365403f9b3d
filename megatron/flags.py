"""The parser that all programs share, and the types of their flags: a fault is one line, with the project's status."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from megatron.counts import parse_count
from megatron.errors import CommandLineError, note

_NEGATIVE = re.compile(r"-([0-9.][0-9.,_eE+-]*[KMBGT]?|inf|infinity|nan)$", re.IGNORECASE)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Puts each default behind its text, as in `samples of each prompt [1]`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        switch = action.nargs == 0  # off unless given, as one expects
        return action.help if switch or action.help is None else with_default(action.help, action.default)


def with_default(text: str, default: object) -> str:
    """The help text `text`, with the default where there is one to show; True and False are [on] and [off]."""
    if default is None or default in ("", argparse.SUPPRESS, (), []):
        return text
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, (list, tuple)):
        shown = " ".join(map(str, default))
    elif isinstance(default, int) and default >= 10**6 and default % 10**6 == 0:
        shown = f"{default // 10**6}M"
    elif isinstance(default, float):
        shown = f"{default:.0f}" if default.is_integer() else f"{default:g}"
    else:
        shown = str(default)
    return f"{text} [{shown.replace('%', '%%')}]".lstrip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose faults are CommandLineErrors that name all that is wrong, with a suggestion for each
    misspelt flag."""

    def __init__(self, prog: str | None = None, description: str | None = None, **settings: Any) -> None:
        """As ArgumentParser; a description is printed line by line."""
        super().__init__(
            prog=prog, description=description, **{"allow_abbrev": False, "formatter_class": _Help, **settings}
        )
        self._negative_number_matcher = _NEGATIVE  # argparse's own takes -1e-4, -3K and -inf for flags
        self._faults: list[str] = []
        self._see_help, self._misspelt = True, False
        self.advice: Callable[[str], str | None] = lambda flag: None
        """What to do instead of a flag that is gone; None for one that never was."""
        self.idle: dict[str, list[str]] = {}
        """Why flags do nothing -> those given. Actions add them; they are said together, a line a reason."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's own complaint into ours; what it misses may only be misspelt."""
        if not self._misspelt:
            self._faults.append(message)
        raise self._told()

    def fault(self, text: str) -> None:
        """Note a fault that says itself what to do: it is told together with all others."""
        self._faults.append(text)
        self._see_help = False

    def parse_args(  # type: ignore[override] # of two overloads one will do
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse the command line, or `args`, into a namespace.

        Raises:
            CommandLineError: naming all flags that are unknown, with a suggestion for each, and all wrong values; or
                the first other fault.
        """
        words = sys.argv[1:] if args is None else list(args)
        self._misspelt = self._check_flags(words)
        parsed, rest = super().parse_known_args(words, namespace or argparse.Namespace())
        if rest and not self._misspelt:
            self.fault(f"unexpected argument {rest[0]!r}; flags start with --, see --help")
        if self._faults:
            raise self._told()
        for why, idle in self.idle.items():
            one = len(idle) == 1
            note(f"{idle[0]} does nothing here: {why}" if one else f"these do nothing here: {', '.join(idle)} ({why})")
        self.idle.clear()
        return parsed

    def parse_known_args(  # type: ignore[override] # as above
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As ArgumentParser. Raises CommandLineError that names all wrong values."""
        found = super().parse_known_args(args, namespace)
        if self._faults:
            raise self._told()
        return found

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self._faults.append(str(error))
            return argparse.SUPPRESS  # goes nowhere

    def _told(self) -> CommandLineError:
        text = "; ".join(self._faults) + "; see --help" * self._see_help
        self._faults, self._see_help, self._misspelt = [], True, False
        return CommandLineError(text)

    def _check_flags(self, words: list[str]) -> bool:
        """Note the flags that are unknown; whether there are any."""
        if {"-h", "--help"} & set(words):
            return False
        flags = [word.partition("=")[0] for word in takewhile("--".__ne__, words) if word.startswith("--")]
        unknown = dict.fromkeys(f for f in flags if " " not in f and f not in self._option_string_actions)
        gone: dict[str, list[str]] = {}
        for flag in unknown:
            if advice := self.advice(flag):
                gone.setdefault(advice, []).append(flag)
        for advice, same in gone.items():
            named = ", ".join(same)
            one = f"{named} is not a flag here: {advice}"
            self.fault(one if len(same) == 1 else f"{named} are not flags here: {advice}")
        self._faults += [self._unknown(flag) for flag in unknown if not self.advice(flag)]
        return bool(unknown)

    def _unknown(self, flag: str) -> str:
        """What to say of a flag that never was."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        names = [option.lstrip("-") for action in shown for option in action.option_strings if option[:2] == "--"]
        near = difflib.get_close_matches(flag.lstrip("-"), names, n=1)  # dashes, which all have, make nothing alike
        return f"unknown flag {flag}" + (f" (did you mean --{near[0]}?)" if near else "")


def whole_number(text: str) -> int:
    """The type of every flag that counts: 3000, 300K or 157e9, exactly."""
    try:
        return parse_count(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a whole number such as 3000, 300K or 157e9, found {text!r}"
        ) from None


def count(text: str) -> int:
    """A whole number that is not negative."""
    if (value := whole_number(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, found {text!r}")
    return value


def positive(text: str) -> int:
    """A whole number from 1."""
    if (value := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return value


def finite_number(text: str) -> float:
    """A float that is neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return value


def positive_number(text: str) -> float:
    """A float above 0."""
    if (value := finite_number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def some_text(text: str) -> str:
    """A text that is not empty, as one is where a shell's variable is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a text, found an empty one")
    if text.startswith("--"):  # argparse takes an unknown flag with a blank in it for one more value of the flag before
        raise argparse.ArgumentTypeError(f"expected a text, found {text!r}, which is no flag that there is")
    return text


def some_path(text: str) -> Path:
    """The name of a file or directory, whether there is one or not."""
    return Path(some_text(text))


def output_file(text: str) -> Path:
    """The name of a file that can be written, as far as can be told beforehand; its directory may be made then."""
    path = some_path(text)
    if os.path.isdir(path):  # unlike Path's, it raises nothing
        raise argparse.ArgumentTypeError(f"expected a file to write, found the directory {text!r}: name a file in it")
    if not os.path.exists(path) or os.path.isfile(path):  # a pipe or a device is written as it is
        _check_writable(path.parent, text)
    elif not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: change its permissions, or name another")
    return path


def output_directory(text: str) -> Path:
    """The name of a directory that can be written to, as far as can be told beforehand, or be made."""
    path = some_path(text)
    _check_writable(path, text)
    return path


def output_prefix(text: str) -> str:
    """What the names of files begin with, in a directory as of `output_directory`."""
    _check_writable(some_path(text).parent, text)
    return text


def _check_writable(directory: Path, text: str) -> None:
    """Raise ArgumentTypeError unless files can be made in `directory`, or it in the nearest one above that there is."""
    place = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(place):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {str(place)!r} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: no permission to write in {str(place)!r}; change that, or name another"
        )
