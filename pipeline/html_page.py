"""An HTML page without external files, light and dark, readable on a phone."""

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #687076; --paper: #fbfcfd; --card: #fff; --line: #e2e6ea;
  --prompt: #0b68cb; --prompt-paper: #eaf3fe; --good: #1a7f45; --good-paper: #e6f6ec; --bad: #b25d00; --bad-paper: #fdf1e1;
  --masked-paper: #f1f3f5; --special: #6e45c9; --special-paper: #efe9fd; --cut: #c62a2f; --cut-paper: #ffe9e9; --bar: #6fa8ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --faint: #9ba1a6; --paper: #131517; --card: #1b1e21; --line: #2d3135;
  --prompt: #7cb8ff; --prompt-paper: #14273d; --good: #6fd69a; --good-paper: #12301f; --bad: #f2b36b; --bad-paper: #35240f;
  --masked-paper: #25292c; --special: #b9a1f7; --special-paper: #2b2243; --cut: #ff8a8e; --cut-paper: #3d1a1c; --bar: #3d77bd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .8rem; }
.path, .note { color: var(--faint); font-size: .9rem; overflow-wrap: anywhere; margin: .2rem 0 0; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); font-size: .88rem; }
"""


def document(title: str, style: str, body: str) -> str:
    """A page; `style` comes after the shared one, `title` is escaped, `body` is HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style></head><body>\n'
        f"{body}</body></html>\n"
    )


def card(value: str, label: str) -> str:
    """A figure with what it means."""
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
