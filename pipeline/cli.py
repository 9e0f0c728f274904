"""The command line `align`: every command of `pipeline/commands`, and the exit code a process ends with.

stdout holds results (one JSON object with `--json`), stderr everything else. An `AlignError` is one
line and its exit code; other exceptions keep their traceback.
"""

import json
import logging
import os
import signal
import sys
from typing import Annotated, Any

import typer

from cache.errors import AlignError
from pipeline import tables
from pipeline.commands import COMMANDS
from pipeline.commands.command import Command, Result
from pipeline.options import SharedOptions, typer_function

INTERRUPTED = 130

app = typer.Typer(
    name="align",
    help="Offline preference alignment in four stages that meet only through files.",
    epilog="Without -c, every command uses configs/quickstart.yaml: a tiny model and data of our own, no network, no GPU.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("align"))
        raise typer.Exit


def _call(command: Command, options: SharedOptions, own: dict[str, Any]) -> None:
    """Run a command and print its result; one line on stderr for what the user can mend."""
    try:
        session = options.session()
        result = session.dry_run(command.name) if options.dry_run else session.run(command.name, **own)
        if os.environ.get("RANK", "0") == "0":
            _print(result, options.json_)
    except AlignError as error:
        if options.debug:
            raise
        _complain(str(error))
        raise typer.Exit(error.exit_code) from None


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.as_json(), ensure_ascii=False, allow_nan=False))
    else:
        result.show(tables.console())


for _command in COMMANDS.values():
    _epilog = "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in _command.examples)
    app.command(_command.name, epilog=_epilog)(typer_function(_command, _call))


def main() -> None:
    """Run the command line; the process ends with a documented exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    # Where it is installed, peft imports it, and it says that an optional kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        # What typer returns is the code of an `Exit`; newer ones make one of Ctrl-C, older ones an `Abort`.
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        usage = _usage_line(error)
        if usage is None:
            raise
        _complain(usage)
        raise SystemExit(2) from None
    if code == INTERRUPTED:
        _complain("Interrupted. What was finished is kept; type the same command to continue.")
    if code:
        raise SystemExit(code)


def _usage_line(error: Exception) -> str | None:
    """One line for a wrong command line, or None when `error` is something else."""
    # What typer's usage errors have, whichever click it carries.
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    context = getattr(error, "ctx", None)
    what = format_message() or "Nothing to do."
    stop = "" if what.endswith((".", "?")) else "."
    return f"{what}{stop} Type `{context.command_path if context else 'align'} --help`."


def _complain(line: str) -> None:
    print(f"align: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _terminated(signum: int, frame: Any) -> None:
    """SIGTERM unwinds like an exception, so that temporary files go and finished work stays."""
    raise SystemExit(143)
