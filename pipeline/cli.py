"""The command line `align`: runs a command, prints its result, ends with its exit code.

stdout holds results (one JSON object with `--json`), stderr everything else. An `AlignError` is printed as
one line; every other exception keeps its traceback.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import AlignError
from pipeline import tables
from pipeline.commands import COMMANDS
from pipeline.commands.command import Command, Result, flag
from pipeline.options import SharedOptions, typer_function

if TYPE_CHECKING:
    from pipeline.session import Session

INTERRUPTED = 130

app = typer.Typer(
    name="align",
    help="Offline preference alignment in four stages that exchange only files.",
    epilog="Without -c, a command runs the quickstart (configs/quickstart.yaml): a tiny embedded model and dataset that need neither network nor GPU. With `--set data.path=FILE` or `--set policy.model=NAME` it uses the defaults of configs/reference.yaml instead.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, flag("--version", "Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("align"))
        raise typer.Exit


def _call(command: Command, options: SharedOptions, own: dict[str, Any]) -> None:
    """Run a command and print its result, or the error in one line."""
    try:
        is_main = os.environ.get("RANK", "0") == "0"
        with _silence() if options.quiet else nullcontext():
            result = _shown(command, options, own, is_main)
        if is_main and options.json_:
            print(json.dumps(result.as_json(), ensure_ascii=False, allow_nan=False))
        if (
            failure := getattr(result, "failure", None)
        ) is not None:  # a check that was carried out and failed
            raise failure
    except AlignError as error:
        if options.debug:
            raise
        _complain(str(error))
        raise typer.Exit(error.exit_code) from None


@contextmanager
def _silence() -> Iterator[None]:
    """Whatever is printed meanwhile, by whichever library, is not shown; an exception is."""
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def _shown(command: Command, options: SharedOptions, own: dict[str, Any], is_main: bool) -> Result:
    """The result of a command, printed as tables unless it is wanted as JSON."""
    session = None if command.without_config is not None else options.session(command.reads_data)
    shows = is_main and not options.json_
    if session is None:
        options.go_offline()
        result = command.work(options, **own)
    else:
        result = _run(session, command, options, own, shows_parts=shows)
    if shows:
        result.show(tables.console())
        if session is not None and not options.dry_run:
            tables.print_cuts(tables.console(), session.inputs.found_rows)
    return result


def _run(
    session: "Session", command: Command, options: SharedOptions, own: dict[str, Any], shows_parts: bool
) -> Result:
    if shows_parts:
        session.inputs.show = lambda part: part.show(tables.console())
    return (session.dry_run if options.dry_run else session.run)(command.name, **own)


for _command in COMMANDS.values():
    _epilog = "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in _command.examples)
    app.command(_command.name, epilog=_epilog)(typer_function(_command, _call))


def main() -> None:
    """Entry point of `align`; ends with one of the documented exit codes."""
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup sets
        signal.signal(signal.SIGHUP, _terminated)
    if not sys.stderr.isatty():  # a log is no place for the bars of transformers, datasets and the hub
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # peft imports bitsandbytes where it is installed, and bitsandbytes warns of an optional kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        # typer returns the code of an `Exit`. Ctrl-C is such a code in new versions, an `Abort` in old ones.
        code = app(prog_name="align", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        usage = _usage_line(error)
        if usage is None:
            raise
        _complain(usage)
        raise SystemExit(2) from None
    if code == INTERRUPTED:
        _complain("Interrupted. Finished work is kept; the same command continues it.")
    if code:
        raise SystemExit(code)


def _usage_line(error: Exception) -> str | None:
    """One line for a wrong command line, or None when `error` is something else."""
    # typer's usage errors are recognised by this method: their class depends on the click it carries.
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    context = getattr(error, "ctx", None)
    what = format_message() or "No command given."
    stop = "" if what.endswith((".", "?")) else "."
    return f"{what}{stop} Type `{context.command_path if context else 'align'} --help`."


def _complain(line: str) -> None:
    print(f"align: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _terminated(signum: int, frame: Any) -> None:
    """SIGTERM, and SIGHUP of a closed terminal, unwind the stack like an exception, so that temporary files are removed."""
    raise SystemExit(128 + signum)
