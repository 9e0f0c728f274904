"""Artifacts in a terminal: a list, one artifact with what it came from and what came of it, two compared."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from pipeline import tables, yaml_1_2
from pipeline.catalogue.differences import Difference
from pipeline.catalogue.entries import Catalogue, Entry, Unfinished

DIGITS = 12  # of a sha256 that is shown
SHORT = 6  # of one that is only pointed to


def age(created: datetime) -> str:
    """How long ago, in the largest fitting unit."""
    seconds = max(0.0, (datetime.now(UTC) - created).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_list(
    console: Console, catalogue: Catalogue, entries: Sequence[Entry], unfinished: Sequence[Unfinished]
) -> None:
    """Print a line for each artifact."""
    table = tables.columns("artifact", "age", "size")
    table.padding = (0, 1, 0, 0)
    table.add_column("made from", overflow="fold")
    table.columns[0].overflow = "fold"
    for entry in entries:
        name = Text.assemble(f"{entry.place}", (f"  {entry.run_name}" if entry.run_name else "", "cyan"))
        if not entry.manifest:
            name.append("  manifest cannot be read", "red")
        table.add_row(name, age(entry.created), tables.size(entry.num_bytes), _made_from(catalogue, entry))
    console.print(table)
    total = tables.size(sum(entry.num_bytes for entry in entries))
    console.print(
        Text(f"{len(entries):,} artifacts, {total} in {catalogue.root}", style="dim"), soft_wrap=True
    )
    for one in unfinished:
        state = "being written" if one.is_written else "left unfinished"
        at = "" if one.step is None else f", checkpoint at step {one.step:,}"
        console.print(Text(f"{one.kind}/{one.path.name}: {state}{at}", style="yellow"), soft_wrap=True)


def _made_from(catalogue: Catalogue, entry: Entry) -> str:
    files = [Path(path).name for path in catalogue.data_files(entry)]
    return ", ".join([_short(other) for other in catalogue.inputs(entry)] or files)


def _short(entry: Entry) -> str:
    """The kind with the name or the digits, which commands understand as well."""
    return f"{entry.kind} {entry.run_name or entry.fingerprint[:SHORT]}"


def show_entry(console: Console, catalogue: Catalogue, entry: Entry) -> None:
    """Print what it is, how it was made, the inputs up to the data, and the consumers."""
    console.print(Text.assemble((entry.place, "bold"), f"  {entry.run_name or ''}"), soft_wrap=True)
    provenance = entry.manifest.get("provenance", {})
    table = tables.labelled()
    table.add_row("folder", str(entry.path))
    table.add_row("fingerprint", entry.fingerprint)
    table.add_row("made", f"{entry.created:%Y-%m-%d %H:%M} UTC, {age(entry.created)} ago")
    table.add_row("size", tables.size(entry.num_bytes))
    if "command" in provenance:
        table.add_row("command", Text(str(provenance["command"])))
    if "versions" in provenance:
        table.add_row(
            "versions", ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
        )
    console.print(table)
    counts = {
        key: value for key, value in entry.manifest.get("counts", {}).items() if value not in ({}, [], None)
    }
    for title, value in (("identity", entry.manifest.get("identity")), ("counts", counts)):
        if value:
            console.print(Text(title, style="bold"))
            console.print(Text(_indented(yaml_1_2.dump(_shortened(value)))), soft_wrap=True)
    console.print(_tree("made from", entry, catalogue.inputs, catalogue))
    console.print(_tree("used by", entry, catalogue.consumers, catalogue))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().split("\n"))


def _shortened(value: Any) -> Any:
    """The value with its digests cut to what is shown elsewhere."""
    if isinstance(value, dict):
        return {key: _shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    is_digest = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:DIGITS] if is_digest else value


def _tree(title: str, entry: Entry, follow: Any, catalogue: Catalogue) -> Tree:
    tree = Tree(Text(title, style="bold"), guide_style="dim")
    _grow(tree, entry, follow, catalogue, title == "made from")
    if not tree.children:
        tree.add(Text("nothing in the store", style="dim"))
    return tree


def _grow(tree: Tree, entry: Entry, follow: Any, catalogue: Catalogue, with_files: bool) -> None:
    for other in follow(entry):
        _grow(tree.add(Text(other.place)), other, follow, catalogue, with_files)
    for path in catalogue.data_files(entry) if with_files else ():
        tree.add(Text(path, style="dim"))


def show_differences(console: Console, one: Entry, other: Entry, parts: dict[str, list[Difference]]) -> None:
    """Print a table of settings and one of results."""
    for title, found in parts.items():
        numeric = title == "results"
        heads = (one.run_name or one.name, other.run_name or other.name, *(["difference"] if numeric else []))
        table = tables.columns(title, *heads)
        for line in found:
            change = [line.change] if numeric else []
            table.add_row(Text(line.key), Text(_value(line.one)), Text(_value(line.other)), *change)
        console.print(table if found else Text(f"  {title}: the same", style="dim"))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(_shortened(value))
