"""The command line: `align prepare | cache-ref | train | sample | eval | run`, `plan` and `merge`.

stdout holds results (one JSON object with `--json`), stderr everything else. An `AlignError` is one
line and its exit code; other exceptions keep their traceback. Heavy imports happen inside commands.
"""

import json
import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.artifacts import DEFAULT_STORE
from cache.errors import AlignError

app = typer.Typer(
    name="align",
    help="Offline preference alignment in four stages that meet only through files.",
    epilog="Without -c, every command uses configs/quickstart.yaml: a tiny model and data of our own, no network, no GPU.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Configs = Annotated[
    list[Path] | None,
    typer.Option("-c", "--config", metavar="FILE", help="YAML configuration; repeatable, later files win."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="BLOCK.KEY=VALUE", help="Change one configuration key; repeatable."),
]
StoreDir = Annotated[
    Path, typer.Option("--store", metavar="DIR", envvar="ALIGN_STORE", help="Folder of artifacts.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and everything else on stderr.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
LossName = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="NAME",
        help="Train with this loss and its own defaults, e.g. dpo, kto, simpo; a wrong name lists them all.",
    ),
]

EXAMPLES = {
    "prepare": [
        "align prepare",
        "align prepare --set data.path=pairs.jsonl --set policy.model=allenai/OLMo-2-0425-1B-SFT",
    ],
    "cache-ref": [
        "align cache-ref",
        "torchrun --nproc-per-node 8 -m pipeline cache-ref -c configs/dpo.yaml",
        "align cache-ref --shard 1/8",
    ],
    "train": ["align train --loss kto", "align train -c configs/simpo.yaml --set train.learning_rate=1e-6"],
    "sample": ["align sample", "align sample --set sample.compare=true --set sample.temperature=0"],
    "plan": ["align plan", "align plan -c configs/dpo.yaml --measure"],
    "merge": ["align merge -c configs/lora.yaml"],
    "eval": [
        "align eval",
        "align eval --set eval.model=artifacts/policy/NAME --set eval.sets.mine=pairs.jsonl",
    ],
    "run": ["align run", "align run -c configs/dpo.yaml"],
    "inspect": ["align inspect --random 3", "align inspect -c configs/dpo.yaml --longest --html rows.html"],
}


def _epilog(stage: str) -> str:
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in EXAMPLES[stage])


