"""What a person sees at the end of a command: tables on stdout, made from the stages' results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.inspect import Overview, Shown
from pipeline.inspect_terminal import show_example, show_legend, show_overview
from pipeline.quickstart import is_preferred
from stages.generation.completion_files import read_jsonl

SHOWN_METRICS = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("logratios/chosen", "chosen log-ratio"),
    ("logratios/rejected", "rejected log-ratio"),
)
SHOWN_COMPLETIONS = 5


NARROW, WIDE = 80, 120


def show(stage: str, result: dict[str, Any], dry_run: bool) -> None:
    """Print the result of a stage, or of all of them."""
    console = _console()
    if dry_run:
        for name, plan in result.items():
            console.print(Text(f"{name}: would {plan['would']}" + _details(plan)))
        return
    if stage != "run" and result.get("reused"):
        return  # one line has said so
    parts = result if stage == "run" else {stage: result}
    for name, part in parts.items():
        _SHOW[name](console, part)


def show_rows(overview: Overview, examples: Sequence[Shown], with_ids: bool) -> None:
    """Print what is in a rows artifact, and single examples of it."""
    console = _console()
    show_overview(console, overview)
    console.print()
    show_legend(console)
    for example in examples:
        show_example(console, example, with_ids)


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def _details(plan: dict[str, Any]) -> str:
    details = [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in plan.items() if key != "would"]
    return f" ({', '.join(details)})" if details else ""


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _show_prepare(console: Console, result: dict[str, Any]) -> None:
    dropped = (
        ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in result["dropped"].items())
        or "none"
    )
    examples = result["examples"]
    _headline(
        console,
        "prepare",
        f"{result['rows_in']:,} rows in = {result['rows_kept']:,} kept + {sum(result['dropped'].values()):,} dropped",
        result,
    )
    table = _plain_table()
    table.add_row("format", result["format"])
    table.add_row("dropped", dropped)
    table.add_row("examples", f"{examples['train']:,} to train on, {examples['heldout']:,} held out")
    table.add_row("rows", ", ".join(f"{count:,} {role}" for role, count in result["rows_by_role"].items()))
    for name in ("prompts", "completions"):
        cut = result["cuts"][name]
        what = (
            f"{cut['cut']:,} by {cut['tokens']:,} tokens (median {cut['median']:,}, at most {cut['max']:,})"
            if cut["cut"]
            else "none"
        )
        table.add_row(f"{name} cut", what)
    if len(result["sources"]) > 1:
        for name, source in result["sources"].items():
            table.add_row(
                f"from {name}", f"{source['rows_in']:,} in, {source['rows_kept']:,} kept ({source['format']})"
            )
    for note, count in result["notes"].items():
        table.add_row("note", f"{count:,} {note.replace('_', ' ')}")
    if result["kto_weights"]:
        [(name, (low, high))] = result["kto_weights"].items()
        counts = result["rows_by_role"]
        table.add_row(
            "for kto",
            f"{counts['desirable']:,} desirable and {counts['undesirable']:,} undesirable: --set loss.{name}={low:g} to {high:g}",
        )
    console.print(table)


def _show_cache_ref(console: Console, result: dict[str, Any]) -> None:
    what = f"{result['rows_scored']:,} of {result['rows_needed']:,} rows scored in {result['seconds']:.1f} s, {result['forwards']:,} forward passes"
    _headline(console, "cache-ref", what, result)


def _show_train(console: Console, result: dict[str, Any]) -> None:
    _headline(console, "train", f"{result['steps']:,} steps on {result['examples']:,} examples", result)
    if not result["final"]:
        console.print("  No held-out examples, so no evaluation. Raise prepare.heldout_fraction to have one.")
        return
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("held out", style="bold")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    sets = dict.fromkeys(key.removesuffix("/loss") for key in result["step0"] if key.endswith("/loss"))
    shown = list(SHOWN_METRICS)
    shown += [(f"{name}/{key}", f"{name}: {label}") for name in sets for key, label in SHOWN_METRICS[:3]]
    for key, label in shown:
        if key in result["final"]:
            before, after = (result[when].get(key) for when in ("step0", "final"))
            table.add_row(label, _signed(before), _signed(after))
    console.print(table)
    if result["skipped_steps"]:
        console.print(
            f"  {result['skipped_steps']:,} steps were skipped: their loss or gradient was not finite."
        )
    if "best" in result:
        best = result["best"]
        console.print(f"  best {best['metric']}: {best['value']:.4g} at step {best['step']:,}")


def _signed(value: float | None) -> str:
    """A number whose sign takes no room from its digits."""
    return "" if value is None else f"{value:+.4f}".replace("+", " ")


def _show_eval(console: Console, result: dict[str, Any]) -> None:
    console.print(Text.assemble(("eval", "bold"), f"  {result['model']} with {result['loss']}"))
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("held out", style="bold")
    for name, metrics in result["sets"].items():
        table.add_column(f"{name} ({metrics['examples']:,})", justify="right")
    names = dict.fromkeys(name for metrics in result["sets"].values() for name in metrics)
    for name in names:
        if name != "examples":
            table.add_row(name, *(_number(metrics.get(name)) for metrics in result["sets"].values()))
    console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _show_sample(console: Console, result: dict[str, Any]) -> None:
    what = f"{result['num_completions']:,} completions of {result['num_prompts']:,} prompts by {result['engine']}, {result['finished']:,} ended by themselves"
    _headline(console, "sample", what, result)
    lines = read_jsonl(Path(result["output"]))
    sides = list(result["models"])
    table = Table(show_lines=True, expand=False)
    table.add_column("prompt", ratio=2)
    for side in sorted(sides, reverse=True):
        table.add_column(side, ratio=3)
    first: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["sample_index"] == 0:
            first.setdefault(line["id"], {"prompt": line["prompt"]})[line["side"]] = line["completion"]
    for entry in list(first.values())[:SHOWN_COMPLETIONS]:
        table.add_row(
            _one_line(entry["prompt"]),
            *(_one_line(entry.get(side, "")) for side in sorted(sides, reverse=True)),
        )
    console.print(table)
    if result.get("quickstart"):
        for side in sorted(sides, reverse=True):
            own = [line["completion"] for line in lines if line["side"] == side]
            share = sum(is_preferred(completion) for completion in own) / len(own)
            console.print(f"  polite answers, {side}: {share:.0%} of {len(own)}")


def _show_merge(console: Console, result: dict[str, Any]) -> None:
    what = f"log-probs of {result['tokens_compared']:,} tokens agree with base and adapter within {result['max_abs_diff']:.1g} nats"
    _headline(console, "merge", what, result)


def _headline(console: Console, stage: str, what: str, result: dict[str, Any]) -> None:
    state = "already done" if result["reused"] else "done"
    console.print(Text.assemble((f"{stage}", "bold"), f"  {what}  ({state})"))
    console.print(Text(f"  {result['artifact']}", style="dim"))


def _plain_table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    return table


def _one_line(value: Any) -> Text:
    shown = value if isinstance(value, str) else " / ".join(str(message["content"]) for message in value)
    shown = " ".join(shown.split())
    return Text(shown if len(shown) <= 240 else shown[:237] + "...")


_SHOW = {
    "prepare": _show_prepare,
    "cache-ref": _show_cache_ref,
    "train": _show_train,
    "sample": _show_sample,
    "merge": _show_merge,
    "eval": _show_eval,
}
