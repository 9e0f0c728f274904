"""The command line: `align prepare | cache-ref | train | sample | eval | run`, `plan`, `merge` and `inspect`.

stdout holds results (one JSON object with `--json`), stderr everything else. An `AlignError` is one
line and its exit code; other exceptions keep their traceback. Heavy imports happen inside commands.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.errors import AlignError, UsageError
from pipeline.options import Common, with_common_options

app = typer.Typer(
    name="align",
    help="Offline preference alignment in four stages that meet only through files.",
    epilog="Without -c, every command uses configs/quickstart.yaml: a tiny model and data of our own, no network, no GPU.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXAMPLES: dict[str, list[str]] = {}
INTERRUPTED = 130


def command(
    name: str, examples: list[str], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command: its docstring is the help, its parameter `common` the shared options."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        EXAMPLES[name] = examples
        epilog = "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in examples)
        app.command(name, epilog=epilog)(with_common_options(body, without))
        return body

    return register


@command(
    "prepare",
    [
        "align prepare",
        "align prepare --set data.path=pairs.jsonl --set policy.model=allenai/OLMo-2-0425-1B-SFT",
    ],
    without=["loss"],
)
def prepare(common: Common) -> None:
    """Stage 1: tokenize and mask preference data into Arrow shards."""
    _run_stage("prepare", common)


@command(
    "cache-ref",
    [
        "align cache-ref",
        "torchrun --nproc-per-node 8 -m pipeline cache-ref -c configs/dpo.yaml",
        "align cache-ref --shard 1/8",
    ],
    without=["loss"],
)
def cache_ref(
    common: Common,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", metavar="i/N", help="Score the i-th of N shares, for N independent jobs (i from 1)."
        ),
    ] = None,
) -> None:
    """Stage 2: run the frozen reference once and store its log-probs; only rows never scored are scored."""
    _run_stage("cache-ref", common, shard)


@command(
    "train", ["align train --loss kto", "align train -c configs/simpo.yaml --set train.learning_rate=1e-6"]
)
def train(common: Common) -> None:
    """Stage 3: train the policy with any loss from the cache; the reference model is never loaded."""
    _run_stage("train", common)


@command("sample", ["align sample", "align sample --set sample.compare=true --set sample.temperature=0"])
def sample(common: Common) -> None:
    """Stage 4: generate completions of the policy (and of the reference, to compare) with vLLM."""
    _run_stage("sample", common)


@command("plan", ["align plan", "align plan -c configs/dpo.yaml --measure"], without=["dry_run"])
def plan(
    common: Common,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and time a few forward and backward passes.")
    ] = False,
) -> None:
    """Steps, tokens, memory and time of a training run, before it is started; refuses nothing."""
    from pipeline.plan_report import show_plan

    result = common.session().training_plan(measure)
    if common.json_:
        _print_json(result)
    else:
        show_plan(result)


@command("merge", ["align merge -c configs/lora.yaml"])
def merge(common: Common) -> None:
    """Merge a trained adapter into its base model: a whole Hugging Face folder, checked against both."""
    _run_stage("merge", common)


@command(
    "eval",
    ["align eval", "align eval --set eval.model=artifacts/policy/NAME --set eval.sets.mine=pairs.jsonl"],
)
def evaluate(common: Common) -> None:
    """Held-out metrics of any policy: the one trained, or eval.model, with the reference's cached log-probs."""
    _run_stage("eval", common)


@command("run", ["align run", "align run -c configs/dpo.yaml"])
def run(common: Common) -> None:
    """All four stages in order; what is already there is not done again."""
    _run_stage("run", common)


@command(
    "inspect",
    ["align inspect --random 3", "align inspect -c configs/dpo.yaml --longest --html rows.html"],
    without=["loss", "dry_run"],
)
def inspect(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="A folder that `align prepare` wrote; none means that of the configuration."),
    ] = None,
    row: Annotated[int | None, typer.Option("--row", metavar="N", help="Show this row, from 1.")] = None,
    random: Annotated[
        int | None, typer.Option("--random", metavar="COUNT", min=1, help="Show so many rows at random.")
    ] = None,
    longest: Annotated[bool, typer.Option("--longest", help="Show the longest row.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Show the id of every token.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML page, too.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="DIR", help="Where the tokenizer is, if it has been moved."),
    ] = None,
    *,
    common: Common,
) -> None:
    """Look at prepared rows: lengths, cuts, and single examples, token by token and coloured by part."""
    from pipeline.inspect import open_rows
    from pipeline.inspect_page import write_page
    from pipeline.report import show_rows

    if sum((row is not None, random is not None, longest)) > 1:
        raise UsageError("--row, --random and --longest are three choices. Give one of them.")
    rows = open_rows(artifact or common.session().inputs.rows.path, tokenizer)
    overview, examples = rows.overview(), rows.chosen(row, random, longest)
    if html is not None:
        write_page(html, overview, examples, ids)
        print(f"inspect: wrote {html}", file=sys.stderr)
    if common.json_:
        _print_json(overview.as_json())
    else:
        show_rows(overview, examples, ids)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("align"))
        raise typer.Exit


def _run_stage(stage: str, common: Common, shard: str | None = None) -> None:
    from pipeline.report import show

    session = common.session(shard)
    result = session.plan(stage) if common.dry_run else session.run(stage)
    if os.environ.get("RANK", "0") != "0":
        return
    if common.json_:
        _print_json(result)
    else:
        show(stage, result, common.dry_run)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False, allow_nan=False))


def main() -> None:
    """Run the command line; the process ends with a documented exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    # Where it is installed, peft imports it, and it says that an optional kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    debug = "--debug" in sys.argv
    try:
        # What typer returns is the code of an `Exit`; newer ones make one of Ctrl-C, older ones an `Abort`.
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except AlignError as error:
        if debug:
            raise
        _complain(str(error))
        raise SystemExit(error.exit_code) from None
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
