"""A table in HTML."""

from collections.abc import Iterable, Sequence


def wide(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """The table in a card that scrolls sideways, by the keyboard too."""
    label = heads[0]
    return f'<div class="card wide" role="region" aria-label="{label}" tabindex="0">{table(heads, rows, kind)}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Heads and cells are HTML; `kind` is the class of every cell."""
    mark = f' class="{kind}"' if kind else ""
    head = "".join(f'<th scope="col"{mark}>{cell}</th>' for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td{mark}>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
