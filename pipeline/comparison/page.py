"""A comparison as one HTML page without external files: figures, and completions side by side with their differences."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from cache.files import write_bytes
from pipeline.comparison.figures import Lines, notes, text_lines, win_lines
from pipeline.html_page import card, document
from stages.compare.comparison import Against, Compared, Comparison
from stages.compare.completions import Completed
from stages.compare.verdicts import TIE, Outcome, Verdict

SHOWN_PROMPTS = 200
WORD = re.compile(r"\s+|\w+|[^\w\s]")
# Of longer texts the differences are not marked: the time grows with the product of their lengths.
MOST_WORDS = 4000
STYLE = """
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; padding: .4rem 1.1rem; }
th, td { text-align: right; padding: .3rem .8rem; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; color: var(--faint); font-weight: 400; }
@media (max-width: 40rem) { .wide { padding: .4rem .7rem; } th, td { padding: .3rem .3rem; white-space: normal; font-size: .8rem; overflow-wrap: anywhere; } }
thead th { border-top: 0; font-weight: 600; } tbody + tbody tr:first-child td { border-top: 2px solid var(--line); }
.sample { padding: 0; margin-bottom: 1.2rem; overflow: hidden; }
.sample header { padding: .6rem 1.1rem; border-bottom: 1px solid var(--line); font-size: .85rem; color: var(--faint); }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
.sides > section { padding: .7rem 1.1rem .9rem; box-shadow: -1px -1px 0 var(--line); min-width: 0; }
.prompt { padding: .7rem 1.1rem; background: var(--prompt-paper); border-bottom: 1px solid var(--line); }
h3 { font-size: .85rem; margin: 0 0 .4rem; overflow-wrap: anywhere; } h3 small { color: var(--faint); font-weight: 400; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; }
mark { background: var(--good-paper); color: var(--good); border-radius: 3px; } .baseline mark { background: var(--bad-paper); color: var(--bad); }
.verdict { border-radius: 99px; padding: .05rem .5rem; background: var(--masked-paper); color: var(--faint); font-weight: 600; }
.verdict.wins { background: var(--good-paper); color: var(--good); } .verdict.loses { background: var(--bad-paper); color: var(--bad); }
details { margin-top: .6rem; font-size: .82rem; color: var(--faint); } summary { cursor: pointer; }
"""


def write_page(path: Path, comparison: Comparison) -> None:
    """Write the page to `path`."""
    write_bytes(path, page(comparison).encode())


def page(comparison: Comparison) -> str:
    """The page as text."""
    baseline, models = comparison.baseline, comparison.models
    title = f"{' and '.join(model.name for model in models)} against {baseline.name}"
    prompts = list(dict.fromkeys((entry.asked, entry.sample_index) for entry in models[0].completions))
    by_model = [_by_prompt(model) for model in models]
    samples = [_sample(comparison, by_model, key) for key in prompts[:SHOWN_PROMPTS]]
    more = f"The first {SHOWN_PROMPTS:,} of {len(prompts):,}. " if len(prompts) > SHOWN_PROMPTS else ""
    return document(
        title,
        STYLE,
        f"<h1>{escape(title)}</h1>{_judges(models)}{_cards(models)}"
        f"<h2>Figures</h2>{_table(comparison)}{_notes(models)}"
        f'<h2>Completions</h2><p class="note">{more}Words that the other side does not have in this place are marked.</p>'
        f"<br>{''.join(samples)}",
    )


def _judges(models: Sequence[Compared]) -> str:
    judges = sorted({model.against.judge for model in models if model.against})
    return f'<p class="path">{escape("Judged by " + ", ".join(judges) if judges else "Not judged")}</p>'


def _cards(models: Sequence[Compared]) -> str:
    cards = [_rate_card(model.name, model.against) for model in models if model.against]
    return f'<br><div class="grid">{"".join(cards)}</div>' if cards else ""


def _rate_card(name: str, against: Against) -> str:
    return card(
        win_lines(against).get("win-rate", "no verdict"), f"win-rate of {name}, with its 95 % interval"
    )


def _table(comparison: Comparison) -> str:
    models = comparison.models
    heads = ["", f"{comparison.baseline.name} (baseline)", *(model.name for model in models)]
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    wins: list[Lines] = [{}, *(win_lines(model.against) if model.against else {} for model in models)]
    texts = [text_lines(one.texts) for one in (comparison.baseline, *models)]
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead>{_rows(wins)}{_rows(texts)}</table></div>'


def _rows(columns: Sequence[Lines]) -> str:
    labels = dict.fromkeys(label for lines in columns for label in lines)
    rows = (
        f"<tr><td>{escape(label)}</td>"
        + "".join(f"<td>{escape(lines.get(label, ''))}</td>" for lines in columns)
        + "</tr>"
        for label in labels
    )
    return f"<tbody>{''.join(rows)}</tbody>"


def _notes(models: Sequence[Compared]) -> str:
    found = [f"{model.name}: {note}" for model in models if model.against for note in notes(model.against)]
    return "".join(f'<p class="note">{escape(note)}</p>' for note in found)


Key = tuple[tuple[str, int], int]  # what was asked, sample index
Judged = tuple[Completed, Outcome | None]


def _by_prompt(model: Compared) -> dict[Key, Judged]:
    """The completions of a model by prompt and sample, with what was judged of them."""
    pairs = model.against.outcomes if model.against else []
    judged = {_key(pair.completion): pair for pair in pairs}
    return {_key(entry): (entry, judged.get(_key(entry))) for entry in model.completions}


def _key(entry: Completed) -> Key:
    return entry.asked, entry.sample_index


def _sample(comparison: Comparison, by_model: Sequence[dict[Key, Judged]], key: Key) -> str:
    """A prompt with the completions of all models; the baseline's differences are those to the first model."""
    own = by_model[0][key][0]
    of_prompt = [entry for entry in comparison.baseline.completions if entry.asked == key[0]]
    baseline = of_prompt[0] if len(of_prompt) == 1 else _sample_of(of_prompt, key[1])
    sides = [_side(comparison.baseline.name, baseline, None, own, "baseline")] if baseline else []
    for model, found in zip(comparison.models, by_model, strict=True):
        if key in found:
            sides.append(_side(model.name, *found[key], baseline, ""))
    which = f", sample {key[1] + 1}" if key[1] else ""
    return (
        f'<article class="card sample"><header>{escape(own.id)}{which}</header>'
        f'<div class="prompt"><h3>prompt</h3><div class="text">{escape(own.prompt_text)}</div></div>'
        f'<div class="sides">{"".join(sides)}</div></article>\n'
    )


