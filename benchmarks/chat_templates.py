"""Render preferences of many kinds with every chat template of a folder, and compare with transformers' own rendering.

In:  FOLDER of Jinja files (of llama.cpp, vLLM, axolotl, TRL, ...; whoever runs it fetches them).
     Those under --held-out, which were not looked at while renderer and check were written, are reported apart.
Out: results/chat_templates.json and .md with --write; exit code 1 where a kept row differs from transformers.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chat_template_check import cell, tokenizer_for
from benchmarks.chat_template_rows import KINDS
from benchmarks.record import write_results
from stages.tokenization.template import Template

NOTES = """right: the prompt's ids are those of `apply_chat_template(add_generation_prompt=True)`, and the trained text is what transformers' rendering has
behind them (with `{% generation %}` blocks: what its assistant mask marks), to the first end token. counted: kept, and a note of
the report names what is left out. unshown: refused, because the template drops a text or the tools. neither: transformers renders the row with an error. refused: one line with the reason.
different: kept, and not as transformers has it. Where the rendering does not go on from the prompt (thinking blocks) and for
completions of several assistant turns, right means: one trained stretch for each assistant turn with its answer or call, found in
transformers' rendering, without the words of others or the mark in front of a turn. Each template has a synthetic tokenizer with its
special tokens. share: (right + counted) of the rows that the template shows.
"a begun answer": the prompt ends with an assistant turn, and its ids are those of `continue_final_message=True`.

181 templates on which renderer and check were written, one for each content but for white space at its ends: 36 of axolotl
(axolotl-ai-cloud/axolotl 067b021, src/axolotl/utils/chat_templates/templates), 53 of TRL (huggingface/trl f2cd577, trl/chat_templates),
57 of llama.cpp (Raudbjorn/ggml-llama.cpp ae1a0b1, models/templates, a fork, as the original is too large to fetch here), 28 of a year before
(ye-NX/llama.cpp 1eeb523), 55 of ik_llama.cpp (ikawrakow/ik_llama.cpp 8337e4c), 35 of vLLM's examples (neuralmagic/vllm 017e9f4, a fork) and 25 of
a year before (HabanaAI/vllm-fork 95af700). Left out: the 12 templates of vLLM for embedding and ranking, which write no answer.

Held out: 18 of chujiezheng/chat_templates 11c4956, 25 of unsloth (unslothai/unsloth 015bdef, the texts of unsloth/chat_templates.py with a system text
filled in), 43 of huggingface.js (fe42e68, packages/jinja/test/e2e.test.js), each content that is in no collection before. Their first run had
`different` in 24 cells, all of 3 templates (2 of deepseek-coder, functionary v2.2), because the check did not know the end tokens that those models document, <|EOT|> and
<|stop|>, and gave their tokenizers another; with both in its list this table is the second run. Nothing else was changed for them."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--held-out", nargs="*", type=Path, default=[], help="folders that are reported apart"
    )
    parser.add_argument("--write", action="store_true", help="write results/chat_templates.json and .md")
    parser.add_argument("--show", nargs="*", default=["different"], help="outcomes to list")
    parser.add_argument("--kind", help="only this kind of row")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.kind in (None, kind)]
    rows, total = [], 0
    for folder in (options.folder, *options.held_out):
        paths = sorted(folder.rglob("*.jinja"))
        total += len(paths)
        prefix = "" if folder == options.folder else f"{folder.name}: "
        rows += [as_row(prefix + kind, found) for kind, found in counted(paths, kinds, options.show).items()]
    for row in rows:
        print(row)
    if options.write:
        write_results("chat_templates", rows, f"{total} chat templates", NOTES)
    return int(any(row["different"] for row in rows))


def counted(paths: Sequence[Path], kinds: Sequence[str], shown: Sequence[str]) -> dict[str, Counter[str]]:
    """The outcomes of each kind of row over the templates; prints those that are `shown`."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for path in paths:
        template = Template(tokenizer_for(path.read_text(encoding="utf-8")), "auto", append_eos=True)
        for kind in kinds:
            outcome, why = cell(template, *KINDS[kind])
            counts[kind][outcome] += 1
            if outcome in shown:
                print(f"{outcome:10}{kind:26}{path.name}: {why[:260]}")
    return counts


def as_row(kind: str, found: Counter[str]) -> dict[str, Any]:
    """The counts of one kind of row, and the share that comes in of the rows that transformers renders."""
    rendered = found.total() - found["neither"] - found["unshown"]
    names = ("right", "counted", "refused", "different", "unshown", "neither")
    comes_in = found["right"] + found["counted"]
    return {
        "name": kind,
        **{name: found[name] for name in names},
        "share": round(comes_in / max(rendered, 1), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
