"""A rows artifact as one HTML page without external files: statistics, histograms, and examples coloured by part."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from cache.files import write_bytes
from pipeline.html_page import card, document
from pipeline.inspect.overview import Histogram, Overview
from pipeline.inspect.prepared_rows import ShownCompletion, ShownExample, Span
from pipeline.inspect.terminal import cuts, share, tokens
from pipeline.inspect.token_text import Token

CHART_STYLE = """
.chart { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .6rem; align-items: center;
  font-size: .8rem; font-variant-numeric: tabular-nums; margin-top: .5rem; }
.chart i { font-style: normal; color: var(--faint); text-align: right; }
.chart u { text-decoration: none; background: var(--bar); height: .8rem; border-radius: 2px; min-width: 1px; }
.chart u.none { background: none; }
"""
STYLE = (
    CHART_STYLE
    + """.legend { display: flex; flex-wrap: wrap; gap: .5rem .9rem; font-size: .85rem; }
.example { margin-bottom: 1.2rem; padding: 0; overflow: hidden; }
.example header { padding: .6rem 1.1rem; border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 0 1rem; }
.example header span { color: var(--faint); }
section { padding: .7rem 1.1rem .9rem; } section + section { border-top: 1px solid var(--line); }
section h3 { font-size: .85rem; margin: 0 0 .4rem; } section h3 span { color: var(--faint); font-weight: 400; }
.text { font: 13px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
t { border-radius: 3px; padding: .08rem 0; } t:hover { outline: 1px solid currentColor; }
.prompt t { background: var(--prompt-paper); color: var(--prompt); }
.trained t { background: var(--good-paper); color: var(--good); } .bad .trained t { background: var(--bad-paper); color: var(--bad); }
.masked t { background: var(--masked-paper); color: var(--faint); }
t:nth-child(even) { filter: brightness(.96); } t.special, .prompt t.special, .trained t.special, .bad .trained t.special, .masked t.special
  { background: var(--special-paper); color: var(--special); font-weight: 600; padding: .08rem .2rem; margin: 0 1px; }
.break { opacity: .45; } sub { font-size: 9px; color: var(--faint); margin: 0 .25em 0 .1em; }
.cut { background: var(--cut-paper); color: var(--cut); border-radius: 3px; padding: .08rem .35rem; font-weight: 600; }
"""
)
BAD_ROLES = ("rejected", "undesirable")


def write_page(path: Path, overview: Overview, examples: Sequence[ShownExample], with_ids: bool) -> None:
    """Write the page to `path`."""
    write_bytes(path, page(overview, examples, with_ids).encode())


def page(overview: Overview, examples: Sequence[ShownExample], with_ids: bool) -> str:
    """The page as text."""
    cards = "".join(card(value, label) for value, label in _figures(overview))
    charts = "".join(chart(histogram) for histogram in overview.histograms)
    shown = "".join(_example(example, with_ids) for example in examples)
    name = escape(overview.folder.name)
    return document(
        overview.folder.name,
        STYLE,
        f'<h1>{name}</h1><p class="path">{escape(str(overview.folder))}, tokenizer {escape(overview.tokenizer)}</p>\n'
        f'<h2>Rows and tokens</h2><div class="grid">{cards}</div>\n{_dropped(overview)}'
        f'<h2>Lengths in tokens</h2><div class="grid">{charts}</div>\n'
        f"<h2>Examples</h2>{_legend()}{shown}\n",
    )


def _figures(overview: Overview) -> list[tuple[str, str]]:
    counts = overview.counts
    return [
        (f"{counts['rows_kept']:,} of {counts['rows_in']:,}", "rows kept"),
        (
            f"{counts['examples']['train']:,} + {counts['examples']['heldout']:,}",
            "examples for training + held out",
        ),
        (f"{overview.tokens:,}", "tokens; a prompt counts once"),
        (
            share(overview.trained_tokens, overview.tokens),
            f"of all tokens are trained; {share(overview.trained_tokens, overview.completion_tokens)} of completion tokens",
        ),
        (f"{counts['cuts']['prompts']['cut']:,}", f"prompts truncated: {cuts(overview, 'prompts')}"),
        (
            f"{counts['cuts']['completions']['cut']:,}",
            f"completions truncated: {cuts(overview, 'completions')}",
        ),
    ]


def _dropped(overview: Overview) -> str:
    reasons = ", ".join(
        f"{count:,} {escape(reason.replace('_', ' '))}"
        for reason, count in overview.counts["dropped"].items()
    )
    return f'<p class="note">Dropped: {reasons or "none"}.</p>\n'


def chart(histogram: Histogram) -> str:
    """A histogram as a card of bars."""
    most = max(count for _, _, count in histogram.bins)
    bars = "".join(
        f'<i>{first:,}-{last:,}</i><u{"" if count else " class=none"} style="width:{100 * count / most:.2f}%"></u><i>{count:,}</i>'
        for first, last, count in histogram.bins
    )
    return (
        f'<div class="card"><strong>{escape(histogram.name)}</strong><br><span>median {histogram.median:,}, '
        f'p90 {histogram.p90:,}, longest {histogram.longest:,}</span><div class="chart">{bars}</div></div>'
    )


def _legend() -> str:
    return (
        '<div class="legend text"><span class="prompt"><t>prompt</t></span><span class="trained"><t>trained</t></span>'
        '<span class="bad"><span class="trained"><t>trained, rejected</t></span></span><span class="masked"><t>masked</t></span>'
        '<span class="trained"><t class="special">special</t></span><span class="cut">✂ truncated</span><span>↵ line break</span></div><br>'
    )


def _example(shown: ShownExample, with_ids: bool) -> str:
    cut = f'<span class="cut">✂ {tokens(shown.prompt_cut)} truncated</span>' if shown.prompt_cut else ""
    text = _span(shown.prompt, with_ids)
    prompt = f"{cut} {text}" if shown.cut_at_start and cut else f"{text} {cut}"
    return (
        f'<article class="card example"><header><strong>example {shown.number:,}</strong><span>{escape(shown.split)}</span>'
        f"<span>{escape(shown.source)}</span></header>"
        f'<section><h3>prompt <span>{tokens(shown.num_prompt_tokens)}</span></h3><div class="text">{prompt}</div></section>'
        + "".join(_completion(completion, with_ids) for completion in shown.completions)
        + "</article>\n"
    )


def _completion(completion: ShownCompletion, with_ids: bool) -> str:
    masked = completion.num_tokens - completion.num_trained
    detail = tokens(completion.num_tokens) + (f", {masked:,} masked" if masked else "")
    detail += "" if completion.score is None else f", score {completion.score:g}"
    cut = f' <span class="cut">✂ {tokens(completion.cut)} truncated</span>' if completion.cut else ""
    text = "".join(_span(span, with_ids) for span in completion.spans)
    side = ' class="bad"' if completion.role in BAD_ROLES else ""
    return f'<section{side}><h3>{escape(completion.role)} <span>{detail}</span></h3><div class="text">{text}{cut}</div></section>'


def _span(span: Span, with_ids: bool) -> str:
    return (
        f'<span class="{span.part}">' + "".join(_token(token, with_ids) for token in span.tokens) + "</span>"
    )


def _token(token: Token, with_ids: bool) -> str:
    ids = ", ".join(map(str, token.ids))
    text = escape(token.text).replace("\n", '<span class="break">↵</span>\n')
    special = ' class="special"' if token.is_special else ""
    return f'<t{special} title="{ids}">{text}</t>' + (f"<sub>{ids}</sub>" if with_ids else "")
