"""`align prepare`: makes the rows of the data and of each evaluation set."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from cache.errors import UsageError
from pipeline import tables
from pipeline.commands.command import Command, Intent, On, Shard, StageResult, flag, found_or_made

if TYPE_CHECKING:
    from cache.artifacts import Artifact
    from pipeline.inputs import Inputs, RowsSource


@dataclass(frozen=True)
class Prepared(StageResult):
    """The rows artifact, those of the named evaluation sets, and the tokenizer that made them."""

    eval_sets: Mapping[str, StageResult]
    tokenizer: Any

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        sets = {name: part.as_json() for name, part in self.eval_sets.items()}
        return {**super().as_json(), **({"eval_sets": sets} if sets else {})}

    def show(self, console: Console) -> None:
        """Print how many source rows became which examples, what was dropped and truncated, and on a terminal the first rows."""
        counts = self.artifact.counts
        rows_in, rows_kept = counts["rows_in"], counts["rows_kept"]
        what = f"{rows_in:,} rows in = {rows_kept:,} kept + {rows_in - rows_kept:,} dropped"
        tables.headline(console, "prepare", what, self.artifact.path, self.reused)
        table = tables.labelled()
        for label, value in _lines(counts):
            table.add_row(label, value)
        console.print(table)
        if console.is_terminal:
            from pipeline.inspect.first_rows import first_rows

            console.print(first_rows(self.artifact, self.tokenizer))


def _lines(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    examples, roles = counts["examples"], counts["rows_by_role"]
    lines = [
        ("format", counts["format"]),
        ("dropped", tables.counted(counts["dropped"]) or "none"),
        ("examples", f"{examples['train']:,} for training, {examples['heldout']:,} held out"),
        ("rows", tables.counted(roles)),
    ]
    lines += [("tokens", text) for text in tables.shared_tokens(counts)]
    lines += [(f"{name} truncated", _cuts(counts["cuts"][name])) for name in ("prompts", "completions")]
    if len(counts["sources"]) > 1:
        lines += [
            (f"from {name}", f"{part['rows_in']:,} in, {part['rows_kept']:,} kept ({part['format']})")
            for name, part in counts["sources"].items()
        ]
    lines += [("note", tables.counted({note: count})) for note, count in counts["notes"].items()]
    if counts["kto_weights"]:
        [(name, (low, high))] = counts["kto_weights"].items()
        both = f"{roles['desirable']:,} desirable and {roles['undesirable']:,} undesirable"
        lines.append(("weights for kto", f"{both}: set loss.{name} between {low:g} and {high:g}"))
    return lines


def _cuts(cut: Mapping[str, int]) -> str:
    if not cut["cut"]:
        return "none"
    return f"{cut['cut']:,}, by {cut['tokens']:,} tokens in total (median {cut['median']:,}, at most {cut['max']:,})"


@dataclass(frozen=True)
class PreparedShare:
    """Share `label` of the rows and of the rows of the named evaluation sets, and the command that joins all shares."""

    label: str
    share: StageResult
    eval_sets: Mapping[str, StageResult]
    join_command: str

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        sets = {name: _share_as_json(part) for name, part in self.eval_sets.items()}
        own = {"shard": self.label, **_share_as_json(self.share)}
        return {**own, **({"eval_sets": sets} if sets else {})}

    def show(self, console: Console) -> None:
        """Print how many source rows the share has, and what joins the shares."""
        parts = {"": self.share, **{f" of eval.sets.{name}": part for name, part in self.eval_sets.items()}}
        for name, part in parts.items():
            rows_in = sum(part.artifact.counts["rows_in"].values())
            what = f"share {self.label}{name}: {rows_in:,} source rows"
            tables.headline(console, "prepare", what, part.artifact.path, part.reused)
        console.print(f"Once every share is there: {self.join_command}", markup=False, soft_wrap=True)


def _share_as_json(share: StageResult) -> dict[str, Any]:
    counts = share.artifact.counts
    return {
        "artifact": str(share.artifact.path),
        "fingerprint": share.artifact.fingerprint,
        "reused": share.reused,
        "rows_in": sum(counts["rows_in"].values()),
        "dropped": {reason: count for _, reason, count in counts["dropped"]},
    }


def prepare(
    inputs: "Inputs",
    shard: Shard = None,
    join: Annotated[bool, flag("--join", "Join the shares of all jobs into the rows.")] = False,
    on: On = None,
) -> Prepared | PreparedShare:
    """Stage 1: tokenize preference data into Arrow shards of token ids and masks."""
    from stages.prepare.stage import find_rows
    from stages.prepare.stage import join as join_shares
    from stages.prepare.stage import prepare as make_rows
    from stages.runtime.shares import choose_worker

    if shard is not None:
        choose_worker(shard)
        if join:
            raise UsageError("--shard and --join are both given. Make every share first, then join them.")
    if on is not None and (shard is not None or join):
        raise UsageError("--on makes the shares and joins them by itself. Leave --shard and --join out.")
    sources = [inputs.rows_source, *inputs.eval_sources.values()]
    is_done = all(find_rows(*source) is not None for source in sources)
    if shard is not None and not is_done:
        return _prepare_share(inputs, shard)
    if on is not None:
        join = True
        _prepare_on(on, inputs, is_done)

    def rows(source: "RowsSource") -> "tuple[Artifact, bool]":
        make = partial(join_shares if join else make_rows, *source)
        return found_or_made("prepare", find_rows(*source), make, inputs.context.log)

    artifact, reused = rows(inputs.rows_source)
    sets = {name: StageResult(*rows(source)) for name, source in inputs.eval_sources.items()}
    inputs.found_rows[inputs.data_name] = artifact
    inputs.found_rows |= {f"eval.sets.{name}": made.artifact for name, made in sets.items()}
    return Prepared(artifact, reused, sets, inputs.template.tokenizer)


def _prepare_share(inputs: "Inputs", shard: str) -> PreparedShare:
    from stages.prepare.stage import find_share, prepare_share

    def share(source: "RowsSource") -> StageResult:
        make = partial(prepare_share, shard, *source)
        found = find_share(shard, *source)
        return StageResult(*found_or_made("prepare", found, make, inputs.context.log))

    own = share(inputs.rows_source)
    sets = {name: share(source) for name, source in inputs.eval_sources.items()}
    return PreparedShare(shard, own, sets, inputs.context.command("prepare", "--join"))


def _prepare_on(on: str, inputs: "Inputs", is_done: bool) -> None:
    from pipeline.on_ray import cluster

    if not is_done:
        with cluster(on) as tasks:
            tasks.run_shares("prepare", prepare, inputs.context, on_gpus=False)


def would_prepare(
    inputs: "Inputs", shard: str | None = None, join: bool = False, on: str | None = None
) -> Intent:
    """Look whether the rows of the data and of the evaluation sets, or this share of them, exist."""
    from stages.prepare.stage import find_rows, find_share

    def find(source: "RowsSource") -> "Artifact | None":
        return find_rows(*source) if shard is None else find_share(shard, *source)

    found = find(inputs.rows_source)
    missing = [name for name, source in inputs.eval_sources.items() if find(source) is None]
    make = "join shares" if join else "read and tokenize"
    return Intent(
        "reuse" if found and not missing else make,
        {
            "source": inputs.data_name,
            **({"shard": shard} if shard else {}),
            **({"artifact": str(found.path)} if found else {}),
            **({"eval_sets": ", ".join(missing)} if missing else {}),
        },
    )


PREPARE = Command(
    "prepare",
    prepare,
    examples=(
        "align prepare",
        "align prepare --set data.path=pairs.jsonl --set policy.model=allenai/OLMo-2-0425-1B-SFT",
        "align prepare --shard 1/8",
        "align prepare --join",
        "align prepare --on ray",
    ),
    intent=would_prepare,
    takes_loss=False,
    reads_data=True,
)
