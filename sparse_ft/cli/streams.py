"""Standard input, output and error: a stream that cannot be used is an error before the work, not after it."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_ft.errors import SparseFTError

_REMEDY = "Set PYTHONIOENCODING=utf-8, or a locale with UTF-8."


class StreamError(SparseFTError):
    """Standard input or output cannot be used."""


def check_streams(arguments: Sequence[str]) -> None:
    """Refuse arguments that are no text, and a standard output that takes nothing, or not these arguments.

    Args:
        arguments: Of the command line; what a command prints repeats them.

    Raises:
        StreamError: If nothing may be printed: standard output is closed, only for reading, or a full device.
    """
    _open_closed_streams()
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise StreamError(f"The argument {argument!r} is not UTF-8. Write it, and name files, in UTF-8.") from error
    if sys.stdout is None:
        raise StreamError("Standard output is closed, so nothing can be printed. Send it to a file or to /dev/null.")
    with contextlib.suppress(io.UnsupportedOperation):  # it is no file
        _check_writable(sys.stdout.fileno())
    for argument in arguments:
        check_printable(argument)


def _check_writable(descriptor: int) -> None:
    try:
        os.write(descriptor, b"")
    except OSError as error:
        raise StreamError(f"Standard output cannot be written: {error.strerror}. Send it elsewhere.") from error


def check_printable(text: str) -> None:
    """Refuse a text that the encoding of standard output lacks.

    Raises:
        StreamError: With the encoding and the text.
    """
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError as error:
        raise StreamError(unprintable(error)) from error


def check_unicode_output() -> None:
    """Refuse a standard output that cannot print every label: a run learns its labels only from its data.

    Raises:
        StreamError: With the encoding.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        "é中🙂".encode(encoding)
    except UnicodeEncodeError as error:
        raise StreamError(
            f"Standard output is encoded in {encoding}, in which the report of a run may have labels that cannot be "
            f"printed. {_REMEDY}"
        ) from error


def unprintable(error: UnicodeEncodeError) -> str:
    """Word that standard output cannot print a character."""
    character = error.object[error.start]
    if error.encoding.startswith("utf"):
        return f"A text holds {character!r}, half of a character, which cannot be written. Remove it."
    return f"Standard output is encoded in {error.encoding}, which lacks {character!r}. {_REMEDY}"


def check_stdin() -> None:
    """Refuse to read texts from a standard input that is closed.

    Raises:
        StreamError: With what to give instead.
    """
    if sys.stdin is None:
        raise StreamError("Standard input is closed. Give texts as arguments, or --file FILE.")


def discard_output() -> None:
    """Discard the output that cannot be printed, so that the interpreter does not fail on it at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Give the numbers of closed streams to the null device, so that no file of this process gets them."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # open while the process runs
