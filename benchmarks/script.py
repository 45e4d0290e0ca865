"""What the scripts here do alike: lists on the command line, and mistakes told in one line."""

import sys
from collections.abc import Callable, Iterable

from sparse_ft.errors import ConfigError, SparseFTError, unknown_name


def run(main: Callable[[], None]) -> None:
    """Run a script; a mistake that its user can mend ends it with exit code 2 and without a traceback."""
    try:
        main()
    except SparseFTError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def listed(text: str) -> list[str]:
    """Split at the commas; what is named twice counts once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def numbers(text: str) -> list[int]:
    """Split at the commas, into numbers.

    Raises:
        ConfigError: If one is none.
    """
    try:
        return [int(name) for name in listed(text)]
    except ValueError as error:
        raise ConfigError(f"{text!r} should be whole numbers separated by commas, e.g. 13,14,15.") from error


def chosen(text: str, known: Iterable[str], *, what: str) -> list[str]:
    """Split at the commas, into names that are known.

    Raises:
        ConfigError: If one is not.
    """
    known = list(known)
    for name in listed(text):
        if name not in known:
            raise ConfigError(unknown_name(what, name, known))
    return listed(text)
