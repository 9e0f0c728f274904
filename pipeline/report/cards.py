"""The parts of a report that are figures: metrics at the end, data, cache, speed. All return HTML."""

from collections.abc import Mapping, Sequence
from html import escape

from pipeline import tables
from pipeline.html_page import card
from pipeline.inspect.page import chart
from pipeline.report.html_table import wide
from pipeline.report.lengths import histograms
from pipeline.report.runs import ReportedRun
from stages.curves.charts import points, wilson

# Metric, heading.
FINAL = (
    ("eval/rewards/margins", "margin"),
    ("eval/loss", "loss"),
    ("logps_change/chosen", "chosen log-ratio"),
    ("logps_change/rejected", "rejected log-ratio"),
    ("eval/kl", "kl"),
    ("eval/length_bias", "length bias"),
)


def final_table(runs: Sequence[ReportedRun], keys: Sequence[str]) -> str:
    """Held-out metrics of the last evaluation; `keys` are the runs' colours."""
    metrics = [(name, title) for name, title in FINAL if any(run.last(name) is not None for run in runs)]
    wins = {run.label: run.win_rates() for run in runs}
    heads = ["run", "steps", "accuracy (95 %)", *(title for _, title in metrics)]
    heads += ["win-rate"] if any(wins.values()) else []
    rows = []
    for run, key in zip(runs, keys, strict=True):
        values = ["" if (value := run.last(name)) is None else f"{value:.4f}" for name, _ in metrics]
        won = ["<br>".join(map(escape, wins[run.label]))] if any(wins.values()) else []
        rows.append(
            [
                key + escape(run.label),
                f"{run.lines[-1]['step']:,}" if run.lines else "",
                _accuracy(run),
                *values,
                *won,
            ]
        )
    warned = "".join(
        f'<p class="note">{escape(run.label)}: warning: {escape(warning)}.</p>'
        for run in runs
        for warning in run.counts.get("warnings", [])
    )
    unfinished = "".join(
        f'<p class="note">{escape(run.label)} is not finished.</p>' for run in runs if not run.entry.manifest
    )
    return f"{wide(heads, rows)}{warned}{unfinished}"


def _accuracy(run: ReportedRun) -> str:
    share = run.last("eval/rewards/accuracies")
    if share is None:
        return ""
    if not run.heldout:
        return f"{share:.3f}"
    low, high = wilson(share, run.heldout)
    return f"{share:.3f} ({low:.2f} to {high:.2f})"


def data_cards(runs: Sequence[ReportedRun]) -> str:
    """Rows, drops, cuts and lengths of each set of rows that the runs were trained on."""
    found = {run.rows.fingerprint: run.rows for run in runs if run.rows is not None}
    if not found:
        return '<p class="note">The prepared rows are not in the store.</p>'
    parts = []
    for rows in found.values():
        counts = rows.manifest["counts"]
        cards = [
            card(f"{counts['rows_kept']:,} of {counts['rows_in']:,}", "rows kept"),
            card(
                f"{counts['examples']['train']:,} + {counts['examples']['heldout']:,}",
                "examples for training + held out",
            ),
            card(f"{counts['tokens']:,}", "tokens"),
            *(
                card(f"{cut['cut']:,}", f"{kind} truncated{_lost(cut)}")
                for kind, cut in counts["cuts"].items()
            ),
        ]
        dropped = tables.counted(counts["dropped"]) or "none"
        paths = ", ".join(rows.manifest["provenance"].get("data_paths", []))
        parts.append(
            f'<p class="path">{escape(rows.place)}, from {escape(paths)}</p><div class="grid">{"".join(cards)}</div>'
            f'<p class="note">Dropped: {escape(dropped)}.</p><br><div class="grid">{"".join(map(chart, histograms(rows)))}</div>'
        )
    return "".join(parts)


def _lost(cut: Mapping[str, int]) -> str:
    return f", by {cut['tokens']:,} tokens, at most {cut['max']:,}" if cut["cut"] else ""


def cache_cards(runs: Sequence[ReportedRun]) -> str:
    """The stores of reference log-probs, and how far the untrained policy was from them."""
    lines = []
    for run in runs:
        audit = run.counts.get("audit_max_abs_diff")
        audited = "not compared" if audit is None else f"{audit:.2g} nats a token"
        if run.reference is None:
            wanted = run.identity.get("reference")
            name = "not in the store" if wanted else "no reference"
            lines.append([escape(run.label), name, (wanted or "")[:12], "", audited])
            continue
        lines.append(
            [
                escape(run.label),
                escape(run.reference.name),
                run.reference.fingerprint[:12],
                _stored(run),
                audited,
            ]
        )
    heads = ["run", "store", "fingerprint", "rows stored", "audit: largest difference"]
    return wide(heads, lines)


def _stored(run: ReportedRun) -> str:
    import pyarrow as pa

    assert run.reference is not None
    total = 0
    for path in run.reference.path.glob("*.arrow"):
        with pa.memory_map(str(path)) as source:
            total += pa.ipc.open_file(source).read_all().num_rows
    return f"{total:,}"


def speed_table(runs: Sequence[ReportedRun]) -> str:
    """Throughput, time and machine of each run."""
    rows = []
    for run in runs:
        rate, seconds = run.examples_per_second, points(run.lines, "step_seconds")[1]
        rows.append(
            [
                escape(run.label),
                "" if rate is None else f"{rate:,.1f}",
                tables.duration(sum(seconds)),
                tables.duration(run.provenance["seconds"]) if "seconds" in run.provenance else "",
                escape(run.provenance.get("platform", "")),
                escape(run.provenance.get("versions", {}).get("torch", "")),
            ]
        )
    heads = ["run", "examples/s (median step)", "in steps", "in all", "platform", "torch"]
    return wide(heads, rows)