@app.command(epilog=_epilog("prepare"))
def prepare(
    config: Configs = None,
    set_: Sets = None,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Stage 1: tokenize and mask preference data into Arrow shards."""
    _stage("prepare", config, set_, None, store, json_, dry_run)


@app.command("cache-ref", epilog=_epilog("cache-ref"))
def cache_ref(
    config: Configs = None,
    set_: Sets = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", metavar="i/N", help="Score the i-th of N shares, for N independent jobs (i from 1)."
        ),
    ] = None,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Stage 2: run the frozen reference once and store its log-probs; only rows never scored are scored."""
    _stage("cache-ref", config, set_, None, store, json_, dry_run, shard)


@app.command(epilog=_epilog("train"))
def train(
    loss: LossName = None,
    config: Configs = None,
    set_: Sets = None,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Stage 3: train the policy with any loss from the cache; the reference model is never loaded."""
    _stage("train", config, set_, loss, store, json_, dry_run)


@app.command(epilog=_epilog("sample"))
def sample(
    loss: LossName = None,
    config: Configs = None,
    set_: Sets = None,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Stage 4: generate completions of the policy (and of the reference, to compare) with vLLM."""
    _stage("sample", config, set_, loss, store, json_, dry_run)


@app.command(epilog=_epilog("plan"))
def plan(
    loss: LossName = None,
    config: Configs = None,
    set_: Sets = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and time a few forward and backward passes.")
    ] = False,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Steps, tokens, memory and time of a training run, before it is started; refuses nothing."""
    from pipeline.config import load_config
    from pipeline.plan_report import show_plan
    from pipeline.run import Session

    session = Session(
        load_config(config or [], set_ or [], loss), store, _arguments(config, set_, store), loss
    )
    result = session.training_plan(measure)
    if json_:
        print(json.dumps(result, allow_nan=False))
    else:
        show_plan(result)


@app.command(epilog=_epilog("merge"))
def merge(
    loss: LossName = None,
    config: Configs = None,
    set_: Sets = None,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Merge a trained adapter into its base model: a whole Hugging Face folder, checked against both."""
    _stage("merge", config, set_, loss, store, json_, dry_run)


@app.command("eval", epilog=_epilog("eval"))
def evaluate(
    loss: LossName = None,
    config: Configs = None,
    set_: Sets = None,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Held-out metrics of any policy: the one trained, or eval.model, with the reference's cached log-probs."""
    _stage("eval", config, set_, loss, store, json_, dry_run)


@app.command(epilog=_epilog("run"))
def run(
    loss: LossName = None,
    config: Configs = None,
    set_: Sets = None,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """All four stages in order; what is already there is not done again."""
    _stage("run", config, set_, loss, store, json_, dry_run)


@app.command(epilog=_epilog("inspect"))
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
    config: Configs = None,
    set_: Sets = None,
    store: StoreDir = DEFAULT_STORE,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Look at prepared rows: lengths, cuts, and single examples, token by token and coloured by part."""
    from cache.errors import UsageError
    from pipeline.config import load_config
    from pipeline.inspect import Rows, open_rows
    from pipeline.report import show_rows
    from pipeline.run import Session
    from stages.models import ModelSource, load_tokenizer

    if sum((row is not None, random is not None, longest)) > 1:
        raise UsageError("--row, --random and --longest are three choices. Give one of them.")
    if artifact is None:
        artifact = Session(
            load_config(config or [], set_ or [], None), store, _arguments(config, set_, store)
        ).inputs.rows.path
    found = open_rows(artifact)
    folder = tokenizer or Path(found.manifest["provenance"]["tokenizer"])
    rows = Rows(found, load_tokenizer(ModelSource(str(folder), folder)))
    overview, examples = rows.overview(), rows.chosen(row, random, longest)
    if html is not None:
        from cache.files import write_bytes
        from pipeline.inspect_page import page

        write_bytes(html, page(overview, examples, ids).encode())
        print(f"inspect: wrote {html}", file=sys.stderr)
    if json_:
        print(json.dumps(overview.as_json(), ensure_ascii=False, allow_nan=False))
    else:
        show_rows(overview, examples, ids)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("align"))
        raise typer.Exit


def _stage(
    stage: str,
    files: list[Path] | None,
    sets: list[str] | None,
    loss: str | None,
    store: Path,
    as_json: bool,
    dry_run: bool,
    shard: str | None = None,
) -> None:
    from pipeline.config import load_config
    from pipeline.report import show
    from pipeline.run import Session

    config = load_config(files or [], sets or [], loss)
    session = Session(config, store, _arguments(files, sets, store), loss, shard=shard)
    result = session.plan(stage) if dry_run else session.run(stage)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        show(stage, result, dry_run)


def _arguments(files: list[Path] | None, sets: list[str] | None, store: Path) -> str:
    """The arguments that select this configuration, for commands that errors suggest."""
    parts: list[str] = []
    parts += [part for path in files or [] for part in ("-c", str(path))]
    parts += [part for assignment in sets or [] for part in ("--set", assignment)]
    parts += ["--store", str(store)] if store != DEFAULT_STORE else []
    return shlex.join(parts)


def main() -> None:
    """Run the command line; the process ends with a documented exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    # Where it is installed, peft imports it, and it says that an optional kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=False)
    except typer.Exit as done:
        raise SystemExit(done.exit_code) from None
    except typer.Abort:
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        _complain("Interrupted. What was finished is kept; type the same command to continue.")
        raise SystemExit(130) from None
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


def _usage_line(error: Exception) -> str | None:
    """One line for a wrong command line, or None when `error` is something else."""
    format_message = getattr(
        error, "format_message", None
    )  # what typer's usage errors have, whichever click it carries
    if format_message is None:
        return None
    context = getattr(error, "ctx", None)
    return f"{format_message() or 'Nothing to do.'} Type `{context.command_path if context else 'align'} --help`."


def _complain(line: str) -> None:
    print(f"align: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _terminated(signum: int, frame: Any) -> None:
    """SIGTERM unwinds like an exception, so that temporary files go and finished work stays."""
    raise SystemExit(143)
