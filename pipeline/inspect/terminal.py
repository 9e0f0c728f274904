"""A rows artifact on a terminal: statistics, histograms, and examples coloured by part."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from pipeline import tables as common
from pipeline.inspect.overview import Histogram, Overview
from pipeline.inspect.prepared_rows import ShownCompletion, ShownExample, Span

PROMPT, MASKED, CUT, IDS = "cyan", "dim", "bold red", "dim"
TRAINED = {"rejected": "yellow", "undesirable": "yellow"}
TRAINED_OTHERS = "green"
BAR_WIDTH = 24
EIGHTHS = " ▏▎▍▌▋▊▉"


def show_overview(console: Console, overview: Overview) -> None:
    """Print counts, lengths and truncation of the whole artifact."""
    counts = overview.counts
    dropped = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts["dropped"].items()
    )
    console.print(Text.assemble(("rows", "bold"), f"  {overview.folder}"))
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row(
        "rows in",
        f"{counts['rows_in']:,} = {counts['rows_kept']:,} kept + {counts['rows_in'] - counts['rows_kept']:,} dropped"
        + (f" ({dropped})" if dropped else ""),
    )
    if len(counts["sources"]) > 1:
        for name, source in counts["sources"].items():
            table.add_row("", f"{name}: {source['rows_in']:,} in, {source['rows_kept']:,} kept")
    table.add_row(
        "examples",
        f"{counts['examples']['train']:,} for training, {counts['examples']['heldout']:,} held out",
    )
    [text] = common.shared_tokens(counts) or [f"{overview.tokens:,}; a prompt counts once"]
    table.add_row("tokens", text)
    table.add_row(
        "tokens trained",
        f"{overview.trained_tokens:,} = {share(overview.trained_tokens, overview.tokens)} of all tokens, "
        f"{share(overview.trained_tokens, overview.completion_tokens)} of completion tokens",
    )
    for name, label in (("prompts", "prompts truncated"), ("completions", "completions truncated")):
        table.add_row(label, cuts(overview, name))
    table.add_row("tokenizer", overview.tokenizer)
    console.print(table)
    console.print()
    console.print(_side_by_side([_bars(histogram) for histogram in overview.histograms], console.width))


def show_example(console: Console, shown: ShownExample, with_ids: bool) -> None:
    """Print every token of an example, coloured by part."""
    title = Text.assemble((f"example {shown.number:,}", "bold"), f"  {shown.split} · {shown.source}")
    parts = [_caption("prompt", tokens(shown.num_prompt_tokens), PROMPT), _prompt(shown, with_ids)]
    for completion in shown.completions:
        parts += [Rule(style="dim"), _caption(*_described(completion)), _completion(completion, with_ids)]
    console.print(Panel(Group(*parts), title=title, title_align="left", border_style="dim"))


def show_legend(console: Console) -> None:
    """Print what the colours mean."""
    console.print(
        Text.assemble(
            "  ",
            ("prompt", PROMPT),
            "  ",
            ("trained", TRAINED_OTHERS),
            "/",
            ("trained, rejected", TRAINED["rejected"]),
            "  ",
            ("masked", MASKED),
            "  ",
            (" special ", "reverse"),
            "  ",
            ("✂ truncated", CUT),
            "  ↵ line break",
        )
    )


def share(part: int, whole: int) -> str:
    """A percentage; 0 % and 100 % are exact."""
    if not whole:
        return "0 %"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{min(percent, 99.9):.1f} %"


def cuts(overview: Overview, name: str) -> str:
    """How many prompts or completions were truncated, and by how many tokens."""
    cut = overview.counts["cuts"][name]
    total = overview.counts["rows_kept"] if name == "prompts" else _num_completions(overview)
    if not cut["cut"]:
        return "none"
    return (
        f"{cut['cut']:,} = {share(cut['cut'], total)}; {cut['tokens']:,} tokens in total, "
        f"median {cut['median']:,}, at most {cut['max']:,}"
    )


def _num_completions(overview: Overview) -> int:
    return sum(count for role, count in overview.counts["rows_by_role"].items() if role != "mismatched")


def _bars(histogram: Histogram) -> Table:
    table = Table(
        box=None,
        padding=(0, 1),
        title=f"{histogram.name}: length in tokens",
        title_justify="left",
        title_style="bold",
        caption=f"median {histogram.median:,}, p90 {histogram.p90:,}, longest {histogram.longest:,}",
        caption_justify="left",
        caption_style="dim",
        show_header=False,
    )
    table.add_column(justify="right", style="dim")
    table.add_column(width=BAR_WIDTH, style="blue")
    table.add_column(justify="right")
    most = max(count for _, _, count in histogram.bins)
    for first, last, count in histogram.bins:
        table.add_row(f"{first:,}-{last:,}", _bar(count / most), f"{count:,}")
    return table


def _bar(part: float) -> str:
    eighths = round(part * BAR_WIDTH * 8)
    if part and not eighths:
        eighths = 1  # a bin that is not empty stays visible
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _side_by_side(tables: Sequence[Table], width: int) -> Table:
    grid = Table.grid(padding=(1, 4))
    columns = max(1, min(len(tables), width // 52))
    for start in range(0, len(tables), columns):
        grid.add_row(*tables[start : start + columns])
    return grid


def _described(completion: ShownCompletion) -> tuple[str, str, str]:
    score = "" if completion.score is None else f", score {completion.score:g}"
    masked = completion.num_tokens - completion.num_trained
    detail = tokens(completion.num_tokens) + (f", {masked:,} masked" if masked else "")
    return completion.role, detail + score, TRAINED.get(completion.role, TRAINED_OTHERS)


def _caption(name: str, detail: str, style: str) -> Text:
    return Text.assemble((name, f"bold {style}"), (f"  {detail}", "dim"))


def _prompt(shown: ShownExample, with_ids: bool) -> Text:
    text = Text()
    if shown.prompt_cut and shown.cut_at_start:
        text.append(f"✂ {tokens(shown.prompt_cut)} truncated ", CUT)
    _add(text, shown.prompt, PROMPT, with_ids)
    if shown.prompt_cut and not shown.cut_at_start:
        text.append(f" ✂ {tokens(shown.prompt_cut)} truncated", CUT)
    return text


def _completion(completion: ShownCompletion, with_ids: bool) -> Text:
    text = Text()
    for span in completion.spans:
        style = MASKED if span.part == "masked" else TRAINED.get(completion.role, TRAINED_OTHERS)
        _add(text, span, style, with_ids)
    if completion.cut:
        text.append(f" ✂ {tokens(completion.cut)} truncated", CUT)
    return text


def _add(text: Text, span: Span, style: str, with_ids: bool) -> None:
    for token in span.tokens:
        shown = token.text.replace("\n", "↵\n").replace("\t", "→\t")
        ids = "·" + ",".join(map(str, token.ids)) + " " if with_ids else ""
        # The id of a line break stands before the break.
        end = "\n" if shown.endswith("\n") else ""
        text.append(shown.removesuffix("\n"), f"{style} reverse" if token.is_special else style)
        text.append(ids + end, IDS)


def tokens(count: int) -> str:
    """A count with its unit."""
    return f"{count:,} token" + ("s" if count != 1 else "")
