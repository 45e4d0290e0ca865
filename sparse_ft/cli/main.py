"""The command line: parse, call one plain function, print. Heavy imports stand inside the commands."""

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sparse_ft.cli.distill import distill
from sparse_ft.cli.edit import edit
from sparse_ft.cli.evaluate import evaluate
from sparse_ft.cli.export import export
from sparse_ft.cli.import_ import import_
from sparse_ft.cli.inspect import inspect
from sparse_ft.cli.merge import merge
from sparse_ft.cli.predict import predict
from sparse_ft.cli.streams import check_streams, discard_output, unprintable
from sparse_ft.cli.tasks import tasks
from sparse_ft.cli.train import train
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.version import __version__

app = typer.Typer(
    name="sparse-ft",
    help="One frozen backbone, one LoRA-sized expert per task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line: exit code 2 and one paragraph on stderr for a user's mistake, 1 for any other error."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        check_streams(arguments)
        _check_bare_task(arguments)
        _log_to_stderr()
        app(args=arguments, prog_name="sparse-ft")
    except BrokenPipeError:  # `sparse-ft predict … | head`
        discard_output()
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        message, code = _explain(error)
        with contextlib.suppress(OSError):  # standard error may be a full disk
            typer.echo(message, err=True)
        discard_output()
        sys.exit(code)


def _check_bare_task(arguments: Sequence[str]) -> None:
    """Refuse ``train ner`` with the option that it lacks; click would only call ``ner`` an extra argument."""
    if arguments[:1] == ["train"] and arguments[1:] and not arguments[1].startswith("-"):
        task = arguments[1]
        raise ConfigError(
            f"train has no argument {task!r}. Name a task with --task, as in sparse-ft train --task {task}."
        )


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("sparse_ft")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message for an error, and the exit code."""
    if isinstance(error, SparseFTError):
        return f"Error: {error}", 2
    if isinstance(error, UnicodeEncodeError):
        return f"Error: {unprintable(error)}", 2
    if isinstance(error, OSError) and error.errno is not None:  # those of the network have none
        where = f"{os.fsdecode(error.filename)!r}" if error.filename else "a file or standard output"
        return f"Error: {where} cannot be read or written: {error.strerror or error}.", 2
    if _is_out_of_memory(error):
        return (
            f"Error: Out of memory ({str(error) or type(error).__name__}). Expected room for the backbone, the experts "
            "and a batch. Free memory, use another --device, or give shorter texts."
        ), 2
    return f"Unexpected error: {type(error).__name__}: {error}. Run again with --debug to see where.", 1


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from sparse_ft.backbone.devices import is_out_of_memory

    return is_out_of_memory(error)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparse-ft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """One frozen backbone, one LoRA-sized expert per task."""


for command in (tasks, train, distill, evaluate, predict, inspect, edit, merge, export, import_):
    app.command(command.__name__.rstrip("_"))(command)


if __name__ == "__main__":
    main()