def _sample_of(entries: Sequence[Completed], index: int) -> Completed | None:
    return next((entry for entry in entries if entry.sample_index == index), None)


def _side(name: str, entry: Completed, pair: Outcome | None, other: Completed | None, kind: str) -> str:
    length = f"{len(entry.completion):,} characters" + (
        ", cut off" if entry.finish_reason == "length" else ""
    )
    text = marked(entry.completion, other.completion if other else entry.completion)
    return (
        f'<section class="{kind}"><h3>{escape(name)} {_badge(pair)} <small>{length}</small></h3>'
        f'<div class="text">{text}</div>{_details(pair)}</section>'
    )


def _badge(pair: Outcome | None) -> str:
    if pair is None:
        return ""
    names = {1.0: "wins", TIE: "tie", 0.0: "loses", None: "no verdict"}
    name = names[pair.preference]
    return f'<span class="verdict {name}">{name}</span>'


def _details(pair: Outcome | None) -> str:
    """What the judge said: scores, replies, problems."""
    said = [line for verdict in pair.verdicts for line in _said(verdict)] if pair else []
    if not said:
        return ""
    return f'<details><summary>what the judge said</summary><div class="text">{escape(chr(10).join(said))}</div></details>'


def _said(verdict: Verdict) -> list[str]:
    lines = []
    if verdict.score is not None and verdict.baseline_score is not None:
        lines.append(f"score {verdict.score:g}, baseline {verdict.baseline_score:g}")
    if verdict.reply is not None:
        order = "this one first" if verdict.order == "completion_first" else "the baseline first"
        lines.append(f"{order}: {verdict.reply}")
    if verdict.problem and verdict.reply is None:
        lines.append(verdict.problem)
    return lines


def marked(text: str, other: str) -> str:
    """`text` as HTML, with the words marked that differ from those of `other` in this place."""
    own, others = WORD.findall(text), WORD.findall(other)
    if len(own) + len(others) > MOST_WORDS:
        return escape(text)
    matcher = SequenceMatcher(None, others, own, autojunk=False)
    return "".join(
        escape("".join(own[start:end]))
        if tag == "equal"
        else f"<mark>{escape(''.join(own[start:end]))}</mark>"
        for tag, _, _, start, end in matcher.get_opcodes()
        if end > start
    )
